"""The decoder one position at a time, from weights laid out for decoding.

The same mathematics as `network.Transformer`, as plain functions: matrices that meet the same
input are fused (`weights`), cross-attention keys and values are made once a prompt, caches
have the layout that a step reads without transposing.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, Float, Int

from calm.exits import propagation
from calm.t5 import layers as layers_lib
from calm.t5 import network

# Here under their old names too, for those who bind a step.
from calm.t5.decoder_weights import DecoderWeights as DecoderWeights
from calm.t5.decoder_weights import LayerWeights as LayerWeights
from calm.t5.decoder_weights import decoder_weights as decoder_weights


@struct.dataclass
class Cache:
  """Self-attention keys and values of one layer.

  With the length last, as a dot product of keys might like it, every number of a position
  would lie in a cache line of its own, and writing one take ten times as long.

  Attributes:
    keys, values: [batch, heads, length, head_dim].
  """

  keys: jax.Array
  values: jax.Array


@struct.dataclass
class Encoded:
  """One batch of prompts, ready to be decoded any number of times.

  Attributes:
    cross: per decoder layer, the prompt's keys and values,
      [batch, heads, input_length, head_dim].
    bias: 0 at tokens, -1e10 at padding, [batch, 1, input_length].
  """

  cross: tuple[Cache, ...]
  bias: jax.Array


def cross_attention_inputs(
  weights: DecoderWeights,
  config: network.T5Config,
  encoded: Float[Array, "batch input_length emb"],
  encoder_input_tokens: Int[Array, "batch input_length"],
) -> Encoded:
  """Every decoder layer's cross-attention keys and values, once a prompt."""
  encoded = encoded.astype(config.dtype)
  shape = (*encoded.shape[:2], 2, config.num_heads, config.head_dim)
  cross = []
  for layer in weights.layers:
    both = (encoded @ layer.cross_key_value).reshape(shape)
    cross.append(Cache(*jnp.transpose(both, (2, 0, 3, 1, 4))))
  bias = jnp.where(encoder_input_tokens > 0, 0.0, layers_lib.MASK_BIAS)[:, None, :]
  return Encoded(tuple(cross), bias.astype(config.dtype))


def empty_caches(
  config: network.T5Config, batch_size: int, length: int, num_layers: int | None = None
) -> tuple[Cache, ...]:
  """Zeroed caches of the first `num_layers` layers (all by default)."""
  heads, head_dim, dtype = config.num_heads, config.head_dim, jnp.dtype(config.dtype)
  num_layers = config.num_decoder_layers if num_layers is None else num_layers
  empty = lambda: jnp.zeros((batch_size, heads, length, head_dim), dtype)
  return tuple(Cache(empty(), empty()) for _ in range(num_layers))


def write_rows(
  caches: tuple[Cache, ...],
  rows: tuple[propagation.KeyValue, ...],
  position: jax.Array,
  keeps: jax.Array | None = None,
) -> tuple[Cache, ...]:
  """Writes one position's keys and values, one update in place a layer.

  Args:
    caches, rows: one entry a layer.
    position: where.
    keeps: rows of the batch that stay as they are, [batch] bool; None: none does.
  """

  def put(cache, row):
    row = row[:, :, None]
    if keeps is not None:
      old = lax.dynamic_slice_in_dim(cache, position, 1, axis=2)
      row = jnp.where(keeps[:, None, None, None], old, row)
    return lax.dynamic_update_slice_in_dim(cache, row, position, axis=2)

  return tuple(
    Cache(put(cache.keys, row.key), put(cache.values, row.value))
    for cache, row in zip(caches, rows, strict=True)
  )


