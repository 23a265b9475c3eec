"""Wealth of a gambler who bets against E[loss] > tolerance, prompt by prompt.

Under that hypothesis each factor 1 + bet_i (tolerance - loss_i) has expectation
at most 1 given the past, if bet_i >= 0 was chosen before loss_i was seen, so
wealth ever reaches 1 / error_rate with probability at most error_rate (Ville
1939). At the last prompt it may also end at uniform / error_rate, for a uniform
that was drawn beside the losses: both together have probability error_rate at
most (Ramdas and Manole 2023). Losses and bets are [num_examples,
num_thresholds], rows in exchangeable order; bet i depends on earlier losses of
its column and on the design alone.
"""

import dataclasses
import math

import numpy as np
import numpy.typing as npt
from scipy import special

# Shares of the largest bet that keeps wealth nonnegative. One loss of 1 must
# not ruin plug-in bets; those that are made for one level and die with it go
# closer.
CAP_SHARE = 0.9
HEDGE_CAP_SHARE = 0.99
# before the first prompt: the largest of losses in [0, 1]
PRIOR_VARIANCE = 0.25
# prompts for which the prior variance counts in the hedge
HEDGE_PRIOR_SIZE = 8.0
# the hedge looks at its wealth after this share of the prompts that are left
_LOOKS = 64
LEAST_VARIANCE = 1e-12
# Rows whose wealth is followed at once, and losses where columns are few.
_BLOCK = 64
_CELLS = 2**16
PRECISION = 1e-4  # of an upper bound, as a share of the range of losses


@dataclasses.dataclass(frozen=True, eq=False)
class Design:
  """What bets may depend on besides earlier losses; fixed before any loss is
  seen.
  """

  tolerance: npt.ArrayLike  # the bound that is tested; a number or one a column
  error_rate: float  # level the bets are tuned for
  planned_size: int  # prompts that there will be at most
  upper: float = 1.0  # declared upper bound of losses
  # Whether bets are a hedge: more power at that one level, a useless p-value at
  # any other.
  hedges: bool = False
  # drawn for the end; a number or one a column. 1: none is drawn
  uniform: npt.ArrayLike = 1.0

  @property
  def cap(self) -> np.ndarray:
    """The largest bet."""
    share = HEDGE_CAP_SHARE if self.hedges else CAP_SHARE
    return share / np.maximum(self.upper - np.asarray(self.tolerance), 1e-9)

  @property
  def target(self) -> float:
    """log wealth that certifies."""
    return math.log(1.0 / self.error_rate)

  @property
  def pace(self) -> float:
    """Bet times standard deviation that suits the whole of the planned
    prompts.
    """
    return math.sqrt(2.0 * self.target / self.planned_size)

  def bets(self, losses: np.ndarray) -> np.ndarray:
    """Bets before they are cut at `cap`."""
    return (
      hedge_bets(losses, self) if self.hedges else plug_in_bets(losses, self)
    )


def plug_in_bets(losses: np.ndarray, design: Design) -> np.ndarray:
  """The plug-in bets before they are cut; the tolerance plays no part.

      bet_i = sqrt(2 log(1 / error_rate) / (planned_size variance_i))
      variance_i = (1/4 + sum over j < i of (loss_j - mean_j)^2) / i,  mean_j of
      losses up to j with one loss of 0 before the first

  (Waudby-Smith and Ramdas 2024, with 0 for their prior mean of 1/2: losses are
  small.)
  """
  variance = _squares_before(losses)
  variance += PRIOR_VARIANCE
  variance /= np.arange(1.0, len(losses) + 1.0)[:, None]
  return design.pace / np.sqrt(
    np.maximum(variance, LEAST_VARIANCE, out=variance)
  )


