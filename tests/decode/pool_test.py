"""Refilled rows: scripted texts, and toy networks' beside the yardstick."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calm import exits
from calm.data import prompt_batches
from calm.decode import compiled, engines, loop, pool
from calm.decode import program as program_lib
from calm.exits import confidence, propagation, schedules
from calm.t5 import caches
from tests import engine, toys
from tests.decode import hlo, hlo_test

VOCAB, EOS, WRONG = 8, 1, 7
LENGTH = 4
TOY = engine.toy()  # its network is not run
NO_NETWORK = program_lib.Program(TOY.config, exits.StaticExit(), LENGTH, EOS)


@dataclasses.dataclass(frozen=True)
class Scripted(pool.PoolProgram):
  """Prompt p becomes script[p]; a row that was fed or kept anything else says `WRONG`.

  The cache remembers who wrote each slot: a row's own prompt from its start on.
  """

  script: tuple[tuple[int, ...], ...] = ()
  seen: list[tuple[str, int]] = dataclasses.field(default_factory=list, compare=False)

  def bind(self, weights, encoded, threshold, starts):
    prompt, script = encoded.bias[:, 0, 0] - 1, jnp.asarray(self.script)

    def take_step(current, position, active, cache):
      slot = position
      own = slot - starts
      told = script[jnp.maximum(prompt, 0), jnp.clip(own, 0, LENGTH - 1)]
      before = script[jnp.maximum(prompt, 0), jnp.clip(own - 1, 0, LENGTH - 1)]
      slots = jnp.arange(self.slots)[None, :]
      mine = (slots >= starts[:, None]) & (slots < slot)
      kept = jnp.all(jnp.where(mine, cache == prompt[:, None], True), axis=1)
      fits = kept & (current == jnp.where(own == 0, 0, before)) & (own < LENGTH)
      logits = 3.0 * jax.nn.one_hot(jnp.where(fits, told, WRONG), VOCAB)
      layer = jnp.where(active, own + 1, 0)
      confidence = layer / 10
      cache = cache.at[:, slot].set(jnp.where(active, prompt, -2))
      return exits.TokenExit(logits, layer, confidence, confidence / 2, ()), cache

    return types.SimpleNamespace(
      empty=jnp.full((len(prompt), self.slots), -1),
      take_step=take_step,
      shift=lambda cache, by: loop.shift_positions(cache, by, axis=1),
    )

  def advance(self, weights, encoded, rows, threshold, min_free):
    before, count = int(rows.slot), len(rows.active)
    made = super().advance(weights, encoded, rows, threshold, min_free)
    self.seen.append(("steps", (int(made.slot) - before) * count))
    return made

  def shift(self, weights, encoded, rows):
    made = super().shift(weights, encoded, rows)
    self.seen.append(("shift", int(made.slot)))
    return made


def scripts(count: int, seed: int) -> np.ndarray:
  """Texts of one to `LENGTH` tokens, some of them without an end."""
  rng = np.random.default_rng(seed)
  script = rng.integers(2, WRONG, (count, LENGTH))
  ends = rng.integers(0, LENGTH + 1, count)
  ends[:2] = 0, LENGTH
  for row, end in zip(script, ends, strict=True):
    row[end:] = EOS
  return script


def decode_script(script: np.ndarray, size: int):
  """(program, generation) of all prompts in a pool of `size` rows."""
  script_rows = tuple(map(tuple, script.tolist()))
  program = Scripted(NO_NETWORK, script=script_rows)
  numbers = np.arange(1, len(script) + 1, dtype=np.int32)[:, None]
  tokens = [row.tolist() for row in numbers]
  batches = prompt_batches.plan(tokens, batch_size=size, max_input_length=1)
  encode = lambda batch: caches.Encoded((), jnp.asarray(batch.tokens)[:, None, :])
  return program, program.decode(TOY.weights, batches, 0.0, encode)


@pytest.mark.parametrize(
  ("count", "size", "free_part"),
  [(40, 4, 0.0), (40, 3, 1.0), (19, 1, 0.25), (3, 4, 0.25)],
)
def test_each_prompt_gets_its_own_text_in_the_order_of_the_prompts(
  count, size, free_part, monkeypatch
):
  script = scripts(count, seed=count + size)
  monkeypatch.setattr(pool, "FREE_PART", free_part)
  program, got = decode_script(script, size)
  lengths = np.minimum((script != EOS).sum(1) + 1, LENGTH)
  real = np.arange(LENGTH)[None, :] < lengths[:, None]
  np.testing.assert_array_equal(got.tokens, np.where(real, script, 0))
  own = np.where(real, np.arange(1, LENGTH + 1), 0)
  np.testing.assert_array_equal(got.exit_layers, own)
  np.testing.assert_allclose(got.confidences, own / 10, rtol=1e-6)
  np.testing.assert_allclose(got.rejected_confidences, own / 20, rtol=1e-6)
  one = 3 - np.log(np.exp(3) + VOCAB - 1)
  np.testing.assert_allclose(got.scores, lengths * one, rtol=1e-5)
  # The slots ran out in the longer lists; what was dropped each time is worth a move.
  left = [slot for kind, slot in program.seen if kind == "shift"]
  assert bool(left) == (count >= 19)
  assert all(slot < LENGTH for slot in left)


def test_fewer_steps_than_in_batches(monkeypatch):
  script, size, steps = scripts(64, seed=3), 4, {}
  lengths = np.minimum((script != EOS).sum(1) + 1, LENGTH)
  for part in (0.0, 1.0):
    monkeypatch.setattr(pool, "FREE_PART", part)
    seen = decode_script(script, size)[0].seen
    steps[part] = sum(count for kind, count in seen if kind == "steps")
  in_batches = lengths.reshape(-1, size).max(axis=1).sum() * size
  assert steps[1.0] == in_batches
  assert lengths.sum() <= steps[0.0] < lengths.sum() + size * LENGTH < in_batches


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


class QuickPool(pool.PoolProgram):
  empty = quick(pool.PoolProgram.empty)
  advance = quick(pool.PoolProgram.advance, "pool")
  take_in = quick(pool.PoolProgram.take_in, "pool", "encoded")
  shift = quick(pool.PoolProgram.shift, "pool")


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
  ],
  ids=["deferred", "eager", "compacted"],
)
def test_the_yardstick(rule, made):
  toy, seen, lengths = uneven_toy(**(engine.MAPS if rule == LEARNED else {})), set(), set()
  traced = compiled.num_made("PoolProgram.advance")
  for threshold in (0.3, 0.6, 0.9, NEVER):
    got = decode(toy, rule, threshold, made)
    engine.compare_generation(engine.reference_rows(toy, rule, threshold, PROMPTS), got)
    seen |= set(got.exit_layers[got.exit_layers > 0].tolist())
    lengths |= set((got.exit_layers > 0).sum(axis=1).tolist())
  assert len(seen) >= 2
  assert {1, engine.LENGTH} < lengths
  assert compiled.num_made("PoolProgram.advance") == traced + 1


@pytest.mark.parametrize(
  "rule", [hlo_test.SHALLOW, exits.StaticExit()], ids=["deferred", "static"]
)
def test_no_operation_in_the_loop_makes_half_of_a_layers_cache(rule):
  toy = engine.toy(num_decoder_layers=3, num_encoder_layers=1)
  made = pool.PoolProgram(program_lib.Program(toy.config, rule, hlo_test.LENGTH))
  rows, room = made.empty(toy.weights, engine.encode(toy))
  kept, tree = jax.tree.flatten((toy.weights, room, jnp.float32(0), jnp.int32(1)))
  given, pool_tree = jax.tree.flatten(rows)

  def run(kept, given):
    weights, room, *numbers = jax.tree.unflatten(tree, kept)
    return made.advance(weights, room, jax.tree.unflatten(pool_tree, given), *numbers)

  lowered = jax.jit(run, donate_argnums=1).lower(kept, given)
  text = lowered.compile(hlo_test.USERS_HLO).as_text() or ""
  assert not [op.text for op in hlo.large(text, hlo_test.half_a_layers_cache())]
  sizes = [operation.elements for operation in hlo.in_loops(text)]
  assert max(sizes) >= hlo_test.half_a_layers_cache()
  # Outside of the loop neither: the caches that came in are the ones that go out.
  copies = [op for ops in hlo.computations(text).values() for op in ops if op.opcode == "copy"]
  assert not [op.text for op in copies if op.elements >= hlo_test.half_a_layers_cache()]
