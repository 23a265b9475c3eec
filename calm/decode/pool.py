"""A pool of rows for long lists of prompts: where a text has ended, the next prompt begins.

All rows write into one slot of the caches whatever token each is at, so that nothing is
scattered: a row's position is the slot less its start. When the slots run out, everything moves
down by those that no row needs any more.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Int

from calm.data import prompt_batches
from calm.decode import compiled, engines, loop
from calm.decode import program as program_lib
from calm.t5 import caches

Encode = Callable[[prompt_batches.PromptBatch], caches.Encoded]
# Part of the rows that is free before the loop stops for new prompts. Less wastes fewer row
# steps, more stops less often.
FREE_PART = 0.25


@struct.dataclass
class Pool:
  """The loop's carry, and what stays of it between two loops."""

  slot: Int[Array, ""]  # where every row writes next
  starts: Int[Array, " batch"]  # slot of each row's first token; below 0 once it was moved out
  current: Int[Array, " batch"]  # the last token, which the next step reads
  active: Bool[Array, " batch"]  # rows that generate; the others are free
  generation: loop.Generation  # by slot: a row's text is what lies from its start on
  cache: Any  # the step's own


@dataclasses.dataclass(frozen=True)
class PoolProgram:
  """A `program.Program` whose rows are refilled.

  Raises:
    ValueError: activations are below float32: which rows run together would change results.
  """

  program: program_lib.Program

  def __post_init__(self):
    if self.program.config.dtype != "float32":
      raise ValueError(
        "Expected activations in float32 for rows that are refilled: below that, results"
        f" depend on which rows run together, got {self.program.config.dtype}; decode without"
        " `refill`."
      )

  @property
  def slots(self) -> int:
    """Positions of the caches: more are read at every step, and make moving down rarer."""
    length = self.program.max_decode_length
    return length + max(length // 4, 8)

  def decode(
    self,
    weights: program_lib.ModelWeights,
    batches: Sequence[prompt_batches.PromptBatch],
    threshold: float,
    encode: Encode,
  ) -> loop.Generation:
    """Decodes prompts of one padded length, as `Program.decode` would.

    The first batch is as large as the pool, none is larger; `encode` is called for one at a
    time, when the pool has room for it. Returns numpy arrays, one row a prompt, in order.
    """
    run = _Run(self, weights, threshold, sum(len(batch.rows) for batch in batches))
    size = len(batches[0].active)
    for batch in batches:
      # Padded, so that every batch of a list is encoded by one program.
      missing = size - len(batch.active)
      tokens = np.pad(batch.tokens, ((0, missing), (0, 0)))
      active = np.pad(batch.active, (0, missing))
      padded = prompt_batches.PromptBatch(batch.rows, tokens, active)
      run.take_all(encode(padded), len(batch.rows))
    run.advance(size)
    return run.generation

  @compiled.method()
  def empty(
    self, weights: program_lib.ModelWeights, waiting: caches.Encoded
  ) -> tuple[Pool, caches.Encoded]:
    """A pool of free rows, as many as prompts wait, and room for their prompts."""
    rows = waiting.bias.shape[0]
    zeros = jnp.zeros((rows,), jnp.int32)
    encoded = jax.tree.map(jnp.zeros_like, waiting)
    cache = self.bind(weights, encoded, jnp.zeros(()), zeros).empty
    generation = loop.empty_generation(rows, self.slots)
    return Pool(jnp.zeros((), jnp.int32), zeros, zeros, zeros > 0, generation, cache), encoded

  @compiled.method(donate_argnames="pool")
  def advance(
    self,
    weights: program_lib.ModelWeights,
    encoded: caches.Encoded,
    pool: Pool,
    threshold: jax.Array,
    min_free: jax.Array,
  ) -> Pool:
    """Decodes every active row until `min_free` rows are free or the slots are used up."""
    program, step = self.program, self.bind(weights, encoded, threshold, pool.starts).take_step

    def goes_on(now: Pool) -> jax.Array:
      return (jnp.sum(~now.active) < min_free) & (now.slot < self.slots)

    def one(now: Pool) -> Pool:
      active = now.active
      made, cache = step(now.current, now.slot, active, now.cache)
      emitted = loop.emit(made.best, active)
      is_longest = now.slot + 1 - now.starts >= program.max_decode_length
      active &= ~((emitted.token == program.eos_id) | is_longest)
      generation = loop.record(now.generation, now.slot, now.active, emitted, made)
      return Pool(now.slot + 1, now.starts, emitted.token, active, generation, cache)

    return lax.while_loop(goes_on, one, pool)

  @compiled.method(donate_argnames=("pool", "encoded"))
  def take_in(
    self, pool: Pool, encoded: caches.Encoded, waiting: caches.Encoded, source: jax.Array
  ) -> tuple[Pool, caches.Encoded]:
    """The pool and its prompts with prompts `source` [batch] of `waiting` in its rows, which
    begin at the pool's slot; -1 leaves a row as it is."""
    new = source >= 0
    rows = jnp.argsort(~new, stable=True)

    def move(i, encoded):
      row, at = rows[i], source[rows[i]]

      def put(to, of):
        return lax.dynamic_update_index_in_dim(
          to, lax.dynamic_index_in_dim(of, at), row, axis=0
        )

      return jax.tree.map(put, encoded, waiting)

    # Row after row, in place: what is copied are the prompts that come in, not the pool.
    encoded = lax.fori_loop(0, jnp.sum(new), move, encoded)
    scores = jnp.where(new, 0.0, pool.generation.scores)
    taken = dataclasses.replace(
      pool,
      starts=jnp.where(new, pool.slot, pool.starts),
      current=jnp.where(new, 0, pool.current),
      active=pool.active | new,
      generation=dataclasses.replace(pool.generation, scores=scores),
    )
    return taken, encoded

  @compiled.method(donate_argnames="pool")
  def shift(
    self, weights: program_lib.ModelWeights, encoded: caches.Encoded, pool: Pool
  ) -> Pool:
    """Drops the slots before the first one that an active row needs."""
    by = jnp.min(jnp.where(pool.active, pool.starts, pool.slot))
    old = pool.generation
    move = lambda array: loop.shift_positions(array, by, axis=1)
    columns = map(
      move, (old.tokens, old.exit_layers, old.confidences, old.rejected_confidences)
    )
    shift_cache = self.bind(weights, encoded, jnp.zeros(()), pool.starts).shift
    return dataclasses.replace(
      pool,
      slot=pool.slot - by,
      starts=pool.starts - by,
      generation=loop.Generation(*columns, scores=old.scores),
      cache=shift_cache(pool.cache, by),
    )

  def bind(
    self,
    weights: program_lib.ModelWeights,
    encoded: caches.Encoded,
    threshold: jax.Array,
    starts: jax.Array,
  ) -> engines.Bound:
    """The engine at work on the prompts in the rows, which began at the slots `starts`."""
    program = self.program
    task = engines.Task(
      program.config,
      program.rule,
      weights.decoder,
      encoded,
      threshold,
      self.slots,
      starts=starts,
      native=program.native,
    )
    return engines.bind(task, program.engine)


class _Run:
  """One list on its way through a pool: who is in which row, and what has ended."""

  def __init__(self, program: PoolProgram, weights, threshold, total: int):
    self._program, self._weights = program, weights
    self._threshold = jnp.asarray(threshold, jnp.float32)
    empty = loop.empty_generation(total, program.program.max_decode_length)
    self.generation = jax.tree.map(np.array, empty)  # what has ended so far, 0 elsewhere
    self._taken = 0
    self._pool: Pool | None = None

  def take_all(self, waiting: caches.Encoded, count: int) -> None:
    """Takes the first `count` prompts of `waiting` in, as soon as there are rows for them."""
    if self._pool is None:
      self._pool, self._encoded = self._program.empty(self._weights, waiting)
      # The prompt in each row, -1 where it is free.
      self._tenants = np.full(waiting.bias.shape[0], -1)
    size, taken = len(self._tenants), 0
    while taken < count:
      if (self._tenants >= 0).all():
        self.advance(max(1, int(FREE_PART * size)))
      rows = np.flatnonzero(self._tenants < 0)[: count - taken]
      numbers = np.arange(len(rows))
      source = np.full(size, -1, np.int32)
      source[rows] = taken + numbers
      self._tenants[rows] = self._taken + numbers
      self._pool, self._encoded = self._program.take_in(
        self._pool, self._encoded, waiting, jnp.asarray(source)
      )
      taken, self._taken = taken + len(rows), self._taken + len(rows)
    jax.block_until_ready(self._pool)  # or the next encoding's time would hold it

  def advance(self, min_free: int) -> None:
    """Decodes until `min_free` rows are free, and takes out what has ended."""
    while (self._tenants < 0).sum() < min_free:
      pool = self._program.advance(
        self._weights, self._encoded, self._pool, self._threshold, jnp.int32(min_free)
      )
      slot, starts, active, generation = jax.device_get(
        (pool.slot, pool.starts, pool.active, pool.generation)
      )
      for row in np.flatnonzero((self._tenants >= 0) & ~active):
        self._take_out(generation, int(row), int(starts[row]))
        self._tenants[row] = -1
      if slot == self._program.slots:
        pool = self._program.shift(self._weights, self._encoded, pool)
      self._pool = pool

  def _take_out(self, generation: loop.Generation, row: int, start: int) -> None:
    """Copies the text of a row that has ended to its prompt's place."""
    prompt = self._tenants[row]
    length = int(np.sum(np.asarray(generation.exit_layers[row, start:]) > 0))
    for name in ("tokens", "exit_layers", "confidences", "rejected_confidences"):
      text = getattr(generation, name)[row, start : start + length]
      getattr(self.generation, name)[prompt, :length] = text
    self.generation.scores[prompt] = generation.scores[row]
