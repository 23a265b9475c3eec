"""Who may attend to whom: padding, causality and packed examples."""

import jax
import jax.numpy as jnp
from jaxtyping import ArrayLike, Num


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
        "Expected no packing while decoding, got `encoder_segment_ids`; unpack the batch."
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
