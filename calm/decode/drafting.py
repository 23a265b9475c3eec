"""How many tokens to draft before a pass verifies them: as many as have paid so far.

Drafts that are refused cost a pass of several positions for one token. Where the share of
accepted drafts says that one position at a time is fastest, nothing is drafted, and now and
then a draft is made beside the full model's token to see whether that has changed. Where pass
after pass emits one token, as where the draft head is sure of nothing, ever more steps of the
full model come between them.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

# Before a text has a draft: so likely is one to be accepted, as surely as so many certain ones
# would say. Hopeful, for a text of ten tokens has no time to find out; the texts before it may
# know better (`learned`), for which that counts as so many texts.
PRIOR, PRIOR_TRIALS, PRIOR_TEXTS = 0.9, 1.5, 2.0
# Tokens a second of a pass with drafts, over those without, from which drafts are made at all.
MARGIN = 1.0
# Most steps between two passes, as a multiple of `Plan.probe_every`.
MOST_STEPS = 4
# What a trial still weighs after the next one: about the last twenty count.
MEMORY = 0.95


@struct.dataclass
class Odds:
  """Drafts of each row that met the full model's token, the recent ones weighing more.

  Each weighs what its confidence says: where the draft head knew that it might be wrong, its
  being wrong tells little of the others.

  Attributes:
    accepted, tried: [batch] float32.
    prior: the chance that a draft is accepted of which nothing is known yet, [].
  """

  accepted: Float[Array, " batch"]
  tried: Float[Array, " batch"]
  prior: Float[Array, ""] | float = PRIOR

  def add(self, accepted: jax.Array, confidences: jax.Array) -> "Odds":
    """With the trials of one more pass, [batch, window].

    Args:
      accepted: whether the draft was, bool.
      confidences: of the draft; 0 where none was tried.
    """
    new = jnp.sum(confidences, axis=1)
    old = jnp.float32(MEMORY) ** new
    agreed = jnp.sum(jnp.where(accepted, confidences, 0.0), axis=1)
    return Odds(self.accepted * old + agreed, self.tried * old + new, self.prior)

  @property
  def share(self) -> jax.Array:
    """The chance that a row's next draft is accepted, [batch] below 1."""
    share = (self.accepted + self.prior * PRIOR_TRIALS) / (self.tried + PRIOR_TRIALS)
    return jnp.minimum(share, 0.999)


def learned(prior: float, shares: Sequence[float]) -> float:
  """The prior of the texts after these.

  Args:
    prior: what those began with, a chance.
    shares: `Odds.share` of each when it had ended.
  """
  return (PRIOR_TEXTS * prior + sum(shares)) / (PRIOR_TEXTS + len(shares))


@struct.dataclass
class Planned:
  """One pass.

  Attributes:
    count: most positions that it has, [].
    probes: whether a draft is made even at the last of them, to learn from it, [] bool.
  """

  count: jax.Array
  probes: jax.Array


@dataclasses.dataclass(frozen=True)
class Plan:
  """How many positions a pass should have.

  Attributes:
    costs: seconds of a pass of 1, 2, ... positions, in any unit.
    probe_every: steps without a draft between two passes that have one to learn from, or more
      where the passes before were in vain.
    hope: `MARGIN` of a text that nothing is known of yet, below which none has drafts.
    adapts: False: always as many positions as there are costs.
  """

  costs: tuple[float, ...]
  probe_every: int = 8
  hope: float = MARGIN
  adapts: bool = True

  def steps(self, planned: Planned, idle: jax.Array) -> jax.Array:
    """Steps of the full model before the next pass, [].

    Args:
      planned: that pass.
      idle: passes since the last one that emitted two tokens of any row, [].
    """
    # 0, 0, 1, 2, 4 ...: two unsure drafts in turn are no news.
    backing_off = 2 ** jnp.minimum(idle, 8) // 4
    least = jnp.where(planned.count == 1, self.probe_every, 0)
    return jnp.minimum(jnp.maximum(least, backing_off), MOST_STEPS * self.probe_every)

  @property
  def hopes(self) -> bool:
    """Whether drafts are made at all: whether a text may begin with them.

    With many rows a pass of several positions costs about as many times a step, and only drafts
    that are nearly all accepted would pay, in every row.
    """
    tokens = (sum(PRIOR**i for i in range(n)) for n in range(1, len(self.costs) + 1))
    rates = [emitted / cost for emitted, cost in zip(tokens, self.costs, strict=True)]
    return not self.adapts or max(rates) > self.hope * rates[0]

  def __call__(self, odds: Odds, active: jax.Array) -> Planned:
    """The next pass.

    Args:
      odds: of every row.
      active: rows that count, [batch] bool.
    """
    if not self.adapts:
      return Planned(jnp.int32(len(self.costs)), jnp.zeros((), bool))
    # A pass of n positions emits 1 + a + ... + a^(n - 1) tokens of a row in the mean.
    powers = jnp.cumprod(jnp.tile(odds.share[:, None], (1, len(self.costs) - 1)), axis=1)
    more = jnp.cumsum(jnp.where(active[:, None], powers, 0.0), axis=1)
    one = jnp.sum(active, dtype=jnp.float32)
    emitted = jnp.concatenate([one[None], one + jnp.sum(more, axis=0)])
    rates = emitted / jnp.asarray(self.costs, jnp.float32)
    pays = jnp.max(rates) > MARGIN * rates[0]
    count = jnp.where(pays, jnp.argmax(rates).astype(jnp.int32) + 1, 1)
    return Planned(count, count == 1)
