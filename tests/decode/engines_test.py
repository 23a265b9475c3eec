"""Every engine against the plain numpy decoder, which shares no function with
it, caches included; and what each engine does of its own.
"""

import jax
import jax.export
import numpy as np
import pytest

from calm import exits
from calm.decode import engines
from calm.exits import confidence, propagation, schedules
from tests import engine

SOFTMAX, STATE, CLASSIFIER, PROBE = (
  confidence.MEASURES[name]
  for name in ("softmax", "state", "classifier", "probe")
)
CONSTANT = schedules.Constant()
DECAYING = engine.DECAYING
EXIT, FIRST, COPY, LEARNED = (
  propagation.propagation(name)
  for name in ("exit_state", "first_state", "copy_projections", "learned")
)
TIED = {"logits_via_embedding": True}
RELU = {"mlp_activations": ("relu",)}
EAGER = engines.Eager
COMPACTED = engines.Compacted
FITTED = engine.sized(COMPACTED, ratio=2)
SPREAD = engine.sized(COMPACTED, sizes=(0, 5, 8))  # which attend in all rows
# Of 8 rows: chunks of 4 and 1 positions, of 1, and of the whole length (which
# overlaps).
BY_FOUR = engines.Deferred
BY_ONE, WHOLE = (engine.sized(BY_FOUR, chunk_rows=rows) for rows in (1, 512))
# Every measure meets every schedule and propagation, every engine every
# propagation that it takes, and every head and MLP occurs. Not every
# combination: each is a program to compile.
DYNAMIC = [
  (SOFTMAX, CONSTANT, None, EXIT, {}, EAGER),
  (SOFTMAX, DECAYING, (1, 3), COPY, RELU, EAGER),
  (STATE, CONSTANT, None, COPY, TIED, EAGER),
  (PROBE, DECAYING, None, FIRST, TIED, EAGER),
  (SOFTMAX, DECAYING, None, EXIT, {}, BY_FOUR),
  (STATE, CONSTANT, (2, 3), EXIT, TIED, WHOLE),
  (SOFTMAX, CONSTANT, (1, 3), LEARNED, {}, BY_ONE),
  (CLASSIFIER, DECAYING, None, LEARNED, {}, BY_FOUR),
  (CLASSIFIER, CONSTANT, None, EXIT, TIED, COMPACTED),
  (SOFTMAX, DECAYING, (2, 3), EXIT, RELU, FITTED),
  (STATE, DECAYING, (1, 3), FIRST, {}, SPREAD),
  (CLASSIFIER, CONSTANT, None, LEARNED, {}, FITTED),
]


def name_of(value) -> str:
  if isinstance(value, dict):
    return "_".join(value) or "untied"
  return getattr(value, "name", str(value).split("(")[0])


@pytest.mark.parametrize(
  ("measure", "schedule", "allowed", "propagated", "changes", "made"),
  DYNAMIC,
  ids=name_of,
)
def test_dynamic_exits(measure, schedule, allowed, propagated, changes, made):
  rule = exits.DynamicExits(measure, schedule, allowed, propagated)
  toy = engine.toy_for(rule, **changes)
  layers = [
    engine.compare(toy, rule, x, engine=made)
    for x in (0.3, 0.6, 0.9, schedules.NEVER_EXIT)
  ]
  assert len(set(np.concatenate(layers[:-1]).tolist())) >= 2
  assert set(layers[-1].tolist()) == {4}


@pytest.mark.parametrize(
  ("depth", "changes"), [(2, RELU), (2, {}), (None, {}), (None, TIED)]
)
def test_static_exits(depth, changes):
  layers = set(
    engine.compare(engine.toy(**changes), exits.StaticExit(depth), 0.0)
  )
  assert layers == {depth or 4}


@pytest.mark.parametrize(
  ("allowed", "propagated", "changes"),
  [(None, EXIT, {}), ((2, 3), FIRST, RELU), (None, COPY, TIED)],
  ids=name_of,
)
def test_oracle(allowed, propagated, changes):
  # A seed whose layers agree with the last one now and then.
  layers = engine.compare(
    engine.toy(seed=8, **changes), exits.OracleExit(allowed, propagated), 0.0
  )
  assert len(set(layers.tolist())) >= 2


def test_the_comparison_can_fail():
  """Meta: one propagation held against another, and one threshold against
  another.
  """
  toy = engine.toy()
  rule = exits.DynamicExits(SOFTMAX, CONSTANT, None, EXIT)
  state = engine.run(toy, rule, 0.6)
  copied = engine.reference_rows(
    toy, exits.DynamicExits(SOFTMAX, CONSTANT, None, COPY), 0.6
  )
  with pytest.raises(AssertionError):
    for i, row in enumerate(copied):
      engine.compare_memory(state.cache, row, i, len(row.tokens))
  with pytest.raises(AssertionError, match="no tie"):
    engine.agreeing_rows(
      engine.reference_rows(toy, rule, 0.3), state.generation
    )


DYNAMIC_EXITS = exits.DynamicExits(SOFTMAX)
COPIES = exits.DynamicExits(SOFTMAX, propagation=COPY)


@pytest.mark.parametrize(
  ("rule", "platform", "expected"),
  [
    (DYNAMIC_EXITS, "cpu", [BY_FOUR, BY_FOUR, COMPACTED, COMPACTED]),
    (
      DYNAMIC_EXITS,
      "one that nobody has tried",
      [BY_FOUR, BY_FOUR, COMPACTED, COMPACTED],
    ),
    (DYNAMIC_EXITS, "tpu", [BY_FOUR] * 4),
    *(
      (rule, "cpu", [EAGER] * 4)
      for rule in (exits.StaticExit(), exits.OracleExit(), COPIES)
    ),
  ],
)
def test_the_fastest_engine_by_rule_rows_and_platform(
  rule, platform, expected, monkeypatch
):
  assert [
    engines.default_engine(rule, rows, platform) for rows in (1, 7, 8, 32)
  ] == expected
  monkeypatch.setattr(jax, "default_backend", lambda: platform)
  assert [
    engines.default_engine(rule, rows) for rows in (1, 7, 8, 32)
  ] == expected


def test_rows_may_be_symbolic():
  (rows,) = jax.export.symbolic_shape("b")
  assert engines.default_engine(DYNAMIC_EXITS, rows) == EAGER
  assert engines.default_engine(DYNAMIC_EXITS, 8 * rows, "cpu") == EAGER
