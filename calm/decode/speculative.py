"""Speculative decoding: layers 1 ... k read token after token and draft the next one, one pass
of the others and the head verifies them all and adds the full model's own token. How many
drafts are made depends on how likely they are to be accepted and on what passes cost."""

import dataclasses
import functools
import itertools
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
from calm.decode.engines import engine
from calm.exits.layers import Greedy, greedy
from calm.t5 import attention as attention_lib
from calm.t5 import decoder as decoder_lib
from calm.t5 import decoder_weights, eight_bits, kernels, network, platforms

# The prior of the first text: cautious, so that its first draft is verified alone.
CHANCE, CALIBRATION = 0.6, 0.25
# Weights of a prior, in drafts: of the rate at least and at most, and of the calibration.
LEAST_TRIALS, MOST_TRIALS, CALIBRATION_TRIALS = 1.0, 7.0, 0.1
PRIOR_TEXTS = 2.0  # weight of the first prior, in texts
# Bounds of a prior's calibration: many texts with good drafts must not outweigh a bad one.
LEAST_CALIBRATION, MOST_CALIBRATION = 0.02, 50.0
# Bounds of confidences: no draft counts as certain.
LEAST_CONFIDENCE, MOST_CONFIDENCE = 0.02, 0.9
MEMORY = 0.95  # what a trial still weighs after the next one: about the last twenty count
# One more position must give this much of the tokens a second that the pass has without it.
LEAST_GAIN = 0.9
DOUBTFUL = 0.5  # drafts that are accepted less often are made less often
# A model is worth drafting for if passes pay where drafts are accepted so often.
GOOD = 0.9
DRAFT_COST = 0.05  # of a draft that is verified alone, in steps of the full model
# Most passes without a draft between two with one, and most batches.
MOST_BACKOFF, MOST_BATCHES = 32, 64
# What the steps that an earlier batch saved still weigh after the next one. A batch must save
# more than `MARGIN` of its steps, as passes take a little more than planned; the last batches
# may have lost so many where enough drafts of the last one were accepted.
BATCH_MEMORY, MARGIN, LEAST_SAVED = 0.8, 0.04, -2.0
# Drafts for eight rows and more must promise more: rows that differ in what is accepted wait
# for each other. With 8 rows of T5 1.1 small x1.09 was promised, and x0.93 came.
MANY_ROWS, MANY_ROWS_GAIN = 8, 1.1
# What is expected of a text's drafts before it has any: the chance that one is accepted,
# `AcceptanceEstimate.calibration`, and the number of texts that say so.
Prior = tuple[Any, Any, Any]
UNKNOWN: Prior = (CHANCE, CALIBRATION, 0.0)


@struct.dataclass
class AcceptanceEstimate:
  """How often the drafts of each row are accepted, the recent ones weighing more."""

  # Drafts accepted and tried, the sum of 1 - c over the accepted ones, c a draft's confidence,
  # and the sum of c over the refused ones; they begin with those of the prior. One array, for
  # an operation takes longer than its numbers.
  sums: Float[Array, "4 batch"]

  @classmethod
  def of(cls, prior: Any, batch_size: int) -> "AcceptanceEstimate":
    """Before the first draft."""
    chance, calibration, texts = (jnp.asarray(each, jnp.float32) for each in prior)
    root, trials = jnp.sqrt(calibration), jnp.minimum(LEAST_TRIALS + texts, MOST_TRIALS)
    known = chance * trials, trials, CALIBRATION_TRIALS * root, CALIBRATION_TRIALS / root
    return cls(jnp.broadcast_to(jnp.stack(known)[:, None], (4, batch_size)))

  def update(
    self, tried: Bool[Array, "batch positions"], accepted, confidences
  ) -> "AcceptanceEstimate":
    """With the drafts of one more pass, [batch, positions] each."""
    confidence = jnp.clip(confidences, LEAST_CONFIDENCE, MOST_CONFIDENCE)
    accepted, refused = tried & accepted, tried & ~accepted
    kinds = (
      accepted.astype(jnp.float32),
      tried.astype(jnp.float32),
      jnp.where(accepted, 1.0 - confidence, 0.0),
      jnp.where(refused, confidence, 0.0),
    )
    # Chosen and not stacked, which would be an operation more.
    which, each = np.arange(4)[:, None, None], kinds[-1]
    for i, kind in enumerate(kinds[:-1]):
      each = jnp.where(which == i, kind, each)
    new = jnp.sum(each, axis=-1)
    return AcceptanceEstimate(self.sums * jnp.float32(MEMORY) ** new[1:2] + new)

  @property
  def chance(self) -> jax.Array:
    """That a draft of a row is accepted, [batch] below 1."""
    return jnp.minimum(self.sums[0] / self.sums[1], 0.999)

  @property
  def calibration(self) -> jax.Array:
    """Odds that a draft is accepted over those that its confidence says, [batch] (Mantel and
    Haenszel, 1959)."""
    return self.sums[2] / self.sums[3]

  def chances(self, confidences: Float[Array, " batch"]) -> jax.Array:
    """That drafts of these confidences are accepted, [batch]."""
    confidence = jnp.clip(confidences, LEAST_CONFIDENCE, MOST_CONFIDENCE)
    odds = self.calibration * confidence
    return odds / (1.0 - confidence + odds)

  def mean_chance(self, active: Bool[Array, " batch"]) -> jax.Array:
    """The mean of `chance` over the rows that count, []."""
    counted = active.astype(jnp.float32)
    return jnp.sum(self.chance * counted) / jnp.maximum(jnp.sum(counted), 1.0)


