"""T5 encoder-decoder whose every decoder layer is an exit (Flax linen).

The parameter tree and the call signatures are those of T5X's own T5 1.1 network; the exit
parts (`decoder/exit_classifier`, and `decoder/logits_dense_{i}` with per-layer heads) are the
only additions. This module serves training and T5X; `decoder` decodes from the same.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import partitioning
from jaxtyping import Array, ArrayLike, Float, Num

from calm.t5 import layers, limits


@dataclasses.dataclass(frozen=True)
class T5Config:
  """Sizes and choices of one model; static, so that changing any recompiles.

  Attributes:
    vocab_size: rows of the embedding (may exceed the pieces of the vocabulary).
    dtype: activation dtype; parameters, logits and confidences are float32.
    emb_dim: width of the residual stream.
    num_heads, head_dim: attention heads and the size of each.
    num_encoder_layers, num_decoder_layers: layers of either stack.
    mlp_dim: hidden units of a feed-forward block.
    dropout_rate: in [0, 1), in training only.
    float32_attention_logits: attention scores in float32 whatever `dtype`.
    relpos_buckets, relpos_max_distance: relative-position buckets, and the distance from which
      on all positions share the last one.
    mlp_activations: ('gelu', 'linear') is T5 1.1's gated GELU, ('relu',) is T5 1.0.
    logits_via_embedding: tie the output head to the embedding (T5 1.0).
    one_hot_embedding: embed by a one-hot product (partitioned training) or by a gather.
    per_layer_heads: one output head a decoder layer instead of one for all.
    exit_classifier: whether the tree holds the early-exit classifier (emb_dim + 1 numbers).
    relpos_per_layer: relative-position biases of every layer's own (umT5, Pile-T5, T5X's
      scalable T5) instead of one embedding for all layers of a side.
  """

  vocab_size: int
  dtype: Any = "float32"
  emb_dim: int = 512
  num_heads: int = 8
  num_encoder_layers: int = 6
  num_decoder_layers: int = 6
  head_dim: int = 64
  mlp_dim: int = 2048
  mlp_activations: Sequence[str] = ("relu",)
  dropout_rate: float = 0.1
  logits_via_embedding: bool = False
  float32_attention_logits: bool = False
  one_hot_embedding: bool = True
  per_layer_heads: bool = False
  exit_classifier: bool = True
  relpos_buckets: int = 32
  relpos_max_distance: int = 128
  relpos_per_layer: bool = False

  def __post_init__(self):
    # Gin gives lists and dtypes by name or object; a hashable static wants one form.
    for name, value in limits.check(dataclasses.asdict(self)).items():
      object.__setattr__(self, name, value)
    if self.per_layer_heads and self.logits_via_embedding:
      raise ValueError(
        "Expected `per_layer_heads` without `logits_via_embedding`: a tied head is shared by"
        " all layers. Got both; turn one off."
      )


class EncoderLayer(nn.Module):
  """Self-attention and feed-forward, each with a norm before and a residual around."""

  config: T5Config

  @nn.compact
  def __call__(self, inputs, mask, bias, *, deterministic: bool):
    cfg = self.config
    drop = nn.Dropout(cfg.dropout_rate, broadcast_dims=(-2,))
    if cfg.relpos_per_layer:
      bias = relpos(cfg)(inputs.shape[-2], inputs.shape[-2], True)
    x = layers.LayerNorm(cfg.dtype, name="pre_attention_layer_norm")(inputs)
    x = attention(cfg, "attention")(x, x, mask, bias, deterministic=deterministic)
    x = inputs + drop(x, deterministic=deterministic)
    y = layers.LayerNorm(cfg.dtype, name="pre_mlp_layer_norm")(x)
    y = mlp(cfg)(y, deterministic=deterministic)
    return x + drop(y, deterministic=deterministic)


class DecoderLayer(nn.Module):
  """Self-attention, cross-attention and feed-forward (Eq. 3): d^{i-1} -> d^i."""

  config: T5Config

  @nn.compact
  def __call__(
    self, inputs, encoded, mask, cross_mask, bias, *, deterministic: bool, decode: bool = False
  ):
    cfg = self.config
    drop = nn.Dropout(cfg.dropout_rate, broadcast_dims=(-2,))
    if cfg.relpos_per_layer:
      bias = relpos(cfg)(bias, bias, False)  # only the length was given
    x = layers.LayerNorm(cfg.dtype, name="pre_self_attention_layer_norm")(inputs)
    x = attention(cfg, "self_attention")(
      x, x, mask, bias, deterministic=deterministic, decode=decode
    )
    x = inputs + drop(x, deterministic=deterministic)
    y = layers.LayerNorm(cfg.dtype, name="pre_cross_attention_layer_norm")(x)
    y = attention(cfg, "encoder_decoder_attention")(
      y, encoded, cross_mask, deterministic=deterministic
    )
    y = x + drop(y, deterministic=deterministic)
    z = layers.LayerNorm(cfg.dtype, name="pre_mlp_layer_norm")(y)
    z = mlp(cfg)(z, deterministic=deterministic)
    return y + drop(z, deterministic=deterministic)


class Encoder(nn.Module):
  """The encoder stack: tokens -> encoder states."""

  config: T5Config
  shared_embedding: layers.Embed

  @nn.compact
  def __call__(self, tokens, mask, *, deterministic: bool):
    cfg = self.config
    length = tokens.shape[-1]
    bias = None if cfg.relpos_per_layer else relpos(cfg)(length, length, True)
    x = self.shared_embedding(tokens)
    x = nn.Dropout(cfg.dropout_rate, broadcast_dims=(-2,))(x, deterministic=deterministic)
    x = x.astype(cfg.dtype)
    for i in range(cfg.num_encoder_layers):
      x = EncoderLayer(cfg, name=f"layers_{i}")(x, mask, bias, deterministic=deterministic)
    x = layers.LayerNorm(cfg.dtype, name="encoder_norm")(x)
    return nn.Dropout(cfg.dropout_rate)(x, deterministic=deterministic)


class Decoder(nn.Module):
  """The decoder stack, with its final norm, output heads and exit classifier."""

  config: T5Config
  shared_embedding: layers.Embed

  def setup(self):
    cfg = self.config
    if not cfg.relpos_per_layer:
      self.relpos_bias = relpos(cfg, name=None)
    self.layers = [DecoderLayer(cfg) for _ in range(cfg.num_decoder_layers)]
    self.decoder_norm = layers.LayerNorm(cfg.dtype)
    self.dropout = nn.Dropout(cfg.dropout_rate, broadcast_dims=(-2,))
    if not cfg.logits_via_embedding:
      # float32 whatever the activation dtype: confidences are compared with a threshold.
      self.logits_dense = output_head(cfg)
    if cfg.per_layer_heads:
      # Names matter to checkpoints: logits_dense_0 ... logits_dense_{L-2}.
      self.layer_heads = [
        output_head(cfg, name=f"logits_dense_{i}") for i in range(cfg.num_decoder_layers - 1)
      ]
    if cfg.exit_classifier:
      self.exit_classifier = ExitHead()

  def __call__(
    self, encoded, tokens, mask, cross_mask, *, deterministic, decode=False, length=None
  ):
    hidden = self.hidden_states(
      encoded, tokens, mask, cross_mask, deterministic, decode, length
    )
    if self.is_initializing():
      self._touch_exit_parts(hidden[-1])
    return self.logits(hidden[-1], self.config.num_decoder_layers, deterministic=deterministic)

  def hidden_states(
    self, encoded, tokens, mask, cross_mask, deterministic, decode=False, length=None
  ) -> list[jax.Array]:
    """Raw residuals [batch, length, emb_dim] d^1 ... d^L after each layer."""
    length = length if decode and length else tokens.shape[-1]
    per_layer = self.config.relpos_per_layer
    bias = length if per_layer else self.relpos_bias(length, length, False)
    tokens = jnp.asarray(tokens, jnp.int32)
    x = self.dropout(self.shared_embedding(tokens), deterministic=deterministic)
    x = x.astype(self.config.dtype)
    hidden = []
    for layer in self.layers:
      x = layer(x, encoded, mask, cross_mask, bias, deterministic=deterministic, decode=decode)
      hidden.append(x)
    return hidden

  def normed(self, hidden: jax.Array, deterministic: bool = True) -> jax.Array:
    """decoder_norm(d^i): what heads and the exit classifier read."""
    return self.dropout(self.decoder_norm(hidden), deterministic=deterministic)

  def logits(self, hidden: jax.Array, layer: int, deterministic: bool = True) -> jax.Array:
    """float32 logits [batch, length, vocab] of the head of 1-based `layer`."""
    x = self.normed(hidden, deterministic)
    if self.config.logits_via_embedding:
      return self.shared_embedding.attend(x) / jnp.sqrt(x.shape[-1])
    if self.config.per_layer_heads and layer < self.config.num_decoder_layers:
      return self.layer_heads[layer - 1](x)
    return self.logits_dense(x)

  def exit_logits(self, hidden: jax.Array) -> jax.Array:
    """Pre-sigmoid confidence [batch, length] of the exit classifier for d^i."""
    return self.exit_classifier(self.normed(hidden))

  def _touch_exit_parts(self, hidden: jax.Array) -> None:
    """Creates the parameters that the full-depth call never uses."""
    if self.config.exit_classifier:
      self.exit_logits(hidden)
    if self.config.per_layer_heads:
      for head in self.layer_heads:
        head(hidden)


class ExitHead(nn.Module):
  """One linear map emb_dim -> 1, shared by all layers (paper section 3.5)."""

  @nn.compact
  def __call__(self, x: Float[Array, "*batch emb"]) -> Float[Array, "*batch"]:
    # T5X's own axis names: a new one would be unknown to its Adafactor.
    kernel = partitioning.param_with_axes(
      "kernel",
      nn.initializers.zeros,
      (x.shape[-1], 1),
      jnp.float32,
      axes=("embed", "mlp_activations"),
    )
    bias = partitioning.param_with_axes(
      "bias", nn.initializers.zeros, (1,), jnp.float32, axes=("mlp_activations",)
    )
    return (x.astype(jnp.float32) @ kernel)[..., 0] + bias[0]


class Transformer(nn.Module):
  """Encoder-decoder with T5X's signatures, and every decoder layer's states beside them.

  Attributes:
    config: sizes and choices.
    name, parent: flax's own.
  """

  config: T5Config

  def setup(self):
    cfg = self.config
    self.token_embedder = layers.Embed(
      cfg.vocab_size, cfg.emb_dim, cfg.dtype, cfg.one_hot_embedding
    )
    self.encoder = Encoder(cfg, shared_embedding=self.token_embedder)
    self.decoder = Decoder(cfg, shared_embedding=self.token_embedder)

  def encode(
    self, encoder_input_tokens, encoder_segment_ids=None, enable_dropout: bool = True
  ) -> jax.Array:
    """Encoder states [batch, input_length, emb_dim]; token 0 is padding."""
    if encoder_input_tokens.ndim != 2:
      raise ValueError(
        "Expected `encoder_input_tokens` to be of shape (batch, length)."
        f" Got {encoder_input_tokens.shape}."
      )
    # T5X may feed float tokens when it shapes its caches, as to the decoder.
    tokens = jnp.asarray(encoder_input_tokens, jnp.int32)
    mask = attention_mask(tokens > 0, tokens > 0)
    if encoder_segment_ids is not None:
      mask &= segment_mask(encoder_segment_ids, encoder_segment_ids)
    return self.encoder(tokens, mask, deterministic=not enable_dropout)

  def decode(
    self,
    encoded,
    encoder_input_tokens,
    decoder_input_tokens,
    decoder_target_tokens,
    encoder_segment_ids=None,
    decoder_segment_ids=None,
    decoder_positions=None,
    enable_dropout: bool = True,
    decode: bool = False,
    max_decode_length: int | None = None,
  ) -> jax.Array:
    """Full-depth float32 logits [batch, length, vocab]."""
    del decoder_positions  # relative positions: packed examples are kept apart by masks
    mask, cross_mask = decoder_masks(
      encoder_input_tokens,
      decoder_target_tokens,
      encoder_segment_ids,
      decoder_segment_ids,
      decode=decode,
    )
    return self.decoder(
      encoded,
      decoder_input_tokens,
      mask,
      cross_mask,
      deterministic=not enable_dropout,
      decode=decode,
      length=max_decode_length,
    )

  def __call__(
    self,
    encoder_input_tokens,
    decoder_input_tokens,
    decoder_target_tokens,
    encoder_segment_ids=None,
    decoder_segment_ids=None,
    encoder_positions=None,
    decoder_positions=None,
    *,
    enable_dropout: bool = True,
    decode: bool = False,
  ) -> jax.Array:
    """Teacher-forced full-depth logits [batch, length, vocab]."""
    del encoder_positions
    encoded = self.encode(encoder_input_tokens, encoder_segment_ids, enable_dropout)
    return self.decode(
      encoded,
      encoder_input_tokens,
      decoder_input_tokens,
      decoder_target_tokens,
      encoder_segment_ids,
      decoder_segment_ids,
      decoder_positions,
      enable_dropout=enable_dropout,
      decode=decode,
    )

  def normed_states(
    self,
    encoder_input_tokens,
    decoder_input_tokens,
    decoder_target_tokens,
    encoder_segment_ids=None,
    decoder_segment_ids=None,
    *,
    enable_dropout: bool = False,
  ) -> Float[Array, "layers batch length emb"]:
    """decoder_norm(d^i) of every layer, teacher-forced: what the layer losses read."""
    encoded = self.encode(encoder_input_tokens, encoder_segment_ids, enable_dropout)
    mask, cross_mask = decoder_masks(
      encoder_input_tokens, decoder_target_tokens, encoder_segment_ids, decoder_segment_ids
    )
    hidden = self.decoder.hidden_states(
      encoded, decoder_input_tokens, mask, cross_mask, not enable_dropout
    )
    return self.decoder.normed(jnp.stack(hidden), not enable_dropout)

  def hidden_states(
    self, encoder_input_tokens, decoder_input_tokens, decoder_target_tokens
  ) -> Float[Array, "layers batch length emb"]:
    """Raw d^i of every layer, teacher-forced, without dropout."""
    encoded = self.encode(encoder_input_tokens, enable_dropout=False)
    mask, cross_mask = decoder_masks(encoder_input_tokens, decoder_target_tokens)
    return jnp.stack(
      self.decoder.hidden_states(encoded, decoder_input_tokens, mask, cross_mask, True)
    )


def attention(cfg: T5Config, name: str) -> layers.Attention:
  return layers.Attention(
    cfg.num_heads,
    cfg.head_dim,
    cfg.dropout_rate,
    cfg.dtype,
    cfg.float32_attention_logits,
    name=name,
  )


def mlp(cfg: T5Config) -> layers.Mlp:
  return layers.Mlp(cfg.mlp_dim, cfg.mlp_activations, cfg.dropout_rate, cfg.dtype, name="mlp")


def relpos(cfg: T5Config, name: str | None = "relpos_bias") -> layers.RelativePositionBiases:
  return layers.RelativePositionBiases(
    cfg.num_heads, cfg.relpos_buckets, cfg.relpos_max_distance, cfg.dtype, name=name
  )


def output_head(cfg: T5Config, name: str | None = None) -> layers.Dense:
  return layers.Dense(cfg.vocab_size, ("embed", "vocab"), jnp.float32, name=name)


def attention_mask(query_valid, key_valid) -> jax.Array:
  """Boolean [batch, 1, query_length, key_length]: both ends are real tokens."""
  return (query_valid[:, None, :, None]) & (key_valid[:, None, None, :])


def segment_mask(query_segments, key_segments) -> jax.Array:
  """Boolean [batch, 1, query_length, key_length]: both ends in one packed example."""
  return jnp.equal(query_segments[:, None, :, None], key_segments[:, None, None, :])


def decoder_masks(
  encoder_input_tokens: Num[ArrayLike, "batch input_length"],
  decoder_target_tokens: Num[ArrayLike, "batch length"],
  encoder_segment_ids=None,
  decoder_segment_ids=None,
  *,
  decode: bool = False,
) -> tuple[jax.Array | None, jax.Array]:
  """Self-attention mask (None with a cache) and cross-attention mask."""
  source = jnp.asarray(encoder_input_tokens) > 0
  if decode:
    if encoder_segment_ids is not None:
      raise ValueError(
        "Expected no packing while decoding. Got `encoder_segment_ids`; unpack the batch."
      )
    return None, attention_mask(jnp.ones_like(decoder_target_tokens, bool), source)
  target = jnp.asarray(decoder_target_tokens) > 0
  length = target.shape[-1]
  causal = jnp.tril(jnp.ones((1, 1, length, length), bool))
  mask = causal & attention_mask(target, target)
  cross_mask = attention_mask(target, source)
  if decoder_segment_ids is not None:
    mask &= segment_mask(decoder_segment_ids, decoder_segment_ids)
  if encoder_segment_ids is not None:
    cross_mask &= segment_mask(decoder_segment_ids, encoder_segment_ids)
  return mask, cross_mask
