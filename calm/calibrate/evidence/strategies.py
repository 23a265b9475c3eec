"""Rules for bets: how much is laid on the next loss being below the tolerance.

A rule gives a bet for every prompt from the losses before it and a design that was fixed
beforehand. Bets are then cut so that wealth stays positive; `betting` follows the wealth.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from scipy import special

# Plug-in bets stop this far short of the largest that keeps wealth nonnegative: one loss of 1
# must not ruin. Bets that are made for one level and die with it go closer.
CAP_SHARE, HEDGE_CAP_SHARE = 0.9, 0.99
# What the running variance holds before the first prompt: the largest of losses in [0, 1].
PRIOR_VARIANCE = 0.25
# How many prompts the variance of a loss of mean `tolerance` counts for in the hedge.
HEDGE_PRIOR_SIZE = 8.0
# A hedge slows down as it gets ahead, and ends where the prompts end. Where each prompt costs a
# decoding, it goes on at this share of the plug-in pace at least.
EARLY_PACE = 0.7
# The hedge looks at its wealth again after this share of the prompts that are left.
_LOOKS = 64
LEAST_VARIANCE = 1e-12


@dataclasses.dataclass(frozen=True, eq=False)
class Design:
  """What bets may depend on besides earlier losses; fixed before any loss is seen.

  Attributes:
    tolerance: the bound that is tested; a number or one a column.
    error_rate: level the bets are tuned for.
    planned_size: prompts that there will be at most.
    upper: declared upper bound of losses.
    cap_share: the largest bet as a share of the largest that keeps wealth nonnegative.
    least_pace: the smallest bet of a hedge as a share of the plug-in bet.
  """

  tolerance: npt.ArrayLike
  error_rate: float
  planned_size: int
  upper: float = 1.0
  cap_share: float = CAP_SHARE
  least_pace: float = 0.0

  @property
  def cap(self) -> np.ndarray:
    """The largest bet."""
    return self.cap_share / np.maximum(self.upper - np.asarray(self.tolerance), 1e-9)

  @property
  def target(self) -> float:
    """log wealth that certifies."""
    return math.log(1.0 / self.error_rate)


@dataclasses.dataclass(frozen=True)
class Strategy:
  """A rule for bets.

  Attributes:
    name: what it is called in results.
    free: (losses [n, k], design) -> bets [n, k] of at least 0, before they are cut at the cap;
      row i depends on rows before i of the same column and on the design alone.
    cap_share: `Design.cap_share` that the rule is made for.
    least_pace: `Design.least_pace` that the rule is made for.
    aims: whether free bets depend on the tolerance.
  """

  name: str
  free: Callable[[np.ndarray, Design], np.ndarray]
  cap_share: float = CAP_SHARE
  aims: bool = False
  least_pace: float = 0.0

  def design(
    self, tolerance: npt.ArrayLike, error_rate: float, planned_size: int, upper: float = 1.0
  ) -> Design:
    """A design with this rule's cap and least pace."""
    return Design(tolerance, error_rate, planned_size, upper, self.cap_share, self.least_pace)

  def bets(self, losses: np.ndarray, design: Design) -> np.ndarray:
    """Bets [n, k] in [0, design.cap]."""
    return np.minimum(self.free(losses, design), design.cap)


def _variance_before(losses: np.ndarray) -> np.ndarray:
  count = np.arange(2.0, len(losses) + 2.0)[:, None]
  variance = losses - np.cumsum(losses, axis=0) / count
  np.cumsum(np.square(variance, out=variance), axis=0, out=variance)
  variance += PRIOR_VARIANCE
  variance /= count
  variance[1:] = variance[:-1].copy()
  variance[0] = PRIOR_VARIANCE
  return np.maximum(variance, LEAST_VARIANCE, out=variance)


def _pace(design: Design) -> float:
  """Bet times standard deviation that suits the whole of the planned prompts."""
  return math.sqrt(2.0 * design.target / design.planned_size)


def plug_in_bets(losses: np.ndarray, design: Design) -> np.ndarray:
  """The plug-in bets before they are cut at `design.cap`; the tolerance plays no part.

      bet_i = sqrt(2 log(1 / error_rate) / (planned_size variance_i))
      variance_i = (1/4 + sum over j < i of (loss_j - mean_j)^2) / i,  mean_j of losses up to j
      with one loss of 0 before the first

  (Waudby-Smith and Ramdas 2024, with 0 for their prior mean of 1/2: losses are small.)

  Args:
    losses: [num_examples, num_thresholds], in the fixed order.
    design: level and planned size.

  Returns:
    [num_examples, num_thresholds], above 0; row i depends on rows before i alone.
  """
  return _pace(design) / np.sqrt(_variance_before(losses))


