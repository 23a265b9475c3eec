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
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from calm import exits
from calm.decode import drafting, loop, ordering, verified_steps
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
    steps = verified_steps.Steps(
      self.passes.step, self.length if room is None else room, self.eos_id, self.prefix
    )
    if self.plan.hopes or self.rule.measures:  # else a text waits to its end, but for slack
      return lax.while_loop(steps.unfinished, self.run, state)

    def due(state: VerifiedState) -> jax.Array:
      return jnp.where(self._every, 0, steps.due(state))

    def turn(state: VerifiedState) -> VerifiedState:
      state = steps.take(state, due(state))
      drafts = lambda state: steps.unfinished(state) & (due(state) <= 0)
      return lax.while_loop(drafts, self.run, state)

    return lax.while_loop(steps.unfinished, turn, state)

  def summed(self, state: VerifiedState) -> VerifiedState:
    """The state with what its generation says of whole rows."""
    seen, odds = self._seen(state), state.odds
    # Rows without a pass hold no prompt.
    passes = jnp.max(seen.counts[:, 0]).astype(jnp.float32)
    steps = jnp.full_like(odds.share, passes + state.cost)
    expected = jnp.stack([odds.share, odds.trust, steps], axis=1)
    expected = jnp.where(seen.counts[:, :1] > 0, expected, 0.0)
    generation = dataclasses.replace(
      state.generation,
      exit_layers=self._exit_layers(state.positions),
      scores=jnp.sum(state.log_probabilities, axis=-1),
      verification=dataclasses.replace(seen, expected=expected),
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
    empty = dict(
      positions=zeros,
      current=zeros,
      generation=dataclasses.replace(generation, verification=verification),
      log_probabilities=columns,
      idle=none,
      waits=none,
      cost=none.astype(jnp.float32),
      drafted=self._room(active),
      cache=self.passes.empty(),
    )
    made = self.passes.zeros_like(empty)
    if not self.plan.hopes:
      made["waits"] = jnp.asarray(self.length, jnp.int32)
    return VerifiedState(active=active, odds=odds, planned=self.plan(odds, active), **made)

  def _room(self, active: jax.Array) -> Drafted:
    """That of the first pass of all."""
    shape = len(active), self.rule.window
    return Drafted(
      count=jnp.zeros((), jnp.int32),
      tokens=jnp.zeros(shape, jnp.int32),
      confidences=jnp.zeros(shape, jnp.float32),
      reach=drafting.Reach(jnp.zeros(active.shape, jnp.float32), jnp.zeros((), jnp.float32)),
      work=self.passes.room(len(active)),
    )

  def run(self, state: VerifiedState) -> VerifiedState:
    """One position more of every active row; its pass goes on from there, or ends."""
    at, drafts = state.drafted.count, self._every | (state.waits <= 0)
    read, cache = self.passes.read(state.cache, state.current, state.positions + at)
    state = dataclasses.replace(state, cache=cache)
    state, goes_on = self._look(state, read, drafts)
    several = functools.partial(self._verify, drafts=drafts)
    if not self.passes.shortens:
      return loop.run_if(~goes_on, several, state)
    one = functools.partial(self._verify_one, read=read, drafts=drafts)
    # A pass that reads on from no draft is like a step of the full model, and has to cost as
    # little: it is told of by itself.
    state = loop.run_if(~goes_on & (at == 0), one, state)
    return loop.run_if(~goes_on & (at > 0), several, state)

  def _look(self, state: VerifiedState, read: Any, drafts: jax.Array):
    """The state with the draft after a position, where one is made, and whether the pass reads
    on from there."""
    at = state.drafted.count
    wanted = drafts & (self._every | (at + 1 < self.rule.window))
    known = self._given(state.positions + at, 1)[:, 0]
    look = functools.partial(self._looked, state, read, wanted, known)
    carry = state.drafted, state.current, jnp.zeros((), bool)
    if self.passes.shortens:
      needed = wanted | (at > 0)
      if self.prefix is not None:
        needed |= jnp.any(state.active & (known > 0))
      drafted, current, goes_on = loop.run_if(needed, look, carry)
    else:
      drafted, current, goes_on = look(carry)
    return dataclasses.replace(state, drafted=drafted, current=current), goes_on

  def _looked(self, state: VerifiedState, read, wanted, known: jax.Array, carry):
    """`_look` where a draft is made, or the position kept; `known` is what rows are given."""
    now, at = carry[0], state.drafted.count
    nothing = exits.verified.Draft(
      jnp.zeros_like(state.current), jnp.zeros(state.current.shape, jnp.float32)
    )
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
    drafted = Drafted(
      count=at + goes_on.astype(jnp.int32),
      tokens=put(now.tokens, made.token),
      confidences=put(now.confidences, made.confidence),
      reach=reach.extended(),
      work=self.passes.keep(now.work, read, at),
    )
    return drafted, jnp.where(known > 0, known, made.token), goes_on

  def _verify_one(self, state: VerifiedState, *, read: Any, drafts: jax.Array):
    """The end of a pass of one position, which was read."""
    draft = state.drafted.tokens[:, 0]
    best, gap, cache = self.passes.verify_one(state.cache, state.positions, read, draft)
    state = dataclasses.replace(state, cache=cache)
    columns = lambda made: jax.tree.map(lambda x: x[:, None], made)
    given, count = self._given(state.positions, 1), state.active.astype(jnp.int32)

    def judged(carry):
      said = exits.verified.Said(best.token, best.log_probability, gap(draft))
      threshold = self._per_row(self.threshold)
      verdict = exits.verified.verdict(columns(said), draft[:, None], drafts, threshold)
      verdict = _obeying(verdict, given)
      tried = drafts & (given == 0)
      return self._learned(carry[0], verdict, tried, count, drafts), verdict

    plain = _obeying(columns(exits.verified.undrafted(best)), given)
    state, verdict = loop.run_if(drafts, judged, (state, plain))
    return self._recorded(state, verdict, drafts[None], given == 0, count)

  def _verify(self, state: VerifiedState, *, drafts: jax.Array):
    """The end of a pass of several positions."""
    at, now = jnp.arange(self.rule.window, dtype=jnp.int32), state.drafted
    # Without slack the last of the window has no draft.
    made = (at <= now.count) & drafts & (self._every | (at + 1 < self.rule.window))
    threshold = self._per_row(self.threshold)
    verdict, cache = self.passes.verify(state.cache, state.positions, now, made, threshold)
    given = self._given(state.positions, self.rule.window)
    verdict = _obeying(verdict, given)
    inside = jnp.minimum(now.count + 1, self.length - state.positions)
    leads = verdict.accepted & ((verdict.token != self.eos_id) | (given > 0))
    count = _count(leads, jnp.where(state.active, inside, 0))
    state = dataclasses.replace(
      state,
      # What is told of the pass begins once that is known, not all of it beside the layers.
      positions=ordering.after(state.positions, verdict.log_probability),
      drafted=dataclasses.replace(now, count=jnp.zeros((), jnp.int32)),
      cache=cache,
    )
    state = self._learned(
      state, verdict, made[None] & (given == 0), count, drafts, now.count + 1
    )
    return self._recorded(state, verdict, made, given == 0, count)

  def _learned(
    self, state: VerifiedState, verdict, tried: jax.Array, count, drafts, positions: Any = 1
  ) -> VerifiedState:
    """The state with what became of a pass's drafts.

    Args:
      state: before the pass has ended.
      verdict: of its positions, [batch, positions].
      tried: which of them have a draft, [batch, positions].
      count: how many of them a row emits, [batch].
      drafts: whether the pass makes drafts, [].
      positions: that the pass has, [].
    """
    put = lambda array, columns: _put(array, columns, state.positions, count)
    tried &= np.arange(tried.shape[1])[None] < count[:, None]
    generation, seen = state.generation, self._seen(state)
    generation = dataclasses.replace(
      generation,
      rejected_confidences=put(generation.rejected_confidences, verdict.rejected_confidence),
      verification=dataclasses.replace(
        seen, drafted=put(seen.drafted, verdict.accepted & tried)
      ),
    )
    # One that was only looked at, and right, is as good.
    looked = jnp.any(verdict.accepted & tried) & drafting.looks(state.odds, state.active)
    idle = jnp.where(jnp.any(count > 1) | looked, 0, state.idle + drafts.astype(jnp.int32))
    confidences = state.drafted.confidences[:, : tried.shape[1]]
    odds = state.odds.add(tried, verdict.accepted, confidences)
    waits = self.plan.waits(idle, odds, state.active)
    return dataclasses.replace(
      state,
      generation=generation,
      odds=odds,
      idle=idle,
      waits=jnp.where(drafts, waits + 1, state.waits),  # less this pass
      cost=state.cost + self.plan.besides(positions),
      planned=self.plan(odds, state.active),
    )

  def _recorded(self, state: VerifiedState, verdict, made: jax.Array, free, count):
    """The state with the tokens of a pass.

    Args:
      state: before.
      verdict: of its positions, [batch, positions].
      made: which of them have a draft, [positions].
      free: which of them a row is not given, [batch, positions].
      count: how many of them a row emits, [batch].
    """
    old, seen = state.generation, self._seen(state)
    put = lambda array, columns: _put(array, columns, state.positions, count)
    each = jnp.where(np.arange(2) == 0, 1, jnp.sum(made, dtype=jnp.int32))
    counts = seen.counts + jnp.where(state.active[:, None], each[None], 0)
    generation = dataclasses.replace(
      old,
      tokens=put(old.tokens, verdict.token),
      confidences=put(old.confidences, verdict.confidence),
      verification=dataclasses.replace(seen, counts=counts),
    )
    log_probabilities = put(state.log_probabilities, verdict.log_probability)
    if len(made) > 1:
      # What the pass says besides is asked for once that is written, not all of it at once.
      count = ordering.after(count, log_probabilities)
    at = np.arange(len(made))[None]
    ends = (at < count[:, None]) & (verdict.token == self.eos_id) & free
    last = jnp.sum(jnp.where(at == count[:, None] - 1, verdict.token, 0), axis=1)
    positions = state.positions + count
    return dataclasses.replace(
      state,
      positions=positions,
      current=jnp.where(count > 0, last, state.current),
      active=state.active & ~jnp.any(ends, axis=1) & (positions < self.length),
      generation=generation,
      log_probabilities=log_probabilities,
      waits=state.waits - 1,
    )

  def _given(self, positions: jax.Array, count: int) -> jax.Array:
    """The prefix at so many positions of each row, [batch, count]; 0 where a row is free."""
    if self.prefix is None:
      return jnp.zeros((len(positions), count), jnp.int32)
    padded = jnp.pad(self.prefix, ((0, 0), (0, self.rule.window)))
    at = positions[:, None] + jnp.arange(count)[None, :]
    return jnp.take_along_axis(padded, at, axis=1)

  def _seen(self, state: VerifiedState) -> loop.Verification:
    assert state.generation.verification is not None  # `decode` made it
    return state.generation.verification

  def _per_row(self, threshold: jax.Array) -> jax.Array:
    """[] or [batch, 1]."""
    return threshold if threshold.ndim == 0 else threshold[:, None]


def _obeying(verdict: exits.verified.Verdict, given: jax.Array) -> exits.verified.Verdict:
  """With what a row is given in place of what was drafted or decided."""
  known = given > 0
  free = lambda values: jnp.where(known, 0.0, values)
  return exits.verified.Verdict(
    token=jnp.where(known, given, verdict.token),
    accepted=verdict.accepted | known,
    confidence=free(verdict.confidence),
    rejected_confidence=free(verdict.rejected_confidence),
    log_probability=free(verdict.log_probability),
  )


def _count(leads: jax.Array, inside: jax.Array) -> jax.Array:
  """How many positions of a pass become tokens, [batch].

  Args:
    leads: whether what the next position read is what was emitted, and ended nothing, [batch,
      positions].
    inside: the most, [batch].
  """
  positions = leads.shape[1]
  if positions == 1:
    return inside
  at = jnp.arange(positions, dtype=jnp.int32)[None, :]
  last = jnp.min(jnp.where(leads, positions, at), axis=1)  # the first that leads nowhere
  return jnp.minimum(last + 1, inside)


def _put(array: jax.Array, columns: jax.Array, positions: jax.Array, count: jax.Array):
  """`array` [batch, length] with the first `count` of `columns` at each row's position."""
  at = jnp.arange(array.shape[1], dtype=jnp.int32)[None, :] - positions[:, None]
  new = columns
  if columns.shape[1] > 1:
    new = jnp.take_along_axis(columns, jnp.clip(at, 0, columns.shape[1] - 1), axis=1)
  return jnp.where((at >= 0) & (at < count[:, None]), new.astype(array.dtype), array)
