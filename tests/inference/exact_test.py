"""Exact decoding through a predictor, and slack as a measure that is calibrated."""

import dataclasses

import numpy as np
import pytest

from calm import checkpoints, exits, inference
from calm.calibrate import generations
from calm.calibrate import losses as sequence_losses
from calm.decode import acceptance
from calm.inference import certified
from tests.inference import predictor_test

TEXTS = [f"{word} {i}" for i in range(20) for word in ("a", "the words")]
GRID = [1.0, 0.6, 0.2]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  directory = predictor_test.save(tmp_path_factory.mktemp("model") / "toy")
  opened = inference.load(directory, **{**predictor_test.OPTIONS, "max_input_length": 16})
  return opened.with_options(measure="verified", exit_layers=(2,))


@pytest.fixture(scope="module")
def full(model):
  return model.generate(TEXTS, rule=exits.StaticExit())


def test_texts_are_the_full_models_and_say_how_they_came_about(model, full):
  # A random model's drafts do not pay, and would soon be none.
  rule = dataclasses.replace(inference.exact_rule(model, 2), adapts=False)
  outputs = model.generate(TEXTS, rule=rule)
  assert outputs.guarantee is None
  for output, expected in zip(outputs, full, strict=True):
    assert output.tokens == expected.tokens and output.text == expected.text
    assert output.score == pytest.approx(expected.score, abs=1e-4)
    assert set(output.exit_layers) == {model.num_layers}
    assert len(output.drafted) == len(output.tokens)
    assert 1 <= output.passes <= len(output.tokens)
    assert sum(output.drafted) <= output.drafts
  assert sum(sum(output.drafted) for output in outputs) > 0
  assert all(output.passes == 0 and output.drafted == () for output in full)


def test_a_text_begins_with_what_those_before_it_had(model):
  one = model.with_options(batch_size=1)
  rule = dataclasses.replace(inference.exact_rule(one, 2), adapts=False)
  prior, key = acceptance.UNKNOWN, (rule, 1.0)
  for batch in one.plan(TEXTS[:4]):
    made = one.decode(one.encode(batch), batch.active, 1.0, rule).verification
    known = float(made.chance[0]), float(made.calibration[0])
    prior = acceptance.later_prior(prior, [known])
    one.expected_drafts[key].update_from_last()
    assert one.expected_drafts[key].prior == prior != acceptance.UNKNOWN
  # Of other drafts, and of other tolerances, nothing is known.
  assert list(one.expected_drafts) == [key]


def test_the_prior_says_how_many_drafts_are_made_and_changes_no_text(model, full):
  # With the head in 8 bits, passes of several positions pay where drafts are good.
  one = model.with_options(batch_size=1, head_dtype="int8")
  rule = dataclasses.replace(inference.exact_rule(one, 2), stop_below=0.0)
  batches = [(batch, one.encode(batch)) for batch in one.plan(TEXTS[:6])]

  def drafts(prior):
    made = 0
    for batch, encoded in batches:
      one.expected_drafts[rule, 1.0] = acceptance.History(must=False, prior=prior)
      generation = one.decode(encoded, batch.active, 1.0, rule)
      expected = full[int(batch.rows[0])].tokens
      assert generation.tokens[0, : len(expected)].tolist() == list(expected)
      made += int(generation.verification.drafts[0])
    return made

  # Random drafts: what trust makes of their confidences is all that says whether they pay.
  timid, bold = (0.9, 1e-3, 1.0), (0.99, 1e4, 1.0)
  assert drafts(timid) < drafts(bold)


def test_slack_is_calibrated_from_a_hypothesis_that_is_true(model, full, tmp_path):
  calibration, cached = certified.certify(
    model, TEXTS, tolerance=0.6, thresholds=GRID, folder=tmp_path / "cache"
  )
  losses = sequence_losses.compute(cached, "textual", metric="rouge_l")
  means = np.mean(losses.values, axis=0)
  assert means[0] == 0.0 and means[-1] > 0.0
  assert [r.tokens for r in cached.full] == [output.tokens for output in full]
  served = model.under(calibration)
  outputs = served.generate(TEXTS)
  assert outputs.threshold == calibration.threshold in GRID
  assert outputs.guarantee == calibration.guarantee
  column = GRID.index(calibration.threshold)
  assert [o.tokens for o in outputs] == [r.tokens for r in cached.records[column]]
  other = model.with_options(exit_layers=(1,))
  with pytest.raises(ValueError, match="exit_layers"):
    other.under(calibration)
  # How many are drafted changes no result: what was refused tells at which slack it would.
  fewer = model.with_options(num_drafts=1)
  assert fewer.procedure == model.procedure
  _, plain = certified.certify(fewer, TEXTS, tolerance=0.6, thresholds=GRID)
  for a, b in zip(cached.records, plain.records, strict=True):
    assert [r.tokens for r in a] == [r.tokens for r in b]
  assert inference.options_of(model.procedure).rule == model.options.rule
  assert generations.load(tmp_path / "cache").records == cached.records


def test_one_layer_drafts(model):
  for layers in (None, (1, 2)):
    options = dataclasses.replace(model.options, exit_layers=layers)
    with pytest.raises(ValueError, match="one exit layer"):
      options.rule  # noqa: B018
  with pytest.raises(ValueError, match=r"`draft_layer` in 1 \.\.\. 2"):
    inference.exact_rule(model, 3)


@pytest.mark.parametrize(("vocab_size", "head"), [(4096, "full"), (32128, "shortlist")])
def test_a_shortlist_drafts_where_the_whole_head_outweighs_the_layers_below(vocab_size, head):
  packed = checkpoints.load(inference.PACKED).config
  config = dataclasses.replace(packed, vocab_size=vocab_size)
  listed = inference.DecodeOptions(shortlist=(1, 2, 3))
  assert inference.options.draft_head(config, listed, 2) == head
  assert inference.options.draft_head(config, inference.DecodeOptions(), 2) == "full"


def test_verified_drafts_from_the_whole_head_where_a_shortlist_lacks_too_much():
  """The model in the box has a list, of which every third token of its texts is no part."""
  named = {"measure": "verified", "exit_layers": (2,)}
  packed = inference.load("packed")
  listed = packed.options.shortlist
  for model in (inference.load("packed", **named), packed.with_options(**named)):
    assert model.options.rule.draft_head == "full"
    assert model.procedure.shortlist is None
  kept = packed.with_options(**named, shortlist=listed)
  assert kept.options.rule.draft_head == "shortlist"