@dataclasses.dataclass(frozen=True)
class Plan:
  """How many positions a pass should have."""

  costs: tuple[float, ...]  # of a pass of 1, 2, ... positions, in any unit of time
  # What good drafts must bring at best, in tokens a second over those without any.
  least_gain: float = 1.0
  adapts: bool = True  # False: always as many positions as there are costs

  @functools.cached_property
  def worth_drafting(self) -> bool:
    """Whether a text may begin with drafts: passes over many rows cost about as many steps."""
    tokens = itertools.accumulate(GOOD**i for i in range(len(self.costs)))
    rates = [emitted / cost for emitted, cost in zip(tokens, self.costs, strict=True)]
    return not self.adapts or max(rates) > self.least_gain * rates[0]

  @functools.cached_property
  def least_chance(self) -> float:
    """Drafts that are accepted less often are doubtful."""
    pays = (chance for chance in np.linspace(0.0, 0.99, 100) if self._opening(chance) < 1.0)
    return max(DOUBTFUL, next(pays, 1.0))

  def _opening(self, chance: Any) -> Any:
    """The chance of a first draft above which a second position pays, with this one after."""
    # With its first draft a row emits 1 + a + ... + a^(n - 2) tokens more of n positions. Of
    # single numbers, for XLA makes one operation of them.
    emitted, power, openings = 0.0, 1.0, []
    for cost in self.costs[1:]:
      emitted, power = emitted + power, power * chance
      openings.append((cost / self.costs[0] - 1.0) / emitted)
    return functools.reduce(jnp.minimum if isinstance(chance, jax.Array) else min, openings)

  def goes_on(self, at, chances: Float[Array, " batch"], tokens, chance) -> jax.Array:
    """Whether a pass of `at` + 1 positions should have one more, [] bool; `chances` are that
    all drafts of a row so far are accepted, `tokens` are expected of the positions so far,
    `chance` is the estimate's mean."""
    if not self.adapts:
      return jnp.sum(chances) > 0.0
    more = [LEAST_GAIN * (new - old) / old for old, new in itertools.pairwise(self.costs[1:])]
    least = jnp.array((0.0, *more), jnp.float32)[jnp.minimum(at, len(more))]
    return jnp.sum(chances) > jnp.where(at == 0, self._opening(chance), least) * tokens

  def backoff(self, miss_streak: jax.Array, chance: jax.Array) -> jax.Array:
    """Passes of one position, without a draft, before the next one that drafts, []."""
    if not self.adapts:
      return jnp.zeros((), jnp.int32)
    # 0, 0, 1, 2, 4 ... passes; 0, 4, 8, 16 ... where drafts are doubtful.
    passes = 2 ** jnp.minimum(miss_streak, 8)
    doubtful = jnp.where(miss_streak > 0, 2 * passes, 0)
    chosen = jnp.where(chance < self.least_chance, doubtful, passes // 4)
    return jnp.minimum(chosen, MOST_BACKOFF)

  def extra_cost(self, positions: jax.Array) -> jax.Array:
    """What a drafting pass of so many positions [] takes besides a step, in steps, []."""
    costs = jnp.asarray(self.costs, jnp.float32) / self.costs[0] - 1.0
    return jnp.where(positions == 1, DRAFT_COST, costs[positions - 1])


@dataclasses.dataclass
class History:
  """What drafts were worth text after text, under one rule and threshold."""

  decide: bool  # texts are what drafts make of them
  must: bool  # they are made whatever they were worth
  prior: Prior = UNKNOWN  # what the next text begins with
  saved: float = 0.0  # steps that drafts of the last batches saved, as far as `Plan` knows
  miss_streak: int = 0  # batches in turn after which they had saved none
  backoff: int = 0  # batches that make no draft before the next one that does
  plans: dict[int, Plan] = dataclasses.field(default_factory=dict)  # by number of rows
  # A batch that is still to be read, and its active rows: its text is returned first.
  last: tuple[loop.Generation, np.ndarray] | None = None

  def drafts_next(self, rows: int) -> bool:
    """Whether the next batch, of so many rows, makes drafts; counts one that does not."""
    worth = self.decide or self.plans[rows].worth_drafting
    if self.backoff == 0 or not worth:
      return worth
    self.backoff -= 1
    return False

  def update(self) -> None:
    """Reads the last batch that made drafts, if that is still to be done."""
    if self.last is None:
      return
    (generation, active), self.last = self.last, None
    assert generation.verification is not None
    # Python's own numbers: NumPy's sums and choices between two texts took a tenth of a
    # millisecond, which is a third of a token.
    rows = generation.verification.numbers.tolist()
    known = [row[2:4] for row, is_active in zip(rows, active, strict=True) if is_active]
    chance, calibration, before = self.prior
    texts = PRIOR_TEXTS + len(known)
    chance = (PRIOR_TEXTS * chance + sum(each[0] for each in known)) / texts
    logs = PRIOR_TEXTS * math.log(calibration) + sum(math.log(each[1]) for each in known)
    calibration = min(max(math.exp(logs / texts), LEAST_CALIBRATION), MOST_CALIBRATION)
    self.prior = chance, calibration, before + len(known)
    # A batch takes as many steps as its longest row has tokens.
    tokens = max(map(np.count_nonzero, generation.exit_layers))
    saved = (1.0 - MARGIN) * tokens - max(row[4] for row in rows)
    self.saved = BATCH_MEMORY * self.saved + saved
    chance = sum(row[0] for row in known) / max(len(known), 1)
    promising = chance >= self.plans[len(active)].least_chance
    missed = self.saved <= (LEAST_SAVED if promising else 0.0)
    self.miss_streak = self.miss_streak + 1 if missed else 0
    self.saved = max(self.saved, LEAST_SAVED)
    # 1, 4, 16 ...: a text that drafts for nothing runs a program that others leave cold.
    self.backoff = 0 if self.must else min(4**self.miss_streak // 4, MOST_BATCHES)


def plan(
  config: network.T5Config,
  weights: decoder_weights.DecoderWeights,
  rule: exits.Speculative,
  batch: int,
  is_native: bool,
) -> Plan:
  """What passes of every length cost, by the weights that they read and the rows they have."""
  count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
  numbers = count(dataclasses.replace(weights.layers[0], cross_key_value=()))  # once a prompt
  matrix, head = weights.layers[0].mlp_out, weights.head
  single = is_native and kernels.single_threaded(matrix, 1)
  rows = lambda n: _single_threaded(batch, n) if single else _rows(batch * n)
  layer = lambda n: (rows(n) if single else _layer(matrix, batch * n)) * numbers

  def whole(n: int) -> float:
    if single and not isinstance(head, eight_bits.QuantizedHead):
      return rows(n) * head.size
    return _head(head, batch * n)

  short = rows(1) * count(weights.shortlist) if rule.draft_head == "shortlist" else whole(1)
  short += rows(1) * count(weights.translators.get(rule.draft_layer))
  below, above = rule.draft_layer, config.num_decoder_layers - rule.draft_layer
  costs = []
  for n in range(1, rule.window + 1):
    drafts = n * below * layer(1) + (n - 1) * short
    verified = 1 if n == 1 else rule.window
    # A turn of the loop takes about a layer's time besides.
    costs.append(numbers + drafts + above * layer(verified) + whole(verified))
  least_gain = 1.0 if batch < MANY_ROWS else MANY_ROWS_GAIN
  # For products of one row of a small layer XLA:CPU wakes a thread: good drafts brought x0.92
  # to x1.08 of full depth there.
  if batch == 1 and platforms.is_cpu() and kernels.is_small(matrix) and not single:
    least_gain = math.inf
  return Plan(tuple(costs), least_gain, rule.adapts)


def _head(head: jax.Array | eight_bits.QuantizedHead, rows: int) -> float:
  """Cost of the head over so many rows, in float32 numbers that are read for one. On two CPU
  cores 8 bits take 0.3, 0.3, 0.5, 0.8 and 1.4 of a float32 row for 2, 4, 8, 16 and 32 rows of
  T5 1.1 small, more where both sides have a sign; float32 logits are read again."""
  if not isinstance(head, eight_bits.QuantizedHead):
    return _rows(rows) * (1.0 if rows <= platforms.least_rows() else 1.3) * head.size
  if platforms.least_rows() > 1:  # a TPU: what the bytes take
    return _rows(rows) * head.rows.size / 4
  signed = 0.4 + 0.07 * max(rows, eight_bits.LEAST_ROWS)
  return (signed / 2 if platforms.multiplies_unsigned() else signed) * head.rows.size


def _layer(matrix: decoder_weights.Matrix, rows: int) -> float:
  """Cost of a layer whose matrices are stored so, over that of float32 ones with one row."""
  return 0.45 + 0.04 * rows if isinstance(matrix, eight_bits.EightBits) else _rows(rows)


def _rows(rows: int) -> float:
  """Cost of so many rows over that of one, between what two CPU cores took: 8 rows of T5 1.1
  small 1.4 (head) to 1.9 (layers), 32 rows 4 to 5. A TPU computes a tile of rows for one."""
  if rows <= platforms.least_rows():
    return 1.0
  return 1.5 + 0.05 * rows if rows <= 8 else 1.9 * (rows / 8) ** 0.75


def _single_threaded(batch: int, positions: int) -> float:
  """The same of layers that one thread multiplies, as the model in the box took. One prompt's
  passes are planned a fifth cheaper: drafts that are accepted come in runs."""
  rows = batch * positions
  if positions == 1:
    return min(0.6 + 0.4 * rows, 1.4 + 0.2 * rows)
  window = 1.1 + 0.22 * rows if rows <= 8 else 2.86 * (rows / 8) ** 0.8
  return 0.8 * window if batch == 1 else window


# ---- Passes


def verdict(best: Int[Array, "*rows"], gap, drafted, has_draft, threshold):
  """What is emitted where the full model's argmax is `best`: (token, whether it is an accepted
  draft, `gap`, its exp where a draft was refused, else 0). `gap` is log p_full of the draft
  less that of the argmax; `threshold` is 1 - lambda."""
  ratio = jnp.exp(gap)
  # Of two equal logits the argmax is the first: only with slack may the second be emitted.
  close = (ratio >= threshold) & (threshold < 1.0)
  accepted = has_draft & ((drafted == best) | close)
  token = jnp.where(accepted, drafted, best)
  return token, accepted, gap, jnp.where(has_draft & ~accepted, ratio, 0.0)


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

  estimate: AcceptanceEstimate
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
  """Greedy decoding in passes, until EOS or the length limit."""

  # The prompts, with room for passes that rows wait through once theirs has ended.
  task: engines.Task
  table: attention_lib.BiasTable  # biases by position
  rule: exits.Speculative
  plan: Plan
  length: int  # most tokens of a text
  eos_id: Any
  prior: Prior = UNKNOWN  # what is expected of a text's drafts before it has any

  def decode(self, active: Bool[Array, " batch"]) -> SpeculativeState:
    """The final state, of every active row; the others stay empty and never vote."""
    return self.finish(self.go_on(self.begin(active)))

  def begin(self, active: Bool[Array, " batch"]) -> SpeculativeState:
    """Before the first token of every row."""
    rows, window, task = len(active), self.rule.window, self.task
    ints, floats = jnp.zeros((rows,), jnp.int32), jnp.zeros((rows,), jnp.float32)
    zero, none = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32)
    columns = jnp.zeros((rows, self.length), jnp.float32)
    drafted = jnp.zeros((rows, window), jnp.float32)
    hidden = jnp.zeros((rows, window, task.config.emb_dim), jnp.dtype(task.config.dtype))
    estimate = AcceptanceEstimate.of(self.prior, rows)
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
      state = lax.while_loop(drafting, self._advance, state)
      return loop.run_if(state.pending.ended, self._verify, state)

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
    ratios = jnp.where(learned.accepted, jnp.exp(learned.gaps), 1.0)
    generation = dataclasses.replace(
      state.generation,
      exit_layers=jnp.where(emitted, self.task.config.num_decoder_layers, 0),
      confidences=jnp.where(emitted, ratios, 0.0),
      rejected_confidences=learned.rejected_confidences,
      scores=jnp.sum(state.log_probabilities + learned.gaps, axis=-1),
      verification=loop.Verification(learned.accepted, numbers),
    )
    return dataclasses.replace(state, generation=generation)

  # ---- A position

  def _advance(self, state: SpeculativeState) -> SpeculativeState:
    """One position more of every active row; a pass of one position ends with it."""
    k, at = self.rule.draft_layer, state.pending.count
    positions, cache = state.positions + at, state.cache
    past = self.table.before_each(positions, self.task.native)
    hidden, rows = self._one(1, self.task.embed(state.current), cache[:k], past)
    lower = self._written(cache[:k], rows, positions, hidden)
    state = dataclasses.replace(state, cache=(*lower, *cache[k:]))
    needed = self._drafts(state) | (at > 0)
    go_on = functools.partial(self._draft, state, hidden)
    pending, current = loop.run_if(needed, go_on, (state.pending, state.current))
    state = dataclasses.replace(state, pending=pending, current=current)
    one = functools.partial(self._verify_one, hidden=hidden, past=past)
    return loop.run_if(pending.count == 0, one, state)

  @property
  def _every(self) -> jax.Array:
    """Whether every position has a draft: with slack no text may depend on where passes end."""
    return jnp.any(self.task.threshold < 1.0) | self.rule.measures

  def _drafts(self, state: SpeculativeState) -> jax.Array:
    """Whether the pass makes drafts, []."""
    return self._every | (jnp.max(state.positions - state.ahead) >= state.learned.due)

  def _draft(self, state: SpeculativeState, hidden: jax.Array, carry):
    """The position that was read, with the draft after it; whether the pass reads on there."""
    pending, _ = carry
    at, window = pending.count, self.rule.window
    blank = jnp.zeros_like(state.current), jnp.zeros_like(pending.chances)
    wanted = self._drafts(state) & (self._every | (at + 1 < window))
    token, confidence = lax.cond(wanted, self._draft_head, lambda hidden: blank, hidden)
    has_room = state.active & (state.positions + at + 1 < self.length)
    follows = (confidence >= self.rule.stop_below) & (token != self.eos_id)
    likely = jnp.where(
      has_room & follows & wanted, state.learned.estimate.chances(confidence), 0.0
    )
    first, rows = at == 0, state.active.astype(jnp.float32)
    chances = jnp.where(first, rows, pending.chances) * likely
    expected = jnp.where(first, jnp.sum(rows), pending.expected)
    mean = state.learned.estimate.mean_chance(state.active)
    goes_on = self.plan.goes_on(at, chances, expected, mean) & (at + 1 < window)
    put = lambda array, column: lax.dynamic_update_slice_in_dim(
      array, column[:, None], at, axis=1
    )
    pending = Pending(
      count=at + goes_on.astype(jnp.int32),
      ended=~goes_on & (at > 0),
      tokens=put(pending.tokens, token),
      confidences=put(pending.confidences, confidence),
      chances=chances,
      expected=expected + jnp.sum(chances),
      hidden=put(pending.hidden, hidden),
    )
    return pending, token

  def _draft_head(self, hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Layer k's likeliest token (the first of equals), and its probability under the draft
    head, [batch]."""
    decoder, weights, short = self._decoder(), self.task.weights, self.rule.draft_head
    read = decoder.read(self.rule.draft_layer, hidden)
    best = None if short == "shortlist" else decoder.greedy(read)
    if best is None:
      best = greedy(
        decoder.shortlist_logits(read) if short == "shortlist" else decoder.logits(read)
      )
    ids = weights.shortlist_ids if short == "shortlist" else None
    token = best.token if ids is None else ids[best.token]
    return token, jnp.exp(best.log_probability)

  # ---- The end of a pass

  def _verify_one(self, state: SpeculativeState, *, hidden, past) -> SpeculativeState:
    """The end of a pass of one position, which was read."""
    drafts, drafted = self._drafts(state), state.pending.tokens[:, 0]
    k, cache = self.rule.draft_layer, state.cache
    hidden, rows = self._one(k + 1, hidden, cache[k:], past)
    upper = self._written(cache[k:], rows, state.positions, hidden)
    best, gap_of = self._said(hidden)
    state = dataclasses.replace(state, cache=(*cache[:k], *upper))
    count, made = state.active.astype(jnp.int32), jnp.ones((1,), bool)
    positions, pending = state.positions + count, state.pending

    def judge(carry):
      judged = verdict(best.token, gap_of(drafted), drafted, made[0], self.task.threshold)
      judged = jax.tree.map(lambda x: x[:, None], judged)
      passes = jnp.max(positions - state.ahead)
      learned = self._learn(carry[1], pending, judged, made, positions, count, passes)
      return judged[0], learned

    # A pass without a draft has to cost as little as a step of the full model.
    token, learned = loop.run_if(drafts, judge, (best.token[:, None], state.learned))
    return self._emit(state, learned, token, best.log_probability[:, None], count)

  def _verify(self, state: SpeculativeState) -> SpeculativeState:
    """The end of a pass of several positions."""
    pending, at = state.pending, jnp.arange(self.rule.window, dtype=jnp.int32)
    # Without slack the last of the window has no draft.
    made = (at <= pending.count) & self._drafts(state)
    made &= self._every | (at + 1 < self.rule.window)
    k, cache, shape = self.rule.draft_layer, state.cache, pending.tokens.shape
    hidden, upper = self._several(pending.hidden, cache[k:], state.positions)
    best, gap_of = self._said(hidden)
    said = best.token, best.log_probability, gap_of(pending.tokens.reshape(-1))
    token, log_probability, gap = (x.reshape(shape) for x in said)
    threshold = self.task.threshold
    threshold = threshold if threshold.ndim == 0 else threshold[:, None]
    judged = verdict(token, gap, pending.tokens, made[None], threshold)
    inside = jnp.minimum(pending.count + 1, self.length - state.positions)
    count = self._accepted(*judged[:2], jnp.where(state.active, inside, 0))
    # One after the other, or a thread would be woken for half of it.
    positions = engine.after(state.positions, log_probability)
    moved, ahead = positions + count, state.ahead + jnp.maximum(count - 1, 0)
    learn = lambda learned: self._learn(
      learned, pending, judged, made, moved, count, jnp.max(moved - ahead)
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

  def _accepted(self, token, accepted, most: jax.Array) -> jax.Array:
    """How many positions of a pass become tokens, at most `most` [batch]: up to the first whose
    token is not what the next position read, or ends the row."""
    leads = accepted & ~(token == self.eos_id)
    positions = leads.shape[1]
    at = jnp.arange(positions, dtype=jnp.int32)[None, :]
    last = jnp.min(jnp.where(leads, positions, at), axis=1)  # the first that leads nowhere
    return jnp.minimum(last + 1, most)

  def _emit(
    self, state: SpeculativeState, learned: Learned, token, log_probability, count: jax.Array
  ) -> SpeculativeState:
    """The state after a pass, of whose tokens [batch, positions] `count` are emitted."""
    at = np.arange(token.shape[1])[None]
    put = lambda array, columns: write_columns(array, columns, state.positions, count)
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

  def _learn(self, old: Learned, pending, judged, made, positions, count, passes) -> Learned:
    """With what became of a pass's drafts: `made` [positions] have one, `count` [batch] are
    emitted, after which rows are at `positions` [batch] and there were `passes` []."""
    _, accepted, gap, rejected_confidence = judged
    size, positions = len(made), positions - count
    tried = made[None] & (np.arange(size)[None] < count[:, None])
    accepted = tried & accepted
    estimate = old.estimate.update(tried, accepted, pending.confidences[:, :size])
    miss_streak = jnp.where(jnp.any(count > 1), 0, old.miss_streak + 1)
    put = lambda array, columns: write_columns(array, columns, positions, count)
    number = jnp.where(count > 0, jnp.sum(made, dtype=jnp.int32), 0)
    return Learned(
      estimate=estimate,
      miss_streak=miss_streak,
      due=passes + self.plan.backoff(miss_streak, estimate.mean_chance(count > 0)),
      # Not all at once, or a thread would be woken for half of it.
      drafts=old.drafts + engine.after(number, estimate.sums),
      cost=old.cost + self.plan.extra_cost(pending.count + 1),
      accepted=put(old.accepted, accepted),
      gaps=put(old.gaps, jnp.where(accepted, gap, 0.0)),
      rejected_confidences=put(old.rejected_confidences, rejected_confidence),
    )

  # ---- The decoder

  def _said(self, hidden: jax.Array) -> tuple[Greedy, Callable[[jax.Array], jax.Array]]:
    """The likeliest token, and how far the logit of any token is above its."""
    decoder, last = self._decoder(), self.task.config.num_decoder_layers
    read = decoder.read(last, hidden)
    head = self.task.weights.head
    if isinstance(head, eight_bits.QuantizedHead):
      best = head.greedy(read)
      score = lambda token: head.score(read, token)
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
      rows.append(jax.tree.map(lambda x: x[:, None], row))
    return hidden, rows

  def _several(self, states: jax.Array, caches, positions: jax.Array):
    """Layers k + 1 ... L over positions [batch, positions, emb]: [rows, emb], and caches."""
    task, decoder = self.task, self._decoder()
    biases = self.table.of_windows(positions, states.shape[1], task.native)
    hidden, written = states.reshape(-1, states.shape[-1]), []
    for layer, cache in enumerate(caches, start=self.rule.draft_layer + 1):
      row = decoder.project(layer, hidden)
      window = jax.tree.map(lambda x: x.reshape(task.batch_size, -1, *x.shape[1:]), row)
      written.append(attention_lib.write_window(cache, window, positions))
      attention = decoder.window_attention(layer, hidden, written[-1], biases)
      hidden = decoder.run_projected(layer, hidden, row, attention)
    return hidden, tuple(written)

  def _written(self, caches, rows, positions: jax.Array, last: jax.Array):
    """Every layer's cache with its row written at `positions`, once that leads to `last`."""
    ends = engine.after_each(positions, rows, last)
    return tuple(map(attention_lib.write_window, caches, rows, ends))

  def _decoder(self, past: tuple[jax.Array, ...] = ()) -> decoder_lib.DecoderStep:
    """The decoder at one position of every row, `past` the biases of the keys before it."""
    task = self.task
    return decoder_lib.DecoderStep(
      task.weights, task.config, task.encoded, past, self.table.current, task.native
    )


def write_columns(array, columns, positions: jax.Array, count: jax.Array) -> jax.Array:
  """`array` [batch, length] with the first `count` of `columns` at each row's position."""
  at = jnp.arange(array.shape[1], dtype=jnp.int32)[None, :] - positions[:, None]
  new = columns
  if columns.shape[1] > 1:
    new = jnp.take_along_axis(columns, jnp.clip(at, 0, columns.shape[1] - 1), axis=1)
  return jnp.where((at >= 0) & (at < count[:, None]), new.astype(array.dtype), array)
