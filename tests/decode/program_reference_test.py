"""The decode engine against the plain numpy decoder, which shares no function with it."""

import numpy as np
import pytest

from calm import exits
from calm.decode import engines
from calm.exits import confidence, propagation, schedules
from tests import engine

SOFTMAX, STATE, CLASSIFIER, PROBE = (
  confidence.MEASURES[name] for name in ("softmax", "state", "classifier", "probe")
)
CONSTANT, DECAYING = schedules.Constant(), engine.DECAYING
EXIT, FIRST, COPY = (
  propagation.propagation(name) for name in ("exit_state", "first_state", "copy_projections")
)
TIED = {"logits_via_embedding": True}
RELU = {"mlp_activations": ("relu",)}
# Every measure meets every schedule and propagation, each propagation some subset of exits,
# and every head and MLP occurs. Not every combination: each is a program to compile.
DYNAMIC = [
  (SOFTMAX, CONSTANT, None, EXIT, {}),
  (SOFTMAX, DECAYING, (2, 3), FIRST, {}),
  (SOFTMAX, DECAYING, (1, 3), COPY, RELU),
  (SOFTMAX, CONSTANT, (2,), COPY, TIED),
  (STATE, DECAYING, None, EXIT, {}),
  (STATE, CONSTANT, None, COPY, TIED),
  (STATE, CONSTANT, (1, 3), EXIT, {}),
  (STATE, DECAYING, (2, 3), FIRST, RELU),
  (CLASSIFIER, CONSTANT, None, EXIT, {}),
  (CLASSIFIER, DECAYING, None, FIRST, TIED),
  (CLASSIFIER, CONSTANT, (1, 3), FIRST, RELU),
  (CLASSIFIER, DECAYING, (2,), COPY, {}),
  (PROBE, DECAYING, None, FIRST, TIED),
  (PROBE, CONSTANT, None, EXIT, {}),
]


def name_of(value) -> str:
  if isinstance(value, dict):
    return "_".join(value) or "untied"
  return getattr(value, "name", str(value))


@pytest.mark.parametrize(
  ("measure", "schedule", "allowed", "propagated", "changes"), DYNAMIC, ids=name_of
)
def test_dynamic_exits(measure, schedule, allowed, propagated, changes):
  rule = exits.DynamicExits(measure, schedule, allowed, propagated)
  toy = engine.toy_for(rule, **changes)
  eager = engines.Eager()
  layers = [
    engine.compare(toy, rule, x, engine=eager) for x in (0.3, 0.6, 0.9, schedules.NEVER_EXIT)
  ]
  assert len(set(np.concatenate(layers[:-1]).tolist())) >= 2
  assert set(layers[-1].tolist()) == {4}


@pytest.mark.parametrize("changes", [{}, TIED, RELU], ids=name_of)
@pytest.mark.parametrize("depth", [2, None])
def test_static_exits(depth, changes):
  assert set(engine.compare(engine.toy(**changes), exits.StaticExit(depth), 0.0)) == {
    depth or 4
  }


@pytest.mark.parametrize(
  ("allowed", "propagated", "changes"),
  [(None, EXIT, {}), ((2, 3), FIRST, RELU), (None, COPY, TIED)],
  ids=name_of,
)
def test_oracle(allowed, propagated, changes):
  # A seed whose layers agree with the last one now and then. Random heads of one's own a layer
  # do not, so that per-layer heads have no case here.
  layers = engine.compare(
    engine.toy(seed=8, **changes), exits.OracleExit(allowed, propagated), 0.0
  )
  assert len(set(layers.tolist())) >= 2


def test_the_comparison_can_fail():
  """Meta: one propagation held against another, and one threshold against another."""
  toy, rule = engine.toy(), exits.DynamicExits(SOFTMAX, CONSTANT, None, EXIT)
  state = engine.run(toy, rule, 0.6)
  copied = engine.reference_rows(toy, exits.DynamicExits(SOFTMAX, CONSTANT, None, COPY), 0.6)
  with pytest.raises(AssertionError):
    for i, row in enumerate(copied):
      engine.compare_memory(state.cache, row, i, len(row.tokens))
  with pytest.raises(AssertionError, match="no tie"):
    engine.agreeing_rows(engine.reference_rows(toy, rule, 0.3), state.generation)
