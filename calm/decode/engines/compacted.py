"""Batches whose rows leave at different layers: a layer runs on the smallest bucket (0, 4, 16,
32 rows, say) that holds those that stay, by one `lax.switch`. Tokens stay in step, and what a
row gets does not depend on its bucket."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from calm import exits
from calm.decode.engines import deferred, engine
from calm.exits import layers as layers_lib
from calm.exits import walk as walk_lib
from calm.t5 import attention as attention_lib
from calm.t5 import caches as caches_lib


@struct.dataclass
class Bucket:
  """Which rows a bucket holds; those that stay come first, in their order."""

  order: jax.Array  # the bucket's rows, [bucket] int32
  rank: jax.Array  # where each row lies, [batch] int32; beyond the bucket: not in it

  def present(self, count: jax.Array) -> jax.Array:
    """Its rows, [bucket], of which the first `count` are there, and -1 for the others."""
    there = jnp.arange(len(self.order), dtype=jnp.int32) < count
    return jnp.where(there, self.order, -1)

  def take(self, tree: Any) -> Any:
    """The bucket's rows of arrays [batch, ...]."""
    return jax.tree.map(lambda x: _rows(x, self.order), tree)

  def spread(self, tree: Any) -> Any:
    """Arrays [bucket, ...] as [batch, ...]; rows that are not in the bucket hold anything."""
    places = jnp.minimum(self.rank, len(self.order) - 1)
    return jax.tree.map(lambda x: _rows(x, places), tree)


def _rows(x: jax.Array, numbers: jax.Array) -> jax.Array:
  """`x[numbers]`, without what it takes to count from the end or to check bounds."""
  return x.at[numbers].get(mode="promise_in_bounds", wrap_negative_indices=False)


def compact(stays: jax.Array) -> Bucket:
  """All rows, those that stay first."""
  stays = stays.astype(jnp.int32)
  # Places without a sort: those that stay by their number, then the others by theirs.
  before = jnp.cumsum(stays) - stays
  others = jnp.cumsum(1 - stays) - (1 - stays)
  rank = jnp.where(stays > 0, before, jnp.sum(stays) + others)
  numbers = jnp.arange(len(stays), dtype=jnp.int32)
  is_at = rank[None, :] == numbers[:, None]
  order = jnp.sum(jnp.where(is_at, numbers[None, :], 0), axis=1)
  return Bucket(order.astype(jnp.int32), rank.astype(jnp.int32))


@dataclasses.dataclass(frozen=True)
class _Spread:
  """A bucket's attention, run in all rows of the batch."""

  whole: attention_lib.Attention
  rows: Bucket

  def to_past(self, query: jax.Array, row: layers_lib.KeyValue) -> jax.Array:
    query, row = self.rows.spread((query, row))
    return self.rows.take(self.whole.to_past(query, row))

  def to_prompt(self, query: jax.Array) -> jax.Array:
    return self.rows.take(self.whole.to_prompt(self.rows.spread(query)))