def hedge_bets(losses: np.ndarray, design: Design) -> np.ndarray:
  """Bets that replicate the option which pays 1 / error_rate or nothing (Browne
  1999).

      chance_i = error_rate wealth_i,   z_i = Phi^-1(chance_i)
      bet_i = phi(z_i) / (chance_i sqrt((planned_size - i) variance_i))

  Were losses a random walk with mean `tolerance` and that variance, `chance_i`
  would be the price of the option and the bet its hedge: of all bets the one
  that most often ends at 1 / error_rate, whatever the mean below the tolerance
  is. `variance_i` is as for `plug_in_bets`, with 8 prompts of variance
  tolerance (1 - tolerance) before the first. Wealth is looked at again after
  every 64th of the prompts left; once it has reached the target or fallen below
  error_rate, bets go on at the plug-in pace, for the sake of upper bounds.
  """
  wealth, highest = np.zeros((2, losses.shape[1]))
  scale = max(abs(design.upper), 1e-9)
  share = np.clip(np.asarray(design.tolerance) / scale, 0.01, 0.5)
  prior = HEDGE_PRIOR_SIZE * scale**2 * share * (1.0 - share)
  found = _squares_before(losses)
  row = 0
  while row < len(losses):
    left = design.planned_size - row
    rows = slice(row, row + max(1, left // _LOOKS))
    needed = design.target - wealth
    open_ = (highest < design.target) & (needed < 2.0 * design.target)
    aim = np.full(len(needed), design.pace)
    z = special.ndtri_exp(-np.maximum(needed[open_], 1e-12))
    # phi(z) / Phi(z) where log Phi(z) = -needed; without underflow.
    ratio = math.sqrt(2.0 / math.pi) / special.erfcx(-z / math.sqrt(2.0))
    aim[open_] = ratio / math.sqrt(left)
    gains = design.tolerance - losses[rows]
    bets = found[rows]
    counts = np.arange(row, row + len(bets)) + HEDGE_PRIOR_SIZE
    bets += prior
    np.divide(np.sqrt(counts)[:, None], np.sqrt(bets, out=bets), out=bets)
    bets *= aim
    gains *= np.minimum(bets, design.cap)
    most, last = _follow(gains)
    highest = np.maximum(highest, wealth + most)
    wealth += last
    row = rows.stop
  return found


def _squares_before(losses: np.ndarray) -> np.ndarray:
  """Sums of (loss_j - mean_j)^2 over j < i, mean_j of losses up to j and two
  losses of 0.
  """
  found = np.cumsum(losses, axis=0)
  found /= np.arange(2.0, len(losses) + 2.0)[:, None]
  np.square(np.subtract(losses, found, out=found), out=found)
  np.cumsum(found, axis=0, out=found)
  found[1:] = found[:-1].copy()
  found[0] = 0.0
  return found


def _follow(gains: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Largest and last sum over rows of log(1 + gain), gain >= -0.99; overwrites
  `gains`.
  """
  if len(gains) <= _LOOKS:
    # So few factors of at least 0.01 do not underflow; a product that overflows
    # is there.
    gains += 1.0
    product = gains[0]
    highest = gains[0].copy()
    with np.errstate(over="ignore"):
      for factors in gains[1:]:  # numpy accumulates along rows ten times slower
        np.maximum(
          highest, np.multiply(product, factors, out=product), out=highest
        )
      return np.log(highest), np.log(product)
  np.cumsum(np.log1p(gains, out=gains), axis=0, out=gains)
  return gains.max(axis=0), gains[-1].copy()


def log_wealth(
  losses: np.ndarray, design: Design, bets: np.ndarray | None = None
):
  """log wealth after each prompt, in nats; `bets` are `design.bets(losses)`
  where known.
  """
  bets = design.bets(losses) if bets is None else bets
  gains = design.tolerance - losses
  gains *= np.minimum(bets, design.cap)
  gains += 1.0
  return np.cumsum(np.log(gains, out=gains), axis=0, out=gains)


def log_p_value(
  losses: np.ndarray, design: Design, bets: np.ndarray | None = None
):
  """log of the betting p-value (Waudby-Smith and Ramdas 2024; Ville's
  inequality).

      wealth_t = product over i <= t of (1 + bet_i (tolerance - loss_i))
      p = 1 / max(1, max over t of wealth_t, wealth_n / uniform)

  Losses are at most `design.upper`, the tolerance is below: signed differences
  in [-1, 1] go in as they are. It is valid for every level; `design.error_rate`
  only tunes the bets.
  """
  wealth = log_wealth(losses, design, bets)
  highest = np.maximum(wealth.max(axis=0), wealth[-1] - np.log(design.uniform))
  return np.minimum(-highest, 0.0)


def upper_bound(
  losses: np.ndarray,
  design: Design,
  lower: float = 0.0,
  bets: np.ndarray | None = None,
) -> np.ndarray:
  """[num_thresholds] upper bounds of E[loss] from the betting p-value.

  Bets b before the cut do not depend on the tolerance m for which wealth is
  followed, only on the one that was tested. Cut at c / (upper - m), every
  factor grows with m:

      1 + min(b, c / (upper - m)) (m - loss)

  because (m - loss) / (upper - m) and m - loss do, and because the minimum is a
  maximum where m < loss. So what is rejected is an interval up to `upper`, and
  its lower end is found by halving, from the tested tolerance (a number) on;
  `lower` is the declared bound of losses.
  """
  bets, count = design.bets(losses) if bets is None else bets, losses.shape[1]
  low = np.full(count, float(lower))
  high = np.full(count, float(design.upper))
  middle = np.full(count, float(np.asarray(design.tolerance)))
  uniform = np.broadcast_to(design.uniform, count)
  while np.any(active := high - low > PRECISION * (design.upper - lower)):
    (at,) = np.nonzero(active)
    tolerance = middle[at]
    cap = dataclasses.replace(design, tolerance=middle[at]).cap
    wealth = np.zeros(len(at))
    reached = np.zeros(len(at), bool)
    size = max(_BLOCK, _CELLS // len(at))
    for start in range(0, len(losses), size):
      rows = slice(start, start + size)
      (going,) = np.nonzero(~reached)
      gains = np.minimum(bets[rows][:, at[going]], cap[going])
      gains *= tolerance[going] - losses[rows][:, at[going]]
      highest, last = _follow(gains)
      reached[going] = wealth[going] + highest >= design.target
      wealth[going] += last
    rejected = reached | (wealth >= design.target + np.log(uniform[at]))
    high[at] = np.where(rejected, middle[at], high[at])
    low[at] = np.where(rejected, low[at], middle[at])
    middle = (low + high) / 2.0
  return high
