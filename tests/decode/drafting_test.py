"""How many tokens are drafted: the laws of the plan, on costs like those of a small model."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from calm.decode import drafting

# Of passes of 1, 2, ... 8 positions over a step of the full model (the model in the box, CPU).
PLAN = drafting.Plan(costs=(1.0, 1.9, 2.2, 2.4, 2.7, 3.0, 3.2, 3.5))
ACTIVE = jnp.ones(1, bool)


def after(*trials: tuple[bool, float]) -> drafting.Odds:
  """Odds of one row after passes of one draft each: whether it was accepted, its confidence."""
  odds = drafting.Odds(jnp.zeros(1), jnp.zeros(1))
  for accepted, confidence in trials:
    odds = odds.add(jnp.array([[accepted]]), jnp.array([[confidence]]))
  return odds


def count(odds: drafting.Odds) -> int:
  return int(PLAN(odds, ACTIVE).count)


def test_a_text_begins_with_drafts():
  assert count(after()) > 3


def test_drafts_that_were_certain_and_refused_end_drafting():
  planned = PLAN(after((False, 1.0), (False, 1.0)), ACTIVE)
  assert int(planned.count) == 1 and bool(planned.probes)


def test_a_refused_draft_that_was_unsure_does_not():
  assert count(after((False, 0.2))) > 1
  assert float(after((False, 0.2)).share[0]) > float(after((False, 1.0)).share[0])


def test_accepted_drafts_make_passes_longer_and_bring_drafting_back():
  refused = ((False, 1.0), (False, 1.0))
  accepted = ((True, 0.9),) * 12
  assert count(after(*accepted)) == len(PLAN.costs) >= count(after())
  assert count(after(*refused)) == 1 < count(after(*refused, *accepted))


def test_texts_before_say_what_to_expect_until_the_text_itself_does():
  prior = drafting.learned(drafting.PRIOR, [0.1] * 8)
  assert 0.1 < prior < 0.3
  known = dataclasses.replace(after(), prior=prior)
  assert count(known) == 1 < count(after())
  for _ in range(12):
    known = known.add(jnp.array([[True]]), jnp.array([[0.9]]))
  assert count(known) > 3


def test_what_was_not_tried_counts_for_nothing():
  odds = drafting.Odds(jnp.ones(1), jnp.ones(1))
  same = odds.add(jnp.array([[True, False]]), jnp.zeros((1, 2)))
  np.testing.assert_array_equal(same.share, odds.share)


def test_rows_that_have_ended_do_not_vote():
  odds = drafting.Odds(jnp.array([0.0, 30.0]), jnp.array([30.0, 30.0]))
  assert int(PLAN(odds, jnp.array([True, False])).count) == 1
  assert int(PLAN(odds, jnp.array([False, True])).count) > 3


def test_a_fixed_plan_always_drafts():
  assert int(drafting.Plan(PLAN.costs, adapts=False)(after((False, 1.0)), ACTIVE).count) == 8


def test_steps_between_passes_that_emit_one_token_grow():
  drafts, none = (drafting.Planned(jnp.int32(n), jnp.array(False)) for n in (8, 1))
  steps = lambda planned: [int(PLAN.steps(planned, jnp.int32(idle))) for idle in range(10)]
  assert steps(drafts) == [0, 0, 1, 2, 4, 8, 16, 32, 32, 32]
  assert steps(none) == [8, 8, 8, 8, 8, 8, 16, 32, 32, 32]


def test_passes_that_cost_as_many_steps_are_not_hoped_for():
  assert PLAN.hopes
  costly = tuple(map(float, range(1, 9)))
  assert not drafting.Plan(costly).hopes
  assert drafting.Plan(costly, adapts=False).hopes
