"""The decoder one position at a time: `network.Transformer` as plain functions
of weights and caches that are laid out for decoding.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from calm.exits import layers as layers_lib
from calm.exits.confidence import CERTAIN, evidence
from calm.exits.layers import KeyValue, Layers
from calm.t5 import kernels, network, platforms
from calm.t5.attention import Attention, WindowAttention, of_layer
from calm.t5.caches import Cache, Encoded
from calm.t5.decoder_weights import DecoderWeights, Matrix
from calm.t5.eight_bits import QuantizedHead
from calm.t5.layers import activation_fn
from calm.t5.tiles import Tiles


@dataclasses.dataclass(frozen=True)
class DecoderStep:
  """The decoder at one position: provides `exits.layers.Layers`."""

  weights: DecoderWeights
  config: network.T5Config
  encoded: Encoded  # the prompts
  # From `BiasTable.at`, of one for all layers or of one a layer: [heads,
  # length] or [batch, heads, length], and [heads].
  past_bias: tuple[jax.Array, ...]
  current_bias: tuple[jax.Array, ...]
  native: bool = False  # see `engines.Task`

  def layers(self, caches: Sequence[Cache]) -> Layers:
    """What exits need, with every layer's cache; an engine that brings each
    layer its cache when it runs gives none here.
    """
    return Layers(
      num_layers=self.config.num_decoder_layers,
      run=lambda layer, hidden: self.run(layer, hidden, caches[layer - 1]),
      project=self.project,
      logits=self.logits,
      peaks=self.peaks,
      exit_logit=self.exit_logit,
      read=self.read,
      translated=tuple(self.weights.translators),
      code=self.code,
      predict=self.predict,
      shortlist_logits=self.shortlist_logits,
      probe_logit=self.probe_logit,
    )

  def attention(
    self,
    layer: int,
    states: jax.Array,
    cache: Cache,
    rows: jax.Array | None = None,
  ) -> Attention:
    """What a layer attends to for the queries of these states, `cache` being
    its own; `rows` says of whose rows they are, where `kernels.attend` computes
    it.
    """
    cross = self.encoded.cross[layer - 1]
    past = of_layer(self.past_bias, layer)
    native = self.native and all(
      kernels.reads(x.keys, x.values) for x in (cross, cache)
    )
    return Attention(
      cache,
      past,
      of_layer(self.current_bias, layer),
      cross,
      self.encoded.bias,
      self.config.float32_attention_logits,
      native,
      native and self._single_threaded(states),
      rows,
    )

  def window_attention(
    self,
    layer: int,
    states: jax.Array,
    cache: Cache,
    biases: tuple[jax.Array, ...],
  ) -> WindowAttention:
    """The same of windows, which `cache` holds; `biases` are from
    `BiasTable.of_windows`.
    """
    return WindowAttention(
      cache,
      of_layer(biases, layer),
      self.encoded.cross[layer - 1],
      self.encoded.bias,
      self.config.float32_attention_logits,
      self.native,
      self._single_threaded(states),
    )

  def _single_threaded(self, states: jax.Array) -> bool:
    """Whether a kernel makes products of so many rows in one thread."""
    largest = self.weights.layers[0].mlp_out
    # Where nothing is native the number of rows may be a symbol.
    if self.native and isinstance(largest, Tiles):
      return kernels.one_thread(len(states), largest.numbers)
    return False

  def run(
    self, layer: int, hidden: jax.Array, cache: Cache
  ) -> tuple[jax.Array, KeyValue]:
    """One decoder layer (Eq. 3): d^{i-1} [batch, emb_dim] -> d^i and its key
    and value.
    """
    row = self.project(layer, hidden)
    return self.run_projected(
      layer, hidden, row, self.attention(layer, hidden, cache)
    ), row

  def run_projected(
    self, layer: int, hidden: jax.Array, row: KeyValue, attention: Any
  ) -> jax.Array:
    """d^i of d^{i-1} [batch, emb_dim], given what the layer projects of it and
    attends to: an `Attention`, or what has its `to_past` and `to_prompt`.
    """
    weights = self.weights.layers[layer - 1]
    normed = rms_norm(hidden, weights.self_norm)
    (query,) = self._heads(self._times(normed, weights.query), 1)
    hidden = hidden + self._times(
      attention.to_past(query, row), weights.self_out
    )
    normed = rms_norm(hidden, weights.cross_norm)
    (query,) = self._heads(self._times(normed, weights.cross_query), 1)
    hidden = hidden + self._times(attention.to_prompt(query), weights.cross_out)
    normed = rms_norm(hidden, weights.mlp_norm)
    pairs = zip(weights.mlp_in, self.config.mlp_activations, strict=True)
    parts = [
      activation_fn(name)(self._times(normed, matrix)) for matrix, name in pairs
    ]
    return hidden + self._times(
      functools.reduce(jnp.multiply, parts), weights.mlp_out
    )

  def project(self, layer: int, hidden: jax.Array) -> KeyValue:
    """Key and value that the layer makes of input state `hidden`, nothing
    else.
    """
    weights = self.weights.layers[layer - 1]
    normed = rms_norm(hidden, weights.self_norm)
    each = 2 // len(weights.key_value)
    parts = [
      self._heads(self._times(normed, matrix), each)
      for matrix in weights.key_value
    ]
    key, value = (part for split in parts for part in split)
    return KeyValue(key, value)

  def read(self, layer: int, hidden: jax.Array) -> jax.Array:
    """What heads and confidences read of d^i, float32 [batch, emb_dim]: x =
    decoder_norm(d^i), and x + x A_i + b_i where the layer has a translator.
    """
    normed = rms_norm(hidden, self.weights.decoder_norm).astype(jnp.float32)
    if layer not in self.weights.translators:
      return normed
    kernel, bias = self.weights.translators[layer]
    return normed + self._times(normed, kernel) + bias[None]

  def code(self, layer: int, hidden: jax.Array) -> jax.Array:
    """What learned propagation keeps of d^j besides it, [batch, maps * rank]:
    the layer's code where it has a map, zeros elsewhere.
    """
    maps = self.weights.propagation
    assert maps is not None  # `DecoderWeights.for_exits`
    if layer not in maps.layers:
      return jnp.zeros((hidden.shape[0], maps.width), hidden.dtype)
    i = maps.layers.index(layer)
    normed = rms_norm(hidden, self.weights.decoder_norm)
    code = (
      self._times(normed, maps.down[i])
      + maps.bias[i].astype(hidden.dtype)[None]
    )
    before = i * maps.rank
    return jnp.pad(code, ((0, 0), (before, maps.width - before - maps.rank)))

  def predict(self, layer: int, state: jax.Array) -> jax.Array:
    """The skipped layer's input, [rows, emb_dim], by [d^j; code] of tokens that
    left before.
    """
    maps = self.weights.propagation
    width = self.config.emb_dim
    assert maps is not None
    hidden = state[:, :width]
    up = maps.up[layer - 1]
    codes = state[:, width : width + maps.codes(layer)]
    return hidden if up is None else hidden + self._times(codes, up)

  def logits(self, read: jax.Array) -> jax.Array:
    """float32 logits [batch, num_pieces] of the full head."""
    head = self.weights.head
    if isinstance(head, QuantizedHead):
      return head.logits(read) if self.native else head.whole(read)
    return self._times(read, head)

  def peaks(self, logits: jax.Array) -> layers_lib.Peaks:
    """`Peaks` of logits [batch, pieces]."""
    found = kernels.peaks(logits) if self.native else None
    return (
      layers_lib.peaks(logits) if found is None else layers_lib.Peaks(*found)
    )

  def shortlist_logits(self, read: jax.Array) -> jax.Array:
    """float32 logits [batch, shortlist] of the shortlist only."""
    if self.weights.shortlist is None:
      raise ValueError(
        "Expected a shortlist of likely tokens for the measure 'shortlist' "
        "or 'probe', got a"
        " model without; give `shortlist` (token ids), or use the measure "
        "'softmax'."
      )
    return self._times(read, self.weights.shortlist)

  def exit_logit(self, read: jax.Array) -> jax.Array:
    """Pre-sigmoid exit confidence [batch]."""
    if self.weights.exit_kernel is None or self.weights.exit_bias is None:
      raise ValueError(
        "Expected a model with an exit classifier for the measure "
        "'classifier', got none in"
        " its parameters; train it"
        " (`calm train --gin_file=configs/train/packed_exit_classifier.gin` "
        "is one), or use the"
        " measure 'softmax' or 'state'."
      )
    return read @ self.weights.exit_kernel + self.weights.exit_bias

  def probe_logit(
    self, layer: int, read: jax.Array, hidden: jax.Array, previous: jax.Array
  ) -> jax.Array:
    """Pre-sigmoid confidence [batch] of the layer's own probe; of the last
    layer `CERTAIN`.
    """
    probes = self.weights.probes
    if probes is None:
      raise ValueError(
        "Expected a model with exit probes for the measure 'probe', got none "
        "in its parameters;"
        " train them (`calm train "
        "--gin_file=configs/train/exit_probes.gin`), or use the"
        " measure 'softmax' or 'state'."
      )
    if layer == probes.num_layers:
      return jnp.full(hidden.shape[:-1], CERTAIN)
    if layer == 1:
      previous = jnp.zeros_like(previous)
    known = evidence(hidden, previous, self.peaks(self.shortlist_logits(read)))
    return probes.logit(layer, read, known)

  def _times(self, x: jax.Array, matrix: Matrix) -> jax.Array:
    """x @ matrix in the dtype of `x`, whatever the matrix is stored in."""
    if isinstance(matrix, Tiles):
      return matrix.product(x, self.native)
    return platforms.product(x, matrix.astype(x.dtype))

  def _heads(self, projected: jax.Array, count: int) -> list[jax.Array]:
    shape = (
      projected.shape[0],
      count,
      self.config.num_heads,
      self.config.head_dim,
    )
    split = projected.reshape(shape)
    return [split[:, i] for i in range(count)]


def rms_norm(
  x: Float[Array, "batch emb"], scale: Float[Array, " emb"]
) -> jax.Array:
  """`layers.LayerNorm` without its module."""
  wide = x.astype(jnp.float32)
  wide = wide * lax.rsqrt(
    jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + 1e-6
  )
  return wide.astype(x.dtype) * scale[None, :]
