import numpy as np
import pytest

from calm.calibrate import Support, calibrate
from calm.calibrate.generations.records import Prompt
from calm.calibrate.losses import sequence_losses
from tests.calibrate import laws

TEXTS = [["word0 same", "word1 other"], ["x y", "word1 same"]]


def test_equal_texts_lose_nothing_before_any_metric_is_called():
  def never(prediction, references):
    raise AssertionError("the metric was called")

  from calm.calibrate.losses.metrics import Metric

  losses = sequence_losses.textual_losses(laws.generations(3), metric=Metric("never", never))
  np.testing.assert_array_equal(losses.values, np.zeros((3, 2)))


def test_textual_losses_by_hand():
  losses = sequence_losses.textual_losses(laws.generations(2, texts=TEXTS))
  np.testing.assert_allclose(losses.values, [[0.0, 1.0], [0.5, 0.0]])
  assert losses.support == Support() and losses.kind == "textual"
  assert losses.ids == ("id-000", "id-001") and losses.groups == ("group-0", "group-0")
  assert losses.thresholds.tolist() == [0.9, 0.5]
  assert "textual, rouge_l, 2 prompts x 2 thresholds" in repr(losses)
  np.testing.assert_array_equal(np.asarray(losses), losses.values)


def improving():
  """The full model is wrong on the first prompt, where early exit is right."""
  made = laws.generations(2, texts=[["word0 same", "word1 same"], ["word0 same", "x y"]])
  full = (laws.record("id-000", "p q"), made.full[1])
  return type(made)(made.prompts, made.thresholds, made.records, full)


def test_risk_losses_are_paired_differences_and_clipping_forgets_improvements():
  signed = sequence_losses.risk_losses(improving())
  np.testing.assert_allclose(signed.values, [[-1.0, -1.0], [0.0, 1.0]])
  assert signed.support == Support(lower=-1.0) and signed.kind == "risk_signed"
  clipped = sequence_losses.risk_losses(improving(), signed=False)
  np.testing.assert_allclose(clipped.values, [[0.0, 0.0], [0.0, 1.0]])
  assert clipped.support == Support() and clipped.kind == "risk_clipped"
  assert (clipped.values.mean(axis=0) >= signed.values.mean(axis=0)).all()


def test_binary_metrics_declare_binary_losses_except_signed_ones():
  made = improving()
  assert sequence_losses.textual_losses(made, metric="exact_match").support.binary
  assert sequence_losses.risk_losses(made, metric="exact_match", signed=False).support.binary
  assert not sequence_losses.risk_losses(made, metric="exact_match").support.binary


def test_several_references_count_by_the_best():
  made = improving()
  rows = (Prompt("id-000", "i", ("zzz", "p q")), made.prompts[1])
  made = type(made)(rows, made.thresholds, made.records, made.full)
  np.testing.assert_allclose(sequence_losses.risk_losses(made).values[0], [1.0, 1.0])


def test_prefixes_of_a_sequential_run():
  texts = [["word0 same", "word1 other"], ["x y"]]
  made = laws.generations(2, texts=texts)
  textual = sequence_losses.prefix_losses(made, "textual")
  assert [column.tolist() for column in textual] == [[0.0, 0.5], [1.0]]
  risk = sequence_losses.prefix_losses(made, "risk_signed")
  assert [column.tolist() for column in risk] == [[0.0, 0.5], [1.0]]
  with pytest.raises(ValueError, match=r"got incomplete ones at \['0.5'\].*`prefix_losses`"):
    sequence_losses.textual_losses(made)
  more = type(made)(made.prompts, made.thresholds, made.records, made.full[:1])
  with pytest.raises(ValueError, match="full-model records for all prompts used"):
    sequence_losses.prefix_losses(more, "textual")


def test_errors():
  made = laws.generations(2, texts=[["else", "word1 same"]] * 2)
  rows = (Prompt("id-000", "i"), made.prompts[1])
  bare = type(made)(rows, made.thresholds, made.records, made.full)
  with pytest.raises(ValueError, match=r"got 1 that have none, first \['id-000'\]; `"):
    sequence_losses.risk_losses(bare)
  with pytest.raises(ValueError, match=r"`kind` to be one of .* got 'other'"):
    sequence_losses.compute(made, "other")
  with pytest.raises(ValueError, match="whole corpus"):
    sequence_losses.textual_losses(made, metric="bleu")
  for fields in ({"lower": 1.0}, {"upper": np.inf}, {"lower": np.nan}):
    with pytest.raises(ValueError, match="`support` to have finite"):
      Support(**fields)
  with pytest.raises(ValueError, match=r"a binary `support` to be \[0, 1\]"):
    Support(lower=-1.0, binary=True)


def test_rows_and_order_travel_with_the_losses():
  losses = sequence_losses.textual_losses(laws.generations(4))
  part = losses.rows([2, 0])
  assert part.ids == ("id-002", "id-000") and part.groups == ("group-1", "group-0")
  assert losses.order == "permuted" and losses.in_given_order().order == "given"
  plain = sequence_losses.SequenceLosses(np.zeros((2, 1)), np.array([0.5])).rows([1])
  assert plain.ids is None and plain.groups is None


def test_losses_feed_calibrate():
  losses = sequence_losses.textual_losses(laws.generations(40))
  found = calibrate(losses.ungrouped(), tolerance=0.1, error_rate=0.05)
  assert found.threshold == 0.5 and found.num_examples == 40 and not found.clusters
  grouped = calibrate(losses, tolerance=0.1, error_rate=0.05)  # two prompts a group
  assert grouped.num_examples == 20 and grouped.clusters
