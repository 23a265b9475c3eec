"""Long lists of prompts through one pool of rows: `refill`, bound to a program.

The compiled part runs until rows are free; here, between two runs, texts that have ended are
taken out and prompts that wait are put in. Rows that wait for the longest of a batch cost
whole steps of a static model; a dynamic one also runs fewer layers while few rows are left,
so that it saves less.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from calm.data import prompt_batches
from calm.decode import compiled, engines, loop
from calm.decode import pool as pool_lib
from calm.decode import program as program_lib
from calm.t5 import caches

Encode = Callable[[prompt_batches.PromptBatch], caches.Encoded]


@dataclasses.dataclass(frozen=True)
class PoolProgram:
  """A `program.Program` whose rows are refilled.

  Attributes:
    program: how a token is decoded; its activations are float32.
    free_part: part of the rows that is free before the loop stops for new prompts. Less
      wastes fewer row steps, more stops less often.

  Raises:
    ValueError: the activations are narrower: which rows run together would change results.
  """

  program: program_lib.Program
  free_part: float = 0.25

  def __post_init__(self):
    if self.program.config.dtype != "float32":
      raise ValueError(
        "Expected activations in float32 for rows that are refilled: below that, results"
        f" depend on which rows run together, got {self.program.config.dtype}; decode without"
        " `refill`."
      )

  @property
  def slots(self) -> int:
    """Positions of the caches."""
    return pool_lib.num_slots(self.program.max_decode_length)

  def decode(
    self,
    weights: program_lib.ModelWeights,
    batches: Sequence[prompt_batches.PromptBatch],
    threshold: float,
    encode: Encode,
  ) -> loop.Generation:
    """Decodes prompts of one padded length, as `Program.decode` would.

    Args:
      weights: the model.
      batches: the prompts; the first is as large as the pool, none is larger.
      threshold: lambda.
      encode: as `Program.encode`; it is called for one batch at a time, when the pool has
        room for it.

    Returns:
      numpy arrays, one row a prompt, in the order of the batches.
    """
    run = _Run(self, weights, threshold, sum(len(batch.rows) for batch in batches))
    size = len(batches[0].active)
    for batch in batches:
      run.take_all(encode(_widened(batch, size)), len(batch.rows))
    run.finish()
    return run.generation

  @compiled.method()
  def empty(
    self, weights: program_lib.ModelWeights, waiting: caches.Encoded
  ) -> tuple[pool_lib.Pool, caches.Encoded]:
    """A pool of free rows, as many as prompts wait, and room for their prompts."""
    rows = waiting.bias.shape[0]
    encoded = jax.tree.map(jnp.zeros_like, waiting)
    cache = self.bind(weights, encoded, jnp.zeros(()), jnp.zeros(rows, jnp.int32)).empty
    return pool_lib.empty_pool(cache, rows, self.slots), encoded

  @compiled.method(donate_argnames="pool")
  def advance(
    self,
    weights: program_lib.ModelWeights,
    encoded: caches.Encoded,
    pool: pool_lib.Pool,
    threshold: jax.Array,
    min_free: jax.Array,
  ) -> pool_lib.Pool:
    """See `pool.advance`."""
    return pool_lib.advance(
      self.bind(weights, encoded, threshold, pool.starts).take_step,
      pool,
      eos_id=self.program.eos_id,
      max_decode_length=self.program.max_decode_length,
      min_free=min_free,
    )

  @compiled.method(donate_argnames=("pool", "encoded"))
  def take_in(
    self,
    pool: pool_lib.Pool,
    encoded: caches.Encoded,
    waiting: caches.Encoded,
    source: jax.Array,
  ) -> tuple[pool_lib.Pool, caches.Encoded]:
    """See `pool.take_in`."""
    return pool_lib.take_in(pool, encoded, waiting, source)

  @compiled.method(donate_argnames="pool")
  def shift(
    self, weights: program_lib.ModelWeights, encoded: caches.Encoded, pool: pool_lib.Pool
  ) -> pool_lib.Pool:
    """See `pool.shift`."""
    return pool_lib.shift(pool, self.bind(weights, encoded, jnp.zeros(()), pool.starts).shift)

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
  """One list on its way through a pool: who is in which row, and what has ended.

  Attributes:
    generation: what has ended so far, [prompts, max_decode_length], 0 elsewhere.
  """

  def __init__(self, program: PoolProgram, weights, threshold, total: int):
    self._program, self._weights = program, weights
    self._threshold = jnp.asarray(threshold, jnp.float32)
    empty = loop.empty_generation(total, program.program.max_decode_length)
    self.generation = jax.tree.map(np.array, empty)
    self._taken = 0
    self._pool: pool_lib.Pool | None = None

  def take_all(self, waiting: caches.Encoded, count: int) -> None:
    """Takes the first `count` prompts of `waiting` in, as soon as there are rows for them."""
    if self._pool is None:
      self._pool, self._encoded = self._program.empty(self._weights, waiting)
      # The prompt in each row, -1 where it is free.
      self._tenants = np.full(waiting.bias.shape[0], -1)
    size, taken = len(self._tenants), 0
    while taken < count:
      if (self._tenants >= 0).all():
        self._advance(max(1, int(self._program.free_part * size)))
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

  def finish(self) -> None:
    """Decodes until every row has ended."""
    self._advance(len(self._tenants))

  def _advance(self, min_free: int) -> None:
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


def _widened(batch: prompt_batches.PromptBatch, size: int) -> prompt_batches.PromptBatch:
  """Padded to `size` rows, so that every batch of a list is encoded by one program."""
  missing = size - len(batch.active)
  tokens = np.pad(batch.tokens, ((0, missing), (0, 0)))
  return prompt_batches.PromptBatch(batch.rows, tokens, np.pad(batch.active, (0, missing)))
