"""Passes over drafted tokens: a loop that drafts, verifies and accepts. Knows no network.

A pass reads token after token with the first layers (`Passes.read`) and drafts the next one
(`Passes.look`), runs the others over all of those positions at once (`Passes.verify`), and
emits what `exits.verified` accepts and the full model's own token after it. The loop goes from
position to position: a pass that does not read on from its first draft ends like a step of the
full model (`Passes.verify_one`). Every row has a position of its own. What was written of
drafts that are refused is written over before it is read.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from calm import exits
from calm.decode import drafting, loop, ordering, verified_rows, verified_steps
from calm.decode.verified_lessons import Lesson, counted, taught
from calm.decode.verified_state import Drafted, Passes, VerifiedState


@dataclasses.dataclass(frozen=True)
class Verifying:
  """Greedy decoding in passes, until EOS or the length limit.

  Attributes:
    passes: the decoder.
    rule: how many tokens are drafted, and until when.
    plan: how many positions a pass should have, from how often drafts were accepted.
    threshold: 1 - lambda of `exits.Verified`, [] or [batch].
    length: most tokens of a text.
    eos_id: the token that ends a row.
    prefix: tokens that every row is given, 0 where it is free, [batch, length]; None: none.
      They are read in passes like drafts, end nothing and count for nothing.
    prior: what is expected of a text's drafts before it has any.
  """

  passes: Passes
  rule: exits.Verified
  plan: drafting.Plan
  threshold: Float[Array, "..."]
  length: int
  eos_id: Any
  prefix: Int[Array, "batch length"] | None = None
  prior: drafting.Prior = drafting.UNKNOWN

  def decode(self, active: Bool[Array, " batch"]) -> VerifiedState:
    """Decodes every active row; the others stay empty and never vote.

    Returns:
      The final state; its `generation` holds the result.
    """
    return self.summed(self.go_on(self.begin(active)))

  def go_on(self, state: VerifiedState, room: int | None = None) -> VerifiedState:
    """Passes until every row has ended.

    Args:
      state: of `begin` or of this.
      room: positions that a pass may begin at, where the caches have room for fewer than the
        text: ends before one that would begin beyond. None: the text's.
    """
    steps = self._steps(room)
    goes_on = functools.partial(self.run, goes_on=steps.unfinished)
    if self.plan.hopes or self.rule.measures:  # else a text waits to its end, but for slack
      return lax.while_loop(steps.unfinished, goes_on, state)

    def due(state: VerifiedState) -> jax.Array:
      return jnp.where(self._every, 0, steps.due(state))

    def turn(state: VerifiedState) -> VerifiedState:
      state = steps.take(state, due(state))
      drafts = lambda state: steps.unfinished(state) & (due(state) <= 0)
      return lax.while_loop(drafts, functools.partial(self.run, goes_on=drafts), state)

    return lax.while_loop(steps.unfinished, turn, state)

  def _steps(self, room: int | None = None) -> verified_steps.Steps:
    """Steps of the full model, and how many positions there may be."""
    room = self.length if room is None else room
    return verified_steps.Steps(self.passes.step, room, self.eos_id, self.prefix)

  def summed(self, state: VerifiedState) -> VerifiedState:
    """The state with what its generation says of whole rows."""
    seen, odds = self._seen(state), state.odds
    passes = state.positions - state.ahead
    steps = jnp.full_like(odds.share, jnp.max(passes).astype(jnp.float32) + state.cost)
    expected = jnp.stack([odds.share, odds.trust, steps], axis=1)
    # Rows without a pass hold no prompt.
    expected = jnp.where(passes[:, None] > 0, expected, 0.0)
    counts = jnp.where(np.arange(2)[None] == 0, passes[:, None], seen.counts)
    generation = dataclasses.replace(
      state.generation,
      exit_layers=self._exit_layers(state.positions),
      scores=jnp.sum(state.log_probabilities, axis=-1),
      verification=dataclasses.replace(seen, counts=counts, expected=expected),
    )
    return dataclasses.replace(state, generation=generation)

  def _exit_layers(self, positions: jax.Array) -> jax.Array:
    """The last layer where a row has generated a token, [batch, length]."""
    emitted = jnp.arange(self.length, dtype=jnp.int32)[None, :] < positions[:, None]
    if self.prefix is not None:
      emitted &= self.prefix == 0
    return jnp.where(emitted, self.passes.num_layers, 0)

  @property
  def _every(self) -> jax.Array:
    """Whether every position has a draft: with slack, a text must not depend on where passes
    end, and where they are measured."""
    return jnp.any(self.threshold < 1.0) | self.rule.measures

  def begin(self, active: Bool[Array, " batch"]) -> VerifiedState:
    """Before the first token of every row."""
    odds = drafting.Odds.none(len(active), self.prior)
    zeros, none = jnp.zeros(active.shape, jnp.int32), jnp.zeros((), jnp.int32)
    pairs, triples = (jnp.zeros((len(active), n), jnp.float32) for n in (2, 3))
    columns = jnp.zeros((len(active), self.length), jnp.float32)
    verification = loop.Verification(columns > 0, pairs.astype(jnp.int32), triples)
    generation = loop.empty_generation(len(active), self.length)
    return VerifiedState(
      active=active,
      odds=odds,
      planned=self.plan(odds, active),
      positions=zeros,
      current=zeros,
      generation=dataclasses.replace(generation, verification=verification),
      log_probabilities=columns,
      ahead=zeros,
      idle=none,
      waits=none if self.plan.hopes else jnp.asarray(self.length, jnp.int32),
      cost=none.astype(jnp.float32),
      drafted=self._room(active),
      cache=self.passes.empty(),
    )

  def _room(self, active: jax.Array) -> Drafted:
    """That of the first pass of all."""
    shape = len(active), self.rule.window
    floats = jnp.zeros(active.shape, jnp.float32)
    return Drafted(
      ended=jnp.zeros((), bool),
      count=jnp.zeros((), jnp.int32),
      tokens=jnp.zeros(shape, jnp.int32),
      confidences=jnp.zeros(shape, jnp.float32),
      reach=drafting.Reach(floats, jnp.zeros((), jnp.float32)),
      gap=floats,
      work=self.passes.room(len(active)),
    )

  def run(self, state: VerifiedState, goes_on: Callable[..., jax.Array] | None = None):
    """Positions until a pass that drafts has ended, and what it makes of its drafts; passes
    that draft nothing go before it.

    Args:
      state: between two passes.
      goes_on: (state) -> [] bool, whether there is another position. None: until the end.
    """
    more = goes_on or self._steps().unfinished
    positions = lambda state: more(state) & ~state.drafted.ended
    state = lax.while_loop(positions, self._position, state)
    ended, several = state.drafted.ended, state.drafted.count > 0
    if not self.passes.shortens:
      return loop.run_if(ended, self._verify, state)
    state = loop.run_if(ended & several, self._verify, state)
    return loop.run_if(ended & ~several, self._judge, state)

  def _position(self, state: VerifiedState) -> VerifiedState:
    """One position more of every active row; its pass goes on from there, or ends."""
    at = state.drafted.count
    read, cache = self.passes.read(state.cache, state.current, state.positions + at)
    state = self._look(dataclasses.replace(state, cache=cache), read)
    if not self.passes.shortens:
      return state
    # A pass that reads on from no draft is like a step of the full model, and has to cost as
    # little.
    one = functools.partial(self._verify_one, read=read)
    return loop.run_if(state.drafted.count == 0, one, state)

  def _drafts(self, state: VerifiedState) -> jax.Array:
    """Whether the pass makes drafts, []."""
    return self._every | (state.waits <= 0)

  def _glances(self, state: VerifiedState) -> jax.Array:
    """Whether the next draft is made once the full model has spoken, []: where not even a
    certain one would be read on from, what it teaches costs less then."""
    return ~self._every & (state.planned.opening >= 1.0)

  def _look(self, state: VerifiedState, read: Any) -> VerifiedState:
    """The state with the draft after a position, where one is made."""
    known = self._given(state.positions + state.drafted.count, 1)[:, 0]
    look = functools.partial(self._looked, state, read, known)
    carry = state.drafted, state.current
    if self.passes.shortens:
      needed = self._drafts(state) & ~self._glances(state)
      if self.prefix is not None:
        needed |= (state.drafted.count > 0) | jnp.any(state.active & (known > 0))
      drafted, current = loop.run_if(needed, look, carry)
    else:
      drafted, current = look(carry)
    return dataclasses.replace(state, drafted=drafted, current=current)

  def _looked(self, state: VerifiedState, read, known: jax.Array, carry):
    """`_look` where a draft is made, or the position kept; `known` is what rows are given."""
    now, at = carry[0], carry[0].count
    nothing = exits.verified.Draft(
      jnp.zeros_like(state.current), jnp.zeros(state.current.shape, jnp.float32)
    )
    wanted = self._drafts(state) & (self._every | (at + 1 < self.rule.window))
    made = lax.cond(wanted, self.passes.look, lambda read: nothing, read)
    has_room = state.active & (state.positions + at + 1 < self.length)
    is_given = has_room & (known > 0)
    follows = (made.confidence >= self.rule.stop_below) & (made.token != self.eos_id)
    likely = has_room & follows & wanted
    chances = jnp.where(likely, state.planned.chance(made.confidence), 0.0)
    first = drafting.Reach.of_first(state.active)
    reach = jax.tree.map(lambda a, b: jnp.where(at == 0, a, b), first, now.reach)
    reach = reach.after(jnp.where(is_given, 1.0, chances))
    goes_on = state.planned.goes_on(at, reach) | jnp.any(is_given)
    goes_on &= at + 1 < self.rule.window
    put = lambda array, column: lax.dynamic_update_slice_in_dim(
      array, column[:, None], at, axis=1
    )
    drafted = dataclasses.replace(
      now,
      ended=~goes_on,
      count=at + goes_on.astype(jnp.int32),
      tokens=put(now.tokens, made.token),
      confidences=put(now.confidences, made.confidence),
      reach=reach.extended(),
      work=self.passes.keep(now.work, read, at),
    )
    return drafted, jnp.where(known > 0, known, made.token)

  def _verify_one(self, state: VerifiedState, *, read: Any) -> VerifiedState:
    """The end of a pass of one position, which was read. Where it has a draft, that is still to
    be judged: what the full model says is written, and rows do not go on."""
    now = state.drafted
    best, gap, cache = self.passes.verify_one(state.cache, state.positions, read)
    found = lax.cond(now.ended, lambda: gap(now.tokens[:, 0]), lambda: now.gap)
    given, due = self._given(state.positions, 1), self._drafts(state)
    state = dataclasses.replace(
      state,
      cache=cache,
      drafted=dataclasses.replace(now, gap=found),
      waits=state.waits - (~now.ended).astype(jnp.int32),
    )
    glanced = functools.partial(self._glanced, read=read, best=best, free=given == 0)
    state = loop.run_if(due & ~now.ended, glanced, state)
    plain = jax.tree.map(lambda x: x[:, None], exits.verified.undrafted(best))
    verdict, count = verified_rows.obeying(plain, given), state.active.astype(jnp.int32)
    return self._recorded(state, verdict, given == 0, count, stays=now.ended)

  def _glanced(self, state: VerifiedState, *, read: Any, best, free) -> VerifiedState:
    """The state with what a draft that no pass can use teaches: of a position that was read, of
    which the full model says `best`; `free` [batch, 1] rows are not given it."""
    made, column = self.passes.look(read), lambda array: array[:, None]
    lesson = Lesson(
      column(state.active) & free, column(made.token == best.token), column(made.confidence)
    )
    count, is_made = state.active.astype(jnp.int32), jnp.ones(1, bool)
    state = taught(
      state, self.plan, lesson, drafts=is_made[0], count=count, besides=drafting.LOOK
    )
    seen = counted(self._seen(state), state, lesson, is_made, count)
    generation = dataclasses.replace(state.generation, verification=seen)
    return dataclasses.replace(state, generation=generation)

  def _judge(self, state: VerifiedState) -> VerifiedState:
    """What becomes of the draft of a pass of one position."""
    now, drafts, given = state.drafted, self._drafts(state), self._given(state.positions, 1)
    column = lambda array: array[:, None]
    # Its log-probability is written already: beyond that there is what slack changes.
    written = jnp.zeros_like(now.gap)
    said = exits.verified.Said(*map(column, (state.current, written, now.gap)))
    threshold = self._per_row(self.threshold)
    verdict = exits.verified.verdict(said, now.tokens[:, :1], drafts, threshold)
    verdict = verified_rows.obeying(verdict, given)
    count = state.active.astype(jnp.int32)
    # One after the other, or a thread would be woken for half of it.
    positions = ordering.after(state.positions, verdict.log_probability)
    state = dataclasses.replace(state, positions=positions)
    looked = jnp.where(drafts, self.plan.besides(1), 0.0)
    state = self._learned(state, verdict, drafts[None], given == 0, count, looked)
    return self._recorded(state, verdict, given == 0, count)

  def _verify(self, state: VerifiedState) -> VerifiedState:
    """The end of a pass of several positions."""
    at = jnp.arange(self.rule.window, dtype=jnp.int32)
    now, drafts = state.drafted, self._drafts(state)
    # Without slack the last of the window has no draft.
    made = (at <= now.count) & drafts & (self._every | (at + 1 < self.rule.window))
    threshold = self._per_row(self.threshold)
    verdict, cache = self.passes.verify(state.cache, state.positions, now, made, threshold)
    given = self._given(state.positions, self.rule.window)
    verdict = verified_rows.obeying(verdict, given)
    inside = jnp.minimum(now.count + 1, self.length - state.positions)
    leads = verdict.accepted & ((verdict.token != self.eos_id) | (given > 0))
    count = verified_rows.count(leads, jnp.where(state.active, inside, 0))
    state = dataclasses.replace(
      state,
      # What is told of the pass begins once that is known, not all of it beside the layers.
      positions=ordering.after(state.positions, verdict.log_probability),
      ahead=state.ahead + jnp.maximum(count - 1, 0),
      drafted=dataclasses.replace(now, count=jnp.zeros_like(now.count)),
      cache=cache,
    )
    took = self.plan.besides(now.count + 1)
    state = self._learned(state, verdict, made, given == 0, count, took)
    return self._recorded(state, verdict, given == 0, count)

  def _learned(
    self, state: VerifiedState, verdict, made: jax.Array, free, count, besides
  ) -> VerifiedState:
    """The state with what became of a pass's drafts.

    Args:
      state: before the pass has ended.
      verdict: of its positions, [batch, positions].
      made: which of them have a draft, [positions].
      free: which of them a row is not given, [batch, positions].
      count: how many of them a row emits, [batch].
      besides: what the pass took besides a step, [].
    """
    put = lambda array, columns: verified_rows.put(array, columns, state.positions, count)
    tried = made[None] & free & (np.arange(len(made))[None] < count[:, None])
    lesson = Lesson(tried, verdict.accepted, state.drafted.confidences[:, : len(made)])
    drafts, generation = self._drafts(state), state.generation
    state = taught(state, self.plan, lesson, drafts=drafts, count=count, besides=besides)
    generation = dataclasses.replace(
      generation,
      rejected_confidences=put(generation.rejected_confidences, verdict.rejected_confidence),
      verification=counted(self._seen(state), state, lesson, made, count),
    )
    drafted = dataclasses.replace(state.drafted, ended=jnp.zeros((), bool))
    return dataclasses.replace(state, generation=generation, drafted=drafted)

  def _recorded(
    self, state: VerifiedState, verdict, free: jax.Array, count: jax.Array, stays: Any = None
  ) -> VerifiedState:
    """The state with the tokens of a pass.

    Args:
      state: before.
      verdict: of its positions, [batch, positions].
      free: which of them a row is not given, [batch, positions].
      count: how many of them a row emits, [batch].
      stays: whether rows do not go on from them yet, [] bool; None: they do.
    """
    old, width = state.generation, free.shape[1]
    put = lambda array, columns: verified_rows.put(array, columns, state.positions, count)
    generation = dataclasses.replace(
      old,
      tokens=put(old.tokens, verdict.token),
      confidences=put(old.confidences, verdict.confidence),
    )
    # Zeros but for what a judged draft's pass has written there.
    written = jnp.zeros_like(state.log_probabilities)
    log_probabilities = state.log_probabilities + put(written, verdict.log_probability)
    if stays is None:
      # What the pass says besides is asked for once that is written, not all of it at once.
      count = ordering.after(count, log_probabilities)
    at = np.arange(width)[None]
    last = jnp.sum(jnp.where(at == count[:, None] - 1, verdict.token, 0), axis=1)
    moved = count if stays is None else jnp.where(stays, 0, count)
    ends = (at < moved[:, None]) & (verdict.token == self.eos_id) & free
    positions = state.positions + moved
    return dataclasses.replace(
      state,
      positions=positions,
      current=jnp.where(count > 0, last, state.current),
      active=state.active & ~jnp.any(ends, axis=1) & (positions < self.length),
      generation=generation,
      log_probabilities=log_probabilities,
    )

  def _given(self, positions: jax.Array, count: int) -> jax.Array:
    """The prefix at so many positions of each row, [batch, count]; 0 where a row is free."""
    return verified_rows.given(self.prefix, positions, count, self.rule.window)

  def _seen(self, state: VerifiedState) -> loop.Verification:
    assert state.generation.verification is not None  # `decode` made it
    return state.generation.verification

  def _per_row(self, threshold: jax.Array) -> jax.Array:
    """[] or [batch, 1]."""
    return threshold if threshold.ndim == 0 else threshold[:, None]
