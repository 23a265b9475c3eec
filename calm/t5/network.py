"""T5 encoder-decoder whose every decoder layer is an exit (Flax linen).

The parameter tree and the call signatures are those of T5X's own T5 1.1 network; the exit
parts of the decoder (`parameters.EXIT_PARTS`, and with per-layer heads `logits_dense_{i}`) are
the only additions. As T5X's `network`, this module has the configuration and the `Transformer`,
for gin. It serves training and T5X; `decoder` decodes from the same parameters.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from calm.t5 import layers, masks, platforms, stacks
from calm.t5.config import Params, T5Config
from calm.t5.eight_bits import EightBits

__all__ = ["T5Config", "Transformer", "encode"]


def encode(
  params: Params, config: T5Config, encoder_input_tokens: Int[Array, "batch length"]
) -> Float[Array, "batch length emb"]:
  """Encoder states of prompts, for decoding: without dropout, and embedded by a gather.

  Args:
    params: the tree of `Transformer`; its embedding and encoder are read. Kernels may be in
      8 bits (`eight_bits.EightBits`).
    config: its sizes.
    encoder_input_tokens: prompts, 0 behind their ends.
  """
  network = Transformer(dataclasses.replace(config, one_hot_embedding=False))
  with nn.intercept_methods(_once_a_prompt):
    encoded = network.apply(
      {"params": params}, encoder_input_tokens, enable_dropout=False, method="encode"
    )
  assert isinstance(encoded, jax.Array)
  return encoded


def _once_a_prompt(call, arguments, named, context):
  """A call of a module: attention as a CPU likes it, linear maps in 8 bits if stored so."""
  module = context.module
  mixes = isinstance(module, layers.Attention) and context.method_name == "mix"
  if mixes and platforms.attends_by_row() and jnp.dtype(module.dtype) == jnp.float32:
    return _mix(*arguments[:5])
  if isinstance(module, layers.Dense) and context.method_name == "__call__":
    kernel = module.variables["params"]["kernel"]
    if isinstance(kernel, EightBits):
      return kernel.product(jnp.asarray(arguments[0], module.dtype))
  return call(*arguments, **named)


def _mix(
  query: Float[Array, "batch queries heads head_dim"],
  key: Float[Array, "batch keys heads head_dim"],
  value: Float[Array, "batch keys heads head_dim"],
  mask: Array,
  bias: Float[Array, "batch_or_one heads queries keys"],
) -> Float[Array, "batch queries heads head_dim"]:
  """As `layers.Attention.mix`, with heads laid out first and weights divided last.

  XLA:CPU lays arrays out for the products it is told of: otherwise it takes three times as long
  (T5 1.1 small, 32 prompts of 128 tokens).
  """
  query, key, value = (jnp.moveaxis(x, 2, 1) for x in (query, key, value))
  logits = jnp.einsum("bhqd,bhkd->bhqk", query, key)
  logits = logits + jnp.where(mask.astype(bool), 0.0, layers.MASK_BIAS) + bias
  shares = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
  mixed = jnp.einsum("bhqk,bhkd->bhqd", shares, value)
  return jnp.moveaxis(mixed / jnp.sum(shares, axis=-1, keepdims=True), 1, 2)


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
    self.encoder = stacks.Encoder(cfg, shared_embedding=self.token_embedder)
    self.decoder = stacks.Decoder(cfg, shared_embedding=self.token_embedder)

  def encode(
    self, encoder_input_tokens, encoder_segment_ids=None, enable_dropout: bool = True
  ) -> jax.Array:
    """Encoder states [batch, input_length, emb_dim]; token 0 is padding."""
    if encoder_input_tokens.ndim != 2:
      raise ValueError(
        "Expected `encoder_input_tokens` to be of shape (batch, length),"
        f" got {encoder_input_tokens.shape}."
      )
    # T5X may feed float tokens when it shapes its caches, as to the decoder.
    tokens = jnp.asarray(encoder_input_tokens, jnp.int32)
    mask = masks.attention_mask(tokens > 0, tokens > 0)
    if encoder_segment_ids is not None:
      mask &= masks.segment_mask(encoder_segment_ids, encoder_segment_ids)
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
    mask, cross_mask = masks.decoder_masks(
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
    """decoder_norm(d^i) of every layer, teacher-forced, through the layer's translator where it
    has one: what the layer losses read."""
    encoded = self.encode(encoder_input_tokens, encoder_segment_ids, enable_dropout)
    mask, cross_mask = masks.decoder_masks(
      encoder_input_tokens, decoder_target_tokens, encoder_segment_ids, decoder_segment_ids
    )
    hidden = self.decoder.hidden_states(
      encoded, decoder_input_tokens, mask, cross_mask, not enable_dropout
    )
    return self.decoder.read(jnp.stack(hidden), not enable_dropout)

  def hidden_states(
    self,
    encoder_input_tokens,
    decoder_input_tokens,
    decoder_target_tokens,
    encoder_segment_ids=None,
    decoder_segment_ids=None,
  ) -> Float[Array, "layers batch length emb"]:
    """Raw d^i of every layer, teacher-forced, without dropout."""
    encoded = self.encode(encoder_input_tokens, encoder_segment_ids, enable_dropout=False)
    mask, cross_mask = masks.decoder_masks(
      encoder_input_tokens, decoder_target_tokens, encoder_segment_ids, decoder_segment_ids
    )
    return jnp.stack(
      self.decoder.hidden_states(encoded, decoder_input_tokens, mask, cross_mask, True)
    )
