"""Losses by hand: of generations, of texts of any system, of DataFrames."""

import dataclasses
import json
import tracemalloc

import numpy as np
import pytest

from calm.calibrate import (
  Calibration,
  SequenceLosses,
  Support,
  calibrate,
  calibration,
  from_texts,
  metrics,
)
from calm.calibrate.generations.records import Prompt
from calm.calibrate.losses import compute
from calm.calibrate.metrics import Metric
from tests.calibrate import laws

RATES = {"tolerance": 0.1, "error_rate": 0.05}
TEXTS = [["word0 same", "word1 other"], ["x y", "word1 same"]]


def test_textual_losses_by_hand():
  asked = []

  def rouge(prediction, references):
    asked.append(prediction)
    return metrics.rouge_l(prediction, references)

  losses = compute(
    laws.generations(2, texts=TEXTS), "textual", metric=Metric("r", rouge)
  )
  np.testing.assert_allclose(losses.values, [[0.0, 1.0], [0.5, 0.0]])
  # of equal texts no metric is asked
  assert sorted(asked) == ["word1 other", "x y"]
  assert losses.support == Support() and losses.kind == "textual"
  assert losses.ids == ("id-000", "id-001") and losses.groups == (
    "group-0",
    "group-0",
  )
  assert "textual, r, 2 prompts x 2 thresholds" in repr(losses)


@pytest.mark.parametrize(
  ("kind", "values", "lower", "binary"),
  [
    ("textual", [[1.0, 1.0], [0.0, 1.0]], 0.0, True),
    ("risk_signed", [[-1.0, -1.0], [0.0, 1.0]], -1.0, False),
    ("risk_clipped", [[0.0, 0.0], [0.0, 1.0]], 0.0, True),
  ],
)
def test_a_full_model_that_is_wrong_where_early_exit_is_right(
  kind, values, lower, binary
):
  """Risks are paired differences; clipping forgets improvements."""
  made = laws.generations(
    2, texts=[["word0 same", "word1 same"], ["word0 same", "x y"]]
  )
  made = dataclasses.replace(
    made, full=(laws.record("id-000", "p q"), made.full[1])
  )
  losses = compute(made, kind)
  np.testing.assert_allclose(losses.values, values)
  assert losses.support == Support(lower=lower) and losses.kind == kind
  assert compute(made, kind, metric="exact_match").support == Support(
    lower, binary=binary
  )


def test_errors():
  made = laws.generations(2, texts=[["else", "word1 same"]] * 2)
  bare = dataclasses.replace(
    made, prompts=(Prompt("id-000", "i"), made.prompts[1])
  )
  for given, kind, metric, message in (
    (
      bare,
      "risk_signed",
      "rouge_l",
      r"got 1 that have none, first \['id-000'\]; a",
    ),
    (made, "other", "rouge_l", r"`kind` to be one of .* got 'other'"),
    (
      laws.generations(2, texts=[["word0 same", "word1 other"], ["x y"]]),
      *(
        "textual",
        "rouge_l",
        r"got incomplete ones at \[0.5\]; generate the rest",
      ),
    ),
  ):
    with pytest.raises(ValueError, match=message):
      compute(given, kind, metric=metric)
  for fields in ({"lower": 1.0}, {"upper": np.inf}, {"lower": np.nan}):
    with pytest.raises(ValueError, match="`support` to have finite"):
      Support(**fields)
  with pytest.raises(ValueError, match=r"a binary `support` to be \[0, 1\]"):
    Support(lower=-1.0, binary=True)


FULL = [f"answer {row}" for row in range(100)]
CHEAP = ["another" if row % 3 == 0 else text for row, text in enumerate(FULL)]


@pytest.mark.parametrize("knobs", [(12, 2), ("large", "base")])
def test_any_ordered_knob_is_calibrated_best_first(knobs):
  losses = from_texts(
    FULL, dict(zip(knobs, (FULL, CHEAP), strict=True)), metric="exact_match"
  )
  assert losses.knobs == tuple(map(str, knobs)) and losses.kind == "textual"
  np.testing.assert_allclose(losses.values.mean(axis=0), [0.0, 0.34])
  found = calibrate(losses, **RATES)
  first, second = map(str, knobs)
  assert found.knob == first and found.knobs == (first, second)
  assert f"decoding with {first!r} has" in found.guarantee
  said = (
    f"{first} is the lowest certified threshold; {second} is not certified."
  )
  assert found.reason == said
  value = json.loads(json.dumps(found.to_json()))
  assert Calibration.from_json(value, expect_digest=found.digest) == found
  for odd in (["a"], [1, 2]):
    changed = {**value, "knobs": odd}
    with pytest.raises(ValueError, match="`knobs`"):
      Calibration.from_json({**changed, "digest": calibration.digest(changed)})


