"""Refilled rows on scripted steps: no network, every text known beforehand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calm import exits
from calm.data import prompt_batches
from calm.decode import engines, loop, pool_program
from calm.decode import pool as pool_lib
from calm.decode import program as program_lib
from calm.t5 import caches
from tests import engine

VOCAB, EOS, WRONG = 8, 1, 7
LENGTH = 4
TOY = engine.toy()  # its network is not run
NO_NETWORK = program_lib.Program(TOY.config, exits.StaticExit(), LENGTH, EOS)


@dataclasses.dataclass(frozen=True)
class Scripted(pool_program.PoolProgram):
  """Prompt p becomes script[p]; a row that was fed or kept anything else says `WRONG`.

  The cache remembers who wrote each slot: a row's own prompt from its start on.
  """

  script: tuple[tuple[int, ...], ...] = ()
  seen: list[tuple[str, int]] = dataclasses.field(default_factory=list, compare=False)

  def bind(self, weights, encoded, threshold, starts) -> engines.Bound:
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

    empty = jnp.full((len(prompt), self.slots), -1)
    shift = lambda cache, by: loop.shift_positions(cache, by, axis=1)
    same = lambda carried, position: carried
    return engines.Bound(empty, take_step, same, same, shift, grow=lambda carried: carried)

  def advance(self, weights, encoded, pool, threshold, min_free):
    before, rows = int(pool.slot), len(pool.active)
    made = super().advance(weights, encoded, pool, threshold, min_free)
    self.seen.append(("steps", (int(made.slot) - before) * rows))
    return made

  def shift(self, weights, encoded, pool):
    made = super().shift(weights, encoded, pool)
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


def decode(script: np.ndarray, size: int, free_part: float):
  """(program, generation) of all prompts in a pool of `size` rows."""
  script_rows = tuple(map(tuple, script.tolist()))
  program = Scripted(NO_NETWORK, free_part, script=script_rows)
  numbers = np.arange(1, len(script) + 1, dtype=np.int32)[:, None]
  tokens = [row.tolist() for row in numbers]
  batches = prompt_batches.plan(tokens, batch_size=size, max_input_length=1)
  encode = lambda batch: caches.Encoded((), jnp.asarray(batch.tokens)[:, None, :])
  return program, program.decode(TOY.weights, batches, 0.0, encode)


@pytest.mark.parametrize(
  ("count", "size", "free_part"),
  [(40, 4, 0.0), (40, 4, 0.5), (40, 3, 1.0), (19, 1, 0.25), (3, 4, 0.25), (5, 4, 0.25)],
)
def test_each_prompt_gets_its_own_text_in_the_order_of_the_prompts(count, size, free_part):
  script = scripts(count, seed=count + size)
  program, got = decode(script, size, free_part)
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


def test_fewer_steps_than_in_batches():
  script, size = scripts(64, seed=3), 4
  lengths = np.minimum((script != EOS).sum(1) + 1, LENGTH)
  steps = {
    part: sum(count for kind, count in decode(script, size, part)[0].seen if kind == "steps")
    for part in (0.0, 1.0)
  }
  in_batches = lengths.reshape(-1, size).max(axis=1).sum() * size
  assert steps[1.0] == in_batches
  assert lengths.sum() <= steps[0.0] < lengths.sum() + size * LENGTH < in_batches


def test_a_row_takes_its_prompt_and_the_others_keep_theirs():
  pool = pool_lib.empty_pool(jnp.zeros(()), batch_size=4, slots=6)
  pool = dataclasses.replace(
    pool,
    slot=jnp.int32(5),
    starts=jnp.array([1, 2, 3, 4]),
    current=jnp.array([5, 6, 7, 8]),
    active=jnp.array([True, False, True, False]),
    generation=dataclasses.replace(pool.generation, scores=jnp.arange(4.0)),
  )
  held, waiting = jnp.arange(8).reshape(4, 2), 10 + jnp.arange(6).reshape(3, 2)
  got, encoded = pool_lib.take_in(pool, (held,), (waiting,), jnp.array([-1, 2, -1, 0]))
  assert encoded[0].tolist() == [[0, 1], [14, 15], [4, 5], [10, 11]]
  assert got.starts.tolist() == [1, 5, 3, 5] and got.current.tolist() == [5, 0, 7, 0]
  assert got.active.all() and got.generation.scores.tolist() == [0, 0, 2, 0]


def test_moving_down_keeps_what_active_rows_need():
  pool = pool_lib.empty_pool(jnp.arange(6).reshape(1, 6), batch_size=2, slots=6)
  marks = jnp.arange(12).reshape(2, 6)
  pool = dataclasses.replace(
    pool,
    slot=jnp.int32(6),
    starts=jnp.array([4, 0]),
    active=jnp.array([True, False]),
    generation=dataclasses.replace(pool.generation, tokens=marks),
  )
  by_axis = lambda cache, by: loop.shift_positions(cache, by, axis=1)
  got = pool_lib.shift(pool, by_axis)
  assert got.slot == 2 and got.starts.tolist() == [0, -4]
  assert got.generation.tokens.tolist() == [[4, 5, 0, 0, 0, 0], [10, 11, 0, 0, 0, 0]]
  assert got.cache.tolist() == [[4, 5, 0, 0, 0, 0]]
  idle = dataclasses.replace(pool, active=jnp.zeros(2, bool))
  assert pool_lib.shift(idle, by_axis).slot == 0
