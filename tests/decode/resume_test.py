"""Decoding on from some token of each row is decoding anew, caches included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calm import exits
from calm.decode import engines
from calm.decode import program as program_lib
from calm.exits import confidence, propagation, schedules
from tests import engine

GRID = (0.9, 0.7, 0.5, 0.3, 0.1)
FIRST = propagation.propagation("first_state")
COPY = propagation.propagation("copy_projections")
LEARNED = propagation.propagation("learned")
CASES = {
  "eager": (
    exits.DynamicExits(confidence.Classifier(), propagation=COPY),
    engines.Eager,
  ),
  "learned": (
    exits.DynamicExits(confidence.State(), allowed=(1, 3), propagation=LEARNED),
    engines.Deferred,
  ),
  "compacted": (
    exits.DynamicExits(confidence.Classifier(), propagation=FIRST),
    engine.sized(engines.Compacted, sizes=(0, 2, 8)),
  ),
}

_resume = jax.jit(
  lambda program, *args: program.resume(*args),
  static_argnums=0,
  compiler_options={"xla_backend_optimization_level": 0},
)


def first_exits(generation, threshold) -> np.ndarray:
  """The first token of each row that would now leave earlier; the row's length
  if none.
  """
  real = np.asarray(generation.exit_layers) > 0
  leaves = real & (np.asarray(generation.rejected_confidences) >= threshold)
  return np.where(leaves.any(axis=1), leaves.argmax(axis=1), real.sum(axis=1))


@pytest.mark.parametrize("name", CASES)
def test_a_descending_grid_from_where_each_row_changes(name):
  rule, made = CASES[name]
  toy = engine.toy_for(rule)
  program = program_lib.Program(toy.config, rule, engine.LENGTH, engine=made)
  encoded = engine.encode(toy)
  state = engine.run(toy, rule, schedules.NEVER_EXIT, engine=made)
  saved = 0
  waits = 0
  for threshold in GRID:
    resume_at = first_exits(state.generation, threshold)
    active = resume_at < engine.lengths(state.generation)
    saved += resume_at[active].sum() + (~active).sum()
    waits += len(set(resume_at[active].tolist())) > 1
    if active.any():
      state = _resume(
        program,
        toy.weights,
        encoded,
        state,
        jnp.asarray(active),
        jnp.float32(threshold),
        jnp.asarray(resume_at, jnp.int32),
      )
    anew = engine.run(toy, rule, threshold, engine=made)
    for i in range(len(engine.PROMPTS)):
      engine.assert_same_row(state, anew, i, i)
      engine.assert_same_confidences(state.generation, anew.generation, i, i)
    tokens = np.where(
      np.asarray(anew.generation.exit_layers) > 0, anew.generation.tokens, 0
    )
    np.testing.assert_array_equal(state.generation.tokens, tokens)
  # Meta: something was taken over, and rows waited for one another.
  assert saved > 5 and waits
