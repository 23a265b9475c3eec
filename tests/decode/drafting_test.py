"""How many tokens are drafted: the laws of the plan, on costs like those of a small model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calm.decode import drafting

# Of passes of 1, 2, ... 8 positions over a step of the full model (the model in the box, CPU).
PLAN = drafting.Plan(costs=(1.0, 1.9, 2.2, 2.4, 2.7, 3.0, 3.2, 3.5))
COSTS = np.array(PLAN.costs)
# What a step costs besides in a loop that may draft, and a draft that is made beside it.
BESIDES = 0.015, 0.02
# As hopeful as nothing known, after a text that told nothing.
HOPEFUL = drafting.Prior(drafting.UNKNOWN.chance, drafting.UNKNOWN.trust, texts=1.0)


def after(*trials: tuple[bool, float], prior: drafting.Prior | None = None) -> drafting.Odds:
  """Odds of one row after passes of one draft each: whether it was accepted, its confidence."""
  odds = drafting.Odds.none(1, prior or drafting.UNKNOWN)
  for accepted, confidence in trials:
    odds = odds.add(jnp.array([[True]]), jnp.array([[accepted]]), jnp.array([[confidence]]))
  return odds


def chance(odds: drafting.Odds, confidence: float) -> float:
  """That a draft is accepted."""
  planned = PLAN(odds, jnp.ones(1, bool))
  return float(planned.chance(jnp.array([confidence]))[0])


def count(odds: drafting.Odds, confidence: float, plan: drafting.Plan = PLAN) -> int:
  """Positions of a pass whose every draft has this confidence."""
  return int(_count(plan, odds, jnp.float32(confidence)))


@functools.partial(jax.jit, static_argnums=0)
def _count(plan: drafting.Plan, odds: drafting.Odds, confidence: jax.Array) -> jax.Array:
  one = jnp.ones(1, bool)
  planned, reach = plan(odds, one), drafting.Reach.of_first(one)
  positions, goes_on = jnp.int32(1), jnp.bool_(True)
  for at in range(len(plan.costs) - 1):
    reach = reach.after(planned.chance(confidence[None]))
    goes_on &= planned.goes_on(jnp.int32(at), reach)
    reach, positions = reach.extended(), positions + goes_on.astype(jnp.int32)
  return positions


def speed(chance: float, confidence: float, learns: bool = False, tokens: int = 64):
  """Tokens of texts over the steps of the full model that their time is worth.

  Every text begins as if it were the first, unless it `learns` from those before it; drafts are
  right by a coin and say `confidence`.
  """
  plan, texts, prior, one = PLAN, 40, drafting.UNKNOWN, jnp.ones(1, bool)
  random, cost = np.random.default_rng(0), 0.0
  counts: dict[tuple[float, ...], int] = {}
  for _ in range(texts):
    odds, idle, at = drafting.Odds.none(1, prior), 0, 0
    while at < tokens:
      steps = min(int(plan.waits(jnp.int32(idle), odds, one)), tokens - at)
      at, cost = at + steps, cost + steps
      if at == tokens:
        break
      known = float(odds.share[0]), float(odds.trust[0]), float(odds.tried[0]), prior.texts
      if known not in counts:
        counts[known] = count(odds, confidence, plan)
      size = min(counts[known], tokens - at)
      coins = random.random(size) < chance
      right = size if coins.all() else int(np.argmin(coins))
      tried = np.arange(size) < right + 1
      looked = right > 0 and bool(drafting.looks(odds, one))
      odds = odds.add(tried[None], coins[None], jnp.full((1, size), confidence))
      emitted = min(right, size - 1) + 1
      at, idle = at + emitted, 0 if emitted > 1 or looked else idle + 1
      cost += plan.costs[size - 1] + (BESIDES[1] if size == 1 else 0.0)
    if learns:
      prior = drafting.learned(prior, odds.share, odds.trust)
  return texts * tokens / (cost + BESIDES[0] * texts * tokens)


def test_a_text_begins_with_drafts_that_are_sure():
  assert count(after(prior=HOPEFUL), 0.9) == len(PLAN.costs)
  assert count(after(prior=HOPEFUL), 0.2) == 1


def test_drafts_that_were_certain_and_refused_are_trusted_less():
  assert count(after((False, 1.0), (False, 1.0)), 1.0) == 1
  assert float(chance(after((False, 1.0)), 1.0)) < 0.5


def test_a_refused_draft_that_was_unsure_says_little():
  assert float(after((False, 0.1)).trust[0]) > float(after((False, 1.0)).trust[0])


def test_drafts_that_were_modest_and_accepted_are_trusted_more():
  modest = ((True, 0.4),) * 8
  assert count(after(prior=HOPEFUL), 0.4) == 1 < count(after(*modest), 0.4)


def test_accepted_drafts_make_passes_longer_and_bring_drafting_back():
  refused, accepted = ((False, 1.0),) * 2, ((True, 0.9),) * 12
  assert count(after(*accepted), 0.9) == len(PLAN.costs)
  assert count(after(*refused), 0.9) == 1 < count(after(*refused, *accepted), 0.9)


def test_trust_becomes_the_ratio_of_the_odds_whatever_confidences_are():
  random = np.random.default_rng(1)
  said = random.uniform(0.1, 0.85, size=(1, 4000)).astype(np.float32)
  odds = 3.0 * said / (1 - said)
  right = random.random(said.shape) < odds / (1 + odds)
  whole = drafting.Odds.none(1, drafting.UNKNOWN).add(np.ones_like(right), right, said)
  assert float(whole.trust[0]) == pytest.approx(3.0, rel=0.15)
  assert chance(whole, 0.5) == pytest.approx(0.75, abs=0.04)


def test_texts_before_say_what_to_expect_until_the_text_itself_does():
  wrong = after(*((False, 1.0),) * 8)
  prior = drafting.UNKNOWN
  for _ in range(8):
    prior = drafting.learned(prior, wrong.share, wrong.trust)
  assert prior.chance < 0.3 and prior.trust < 0.1
  assert count(after(prior=prior), 1.0) == 1 < count(after(prior=HOPEFUL), 1.0)
  assert count(after(*((True, 0.9),) * 12, prior=prior), 0.9) > 3


@pytest.mark.parametrize("right", [True, False])
def test_many_texts_do_not_outweigh_what_a_text_says_itself(right):
  prior = drafting.UNKNOWN
  for _ in range(300):
    text = after(*((right, 0.9),) * 8, prior=prior)
    prior = drafting.learned(prior, text.share, text.trust)
  assert (count(after(prior=prior), 0.9) > 1) == right
  otherwise = after(*((not right, 0.9),) * (4 if right else 12), prior=prior)
  assert (count(otherwise, 0.9) > 1) != right


def test_what_was_not_tried_counts_for_nothing():
  odds = after((True, 0.7), (False, 0.6))
  same = odds.add(jnp.zeros((1, 2), bool), jnp.array([[True, False]]), jnp.ones((1, 2)))
  np.testing.assert_array_equal(same.share, odds.share)
  np.testing.assert_array_equal(same.trust, odds.trust)


def test_rows_that_have_ended_do_not_vote():
  trials = np.ones((2, 30), bool)
  right = np.stack([np.zeros(30), np.ones(30)]).astype(bool)
  odds = drafting.Odds.none(2, drafting.UNKNOWN).add(trials, right, 0.9 * trials)

  def goes_on(*active: bool) -> bool:
    planned = PLAN(odds, jnp.array(active))
    reach = drafting.Reach.of_first(jnp.array(active))
    reach = reach.after(planned.chance(jnp.array([0.9, 0.9])))
    return bool(planned.goes_on(jnp.int32(0), reach))

  assert goes_on(False, True) and not goes_on(True, False)


def test_a_fixed_plan_always_drafts():
  assert count(after((False, 1.0)), 0.0, drafting.Plan(PLAN.costs, adapts=False)) == 8


def test_waits_between_drafts_that_were_not_read_on_from_grow():
  one, good = jnp.ones(1, bool), after(*((True, 0.9),) * 4)
  waits = [int(PLAN.waits(jnp.int32(idle), good, one)) for idle in range(10)]
  assert waits == [0, 0, 1, 2, 4, 8, 16, 32, 32, 32]
  fixed = drafting.Plan(PLAN.costs, adapts=False)
  assert not any(int(fixed.waits(jnp.int32(idle), good, one)) for idle in range(10))


def waits(odds: drafting.Odds) -> list[int]:
  """Of so many drafting passes for nothing: 0, 1 ..."""
  rows = jnp.ones(odds.sums.shape[1], bool)
  return [int(PLAN.waits(jnp.int32(idle), odds, rows)) for idle in range(6)]


def test_waits_are_longer_where_drafts_are_wrong_more_often_than_right():
  refused = (False, 0.9), (False, 0.9)
  assert waits(after(*refused, prior=HOPEFUL)) == [0, 0, 4, 8, 16, 32]


def test_they_begin_at_once_where_no_text_before_spoke_for_drafts():
  """The first text of all, or one after texts whose drafts were worthless."""
  hopeless = drafting.learned(drafting.UNKNOWN, [0.02] * 8, [0.1] * 8)
  for prior in (drafting.UNKNOWN, hopeless):
    assert waits(after((False, 0.9), prior=prior)) == [0, 4, 8, 16, 32, 32]
  assert waits(after((True, 0.9))) == [0, 0, 1, 2, 4, 8]
  two = jax.tree.map(lambda x: jnp.tile(x, (1, 2)), after((False, 0.9)))
  assert waits(two) == [0, 4, 8, 16, 32, 32]


def test_a_pass_no_draft_of_which_counts_ends():
  planned = PLAN(after(prior=HOPEFUL), jnp.ones(1, bool))
  reach = drafting.Reach.of_first(jnp.ones(1, bool))
  assert bool(planned.goes_on(jnp.int32(0), reach.after(jnp.ones(1))))
  assert not bool(planned.goes_on(jnp.int32(0), reach.after(jnp.zeros(1))))


def test_drafts_are_doubted_that_would_not_be_read_on_from_however_sure_they_are():
  """By what passes cost: of cheap ones only where most are wrong."""
  dear = drafting.Plan((1.0, 3.2, 3.5, 3.8, 4.1, 4.4, 4.7, 5.0))
  assert PLAN.least_share == drafting.DOUBTFUL < dear.least_share < 1.0
  for share, reads_on in ((dear.least_share, True), (dear.least_share - 0.01, False)):
    odds = drafting.Odds.none(1, drafting.Prior(share, 1.0, texts=1.0))
    sure = drafting.Reach.of_first(jnp.ones(1, bool)).after(jnp.ones(1))
    assert bool(dear(odds, jnp.ones(1, bool)).goes_on(jnp.int32(0), sure)) == reads_on


def test_what_many_texts_told_outweighs_a_refusal():
  few, many = (drafting.Prior(0.9, 1.0, texts=texts) for texts in (0.0, 20.0))
  shares = [float(after((False, 0.9), prior=prior).share[0]) for prior in (few, many)]
  assert shares[0] < 0.5 and shares[1] > 0.75


def test_passes_that_cost_as_many_steps_are_not_hoped_for():
  assert PLAN.hopes
  costly = tuple(map(float, range(1, 9)))
  assert not drafting.Plan(costly).hopes
  assert drafting.Plan(costly, adapts=False).hopes


@pytest.mark.parametrize("chance", [0.0, 0.3, 0.5, 0.6])
@pytest.mark.parametrize("learns", [False, True])
def test_bad_drafts_cost_a_twentieth_at_most_where_they_say_so(chance, learns):
  """Simulated, by the costs of a pass: `scripts/benchmark_exact.py` measures."""
  assert speed(chance, max(chance, 0.02), learns) > 0.95


@pytest.mark.parametrize("chance", [0.0, 0.3, 0.5, 0.6])
@pytest.mark.parametrize("learns", [False, True])
def test_bad_drafts_that_say_they_are_certain_cost_no_more(chance, learns):
  assert speed(chance, 1.0, learns) > 0.95


def test_two_drafts_of_the_first_text_are_looked_at_and_not_read_on_from():
  """Whatever they say; later ones, and those of later texts, as soon as they are worth it."""
  first = after()
  assert count(first, 0.999) == 1
  nothing = np.zeros((1, 8), bool)
  assert count(first.add(nothing, nothing, np.ones((1, 8))), 0.999) == 1
  assert count(after((True, 0.999)), 0.999) == 1
  assert count(after((True, 0.999), (True, 0.999)), 0.999) == len(PLAN.costs)
  later = drafting.learned(drafting.UNKNOWN, [0.99], [5.0])
  assert count(after(prior=later), 0.999) == len(PLAN.costs)


@pytest.mark.parametrize("confidence", [0.5, 0.84, 1.0])
def test_good_drafts_pay_in_the_first_text_and_in_later_ones(confidence):
  first, later = (speed(0.84, confidence, learns) for learns in (False, True))
  assert first > 1.15 and later > 1.2
