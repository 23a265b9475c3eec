"""Wealth of a gambler who bets against E[loss] > tolerance, prompt by prompt.

Under that hypothesis each factor 1 + bet_i (tolerance - loss_i) has expectation at most 1 given
the past, if bet_i >= 0 was chosen before loss_i was seen. Wealth is then a nonnegative
supermartingale, and it ever reaches 1 / error_rate with probability at most error_rate,
whenever one stops (Ville 1939). At the last prompt it may also end at uniform / error_rate, for
a uniform that was drawn beside the losses: both together have probability error_rate at most
(Ramdas and Manole 2023). A strategy gives the bets; they are cut so that wealth stays positive.
Rows must be in exchangeable order: `calibrate` permutes them.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

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
# The hedge looks at its wealth again after this share of the prompts that are left.
_LOOKS = 64
LEAST_VARIANCE = 1e-12
# Rows, and pairs of a column and a tolerance, whose wealth is followed at once.
_BLOCK, _PAIRS, _HEDGED_PAIRS = 64, 1024, 8192
# Of a few pairs more rows are followed at once, in logarithms.
_CELLS = 2**16


@dataclasses.dataclass(frozen=True, eq=False)
class Design:
  """What bets may depend on besides earlier losses; fixed before any loss is seen."""

  tolerance: npt.ArrayLike  # the bound that is tested; a number or one a column
  error_rate: float  # level the bets are tuned for
  planned_size: int  # prompts that there will be at most
  upper: float = 1.0  # declared upper bound of losses
  # The largest bet as a share of the largest that keeps wealth nonnegative.
  cap_share: float = CAP_SHARE
  log_uniform: npt.ArrayLike = 0.0  # of the uniform at the end; 0: none is drawn

  @property
  def cap(self) -> np.ndarray:
    """The largest bet."""
    return self.cap_share / np.maximum(self.upper - np.asarray(self.tolerance), 1e-9)

  @property
  def target(self) -> float:
    """log wealth that certifies."""
    return math.log(1.0 / self.error_rate)

  def of_pairs(self, places: Any, tolerance: np.ndarray) -> "Design":
    """The design of some columns, at these tolerances."""
    uniform = np.asarray(self.log_uniform)
    uniform = uniform[places] if uniform.ndim else uniform
    return dataclasses.replace(self, tolerance=tolerance, log_uniform=uniform)


@dataclasses.dataclass(frozen=True)
class Strategy:
  """A rule for bets."""

  name: str  # what it is called in results
  # (losses [n, k], design) -> bets [n, k] of at least 0, before they are cut at the cap; row i
  # depends on rows before i of the same column and on the design alone.
  free: Callable[[np.ndarray, Design], np.ndarray]
  cap_share: float = CAP_SHARE  # `Design.cap_share` that the rule is made for
  aims: bool = False  # whether free bets depend on the tolerance

  def design(
    self, tolerance: npt.ArrayLike, error_rate: float, planned_size: int, upper: float = 1.0
  ) -> Design:
    """A design with this rule's cap."""
    return Design(tolerance, error_rate, planned_size, upper, self.cap_share)

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
  Losses and bets are [num_examples, num_thresholds]; bet i depends on losses before i alone.
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
  sake of upper bounds.

  After `row` losses `wealth` [num_columns] is log wealth, `highest` the largest so far.
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
    """Bets on the next losses, at most `look`, before they are cut.

    `losses` and `squares` (of `_squares_before`) are [rows, num_columns] and overwritten.
    """
    if self.row == self._next_look:
      self._aim, self._next_look = self._aims(), self.row + self.look
    counts = np.arange(self.row, self.row + len(losses)) + HEDGE_PRIOR_SIZE
    bets = np.add(squares, self._prior, out=squares)
    np.divide(np.sqrt(counts)[:, None], np.sqrt(bets, out=bets), out=bets)
    bets *= self._aim
    gains = np.subtract(self.design.tolerance, losses, out=losses)
    gains *= np.minimum(bets, self._cap)
    highest, last = _follow(gains)
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
    aim[open_] = _price_ratio(needed[open_]) / left
    return aim


def _squares_before(losses: np.ndarray) -> np.ndarray:
  """Sums of (loss_j - mean_j)^2 over j < i, mean_j of losses up to j and two losses of 0."""
  found = np.cumsum(losses, axis=0)
  found /= np.arange(2.0, len(losses) + 2.0)[:, None]
  np.square(np.subtract(losses, found, out=found), out=found)
  np.cumsum(found, axis=0, out=found)
  found[1:] = found[:-1].copy()
  found[0] = 0.0
  return found


