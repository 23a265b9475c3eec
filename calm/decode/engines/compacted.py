"""Batches whose rows leave at different layers: the rows that stay are moved together.

With one exit for a whole batch, every layer runs for all rows as long as one of them stays.
Here a layer runs on the smallest bucket (0, 2, 8, 32 rows, say) that holds those that do:
one `lax.switch` a layer, one after another. Tokens stay in step, so a layer's caches are
filled alike for all rows, later where nobody needed it (`deferred`). What a row gets does not
depend on the bucket that it was computed in.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from calm import exits
from calm.decode.engines import deferred, engine
from calm.exits import layers as layers_lib
from calm.exits import walk as walk_lib
from calm.t5 import caches as caches_lib
from calm.t5 import decoder as decoder_lib


@dataclasses.dataclass(frozen=True)
class Compacted:
  """Layers run on the rows that need them. For `exits.DynamicExits` and several rows.

  Attributes:
    chunk_rows: see `deferred.Deferred`.
    ratio: each bucket is the next larger one by this, from the batch down: 4 makes 2, 8 and 32
      of 32 rows. Every bucket is one more program a layer: more fit better, fewer compile
      faster.
    buckets: numbers of rows that a layer is compiled for, in place of what `ratio` says.
    copied_part: buckets of at most this part of the batch read caches that were copied
      together; larger ones attend in all rows, which moves less.
  """

  chunk_rows: int = 32
  ratio: int = 4
  buckets: tuple[int, ...] | None = None
  copied_part: float = 0.25

  def __post_init__(self):
    if self.ratio < 2:
      raise ValueError(f"Expected `ratio` of at least 2. Got {self.ratio}.")

  def __call__(self, task: engine.Task) -> engine.Bound:
    base = deferred.bind(task, self.chunk_rows)
    bound = _BoundCompacted(base, self.sizes(task.batch_size), self.copied_part)
    return base.engine(bound.take_step)

  def sizes(self, batch_size: int) -> tuple[int, ...]:
    """0, the buckets that are smaller than the batch, and the batch."""
    buckets = self.buckets
    if buckets is None:
      steps = range(1, batch_size.bit_length())
      buckets = tuple(batch_size // self.ratio**i for i in steps)
    return (0, *sorted({size for size in buckets if 0 < size < batch_size}), batch_size)


@struct.dataclass
class Rows:
  """Which rows a bucket holds; those that stay come first, in their order.

  Attributes:
    order: the bucket's rows, [bucket] int32.
    rank: where each row lies, [batch] int32; beyond the bucket where it is not in it.
  """

  order: jax.Array
  rank: jax.Array

  def first(self, size: int) -> "Rows":
    """The bucket of the first `size` rows of this one."""
    return Rows(self.order[:size], self.rank)

  def take(self, tree: Any) -> Any:
    """The bucket's rows of arrays [batch, ...]."""
    return jax.tree.map(lambda x: _rows(x, self.order), tree)

  def spread(self, tree: Any) -> Any:
    """Arrays [bucket, ...] as [batch, ...]; rows that are not in the bucket hold anything."""
    places = jnp.minimum(self.rank, len(self.order) - 1)
    return jax.tree.map(lambda x: _rows(x, places), tree)

  def copy(self, tree: Any) -> Any:
    """As `take`, row after row: for large rows, which a gather would move by the number."""
    rows = [self.order[i] for i in range(len(self.order))]
    one = lambda x, row: lax.dynamic_slice_in_dim(
      x, row, 1, axis=0, allow_negative_indices=False
    )
    return jax.tree.map(lambda x: jnp.concatenate([one(x, row) for row in rows]), tree)


def _rows(x: jax.Array, numbers: jax.Array) -> jax.Array:
  """`x[numbers]`, without what it takes to count from the end or to check bounds."""
  return x.at[numbers].get(mode="promise_in_bounds", wrap_negative_indices=False)


def compact(stays: jax.Array) -> Rows:
  """All rows, those that stay first."""
  stays = stays.astype(jnp.int32)
  # Places without a sort: those that stay by their number, then the others by theirs.
  before = jnp.cumsum(stays) - stays
  others = jnp.cumsum(1 - stays) - (1 - stays)
  rank = jnp.where(stays > 0, before, jnp.sum(stays) + others)
  numbers = jnp.arange(len(stays), dtype=jnp.int32)
  is_at = rank[None, :] == numbers[:, None]
  order = jnp.sum(jnp.where(is_at, numbers[None, :], 0), axis=1)
  return Rows(order.astype(jnp.int32), rank.astype(jnp.int32))


@dataclasses.dataclass(frozen=True)
class _SpreadStep(decoder_lib.DecoderStep):
  """A bucket's step whose attention runs in all rows of the batch, where the caches lie."""

  rows: Rows = dataclasses.field(kw_only=True)

  def self_attention(self, layer, query, row):
    query, row = self.rows.spread((query, row))
    return self.rows.take(super().self_attention(layer, query, row))

  def cross_attention(self, layer, query):
    return self.rows.take(super().cross_attention(layer, self.rows.spread(query)))


