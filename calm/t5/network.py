"""T5 encoder-decoder whose every decoder layer is an exit (Flax linen), for
training and T5X: tree and call signatures are those of T5X's own T5 1.1
network, `parameters.EXIT_PARTS` the only additions. `decoder` decodes from the
same parameters.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen import partitioning
from jax import lax
from jaxtyping import Array, ArrayLike, Float, Int, Num

from calm.exits.confidence import NUM_FEATURES
from calm.t5 import kernels, layers, platforms
from calm.t5.eight_bits import EightBits
from calm.t5.limits import T5Config

__all__ = ["Params", "T5Config", "Transformer", "encode"]

# A parameter tree: nested mappings of names to arrays, as flax has it.
Params = Any


class Transformer(nn.Module):
  """Encoder-decoder with T5X's signatures, and every decoder layer's states
  beside them, of a `config`; `name` and `parent` are flax's own.
  """

  config: T5Config

  def setup(self):
    cfg = self.config
    self.token_embedder = layers.Embed(cfg)
    self.encoder = Encoder(cfg, shared_embedding=self.token_embedder)
    self.decoder = Decoder(cfg, shared_embedding=self.token_embedder)

  def encode(
    self,
    encoder_input_tokens,
    encoder_segment_ids=None,
    enable_dropout: bool = True,
  ) -> jax.Array:
    """Encoder states [batch, input_length, emb_dim]; token 0 is padding."""
    # T5X may feed float tokens where only shapes count, as to the decoder.
    tokens = jnp.asarray(encoder_input_tokens, jnp.int32)
    mask = _mask(tokens > 0, tokens > 0)
    if encoder_segment_ids is not None:
      mask &= _mask(encoder_segment_ids, encoder_segment_ids, jnp.equal)
    return self.encoder(tokens, mask, deterministic=not enable_dropout)

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
    """Teacher-forced full-depth float32 logits [batch, length, vocab]."""
    del encoder_positions, decoder_positions  # masks keep packed examples apart
    if decode:
      raise ValueError(
        "Expected `decode=False`, got a call for T5X's own cache, which this "
        "network does not"
        " keep; decode by `calm.t5x.models.EncoderDecoderModel`, or "
        "`calm.load`."
      )
    tokens = encoder_input_tokens, decoder_input_tokens, decoder_target_tokens
    segments = encoder_segment_ids, decoder_segment_ids
    hidden = self.hidden_states(
      *tokens, *segments, enable_dropout=enable_dropout
    )
    return self.decoder(hidden[-1], deterministic=not enable_dropout)

  def states(
    self, *tokens, enable_dropout: bool = False, **segments
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """d^i, decoder_norm(d^i), and what heads and losses read of d^i, which the
    translator has changed, of every layer, teacher-forced, [layers, batch,
    length, emb] each; arguments as of `hidden_states`.
    """
    hidden = self.hidden_states(
      *tokens, enable_dropout=enable_dropout, **segments
    )
    # draws dropout before `normed` does
    read = self.decoder.read(hidden, not enable_dropout)
    return hidden, self.decoder.normed(hidden, not enable_dropout), read

  def hidden_states(
    self,
    encoder_input_tokens,
    decoder_input_tokens,
    decoder_target_tokens,
    encoder_segment_ids=None,
    decoder_segment_ids=None,
    *,
    enable_dropout: bool = False,
  ) -> Float[Array, "layers batch length emb"]:
    """Raw d^i of every layer, teacher-forced."""
    encoded = self.encode(
      encoder_input_tokens, encoder_segment_ids, enable_dropout
    )
    masks = decoder_masks(
      encoder_input_tokens,
      decoder_target_tokens,
      encoder_segment_ids,
      decoder_segment_ids,
    )
    return self.decoder.hidden_states(
      encoded, decoder_input_tokens, *masks, not enable_dropout
    )


class Packed(NamedTuple):
  """The tokens of a batch's prompts one behind the other, padded at their end
  alone; int32.
  """

  tokens: Any  # [batch * length]
  begins: Any  # where each prompt begins, then how many tokens, [prompts + 1]
  counts: Any  # tokens of each prompt, [prompts]


def pack(tokens: np.ndarray) -> Packed:
  """The prompts of a batch [batch, length], which have 0 behind their ends."""
  counts = np.count_nonzero(tokens, axis=1).astype(np.int32)
  flat = np.zeros(tokens.size, np.int32)
  flat[: counts.sum()] = tokens[tokens > 0]
  begins = np.concatenate([[0], np.cumsum(counts)[:-1], [len(flat)]])
  return Packed(flat, begins.astype(np.int32), counts)


def encode(
  params: Params,
  config: T5Config,
  encoder_input_tokens: Int[Array, "batch length"],
  packed: Packed | None = None,
) -> Float[Array, "*batch_and_length emb"]:
  """Encoder states of prompts, which have 0 behind their ends, for decoding:
  without dropout, embedded by a gather; kernels of `params` may be in 8 bits.
  Those that are `packed`, too, are encoded so by a CPU's `kernels`, [tokens,
  emb].
  """
  network = Transformer(dataclasses.replace(config, one_hot_embedding=False))
  tokens = encoder_input_tokens if packed is None else packed.tokens[None]
  length = encoder_input_tokens.shape[1]
  with nn.intercept_methods(functools.partial(_once_a_prompt, packed, length)):
    encoded = network.apply(
      {"params": params}, tokens, enable_dropout=False, method="encode"
    )
  assert isinstance(encoded, jax.Array)
  return encoded if packed is None else encoded[0]


def apart(
  encoded: Float[Array, "tokens emb"], packed: Packed, length: int
) -> Float[Array, "batch length emb"]:
  """The states of packed prompts, each at the begin of a row of its own."""
  room = jnp.pad(encoded, ((0, length), (0, 0)))
  rows = [
    lax.dynamic_slice_in_dim(room, begin, length)
    for begin in packed.begins[:-1]
  ]
  return jnp.stack(rows)


def _once_a_prompt(
  packed: Packed | None, length: int, call, arguments, named, context
):
  """A call of a module: attention as a CPU likes it, linear maps in 8 bits if
  stored so.
  """
  module = context.module
  called = context.method_name
  count = None if packed is None else jnp.sum(packed.counts)  # real tokens
  if packed is not None and isinstance(module, layers.RelativePositionBiases):
    sizes = module.config.relpos_buckets, module.config.relpos_max_distance
    buckets = layers.relative_position_buckets(
      np.arange(1 - length, length), True, *sizes
    )
    return module.variables["params"]["rel_embedding"][:, buckets]
  mixes = isinstance(module, layers.Attention) and called == "mix"
  if packed is not None and mixes:
    query, key, value = (states[0] for states in arguments[:3])
    return kernels.attend_within(*packed[1:], query, key, value, arguments[4])[
      None
    ]
  if mixes and platforms.is_cpu() and module.config.dtype == "float32":
    return _mix(*arguments[:5])
  if isinstance(module, layers.Dense) and called == "__call__":
    kernel = module.variables["params"]["kernel"]
    if isinstance(kernel, EightBits):
      return kernel.product(jnp.asarray(arguments[0], module.dtype), count)
  if isinstance(module, layers.Mlp) and called == "__call__":
    parts = module.variables["params"]
    activations = module.config.mlp_activations
    matrices = [
      parts[name]["kernel"] for name in (*sorted({*parts} - {"wo"}), "wo")
    ]
    if getattr(matrices[-1], "tiled", False) and kernels.multiplies_codes(
      activations
    ):
      x = jnp.asarray(arguments[0], jnp.float32)
      made = kernels.coded_product(
        x.reshape(-1, x.shape[-1]), matrices, activations, count
      )
      return made.reshape(x.shape).astype(module.config.dtype)
  return call(*arguments, **named)


def _mix(
  query: Float[Array, "batch queries heads head_dim"],
  key: Float[Array, "batch keys heads head_dim"],
  value: Float[Array, "batch keys heads head_dim"],
  mask: Array,
  bias: Float[Array, "batch_or_one heads queries keys"],
) -> Float[Array, "batch queries heads head_dim"]:
  """As `layers.Attention.mix`, with heads laid out first and weights divided
  last: else XLA:CPU takes three times as long (T5 1.1 small, 32 prompts of 128
  tokens).
  """
  query, key, value = (jnp.moveaxis(x, 2, 1) for x in (query, key, value))
  logits = jnp.einsum("bhqd,bhkd->bhqk", query, key)
  logits = logits + jnp.where(mask.astype(bool), 0.0, layers.MASK_BIAS) + bias
  shares = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
  mixed = jnp.einsum("bhqk,bhkd->bhqd", shares, value)
  return jnp.moveaxis(mixed / jnp.sum(shares, axis=-1, keepdims=True), 1, 2)


# Boolean [batch, 1, query_length, key_length] of what queries and keys say.
_mask = functools.partial(nn.make_attention_mask, dtype=bool)


def decoder_masks(
  encoder_input_tokens: Num[ArrayLike, "batch input_length"],
  decoder_target_tokens: Num[ArrayLike, "batch length"],
  encoder_segment_ids=None,
  decoder_segment_ids=None,
) -> tuple[jax.Array, jax.Array]:
  """Self-attention mask and cross-attention mask."""
  source = jnp.asarray(encoder_input_tokens) > 0
  target = jnp.asarray(decoder_target_tokens) > 0
  mask = nn.make_causal_mask(target, dtype=bool) & _mask(target, target)
  cross_mask = _mask(target, source)
  if decoder_segment_ids is not None:
    mask &= _mask(decoder_segment_ids, decoder_segment_ids, jnp.equal)
  if encoder_segment_ids is not None:
    cross_mask &= _mask(decoder_segment_ids, encoder_segment_ids, jnp.equal)
  return mask, cross_mask


class Layer(nn.Module):
  """Attention and feed-forward, each with a norm before and a residual around;
  a decoder's (Eq. 3, d^{i-1} -> d^i) attends to the prompt's states `encoded`
  as well.
  """

  config: T5Config

  @nn.compact
  def __call__(
    self, x, mask, bias, encoded=None, cross_mask=None, *, deterministic
  ):
    cfg = self.config
    dropout = nn.Dropout(cfg.dropout_rate, broadcast_dims=(-2,))

    def drop(y):
      return dropout(y, deterministic=deterministic)

    def norm(name, x):
      return layers.LayerNorm(cfg.dtype, name=f"pre_{name}_layer_norm")(x)

    if cfg.relpos_per_layer:
      relpos = layers.RelativePositionBiases(cfg, name="relpos_bias")
      bias = relpos(bias, bias, encoded is None)  # only the length was given
    name = "attention" if encoded is None else "self_attention"
    y = norm(name, x)
    attend = layers.Attention(cfg, name=name)
    x = x + drop(attend(y, y, mask, bias, deterministic=deterministic))
    if encoded is not None:
      y = norm("cross_attention", x)
      attend = layers.Attention(cfg, name="encoder_decoder_attention")
      x = x + drop(attend(y, encoded, cross_mask, deterministic=deterministic))
    y = norm("mlp", x)
    return x + drop(layers.Mlp(cfg, name="mlp")(y, deterministic=deterministic))


class Encoder(nn.Module):
  """The encoder stack: tokens -> encoder states."""

  config: T5Config
  shared_embedding: layers.Embed

  @nn.compact
  def __call__(self, tokens, mask, *, deterministic: bool):
    cfg = self.config
    bias = length = tokens.shape[-1]
    if not cfg.relpos_per_layer:
      relpos = layers.RelativePositionBiases(cfg, name="relpos_bias")
      bias = relpos(length, length, True)
    x = self.shared_embedding(tokens)
    x = nn.Dropout(cfg.dropout_rate, broadcast_dims=(-2,))(
      x, deterministic=deterministic
    )
    x = x.astype(cfg.dtype)
    for i in range(cfg.num_encoder_layers):
      x = Layer(cfg, name=f"layers_{i}")(
        x, mask, bias, deterministic=deterministic
      )
    x = layers.LayerNorm(cfg.dtype, name="encoder_norm")(x)
    return nn.Dropout(cfg.dropout_rate)(x, deterministic=deterministic)


class Decoder(nn.Module):
  """The decoder stack, with its final norm, output heads and exit
  classifier.
  """

  config: T5Config
  shared_embedding: layers.Embed

  def setup(self):
    cfg = self.config
    if not cfg.relpos_per_layer:
      self.relpos_bias = layers.RelativePositionBiases(cfg)
    self.layers = [Layer(cfg) for _ in range(cfg.num_decoder_layers)]
    self.decoder_norm = layers.LayerNorm(cfg.dtype)
    self.dropout = nn.Dropout(cfg.dropout_rate, broadcast_dims=(-2,))
    if not cfg.logits_via_embedding:
      # float32 whatever the activation dtype: confidences are compared with a
      # threshold.
      self.logits_dense = layers.Dense(
        cfg.vocab_size, ("embed", "vocab"), jnp.float32
      )
    for name, tree in exit_parts(cfg).items():
      setattr(self, name, ExitParts(tree))

  def __call__(self, hidden: jax.Array, *, deterministic: bool) -> jax.Array:
    """float32 logits [batch, length, vocab] of the last layer's states."""
    if self.is_initializing():  # the full-depth call never uses them
      for name in exit_parts(self.config):
        getattr(self, name)()
    return self.logits(hidden, self.config.num_decoder_layers, deterministic)

  def hidden_states(
    self, encoded, tokens, mask, cross_mask, deterministic
  ) -> Float[Array, "layers batch length emb"]:
    """Raw residuals d^1 ... d^L after each layer."""
    length = tokens.shape[-1]
    per_layer = self.config.relpos_per_layer
    bias = length if per_layer else self.relpos_bias(length, length, False)
    tokens = jnp.asarray(tokens, jnp.int32)
    x = self.dropout(self.shared_embedding(tokens), deterministic=deterministic)
    x = x.astype(self.config.dtype)
    hidden = []
    for layer in self.layers:
      x = layer(x, mask, bias, encoded, cross_mask, deterministic=deterministic)
      hidden.append(x)
    return jnp.stack(hidden)

  def normed(self, hidden: jax.Array, deterministic: bool = True) -> jax.Array:
    """decoder_norm(d^i)."""
    return self.dropout(self.decoder_norm(hidden), deterministic=deterministic)

  def translated(self, normed: jax.Array, layer: int) -> jax.Array:
    """x + x A_i + b_i of x = decoder_norm(d^i), float32; x of a layer without
    translator.
    """
    if layer not in self.config.exit_translators:
      return normed
    part = self.exit_translators()[f"layers_{layer - 1}"]
    x = normed.astype(jnp.float32)
    return x + x @ part["kernel"] + jnp.broadcast_to(part["bias"], x.shape)

  def read(self, hidden: jax.Array, deterministic: bool = True) -> jax.Array:
    """What heads and confidences read of every layer's states, [layers, ...]:
    `translated`.
    """
    normed = self.normed(hidden, deterministic)
    if not self.config.exit_translators:
      return normed
    wide = normed.astype(jnp.float32)
    return jnp.stack(
      [self.translated(x, layer) for layer, x in enumerate(wide, start=1)]
    )

  def logits(
    self, hidden: jax.Array, layer: int, deterministic: bool = True
  ) -> jax.Array:
    """float32 logits [batch, length, vocab] of 1-based `layer`."""
    x = self.translated(self.normed(hidden, deterministic), layer)
    if self.config.logits_via_embedding:
      return self.shared_embedding.attend(x) / jnp.sqrt(x.shape[-1])
    return self.logits_dense(x)


