"""Speculative decoding: the first layers draft tokens, one pass of the others verifies them.

A pass reads token after token with layers 1 ... k and drafts the next one, runs the other
layers and the head over all of these positions at once, and emits the accepted drafts and then
the full model's own token. Rows have positions of their own; refused drafts are overwritten.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped

from calm import exits
from calm.decode import acceptance, engines, loop
from calm.decode.engines import engine
from calm.exits.layers import Greedy, greedy
from calm.t5 import attention as attention_lib
from calm.t5 import decoder as decoder_lib
from calm.t5 import eight_bits


@struct.dataclass
class Draft:
  """Layer k's most likely token [...] int32, and its probability under the draft head."""

  token: jax.Array
  confidence: jax.Array


def draft(logits: Float[Array, "*rows tokens"], ids: Int[Array, " tokens"] | None) -> Draft:
  """The likeliest column (the first of equals) of a draft head; `ids` are the tokens of its
  columns, None: their numbers."""
  best = greedy(logits)
  token = best.token if ids is None else ids[best.token]
  return Draft(token, jnp.exp(best.log_probability))


@struct.dataclass
class VerifierOutput:
  """What the full model says of some positions, each of which may have a draft."""

  token: jax.Array  # the argmax
  log_probability: jax.Array  # of the argmax, nats
  gap: jax.Array  # log p_full of the draft less that of the argmax


@struct.dataclass
class Verdict:
  """What is emitted at some positions."""

  token: jax.Array  # the draft where it is accepted, else the full model's argmax
  accepted: jax.Array
  gap: jax.Array  # `VerifierOutput.gap`
  rejected_confidence: jax.Array  # exp of it where a draft was refused, 0 elsewhere


def verdict(
  output: VerifierOutput,
  drafted: Int[Array, "*rows"],
  has_draft: jax.Array,
  threshold: jax.Array,
) -> Verdict:
  """What is emitted where the full model says this; `threshold` is 1 - lambda."""
  ratio = jnp.exp(output.gap)
  # Of two equal logits the argmax is the first: only with slack may the second be emitted.
  close = (ratio >= threshold) & (threshold < 1.0)
  accepted = has_draft & ((drafted == output.token) | close)
  return Verdict(
    token=jnp.where(accepted, drafted, output.token),
    accepted=accepted,
    gap=output.gap,
    rejected_confidence=jnp.where(has_draft & ~accepted, ratio, 0.0),
  )


@struct.dataclass
class Pending:
  """A pass that is not verified yet; between two passes, room for the next one's."""

  count: jax.Array  # positions whose drafts are read on from, []
  ended: jax.Array  # it has several positions, and reads on from the last draft no more, []
  tokens: jax.Array  # the draft after each position, [batch, window]
  confidences: jax.Array  # of these
  chances: jax.Array  # that all drafts of a row are accepted, [batch]
  expected: jax.Array  # tokens that the pass is expected to emit, of all rows, []
  hidden: jax.Array  # d^k of each position, [batch, window, emb]


@struct.dataclass
class Learned:
  """What a text's drafts turned out to be worth."""

  estimate: acceptance.AcceptanceEstimate
  miss_streak: Int[Array, ""]  # drafting passes since one emitted two tokens of any row
  due: Int[Array, ""]  # passes before the next one that drafts, of the whole text
  drafts: Int[Array, " batch"]  # tokens drafted
  cost: Float[Array, ""]  # of passes, besides a step of the full model each, in such steps
  accepted: Bool[Array, "batch length"]  # tokens that are accepted drafts
  # An accepted draft's log-probability less that of the argmax.
  gaps: Float[Array, "batch length"]
  rejected_confidences: Float[Array, "batch length"]  # of refused drafts


@struct.dataclass
class SpeculativeState:
  """The loop's carry."""

  positions: Int[Array, " batch"]  # tokens that each row has generated
  current: Int[Array, " batch"]  # each row's last token or draft, which is read next
  active: Bool[Array, " batch"]
  generation: loop.Generation  # filled up to `positions`
  log_probabilities: Float[Array, "batch length"]  # of the full model's own tokens
  ahead: Int[Array, " batch"]  # tokens that a row's passes emitted beyond one each
  learned: Learned
  pending: Pending
  cache: Any  # every layer's


