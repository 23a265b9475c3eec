"""Exact decoding through a predictor: drafts that turn out well, or to be worth
nothing, and slack as a measure that is calibrated.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calm import exits, inference
from calm.calibrate import generations
from calm.calibrate import losses as sequence_losses
from calm.inference import grid, timing
from tests.inference import predictor_test

TEXTS = [f"{word} {i}" for i in range(12) for word in ("a", "the words")]
OPTIONS = {**predictor_test.OPTIONS, "max_input_length": 16}
GRID = [1.0, 0.6, 0.2]
NONSENSE = exits.Speculative(2, 3, stop_below=0.0)


@pytest.fixture(scope="module")
def verified(directory):
  opened = inference.load(directory, **OPTIONS)
  return opened.with_options(measure="verified", exit_layers=(2,))


@pytest.fixture(scope="module")
def model(verified):
  """Its short list says what is least likely."""
  made = verified.with_options(
    measure="shortlist", shortlist=tuple(range(3, 60)), batch_size=1
  )
  decoder = made.weights.decoder
  negative = jax.tree.map(jnp.negative, decoder.shortlist)
  decoder = dataclasses.replace(decoder, shortlist=negative)
  made.__dict__["weights"] = dataclasses.replace(made.weights, decoder=decoder)
  return made


@pytest.fixture(scope="module")
def full(verified):
  return verified.generate(TEXTS, rule=exits.StaticExit())


@pytest.fixture
def ran(model, monkeypatch):
  """The rules of the programs that were run, batch by batch; nothing was seen
  before.
  """
  model.expected_drafts.clear()
  rules = []
  run = inference.Predictor._run

  def spy(predictor, rule, *args):
    rules.append(rule)
    return run(predictor, rule, *args)

  monkeypatch.setattr(inference.Predictor, "_run", spy)
  return rules


def begun(model, ran, rule, **options) -> None:
  model.generate(TEXTS[:1], rule=rule, **options)
  model.expected_drafts.clear()
  ran.clear()


def test_texts_of_drafts_that_bring_nothing_are_decoded_at_full_depth(
  model, full, ran
):
  begun(model, ran, NONSENSE)
  outputs = model.generate(TEXTS, rule=NONSENSE)
  drafted = [i for i, rule in enumerate(ran) if rule == NONSENSE]
  # Each makes the next one wait longer, once the texts before it saved nothing.
  waits = np.diff([*drafted, len(TEXTS)])
  assert drafted[:2] == [0, 2] and waits.max() > 8 and len(ran) == len(TEXTS)
  assert {type(rule) for rule in ran} == {exits.Speculative, exits.StaticExit}
  for i, (output, expected) in enumerate(zip(outputs, full, strict=True)):
    assert (
      output.tokens == expected.tokens
      and output.exit_layers == expected.exit_layers
    )
    assert output.score == pytest.approx(expected.score, abs=1e-4)
    if i not in drafted:
      assert output.passes == len(output.tokens) and output.drafts == 0
      assert not any(output.drafted) and set(output.confidences) == {1.0}


@pytest.mark.parametrize(
  ("change", "threshold"),
  # the first has slack
  [({}, 0.5), ({"adapts": False}, 1.0), ({"measures": True}, 1.0)],
)
def test_drafts_that_must_be_made_are_whatever_they_are_worth(
  model, ran, change, threshold
):
  rule = dataclasses.replace(NONSENSE, **change)
  begun(model, ran, rule, threshold=threshold)
  model.generate(TEXTS[:8], rule=rule, threshold=threshold)
  assert ran == [rule] * 8
  timed = model.with_options(batch_size=1)  # and where they are timed
  timed.__dict__["weights"] = model.weights
  timing.beside_full_depth(
    timed, TEXTS[:6], 1.0, rule=NONSENSE, prompts=6, rounds=2
  )
  assert ran[8:].count(NONSENSE) == len(ran[8:]) / 2 > 5


# ---- Exact texts, and slack


def test_texts_are_the_full_models_and_say_how_they_came_about(verified, full):
  # A random model's drafts do not pay, and would soon be none.
  rule = dataclasses.replace(
    exits.Speculative(2, draft_head="full"), adapts=False
  )
  outputs = verified.generate(TEXTS, rule=rule)
  assert outputs.guarantee is None
  for output, expected in zip(outputs, full, strict=True):
    assert output.tokens == expected.tokens and output.text == expected.text
    assert output.score == pytest.approx(expected.score, abs=1e-4)
    assert set(output.exit_layers) == {verified.num_layers}
    assert len(output.drafted) == len(output.tokens)
    assert 1 <= output.passes <= len(output.tokens)
    assert sum(output.drafted) <= output.drafts
  assert sum(sum(output.drafted) for output in outputs) > 0
  assert all(output.passes == 0 and output.drafted == () for output in full)


def test_slack_is_calibrated_from_a_hypothesis_that_is_true(
  verified, full, tmp_path
):
  calibration, cached = grid.certify(
    verified, TEXTS, tolerance=0.6, thresholds=GRID, folder=tmp_path / "cache"
  )
  losses = sequence_losses.compute(cached, "textual", metric="rouge_l")
  means = np.mean(losses.values, axis=0)
  assert means[0] == 0.0 and means[-1] > 0.0
  assert [r.tokens for r in cached.full] == [output.tokens for output in full]
  served = verified.under(calibration)
  outputs = served.generate(TEXTS)
  assert outputs.threshold == calibration.threshold in GRID
  assert outputs.guarantee == calibration.guarantee
  column = GRID.index(calibration.threshold)
  assert [o.tokens for o in outputs] == [
    r.tokens for r in cached.records[column]
  ]
  other = verified.with_options(exit_layers=(1,))
  with pytest.raises(ValueError, match="exit_layers"):
    other.under(calibration)
  with pytest.raises(ValueError, match="one exit layer"):
    dataclasses.replace(verified.options, exit_layers=(1, 2)).rule  # noqa: B018
  # How many are drafted changes no result: what was refused tells at which
  # slack it would.
  fewer = verified.with_options(num_drafts=1)
  assert fewer.procedure == verified.procedure
  _, plain = grid.certify(fewer, TEXTS, tolerance=0.6, thresholds=GRID)
  for a, b in zip(cached.records, plain.records, strict=True):
    assert [r.tokens for r in a] == [r.tokens for r in b]
  assert inference.options_of(verified.procedure).rule == verified.options.rule
  assert generations.load(tmp_path / "cache").records == cached.records


def test_a_shortlist_drafts_where_the_whole_head_outweighs_the_layers_below():
  """The model in the box has a list, of which every third token of its texts is
  no part.
  """
  named = {"measure": "verified", "exit_layers": (2,)}
  packed = inference.load("packed")
  for model in (
    inference.load("packed", **named),
    packed.with_options(**named),
  ):
    assert (
      model.options.rule.draft_head == "full"
      and model.procedure.shortlist is None
    )
  kept = packed.with_options(**named, shortlist=packed.options.shortlist)
  assert kept.options.rule.draft_head == "shortlist"
  wide = dataclasses.replace(packed.config, vocab_size=32128)
  assert inference.options.draft_head(wide, packed.options, 2) == "shortlist"