@dataclasses.dataclass(frozen=True)
class BiasTable:
  """Causal self-attention biases for every position, one slice a step.

  Attributes:
    extended: [heads, 2 * length]; the slice of `length` that begins at `length - 1 - t` has,
      at key j, the bias of distance t - j for j < t and the mask elsewhere.
    current: bias of a token with itself, [heads].
    length: positions in the caches.
  """

  extended: jax.Array
  current: jax.Array
  length: int

  def at(self, position: jax.Array, starts: jax.Array | None = None) -> jax.Array:
    """Of the keys before `position`, which are in the cache while its own is not yet.

    Args:
      position: [].
      starts: position of each row's first key, [batch]; None: 0.

    Returns:
      [heads, length]; with `starts` [batch, heads, length], earlier keys masked too.
    """
    bias = lax.dynamic_slice_in_dim(
      self.extended, self.length - 1 - position, self.length, axis=1
    )
    if starts is None:
      return bias
    other = jnp.arange(self.length)[None, None, :] < starts[:, None, None]
    return jnp.where(other, jnp.asarray(layers_lib.MASK_BIAS, bias.dtype), bias)


def bias_table(weights: DecoderWeights, config: network.T5Config, length: int) -> BiasTable:
  """Lays the relative-position biases out by distance."""
  buckets = layers_lib.relative_position_buckets(
    -np.arange(length), False, config.relpos_buckets, config.relpos_max_distance
  )
  by_distance = weights.relpos[:, buckets]  # [heads, length], at distance 0, 1, ...
  masked = jnp.full(
    (weights.relpos.shape[0], length + 1), layers_lib.MASK_BIAS, by_distance.dtype
  )
  extended = jnp.concatenate([by_distance[:, :0:-1], masked], axis=1)
  return BiasTable(extended, by_distance[:, 0], length)