class Hedge:
  """Bets that replicate the option which pays 1 / error_rate or nothing (Browne 1999).

      chance_i = error_rate wealth_i,   z_i = Phi^-1(chance_i)
      bet_i = phi(z_i) / (chance_i sqrt((planned_size - i) variance_i))

  Were losses a random walk with mean `tolerance` and that variance, `chance_i` would be the
  price of the option and the bet its hedge: of all bets the one that most often ends at
  1 / error_rate, whatever the mean below the tolerance is. `variance_i` is as for
  `plug_in_bets`, with 8 prompts of variance tolerance (1 - tolerance) before the first. Wealth
  is looked at again after every 64th of the prompts left. Once it has reached the target, or
  has fallen below error_rate, nothing is left to hedge: bets go on at the plug-in pace, for the
  sake of upper bounds. No bet is below `design.least_pace` of the plug-in one.

  Attributes:
    row: losses seen.
    wealth: [num_columns] log wealth after them.
    highest: [num_columns] largest log wealth so far.
  """

  def __init__(self, design: Design, num_columns: int):
    self.design = design
    self.row = 0
    self.wealth, self.highest = np.zeros((2, num_columns))
    scale = max(abs(design.upper), 1e-9)
    share = np.clip(np.asarray(design.tolerance) / scale, 0.01, 0.5)
    self._prior = HEDGE_PRIOR_SIZE * scale**2 * share * (1.0 - share) + self.wealth
    self._cap = design.cap + self.wealth
    self._aim, self._next_look = self.wealth, 0

  @property
  def look(self) -> int:
    """How many losses are bet on from one look at wealth to the next."""
    return max(1, (self.design.planned_size - self.row) // _LOOKS)

  def keep(self, columns: np.ndarray) -> None:
    """Forgets all but some columns."""
    tolerance = np.asarray(self.design.tolerance)[columns]
    self.design = dataclasses.replace(self.design, tolerance=tolerance)
    for name in ("wealth", "highest", "_prior", "_cap", "_aim"):
      setattr(self, name, getattr(self, name)[columns])

  def advance(self, losses: np.ndarray, squares: np.ndarray) -> np.ndarray:
    """Bets on the next losses, not beyond the next look, before they are cut.

    Args:
      losses: [rows, num_columns]; overwritten.
      squares: [rows, num_columns] of `squares_before`; overwritten, and returned as bets.
    """
    if self.row == self._next_look:
      self._aim, self._next_look = self._aims(), self.row + self.look
    counts = np.arange(self.row, self.row + len(losses)) + HEDGE_PRIOR_SIZE
    bets = np.add(squares, self._prior, out=squares)
    np.divide(np.sqrt(counts)[:, None], np.sqrt(bets, out=bets), out=bets)
    bets *= self._aim
    gains = np.subtract(self.design.tolerance, losses, out=losses)
    gains *= np.minimum(bets, self._cap)
    highest, last = follow(gains)
    np.maximum(self.highest, self.wealth + highest, out=self.highest)
    self.wealth += last
    self.row += len(losses)
    return bets

  def _aims(self) -> np.ndarray:
    """[num_columns] bets times standard deviation until the next look."""
    design = self.design
    needed = design.target - self.wealth
    open_ = (self.highest < design.target) & (needed < 2.0 * design.target)
    left = math.sqrt(design.planned_size - self.row)
    aim = np.full(len(needed), _pace(design))
    aim[open_] = np.maximum(_price_ratio(needed[open_]) / left, design.least_pace * aim[open_])
    return aim


def squares_before(losses: np.ndarray) -> np.ndarray:
  """Sums of (loss_j - mean_j)^2 over j < i, mean_j of losses up to j and two losses of 0.

  Args:
    losses: [num_examples, num_columns].

  Returns:
    [num_examples, num_columns]; row i depends on rows before i alone.
  """
  found = np.cumsum(losses, axis=0)
  found /= np.arange(2.0, len(losses) + 2.0)[:, None]
  np.square(np.subtract(losses, found, out=found), out=found)
  np.cumsum(found, axis=0, out=found)
  found[1:] = found[:-1].copy()
  found[0] = 0.0
  return found


def follow(gains: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Largest and last sum over rows of log(1 + gain), [num_columns] each.

  Args:
    gains: [num_examples, num_columns], at least -0.99; overwritten.
  """
  if len(gains) <= _LOOKS:
    # So few factors of at least 0.01 do not underflow; a product that overflows is there.
    gains += 1.0
    product, highest = gains[0], gains[0].copy()
    with np.errstate(over="ignore"):
      for factors in gains[1:]:  # numpy accumulates along rows ten times slower
        np.maximum(highest, np.multiply(product, factors, out=product), out=highest)
      return np.log(highest), np.log(product)
  np.cumsum(np.log1p(gains, out=gains), axis=0, out=gains)
  return gains.max(axis=0), gains[-1].copy()


def hedge_bets(losses: np.ndarray, design: Design) -> np.ndarray:
  """The bets of `Hedge` before they are cut, [num_examples, num_thresholds]."""
  hedge, bets = Hedge(design, losses.shape[1]), squares_before(losses)
  while (start := hedge.row) < len(losses):
    rows = slice(start, start + hedge.look)
    hedge.advance(losses[rows].copy(), bets[rows])
  return bets


def _price_ratio(needed: np.ndarray) -> np.ndarray:
  """phi(z) / Phi(z) where log Phi(z) = -needed; without underflow."""
  z = special.ndtri_exp(-np.maximum(needed, 1e-12))
  return math.sqrt(2.0 / math.pi) / special.erfcx(-z / math.sqrt(2.0))


# The bet of Waudby-Smith and Ramdas (2024) with a fixed sample size in mind.
PLUG_IN = Strategy("plug_in", plug_in_bets)
# More power at that one level, a useless p-value at any other.
FIXED_LEVEL = Strategy("fixed_level", hedge_bets, HEDGE_CAP_SHARE, aims=True)
# The same for a test that stops as soon as it can: nearly that power, and half the prompts.
EARLY = Strategy("early", hedge_bets, HEDGE_CAP_SHARE, aims=True, least_pace=EARLY_PACE)