@dataclasses.dataclass(frozen=True)
class Speculation:
  """Greedy decoding in passes, until EOS or the length limit.

  Attributes:
    threshold: 1 - lambda of `exits.Speculative`, [] or [batch].
    length: most tokens of a text.
    prefix: tokens that rows are forced to begin with, 0 where a row is free, [batch, length];
      None: none. They are read in passes like drafts, end nothing and count for nothing.
    prior: what is expected of a text's drafts before it has any.
  """

  passes: "Passes"
  rule: exits.Speculative
  plan: acceptance.Plan
  threshold: Float[Array, "..."]
  length: int
  eos_id: Any
  prefix: Int[Array, "batch length"] | None = None
  prior: acceptance.Prior = acceptance.UNKNOWN

  def decode(self, active: Bool[Array, " batch"]) -> SpeculativeState:
    """The final state, of every active row; the others stay empty and never vote."""
    state = self.begin(active)
    if self.plan.worth_drafting or self.rule.measures:
      return self.finish(self.go_on(state))
    # Passes that draft nothing say what full depth says, and cost more: they are for slack, and
    # for prefixes, which rows may leave at different positions.
    needed = jnp.any(self.threshold < 1.0)
    if self.prefix is not None:
      needed |= jnp.any(self.prefix > 0)
    return self.finish(lax.cond(needed, self.go_on, self._full_depth, state))

  def _full_depth(self, state: SpeculativeState) -> SpeculativeState:
    """Full depth's own loop instead of passes."""
    made = loop.decode(
      self.passes.step,
      state.cache,
      active=state.active,
      max_decode_length=self.length,
      eos_id=self.eos_id,
    )
    return dataclasses.replace(
      state,
      positions=jnp.sum(made.generation.exit_layers > 0, axis=-1, dtype=jnp.int32),
      current=made.current,
      active=jnp.zeros_like(state.active),
      generation=made.generation,
      log_probabilities=made.log_probabilities,
      cache=made.cache,
    )

  def begin(self, active: Bool[Array, " batch"]) -> SpeculativeState:
    """Before the first token of every row."""
    rows, window, task = len(active), self.rule.window, self.passes.task
    ints, floats = jnp.zeros((rows,), jnp.int32), jnp.zeros((rows,), jnp.float32)
    zero, none = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32)
    columns = jnp.zeros((rows, self.length), jnp.float32)
    drafted = jnp.zeros((rows, window), jnp.float32)
    hidden = jnp.zeros((rows, window, task.config.emb_dim), jnp.dtype(task.config.dtype))
    estimate = acceptance.AcceptanceEstimate.of(self.prior, rows)
    due = zero if self.plan.worth_drafting else jnp.asarray(self.length, jnp.int32)
    return SpeculativeState(
      positions=ints,
      current=ints,
      active=active,
      generation=loop.empty_generation(rows, self.length),
      log_probabilities=columns,
      ahead=ints,
      learned=Learned(estimate, zero, due, ints, none, columns > 0, columns, columns),
      pending=Pending(zero, zero > 0, drafted.astype(jnp.int32), drafted, floats, none, hidden),
      cache=task.empty_caches(),
    )

  def go_on(self, state: SpeculativeState, room: int | None = None) -> SpeculativeState:
    """Passes until every row has ended, or before one that would begin beyond `room`."""
    room = self.length if room is None else room

    def unfinished(state: SpeculativeState) -> jax.Array:
      has_room = jnp.all(~state.active | (state.positions < room))
      return jnp.any(state.active) & has_room

    plain = dataclasses.replace(state.generation, verification=None)
    state = dataclasses.replace(state, generation=plain)
    drafting = lambda state: unfinished(state) & ~state.pending.ended

    def one_pass(state: SpeculativeState) -> SpeculativeState:
      state = lax.while_loop(drafting, self.advance, state)
      return loop.run_if(state.pending.ended, self.verify, state)

    return lax.while_loop(unfinished, one_pass, state)

  def finish(self, state: SpeculativeState) -> SpeculativeState:
    """The state with what its generation says of whole rows."""
    passes = (state.positions - state.ahead).astype(jnp.float32)
    learned, estimate = state.learned, state.learned.estimate
    steps = jnp.full_like(passes, jnp.max(passes) + learned.cost)
    columns = passes, learned.drafts, estimate.chance, estimate.calibration, steps
    numbers = jnp.stack([each.astype(jnp.float32) for each in columns], axis=1)
    # Rows without a pass hold no prompt.
    numbers = jnp.where(passes[:, None] > 0, numbers, 0.0)
    emitted = jnp.arange(self.length, dtype=jnp.int32)[None, :] < state.positions[:, None]
    if self.prefix is not None:
      emitted &= self.prefix == 0
    ratios = jnp.where(learned.accepted, jnp.exp(learned.gaps), 1.0)
    generation = dataclasses.replace(
      state.generation,
      exit_layers=jnp.where(emitted, self.passes.task.config.num_decoder_layers, 0),
      confidences=jnp.where(emitted, ratios, 0.0),
      rejected_confidences=learned.rejected_confidences,
      scores=jnp.sum(state.log_probabilities + learned.gaps, axis=-1),
      verification=loop.Verification(learned.accepted, numbers),
    )
    return dataclasses.replace(state, generation=generation)

  def advance(self, state: SpeculativeState) -> SpeculativeState:
    """One position more of every active row; a pass of one position ends with it."""
    at = state.pending.count
    read, cache = self.passes.read(state.cache, state.current, state.positions + at)
    state = dataclasses.replace(state, cache=cache)
    forced = self._prefix(state.positions + at, 1)[:, 0]
    needed = self._drafts(state) | (at > 0)
    if self.prefix is not None:
      needed |= jnp.any(state.active & (forced > 0))
    go_on = functools.partial(self._draft, state, read, forced)
    pending, current = loop.run_if(needed, go_on, (state.pending, state.current))
    state = dataclasses.replace(state, pending=pending, current=current)
    one = functools.partial(self._verify_one, read=read)
    return loop.run_if(pending.count == 0, one, state)

  @property
  def _every(self) -> jax.Array:
    """Whether every position has a draft: with slack no text may depend on where passes end."""
    return jnp.any(self.threshold < 1.0) | self.rule.measures

  def _drafts(self, state: SpeculativeState) -> jax.Array:
    """Whether the pass makes drafts, []."""
    return self._every | (jnp.max(state.positions - state.ahead) >= state.learned.due)

  def _draft(self, state: SpeculativeState, read: "Read", forced: jax.Array, carry):
    """The position that was read, with the draft after it; whether the pass reads on there."""
    pending, _ = carry
    at, window = pending.count, self.rule.window
    blank = Draft(jnp.zeros_like(state.current), jnp.zeros_like(pending.chances))
    wanted = self._drafts(state) & (self._every | (at + 1 < window))
    made = lax.cond(wanted, self.passes.draft, lambda read: blank, read)
    has_room = state.active & (state.positions + at + 1 < self.length)
    is_forced = has_room & (forced > 0)
    follows = (made.confidence >= self.rule.stop_below) & (made.token != self.eos_id)
    likely = jnp.where(
      has_room & follows & wanted, state.learned.estimate.chances(made.confidence), 0.0
    )
    first, rows = at == 0, state.active.astype(jnp.float32)
    chances = jnp.where(first, rows, pending.chances) * jnp.where(is_forced, 1.0, likely)
    expected = jnp.where(first, jnp.sum(rows), pending.expected)
    mean = state.learned.estimate.mean_chance(state.active)
    goes_on = self.plan.goes_on(at, chances, expected, mean) | jnp.any(is_forced)
    goes_on &= at + 1 < window
    put = lambda array, column: lax.dynamic_update_slice_in_dim(
      array, column[:, None], at, axis=1
    )
    pending = Pending(
      count=at + goes_on.astype(jnp.int32),
      ended=~goes_on & (at > 0),
      tokens=put(pending.tokens, made.token),
      confidences=put(pending.confidences, made.confidence),
      chances=chances,
      expected=expected + jnp.sum(chances),
      hidden=put(pending.hidden, read.hidden),
    )
    return pending, jnp.where(forced > 0, forced, made.token)

  def _verify_one(self, state: SpeculativeState, *, read: "Read") -> SpeculativeState:
    """The end of a pass of one position, which was read."""
    drafts, drafted = self._drafts(state), state.pending.tokens[:, 0]
    best, gap_of, cache = self.passes.verify_one(state.cache, state.positions, read)
    state = dataclasses.replace(state, cache=cache)
    count, made = state.active.astype(jnp.int32), jnp.ones((1,), bool)
    positions, pending = state.positions + count, state.pending

    def judge(carry):
      output = VerifierOutput(best.token, best.log_probability, gap_of(drafted))
      judged = verdict(output, drafted, made[0], self.threshold)
      judged = jax.tree.map(lambda x: x[:, None], judged)
      passes = jnp.max(positions - state.ahead)
      learned = self._learn(carry[1], pending, judged, made, positions, count, passes)
      return judged.token, learned

    # A pass without a draft has to cost as little as a step of the full model.
    token, learned = loop.run_if(drafts, judge, (best.token[:, None], state.learned))
    return self._emit(state, learned, token, best.log_probability[:, None], count)

  def verify(self, state: SpeculativeState) -> SpeculativeState:
    """The end of a pass of several positions."""
    pending, at = state.pending, jnp.arange(self.rule.window, dtype=jnp.int32)
    # Without slack the last of the window has no draft.
    made = (at <= pending.count) & self._drafts(state)
    made &= self._every | (at + 1 < self.rule.window)
    output, cache = self.passes.verify(state.cache, state.positions, pending)
    threshold = self.threshold if self.threshold.ndim == 0 else self.threshold[:, None]
    judged = verdict(output, pending.tokens, made[None], threshold)
    inside = jnp.minimum(pending.count + 1, self.length - state.positions)
    count = self._accepted(state, judged, jnp.where(state.active, inside, 0))
    # One after the other, or a thread would be woken for half of it.
    positions = engine.after(state.positions, output.log_probability)
    moved, ahead = positions + count, state.ahead + jnp.maximum(count - 1, 0)
    learn = lambda learned: self._learn(
      learned, pending, judged, made, moved, count, jnp.max(moved - ahead)
    )
    learned = loop.run_if(made[0], learn, state.learned)
    state = dataclasses.replace(
      state,
      positions=positions,
      cache=cache,
      ahead=ahead,
      pending=dataclasses.replace(
        pending, count=jnp.zeros_like(pending.count), ended=~pending.ended
      ),
    )
    return self._emit(state, learned, judged.token, output.log_probability, count)

  def _accepted(self, state: SpeculativeState, judged: Verdict, most: jax.Array):
    """How many positions of a pass become tokens, at most `most` [batch]: up to the first whose
    token is not what the next position read, or ends the row."""
    forced = self._prefix(state.positions, judged.token.shape[1])
    ends = (judged.token == self.eos_id) & (forced == 0)
    leads = (judged.accepted | (forced > 0)) & ~ends
    positions = leads.shape[1]
    at = jnp.arange(positions, dtype=jnp.int32)[None, :]
    last = jnp.min(jnp.where(leads, positions, at), axis=1)  # the first that leads nowhere
    return jnp.minimum(last + 1, most)

  def _emit(
    self, state: SpeculativeState, learned: Learned, token, log_probability, count: jax.Array
  ) -> SpeculativeState:
    """The state after a pass, of whose tokens [batch, positions] `count` are emitted."""
    size = token.shape[1]
    forced, at = self._prefix(state.positions, size), np.arange(size)[None]
    free, token = forced == 0, jnp.where(forced > 0, forced, token)
    put = lambda array, columns: write_columns(array, columns, state.positions, count)
    generation = dataclasses.replace(
      state.generation, tokens=put(state.generation.tokens, token)
    )
    last = jnp.sum(jnp.where(at == count[:, None] - 1, token, 0), axis=1)
    positions = state.positions + count
    ends = (at < count[:, None]) & (token == self.eos_id) & free
    return dataclasses.replace(
      state,
      positions=positions,
      current=jnp.where(count > 0, last, state.current),
      active=state.active & ~jnp.any(ends, axis=1) & (positions < self.length),
      generation=generation,
      log_probabilities=put(state.log_probabilities, jnp.where(free, log_probability, 0.0)),
      learned=learned,
    )

  def _learn(
    self, learned: Learned, pending: Pending, verdict, made, positions, count, passes
  ) -> Learned:
    """With what became of a pass's drafts: `made` [positions] have one, `count` [batch] are
    emitted, after which rows are at `positions` [batch] and there were `passes` []."""
    size, old, positions = len(made), learned, positions - count
    free = self._prefix(positions, size) == 0
    tried = made[None] & free & (np.arange(size)[None] < count[:, None])
    confidences = pending.confidences[:, :size]
    accepted = tried & verdict.accepted
    estimate = old.estimate.update(tried, accepted, confidences)
    miss_streak = jnp.where(jnp.any(count > 1), 0, old.miss_streak + 1)
    put = lambda array, columns: write_columns(array, columns, positions, count)
    refused = jnp.where(free, verdict.rejected_confidence, 0.0)
    number = jnp.where(count > 0, jnp.sum(made, dtype=jnp.int32), 0)
    return Learned(
      estimate=estimate,
      miss_streak=miss_streak,
      due=passes + self.plan.backoff(miss_streak, estimate.mean_chance(count > 0)),
      # Not all at once, or a thread would be woken for half of it.
      drafts=old.drafts + engine.after(number, estimate.sums),
      cost=old.cost + self.plan.extra_cost(pending.count + 1),
      accepted=put(old.accepted, accepted),
      gaps=put(old.gaps, jnp.where(accepted, verdict.gap, 0.0)),
      rejected_confidences=put(old.rejected_confidences, refused),
    )

  def _prefix(self, positions: jax.Array, count: int) -> jax.Array:
    """The prefix at `count` positions of each row, [batch, count]; 0 where a row is free."""
    if self.prefix is None:
      return jnp.zeros((len(positions), count), jnp.int32)
    padded = jnp.pad(self.prefix, ((0, 0), (0, self.rule.window)))
    return jnp.take_along_axis(padded, positions[:, None] + np.arange(count)[None, :], axis=1)