class ExitParts(nn.Module):
  """A tree of parameters by name: (shape, axes), of one that does not start at
  zero with its initializer besides, or a tree again.
  """

  tree: Mapping[str, Any]

  @nn.compact
  def __call__(self) -> dict[str, Any]:
    zeros = nn.initializers.zeros

    def leaf(name, shape, axes, initializer=zeros):
      return partitioning.param_with_axes(
        name, initializer, shape, jnp.float32, axes=axes
      )

    return {
      name: ExitParts(part, name=name)()
      if isinstance(part, Mapping)
      else leaf(name, *part)
      for name, part in self.tree.items()
    }


def exit_parts(cfg: T5Config) -> dict[str, Mapping[str, Any]]:
  """{name: its tree, for `ExitParts`} of the exit parts that a configuration
  has.
  """
  emb = cfg.emb_dim
  rank = cfg.exit_propagation_rank
  below = cfg.num_decoder_layers - 1
  # T5X's own axis names, of axes that it replicates: a new one would be unknown
  # to its Adafactor, and along its "layers" that would not average.
  axes = ("embed", "mlp_activations")

  def linear(outputs: int, *initializer: Any) -> dict[str, Any]:
    return {
      "kernel": ((emb, outputs), axes, *initializer),
      "bias": ((outputs,), axes[1:]),
    }

  # One column a layer below the last, see `confidence.Probes`.
  features = ((NUM_FEATURES, below), ("relpos_buckets", "mlp_activations"))
  probes = {"kernel": linear(below)["kernel"], "features": features}
  # Of every exit layer one `down` for its code, and one `up` a layer that may
  # be skipped. Their product starts at zero with `up`; were both zero, no
  # gradient would move either.
  down = linear(rank, nn.initializers.lecun_normal())

  def skipped(layer):
    return (cfg.num_decoder_layers - layer, rank, emb)

  def up(layer):
    return {"kernel": (skipped(layer), ("stack", "mlp_activations", "embed"))}

  parts = {
    "exit_classifier": linear(1),
    "exit_probes": {**probes, "bias": linear(below)["bias"]},
    "exit_translators": {
      f"layers_{i - 1}": linear(emb) for i in cfg.exit_translators
    },
    "exit_propagation": {
      f"layers_{i - 1}": {"down": down, "up": up(i)}
      for i in cfg.exit_propagation
    },
  }
  return {name: tree for name, tree in parts.items() if getattr(cfg, name)}
