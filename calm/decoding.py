"""One sequence, token by token: the decode loop. It knows no network, it takes a step.

The step is bound by `inference` (or is a toy of a few lines in a test); it turns the last
token into a `exits.TokenExit` and the caches after it.
"""

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from calm import exits

# A generation is fetched from the device whole: then its arrays are numpy's.
AnyArray = Array | np.ndarray


@struct.dataclass
class Generation:
  """What a batch of prompts became; padding has exit layer 0 and confidence 0.

  Attributes:
    tokens: generated tokens with EOS, 0 after it, [batch, length] int32.
    exit_layers: decoder layers run for each token, 1-based, [batch, length] int32.
    confidences: the measure at the exit layer, [batch, length] in [0, 1].
    rejected_confidences: the highest confidence that was measured and refused at that
      token, 0 if none, [batch, length] in [0, 1].
    scores: log-probability of the emitted tokens, EOS included, under the full head at
      their exit layer, temperature 1, [batch] in nats.
  """

  tokens: Int[AnyArray, "batch length"]
  exit_layers: Int[AnyArray, "batch length"]
  confidences: Float[AnyArray, "batch length"]
  rejected_confidences: Float[AnyArray, "batch length"]
  scores: Float[AnyArray, " batch"]

  @property
  def num_tokens(self) -> jax.Array:
    """Real tokens of each row, EOS included, [batch]."""
    return jnp.sum(self.exit_layers > 0, axis=-1)

  @property
  def mean_layers(self) -> jax.Array:
    """Mean decoder layers over the real tokens of the batch, []."""
    return jnp.sum(self.exit_layers) / jnp.maximum(jnp.sum(self.exit_layers > 0), 1)


@struct.dataclass
class DecodingState:
  """The loop's carry.

  Attributes:
    position: tokens generated so far by every row, [].
    current: the last token, which the next step reads, [batch].
    active: rows that still generate, [batch] bool.
    generation: filled up to `position`.
    cache: the step's own.
  """

  position: Int[Array, ""]
  current: Int[Array, " batch"]
  active: Bool[Array, " batch"]
  generation: Generation
  cache: Any


@runtime_checkable
class Step(Protocol):
  """(current [batch], position [], active [batch], cache) -> (`exits.TokenExit`, cache)."""

  def __call__(
    self, current: jax.Array, position: jax.Array, active: jax.Array, cache: Any
  ) -> tuple[exits.TokenExit, Any]: ...


def empty_generation(batch_size: int, max_decode_length: int) -> Generation:
  """A generation of no tokens."""
  ints = jnp.zeros((batch_size, max_decode_length), jnp.int32)
  floats = jnp.zeros((batch_size, max_decode_length), jnp.float32)
  return Generation(ints, ints, floats, floats, jnp.zeros((batch_size,), jnp.float32))


def decode(
  step: Step,
  cache: Any,
  *,
  active: Bool[Array, " batch"],
  max_decode_length: int,
  eos_id: int,
  step_limit: Int[Array, ""] | None = None,
) -> DecodingState:
  """Greedy decoding of every active row until EOS or the length limit.

  Args:
    step: runs one position.
    cache: what the step starts from.
    active: rows to decode; the others stay empty and never vote.
    max_decode_length: size of the generation's arrays, static.
    eos_id: the token that ends a row.
    step_limit: traced limit below `max_decode_length`, None for that length itself.

  Returns:
    The final state; its `generation` holds the result.
  """
  batch_size = active.shape[0]
  limit = max_decode_length if step_limit is None else step_limit
  state = DecodingState(
    position=jnp.array(0, jnp.int32),
    current=jnp.zeros((batch_size,), jnp.int32),
    active=active,
    generation=empty_generation(batch_size, max_decode_length),
    cache=cache,
  )

  def unfinished(state: DecodingState):
    return (state.position < limit) & jnp.any(state.active)

  def advance(state: DecodingState) -> DecodingState:
    token_exit, cache = step(state.current, state.position, state.active, state.cache)
    token, log_probability = greedy_token(token_exit.logits)
    token = jnp.where(state.active, token, 0)
    generation = record(
      state.generation, state.position, state.active, token, log_probability, token_exit
    )
    return DecodingState(
      position=state.position + 1,
      current=token,
      active=state.active & (token != eos_id),
      generation=generation,
      cache=cache,
    )

  return lax.while_loop(unfinished, advance, state)


def greedy_token(
  logits: Float[Array, "batch vocab"],
) -> tuple[Int[Array, " batch"], Float[Array, " batch"]]:
  """The argmax and its log-probability at temperature 1, in nats."""
  token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
  top = jnp.max(logits, axis=-1)
  return token, top - jax.nn.logsumexp(logits, axis=-1)


def record(
  generation: Generation,
  position: jax.Array,
  active: jax.Array,
  token: jax.Array,
  log_probability: jax.Array,
  token_exit: exits.TokenExit,
) -> Generation:
  """Writes one position of every active row."""

  def put(array, column):
    return lax.dynamic_update_slice_in_dim(
      array, column[:, None].astype(array.dtype), position, axis=1
    )

  return Generation(
    tokens=put(generation.tokens, token),
    exit_layers=put(generation.exit_layers, token_exit.exit_layer),
    confidences=put(generation.confidences, token_exit.confidence),
    rejected_confidences=put(generation.rejected_confidences, token_exit.rejected_confidence),
    scores=generation.scores + jnp.where(active, log_probability, 0.0),
  )