def write_columns(
  array: Shaped[Array, "batch length"],
  columns: Shaped[Array, "batch positions"],
  positions: Int[Array, " batch"],
  count: Int[Array, " batch"],
) -> Shaped[Array, "batch length"]:
  """`array` with the first `count` of `columns` at each row's position."""
  at = jnp.arange(array.shape[1], dtype=jnp.int32)[None, :] - positions[:, None]
  new = columns
  if columns.shape[1] > 1:
    new = jnp.take_along_axis(columns, jnp.clip(at, 0, columns.shape[1] - 1), axis=1)
  return jnp.where((at >= 0) & (at < count[:, None]), new.astype(array.dtype), array)


@struct.dataclass
class Read:
  """A position of every row after the first layers."""

  hidden: jax.Array  # d^k, [batch, emb]
  past: tuple[jax.Array, ...]  # biases of the keys before it, for all layers or each


@dataclasses.dataclass(frozen=True)
class Passes:
  """A T5 decoder's part of a pass. Rows have `positions` [batch] of their own."""

  task: engines.Task
  rule: exits.Speculative
  table: attention_lib.BiasTable

  def read(self, cache, token: jax.Array, positions: jax.Array) -> tuple[Read, Any]:
    """Layers 1 ... k on `token` [batch], and the caches after it."""
    k = self.rule.draft_layer
    past = self.table.before_each(positions, self.task.native)
    hidden, rows = self._one(1, self.task.embed(token), cache[:k], past)
    lower = self._written(cache[:k], rows, positions, hidden)
    return Read(hidden, past), (*lower, *cache[k:])

  def draft(self, read: Read) -> Draft:
    """What the draft head says of a position that was read, [batch]."""
    decoder, weights, layer = self._decoder(), self.task.weights, self.rule.draft_layer
    seen = decoder.read(layer, read.hidden)
    if self.rule.draft_head == "shortlist":
      logits = decoder.shortlist_logits(seen)
      return draft(logits, weights.shortlist_ids)
    best = decoder.greedy(seen)
    if best is not None:
      return Draft(best.token, jnp.exp(best.log_probability))
    return draft(decoder.logits(seen), None)

  def verify(self, cache, positions: jax.Array, pending: Pending) -> tuple[VerifierOutput, Any]:
    """The other layers and the head over a window, [batch, window], and the caches."""
    lower, upper = cache[: self.rule.draft_layer], cache[self.rule.draft_layer :]
    hidden, upper = self._several(pending.hidden, upper, positions)
    best, gap = self._said(hidden)
    output = best.token, best.log_probability, gap(pending.tokens.reshape(-1))
    output = (x.reshape(pending.tokens.shape) for x in output)
    return VerifierOutput(*output), (*lower, *upper)

  def verify_one(
    self, cache, positions: jax.Array, read: Read
  ) -> tuple[Greedy, Callable[[jax.Array], jax.Array], Any]:
    """The same of one position that was read; in place of a gap, the gap of any token."""
    lower, upper = cache[: self.rule.draft_layer], cache[self.rule.draft_layer :]
    hidden, rows = self._one(self.rule.draft_layer + 1, read.hidden, upper, read.past)
    upper = self._written(upper, rows, positions, hidden)
    return *self._said(hidden), (*lower, *upper)

  @functools.cached_property
  def step(self) -> loop.Step:
    """One token at full depth of rows that are all at one position."""
    static = dataclasses.replace(self.task, rule=exits.StaticExit())
    return engines.Eager()(static).take_step

  def _said(self, hidden: jax.Array) -> tuple[Greedy, Callable[[jax.Array], jax.Array]]:
    """The likeliest token, and how far the logit of any token is above its."""
    decoder, last = self._decoder(), self.task.config.num_decoder_layers
    read = decoder.read(last, hidden)
    if isinstance(self.task.weights.head, eight_bits.QuantizedHead):
      best = decoder.greedy(read)
      assert best is not None  # so says the head
      score = lambda token: decoder.score(read, token)
    else:
      logits = decoder.logits(read)
      best = greedy(logits)
      score = lambda token: jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
    return best, lambda token: score(token) - score(best.token)

  def _one(self, first: int, hidden: jax.Array, caches, past: tuple[jax.Array, ...]):
    """Layers from `first` on over one position of every row, [batch, emb]; then their rows."""
    decoder, rows = self._decoder(past), []
    for layer, cache in enumerate(caches, start=first):
      hidden, row = decoder.run(layer, hidden, cache)
      rows.append(jax.tree.map(lambda x: x[:, :, None], row))
    return hidden, rows

  def _several(self, states: jax.Array, caches, positions: jax.Array):
    """Layers k + 1 ... L over positions [batch, positions, emb]: [rows, emb], and caches."""
    task, decoder = self.task, self._decoder()
    biases = self.table.of_windows(positions, states.shape[1], task.native)
    hidden, written = states.reshape(-1, states.shape[-1]), []
    for layer, cache in enumerate(caches, start=self.rule.draft_layer + 1):
      row = decoder.project(layer, hidden)
      window = jax.tree.map(lambda x: attention_lib.by_window(x, task.batch_size), row)
      written.append(attention_lib.write_window(cache, window, positions))
      attention = attention_lib.WindowAttention(
        written[-1],
        attention_lib.of_layer(biases, layer),
        task.encoded.cross[layer - 1],
        task.encoded.bias,
        task.config.float32_attention_logits,
        task.native,
        decoder.single_threaded(hidden),
      )
      hidden = decoder.run_projected(layer, hidden, row, attention)
    return hidden, tuple(written)

  def _written(self, caches, rows, positions: jax.Array, last: jax.Array):
    """Every layer's cache with its row written at `positions`, once that leads to `last`."""
    each = zip(caches, rows, engine.after_each(positions, rows, last), strict=True)
    return tuple(attention_lib.write_window(cache, row, where) for cache, row, where in each)

  def _decoder(self, past: tuple[jax.Array, ...] = ()) -> decoder_lib.DecoderStep:
    """The decoder at one position of every row, `past` the biases of the keys before it."""
    task = self.task
    return decoder_lib.DecoderStep(
      task.weights, task.config, task.encoded, past, self.table.current, task.native
    )


def bind(
  task: engines.Task, rule: exits.Speculative, eos_id: Any, length: int | None = None
) -> Speculation:
  """The loop at work on a task, with `length` tokens a text (None: the task's).

  Raises:
    ValueError: the rule does not fit the model, or wants a shortlist that it has not.
  """
  rule.depth(task.config.num_decoder_layers)
  if rule.draft_head == "shortlist" and task.weights.shortlist is None:
    raise ValueError(
      "Expected a model with a shortlist of likely tokens for `draft_head` 'shortlist', got"
      " none; give `shortlist` (token ids), or use `draft_head='full'`."
    )
  # So that the passes that rows wait through once theirs has ended have room.
  roomy = dataclasses.replace(task, length=cache_length(rule, task.length))
  table = attention_lib.bias_table(task.weights, task.config, roomy.length)
  plan = acceptance.plan(task.config, task.weights, rule, task.batch_size, task.native)
  passes = Passes(roomy, rule, table)
  return Speculation(passes, rule, plan, task.threshold, length or task.length, eos_id)


def cache_length(rule: exits.Speculative, length: int) -> int:
  """Positions of the caches of passes that begin at one of the first `length`."""
  return length + rule.window
