"""Several positions of a decoder layer at once, each row of the batch at its own place.

A window is some consecutive positions of every row. Its keys and values are written first,
each row's at its own position, and read with the rest of the cache: biases say how far it sees.
(One position alone is `attention.Attention`'s: a cache written before it is read for one query
would be copied.)
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int

from calm.exits.layers import KeyValue
from calm.t5 import native, platforms
from calm.t5.caches import Cache
from calm.t5.decoder import BiasTable


def past_biases(
  table: BiasTable, positions: Int[Array, " batch"], native: bool
) -> tuple[jax.Array, ...]:
  """Biases of the keys before each row's position, as `BiasTable.at`, for rows that are not in
  step: [batch, heads, length]; one for all layers, or one a layer.

  Args:
    table: of the caches.
    positions: the rows'.
    native: see `engines.Task`.
  """
  length = table.length
  first = length - 1 - positions
  return tuple(_slices(extended, first, length, native) for extended in table.extended)


def window_biases(
  table: BiasTable, positions: Int[Array, " batch"], window: int, native: bool
) -> tuple[jax.Array, ...]:
  """Causal biases of windows, their own keys among the cache's.

  Args:
    table: of caches with room for a window from any position on.
    positions: of the first token of each window.
    window: positions.
    native: see `engines.Task`.

  Returns:
    [batch, heads, window, length]; one for all layers, or one a layer.
  """
  length, biases = table.length, []
  for extended, current in zip(table.extended, table.current, strict=True):
    own = np.arange(extended.shape[1]) == length - 1
    with_itself = jnp.where(own[None, :], current[:, None], extended)
    # The slice of the window's last position is the widest, the others lie in it.
    first = length - positions - window
    rows = _slices(with_itself, first, length + window - 1, native)
    shifted = [rows[:, :, window - 1 - i : window - 1 - i + length] for i in range(window)]
    biases.append(jnp.stack(shifted, axis=2))
  return tuple(biases)


def _slices(extended: jax.Array, first: jax.Array, width: int, native: bool) -> jax.Array:
  """[batch, heads, width] from each row's first column on."""

  def of_row(first: jax.Array) -> jax.Array:
    return lax.dynamic_slice_in_dim(extended, first, width, axis=1)

  # XLA:CPU goes through a gather number by number, and copies slices.
  if len(first) == 1 or (native and len(first) <= UNROLLED and platforms.wakes_threads()):
    return jnp.stack([of_row(each) for each in first])
  return jax.vmap(of_row)(first)


# Rows whose windows are written one after the other without a loop: its turns take longer.
UNROLLED = 8


@dataclasses.dataclass(frozen=True)
class WindowAttention:
  """What positions of a window attend to, at one layer: `attention.Attends`.

  Rows of queries are batch times positions, the positions of a row beside each other.

  Attributes:
    cache: keys and values, those of the window among them.
    bias: of those keys, [batch, heads, positions, length].
    cross: keys and values of the prompts.
    cross_bias: of those keys, [batch, 1, input_length].
    float32: whether scores are float32 whatever the activation dtype.
    native: see `engines.Task`.
    alone: see `native.NativeAttention`.
  """

  cache: Cache
  bias: jax.Array
  cross: Cache
  cross_bias: jax.Array
  float32: bool
  native: bool = False
  alone: bool = False

  def to_past(self, query: jax.Array, row: KeyValue) -> jax.Array:
    """Mixed values [rows, heads * head_dim] of the past and of the window."""
    del row  # it is in the cache
    heads = query.shape[1]
    cache = Cache(_apart(self.cache.keys, heads), _apart(self.cache.values, heads))
    return self._attend(query, cache, self.bias)

  def to_prompt(self, query: jax.Array) -> jax.Array:
    """Mixed values [rows, heads * head_dim] of the prompt."""
    return self._attend(query, self.cross, self.cross_bias[:, :, None])

  def _attend(self, query: jax.Array, cache: Cache, bias: jax.Array) -> jax.Array:
    batch = len(self.cross_bias)
    if self.native and native.takes(cache):
      wide = jnp.broadcast_to(bias, (batch, bias.shape[1], len(query) // batch, bias.shape[3]))
      by_query = jnp.swapaxes(wide, 1, 2).reshape(len(query), *wide.shape[1::2])
      return native.attend(None, query, cache.keys, cache.values, by_query, None, self.alone)
    scored = lambda x: x.astype(jnp.float32) if self.float32 else x
    rows = by_window(query, self.cross_bias.shape[0])
    # Of "bhwd,bhld->bhwl" XLA:CPU transposes the second factor: all keys, not a few queries.
    queries = jnp.swapaxes(scored(rows), 2, 3)
    scores = jnp.einsum("bhld,bhdw->bhlw", scored(cache.keys), queries).swapaxes(2, 3)
    weights = jax.nn.softmax(scores + bias.astype(scores.dtype)).astype(query.dtype)
    # The heads' own order, then moved: XLA:CPU multiplies "bhwl,bhld->bwhd" number by number.
    mixed = jnp.moveaxis(jnp.einsum("bhwl,bhld->bhwd", weights, cache.values), 1, 2)
    return mixed.reshape(len(query), -1)


def by_window(rows: jax.Array, batch_size: int) -> jax.Array:
  """[batch, heads, positions, head_dim] of [batch * positions, heads, head_dim]."""
  return jnp.moveaxis(rows.reshape(batch_size, -1, *rows.shape[1:]), 1, 2)


def write_window(cache: Cache, window: KeyValue, positions: Int[Array, " batch"]) -> Cache:
  """Writes every row's window at its own position, in place.

  Args:
    cache: of one layer, with room for a whole window.
    window: keys and values, [batch, heads, window, head_dim].
    positions: of each row's window, [batch].
  """
  keys, values = _laid(window.key, cache.keys), _laid(window.value, cache.values)

  def row(i, cache: Cache) -> Cache:
    def put(array, update):
      start = [jnp.zeros((), jnp.int32)] * array.ndim
      start[0], start[-2] = jnp.asarray(i, jnp.int32), positions[i]
      part = lax.dynamic_slice_in_dim(update, i, 1, axis=0)
      return lax.dynamic_update_slice(array, part, start)

    return Cache(put(cache.keys, keys), put(cache.values, values))

  return lax.fori_loop(0, len(positions), row, cache, unroll=len(positions) <= UNROLLED)


def _laid(window: jax.Array, cache: jax.Array) -> jax.Array:
  """[batch, heads, window, head_dim] as `cache` has it."""
  if cache.ndim == 4:
    return window
  return jnp.moveaxis(window, 1, 2).reshape(window.shape[0], window.shape[2], -1)


def _apart(cache: jax.Array, heads: int) -> jax.Array:
  """[batch, heads, length, head_dim], however the platform has it."""
  if cache.ndim == 4:
    return cache
  return jnp.moveaxis(cache.reshape(*cache.shape[:2], heads, -1), 2, 1)
