"""How many tokens are drafted: the laws of the plan, on costs like those of a small model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calm.decode import acceptance

# Of passes of 1, 2, ... 8 positions over a step of the full model (the model in the box, CPU).
PLAN = acceptance.Plan(costs=(1.0, 1.9, 2.2, 2.4, 2.7, 3.0, 3.2, 3.5))
# What a step costs besides in a loop that may draft.
LOOP_COST = 0.015
# Good drafts, and confidences to be taken at their word.
HOPEFUL = (0.9, 1.0, 1.0)
ONE = jnp.ones(1, bool)


def after(*trials: tuple[bool, float], prior=acceptance.UNKNOWN):
  """The estimate of one row after passes of one draft: whether accepted, its confidence."""
  estimate = acceptance.AcceptanceEstimate.of(prior, 1)
  for accepted, confidence in trials:
    drafts = jnp.array([[True]]), jnp.array([[accepted]]), jnp.full((1, 1), confidence)
    estimate = estimate.update(*drafts)
  return estimate


def later(prior: acceptance.Prior, estimate) -> acceptance.Prior:
  known = float(estimate.chance[0]), float(estimate.calibration[0])
  return acceptance.later_prior(prior, [known])


def count(estimate, confidence: float, plan: acceptance.Plan = PLAN) -> int:
  """Positions of a pass whose every draft has this confidence."""
  return int(_count(plan, estimate, jnp.float32(confidence)))


@functools.partial(jax.jit, static_argnums=0)
def _count(plan, estimate, confidence) -> jax.Array:
  chances, tokens = jnp.ones(1), jnp.float32(1.0)
  positions, goes_on, mean = jnp.int32(1), jnp.bool_(True), estimate.mean_chance(ONE)
  for at in range(len(plan.costs) - 1):
    chances = chances * estimate.chances(confidence[None])
    goes_on &= plan.goes_on(jnp.int32(at), chances, tokens, mean)
    tokens, positions = tokens + jnp.sum(chances), positions + goes_on.astype(jnp.int32)
  return positions


def backoffs(estimate, plan=PLAN) -> list[int]:
  """After so many drafting passes for nothing: 0, 1 ..."""
  mean = estimate.mean_chance(ONE)
  return [int(plan.backoff(jnp.int32(streak), mean)) for streak in range(10)]


def speed(chance: float, confidence: float, learns: bool = False, tokens: int = 64):
  """Tokens of texts over the steps of the full model that their time is worth.

  Every text begins as if it were the first, unless it `learns` from those before it; drafts are
  right by a coin and say `confidence`.
  """
  texts, prior, random, cost = 40, acceptance.UNKNOWN, np.random.default_rng(0), 0.0
  counts: dict[bytes, int] = {}
  update = jax.jit(acceptance.AcceptanceEstimate.update)
  for _ in range(texts):
    estimate, streak, at = acceptance.AcceptanceEstimate.of(prior, 1), 0, 0
    while at < tokens:
      steps = int(PLAN.backoff(jnp.int32(streak), estimate.mean_chance(ONE)))
      steps = min(steps, tokens - at)
      at, cost = at + steps, cost + steps
      if at == tokens:
        break
      known = np.asarray(estimate.sums).tobytes()
      if known not in counts:
        counts[known] = count(estimate, confidence)
      size = min(counts[known], tokens - at)
      coins = np.zeros(8, bool)
      coins[:size] = random.random(size) < chance
      right = size if coins[:size].all() else int(np.argmin(coins))
      tried = np.arange(8) < min(right + 1, size)
      said = np.full((1, 8), confidence, np.float32)
      estimate = update(estimate, tried[None], coins[None], said)
      emitted = min(right, size - 1) + 1
      at, streak = at + emitted, 0 if emitted > 1 else streak + 1
      cost += PLAN.costs[size - 1] if size > 1 else 1.0 + acceptance.DRAFT_COST
    if learns:
      prior = later(prior, estimate)
  return texts * tokens / (cost + LOOP_COST * texts * tokens)


def test_a_text_begins_with_one_draft_and_goes_on_once_it_was_right():
  for confidence in (0.5, 0.999):
    assert count(after(), confidence) == 1 < count(after((True, confidence)), confidence)
  assert count(after(prior=HOPEFUL), 0.9) == len(PLAN.costs)
  assert count(after(prior=HOPEFUL), 0.2) == 1


@pytest.mark.parametrize(
  ("trials", "confidence", "pays"),
  [
    (((False, 1.0),) * 2, 1.0, False),
    (((True, 0.4),) * 8, 0.4, True),
    (((True, 0.9),) * 12, 0.9, True),
    (((False, 1.0),) * 2 + ((True, 0.9),) * 12, 0.9, True),
  ],
)
def test_drafts_are_worth_what_earlier_ones_were(trials, confidence, pays):
  assert (count(after(*trials, prior=HOPEFUL), confidence) > 1) == pays


def test_calibration_becomes_the_ratio_of_the_odds_whatever_confidences_are():
  random = np.random.default_rng(1)
  said = random.uniform(0.1, 0.85, size=(1, 4000)).astype(np.float32)
  odds = 3.0 * said / (1 - said)
  right = random.random(said.shape) < odds / (1 + odds)
  whole = after(prior=HOPEFUL).update(np.ones_like(right), right, said)
  assert float(whole.calibration[0]) == pytest.approx(3.0, rel=0.15)
  assert float(whole.chances(jnp.array([0.5]))[0]) == pytest.approx(0.75, abs=0.04)


@pytest.mark.parametrize("right", [True, False])
def test_many_texts_do_not_outweigh_what_a_text_says_itself(right):
  prior = acceptance.UNKNOWN
  for _ in range(300):
    text = after(*((right, 0.9),) * 8, prior=prior)
    prior = later(prior, text)
  assert (count(after(prior=prior), 0.9) > 1) == right
  otherwise = after(*((not right, 0.9),) * (4 if right else 12), prior=prior)
  assert (count(otherwise, 0.9) > 1) != right


def test_rows_that_have_ended_do_not_vote():
  right = np.stack([np.zeros(30), np.ones(30)]).astype(bool)
  estimate = acceptance.AcceptanceEstimate.of(HOPEFUL, 2)
  estimate = estimate.update(np.ones_like(right), right, np.full(right.shape, 0.9))
  means = [float(estimate.mean_chance(jnp.array(rows))) for rows in ([0, 1], [1, 0], [1, 1])]
  assert means[1] < means[2] < means[0]


def test_a_fixed_plan_always_drafts():
  fixed = acceptance.Plan(PLAN.costs, adapts=False)
  assert count(after((False, 1.0)), 0.0, fixed) == len(PLAN.costs)
  assert not any(backoffs(after((False, 1.0)), fixed))
  assert not fixed.goes_on(jnp.int32(0), jnp.zeros(1), jnp.float32(1), jnp.float32(1))


def test_backoff_grows_and_is_longer_where_drafts_are_refused_more_often_than_not():
  assert backoffs(after(*((True, 0.9),) * 4)) == [0, 0, 1, 2, 4, 8, 16, 32, 32, 32]
  assert backoffs(after(*((False, 0.9),) * 2)) == [0, 4, 8, 16, 32, 32, 32, 32, 32, 32]


def test_drafts_are_doubtful_that_would_not_be_read_on_from_however_sure_they_are():
  """By what passes cost: of cheap ones only where most are wrong."""
  dear = acceptance.Plan((1.0, 3.2, 3.5, 3.8, 4.1, 4.4, 4.7, 5.0))
  assert PLAN.least_chance == acceptance.DOUBTFUL < dear.least_chance < 1.0
  for chance, reads_on in ((dear.least_chance, True), (dear.least_chance - 0.01, False)):
    goes_on = dear.goes_on(jnp.int32(0), jnp.ones(1), jnp.float32(1), jnp.float32(chance))
    assert bool(goes_on) == reads_on


def test_passes_that_cost_as_many_steps_are_not_worth_drafting():
  costly = tuple(map(float, range(1, 9)))
  assert PLAN.worth_drafting and not acceptance.Plan(costly).worth_drafting
  assert acceptance.Plan(costly, adapts=False).worth_drafting


@pytest.mark.parametrize("chance", [0.0, 0.5, 0.6])
@pytest.mark.parametrize("learns", [False, True])
def test_bad_drafts_cost_a_twentieth_at_most(chance, learns):
  """Whether they say so or are certain. Simulated, by the costs of a pass:
  `scripts/benchmark_exact.py` measures."""
  assert speed(chance, max(chance, 0.02), learns) > 0.95
  assert speed(chance, 1.0, learns) > 0.95


@pytest.mark.parametrize("confidence", [0.5, 0.84, 1.0])
def test_good_drafts_pay_in_the_first_text_and_in_later_ones(confidence):
  first, later = (speed(0.84, confidence, learns) for learns in (False, True))
  assert first > 1.15 and later > 1.2