@dataclasses.dataclass(frozen=True)
class DecoderStep:
  """The decoder at one position: provides `propagation.Layers`.

  Attributes:
    weights: from `decoder_weights`.
    config: the model's sizes.
    encoded: the prompts.
    caches: keys and values of the positions before this one; read only.
    past_bias: [heads, length] or [batch, heads, length], from `BiasTable.at`.
    current_bias: [heads].
  """

  weights: DecoderWeights
  config: network.T5Config
  encoded: Encoded
  caches: tuple[Cache, ...]
  past_bias: jax.Array
  current_bias: jax.Array

  def layers(self) -> propagation.Layers:
    return propagation.Layers(
      num_layers=self.config.num_decoder_layers,
      run=self.run,
      project=self.project,
      logits=self.logits,
      exit_logit=self.exit_logit,
      shared_head=len(self.weights.heads) == 1,
      shortlist_logits=self.shortlist_logits,
    )

  def run(self, layer: int, hidden: jax.Array) -> tuple[jax.Array, propagation.KeyValue]:
    """One decoder layer (Eq. 3): d^{i-1} [batch, emb_dim] -> d^i and its key and value."""
    row = self.project(layer, hidden)
    return self.run_projected(layer, hidden, row), row

  def run_projected(
    self, layer: int, hidden: jax.Array, row: propagation.KeyValue
  ) -> jax.Array:
    """d^i of d^{i-1} [batch, emb_dim] and the key and value that the layer projects of it."""
    weights = self.weights.layers[layer - 1]
    normed = rms_norm(hidden, weights.self_norm)
    (query,) = self._heads(normed @ weights.query, 1)
    mixed = self.self_attention(layer, query, row)
    hidden = hidden + mixed @ weights.self_out
    normed = rms_norm(hidden, weights.cross_norm)
    (query,) = self._heads(normed @ weights.cross_query, 1)
    hidden = hidden + self.cross_attention(layer, query) @ weights.cross_out
    normed = rms_norm(hidden, weights.mlp_norm)
    return hidden + self._mlp(normed @ weights.mlp_in) @ weights.mlp_out

  def project(self, layer: int, hidden: jax.Array) -> propagation.KeyValue:
    """Key and value that the layer makes of input state `hidden`, nothing else."""
    weights = self.weights.layers[layer - 1]
    normed = rms_norm(hidden, weights.self_norm)
    key, value = self._heads(normed @ weights.key_value, 2)
    return propagation.KeyValue(key, value)

  def logits(self, layer: int, hidden: jax.Array) -> jax.Array:
    """float32 logits [batch, num_pieces] of the layer's full head."""
    heads = self.weights.heads
    head = heads[0] if len(heads) == 1 else heads[layer - 1]
    return rms_norm(hidden, self.weights.decoder_norm).astype(jnp.float32) @ head

  def shortlist_logits(self, hidden: jax.Array) -> jax.Array:
    """float32 logits [batch, shortlist] of the shortlist only."""
    if self.weights.shortlist is None:
      return propagation.no_shortlist(hidden)
    normed = rms_norm(hidden, self.weights.decoder_norm).astype(jnp.float32)
    return normed @ self.weights.shortlist

  def exit_logit(self, hidden: jax.Array) -> jax.Array:
    """Pre-sigmoid exit confidence [batch] from decoder_norm(d^i)."""
    if self.weights.exit_kernel is None or self.weights.exit_bias is None:
      raise ValueError(
        "Expected a model with an exit classifier for the measure 'classifier'. Got none in"
        " its parameters; train the second stage, or use the measure 'softmax' or 'state'."
      )
    normed = rms_norm(hidden, self.weights.decoder_norm).astype(jnp.float32)
    return normed @ self.weights.exit_kernel + self.weights.exit_bias

  def _heads(self, projected: jax.Array, count: int) -> list[jax.Array]:
    shape = (projected.shape[0], count, self.config.num_heads, self.config.head_dim)
    split = projected.reshape(shape)
    return [split[:, i] for i in range(count)]

  def self_attention(
    self, layer: int, query: jax.Array, row: propagation.KeyValue
  ) -> jax.Array:
    """Mixed values [batch, heads * head_dim] of the past and of the current token, `row`."""
    cache, value = self.caches[layer - 1], row.value
    query, key_now = self._attention_dtype(query), self._attention_dtype(row.key)
    past = jnp.einsum("bhd,bhld->bhl", query, self._attention_dtype(cache.keys))
    bias = self.past_bias if self.past_bias.ndim == 3 else self.past_bias[None]
    past = past + bias.astype(past.dtype)
    now = jnp.sum(query * key_now, axis=-1, keepdims=True)
    now = now + self.current_bias[None, :, None].astype(now.dtype)
    # The current token is not in the cache yet: branches of the chain only read it.
    weights = jax.nn.softmax(jnp.concatenate([past, now], axis=-1)).astype(value.dtype)
    mixed = jnp.einsum("bhl,bhld->bhd", weights[..., :-1], cache.values)
    mixed = mixed + weights[..., -1:] * value
    return mixed.reshape(mixed.shape[0], -1)

  def cross_attention(self, layer: int, query: jax.Array) -> jax.Array:
    """Mixed values [batch, heads * head_dim] of the prompt."""
    cross = self.encoded.cross[layer - 1]
    scores = jnp.einsum(
      "bhd,bhld->bhl", self._attention_dtype(query), self._attention_dtype(cross.keys)
    )
    weights = jax.nn.softmax(scores + self.encoded.bias.astype(scores.dtype))
    mixed = jnp.einsum("bhl,bhld->bhd", weights.astype(query.dtype), cross.values)
    return mixed.reshape(mixed.shape[0], -1)

  def _attention_dtype(self, x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32) if self.config.float32_attention_logits else x

  def _mlp(self, projected: jax.Array) -> jax.Array:
    parts = jnp.split(projected, len(self.config.mlp_activations), axis=-1)
    product = None
    for part, name in zip(parts, self.config.mlp_activations, strict=True):
      part = layers_lib.activation_fn(name)(part)
      product = part if product is None else product * part
    assert product is not None
    return product


def rms_norm(x: Float[Array, "batch emb"], scale: Float[Array, " emb"]) -> jax.Array:
  """`layers.LayerNorm` without its module."""
  wide = x.astype(jnp.float32)
  wide = wide * lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + 1e-6)
  return wide.astype(x.dtype) * scale[None, :]
