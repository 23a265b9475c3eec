"""How many tokens to draft before a pass verifies them: as many as are likely to be accepted.

Drafts that are refused cost a pass of several positions for one token. What a draft's
confidence is worth is learned as the text goes on: heads of early layers may be too modest or
too sure. A pass makes one draft; where that one, by what is known of it, is not worth another
position, the pass has one position, like a step of the full model. Where pass after pass emits
one token, ever more of them make no draft.
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
from jaxtyping import Array, Float

Numbers = Sequence[float] | np.ndarray

# That a draft is accepted of which nothing is known.
CHANCE = 0.9
# Weights of the prior: so many drafts of a row, so much in the sums of `Odds.trust`, so many
# texts. Little, for a text of ten tokens has no time to find out.
PRIOR_TRIALS, PRIOR_TRUST, PRIOR_TEXTS = 1.0, 0.1, 2.0
# And so many drafts more, one a text that it was learned of.
MOST_TRIALS = 6.0
# Of `Prior.trust`: many texts whose drafts were right must not outweigh one's that are wrong.
LEAST_TRUST, MOST_TRUST = 0.02, 50.0
# Confidences are held between these: what is said to be certain must still be able to err.
MODEST, SURE = 0.02, 0.9
# One more position must give this much of the tokens a second that the pass has without it.
LEAST_GAIN = 0.9
# Drafts of the first text, of all rows, that are looked at: two (an older one weighs `MEMORY`).
FIRST_TRIALS = 1.5
# Drafts that are accepted less often are made less often.
DOUBTFUL = 0.5
# A draft that no pass reads on from, in steps of the full model.
LOOK = 0.05
# Most passes without a draft between two with one.
MOST_WAITS = 32
# What a trial still weighs after the next one: about the last twenty count.
MEMORY = 0.95


@struct.dataclass
class Prior:
  """What is expected of a text's drafts before it has any.

  Attributes:
    chance: that a draft is accepted, [].
    trust: odds that a draft is accepted over those that its confidence says, [] above 0.
    texts: that it was learned of, [].
  """

  chance: Float[Array, ""] | float
  trust: Float[Array, ""] | float
  texts: Float[Array, ""] | float = 0.0


# Hopeful, and confidences taken at their word.
UNKNOWN = Prior(CHANCE, 1.0)


@struct.dataclass
class Odds:
  """Drafts of each row that met the full model's token, the recent ones weighing more.

  Attributes:
    sums: over the drafts, [8, batch] float32: number of the accepted ones, number, sum of 1 - c
      over the accepted ones, c a draft's confidence, sum of c over the refused ones; and four
      that no draft changes: what the prior adds to the first, third and fourth, and its texts.
      One array, for an operation takes longer than its numbers.
  """

  sums: Float[Array, "8 batch"]

  @classmethod
  def none(cls, batch_size: int, prior: Prior) -> "Odds":
    """Before the first draft."""
    root = jnp.sqrt(jnp.asarray(prior.trust, jnp.float32))
    trials = _prior_trials(prior.texts)
    known = prior.chance * trials, PRIOR_TRUST * root, PRIOR_TRUST / root, prior.texts
    sums = [0.0] * 4 + [jnp.asarray(x, jnp.float32) for x in known]
    return cls(jnp.broadcast_to(jnp.stack(sums)[:, None], (8, batch_size)))

  def add(self, tried: jax.Array, accepted: jax.Array, confidences: jax.Array) -> "Odds":
    """With the trials of one more pass, [batch, window].

    Args:
      tried: whether there was a draft that met the full model's token, bool.
      accepted: whether it was accepted, bool.
      confidences: of the drafts.
    """
    said = jnp.clip(confidences, MODEST, SURE)
    right, refused = tried & accepted, tried & ~accepted
    number = lambda x: x.astype(jnp.float32)
    kinds = number(right), number(tried), jnp.where(right, 1.0 - said, 0.0)
    # Chosen and not stacked, which would be an operation more.
    which, each = np.arange(8)[:, None, None], jnp.where(refused, said, 0.0)
    for i, kind in enumerate(kinds):
      each = jnp.where(which == i, kind, each)
    new = jnp.sum(jnp.where(which < 4, each, 0.0), axis=-1)
    memory = jnp.where(which[..., 0] < 4, jnp.float32(MEMORY) ** new[1:2], 1.0)
    return Odds(self.sums * memory + new)

  @property
  def tried(self) -> jax.Array:
    """Number of drafts, [batch]."""
    return self.sums[1]

  @property
  def texts(self) -> jax.Array:
    """Texts that the prior was learned of, [batch]."""
    return self.sums[7]

  @property
  def share(self) -> jax.Array:
    """The chance that a draft of a row is accepted, [batch] below 1."""
    accepted, tried = self.sums[0] + self.sums[4], self.tried + _prior_trials(self.texts)
    return jnp.minimum(accepted / tried, 0.999)

  @property
  def trust(self) -> jax.Array:
    """Odds that a draft is accepted, over those that its confidence says, [batch].

    sum (accepted) (1 - c) / sum (refused) c: what makes confidences right in the mean if every
    draft's odds are as many times theirs (Mantel and Haenszel 1959).
    """
    return (self.sums[2] + self.sums[5]) / (self.sums[3] + self.sums[6])


def learned(prior: Prior, shares: Numbers, trusts: Numbers) -> Prior:
  """The prior of the texts after these.

  Args:
    prior: what those began with.
    shares, trusts: `Odds.share` and `Odds.trust` of each when it had ended.
  """
  # Python's own numbers: a call of NumPy between two texts takes longer than these sums.
  texts = PRIOR_TEXTS + len(shares)
  chance = (PRIOR_TEXTS * prior.chance + sum(shares)) / texts
  logs = PRIOR_TEXTS * math.log(prior.trust) + sum(map(math.log, trusts))
  trust = min(max(math.exp(logs / texts), LEAST_TRUST), MOST_TRUST)
  return Prior(chance, trust, prior.texts + len(shares))


@struct.dataclass
class Reach:
  """How far the drafts of a pass are likely to be read.

  Attributes:
    chances: that all drafts of a row so far are accepted, [batch]; 0 of rows that do not count.
    tokens: what the pass's positions so far are expected to emit, of all rows, [].
  """

  chances: jax.Array
  tokens: jax.Array

  @classmethod
  def of_first(cls, active: jax.Array) -> "Reach":
    """Before the first draft, of rows [batch] that are active."""
    chances = active.astype(jnp.float32)
    return cls(chances, jnp.sum(chances))

  def after(self, chances: jax.Array) -> "Reach":
    """With one more draft of every row, accepted with these chances [batch]."""
    return Reach(self.chances * chances, self.tokens)

  def extended(self) -> "Reach":
    """With one more position, which reads the last draft."""
    return Reach(self.chances, self.tokens + jnp.sum(self.chances))


@struct.dataclass
class Planned:
  """When a pass goes on drafting.

  Attributes:
    trust: `Odds.trust` of the rows, [batch].
    opening: chances that the first draft is accepted, summed over the rows, over the tokens
      expected of one position, above which a second one pays, []; infinite where none is to be
      read on from.
    more: the same of all drafts of 2, 3 ... positions.
  """

  trust: jax.Array
  opening: jax.Array
  more: tuple[float, ...] = struct.field(pytree_node=False)

  def chance(self, confidences: Float[Array, " batch"]) -> jax.Array:
    """The chance that a draft of this confidence is accepted, [batch]."""
    said = jnp.clip(confidences, MODEST, SURE)
    trusted = self.trust * said
    return trusted / (1.0 - said + trusted)

  def goes_on(self, at: jax.Array, reach: Reach) -> jax.Array:
    """Whether the pass should have one more position, [] bool.

    Args:
      at: positions that it has, less one, [] below the most.
      reach: with the draft of the last of them.
    """
    needed = jnp.where(at == 0, self.opening, jnp.array((0.0, *self.more), jnp.float32)[at])
    return jnp.sum(reach.chances) > needed * reach.tokens


@dataclasses.dataclass(frozen=True)
class Plan:
  """How many positions a pass should have.

  Attributes:
    costs: seconds of a pass of 1, 2, ... positions, in any unit.
    hope: no text has drafts unless the best pass, where nothing is known yet, has more than so
      many times the tokens a second of one position.
    adapts: False: always as many positions as there are costs.
  """

  costs: tuple[float, ...]
  hope: float = 1.0
  adapts: bool = True

  def waits(self, idle: jax.Array, odds: Odds, active: jax.Array) -> jax.Array:
    """Passes of one position, without a draft, before the next one that drafts, [].

    Args:
      idle: drafting passes since the last one that emitted two tokens of any row, [].
      odds: of every row.
      active: rows that count, [batch] bool.
    """
    if not self.adapts:
      return jnp.zeros((), jnp.int32)
    # 0, 0, 1, 2, 4 ...: two unsure drafts in turn are no news. Where they are too often wrong,
    # 0, 0, 4, 8 ...; and 0, 4, 8 ... if nothing before this text spoke for them.
    waits = 2 ** jnp.minimum(idle, 8)
    chance = odds.sums[4, 0] / _prior_trials(odds.texts[0])
    unproven = (odds.texts[0] == 0) | (chance < self.least_share)
    longer = jnp.where(unproven & (idle > 0), 2 * waits, 0)
    longer = jnp.where(~unproven & (idle > 1), waits, longer)
    doubtful = _share(odds, active) < self.least_share
    return jnp.minimum(jnp.where(doubtful, longer, waits // 4), MOST_WAITS)

  @functools.cached_property
  def least_share(self) -> float:
    """Drafts of which fewer are accepted are not worth looking at often: most are wrong, or
    even a certain one would not be read on from."""
    pays = (share for share in np.linspace(0.0, 0.99, 100) if self._opening(share) < 1.0)
    return max(DOUBTFUL, next(pays, 1.0))

  def _opening(self, share: Any) -> Any:
    """`Planned.opening` where so many drafts are accepted."""
    # With its first draft a row emits 1 + a + ... + a^(n - 2) tokens more of n positions. Of
    # single numbers, for XLA makes one operation of them.
    emitted, power, found = 0.0, 1.0, []
    for cost in self.costs[1:]:
      emitted, power = emitted + power, power * share
      found.append((cost / self.costs[0] - 1.0) / emitted)
    return functools.reduce(jnp.minimum if isinstance(share, jax.Array) else min, found)

  def besides(self, positions: jax.Array | int) -> jax.Array | float:
    """What a pass that drafts takes besides a step of the full model, in such steps, [].

    Args:
      positions: that it has, [].
    """
    if isinstance(positions, int):
      return LOOK
    return jnp.asarray(self.costs, jnp.float32)[positions - 1] / self.costs[0] - 1.0

  @functools.cached_property
  def hopes(self) -> bool:
    """Whether drafts are made at all: whether a text may begin with them.

    With many rows a pass of several positions costs about as many times a step, and only drafts
    that are nearly all accepted would pay, in every row.
    """
    tokens = (sum(CHANCE**i for i in range(n)) for n in range(1, len(self.costs) + 1))
    rates = [emitted / cost for emitted, cost in zip(tokens, self.costs, strict=True)]
    return not self.adapts or max(rates) > self.hope * rates[0]

  def __call__(self, odds: Odds, active: jax.Array) -> Planned:
    """The next pass that drafts.

    Args:
      odds: of every row.
      active: rows that count, [batch] bool.
    """
    costs = self.costs
    if not self.adapts:
      return Planned(odds.trust, jnp.zeros(()), (0.0,) * (len(costs) - 2))
    opening = self._opening(_share(odds, active))
    more = tuple(LEAST_GAIN * (new - old) / old for old, new in itertools.pairwise(costs[1:]))
    opening = jnp.where(looks(odds, active), jnp.inf, opening)
    return Planned(odds.trust, opening, more)


def looks(odds: Odds, active: jax.Array) -> jax.Array:
  """Whether the next draft is looked at, not read on from, [] bool: one of the first of a first
  text. It costs next to nothing to see whether it would have been right, and a window that is
  refused a thirtieth of 64 tokens."""
  tried = jnp.sum(jnp.where(active, odds.tried, 0.0))
  return (odds.texts[0] == 0) & (tried < FIRST_TRIALS)


def _prior_trials(texts: Any) -> Any:
  """Drafts that a prior of so many texts weighs."""
  return PRIOR_TRIALS + jnp.minimum(texts, MOST_TRIALS)


def _share(odds: Odds, active: jax.Array) -> jax.Array:
  """`Odds.share` of the rows that count, [batch] bool: [], their mean."""
  counted = active.astype(jnp.float32)
  return jnp.sum(odds.share * counted) / jnp.maximum(jnp.sum(counted), 1.0)
