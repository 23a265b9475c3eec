"""Where no draft is hoped for, a text is steps of the full model: the same, and not passes."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calm.decode import program as program_lib
from calm.decode import verified
from tests import engine
from tests.decode import verified_test

RULE = dataclasses.replace(verified_test.RULE, adapts=True)
BATCH = len(engine.PROMPTS)
# The confidence of tokens that a step emitted, in these tests.
BY_STEP = 0.25


@dataclasses.dataclass(frozen=True)
class Marking:
  """`Passes` whose steps can be told from its passes."""

  inner: Any

  def __getattr__(self, name: str) -> Any:
    return getattr(self.inner, name)

  def step(self, current, position, active, cache):
    made, cache = self.inner.step(current, position, active, cache)
    return dataclasses.replace(made, confidence=made.confidence * BY_STEP), cache


def hopeless(rows: int, threshold: float = 1.0, **changes) -> verified.Verifying:
  """The loop of a plan that hopes for no draft, over the first prompts."""
  made = verified_test.toy()
  program = program_lib.Program(made.config, RULE, engine.LENGTH)
  encoded = engine.encode(made, engine.PROMPTS[:rows])
  passes = program.passes(made.weights, encoded, jnp.float32(threshold))
  plan = dataclasses.replace(passes.plan, costs=tuple(map(float, range(1, 7))))
  assert not plan.hopes
  return dataclasses.replace(passes, plan=plan, passes=Marking(passes.passes), **changes)


def decoded(loop: verified.Verifying, active=None):
  rows = loop.passes.task.batch_size
  active = jnp.ones(rows, bool) if active is None else jnp.asarray(active)
  run = jax.jit(loop.decode, compiler_options={"xla_backend_optimization_level": 0})
  return run(active)


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_it_is_full_depth_step_by_step(rows):
  full = engine.run(verified_test.toy(), verified_test.STATIC)
  got = decoded(hopeless(rows))
  generation = got.generation
  tokens = np.asarray(generation.tokens)
  np.testing.assert_array_equal(tokens, full.generation.tokens[:rows])
  np.testing.assert_array_equal(generation.exit_layers, full.generation.exit_layers[:rows])
  np.testing.assert_allclose(generation.scores, full.generation.scores[:rows], atol=1e-5)
  assert set(np.asarray(generation.confidences)[tokens > 0].tolist()) == {BY_STEP}
  lengths = np.asarray(generation.num_tokens)
  for row, length in enumerate(lengths):
    verified_test.compare_caches(got.cache, full.cache, row, length)
  # Rows end one after another, some of them at the limit.
  np.testing.assert_array_equal(got.positions, lengths)
  seen = generation.verification
  np.testing.assert_array_equal(seen.passes, lengths)
  assert not np.any(seen.drafts) and not np.any(seen.drafted) and not np.any(got.active)
  np.testing.assert_array_equal(seen.steps, lengths.max())


def test_rows_that_hold_no_prompt_stay_empty():
  active = np.arange(BATCH) % 3 != 1
  got, every = decoded(hopeless(BATCH), active), decoded(hopeless(BATCH))
  for leaf, whole in zip(*(jax.tree.leaves(s.generation) for s in (got, every)), strict=True):
    assert not np.asarray(leaf)[~active].any()
    np.testing.assert_allclose(np.asarray(leaf)[active], np.asarray(whole)[active], atol=1e-4)


def test_with_slack_every_token_is_drafted_in_the_same_program():
  fixed = engine.run(verified_test.toy(), verified_test.RULE, 0.5).generation
  got = decoded(hopeless(BATCH, threshold=0.5)).generation
  np.testing.assert_array_equal(got.tokens, fixed.tokens)
  np.testing.assert_array_equal(got.verification.drafted, fixed.verification.drafted)
  assert BY_STEP not in np.asarray(got.confidences).round(6).tolist()[0]


def test_given_tokens_are_read_in_passes_and_the_others_made_in_steps():
  """Rows are given tokens at different places, some after free ones."""
  prefix = np.zeros((BATCH, engine.LENGTH), np.int32)
  prefix[:, 0], prefix[::2, 1:3], prefix[1, 4] = 5, 7, 9
  loop = hopeless(BATCH, prefix=jnp.asarray(prefix))
  got = decoded(loop).generation
  made = verified_test.toy()
  program = program_lib.Program(made.config, RULE, engine.LENGTH)
  passes = program.passes(made.weights, engine.encode(made), jnp.float32(1.0))
  cheap = dataclasses.replace(passes.plan, costs=(1.0, 1.1, 1.2, 1.3, 1.4, 1.5))
  assert cheap.hopes
  others = dataclasses.replace(passes, plan=cheap, prefix=jnp.asarray(prefix))
  other = decoded(others).generation
  for name in ("tokens", "exit_layers"):
    np.testing.assert_array_equal(getattr(got, name), getattr(other, name))
  np.testing.assert_allclose(got.scores, other.scores, atol=1e-4)
  tokens = np.asarray(got.tokens)
  reached = np.cumprod(np.pad(tokens, ((0, 0), (1, 0)))[:, :-1] != 1, axis=1) > 0
  given = (prefix > 0) & reached & (tokens > 0)
  np.testing.assert_array_equal(tokens[given], prefix[given])
  by_step = np.asarray(got.confidences) == BY_STEP
  assert by_step.any() and not by_step[given].any()


@pytest.mark.parametrize("change", [{"measures": True}, {"adapts": False}])
def test_rules_that_draft_everywhere_make_no_step(change):
  made, rule = verified_test.toy(), dataclasses.replace(RULE, **change)
  program = program_lib.Program(made.config, rule, engine.LENGTH)
  passes = program.passes(made.weights, engine.encode(made), jnp.float32(1.0))
  costs = tuple(map(float, range(1, 7)))
  plan = dataclasses.replace(passes.plan, costs=costs)
  got = decoded(dataclasses.replace(passes, plan=plan, passes=Marking(passes.passes)))
  assert BY_STEP not in np.asarray(got.generation.confidences)
  assert np.any(got.generation.verification.drafts)
