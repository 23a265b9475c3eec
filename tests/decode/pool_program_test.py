"""Refilled rows of toy networks: each text as the yardstick decodes it alone."""

import functools

import jax
import jax.numpy as jnp
import pytest

from calm import exits
from calm.data import prompt_batches
from calm.decode import compiled, engines, pool_program
from calm.decode import program as program_lib
from calm.exits import confidence, propagation, schedules
from tests import engine, toys
from tests.decode import hlo, hlo_test

NEVER = schedules.NEVER_EXIT
PROMPTS = toys.prompts(5, batch=23, length=12, num_pieces=toys.Config().num_pieces)
STATE, CLASSIFIER, SOFTMAX = (
  confidence.MEASURES[name] for name in ("state", "classifier", "softmax")
)
LEARNED = exits.DynamicExits(CLASSIFIER, propagation=propagation.Learned())
COMPACTED = engines.Compacted(buckets=(2,))


def quick(method, *donated: str):
  """Compiled without LLVM trying hard: toys compute in no time and compile for long."""
  options = {"xla_backend_optimization_level": 0}
  return jax.jit(
    method.__wrapped__, static_argnums=0, donate_argnames=donated, compiler_options=options
  )


class QuickPool(pool_program.PoolProgram):
  empty = quick(pool_program.PoolProgram.empty)
  advance = quick(pool_program.PoolProgram.advance, "pool")
  take_in = quick(pool_program.PoolProgram.take_in, "pool", "encoded")
  shift = quick(pool_program.PoolProgram.shift, "pool")


@functools.cache
def uneven_toy(**changes) -> engine.Toy:
  """Texts of one token up to the limit."""
  sizes = toys.Config(**changes)
  params = toys.params(sizes, seed=1)
  params["decoder"]["logits_dense"]["kernel"][:, toys.EOS_ID] *= 4
  return engine.of_params(params, sizes)


def decode(toy, rule, threshold, made=None, tokens=PROMPTS, size=4):
  program = program_lib.Program(toy.config, rule, engine.LENGTH, engine=made)
  rows = [row[row > 0].tolist() for row in tokens]
  batches = prompt_batches.plan(rows, batch_size=size, max_input_length=12)
  encode = lambda batch: program.encode(toy.weights, jnp.asarray(batch.tokens))
  return QuickPool(program).decode(toy.weights, batches, threshold, encode)


@pytest.mark.parametrize(
  ("rule", "made"),
  [
    (LEARNED, engines.Deferred(8)),
    (exits.DynamicExits(SOFTMAX, engine.DECAYING), engines.Eager()),
    (exits.DynamicExits(STATE, engine.DECAYING, (2, 3)), COMPACTED),
    (exits.StaticExit(), engines.Eager()),
  ],
  ids=["deferred", "eager", "compacted", "static"],
)
def test_the_yardstick(rule, made):
  toy, seen, lengths = uneven_toy(**(engine.MAPS if rule == LEARNED else {})), set(), set()
  traced = compiled.num_made("PoolProgram.advance")
  thresholds = (0.0,) if isinstance(rule, exits.StaticExit) else (0.3, 0.6, 0.9, NEVER)
  for threshold in thresholds:
    got = decode(toy, rule, threshold, made)
    engine.compare_generation(engine.reference_rows(toy, rule, threshold, PROMPTS), got)
    seen |= set(got.exit_layers[got.exit_layers > 0].tolist())
    lengths |= set((got.exit_layers > 0).sum(axis=1).tolist())
  assert len(seen) >= min(2, len(thresholds))
  assert {1, engine.LENGTH} < lengths
  assert compiled.num_made("PoolProgram.advance") == traced + 1


@pytest.mark.parametrize(("count", "size"), [(5, 1), (3, 4)])
def test_one_row_and_more_rows_than_prompts(count, size):
  toy, rule, tokens = uneven_toy(), exits.DynamicExits(CLASSIFIER), PROMPTS[:count]
  got = decode(toy, rule, 0.6, engines.Deferred(8), tokens, size)
  rows = engine.reference_rows(toy, rule, 0.6, tokens)
  assert engine.compare_generation(rows, got) == list(range(count))


@pytest.mark.parametrize(
  "rule", [hlo_test.SHALLOW, exits.StaticExit()], ids=["deferred", "static"]
)
def test_no_operation_in_the_loop_makes_half_of_a_layers_cache(rule):
  toy = engine.toy(num_decoder_layers=3, num_encoder_layers=1)
  pool = pool_program.PoolProgram(program_lib.Program(toy.config, rule, hlo_test.LENGTH))
  rows, room = pool.empty(toy.weights, engine.encode(toy))
  kept, tree = jax.tree.flatten((toy.weights, room, jnp.float32(0), jnp.int32(1)))
  given, pool_tree = jax.tree.flatten(rows)

  def run(kept, given):
    weights, room, *numbers = jax.tree.unflatten(tree, kept)
    return pool.advance(weights, room, jax.tree.unflatten(pool_tree, given), *numbers)

  lowered = jax.jit(run, donate_argnums=1).lower(kept, given)
  text = lowered.compile(hlo_test.USERS_HLO).as_text() or ""
  assert not [op.text for op in hlo.large(text, hlo_test.half_a_layers_cache())]
  sizes = [operation.elements for operation in hlo.in_loops(text)]
  assert max(sizes) >= hlo_test.half_a_layers_cache()
  # Outside of the loop neither: the caches that came in are the ones that go out.
  copies = [op for ops in hlo.computations(text).values() for op in ops if op.opcode == "copy"]
  assert not [op.text for op in copies if op.elements >= hlo_test.half_a_layers_cache()]
