"""Attention of the positions that are decoded now: one of every row, or a
window of each.

One position attends to the cache and, beside it, to itself, as a cache that is
written before it is read would be copied; a window's keys and values are
written first.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int

from calm.exits.layers import KeyValue
from calm.t5 import caches, kernels, layers, network, platforms
from calm.t5.caches import Cache
from calm.t5.decoder_weights import DecoderWeights

# Rows whose windows are written one after the other without a loop: its turns
# take longer.
UNROLLED = 8


@dataclasses.dataclass(frozen=True)
class BiasTable:
  """Causal self-attention biases for every position, one slice a step.

  Tuples are of one for all layers, or of one a layer
  (`T5Config.relpos_per_layer`).
  """

  # [heads, 2 * length]; the slice of `length` that begins at `length - 1 - t`
  # has, at key j, the bias of distance t - j for j < t and the mask elsewhere.
  extended: tuple[jax.Array, ...]
  current: tuple[jax.Array, ...]  # of a token with itself, [heads]
  length: int  # positions in the caches

  def at(self, position: jax.Array) -> tuple[jax.Array, ...]:
    """Of the keys before `position`, [], which are in the cache while its own
    is not yet: [heads, length] each.
    """
    first = self.length - 1 - position
    return tuple(
      lax.dynamic_slice_in_dim(extended, first, self.length, axis=1)
      for extended in self.extended
    )

  def before_each(
    self, positions: Int[Array, " batch"], native: bool = False
  ) -> tuple[jax.Array, ...]:
    """As `at`, for rows that are not in step, [batch, heads, length]; `native`
    as in `engines.Task`.
    """
    first = self.length - 1 - positions
    return tuple(
      _slices(each, first, self.length, native) for each in self.extended
    )

  def of_windows(
    self, positions: Int[Array, " batch"], window: int, native: bool = False
  ) -> tuple[jax.Array, ...]:
    """Causal biases of windows of so many positions, their own keys among the
    cache's, [batch, heads, window, length]; `positions` are of the first token
    of each window, and the caches have room for a whole one.
    """
    length = self.length
    biases = []
    for extended, current in zip(self.extended, self.current, strict=True):
      own = np.arange(extended.shape[1]) == length - 1
      with_itself = jnp.where(own[None, :], current[:, None], extended)
      # The slice of the window's last position is the widest, the others lie in
      # it.
      first = length - positions - window
      rows = _slices(with_itself, first, length + window - 1, native)
      shifted = [
        rows[:, :, window - 1 - i : window - 1 - i + length]
        for i in range(window)
      ]
      biases.append(jnp.stack(shifted, axis=2))
    return tuple(biases)


def of_layer(biases: tuple[jax.Array, ...], layer: int) -> jax.Array:
  """A 1-based layer's part of a `BiasTable`'s tuples."""
  return biases[min(layer, len(biases)) - 1]


def bias_table(
  weights: DecoderWeights, config: network.T5Config, length: int
) -> BiasTable:
  """Lays the relative-position biases out by distance."""
  buckets = layers.relative_position_buckets(
    -np.arange(length), False, config.relpos_buckets, config.relpos_max_distance
  )
  # [heads, length], at distance 0, 1, ...
  by_distance = [relpos[:, buckets] for relpos in weights.relpos]
  masked = jnp.full(
    (by_distance[0].shape[0], length + 1),
    layers.MASK_BIAS,
    by_distance[0].dtype,
  )
  return BiasTable(
    tuple(
      jnp.concatenate([bias[:, :0:-1], masked], axis=1) for bias in by_distance
    ),
    tuple(bias[:, 0] for bias in by_distance),
    length,
  )


def _slices(
  extended: jax.Array, first: jax.Array, width: int, native: bool
) -> jax.Array:
  """[batch, heads, width] from each row's first column on."""

  def of_row(first: jax.Array) -> jax.Array:
    return lax.dynamic_slice_in_dim(extended, first, width, axis=1)

  # XLA:CPU goes through a gather number by number, and copies slices.
  if len(first) == 1 or (
    native and len(first) <= UNROLLED and platforms.is_cpu()
  ):
    return jnp.stack([of_row(each) for each in first])
  return jax.vmap(of_row)(first)


