"""One sequence, token by token: the decode loop. It knows no network, it takes
a step.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

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
class Verification:
  """How a text of `exits.Speculative` came about."""

  # Tokens that were drafted and accepted; the others are the full model's own.
  drafted: Bool[AnyArray, "batch length"]
  passes: Int[AnyArray, " batch"]  # of the full model, that verified each row
  # Tokens drafted, refused ones too: as many as for the row that goes on
  # longest.
  drafts: Int[AnyArray, " batch"]


@struct.dataclass
class Generation:
  """What a batch of prompts became; padding has exit layer 0 and confidence 0.

  Attributes:
    tokens: generated tokens with EOS, 0 after it, [batch, length] int32.
    exit_layers: decoder layers run for each token, 1-based, [batch, length]
      int32.
    confidences: the measure at the exit layer, [batch, length] in [0, 1].
    rejected_confidences: the highest confidence that was measured and refused
      at that token, 0 if none, [batch, length] in [0, 1].
    scores: log-probability of the emitted tokens, EOS included, under the full
      head at their exit layer, temperature 1, [batch] in nats.
    verification: of `exits.Speculative`; None of other rules.
  """

  tokens: Int[AnyArray, "batch length"]
  exit_layers: Int[AnyArray, "batch length"]
  confidences: Float[AnyArray, "batch length"]
  rejected_confidences: Float[AnyArray, "batch length"]
  scores: Float[AnyArray, " batch"]
  verification: Verification | None = None


@struct.dataclass
class DecodingState:
  """The loop's carry."""

  position: Int[Array, ""]  # tokens generated so far by every row
  current: Int[Array, " batch"]  # the last token, which the next step reads
  active: Bool[Array, " batch"]  # rows that still generate
  generation: Generation  # filled up to `position`
  log_probabilities: Float[AnyArray, "batch length"]  # of the emitted tokens
  cache: Any  # the step's own


# (current [batch], position [], active [batch], cache) -> (what comes of it,
# cache).
Step = Callable[
  [jax.Array, jax.Array, jax.Array, Any], tuple[exits.TokenExit, Any]
]


def empty_generation(batch_size: Any, max_decode_length: int) -> Generation:
  # `jax.export` has batch sizes that are no number.
  ints = jnp.zeros((batch_size, max_decode_length), jnp.int32)
  floats = jnp.zeros((batch_size, max_decode_length), jnp.float32)
  return Generation(
    ints, ints, floats, floats, jnp.zeros((batch_size,), jnp.float32)
  )


def nothing_yet(
  active: Bool[Array, " batch"], max_decode_length: int, cache: Any
) -> DecodingState:
  """Before the first token of every active row."""
  batch_size = active.shape[0]
  return DecodingState(
    position=jnp.zeros((), jnp.int32),
    current=jnp.zeros((batch_size,), jnp.int32),
    active=active,
    generation=empty_generation(batch_size, max_decode_length),
    log_probabilities=jnp.zeros((batch_size, max_decode_length), jnp.float32),
    cache=cache,
  )


def decode(
  step: Step,
  cache: Any,
  *,
  active: Bool[Array, " batch"],
  max_decode_length: int,
  eos_id: int,
  step_limit: int | None = None,
) -> DecodingState:
  """Greedy decoding of every active row until EOS or the length limit; the
  final state.

  Args:
    step: runs one position.
    cache: what the step starts from.
    active: rows to decode; the others stay empty and never vote.
    max_decode_length: size of the generation's arrays.
    eos_id: the token that ends a row.
    step_limit: limit below `max_decode_length`; None: that length itself.
  """
  state = nothing_yet(active, max_decode_length, cache)
  return go_on(
    step,
    state,
    cache,
    step_limit=step_limit or max_decode_length,
    eos_id=eos_id,
  )


def resume(
  step: Step,
  state: DecodingState,
  cache: Any,
  *,
  active: Bool[Array, " batch"],
  resume_at: Int[Array, " batch"],
  step_limit: int,
  eos_id: int,
) -> DecodingState:
  """Decodes again from some token of each row on; what lies before it stays as
  it is.

  `step` must leave the cache of a row alone before its `resume_at`, the first
  position to decode, below its length; `cache` is from the least of these.
  `active` rows are decoded, the others stay. The rest is as for `decode`.
  """
  length = state.generation.tokens.shape[1]
  columns = jnp.arange(length)[None, :]
  kept = ~active[:, None] | (columns < resume_at[:, None])
  old = state.generation

  def blank(array):
    return jnp.where(kept, array, jnp.zeros((), array.dtype))

  log_probabilities = blank(state.log_probabilities)
  generation = Generation(
    *map(
      blank,
      (old.tokens, old.exit_layers, old.confidences, old.rejected_confidences),
    ),
    scores=old.scores,
  )
  start = DecodingState(
    position=jnp.min(jnp.where(active, resume_at, length)).astype(jnp.int32),
    current=jnp.zeros_like(state.current),
    active=active,
    generation=generation,
    log_probabilities=log_probabilities,
    cache=cache,
  )
  start = dataclasses.replace(start, current=_last_token(start))

  def advance(state: DecodingState) -> DecodingState:
    state = _advance(
      step, state, state.active & (state.position >= resume_at), eos_id
    )
    # Where every row waits, the loop goes on at the first that does not.
    first = jnp.min(jnp.where(state.active, resume_at, length)).astype(
      jnp.int32
    )
    state = dataclasses.replace(
      state, position=jnp.maximum(state.position, first)
    )
    return dataclasses.replace(state, current=_last_token(state))

  end = _loop(advance, start, step_limit)
  # Summed at the end, so that the score does not depend on where decoding went
  # on.
  scores = jnp.sum(end.log_probabilities, axis=-1)
  return dataclasses.replace(
    end, generation=dataclasses.replace(end.generation, scores=scores)
  )


