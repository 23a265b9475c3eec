"""Speculative decoding: layers 1 ... k read token after token and draft the
next one, or drafts are read off the prompt; one pass of the other layers and
the head verifies them all and adds the full model's own token. A pass drafts
until a draft is doubtful, and drafts that gain nothing pause.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from calm import exits
from calm.decode import engines, loop
from calm.exits.layers import Greedy
from calm.t5 import attention as attention_lib
from calm.t5 import decoder as decoder_lib
from calm.t5 import decoder_weights, eight_bits, kernels, network, platforms

MOST_BATCHES = 64  # most batches in turn that make no draft
# drafts that are accepted so often have to save steps, else none is made
GOOD = 0.9
# part of the steps that drafts must save at least: passes take a little more
MARGIN = 0.05
# positions of a pass that is verified in less time than one of a whole window
NARROW = 4
# least chance of a first draft that is read on from: several positions cost
# more
SURE = 0.65
PRIOR = 2.0  # nats of doubt that a text begins with
# Refused drafts per nat that a text begins with: under the whole head a layer's
# drafts are accepted more often than their probabilities say, under a shortlist
# about as often.
REFUSED = {"full": 0.5, "shortlist": 1.0}
# weight of the steps that an earlier batch saved, after the next one
MEMORY = 0.8
LONGEST_RUN = 8  # last tokens that are looked for in the prompt and the text


def draft_cost(
  config: network.T5Config,
  weights: decoder_weights.DecoderWeights,
  rule: exits.Speculative,
  batch: int,
) -> float:
  """What a token takes that is drafted, read and verified in a whole window, by
  the bytes that are read, in steps of the full model; inf where not even good
  drafts would save steps.
  """

  def size(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))

  whole = weights.head
  k = rule.draft_layer
  matrix = weights.layers[0].mlp_out
  layer = size(weights.layers[0])
  head = size(
    whole.coded if isinstance(whole, eight_bits.QuantizedHead) else whole
  )
  short = size(weights.shortlist) if rule.draft_head == "shortlist" else head
  drafted = k * layer + short + size(weights.translators.get(k)) if k else 0

  # A further row takes a seventh of the first on two CPU cores, a TPU computes
  # tiles of rows.
  def rows(n):
    return 1.0 + max(0, n - platforms.least_rows()) / 7

  wider = rows(batch * rule.window) / rows(batch) - 1.0
  step = config.num_decoder_layers * layer + head
  cost = (drafted + wider * (step - k * layer) / rule.num_drafts) / step
  # For products of one row of a small layer XLA:CPU wakes a thread: good drafts
  # brought x0.92 to x1.08 of full depth there.
  if batch == 1 and platforms.is_cpu() and kernels.is_small(matrix):
    return math.inf
  # Rows find drafts at different times: batches of 8 took x0.5 to x1.2 of full
  # depth's speed.
  if batch > 1 and not k:
    return math.inf
  tokens = sum(GOOD**i for i in range(rule.window))
  return (
    cost if 1.0 + rule.num_drafts * cost < (1.0 - MARGIN) * tokens else math.inf
  )


@dataclasses.dataclass
class History:
  """What drafts were worth batch after batch, under one rule and threshold."""

  cost: float  # of a draft, `draft_cost`
  must: bool  # drafts are made whatever they were worth
  saved: float = 0.0  # steps that drafts of the last batches saved
  miss_streak: int = 0  # times in turn that they had saved none
  backoff: int = 0  # batches that make no draft before the next one that does

  def drafts_next(self) -> bool:
    """Whether the next batch makes drafts; counts one that does not."""
    if self.must or math.isinf(self.cost):
      return self.must
    self.backoff -= 1
    return self.backoff < 0

  def update(self, made: loop.Generation) -> None:
    """With a batch that made drafts."""
    seen = made.verification
    if seen is None or self.must:
      return
    # A batch takes as many steps as its longest row has tokens.
    tokens = (1.0 - MARGIN) * (made.exit_layers > 0).sum(axis=1).max()
    saved = float(tokens - seen.passes.max() - self.cost * seen.drafts.max())
    self.saved = max(MEMORY * self.saved + saved, 0.0)
    self.miss_streak = 0 if self.saved else self.miss_streak + 1
    # 1, 4, 16 ...: a text that drafts for nothing runs a program that others
    # leave cold.
    self.backoff = min(4**self.miss_streak // 4, MOST_BATCHES)


# ---- Passes


def verdict(best: Int[Array, "*rows"], gap, drafted, has_draft, threshold):
  """What is emitted where the full model's argmax is `best`: (token, whether it
  is an accepted draft, `gap`, its exp where a draft was refused, else 0). `gap`
  is log p_full of the draft less that of the argmax; `threshold` is 1 - lambda.
  """
  ratio = jnp.exp(gap)
  # Of two equal logits the argmax is the first: only with slack may the second
  # be emitted.
  close = (ratio >= threshold) & (threshold < 1.0)
  accepted = has_draft & ((drafted == best) | close)
  token = jnp.where(accepted, drafted, best)
  return token, accepted, gap, jnp.where(has_draft & ~accepted, ratio, 0.0)


@struct.dataclass
class Pending:
  """A pass that is not verified yet; between two passes, room for the next
  one's.
  """

  count: jax.Array  # positions whose drafts are read on from, []
  # it has several positions, and reads on from the last draft no more, []
  ended: jax.Array
  tokens: jax.Array  # the draft after each position, [batch, window]
  reads_on: jax.Array  # rows whose drafts so far are read, [batch]
  # -log of how probable all drafts up to each were, [batch, window]
  doubts: jax.Array
  hidden: jax.Array  # d^k of each position, [batch, window, emb]


@struct.dataclass
class Learned:
  """What became of a text's drafts."""

  # drafting passes since one emitted two tokens of any row
  miss_streak: Int[Array, ""]
  # passes before the next one that drafts, of the whole text
  due: Int[Array, ""]
  drafts: Int[Array, " batch"]  # tokens drafted
  refused: Int[Array, " batch"]  # passes with a draft that was refused
  # -log of how probable drafts were, those of refused ones too
  doubt: Float[Array, " batch"]
  accepted: Bool[Array, "batch length"]  # tokens that are accepted drafts
  # An accepted draft's log-probability less that of the argmax.
  gaps: Float[Array, "batch length"]
  rejected_confidences: Float[Array, "batch length"]  # of refused drafts


