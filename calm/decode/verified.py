"""Passes over drafted tokens: a loop that drafts, verifies and accepts. Knows no network.

A pass drafts token after token with the first layers (`Passes.draft`), runs the others over
all of those positions at once (`Passes.verify`), and emits what `exits.verified` accepts and
the full model's own token after it. Every row has a position of its own. What was written of
drafts that are refused is written over before it is read.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from calm import exits
from calm.decode import drafting, loop, ordering, verified_steps
from calm.decode.verified_state import Drafted, Passes, VerifiedState


@struct.dataclass
class _Drafting:
  """The carry of a pass's drafting.

  Attributes:
    drafted: so far.
    token: what the next position reads, [batch].
    reach: how likely it is to be read.
    goes_on: whether there is a next position, [] bool.
  """

  drafted: Drafted
  token: jax.Array
  reach: drafting.Reach
  goes_on: jax.Array


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
    expected = jnp.where(seen.counts[:, :1] > 0, jnp.stack([odds.share, odds.trust], 1), 0.0)
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
    zeros = jnp.zeros(active.shape, jnp.int32)
    pairs = jnp.zeros((len(active), 2), jnp.int32)
    columns = jnp.zeros((len(active), self.length), jnp.float32)
    generation = dataclasses.replace(
      loop.empty_generation(len(active), self.length),
      verification=loop.Verification(columns > 0, pairs, pairs.astype(jnp.float32)),
    )
    made = (generation, columns, self._room(active), self.passes.empty())
    generation, columns, room, cache = self.passes.zeros_like(made)
    return VerifiedState(
      positions=zeros,
      current=zeros,
      active=active,
      generation=generation,
      log_probabilities=columns,
      odds=drafting.Odds.none(len(active), self.prior),
      idle=jnp.zeros((), jnp.int32),
      waits=jnp.asarray(0 if self.plan.hopes else self.length, jnp.int32),
      last=room,
      cache=cache,
    )

  def _room(self, active: jax.Array) -> Drafted:
    """That of the first pass of all."""
    shape = len(active), self.rule.window
    return Drafted(
      count=jnp.zeros((), jnp.int32),
      tokens=jnp.zeros(shape, jnp.int32),
      confidences=jnp.zeros(shape, jnp.float32),
      work=self.passes.room(len(active)),
      cache=None,
    )

  def run(self, state: VerifiedState) -> VerifiedState:
    """One pass of every active row."""
    drafts = self._every | (state.waits <= 0)
    drafted = self._draft(state, drafts)
    made = self._made(drafted, drafts)
    verdict, work, cache = self.passes.verify(
      drafted.work, drafted.cache, drafted, made, self._per_row(self.threshold)
    )
    given = self._given(state.positions)
    verdict = _obeying(verdict, given)
    ends = (verdict.token == self.eos_id) & (given == 0)
    count = self._count(state, drafted, verdict.accepted & ~ends)
    state = self._record(state, made, verdict, given == 0, count)
    # What the pass says besides is asked for once that is written, not all of it at once.
    count = ordering.after(count, state.log_probabilities)
    emits = jnp.arange(self.rule.window)[None, :] < count[:, None]
    last = jnp.take_along_axis(verdict.token, jnp.maximum(count - 1, 0)[:, None], axis=1)[:, 0]
    positions = state.positions + count
    ended = jnp.any(emits & ends, axis=1)
    tried = emits & made[None, :] & (given == 0)
    # One that was only looked at, and right, is as good.
    right = jnp.any(verdict.accepted & tried) & drafting.looks(state.odds, state.active)
    idle = jnp.where(jnp.any(count > 1) | right, 0, state.idle + drafts.astype(jnp.int32))
    odds = state.odds.add(tried, verdict.accepted, drafted.confidences)
    waits = self.plan.waits(idle, odds, state.active)
    return dataclasses.replace(
      state,
      positions=positions,
      current=jnp.where(count > 0, last, state.current),
      active=state.active & ~ended & (positions < self.length),
      odds=odds,
      idle=idle,
      waits=jnp.where(drafts, waits, state.waits - 1),
      last=dataclasses.replace(drafted, work=work, cache=None),
      cache=cache,
    )

  def _draft(self, state: VerifiedState, drafts: jax.Array) -> Drafted:
    """Tokens drafted one after the other, as many as the plan or confidence allows."""
    given = self._given(state.positions)
    plan = self.plan(state.odds, state.active, drafts)
    nothing = dataclasses.replace(
      state.last,
      count=jnp.zeros((), jnp.int32),
      work=self.passes.begin(state.last.work, state.positions),
      cache=state.cache,
    )
    reach = drafting.Reach.of_first(state.active)
    begun = _Drafting(nothing, state.current, reach, jnp.ones((), bool))
    one = functools.partial(self._draft_one, state, given, plan)
    return lax.while_loop(lambda carry: carry.goes_on, one, begun).drafted

  def _draft_one(
    self, state: VerifiedState, given: jax.Array, plan: drafting.Planned, carry: _Drafting
  ) -> _Drafting:
    """One more position of a pass; `given` is the prefix at its positions, [batch, window]."""
    now, at = carry.drafted, carry.drafted.count
    is_last = at + 1 >= self.rule.window
    wanted = plan.drafts & (self._every | ~is_last)
    made, work, cache = self.passes.draft(now.work, now.cache, carry.token, at, wanted)
    put = lambda array, column: lax.dynamic_update_slice_in_dim(
      array, column[:, None], at, axis=1
    )
    now = Drafted(
      at + 1,
      put(now.tokens, made.token),
      put(now.confidences, made.confidence),
      work,
      cache,
    )
    known = lax.dynamic_index_in_dim(given, at, axis=1, keepdims=False)
    has_room = state.active & (state.positions + at + 1 < self.length)
    is_given = has_room & (known > 0)
    follows = (made.confidence >= self.rule.stop_below) & (made.token != self.eos_id)
    likely = has_room & follows & wanted
    chances = jnp.where(likely, plan.chance(made.confidence), 0.0)
    reach = carry.reach.after(jnp.where(is_given, 1.0, chances))
    goes_on = (plan.goes_on(at, reach) | jnp.any(is_given)) & ~is_last
    token = jnp.where(known > 0, known, made.token)
    return _Drafting(now, token, reach.extended(), goes_on)

  def _made(self, drafted: Drafted, drafts: jax.Array) -> jax.Array:
    """Which positions have a draft, [window] bool; without slack the last has none."""
    at = jnp.arange(self.rule.window, dtype=jnp.int32)
    return (at < drafted.count) & drafts & (self._every | (at + 1 < self.rule.window))

  def _count(self, state: VerifiedState, drafted: Drafted, leads: jax.Array) -> jax.Array:
    """How many positions of the pass become tokens, [batch].

    Args:
      state: before the pass.
      drafted: its drafts.
      leads: whether what the next position read is what was emitted, and ended nothing,
        [batch, window].
    """
    window = self.rule.window
    at = jnp.arange(window, dtype=jnp.int32)[None, :]
    last = jnp.min(jnp.where(leads, window, at), axis=1)  # the first that leads nowhere
    inside = jnp.minimum(drafted.count, self.length - state.positions)
    return jnp.where(state.active, jnp.minimum(last + 1, inside), 0)

  def _given(self, positions: jax.Array) -> jax.Array:
    """The prefix at the positions of a pass, [batch, window]; 0 where a row is free."""
    shape = (len(positions), self.rule.window)
    if self.prefix is None:
      return jnp.zeros(shape, jnp.int32)
    padded = jnp.pad(self.prefix, ((0, 0), (0, self.rule.window)))
    at = positions[:, None] + jnp.arange(self.rule.window)[None, :]
    return jnp.take_along_axis(padded, at, axis=1)

  def _record(self, state: VerifiedState, made, verdict, free, count) -> VerifiedState:
    """The state with the `count` [batch] tokens that the pass emits at the rows' positions."""
    old, seen = state.generation, self._seen(state)
    put = lambda array, columns: _put(array, columns, state.positions, count)
    each = jnp.where(np.arange(2) == 0, 1, jnp.sum(made, dtype=jnp.int32))
    verification = loop.Verification(
      drafted=put(seen.drafted, verdict.accepted & free),
      counts=seen.counts + jnp.where(state.active[:, None], each[None], 0),
      expected=seen.expected,
    )
    generation = loop.Generation(
      tokens=put(old.tokens, verdict.token),
      exit_layers=old.exit_layers,  # all of them at the end
      confidences=put(old.confidences, verdict.confidence),
      rejected_confidences=put(old.rejected_confidences, verdict.rejected_confidence),
      scores=old.scores,
      verification=verification,
    )
    log_probabilities = put(state.log_probabilities, verdict.log_probability)
    return dataclasses.replace(
      state, generation=generation, log_probabilities=log_probabilities
    )

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


def _put(array: jax.Array, columns: jax.Array, positions: jax.Array, count: jax.Array):
  """`array` [batch, length] with the first `count` of `columns` at each row's position."""
  at = jnp.arange(array.shape[1], dtype=jnp.int32)[None, :] - positions[:, None]
  new = jnp.take_along_axis(columns, jnp.clip(at, 0, columns.shape[1] - 1), axis=1)
  return jnp.where((at >= 0) & (at < count[:, None]), new.astype(array.dtype), array)