def go_on(
  step: Step,
  state: DecodingState,
  cache: Any,
  *,
  step_limit: int | jax.Array,
  eos_id: int,
) -> DecodingState:
  """Decodes on where a lower limit stopped; `cache` is the state's, with more
  room.
  """

  def advance(state):
    return _advance(step, state, state.active, eos_id)

  return _loop(advance, dataclasses.replace(state, cache=cache), step_limit)


def _last_token(state: DecodingState) -> jax.Array:
  """The token before `position` of every row, 0 at the beginning."""
  at = jnp.maximum(state.position - 1, 0)
  token = lax.dynamic_index_in_dim(
    state.generation.tokens, at, axis=1, keepdims=False
  )
  return jnp.where(state.position > 0, token, 0)


def _advance(
  step: Step, state: DecodingState, decodes: Bool[Array, " batch"], eos_id: int
) -> DecodingState:
  """One position of the rows that decode; the others wait, or have ended."""
  made, cache = step(state.current, state.position, decodes, state.cache)
  said = jax.tree.map(
    lambda x: jnp.where(decodes, x, jnp.zeros_like(x)), made.best
  )

  def put(array, column) -> jax.Array:
    """`array` [batch, length] with this position of the rows that decode."""
    old = lax.dynamic_index_in_dim(
      array, state.position, axis=1, keepdims=False
    )
    column = jnp.where(decodes, column.astype(array.dtype), old)
    return lax.dynamic_update_slice_in_dim(
      array, column[:, None], state.position, axis=1
    )

  old = state.generation
  position = state.position + 1
  active = state.active & ~(decodes & (said.token == eos_id))
  generation = Generation(
    tokens=put(old.tokens, said.token),
    exit_layers=put(old.exit_layers, made.exit_layer),
    confidences=put(old.confidences, made.confidence),
    rejected_confidences=put(
      old.rejected_confidences, made.rejected_confidence
    ),
    scores=old.scores + jnp.where(decodes, said.log_probability, 0.0),
  )
  return dataclasses.replace(
    state,
    position=position,
    current=said.token,
    active=active,
    generation=generation,
    log_probabilities=put(state.log_probabilities, said.log_probability),
    cache=cache,
  )


def _loop(
  advance: Callable[[DecodingState], DecodingState],
  state: DecodingState,
  limit: Any,
) -> DecodingState:
  def unfinished(state):
    return (state.position < limit) & jnp.any(state.active)

  return lax.while_loop(unfinished, advance, state)


def run_if(predicate: jax.Array, body: Callable[[Any], Any], carry: Any) -> Any:
  """`body(carry)` where `predicate` [], else `carry`: a loop of at most one
  turn, whose body may update arrays in place, which the branches of a
  conditional may not.
  """

  def once(pair):
    return (jnp.zeros((), bool), body(pair[1]))

  return lax.while_loop(lambda pair: pair[0], once, (predicate, carry))[1]


def pack(made: Generation) -> Int[Array, "batch columns"]:
  """A generation's arrays beside each other, float32 by their bits: every array
  that comes back to the host takes a short text some microseconds longer.
  """

  def bits(x):
    return (
      lax.bitcast_convert_type(x, jnp.int32)
      if x.dtype == jnp.float32
      else x.astype(jnp.int32)
    )

  parts = [bits(leaf.reshape(len(leaf), -1)) for leaf in jax.tree.leaves(made)]
  return jnp.concatenate(parts, axis=1)


def unpack(array: np.ndarray, length: int) -> Generation:
  """The generation again, of numpy arrays; `length` are most tokens of a
  row.
  """
  ints = array
  floats = array.view(np.float32)
  columns = [slice(i * length, (i + 1) * length) for i in range(4)]
  rest = 4 * length
  verification = None
  if array.shape[1] > rest + 1:
    drafted = ints[:, rest + 1 : rest + 1 + length] > 0
    verification = Verification(drafted, ints[:, -2], ints[:, -1])
  return Generation(
    tokens=ints[:, columns[0]],
    exit_layers=ints[:, columns[1]],
    confidences=floats[:, columns[2]],
    rejected_confidences=floats[:, columns[3]],
    scores=floats[:, rest],
    verification=verification,
  )


def without_drafts(full: Generation) -> Generation:
  """A generation of full depth as `exits.Speculative` reports one that made no
  draft.
  """
  emitted = np.asarray(full.exit_layers) > 0
  passes = emitted.sum(axis=-1, dtype=np.int32)
  # By hand: `replace` looks at every field, microseconds between two texts.
  return Generation(
    tokens=full.tokens,
    exit_layers=full.exit_layers,
    confidences=emitted.astype(np.float32),
    rejected_confidences=full.rejected_confidences,
    scores=full.scores,
    verification=Verification(
      np.zeros(emitted.shape, bool), passes, np.zeros_like(passes)
    ),
  )
