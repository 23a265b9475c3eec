"""How likely drafts are to be accepted, what passes over them cost, and so how many are made.

The texts do not depend on any of this.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float

from calm import exits
from calm.decode import loop
from calm.t5 import decoder_weights, eight_bits, kernels, network, platforms

# The prior of the first text: cautious, so that its first draft is verified alone.
CHANCE, CALIBRATION = 0.6, 0.25
# Weights of a prior, in drafts: of the rate at least and at most, and of the calibration. Texts
# of ten tokens have no time to outweigh more.
LEAST_TRIALS, MOST_TRIALS, CALIBRATION_TRIALS = 1.0, 7.0, 0.1
# Weight of the first prior, in texts.
PRIOR_TEXTS = 2.0
# Bounds of a prior's calibration: many texts with good drafts must not outweigh a bad one.
LEAST_CALIBRATION, MOST_CALIBRATION = 0.02, 50.0
# Bounds of confidences: no draft counts as certain.
LEAST_CONFIDENCE, MOST_CONFIDENCE = 0.02, 0.9
# What a trial still weighs after the next one: about the last twenty count.
MEMORY = 0.95
# One more position must give this much of the tokens a second that the pass has without it.
LEAST_GAIN = 0.9
# Drafts that are accepted less often are made less often.
DOUBTFUL = 0.5
# A model is worth drafting for if passes pay where drafts are accepted so often.
GOOD = 0.9
# Cost of a draft that is verified alone, in steps of the full model.
DRAFT_COST = 0.05
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
    self,
    tried: Bool[Array, "batch positions"],
    accepted: Bool[Array, "batch positions"],
    confidences: Float[Array, "batch positions"],
  ) -> "AcceptanceEstimate":
    """With the drafts of one more pass."""
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
    """Odds that a draft is accepted, over those that its confidence says, [batch]: right in the
    mean if every draft's odds are as many times theirs (Mantel and Haenszel, 1959)."""
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
  """How many positions a pass should have.

  Attributes:
    costs: seconds of a pass of 1, 2, ... positions, in any unit.
    least_gain: what the best pass with good drafts must bring, in tokens a second over those of
      one position.
    adapts: False: always as many positions as there are costs.
  """

  costs: tuple[float, ...]
  least_gain: float = 1.0
  adapts: bool = True

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

  def goes_on(
    self,
    at: jax.Array,
    chances: Float[Array, " batch"],
    tokens: jax.Array,
    chance: jax.Array,
  ) -> jax.Array:
    """Whether a pass of `at` + 1 positions should have one more, [] bool.

    `chances` are that all drafts of a row so far are accepted, 0 of rows that do not count;
    `tokens` are expected of the positions so far; `chance` is the estimate's mean.
    """
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

  must: bool  # they are made whatever they are worth
  prior: Prior = UNKNOWN  # what the next text begins with
  saved: float = 0.0  # steps that drafts of the last batches saved, as far as `Plan` knows
  miss_streak: int = 0  # batches in turn after which they had saved none
  backoff: int = 0  # batches that make no draft before the next one that does
  plans: dict[int, Plan] = dataclasses.field(default_factory=dict)  # by number of rows
  # A batch that `update` has yet to see, and its active rows: its text is returned first.
  last: tuple[loop.Generation, np.ndarray] | None = None

  def update_from_last(self) -> None:
    """Reads the batch before, where that is still to be done."""
    if self.last is not None:
      last, self.last = self.last, None
      self.update(*last)

  def drafts_next(self, rows: int) -> bool:
    """Whether the next batch, of so many rows, makes drafts; counts one that does not."""
    worth = self.must or self.plans[rows].worth_drafting
    if self.backoff == 0 or not worth:
      return worth
    self.backoff -= 1
    return False

  def update(self, generation: loop.Generation, active: np.ndarray) -> None:
    """Reads a batch that made drafts, of numpy arrays."""
    verification = generation.verification
    assert verification is not None
    # Python's own numbers: NumPy's sums and choices between two texts took a tenth of a
    # millisecond, which is a third of a token.
    rows = verification.numbers.tolist()
    known = [
      row[2:4] for row, has_prompt in zip(rows, active.tolist(), strict=True) if has_prompt
    ]
    self.prior = later_prior(self.prior, known)
    # A batch takes as many steps as its longest row has tokens.
    tokens = max(map(np.count_nonzero, generation.exit_layers))
    saved = (1.0 - MARGIN) * tokens - max(row[4] for row in rows)
    self.saved = BATCH_MEMORY * self.saved + saved
    plan = self.plans.get(len(active))
    chance = sum(row[0] for row in known) / max(len(known), 1)
    promising = plan is not None and chance >= plan.least_chance
    missed = self.saved <= (LEAST_SAVED if promising else 0.0)
    self.miss_streak = self.miss_streak + 1 if missed else 0
    self.saved = max(self.saved, LEAST_SAVED)
    # 1, 4, 16 ...: a text that drafts for nothing runs a program that others leave cold.
    self.backoff = 0 if self.must else min(4**self.miss_streak // 4, MOST_BATCHES)


def later_prior(prior: Prior, known: Sequence[Sequence[float]]) -> Prior:
  """The prior of later texts, from the (chance, calibration) of each text when it had ended."""
  chance, calibration, before = prior
  texts = PRIOR_TEXTS + len(known)
  chance = (PRIOR_TEXTS * chance + sum(each[0] for each in known)) / texts
  logs = PRIOR_TEXTS * math.log(calibration) + sum(math.log(each[1]) for each in known)
  calibration = min(max(math.exp(logs / texts), LEAST_CALIBRATION), MOST_CALIBRATION)
  return chance, calibration, before + len(known)


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
  if batch == 1 and platforms.wakes_threads() and kernels.is_small(matrix) and not single:
    least_gain = math.inf
  return Plan(tuple(costs), least_gain, rule.adapts)


def _head(head: jax.Array | eight_bits.QuantizedHead, rows: int) -> float:
  """Cost of the head over so many rows, in float32 numbers that are read for one.

  On two CPU cores, T5 1.1 small: 8 bits take 0.3, 0.3, 0.5, 0.8 and 1.4 of a float32 row for
  2, 4, 8, 16 and 32 rows, and more where both sides have a sign. A float32 head writes the
  logits of several positions, which are read again.
  """
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
