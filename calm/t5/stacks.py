"""The encoder and decoder of a T5 network, layer by layer (Flax linen).

Names of submodules are T5X's: they are the paths of its parameter tree.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import partitioning
from jaxtyping import Array, Float

from calm.exits.evidence import NUM_FEATURES
from calm.t5 import layers
from calm.t5.config import T5Config


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
    if cfg.exit_probes:
      self.exit_probes = ExitParts(_probes(cfg))
    if cfg.exit_translators:
      self.exit_translators = ExitParts(_translators(cfg))
    if cfg.exit_propagation:
      self.exit_propagation = ExitParts(_propagation(cfg))

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
    """decoder_norm(d^i)."""
    return self.dropout(self.decoder_norm(hidden), deterministic=deterministic)

  def translated(self, normed: jax.Array, layer: int) -> jax.Array:
    """x + x A_i + b_i of x = decoder_norm(d^i), float32; x of a layer without translator."""
    if layer not in self.config.exit_translators:
      return normed
    part, x = self.exit_translators()[f"layers_{layer - 1}"], normed.astype(jnp.float32)
    return x + x @ part["kernel"] + jnp.broadcast_to(part["bias"], x.shape)

  def read(self, hidden: jax.Array, deterministic: bool = True) -> jax.Array:
    """What heads and confidences read of every layer's states, [layers, ...]: `translated`."""
    normed = self.normed(hidden, deterministic)
    if not self.config.exit_translators:
      return normed
    wide = normed.astype(jnp.float32)
    return jnp.stack([self.translated(x, layer) for layer, x in enumerate(wide, start=1)])

  def logits(self, hidden: jax.Array, layer: int, deterministic: bool = True) -> jax.Array:
    """float32 logits [batch, length, vocab] of the head of 1-based `layer`."""
    x = self.translated(self.normed(hidden, deterministic), layer)
    if self.config.logits_via_embedding:
      return self.shared_embedding.attend(x) / jnp.sqrt(x.shape[-1])
    if self.config.per_layer_heads and layer < self.config.num_decoder_layers:
      return self.layer_heads[layer - 1](x)
    return self.logits_dense(x)

  def exit_logits(self, hidden: jax.Array, layer: int) -> jax.Array:
    """Pre-sigmoid confidence [batch, length] of the exit classifier for d^i."""
    return self.exit_classifier(self.translated(self.normed(hidden), layer))

  def _touch_exit_parts(self, hidden: jax.Array) -> None:
    """Creates the parameters that the full-depth call never uses."""
    if self.config.exit_classifier:
      self.exit_logits(hidden, self.config.num_decoder_layers)
    for name in ("exit_probes", "exit_translators", "exit_propagation"):
      if getattr(self.config, name):
        getattr(self, name)()
    if self.config.per_layer_heads:
      for head in self.layer_heads:
        head(hidden)


class ExitParts(nn.Module):
  """A tree of parameters by name: (shape, axes), of one that does not start at zero with its
  initializer besides, or a tree again."""

  tree: Mapping[str, Any]

  @nn.compact
  def __call__(self) -> dict[str, Any]:
    zeros = nn.initializers.zeros
    leaf = lambda name, shape, axes, initializer=zeros: partitioning.param_with_axes(
      name, initializer, shape, jnp.float32, axes=axes
    )
    return {
      name: ExitParts(part, name=name)() if isinstance(part, Mapping) else leaf(name, *part)
      for name, part in self.tree.items()
    }


# T5X's own axis names, of axes that it replicates, as of `ExitHead`. Along its "layers" its
# Adafactor would not average.
def _probes(cfg: T5Config) -> Mapping[str, Any]:
  """Parameters of `evidence.Probes`, one column a layer below the last."""
  count = cfg.num_decoder_layers - 1
  return {
    "kernel": ((cfg.emb_dim, count), ("embed", "mlp_activations")),
    "features": ((NUM_FEATURES, count), ("relpos_buckets", "mlp_activations")),
    "bias": ((count,), ("mlp_activations",)),
  }


def _translators(cfg: T5Config) -> Mapping[str, Any]:
  part = {
    "kernel": ((cfg.emb_dim, cfg.emb_dim), ("embed", "mlp_activations")),
    "bias": ((cfg.emb_dim,), ("mlp_activations",)),
  }
  return {f"layers_{layer - 1}": part for layer in cfg.exit_translators}


def _propagation(cfg: T5Config) -> Mapping[str, Any]:
  """Of every exit layer one `down` for its code, and one `up` a layer that may be skipped."""
  emb, rank = cfg.emb_dim, cfg.exit_propagation_rank
  down = {
    # Their product starts at zero with `up`; were both zero, no gradient would move either.
    "kernel": ((emb, rank), ("embed", "mlp_activations"), nn.initializers.lecun_normal()),
    "bias": ((rank,), ("mlp_activations",)),
  }
  skipped = lambda layer: (cfg.num_decoder_layers - layer, rank, emb)
  up_axes = ("stack", "mlp_activations", "embed")
  return {
    f"layers_{layer - 1}": {"down": down, "up": {"kernel": (skipped(layer), up_axes)}}
    for layer in cfg.exit_propagation
  }


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