@dataclasses.dataclass(frozen=True)
class Attention:
  """What one layer's attention reads, of a batch or of some of its rows: keys
  and values of the positions before this one and of the prompts, with their
  biases.
  """

  cache: Cache
  past_bias: jax.Array  # [heads, length] or [batch, heads, length]
  current_bias: jax.Array  # of the current token with itself, [heads]
  cross: Cache
  cross_bias: jax.Array  # [batch, 1, input_length]
  float32: bool  # whether scores are float32 whatever the activation dtype
  # Whether `kernels.attend` computes it, for `rows` if there are some, and as
  # `single_threaded` says.
  native: bool = False
  single_threaded: bool = False
  rows: Int[Array, " queries"] | None = None

  def to_past(self, query: jax.Array, row: KeyValue) -> jax.Array:
    """Mixed values [batch, heads * head_dim] of the past and of the current
    token, `row`.
    """

    def by_row(bias):
      return bias if bias.ndim == 3 else bias[None]

    if self.native:
      now = row.key, row.value, self.current_bias
      return self._attend(query, self.cache, by_row(self.past_bias), now)
    value, query, key_now = (
      row.value,
      self._scored(query),
      self._scored(row.key),
    )
    past = _scores(query, self._scored(self.cache.keys))
    past = past + by_row(self.past_bias).astype(past.dtype)
    now = jnp.sum(query * key_now, axis=-1, keepdims=True)
    now = now + self.current_bias[None, :, None].astype(now.dtype)
    # The current token is not in the cache yet: branches of the chain only read
    # it.
    weights = jax.nn.softmax(jnp.concatenate([past, now], axis=-1)).astype(
      value.dtype
    )
    mixed = _mixed(weights[..., :-1], self.cache.values)
    mixed = mixed + weights[..., -1:] * value
    return mixed.reshape(mixed.shape[0], -1)

  def to_prompt(self, query: jax.Array) -> jax.Array:
    """Mixed values [batch, heads * head_dim] of the prompt."""
    if self.native:
      return self._attend(query, self.cross, self.cross_bias, None)
    scores = _scores(self._scored(query), self._scored(self.cross.keys))
    weights = jax.nn.softmax(scores + self.cross_bias.astype(scores.dtype))
    mixed = _mixed(weights.astype(query.dtype), self.cross.values)
    return mixed.reshape(mixed.shape[0], -1)

  def _attend(
    self, query: jax.Array, cache: Cache, bias: jax.Array, now: Any
  ) -> jax.Array:
    keys = cache.keys
    values = cache.values
    alone = self.single_threaded
    return kernels.attend(self.rows, query, keys, values, bias, now, alone)

  def _scored(self, x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32) if self.float32 else x


def _scores(query: jax.Array, keys: jax.Array) -> jax.Array:
  """[batch, heads, length] of queries [batch, heads, head_dim]."""
  if keys.ndim == 4:
    return jnp.einsum("bhd,bhld->bhl", query, keys)
  # Heads side by side: a query that is 0 at the others' numbers, so that no key
  # is moved.
  wide = query[:, :, None] * _own_head(query)[None, :, :, None]
  return jnp.einsum("bhc,blc->bhl", wide.reshape(*query.shape[:2], -1), keys)


def _mixed(weights: jax.Array, values: jax.Array) -> jax.Array:
  """Values mixed by weights [batch, heads, length]: [batch, heads,
  head_dim].
  """
  if values.ndim == 4:
    return jnp.einsum("bhl,bhld->bhd", weights, values)
  every = jnp.einsum("bhl,blc->bhc", weights, values)
  every = every.reshape(*every.shape[:2], weights.shape[1], -1)
  return jnp.sum(every * _own_head(weights)[None, :, :, None], axis=2)