def _follow(gains: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Largest and last sum over rows of log(1 + gain), gain >= -0.99; overwrites `gains`."""
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
  hedge, bets = Hedge(design, losses.shape[1]), _squares_before(losses)
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


def _check_losses(losses: npt.ArrayLike, upper: float) -> np.ndarray:
  losses = np.asarray(losses, np.float64)
  if losses.ndim not in (1, 2) or not losses.size:
    raise ValueError(
      "Expected `losses` to be [num_examples] or [num_examples, num_thresholds] with at least"
      f" one row, got shape {losses.shape}."
    )
  bad = ~((losses <= upper) & (losses > -np.inf))
  if np.any(bad):
    odd = float(losses[bad].flat[0])
    raise ValueError(
      f"Expected `losses` to be finite and at most `upper` = {upper}, got {odd!r}."
    )
  return losses


def check_levels(tolerance: float, error_rate: float, upper: float) -> None:
  """Raises ValueError unless `tolerance` < `upper` and `error_rate` is in (0, 1)."""
  if not (np.isfinite(tolerance) and tolerance < upper):
    raise ValueError(f"Expected `tolerance` to be below `upper` = {upper}, got {tolerance!r}.")
  if not 0.0 < error_rate < 1.0:
    raise ValueError(f"Expected `error_rate` to be in (0, 1), got {error_rate!r}.")


def log_wealth(
  losses: npt.ArrayLike, design: Design, strategy: Strategy = PLUG_IN
) -> np.ndarray:
  """log wealth after each prompt, in nats; wealth starts at 1 before the first row.

  `losses` are [num_examples] or [num_examples, num_thresholds], in the fixed order, as is the
  result. ValueError where they are not finite, above the upper bound or more than planned, or
  the design leaves its range.
  """
  losses = _check_losses(losses, design.upper)
  check_levels(float(np.max(design.tolerance)), design.error_rate, design.upper)
  if len(losses) > design.planned_size:
    raise ValueError(
      "Expected `planned_size` to be at least the number of losses, got"
      f" {design.planned_size} for {len(losses)}."
    )
  columns = losses.reshape(len(losses), -1)
  gains = design.tolerance - columns
  gains *= strategy.bets(columns, design)
  gains += 1.0
  wealth = np.cumsum(np.log(gains, out=gains), axis=0, out=gains)
  return wealth.reshape(losses.shape)


def certifies(
  losses: np.ndarray, columns: np.ndarray, design: Design, strategy: Strategy = PLUG_IN
) -> np.ndarray:
  """Whether wealth ever reaches the target, for many columns and tolerances, [num_pairs] bool.

  The answer of `log_wealth(losses[:, columns], design).max(axis=0) >= design.target`, sooner;
  `columns` and `design.tolerance` are [num_pairs].
  """
  if not strategy.aims:
    return _reaches(losses, strategy.free(losses, design), columns, design)
  tolerance = np.broadcast_to(np.asarray(design.tolerance, np.float64), len(columns))
  squares, reached = _squares_before(losses), np.zeros(len(columns), bool)
  for start in range(0, len(columns), _HEDGED_PAIRS):
    part = slice(start, start + _HEDGED_PAIRS)
    pairs = design.of_pairs(part, tolerance[part])
    reached[part] = _hedge_reaches(losses, squares, columns[part], pairs)
  return reached


def _hedge_reaches(
  losses: np.ndarray, squares: np.ndarray, columns: np.ndarray, design: Design
) -> np.ndarray:
  """`certifies` for bets that aim; pairs that have got there leave."""
  hedge, going = Hedge(design, len(columns)), np.arange(len(columns))
  reached = np.zeros(len(columns), bool)
  while (start := hedge.row) < len(losses) and len(going):
    rows, at = slice(start, start + hedge.look), columns[going]
    hedge.advance(losses[rows].take(at, axis=1), squares[rows].take(at, axis=1))
    there = hedge.highest >= design.target
    if there.any():
      reached[going[there]] = True
      going = going[~there]
      hedge.keep(~there)
  uniform = np.broadcast_to(design.log_uniform, len(columns))
  reached[going] = hedge.wealth >= design.target + uniform[going]
  return reached


def _reaches(
  losses: np.ndarray, free: np.ndarray, columns: np.ndarray, design: Design
) -> np.ndarray:
  """`certifies` for free bets, which all tolerances of a column share."""
  tolerance, cap = np.asarray(design.tolerance), design.cap
  wealth, reached = np.zeros(len(columns)), np.zeros(len(columns), bool)
  size = max(_BLOCK, _CELLS // max(1, len(columns)))
  for start in range(0, len(losses), size):
    rows = slice(start, start + size)
    (going,) = np.nonzero(~reached)
    for part in np.split(going, range(_PAIRS, len(going), _PAIRS)):
      at = columns[part]
      gains = np.minimum(free[rows][:, at], cap[part])
      gains *= tolerance[part] - losses[rows][:, at]
      highest, last = _follow(gains)
      reached[part] = wealth[part] + highest >= design.target
      wealth[part] += last
  return reached | (wealth >= design.target + np.asarray(design.log_uniform))


def p_value(
  losses: npt.ArrayLike,
  tolerance: npt.ArrayLike,
  *,
  error_rate: float = 0.05,
  upper: float = 1.0,
  planned_size: int | None = None,
  strategy: Strategy = PLUG_IN,
  uniform: npt.ArrayLike = 1.0,
  log: bool = False,
) -> np.ndarray:
  """The betting p-value (Waudby-Smith and Ramdas 2024; Ville's inequality).

      wealth_t = product over i <= t of (1 + bet_i (tolerance - loss_i))
      p = 1 / max(1, max over t of wealth_t, wealth_n / uniform)

  Only the upper bound of losses is used: signed differences in [-1, 1] go in as they are. The
  p-value is valid for every level; `error_rate` only tunes the bets.

  Args:
    losses: [num_examples] or [num_examples, num_thresholds], rows in the order fixed
      beforehand.
    tolerance: below `upper`; a number, or [num_thresholds].
    error_rate: level the bets are tuned for, in (0, 1).
    upper: declared upper bound of losses.
    planned_size: prompts that were planned; None takes the number of losses.
    strategy: rule for bets.
    uniform: in (0, 1], drawn beside the losses; a number, or [num_thresholds]. 1: none.
    log: whether to return log p.

  Returns:
    p in (0, 1], [] or [num_thresholds]; ValueError where an argument leaves its range.

  >>> float(p_value(np.zeros(100), 0.1).round(6))
  8e-05
  """
  losses = np.asarray(losses, np.float64)
  size = planned_size or len(np.atleast_1d(losses))
  design = strategy.design(tolerance, error_rate, size, upper)
  wealth = log_wealth(losses, design, strategy)
  highest = np.maximum(wealth.max(axis=0), wealth[-1] - np.log(uniform))
  log_p = np.minimum(-np.maximum(0.0, highest), 0.0)
  return log_p if log else np.exp(log_p)


def upper_bound(
  losses: npt.ArrayLike,
  *,
  error_rate: float,
  lower: float = 0.0,
  upper: float = 1.0,
  planned_size: int | None = None,
  tolerance: float | None = None,
  strategy: Strategy = PLUG_IN,
  uniform: npt.ArrayLike = 1.0,
  precision: float = 1e-4,
) -> np.ndarray:
  """Upper bound from the betting p-value; it holds whenever one stops.

  Bets b before the cut do not depend on the tolerance m for which wealth is followed, only on
  the one that was tested. Cut at c / (upper - m), every factor grows with m:

      1 + min(b, c / (upper - m)) (m - loss)

  because (m - loss) / (upper - m) and m - loss do, and because the minimum is a maximum where
  m < loss. So wealth grows with m, what is rejected is an interval up to `upper`, and its lower
  end is found by halving, from the tested tolerance on. The bound is at most `tolerance`
  exactly where the test rejects.

  Args:
    losses, error_rate, upper, planned_size, strategy, uniform: as for `p_value`.
    lower: declared lower bound of losses.
    tolerance: the tolerance that was tested; bets may aim at it.
    precision: how far the bound may lie above that lower end, as a share of `upper - lower`.

  Returns:
    [] or [num_thresholds], in (lower, upper]; ValueError as for `p_value`.
  """
  losses = _check_losses(losses, upper)
  check_levels(lower, error_rate, upper)
  if tolerance is None and strategy.aims:
    raise ValueError(
      f"Expected `tolerance` for the bets of {strategy.name!r}, which aim at it, got None."
    )
  columns = losses.reshape(len(losses), -1)
  count = columns.shape[1]
  tested = lower if tolerance is None else tolerance
  design = strategy.design(tested, error_rate, planned_size or len(losses), upper)
  design = dataclasses.replace(design, log_uniform=np.log(uniform))
  free = strategy.free(columns, design)
  low, high = np.full(count, float(lower)), np.full(count, float(upper))
  middle = (low + high) / 2.0 if tolerance is None else np.full(count, float(tolerance))
  while np.any(active := high - low > precision * (upper - lower)):
    (at,) = np.nonzero(active)
    tried = design.of_pairs(at, middle[at])
    rejected = _reaches(columns, free, at, tried)
    high[at] = np.where(rejected, middle[at], high[at])
    low[at] = np.where(rejected, low[at], middle[at])
    middle = (low + high) / 2.0
  return high.reshape(losses.shape[1:])