@struct.dataclass
class SpeculativeState:
  """The loop's carry."""

  positions: Int[Array, " batch"]  # tokens that each row has generated
  # each row's last token or draft, which is read next
  current: Int[Array, " batch"]
  active: Bool[Array, " batch"]
  generation: loop.Generation  # filled up to `positions`
  # of the full model's own tokens
  log_probabilities: Float[Array, "batch length"]
  # tokens that a row's passes emitted beyond one each
  ahead: Int[Array, " batch"]
  learned: Learned
  pending: Pending
  cache: Any  # every layer's


@dataclasses.dataclass(frozen=True)
class Speculation:
  """Greedy decoding in passes, until EOS or the length limit."""

  # The prompts, with room for passes that rows wait through once theirs has
  # ended.
  task: engines.Task
  table: attention_lib.BiasTable  # biases by position
  rule: exits.Speculative
  length: int  # most tokens of a text
  eos_id: Any

  def begin(self, active: Bool[Array, " batch"]) -> SpeculativeState:
    """Before the first token of every active row; the others stay empty and
    never vote.
    """
    rows = len(active)
    window = self.rule.window
    task = self.task
    ints = jnp.zeros((rows,), jnp.int32)
    none = jnp.zeros((rows,), bool)
    zero = jnp.zeros((), jnp.int32)
    columns = jnp.zeros((rows, self.length), jnp.float32)
    doubt = jnp.zeros((rows,), jnp.float32)
    drafted = jnp.zeros((rows, window), jnp.int32)
    hidden = jnp.zeros(
      (rows, window, task.config.emb_dim), jnp.dtype(task.config.dtype)
    )
    return SpeculativeState(
      positions=ints,
      current=ints,
      active=active,
      generation=loop.empty_generation(rows, self.length),
      log_probabilities=columns,
      ahead=ints,
      learned=Learned(
        zero, zero, ints, ints, doubt, columns > 0, columns, columns
      ),
      pending=Pending(
        zero, zero > 0, drafted, none, drafted.astype(jnp.float32), hidden
      ),
      cache=task.empty_caches(),
    )

  def go_on(self, state: SpeculativeState, room: int) -> SpeculativeState:
    """Passes until every row has ended, or before one that would begin beyond
    `room`.
    """

    def unfinished(state: SpeculativeState) -> jax.Array:
      has_room = jnp.all(~state.active | (state.positions < room))
      return jnp.any(state.active) & has_room

    plain = dataclasses.replace(state.generation, verification=None)
    state = dataclasses.replace(state, generation=plain)

    def drafting(state):
      return unfinished(state) & ~state.pending.ended

    def one_pass(state: SpeculativeState) -> SpeculativeState:
      if self.rule.draft_layer:
        state = lax.while_loop(drafting, self._advance, state)
      else:
        state = self._look_up(state)
      window = self.rule.window
      for width in (NARROW, window) if window >= 2 * NARROW else (window,):
        fits = state.pending.ended & (state.pending.count < width)
        state = loop.run_if(
          fits, functools.partial(self._verify, width=width), state
        )
      return state

    return self._finish(lax.while_loop(unfinished, one_pass, state))

  def _finish(self, state: SpeculativeState) -> SpeculativeState:
    """The state with what its generation says of whole rows."""
    passes = state.positions - state.ahead
    learned = state.learned
    emitted = (
      jnp.arange(self.length, dtype=jnp.int32)[None, :]
      < state.positions[:, None]
    )
    ratios = jnp.where(learned.accepted, jnp.exp(learned.gaps), 1.0)
    generation = dataclasses.replace(
      state.generation,
      exit_layers=jnp.where(emitted, self.task.config.num_decoder_layers, 0),
      confidences=jnp.where(emitted, ratios, 0.0),
      rejected_confidences=learned.rejected_confidences,
      scores=jnp.sum(state.log_probabilities + learned.gaps, axis=-1),
      verification=loop.Verification(learned.accepted, passes, learned.drafts),
    )
    return dataclasses.replace(state, generation=generation)

  # ---- A position

  def _look_up(self, state: SpeculativeState) -> SpeculativeState:
    """Drafts what followed the longest run of tokens like the last ones, the
    first of equals; a pass of one position where there is none.
    """
    task = self.task
    window = self.rule.window
    positions = state.positions[:, None]
    seen = jnp.concatenate(
      [task.encoded.tokens, state.generation.tokens], axis=1
    )
    last = task.encoded.tokens.shape[1] + positions - 1
    at = jnp.arange(seen.shape[1])[None]
    same = at < last
    run = jnp.zeros_like(seen)
    for back in range(LONGEST_RUN):
      token = jnp.take_along_axis(seen, jnp.maximum(last - back, 0), axis=1)
      before = jnp.pad(seen, ((0, 0), (back, 0)))[:, : seen.shape[1]]
      same &= (before == token) & (back < positions)
      run += same.astype(jnp.int32)
    ahead = jnp.pad(seen, ((0, 0), (1, window)))[:, 2:]
    first = jnp.argmax(run, axis=1)[:, None]
    drafts = jnp.take_along_axis(ahead, first + np.arange(window)[None], axis=1)
    found = jnp.max(run, axis=1) > 0
    # before padding
    known = jnp.argmin(drafts.at[:, -1].set(0) > 0, axis=1).astype(jnp.int32)
    room = jnp.minimum(known, self.length - state.positions - 1)
    count = jnp.max(
      jnp.where(state.active & found & self._drafts(state), room, 0)
    )
    read = jnp.concatenate([state.current[:, None], drafts[:, :-1]], axis=1)
    hidden = task.embed(read.reshape(-1)).reshape(*read.shape, -1)
    pending = dataclasses.replace(
      state.pending, count=count, ended=count > 0, tokens=drafts, hidden=hidden
    )
    state = dataclasses.replace(state, pending=pending)
    past = self.table.before_each(state.positions, task.native)
    one = functools.partial(self._verify_one, hidden=hidden[:, 0], past=past)
    return loop.run_if(count == 0, one, state)

  def _advance(self, state: SpeculativeState) -> SpeculativeState:
    """One position more of every active row; a pass of one position ends with
    it.
    """
    k = self.rule.draft_layer
    at = state.pending.count
    positions = state.positions + at
    cache = state.cache
    past = self.table.before_each(positions, self.task.native)
    hidden, rows = self._one(1, self.task.embed(state.current), cache[:k], past)
    lower = self._written(cache[:k], rows, positions, hidden)
    state = dataclasses.replace(state, cache=(*lower, *cache[k:]))
    needed = self._drafts(state) | (at > 0)
    go_on = functools.partial(self._draft, state, hidden)
    pending, current = loop.run_if(
      needed, go_on, (state.pending, state.current)
    )
    state = dataclasses.replace(state, pending=pending, current=current)
    one = functools.partial(self._verify_one, hidden=hidden, past=past)
    return loop.run_if(pending.count == 0, one, state)

  @property
  def _every(self) -> jax.Array:
    """Whether every position has a draft: with slack no text may depend on
    where passes end.
    """
    return jnp.any(self.task.threshold < 1.0) | self.rule.measures

  def _drafts(self, state: SpeculativeState) -> jax.Array:
    """Whether the pass makes drafts, []."""
    return self._every | (
      jnp.max(state.positions - state.ahead) >= state.learned.due
    )

  def _draft(self, state: SpeculativeState, hidden: jax.Array, carry):
    """The position that was read, with the draft after it; whether the pass
    reads on there.
    """
    pending, _ = carry
    at = pending.count
    window = self.rule.window
    blank = jnp.zeros_like(state.current), jnp.ones(state.current.shape)
    wanted = self._drafts(state) & (self._every | (at + 1 < window))
    token, confidence = lax.cond(
      wanted, self._draft_head, lambda hidden: blank, hidden
    )
    has_room = state.active & (state.positions + at + 1 < self.length)
    before = jnp.take(pending.doubts, jnp.maximum(at - 1, 0), axis=1)
    doubt = jnp.where(at > 0, before, 0.0) - jnp.log(confidence)
    learned = state.learned
    rate = 1.0
    least = self.rule.stop_below
    if self.rule.adapts:
      # A draft of probability p is taken to be accepted with p^rate: heads,
      # layers and texts differ in how often drafts are refused beside how often
      # their probabilities say.
      refused = PRIOR * REFUSED[self.rule.draft_head] + learned.refused.astype(
        jnp.float32
      )
      rate = refused / (PRIOR + learned.doubt)
      least = jnp.where(at == 0, max(least, SURE), least)
    follows = (jnp.exp(-rate * doubt) >= least) & (token != self.eos_id)
    reads_on = has_room & follows & wanted & ((at == 0) | pending.reads_on)
    goes_on = jnp.any(reads_on) & (at + 1 < window)

    def put(array, x):
      return lax.dynamic_update_slice_in_dim(array, x[:, None], at, axis=1)

    pending = Pending(
      count=at + goes_on.astype(jnp.int32),
      ended=~goes_on & (at > 0),
      tokens=put(pending.tokens, token),
      reads_on=reads_on,
      doubts=put(pending.doubts, doubt),
      hidden=put(pending.hidden, hidden),
    )
    return pending, token

  def _draft_head(self, hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Layer k's likeliest token (the first of equals), and its probability
    under the draft head, [batch].
    """
    decoder = self._decoder()
    ids = self.task.weights.shortlist_ids
    read = decoder.read(self.rule.draft_layer, hidden)
    if self.rule.draft_head == "full":
      best = decoder.peaks(decoder.logits(read)).greedy
      return best.token, jnp.exp(best.log_probability)
    assert ids is not None  # `Program.speculation` asked
    best = decoder.peaks(decoder.shortlist_logits(read)).greedy
    return ids[best.token], jnp.exp(best.log_probability)

  # ---- The end of a pass

  def _verify_one(
    self, state: SpeculativeState, *, hidden, past
  ) -> SpeculativeState:
    """The end of a pass of one position, which was read."""
    k = self.rule.draft_layer
    cache = state.cache
    drafts = self._drafts(state) & (k > 0)
    drafted = state.pending.tokens[:, 0]
    hidden, rows = self._one(k + 1, hidden, cache[k:], past)
    upper = self._written(cache[k:], rows, state.positions, hidden)
    best, gap_of = self._said(hidden)
    state = dataclasses.replace(state, cache=(*cache[:k], *upper))
    count = state.active.astype(jnp.int32)
    made = jnp.ones((1,), bool)
    positions = state.positions + count

    def judge(carry):
      judged = verdict(
        best.token, gap_of(drafted), drafted, made[0], self.task.threshold
      )
      judged = jax.tree.map(lambda x: x[:, None], judged)
      passes = jnp.max(positions - state.ahead)
      doubts = state.pending.doubts[:, :1]
      learned = self._learn(
        carry[1], judged, doubts, made, positions, count, passes
      )
      return judged[0], learned

    # A pass without a draft has to cost as little as a step of the full model.
    token, learned = loop.run_if(
      drafts, judge, (best.token[:, None], state.learned)
    )
    return self._emit(
      state, learned, token, best.log_probability[:, None], count
    )

  def _verify(self, state: SpeculativeState, width: int) -> SpeculativeState:
    """The end of a pass of several positions, `width` at most."""
    pending = state.pending
    at = jnp.arange(width, dtype=jnp.int32)
    drafts, doubts, states = (
      x[:, :width] for x in (pending.tokens, pending.doubts, pending.hidden)
    )
    # Without slack the last of the window has no draft.
    made = (at <= pending.count) & self._drafts(state)
    made &= self._every | (at + 1 < self.rule.window)
    k = self.rule.draft_layer
    cache = state.cache
    hidden, upper = self._several(states, cache[k:], state.positions)
    best, gap_of = self._said(hidden)
    said = best.token, best.log_probability, gap_of(drafts.reshape(-1))
    token, log_probability, gap = (x.reshape(drafts.shape) for x in said)
    threshold = self.task.threshold
    threshold = threshold if threshold.ndim == 0 else threshold[:, None]
    judged = verdict(token, gap, drafts, made[None], threshold)
    inside = jnp.minimum(pending.count + 1, self.length - state.positions)
    # Up to the first whose token is not what the next position read, or ends
    # the row.
    leads = judged[1] & (judged[0] != self.eos_id)
    last = jnp.min(jnp.where(leads, width, at), axis=1)
    count = jnp.minimum(last + 1, jnp.where(state.active, inside, 0))
    # One after the other, or a thread would be woken for half of it.
    positions = engines.after(state.positions, log_probability)
    moved = positions + count
    ahead = state.ahead + jnp.maximum(count - 1, 0)

    def learn(learned):
      return self._learn(
        learned, judged, doubts, made, moved, count, jnp.max(moved - ahead)
      )

    learned = loop.run_if(made[0], learn, state.learned)
    state = dataclasses.replace(
      state,
      positions=positions,
      cache=(*cache[:k], *upper),
      ahead=ahead,
      pending=dataclasses.replace(
        pending, count=jnp.zeros_like(pending.count), ended=~pending.ended
      ),
    )
    return self._emit(state, learned, judged[0], log_probability, count)

  def _emit(
    self,
    state: SpeculativeState,
    learned: Learned,
    token,
    log_probability,
    count: jax.Array,
  ) -> SpeculativeState:
    """The state after a pass, of whose tokens [batch, positions] `count` are
    emitted.
    """
    at = np.arange(token.shape[1])[None]

    def put(array, columns):
      return write_columns(array, columns, state.positions, count)

    generation = dataclasses.replace(
      state.generation, tokens=put(state.generation.tokens, token)
    )
    last = jnp.sum(jnp.where(at == count[:, None] - 1, token, 0), axis=1)
    positions = state.positions + count
    ends = (at < count[:, None]) & (token == self.eos_id)
    return dataclasses.replace(
      state,
      positions=positions,
      current=jnp.where(count > 0, last, state.current),
      active=state.active & ~jnp.any(ends, axis=1) & (positions < self.length),
      generation=generation,
      log_probabilities=put(state.log_probabilities, log_probability),
      learned=learned,
    )

  def _learn(
    self, old: Learned, judged, doubts, made, positions, count, passes
  ) -> Learned:
    """With what became of a pass's drafts: `made` [positions] have one, of
    `doubts` [batch, positions]; `count` [batch] are emitted, after which rows
    are at `positions` [batch] and there were `passes` [].
    """
    _, accepted, gap, rejected_confidence = judged
    positions -= count
    emitted = np.arange(len(made))[None] < count[:, None]
    refused = jnp.sum(emitted & made[None] & ~accepted, axis=1, dtype=jnp.int32)
    accepted &= emitted
    miss_streak = jnp.where(jnp.any(count > 1), 0, old.miss_streak + 1)
    # Passes without a draft: 0, 0, 1, 2, 4 ... 32.
    paused = 2 ** jnp.minimum(miss_streak, 7) // 4 if self.rule.adapts else 0

    def put(array, columns):
      return write_columns(array, columns, positions, count)

    number = jnp.where(count > 0, jnp.sum(made, dtype=jnp.int32), 0)
    return Learned(
      miss_streak=miss_streak,
      due=passes + paused,
      # Not all at once, or a thread would be woken for half of it.
      drafts=old.drafts + engines.after(number, gap),
      refused=old.refused + refused,
      doubt=old.doubt
      + jnp.max(jnp.where(emitted & made[None], doubts, 0.0), axis=1),
      accepted=put(old.accepted, accepted),
      gaps=put(old.gaps, jnp.where(accepted, gap, 0.0)),
      rejected_confidences=put(old.rejected_confidences, rejected_confidence),
    )

  # ---- The decoder

  def _said(
    self, hidden: jax.Array
  ) -> tuple[Greedy, Callable[[jax.Array], jax.Array]]:
    """The likeliest token, and how far the logit of any token is above its."""
    decoder = self._decoder()
    last = self.task.config.num_decoder_layers
    read = decoder.read(last, hidden)
    logits = decoder.logits(read)
    best = decoder.peaks(logits).greedy

    def score(token):
      return jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]

    return best, lambda token: score(token) - score(best.token)

  def _one(
    self, first: int, hidden: jax.Array, caches, past: tuple[jax.Array, ...]
  ):
    """Layers from `first` on over one position of every row, [batch, emb]; then
    their rows.
    """
    decoder = self._decoder(past)
    rows = []
    for layer, cache in enumerate(caches, start=first):
      hidden, row = decoder.run(layer, hidden, cache)
      rows.append(jax.tree.map(lambda x: x[:, None], row))
    return hidden, rows

  def _several(self, states: jax.Array, caches, positions: jax.Array):
    """Layers k + 1 ... L over positions [batch, positions, emb]: [rows, emb],
    and caches.
    """
    task = self.task
    decoder = self._decoder()
    biases = self.table.of_windows(positions, states.shape[1], task.native)
    hidden = states.reshape(-1, states.shape[-1])
    written = []
    for layer, cache in enumerate(caches, start=self.rule.draft_layer + 1):
      row = decoder.project(layer, hidden)
      window = jax.tree.map(
        lambda x: x.reshape(task.batch_size, -1, *x.shape[1:]), row
      )
      written.append(attention_lib.write_window(cache, window, positions))
      attention = decoder.window_attention(layer, hidden, written[-1], biases)
      hidden = decoder.run_projected(layer, hidden, row, attention)
    return hidden, tuple(written)

  def _written(self, caches, rows, positions: jax.Array, last: jax.Array):
    """Every layer's cache with its row written at `positions`, once that leads
    to `last`.
    """
    ends = engines.after_each(positions, rows, last)
    return tuple(map(attention_lib.write_window, caches, rows, ends))

  def _decoder(
    self, past: tuple[jax.Array, ...] = ()
  ) -> decoder_lib.DecoderStep:
    """The decoder at one position of every row, `past` the biases of the keys
    before it.
    """
    task = self.task
    return decoder_lib.DecoderStep(
      task.weights,
      task.config,
      task.encoded,
      past,
      self.table.current,
      task.native,
    )


def write_columns(
  array, columns, positions: jax.Array, count: jax.Array
) -> jax.Array:
  """`array` [batch, length] with the first `count` of `columns` at each row's
  position.
  """
  at = jnp.arange(array.shape[1], dtype=jnp.int32)[None, :] - positions[:, None]
  new = columns
  if columns.shape[1] > 1:
    new = jnp.take_along_axis(
      columns, jnp.clip(at, 0, columns.shape[1] - 1), axis=1
    )
  return jnp.where(
    (at >= 0) & (at < count[:, None]), new.astype(array.dtype), array
  )
