"""Early exit inside decode loops of somebody else: T5X's sampling and beam search.

Those loops know a function "tokens to logits" and a cache. They tile, flatten and gather every
leaf of the cache along axis 0, except the scalar `cache_index`; so every leaf here has its row
axis first, and constants (cross-attention keys and values, the prefix) are bound into the
function instead. They return tokens and scores only; exits come from a `Watch` of T5X's
sampling, or from `Loop.replay`, one teacher-forced pass over the returned sequences. This
module does not import T5X.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import core, lax
from jaxtyping import Array, Bool, Float, Int

from calm import exits
from calm.decode import engines, loop, speculative
from calm.exits import layers as layers_lib
from calm.exits import schedules
from calm.t5 import caches, layers, network
from calm.t5x import bindings

LoopCache = dict[str, Any]
CALLBACK = "state_callback_fn"


# ---- Rows and their forced prefixes


@struct.dataclass
class Rows:
  """What is known of every row before it is decoded.

  Attributes:
    encoded: the inputs' cross-attention keys and values.
    forced: at position i, whether the token after it is the prefix's, [rows, length] bool.
    generated: free positions before position i, [rows, length] int32.
    num_eos: EOS tokens in the prefix, which end nothing, [rows] int32.
    threshold: lambda, [rows] float32.
  """

  encoded: caches.Encoded
  forced: Bool[Array, "rows length"]
  generated: Int[Array, "rows length"]
  num_eos: Int[Array, " rows"]
  threshold: Float[Array, " rows"]


def prefix_of(
  decoder_input_tokens: Int[Array, "batch length"], eos_id: int | None, kept: bool
) -> Int[Array, "batch length"]:
  """The targets as a prefix to be forced, or none of them."""
  if not kept:
    return jnp.zeros_like(decoder_input_tokens)
  # As T5X does: an EOS at the prompt's end would end it.
  return jnp.where(decoder_input_tokens == eos_id, 0, decoder_input_tokens)


def make_rows(
  encoded: caches.Encoded,
  prefix: Int[Array, "batch length"],
  threshold: Float[Array, "..."],
  eos_id: int | Int[Array, ""],
  num_decodes: int = 1,
) -> Rows:
  """Rows of a batch, each prompt `num_decodes` times in a row, as T5X's loops lay them out.

  `prefix` is BOS (0), then tokens to be forced, 0 where the model is free.
  """
  forced = jnp.pad(prefix[:, 1:], ((0, 0), (0, 1))) != 0
  free = jnp.logical_not(forced).astype(jnp.int32)
  rows = Rows(
    encoded=encoded,
    forced=forced,
    generated=jnp.cumsum(free, axis=1) - free,
    num_eos=jnp.sum(prefix == eos_id, axis=1),
    threshold=jnp.broadcast_to(jnp.asarray(threshold, jnp.float32), prefix.shape[:1]),
  )
  if num_decodes == 1:
    return rows
  return jax.tree.map(lambda x: jnp.repeat(x, num_decodes, 0), rows)


@dataclasses.dataclass(frozen=True)
class AfterPrefix:
  """A schedule of free tokens: t starts after the prefix, which itself never exits early.

  A forced token is context, not output: what it stores is stored at full depth.
  """

  inner: schedules.Schedule
  rows: Rows
  name: ClassVar[str] = "after_prefix"

  def __call__(self, threshold, position):
    here = self.inner(threshold, _at(self.rows.generated, position))
    return jnp.where(_at(self.rows.forced, position), schedules.NEVER_EXIT, here)


@dataclasses.dataclass(frozen=True)
class DeepInPrefix(exits.StepRule):
  """A rule without a schedule (the oracle's), whose forced tokens run all of its layers."""

  inner: exits.StepRule
  rows: Rows

  @property
  def allowed(self) -> tuple[int, ...] | None:
    return getattr(self.inner, "allowed", None)

  @property
  def propagation(self) -> Any:
    return getattr(self.inner, "propagation", None)

  def depth(self, num_layers: int) -> int:
    return self.inner.depth(num_layers)

  def __call__(self, layers, hidden, active, threshold, generated) -> exits.TokenExit:
    arguments = (layers, hidden, active, threshold, generated)
    # Both run the same layers, which XLA computes once.
    deep = exits.StaticExit(self.depth(layers.num_layers))(*arguments)
    forced = _at(self.rows.forced, generated)
    return layers_lib.select_rows(forced, deep, self.inner(*arguments))


def _at(array: jax.Array, position: jax.Array) -> jax.Array:
  """The column of `array` [rows, length] at a position."""
  return lax.dynamic_index_in_dim(array, position, 1, keepdims=False)


def _put(array: jax.Array, position: jax.Array, column: jax.Array) -> jax.Array:
  return lax.dynamic_update_slice_in_dim(array, column[:, None], position, axis=1)


# ---- Loops


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


def rule_and_threshold(rule: exits.Rule, default: float, given: Any) -> tuple[exits.Rule, Any]:
  """The rule to run and the threshold to report; the full model's where nothing exits.

  `default` is the model's threshold, `given` that of the call (may be traced), or None.

  Raises:
    ValueError: the one given lies outside [0, 1].
  """
  threshold = default if given is None else given
  if given is not None and not isinstance(given, core.Tracer):
    for value in np.ravel(given).tolist():
      schedules.check_threshold(value)
  dynamic = isinstance(rule, exits.DynamicExits)
  if dynamic and given is None and threshold == schedules.NEVER_EXIT:
    return exits.StaticExit(), threshold
  return rule, threshold


@dataclasses.dataclass(frozen=True)
class Loop:
  """The early-exit step as T5X's loops call it; static, like `program.Program`.

  `weights` of its methods are the decoder's, from `program.model_weights`, `rows` are from
  `make_rows`, and `eos_id` is the token that ends a row.

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
    assert not isinstance(rule, exits.Speculative)  # has no step
    if isinstance(rule, exits.DynamicExits):
      rule = dataclasses.replace(rule, schedule=AfterPrefix(rule.schedule, rows))
    elif not isinstance(rule, exits.StaticExit):  # all of whose tokens run all its layers
      rule = DeepInPrefix(rule, rows)
    task = engines.Task(self.config, rule, weights, rows.encoded, rows.threshold, self.length)
    return engines.bind(task, self.engine)

  def empty_cache(self, weights: Any, rows: Rows, batch_size: int) -> LoopCache:
    """A cache that T5X's loops can tile, flatten and gather: plain dictionaries of arrays.

    `batch_size` is the rows of the batch, before a loop of T5X's multiplies them.
    """
    if self.rule.speculates:  # whose loop makes its own
      return {"cache_index": jnp.zeros((), jnp.int32)}
    empty = self._bound(weights, rows).empty
    empty = jax.tree.map(lambda x: x[:batch_size] if x.ndim else x, empty)
    floats = jnp.zeros((batch_size, self.length), jnp.float32)
    noted = Exits(jnp.zeros((batch_size, self.length), jnp.int32), floats, floats)
    return _to_loop(jnp.array(0, jnp.int32), vars(noted), empty)

  def bind(
    self, weights: Any, rows: Rows, eos_id: int | jax.Array, wide: bool = False
  ) -> Callable[[Any], tuple[jax.Array, LoopCache]]:
    """The function that T5X's loops call with their `DecodingState` at every position.

    Of `exits.Speculative` it is a `Passes`, which `greedy_decode` alone can use.

    With `wide`, logits are as wide as the embedding, as T5X's are, so that samplers draw what
    they draw from T5X's; ids beyond the vocabulary have no probability.
    """
    if isinstance(self.rule, exits.Speculative):
      task = engines.Task(
        self.config, self.rule, weights, rows.encoded, rows.threshold, self.length
      )
      return Passes(speculative.bind(task, self.rule, eos_id))
    bound = self._bound(weights, rows)

    def tokens_to_logits(state) -> tuple[jax.Array, LoopCache]:
      active = _is_active(state.sequences, eos_id, rows.num_eos)
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

    `tokens` are prefix, generated tokens, padding.
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
      return _step(bound, rows, _at(inputs, position), _at(real, position), cache)[1]

    cache = self.empty_cache(weights, rows, tokens.shape[0])
    return Exits(**lax.while_loop(unfinished, advance, cache)["exits"])

  def exits_of(
    self, weights: Any, rows: Rows, decodes: jax.Array, eos_id: Any, same_pass: list[Exits]
  ) -> dict[str, jax.Array]:
    """Exits in the order of the decodes, [batch, num_decodes, length], by name.

    `same_pass` holds the exits that the loop itself returned, if it did.

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
    # A loop may go on with a row that it has ended.
    counted = real_tokens(flat, rows, eos_id) & jnp.logical_not(rows.forced)
    if isinstance(self.rule, exits.StaticExit):
      depth = jnp.int32(self.rule.depth(self.config.num_decoder_layers))
      noted = {"exit_layers": jnp.broadcast_to(depth, counted.shape)}
    else:
      noted = vars(same_pass[0] if same_pass else self.replay(weights, rows, flat, eos_id))
    shaped = lambda x: x[:, :length].reshape(decodes.shape)
    return {name: shaped(jnp.where(counted, of, 0)) for name, of in noted.items()}


@dataclasses.dataclass(frozen=True)
class Passes:
  """`Loop.bind` of a rule that emits several tokens a pass: the loop, without its prefix."""

  speculation: speculative.Speculation

  def __call__(self, state: Any) -> tuple[jax.Array, LoopCache]:
    """Refuses a loop that asks for one token after another.

    Raises:
      ValueError: always.
    """
    raise ValueError(
      "Expected `decode_fn` to be calm.t5x.loops.greedy_decode with the rule"
      " `exits.Speculative`, got a loop that asks for one token at a time; bind it, or choose"
      " another rule."
    )

  def decode(self, inputs: Int[Array, "batch length"]) -> tuple[jax.Array, jax.Array, Exits]:
    """As `greedy_decode`; the prefix is verified in passes too."""
    prefix = jnp.pad(inputs[:, 1:], ((0, 0), (0, 1)))
    speculation = dataclasses.replace(self.speculation, prefix=prefix)
    made = speculation.decode(jnp.ones((len(inputs),), bool)).generation
    columns = made.exit_layers, made.confidences, made.rejected_confidences
    tokens, scores = jnp.asarray(made.tokens), jnp.asarray(made.scores)
    return tokens[:, None], scores[:, None], Exits(*map(jnp.asarray, columns))


def _step(bound: engines.Bound, rows: Rows, current, active, cache: LoopCache):
  """One position of every row -> logits and the cache after it."""
  position, structure = cache["cache_index"], jax.tree.structure(bound.empty)
  leaves = [next(iter(cache[f"carried_{i}"].values())) for i in range(structure.num_leaves)]
  carried = jax.tree.unflatten(structure, leaves)
  made, carried = bound.take_step(current, position, active, carried)
  counted = active & jnp.logical_not(_at(rows.forced, position))
  columns = {
    "exit_layers": made.exit_layer,
    "confidences": made.confidence,
    "rejected_confidences": made.rejected_confidence,
  }
  noted = {
    name: _put(array, position, jnp.where(counted, columns[name], 0).astype(array.dtype))
    for name, array in cache["exits"].items()
  }
  return made.logits, _to_loop(position + 1, noted, carried)


def _to_loop(position: jax.Array, noted: dict[str, jax.Array], carried: Any) -> LoopCache:
  """T5X goes by the names of leaves: those called `cache_index` have no row axis."""
  name = lambda leaf: "per_row" if leaf.ndim else "cache_index"
  leaves = enumerate(jax.tree.leaves(carried))
  return {
    "cache_index": position,
    "exits": noted,
    **{f"carried_{i}": {name(leaf): leaf} for i, leaf in leaves},
  }


def _is_active(sequences: jax.Array, eos_id: int | jax.Array, num_eos: jax.Array) -> jax.Array:
  """Rows that have not generated EOS; their prefixes may hold `num_eos` of them, [rows]."""
  return jnp.sum(sequences == eos_id, axis=1) <= num_eos


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
  # The prefix's token after each position, 0 where the model is free.
  prefix = jnp.pad(inputs[:, 1:], ((0, 0), (0, 2)))
  num_eos = jnp.sum(inputs == eos_id, axis=1)

  def unfinished(carry):
    state, _ = carry
    active = _is_active(state.sequences, eos_id, num_eos)
    return (state.cur_index[0] < length) & jnp.any(active)

  def advance(carry):
    state, scores = carry
    position, active = state.cur_index[0], _is_active(state.sequences, eos_id, num_eos)
    logits, cache = tokens_to_logits(state)
    emitted = loop.emit(layers_lib.greedy(logits), active)
    following = jnp.where(active, _at(prefix, position), 0)
    token = jnp.where(following == 0, emitted.token, following)
    sequences = _put(state.sequences, position + 1, token)
    scores += jnp.where(following == 0, emitted.log_probability, 0.0)
    return LoopState(state.cur_index + 1, sequences, token[:, None], cache), scores

  start = LoopState(
    jnp.zeros((batch_size,), jnp.int32),
    jnp.pad(inputs, ((0, 0), (0, 1))),
    jnp.zeros((batch_size, 1), jnp.int32),
    cache,
  )
  scores = jnp.zeros((batch_size,), jnp.float32)
  state, scores = lax.while_loop(unfinished, advance, (start, scores))
  return state.sequences[:, None, 1:], scores[:, None], Exits(**state.cache["exits"])


# ---- Exits of T5X's own sampling


@dataclasses.dataclass
class Watch:
  """T5X's `state_callback_fn`, which keeps the state that it saw last.

  `decoding.temperature_sample` shows its state before every step and once more after the last,
  and with it the cache, in which `Loop` notes the exits.

  Attributes:
    state: while the loop is traced that of a step, afterwards the final one. A tracer: it is
      read in the function that called the loop, and a watch is of one call.
  """

  state: Any = None

  def __call__(self, state: Any) -> Any:
    self.state = state
    return state

  def exits(self, num_decodes: int) -> Exits:
    """Exits [batch * num_decodes, length] in the order in which T5X returns sequences.

    T5X sorts by ascending score; what a row noted after its end is still in them.
    """
    scores = self.state.log_prob.reshape(-1, num_decodes)
    order = jnp.argsort(scores, axis=-1)[..., None]

    def sorted_rows(noted: jax.Array) -> jax.Array:
      decodes = noted.reshape(*scores.shape, -1)
      return jnp.take_along_axis(decodes, order, axis=1).reshape(noted.shape)

    return Exits(**jax.tree.map(sorted_rows, self.state.cache["exits"]))


def watch(
  decode_fn: Callable[..., Any], sampling: Callable[..., Any], options: Mapping[str, Any]
) -> Watch | None:
  """A watch to give to a decode function as `state_callback_fn`, if it is T5X's sampling.

  None for another function, and where somebody has a callback there already. `decode_fn` may be
  a `functools.partial`, or configured by gin; `options` are those of the call.
  """
  taken = CALLBACK in options or CALLBACK in bindings.of(sampling)
  inner: Any = inspect.unwrap(decode_fn)
  while isinstance(inner, functools.partial):
    taken = taken or CALLBACK in inner.keywords
    inner = inspect.unwrap(inner.func)
  return None if taken or inner is not inspect.unwrap(sampling) else Watch()