def test_thresholds_stay_thresholds_and_nothing_certified_is_the_full_model():
  found = calibrate(
    from_texts(FULL, {0.9: FULL, 0.5: CHEAP}, metric="exact_match"), **RATES
  )
  assert found.knobs == () and found.knob == found.threshold == 0.9
  assert "knobs" not in found.to_json()
  none = calibrate(
    from_texts(FULL, {"small": CHEAP}, metric="exact_match"), **RATES
  )
  assert none.knob is None and not none.certified


def test_references_are_read_where_texts_differ():
  references = [[] if row % 3 else ["another", "x"] for row in range(100)]
  losses = from_texts(
    FULL, {"base": CHEAP}, references=references, metric="exact_match"
  )
  assert losses.kind == "risk_signed" and losses.support.lower == -1.0
  np.testing.assert_array_equal(losses.values[:4, 0], [-1.0, 0.0, 0.0, -1.0])
  texts = ["z"] * 100  # one text a prompt
  clipped = from_texts(FULL, {1: CHEAP}, references=texts, kind="risk_clipped")
  assert clipped.kind == "risk_clipped" and np.all(clipped.values == 0.0)
  with pytest.raises(ValueError, match="references"):
    from_texts(FULL, {"base": CHEAP}, references=[[]] * 100)


@pytest.mark.parametrize(
  ("early", "options", "message"),
  [
    ({}, {}, "`knobs` to be .*, at least one, all different"),
    ({"a": CHEAP[:-1]}, {}, r"early\['a'\].* of 100 texts"),
    ({1: CHEAP, "1": CHEAP}, {}, "all different"),
    ({0.5: CHEAP, 0.9: FULL}, {}, "descend strictly"),
  ],
)
def test_what_does_not_fit_is_refused(early, options, message):
  with pytest.raises(ValueError, match=message):
    from_texts(FULL, early, **options)


def test_copies_of_prompts_are_seen_in_their_texts():
  """Inputs are not known here: equal losses beside equal texts of the full
  system are told.
  """
  with pytest.warns(UserWarning, match="as copies of a prompt do"):
    from_texts(
      FULL * 3, {"large": FULL * 3, "base": CHEAP * 3}, metric="exact_match"
    )
  # The losses repeat every third row, and the texts say that these are other
  # prompts.
  calibrate(from_texts(FULL, {"large": CHEAP}, metric="exact_match"), **RATES)


VALUES = (np.random.default_rng(0).random((200, 2)) < [0.02, 0.4]) * 1.0
IDS = [f"p{row}" for row in range(200)]


class Table(dict):
  """What a DataFrame is to `frames`: columns by name."""

  @property
  def columns(self):
    return list(self)


def columns(**more):
  # Not in the order of the grid.
  return {
    "0.5": VALUES[:, 1].tolist(),
    "id": IDS,
    "0.9": VALUES[:, 0].tolist(),
    **more,
  }


@pytest.fixture(params=["pandas", "polars", "plain"])
def make(request):
  if request.param == "plain":
    return Table
  return pytest.importorskip(request.param).DataFrame


def test_a_frame_of_losses_is_calibrated(make):
  # 0 and 1 alone, and nothing declared: taken for binary.
  support = Support(binary=True)
  losses = SequenceLosses(
    VALUES, [0.9, 0.5], support, kind="loss", ids=tuple(IDS)
  )
  expected = calibrate(losses, **RATES)
  found = calibrate(make(columns()), **RATES)
  assert found == expected and found.threshold == 0.9
  grouped = calibrate(
    make(columns(group=[f"g{row // 2}" for row in range(200)])), **RATES
  )
  assert grouped.clusters and grouped.num_examples == 100
  with pytest.raises(
    ValueError, match=r"name the cluster of every row, .* 100 rows without"
  ):
    calibrate(make(columns(group=[*IDS[:100], *[None] * 100])), **RATES)


def test_columns_that_are_no_thresholds_are_refused(make):
  with pytest.raises(
    ValueError, match=r"named by thresholds, `id` or `group`, got \[.*'score'\]"
  ):
    calibrate(make(columns(score=[0.0] * 200)), **RATES)
  with pytest.raises(ValueError, match="a column a threshold"):
    calibrate(make({"id": IDS}), **RATES)
  with pytest.raises(ValueError, match=r"column '0.9'` to be real numbers"):
    calibrate(make({"0.9": IDS}), **RATES)


def test_a_table_is_calibrated_in_at_most_four_times_its_memory():
  generator = np.random.default_rng(0)
  losses = generator.random((30_000, 100)) * (
    generator.random((30_000, 100)) < 0.1
  )
  tracemalloc.start()
  try:
    calibrate(losses, np.linspace(0.99, 0.0, 100), **RATES)
    assert 1.0 + tracemalloc.get_traced_memory()[1] / losses.nbytes <= 4.0
  finally:
    tracemalloc.stop()