def _own_head(x: jax.Array) -> jax.Array:
  """1 where a head of [batch, heads, ...] meets itself, [heads, heads]."""
  return jnp.eye(x.shape[1], dtype=x.dtype)


@dataclasses.dataclass(frozen=True)
class WindowAttention:
  """What positions of a window, which is in the cache, attend to; a row's
  queries lie beside each other. Fields are those of `Attention`, but for
  `native`: as in `engines.Task`.
  """

  cache: Cache
  bias: jax.Array  # [batch, heads, positions, length]
  cross: Cache
  cross_bias: jax.Array
  float32: bool
  native: bool = False
  single_threaded: bool = False

  def to_past(self, query: jax.Array, row: KeyValue) -> jax.Array:
    """Mixed values [rows, heads * head_dim] of the past and of the window."""
    del row  # it is in the cache
    return self._attend(query, self.cache, self.bias)

  def to_prompt(self, query: jax.Array) -> jax.Array:
    """Mixed values [rows, heads * head_dim] of the prompt."""
    return self._attend(query, self.cross, self.cross_bias[:, :, None])

  def _attend(
    self, query: jax.Array, cache: Cache, bias: jax.Array
  ) -> jax.Array:
    keys, values = (
      _apart(x, query.shape[1]) for x in (cache.keys, cache.values)
    )
    batch = self.cross_bias.shape[0]
    alone = self.single_threaded
    if self.native and kernels.reads(keys, values):
      # By query, where they differ; or by row.
      by_query = jnp.swapaxes(bias, 1, 2).reshape(-1, *bias.shape[1::2])
      return kernels.attend(None, query, keys, values, by_query, None, alone)

    def scored(x):
      return x.astype(jnp.float32) if self.float32 else x

    rows = by_window(query, batch)
    # Of "bhwd,bhld->bhwl" XLA:CPU transposes the second factor: all keys, not a
    # few queries.
    queries = jnp.swapaxes(scored(rows), 2, 3)
    scores = jnp.einsum("bhld,bhdw->bhlw", scored(keys), queries).swapaxes(2, 3)
    weights = jax.nn.softmax(scores + bias.astype(scores.dtype)).astype(
      query.dtype
    )
    # The heads' own order, then moved: XLA:CPU multiplies "bhwl,bhld->bwhd"
    # number by number.
    mixed = jnp.moveaxis(jnp.einsum("bhwl,bhld->bhwd", weights, values), 1, 2)
    return mixed.reshape(query.shape[0], -1)


def by_window(rows: jax.Array, batch_size: int) -> jax.Array:
  """[batch, heads, positions, head_dim] of [batch * positions, heads,
  head_dim].
  """
  return jnp.moveaxis(rows.reshape(batch_size, -1, *rows.shape[1:]), 1, 2)


def write_window(
  cache: Cache, window: KeyValue, positions: Int[Array, " batch"]
) -> Cache:
  """Writes every row's window, [batch, window, heads, head_dim], at its own
  position, in place; the cache, of one layer, has room for a whole one.
  """
  keys = caches.as_positions(window.key, cache.keys)
  values = caches.as_positions(window.value, cache.values)

  def row(i, cache: Cache) -> Cache:
    def put(array, update):
      start = [jnp.zeros((), jnp.int32)] * array.ndim
      start[0], start[-2] = jnp.asarray(i, jnp.int32), positions[i]
      part = lax.dynamic_slice_in_dim(update, i, 1, axis=0)
      return lax.dynamic_update_slice(
        array, part, start, allow_negative_indices=False
      )

    return Cache(put(cache.keys, keys), put(cache.values, values))

  return lax.fori_loop(
    0, len(positions), row, cache, unroll=len(positions) <= UNROLLED
  )


def _apart(cache: jax.Array, heads: int) -> jax.Array:
  """[batch, heads, length, head_dim], however the platform has it."""
  if cache.ndim == 4:
    return cache
  return jnp.moveaxis(cache.reshape(*cache.shape[:2], heads, -1), 2, 1)