class Compacted(deferred.Deferred):
  """Layers run on the rows that need them. For `exits.DynamicExits` and several rows."""

  # Each bucket is the next larger one by this, from half the batch down to two rows: 4 makes 4
  # and 16 of 32. Every one is a program more a layer: more fit better, fewer compile faster.
  ratio: ClassVar[int] = 4

  @property
  def sizes(self) -> tuple[int, ...]:
    """0, the buckets that are smaller than the batch, and the batch."""
    rows = self.task.batch_size
    halves = (rows // 2 // self.ratio**i for i in range(rows.bit_length()))
    # A product of one row takes the time of two.
    return (0, *sorted({size for size in halves if size > 1}), rows)

  def take_step(self, current, position, active, cache: deferred.DeferredCache):
    task, decoder = self.task, self.decoder(position)
    walk = self.walk(decoder, position)
    state = _complete(walk, walk_lib.start(task.embed(current), active))
    fills: list[deferred.LayerFill] = []
    for segment in deferred.segments(walk.allowed, walk.layers.num_layers):
      stays = ~state.done
      needed = jnp.any(stays)
      before = [
        self.fill(decoder, k, cache.layers[k - 1], position, cache.states, needed)
        for k in segment
      ]
      old = tuple(fill.cache for fill in before)
      steps = dict(zip(segment, old, strict=True))
      state, rows = self._switch(walk, decoder, steps, state, stays)
      end = engine.after(position, state.hidden)
      caches = caches_lib.write_rows(old, rows, (end,) * len(old), task.keeps(position))
      filled = [jnp.where(needed, position + 1, fill.filled) for fill in before]
      fills += map(deferred.LayerFill, caches, filled)
    states = self.stored(cache.states, state, position)
    return exits.token_exit(walk, state, active), deferred.DeferredCache(tuple(fills), states)

  def _switch(self, walk, decoder, steps: dict[int, caches_lib.Cache], state, stays):
    """The segment, {layer: its cache}, on the smallest bucket that holds the rows that stay:
    (state, rows that its layers store)."""
    rows = compact(stays)
    branches = [
      lambda state, rows, size=size: self._run_bucket(
        walk, decoder, steps, state, Bucket(rows.order[:size], rows.rank)
      )
      for size in self.sizes[1:-1]
    ]
    branches = [
      lambda state, rows: self._run_none(steps, state),
      *branches,
      lambda state, rows: self._run_all(walk, decoder, steps, state),
    ]
    larger = jnp.sum(stays) > jnp.array(self.sizes[:-1])
    return lax.switch(jnp.sum(larger), branches, state, rows)

  def _run_none(self, steps, state):
    """Nothing is stored: what this writes is written over by a fill."""
    config = self.task.config
    shape = self.task.batch_size, config.num_heads, config.head_dim
    zeros = jnp.zeros(shape, jnp.dtype(config.dtype))
    return state, (layers_lib.KeyValue(zeros, zeros),) * len(steps)

  def _run_all(self, walk: walk_lib.Walk, decoder, steps, state):
    stored = []
    for layer, cache in steps.items():
      hidden, row = decoder.run(layer, walk.layer_input(layer, state), cache)
      row = walk.stored(layer, state, row)
      state = walk.after(layer, state, hidden, row)
      stored.append(row)
    return state, tuple(stored)

  def _run_bucket(self, walk: walk_lib.Walk, decoder, steps, state, rows: Bucket):
    """The bucket alone runs; all rows store."""
    threshold = walk.threshold if walk.threshold.ndim == 0 else rows.take(walk.threshold)
    inside = dataclasses.replace(walk, threshold=threshold)
    stays, part = ~state.done, _part(state, rows)
    count, stored = jnp.sum(stays), []
    for layer, cache in steps.items():
      row = decoder.project(layer, walk.layer_input(layer, state))
      kept, part_row = walk.stored(layer, state, row), rows.take(row)
      whole = decoder.attention(layer, part.hidden, cache, rows.present(count))
      attention = whole if whole.native else _Spread(whole, rows)
      hidden = decoder.run_projected(layer, part.hidden, part_row, attention)
      part = inside.after(layer, part, hidden, part_row)
      hidden = layers_lib.select_rows(stays, rows.spread(part.hidden), state.hidden)
      state = dataclasses.replace(state, hidden=hidden)
      stored.append(kept)
    # Rows that had left stay as they are.
    return layers_lib.select_rows(stays, rows.spread(part), state), tuple(stored)


def _part(state: walk_lib.WalkState, rows: Bucket) -> walk_lib.WalkState:
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
    memory = walk.propagation.remember(None, 1, hidden, row, state.done, layers)
    read = layers.read(1, hidden)
    logits = layers.logits(read) if walk.measure.uses_head else None
    return logits, memory, read if walk.carries_read else None

  shapes = jax.eval_shape(made, state.hidden)
  logits, memory, read = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  return dataclasses.replace(state, logits=logits, memory=memory, read=read)
