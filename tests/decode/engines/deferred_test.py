"""Deferred filling decodes what the yardstick and the eager engine do, caches included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calm import exits
from calm.decode import engines
from calm.decode import program as program_lib
from calm.decode.engines import deferred
from calm.exits import confidence, propagation, schedules
from tests import engine

SOFTMAX, STATE, CLASSIFIER, PROBE = (
  confidence.MEASURES[name] for name in ("softmax", "state", "classifier", "probe")
)
FIRST, LEARNED = map(propagation.propagation, ("first_state", "learned"))
# Of 8 rows: chunks of 4 and 1 positions, of 1, and of the whole length (which overlaps).
ENGINES = {rows: engines.Deferred(rows) for rows in (32, 1, 512)}
RULES = [
  (exits.DynamicExits(SOFTMAX, engine.DECAYING), 32),
  (exits.DynamicExits(STATE, allowed=(2, 3)), 512),
  (exits.DynamicExits(CLASSIFIER), 1),
  (exits.DynamicExits(PROBE, allowed=(2, 3)), 32),
  (exits.DynamicExits(CLASSIFIER, allowed=(1, 3), propagation=FIRST), 512),
  (exits.DynamicExits(SOFTMAX, allowed=(1, 3), propagation=LEARNED), 1),
  (exits.DynamicExits(CLASSIFIER, propagation=LEARNED), 32),
]


@pytest.mark.parametrize(("rule", "rows"), RULES, ids=lambda x: getattr(x, "measure", x))
def test_the_yardstick_caches_included(rule, rows):
  toy, seen = engine.toy_for(rule), set()
  for threshold in (0.3, 0.6, 0.9, schedules.NEVER_EXIT):
    seen |= set(engine.compare(toy, rule, threshold, engine=ENGINES[rows]).tolist())
  assert len(seen) >= 2


@pytest.mark.parametrize("rows", [1, 2, 16, 64])
def test_one_row_alone_leaves_layers_pending(rows):
  """With one row nothing fills a layer but that row's own need of it."""
  toy, rule = engine.toy(), exits.DynamicExits(CLASSIFIER)
  changes = 0
  for i in range(len(engine.PROMPTS)):
    layers = engine.compare(
      toy, rule, 0.6, engine.PROMPTS[i : i + 1], engine=engines.Deferred(rows)
    )
    changes += (np.diff(layers) > 0).sum()
  assert changes > 3


def loop_state(rule, threshold, made):
  """What the loop carries at its end, before `flush`."""
  toy = engine.toy()

  def decode(weights, encoded):
    program = program_lib.Program(toy.config, rule, engine.LENGTH, engine=made)
    bound = program.bind(weights, encoded, jnp.float32(threshold))
    active = jnp.ones(len(engine.PROMPTS), bool)
    return engine.decode_loop(bound, active)

  return jax.jit(decode)(toy.weights.decoder, engine.encode(toy))


def test_layers_that_nobody_needs_stay_empty_until_flush():
  rule = exits.DynamicExits(CLASSIFIER)
  state = loop_state(rule, 0.0, ENGINES[32])
  first, *others = state.cache.layers
  assert first.filled == state.position > 1
  for fill in others:
    assert fill.filled == 0 and not fill.cache.keys.any() and not fill.cache.values.any()
  flushed = engine.run(engine.toy(), rule, 0.0, engine=ENGINES[32])
  eager = engine.run(engine.toy(), rule, 0.0, engine=engines.Eager())
  assert all(cache.keys[..., 0, :].any() for cache in flushed.cache)
  for i in range(len(engine.PROMPTS)):
    engine.assert_same_row(flushed, eager, i, i)
    engine.assert_same_confidences(flushed.generation, eager.generation, i, i)


def test_rules_and_propagations_that_have_nothing_to_defer_are_refused():
  toy = engine.toy()
  copies = exits.DynamicExits(SOFTMAX, propagation=propagation.propagation("copy_projections"))
  with pytest.raises(TypeError, match=r"`exits.DynamicExits` for.*got StaticExit; use"):
    engine.run(toy, exits.StaticExit(), engine=ENGINES[32])
  with pytest.raises(ValueError, match=r"projects a state.*'copy_projections'; use"):
    engine.run(toy, copies, engine=ENGINES[32])
  for rule in (exits.StaticExit(), exits.OracleExit(), copies):
    assert not deferred.can_defer(rule)


def test_segments_end_where_rows_may_leave():
  assert deferred.segments((1, 2, 3), 4) == [(1,), (2,), (3,), (4,)]
  assert deferred.segments((2,), 4) == [(1, 2), (3, 4)]
  assert deferred.segments((), 4) == [(1, 2, 3, 4)]
