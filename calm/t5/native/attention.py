"""Attention of one query a row by `attention_kernel`, in pieces that XLA runs side by side."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from calm.exits.layers import KeyValue
from calm.t5.attention import Attention
from calm.t5.caches import Cache
from calm.t5.native import calls

# Keys and values of so many numbers are worth a second thread: one that is awake, or one that
# has to be woken for them.
AWAKE_NUMBERS, ASLEEP_NUMBERS = 2**16, 2**18


@dataclasses.dataclass(frozen=True)
class NativeAttention:
  """`attention.Attention` for float32 caches on a CPU: provides `attention.Attends`.

  Attributes:
    whole: the batch's.
    rows: see `attend`.
    alone: whether the layer's products are made in one thread, the others asleep.
  """

  whole: Attention
  rows: Int[Array, " queries"] | None = None
  alone: bool = False

  def to_past(self, query: jax.Array, row: KeyValue) -> jax.Array:
    """As `Attention.to_past`."""
    cache, bias = self.whole.cache, self.whole.past_bias
    bias = bias if bias.ndim == 3 else bias[None]
    now = row.key, row.value, self.whole.current_bias
    return attend(self.rows, query, cache.keys, cache.values, bias, now, self.alone)

  def to_prompt(self, query: jax.Array) -> jax.Array:
    """As `Attention.to_prompt`."""
    cross = self.whole.cross
    bias = self.whole.cross_bias
    return attend(self.rows, query, cross.keys, cross.values, bias, None, self.alone)


def attends(
  whole: Attention,
  alone: bool,
  rows: Int[Array, " queries"] | None = None,
) -> NativeAttention | None:
  """This attention for a batch or for some rows of it; None where XLA has to compute it.

  Args:
    whole: the batch's.
    alone: see `NativeAttention`.
    rows: see `attend`.
  """
  if not (takes(whole.cross) and takes(whole.cache)):
    return None
  return NativeAttention(whole, rows, alone)


def takes(cache: Cache) -> bool:
  """Whether a cache is one that can be read."""
  float32 = cache.keys.dtype == cache.values.dtype == jnp.float32
  return float32 and cache.keys.ndim == 4 and calls.available()


def attend(
  rows: Int[Array, " queries"] | None,
  query: Float[Array, "queries heads head_dim"],
  keys: Float[Array, "batch heads length head_dim"],
  values: Float[Array, "batch heads length head_dim"],
  bias: Float[Array, "queries_batch_or_one heads_or_one length"],
  now: tuple[jax.Array, jax.Array, jax.Array] | None = None,
  alone: bool = False,
) -> Float[Array, "queries heads_head_dim"]:
  """softmax(keys query + bias) values, of every query and head.

  Args:
    rows: the row of the batch that each query reads; of queries with a negative one the result
      is 0. None: as many read each row, in the batch's order.
    query: the queries.
    keys, values: the batch's.
    bias: of the keys: for each query, for each row of the batch, or for all. Keys at
      `layers.MASK_BIAS` before the first or behind the last that is not are not read; a query
      that sees none gets 0.
    now: one key more of every query, its value [queries, heads, head_dim], bias [heads].
    alone: see `NativeAttention`.
  """
  _, heads, head_dim = query.shape
  enough = ASLEEP_NUMBERS if alone else AWAKE_NUMBERS
  pieces = calls.pieces(keys[0].size * len(query) >= enough)
  # Their numbers, written out, are one operation more of every layer of a step.
  rows = jnp.zeros((0,), jnp.int32) if rows is None else rows
  given = rows, *jax.tree.map(_float32, (query, keys, values, bias, *(now or ())))
  made = [
    jax.ffi.ffi_call(
      _target(head_dim, now is not None),
      jax.ShapeDtypeStruct((end - begin, head_dim), "float32"),
    )(jnp.full((), begin, jnp.int32), *given)
    for begin, end in itertools.pairwise(calls.ends(len(query) * heads, pieces))
  ]
  return jnp.concatenate(made).reshape(len(query), -1)


def _float32(x: jax.Array) -> jax.Array:
  return x.astype(jnp.float32)


def _target(head_dim: int, has_now: bool) -> str:
  """What XLA calls the function for heads of this size, compiled when first asked for."""
  from calm.t5.native import attention_kernel  # takes llvmlite

  make = lambda: attention_kernel.attention(head_dim, has_now)
  return calls.target(f"calm_attention_{head_dim}{'_now' if has_now else ''}", make)