@dataclasses.dataclass(frozen=True)
class _BoundCompacted:
  base: deferred.BoundDeferred
  sizes: tuple[int, ...]
  copied_part: float

  def take_step(self, current, position, active, cache: deferred.DeferredCache):
    base, task = self.base, self.base.task
    decoder = base.decoder(position)
    walk = base.walk(decoder, position)
    state = _complete(walk, walk_lib.start(task.weights.embedding[current], active))
    fills: list[deferred.LayerFill] = []
    for segment in deferred.segments(walk.allowed, walk.layers.num_layers):
      stays = ~state.done
      needed = jnp.any(stays)
      before = [
        base.fill(decoder, k, cache.layers[k - 1], position, cache.states, needed)
        for k in segment
      ]
      decoder = dataclasses.replace(
        decoder, caches=(*(fill.cache for fill in fills), *(fill.cache for fill in before))
      )
      state, rows = self._switch(walk, decoder, segment, state, stays)
      end = engine.after(position, state.hidden)
      old = tuple(fill.cache for fill in before)
      caches = caches_lib.write_rows(old, rows, end, task.keeps(position))
      filled = [jnp.where(needed, position + 1, fill.filled) for fill in before]
      fills += map(deferred.LayerFill, caches, filled)
    states = base.stored(cache.states, state, position)
    return exits.token_exit(walk, state, active), deferred.DeferredCache(tuple(fills), states)

  def _switch(self, walk, decoder, segment, state, stays):
    """The segment on the smallest bucket that holds the rows that stay."""
    rows = compact(stays)
    branches = [
      lambda state, rows, size=size: self._run(walk, decoder, segment, state, rows.first(size))
      for size in self.sizes[1:-1]
    ]
    branches = [
      lambda state, rows: self._run_none(segment, state),
      *branches,
      lambda state, rows: self._run_all(walk, decoder, segment, state),
    ]
    larger = jnp.sum(stays) > jnp.array(self.sizes[:-1])
    return lax.switch(jnp.sum(larger), branches, state, rows)

  def _run_none(self, segment, state):
    """Nothing is stored: what this writes is written over by a fill."""
    config = self.base.task.config
    shape = self.base.task.batch_size, config.num_heads, config.head_dim
    zeros = jnp.zeros(shape, jnp.dtype(config.dtype))
    return state, (layers_lib.KeyValue(zeros, zeros),) * len(segment)

  def _run_all(self, walk: walk_lib.Walk, decoder, segment, state):
    """(state, rows that the segment's layers store), every row run."""
    stored = []
    for layer in segment:
      hidden, row = decoder.run(layer, state.hidden)
      row = walk.stored(layer, state, row)
      state = walk.after(layer, state, hidden, row)
      stored.append(row)
    return state, tuple(stored)

  def _run(self, walk: walk_lib.Walk, decoder, segment, state, rows: Rows):
    """(state, rows that the segment's layers store) with the bucket run; all rows store."""
    threshold = walk.threshold if walk.threshold.ndim == 0 else rows.take(walk.threshold)
    inside = dataclasses.replace(walk, threshold=threshold)
    stays, part = ~state.done, _part(state, rows)
    stored = []
    for layer in segment:
      row = decoder.project(layer, state.hidden)
      kept, part_row = walk.stored(layer, state, row), rows.take(row)
      hidden = self._bucket(decoder, layer, rows).run_projected(layer, part.hidden, part_row)
      part = inside.after(layer, part, hidden, part_row)
      hidden = layers_lib.select_rows(stays, rows.spread(part.hidden), state.hidden)
      state = dataclasses.replace(state, hidden=hidden)
      stored.append(kept)
    # Rows that had left stay as they are.
    return layers_lib.select_rows(stays, rows.spread(part), state), tuple(stored)

  def _bucket(
    self, decoder: decoder_lib.DecoderStep, layer: int, rows: Rows
  ) -> decoder_lib.DecoderStep:
    if len(rows.order) > self.copied_part * len(rows.rank):
      fields = {
        f.name: getattr(decoder, f.name) for f in dataclasses.fields(decoder_lib.DecoderStep)
      }
      return _SpreadStep(**fields, rows=rows)
    cache, cross = rows.copy((decoder.caches[layer - 1], decoder.encoded.cross[layer - 1]))
    encoded = caches_lib.Encoded((cross,) * layer, rows.copy(decoder.encoded.bias))
    bias = decoder.past_bias if decoder.past_bias.ndim == 2 else rows.take(decoder.past_bias)
    return dataclasses.replace(
      decoder, caches=(cache,) * layer, encoded=encoded, past_bias=bias
    )


def _part(state: walk_lib.WalkState, rows: Rows) -> walk_lib.WalkState:
  """The bucket's rows. Of those that stay nothing about their exit is known yet."""
  hidden, done, rejected, memory = rows.take(
    (state.hidden, state.done, state.rejected_confidence, state.memory)
  )
  zeros = jnp.zeros(done.shape, jnp.float32)
  return walk_lib.WalkState(
    hidden, done, zeros.astype(jnp.int32), zeros, rejected, None, memory
  )


def _complete(walk: walk_lib.Walk, state: walk_lib.WalkState) -> walk_lib.WalkState:
  """With zeros for what the first layers would set: a switch changes no structure."""
  layers = walk.layers

  def made(hidden):
    row = layers.project(1, hidden)
    memory = walk.propagation.remember(None, 1, hidden, row, state.done)
    return layers.logits(1, hidden) if walk.heads_inside else None, memory

  shapes = jax.eval_shape(made, state.hidden)
  logits, memory = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  return dataclasses.replace(state, logits=logits, memory=memory)
