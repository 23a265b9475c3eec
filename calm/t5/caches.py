"""Where keys and values lie: self-attention caches, and cross-attention once a
prompt.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Float, Int

from calm.exits.layers import KeyValue
from calm.t5 import kernels, layers, network, platforms
from calm.t5.decoder_weights import DecoderWeights
from calm.t5.eight_bits import EightBits


@struct.dataclass
class Cache:
  """Keys and values of one layer, of its self-attention or of a prompt: [batch,
  heads, length, head_dim]; where `platforms.merged_heads`, [batch, length,
  heads * head_dim]. With the length last, writing one position takes ten times
  as long.
  """

  keys: jax.Array
  values: jax.Array


@struct.dataclass
class Encoded:
  """One batch of prompts, ready to be decoded any number of times."""

  cross: tuple[Cache, ...]  # per decoder layer, the prompt's keys and values
  bias: jax.Array  # 0 at tokens, -1e10 at padding, [batch, 1, input_length]
  tokens: jax.Array  # 0 at padding, [batch, input_length]


def cross_attention_inputs(
  weights: DecoderWeights,
  config: network.T5Config,
  encoded: Float[Array, "*batch_and_length emb"],
  encoder_input_tokens: Int[Array, "batch input_length"],
  packed: network.Packed | None = None,
) -> Encoded:
  """Every decoder layer's cross-attention keys and values, once a prompt, of
  states as `network.encode` makes them.
  """
  heads = config.num_heads
  head_dim = config.head_dim
  batch, length = encoder_input_tokens.shape
  matrices = weights.cross_key_value
  bias = jnp.where(encoder_input_tokens > 0, 0.0, layers.MASK_BIAS)[:, None, :]
  encoded, cross = encoded.astype(config.dtype), []
  tiled = all(
    isinstance(matrix, EightBits) and matrix.tiled for matrix in matrices
  )
  if packed is not None and tiled and kernels.writes_heads(heads, head_dim):
    given = (encoded, packed.begins, packed.counts)
    lines = (batch, heads, length, head_dim)

    def of(matrix, first):
      return kernels.coded_heads(*given, matrix, first, lines)

    cross, matrices = (
      [Cache(of(m, 0), of(m, heads * head_dim)) for m in matrices],
      (),
    )
  elif packed is not None:
    encoded = network.apart(encoded, packed, length)
  for matrix in matrices:
    if isinstance(matrix, EightBits):
      made = matrix.product(encoded)
    else:
      made = encoded @ matrix.astype(encoded.dtype)
    if platforms.merged_heads():
      # Branches of a conditional read what they are given: XLA:TPU lays a
      # prompt's keys out as it likes them only where nothing but straight code
      # reads them.
      cross.append(Cache(*jnp.split(made, 2, axis=-1)))
      continue
    shape = batch, length, 2, heads, head_dim
    cross.append(Cache(*jnp.transpose(made.reshape(shape), (2, 0, 3, 1, 4))))
  return Encoded(tuple(cross), bias.astype(config.dtype), encoder_input_tokens)


def empty_caches(
  config: network.T5Config,
  batch_size: int,
  length: int,
  num_layers: int | None = None,
) -> tuple[Cache, ...]:
  """Zeroed caches of the first `num_layers` layers (all by default)."""
  heads = config.num_heads
  head_dim = config.head_dim
  dtype = jnp.dtype(config.dtype)
  num_layers = config.num_decoder_layers if num_layers is None else num_layers
  apart = (batch_size, heads, length, head_dim)
  beside = (batch_size, length, heads * head_dim)
  shape = beside if platforms.merged_heads() else apart

  def empty():
    return jnp.zeros(shape, dtype)

  return tuple(Cache(empty(), empty()) for _ in range(num_layers))


def length(caches: tuple[Cache, ...]) -> int:
  """Positions of self-attention caches."""
  return caches[0].keys.shape[-2]


def write_rows(
  caches: tuple[Cache, ...],
  rows: tuple[KeyValue, ...],
  positions: Sequence[jax.Array],
  keeps: jax.Array | None = None,
) -> tuple[Cache, ...]:
  """Writes one position's keys and values in place, at `positions`: one a
  layer, all the same, each known once its cache may be written. Rows that
  `keeps` names, [batch] bool, stay.
  """

  def put(cache, row, position):
    row, axis = as_positions(row[:, None], cache), cache.ndim - 2
    if keeps is not None:
      old = lax.dynamic_slice_in_dim(cache, position, 1, axis=axis)
      row = jnp.where(keeps.reshape(-1, *[1] * (cache.ndim - 1)), old, row)
    return lax.dynamic_update_slice_in_dim(cache, row, position, axis=axis)

  return tuple(
    Cache(
      put(cache.keys, row.key, position), put(cache.values, row.value, position)
    )
    for cache, row, position in zip(caches, rows, positions, strict=True)
  )


def as_positions(
  rows: Float[Array, "batch positions heads head_dim"], cache: jax.Array
) -> jax.Array:
  """Keys or values of some positions, laid out as `cache` has them."""
  if cache.ndim == 3:
    return rows.reshape(*rows.shape[:2], -1)
  return jnp.transpose(rows, (0, 2, 1, 3))
