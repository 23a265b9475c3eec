"""Early exit inside decode loops that belong to somebody else: T5X's sampling and beam search.

Those loops know a function "tokens to logits" and a cache. They tile, flatten and gather every
leaf of the cache along axis 0, except the scalar `cache_index`; so every leaf here has its row
axis first, and what never changes (cross-attention keys and values, the prompt) is bound into
the function instead. They return tokens and scores only; exits come from `watching`, or from
`replay`, one teacher-forced pass over what was returned. This module does not import T5X.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Int

from calm import exits
from calm.decode import engines, loop, verified, verified_passes
from calm.t5 import layers, network
from calm.t5x import prefixes

LoopCache = dict[str, Any]
Rows = prefixes.Rows
make_rows = prefixes.make_rows


@struct.dataclass
class Exits:
  """How deep the tokens of returned sequences went; prefixes and padding are 0.

  Attributes:
    exit_layers: decoder layers run, 1-based, [rows, length] int32.
    confidences: the measure at the exit layer, [rows, length].
    rejected_confidences: the highest confidence measured and refused, [rows, length].
  """

  exit_layers: jax.Array
  confidences: jax.Array
  rejected_confidences: jax.Array


@struct.dataclass
class LoopState:
  """What our own loop tells "tokens to logits"; the fields of T5X's `DecodingState`.

  Attributes:
    cur_index: position of the loop, [rows].
    sequences: BOS, the prefix and what was generated, [rows, length].
    cur_token: the token at `cur_index`, [rows, 1].
    cache: see `Loop.empty_cache`.
  """

  cur_index: jax.Array
  sequences: jax.Array
  cur_token: jax.Array
  cache: LoopCache


@dataclasses.dataclass(frozen=True)
class Loop:
  """The early-exit step as T5X's loops call it; static, like `program.Program`.

  Attributes:
    config: the model's sizes.
    rule: how a token goes through the layers.
    length: positions in the caches.
    engine: how steps run, or None for the fastest of the rule; results do not depend on it.
  """

  config: network.T5Config
  rule: exits.Rule
  length: int
  engine: engines.Engine | None = None

  def _bound(self, weights: Any, rows: Rows) -> engines.Bound:
    rule = self.rule
    assert not isinstance(rule, exits.Verified)  # has no step
    if isinstance(rule, exits.DynamicExits):
      rule = dataclasses.replace(rule, schedule=prefixes.AfterPrefix(rule.schedule, rows))
    elif not isinstance(rule, exits.StaticExit):  # all of whose tokens run all its layers
      rule = prefixes.DeepInPrefix(rule, rows)
    task = engines.Task(self.config, rule, weights, rows.encoded, rows.threshold, self.length)
    return engines.bind(task, self.engine)

  def empty_cache(self, weights: Any, rows: Rows, batch_size: int) -> LoopCache:
    """A cache that T5X's loops can tile, flatten and gather: plain dictionaries of arrays.

    Args:
      weights: the decoder, from `program.model_weights`.
      rows: from `make_rows`.
      batch_size: rows of the cache: of the batch, before a loop of T5X's multiplies them.
    """
    if isinstance(self.rule, exits.Verified):  # whose loop makes its own
      return {"cache_index": jnp.zeros((), jnp.int32)}
    empty = self._bound(weights, rows).empty
    empty = jax.tree.map(lambda x: x[:batch_size] if x.ndim else x, empty)
    floats = jnp.zeros((batch_size, self.length), jnp.float32)
    seen = {
      "exit_layers": jnp.zeros((batch_size, self.length), jnp.int32),
      "confidences": floats,
      "rejected_confidences": floats,
    }
    return _to_loop(jnp.array(0, jnp.int32), seen, empty)

  def bind(
    self, weights: Any, rows: Rows, eos_id: int | jax.Array, wide: bool = False
  ) -> Callable[[Any], tuple[jax.Array, LoopCache]]:
    """The function that T5X's loops call with their `DecodingState` at every position.

    Of `exits.Verified` it is a `Passes`, which `greedy_decode` alone can use.

    Args:
      weights: the decoder, from `program.model_weights`.
      rows: from `make_rows`.
      eos_id: the token that ends a row.
      wide: whether logits are as wide as the embedding, as T5X's are, and not as the
        vocabulary: what draws from them draws what it draws from T5X's. Ids beyond the
        vocabulary have no probability.
    """
    if isinstance(self.rule, exits.Verified):
      task = engines.Task(
        self.config, self.rule, weights, rows.encoded, rows.threshold, self.length
      )
      return Passes(verified_passes.bind(task, self.rule, eos_id))
    bound = self._bound(weights, rows)

    def tokens_to_logits(state) -> tuple[jax.Array, LoopCache]:
      # The prefix may hold EOS tokens; one more than those was generated, and ends the row.
      num_eos = jnp.sum(state.sequences == eos_id, axis=1)
      active = num_eos <= rows.num_eos
      logits, cache = _step(bound, rows, state.cur_token[:, 0], active, state.cache)
      beyond = self.config.vocab_size - logits.shape[1] if wide else 0
      wider = jnp.pad(logits, ((0, 0), (0, beyond)), constant_values=layers.MASK_BIAS)
      return wider, cache

    return tokens_to_logits

  def replay(
    self,
    weights: Any,
    rows: Rows,
    tokens: Int[Array, "rows length"],
    eos_id: int | jax.Array,
  ) -> Exits:
    """The exits of sequences that some loop returned, by feeding them to the same step.

    Args:
      weights: the decoder, from `program.model_weights`.
      rows: as they were decoded.
      tokens: prefix, generated tokens, padding.
      eos_id: the token that ended them.
    """
    bound = self._bound(weights, rows)
    real = real_tokens(tokens, rows, eos_id)
    inputs = jnp.pad(tokens[:, :-1], ((0, 0), (1, 0)))

    def unfinished(cache):
      position = cache["cache_index"]
      ahead = jnp.arange(self.length)[None, :] >= position
      return (position < self.length) & jnp.any(real & ahead)

    def advance(cache):
      position = cache["cache_index"]
      return _step(
        bound, rows, prefixes.at(inputs, position), prefixes.at(real, position), cache
      )[1]

    cache = self.empty_cache(weights, rows, tokens.shape[0])
    return Exits(**lax.while_loop(unfinished, advance, cache)["exits"])

  def exits_of(
    self, weights: Any, rows: Rows, decodes: jax.Array, eos_id: Any, same_pass: list[Exits]
  ) -> dict[str, jax.Array]:
    """Exits in the order of the decodes, [batch, num_decodes, length], by name.

    Args:
      weights: as in `replay`.
      rows: as they were decoded.
      decodes: sequences [batch, num_decodes, length].
      eos_id: the token that ended them.
      same_pass: what the loop itself returned of them, if it did.

    Raises:
      ValueError: the decodes are longer than the caches.
    """
    # Beam search may be told to stop before the targets' length.
    length = decodes.shape[-1]
    if length > self.length:
      raise ValueError(
        f"Expected `max_decode_len` of at most {self.length}, the targets' length, for which"
        f" caches are made, got {length}; give longer targets."
      )
    flat = jnp.pad(decodes.reshape(-1, length), ((0, 0), (0, self.length - length)))
    shaped = lambda x: x[:, :length].reshape(decodes.shape)
    if isinstance(self.rule, exits.StaticExit):
      depth = self.rule.depth(self.config.num_decoder_layers)
      return {"exit_layers": shaped(full_depth(flat, rows, eos_id, depth))}
    found = same_pass[0] if same_pass else self.replay(weights, rows, flat, eos_id)
    # A loop may go on with a row that it has ended.
    counted = real_tokens(flat, rows, eos_id) & jnp.logical_not(rows.forced)
    noted = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
    return {name: shaped(jnp.where(counted, of, 0)) for name, of in noted.items()}


@dataclasses.dataclass(frozen=True)
class Passes:
  """What `Loop.bind` makes of a rule that emits several tokens a pass.

  Attributes:
    verifying: the loop, its prefix yet to be given.
  """

  verifying: verified.Verifying

  def __call__(self, state: Any) -> tuple[jax.Array, LoopCache]:
    """Refuses a loop that asks for one token after another.

    Raises:
      ValueError: always.
    """
    raise ValueError(
      "Expected `decode_fn` to be calm.t5x.loops.greedy_decode with the rule `exits.Verified`,"
      " got a loop that asks for one token at a time; bind it, or choose another rule."
    )

  def decode(self, inputs: Int[Array, "batch length"]) -> tuple[jax.Array, jax.Array, Exits]:
    """As `greedy_decode`; the prefix is verified in passes too."""
    prefix = jnp.pad(inputs[:, 1:], ((0, 0), (0, 1)))
    verifying = dataclasses.replace(self.verifying, prefix=prefix)
    made = verifying.decode(jnp.ones((len(inputs),), bool)).generation
    columns = made.exit_layers, made.confidences, made.rejected_confidences
    tokens, scores = jnp.asarray(made.tokens), jnp.asarray(made.scores)
    return tokens[:, None], scores[:, None], Exits(*map(jnp.asarray, columns))


def _step(bound: engines.Bound, rows: Rows, current, active, cache: LoopCache):
  """One position of every row -> logits and the cache after it."""
  position = cache["cache_index"]
  carried = _from_loop(cache, bound.empty)
  made, carried = bound.take_step(current, position, active, carried)
  counted = active & jnp.logical_not(prefixes.at(rows.forced, position))
  columns = {
    "exit_layers": made.exit_layer,
    "confidences": made.confidence,
    "rejected_confidences": made.rejected_confidence,
  }
  seen = {
    name: _put(array, position, jnp.where(counted, columns[name], 0).astype(array.dtype))
    for name, array in cache["exits"].items()
  }
  return made.logits, _to_loop(position + 1, seen, carried)


def _to_loop(position: jax.Array, seen: dict[str, jax.Array], carried: Any) -> LoopCache:
  """T5X goes by the names of leaves: those called `cache_index` have no row axis."""
  leaves = jax.tree.leaves(carried)
  name = lambda leaf: "per_row" if leaf.ndim else "cache_index"
  return {
    "cache_index": position,
    "exits": seen,
    **{f"carried_{i}": {name(leaf): leaf} for i, leaf in enumerate(leaves)},
  }


def _from_loop(cache: LoopCache, like: Any) -> Any:
  """What the engine carries, in its own structure."""
  structure = jax.tree.structure(like)
  leaves = [next(iter(cache[f"carried_{i}"].values())) for i in range(structure.num_leaves)]
  return jax.tree.unflatten(structure, leaves)


def real_tokens(
  tokens: Int[Array, "rows length"], rows: Rows, eos_id: int | jax.Array
) -> Bool[Array, "rows length"]:
  """Which tokens a row really has: its prefix, and what it generated up to EOS.

  A row without a generated EOS ends with its last token that is not padding.
  """
  is_eos = (tokens == eos_id).astype(jnp.int32)
  before = jnp.cumsum(is_eos, axis=1) - is_eos
  last = jnp.max(jnp.where(tokens != 0, jnp.arange(tokens.shape[1])[None, :], -1), axis=1)
  inside = jnp.arange(tokens.shape[1])[None, :] <= last[:, None]
  return inside & (before <= rows.num_eos[:, None])


def full_depth(tokens, rows: Rows, eos_id, num_layers: int) -> jax.Array:
  """Exit layers [rows, length] of sequences whose every token ran `num_layers` layers."""
  counted = real_tokens(tokens, rows, eos_id) & jnp.logical_not(rows.forced)
  return jnp.where(counted, num_layers, 0).astype(jnp.int32)


def greedy_decode(
  inputs: Int[Array, "batch length"],
  cache: LoopCache,
  tokens_to_logits: Callable[[LoopState], tuple[jax.Array, LoopCache]],
  eos_id: int,
  num_decodes: int = 1,
  decode_rng: Any = None,
  cache_offset: int = 0,
) -> tuple[jax.Array, jax.Array, Exits]:
  """Greedy decoding with its exits from the same pass: a T5X `decode_fn` for our model.

  Unlike T5X's `temperature_sample` at temperature 0 it scores: log-probabilities of the
  generated tokens under the full head at their exit layer, nats.

  Args:
    inputs: the prefix, from BOS on, 0 where the model is free.
    cache: from `Loop.empty_cache`.
    tokens_to_logits: from `Loop.bind`.
    eos_id: the token that ends a row.
    num_decodes: 1.
    decode_rng: not used.
    cache_offset: not used.

  Returns:
    Tokens [batch, 1, length], scores [batch, 1], and `Exits` of [batch, length].
  """
  del decode_rng, cache_offset
  if num_decodes != 1:
    raise ValueError(
      f"Expected `num_decodes` of 1 for greedy decoding, got {num_decodes}; use T5X's"
      " `decoding.temperature_sample` or `decoding.beam_search`."
    )
  if isinstance(tokens_to_logits, Passes):
    return tokens_to_logits.decode(inputs)
  batch_size, length = inputs.shape
  sequences = jnp.pad(inputs, ((0, 0), (0, 1)))
  greedy = _Greedy(
    tokens_to_logits,
    eos_id,
    given=jnp.pad(inputs[:, 1:], ((0, 0), (0, 2))),
    num_eos=jnp.sum(sequences == eos_id, axis=1),
  )
  start = LoopState(
    jnp.zeros((batch_size,), jnp.int32),
    sequences,
    jnp.zeros((batch_size, 1), jnp.int32),
    cache,
  )

  def unfinished(carry):
    state, _ = carry
    return (state.cur_index[0] < length) & jnp.any(greedy.is_active(state))

  def advance(carry):
    state, scores = carry
    state, more = greedy.step(state)
    return state, scores + more

  scores = jnp.zeros((batch_size,), jnp.float32)
  state, scores = lax.while_loop(unfinished, advance, (start, scores))
  return state.sequences[:, None, 1:], scores[:, None], Exits(**state.cache["exits"])


@dataclasses.dataclass(frozen=True, eq=False)
class _Greedy:
  """What stays the same over a greedy loop.

  Attributes:
    tokens_to_logits: from `Loop.bind`.
    eos_id: the token that ends a row.
    given: the prefix's token after each position, 0 where the model is free, [rows, length].
    num_eos: EOS that the prefix holds itself, [rows].
  """

  tokens_to_logits: Callable[[LoopState], tuple[jax.Array, LoopCache]]
  eos_id: int
  given: jax.Array
  num_eos: jax.Array

  def is_active(self, state: LoopState) -> jax.Array:
    """Rows that have not generated EOS yet, [rows]."""
    return jnp.sum(state.sequences == self.eos_id, axis=1) <= self.num_eos

  def step(self, state: LoopState) -> tuple[LoopState, jax.Array]:
    """The state with one token more, and its log-probability (0 where it was given), [rows]."""
    position, active = state.cur_index[0], self.is_active(state)
    logits, cache = self.tokens_to_logits(state)
    emitted = loop.emit(logits, active)
    following = jnp.where(active, prefixes.at(self.given, position), 0)
    free = following == 0
    token = jnp.where(free, emitted.token, following)
    made = LoopState(
      state.cur_index + 1, _put(state.sequences, position + 1, token), token[:, None], cache
    )
    return made, jnp.where(free, emitted.log_probability, 0.0)


def _put(array: jax.Array, position: jax.Array, column: jax.Array) -> jax.Array:
  return lax.dynamic_update_slice_in_dim(array, column[:, None], position, axis=1)
