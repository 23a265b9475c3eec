"""The compiled programs of inference: encode a batch once, decode it at any threshold.

Static things (sizes, rule, lengths) live in the frozen `Program`; the threshold is traced, so
that a whole grid compiles once.
"""

import collections
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from calm import decoding, exits, network, step

Params = Any

# Traces so far in this process by function name: a body below runs only to be compiled.
TRACES: collections.Counter[str] = collections.Counter()


@struct.dataclass
class ModelWeights:
  """A model as inference holds it.

  Attributes:
    encoder: the T5X-shaped tree's embedding and encoder.
    decoder: the decoder laid out for decoding.
  """

  encoder: Params
  decoder: step.DecoderWeights


def model_weights(
  params: Params,
  config: network.T5Config,
  num_pieces: int | None = None,
  shortlist: Sequence[int] | None = None,
) -> ModelWeights:
  """Lays a T5X-shaped tree out for inference; see `step.decoder_weights`."""
  encoder = {name: params[name] for name in ("token_embedder", "encoder")}
  return ModelWeights(
    jax.tree.map(jnp.asarray, encoder),
    step.decoder_weights(params, config, num_pieces, shortlist),
  )


@dataclasses.dataclass(frozen=True)
class Program:
  """One way of decoding; hashable, and compiled once for every batch shape.

  Attributes:
    config: the model's sizes.
    rule: how a token goes through the layers.
    max_decode_length: most tokens generated a prompt.
    eos_id: the token that ends a row.
  """

  config: network.T5Config
  rule: exits.StepRule
  max_decode_length: int
  eos_id: int = 1

  @functools.partial(jax.jit, static_argnums=0)
  def encode(
    self, weights: ModelWeights, encoder_input_tokens: Int[Array, "batch input_length"]
  ) -> step.Encoded:
    """Encoder states' cross-attention keys and values; for any number of decodings."""
    TRACES["encode"] += 1
    config = dataclasses.replace(self.config, one_hot_embedding=False)
    encoded = network.Transformer(config).apply(
      {"params": weights.encoder}, encoder_input_tokens, enable_dropout=False, method="encode"
    )
    assert isinstance(encoded, jax.Array)
    return step.cross_attention_inputs(weights.decoder, config, encoded, encoder_input_tokens)

  def decode_state(
    self,
    weights: ModelWeights,
    encoded: step.Encoded,
    active: Bool[Array, " batch"],
    threshold: Float[Array, "..."],
  ) -> decoding.DecodingState:
    """Decodes greedily and returns the final state, caches included (not compiled)."""
    take_step = self.bind(weights.decoder, encoded, threshold)
    caches = step.empty_caches(
      self.config,
      active.shape[0],
      self.max_decode_length,
      self.rule.depth(self.config.num_decoder_layers),
    )
    return decoding.decode(
      take_step,
      caches,
      active=active,
      max_decode_length=self.max_decode_length,
      eos_id=self.eos_id,
    )

  @functools.partial(jax.jit, static_argnums=0)
  def decode(
    self,
    weights: ModelWeights,
    encoded: step.Encoded,
    active: Bool[Array, " batch"],
    threshold: Float[Array, "..."],
  ) -> decoding.Generation:
    """Decodes greedily.

    Args:
      weights: the model.
      encoded: from `encode`.
      active: rows that hold a prompt; the others are padding of the batch.
      threshold: lambda, [] or one a row; `schedules.NEVER_EXIT` runs every layer.
    """
    TRACES["decode"] += 1
    return self.decode_state(weights, encoded, active, threshold).generation

  def bind(
    self, weights: step.DecoderWeights, encoded: step.Encoded, threshold: jax.Array
  ) -> decoding.Step:
    """The decode loop's step for this model, these prompts and this threshold."""
    table = step.bias_table(weights, self.config, self.max_decode_length)

    def take_step(current, position, active, cache):
      decoder = step.DecoderStep(
        weights, self.config, encoded, cache, table.at(position), table.current
      )
      hidden = weights.embedding[current]
      token_exit = self.rule(decoder.layers(), hidden, active, threshold, position)
      return token_exit, step.write_rows(cache, token_exit.rows, _after(position, token_exit))

    return take_step


def _after(position: jax.Array, token_exit: exits.TokenExit) -> jax.Array:
  """`position`, in a form that XLA can know only once the token is.

  A cache that is read after its update was made would be copied whole at every step; tied to
  the token (its argmax is what the loop computes anyway), the update waits for every read.
  """
  token = jnp.argmax(token_exit.logits, axis=-1).astype(jnp.int32)
  return position + jnp.minimum(token[0], 0)
