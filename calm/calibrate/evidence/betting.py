"""Wealth of a gambler who bets against E[loss] > tolerance, prompt by prompt.

Under that hypothesis each factor 1 + bet_i (tolerance - loss_i) has expectation at most 1 given
the past, if bet_i >= 0 was chosen before loss_i was seen. Wealth is then a nonnegative
supermartingale, and it ever reaches 1 / error_rate with probability at most error_rate,
whenever one stops (Ville 1939).
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

# Bets stop short of the largest that keeps wealth nonnegative: one loss of 1 must not ruin.
CAP_SHARE = 0.9
# What the running variance holds before the first prompt: the largest of losses in [0, 1].
PRIOR_VARIANCE = 0.25
LEAST_VARIANCE = 1e-12
# Rows, and pairs of a column and a tolerance, whose wealth is followed at once in `certifies`.
_BLOCK, _PAIRS = 64, 1024


@dataclasses.dataclass(frozen=True, eq=False)
class Design:
  """What bets may depend on besides earlier losses; fixed before any loss is seen.

  Attributes:
    tolerance: the bound that is tested; a number or one a column.
    error_rate: level the bets are tuned for.
    planned_size: prompts that there will be at most.
    upper: declared upper bound of losses.
  """

  tolerance: npt.ArrayLike
  error_rate: float
  planned_size: int
  upper: float = 1.0

  @property
  def cap(self) -> np.ndarray:
    """The largest bet."""
    return CAP_SHARE / np.maximum(self.upper - np.asarray(self.tolerance), 1e-9)

  @property
  def target(self) -> float:
    """log wealth that certifies."""
    return math.log(1.0 / self.error_rate)


@dataclasses.dataclass(frozen=True)
class Strategy:
  """A rule for bets.

  Attributes:
    name: what it is called in results.
    bets: (losses [n, k], design) -> bets [n, k] in [0, cap]; row i depends on rows before i of
      the same column and on the design alone.
  """

  name: str
  bets: Callable[[np.ndarray, Design], np.ndarray]


def _before(running: np.ndarray, first: float) -> np.ndarray:
  """Row i of the result is row i - 1 of `running`: what was known before prompt i."""
  return np.concatenate([np.full_like(running[:1], first), running[:-1]])


def _variance_before(losses: np.ndarray) -> np.ndarray:
  count = np.arange(2.0, len(losses) + 2.0)[:, None]
  mean = np.cumsum(losses, axis=0) / count
  variance = (PRIOR_VARIANCE + np.cumsum((losses - mean) ** 2, axis=0)) / count
  return np.maximum(_before(variance, PRIOR_VARIANCE), LEAST_VARIANCE)


def free_bets(losses: np.ndarray, design: Design) -> np.ndarray:
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
  scale = math.sqrt(2.0 * design.target / design.planned_size)
  return scale / np.sqrt(_variance_before(losses))


def _plug_in_bets(losses: np.ndarray, design: Design) -> np.ndarray:
  return np.minimum(free_bets(losses, design), design.cap)


def _fixed_level_bets(losses: np.ndarray, design: Design) -> np.ndarray:
  deviations = 1.0 / np.sqrt(_variance_before(losses))
  bets = np.zeros_like(losses)
  wealth = np.zeros(losses.shape[1])
  for row, loss in enumerate(losses):
    left = max(1, design.planned_size - row)
    needed = np.maximum(design.target - wealth, 0.0)
    bets[row] = np.minimum(np.sqrt(2.0 * needed / left) * deviations[row], design.cap)
    wealth += np.log(1.0 + bets[row] * (design.tolerance - loss))
  return bets


# The bet of Waudby-Smith and Ramdas (2024) with a fixed sample size in mind.
PLUG_IN = Strategy("plug_in", _plug_in_bets)
# Recalculates what is still needed to reach 1 / error_rate and stops there (Voracek 2025): more
# power at that one level, a useless p-value at any other.
FIXED_LEVEL = Strategy("fixed_level", _fixed_level_bets)


def check_losses(losses: npt.ArrayLike, upper: float) -> np.ndarray:
  """Losses as float64, checked.

  Args:
    losses: [num_examples] or [num_examples, num_thresholds].
    upper: declared upper bound.

  Returns:
    The losses, of the same shape.

  Raises:
    ValueError: they are empty, NaN, infinite, above `upper`, or no vector or matrix.
  """
  losses = np.asarray(losses, np.float64)
  if losses.ndim not in (1, 2) or not losses.size:
    raise ValueError(
      "`losses` must be [num_examples] or [num_examples, num_thresholds] with at least one row,"
      f" got shape {losses.shape}."
    )
  bad = ~((losses <= upper) & (losses > -np.inf))
  if np.any(bad):
    odd = float(losses[bad].flat[0])
    raise ValueError(f"`losses` must be finite and at most `upper` = {upper}, got {odd!r}.")
  return losses


def check_levels(tolerance: float, error_rate: float, upper: float) -> None:
  """Raises ValueError unless `tolerance` < `upper` and `error_rate` is in (0, 1)."""
  if not (np.isfinite(tolerance) and tolerance < upper):
    raise ValueError(f"`tolerance` must be below `upper` = {upper}, got {tolerance!r}.")
  if not 0.0 < error_rate < 1.0:
    raise ValueError(f"`error_rate` must be in (0, 1), got {error_rate!r}.")


def log_wealth(
  losses: npt.ArrayLike, design: Design, strategy: Strategy = PLUG_IN
) -> np.ndarray:
  """log wealth after each prompt.

  Args:
    losses: [num_examples] or [num_examples, num_thresholds], in the fixed order.
    design: tolerance, level, planned size and upper bound.
    strategy: how bets are chosen.

  Returns:
    The shape of `losses`, in nats; wealth starts at 1 before the first row.

  Raises:
    ValueError: losses are not finite or above the upper bound, there are more of them than
      planned, or the design leaves its range.
  """
  losses = check_losses(losses, design.upper)
  check_levels(float(np.max(design.tolerance)), design.error_rate, design.upper)
  if len(losses) > design.planned_size:
    raise ValueError(
      f"`planned_size` must be at least the number of losses, got {design.planned_size} for"
      f" {len(losses)}."
    )
  columns = losses.reshape(len(losses), -1)
  gains = design.tolerance - columns
  wealth = np.cumsum(np.log(1.0 + strategy.bets(columns, design) * gains), axis=0)
  return wealth.reshape(losses.shape)


def certifies(losses: np.ndarray, columns: np.ndarray, design: Design) -> np.ndarray:
  """Whether plug-in wealth ever reaches the target, for many columns and tolerances.

  The answer of `log_wealth(losses[:, columns], design).max(axis=0) >= design.target`, sooner:
  bets before the cap are shared by all tolerances of a column, logarithms are taken once in a
  block of rows, and pairs that have got there leave.

  Args:
    losses: [num_examples, num_columns], in the fixed order.
    columns: [num_pairs] column of each pair.
    design: `tolerance` is [num_pairs].

  Returns:
    [num_pairs] bool.
  """
  free = free_bets(losses, design)
  tolerance, cap = np.asarray(design.tolerance), design.cap
  wealth, reached = np.zeros(len(columns)), np.zeros(len(columns), bool)
  for start in range(0, len(losses), _BLOCK):
    rows = slice(start, start + _BLOCK)
    (going,) = np.nonzero(~reached)
    for part in np.split(going, range(_PAIRS, len(going), _PAIRS)):
      at = columns[part]
      factors = np.minimum(free[rows][:, at], cap[part])
      factors *= tolerance[part] - losses[rows][:, at]
      factors += 1.0
      # Every factor is at least 0.1, so that nothing underflows; what overflows has got there.
      with np.errstate(over="ignore"):
        running = np.multiply.accumulate(factors, axis=0)
      reached[part] = wealth[part] + np.log(running.max(axis=0)) >= design.target
      wealth[part] += np.log(running[-1])
  return reached


def least_log_wealth(
  losses: np.ndarray, free: np.ndarray, below: Design, above: Design
) -> np.ndarray:
  """A lower bound of plug-in log wealth for every tolerance from `below`'s to `above`'s.

  Args:
    losses: [num_examples, num_thresholds].
    free: `free_bets` of them.
    below: design with the lower ends of intervals of tolerances, [num_thresholds].
    above: the same with the upper ends; a larger tolerance has a larger cap.

  Returns:
    [num_examples, num_thresholds] nats.
  """
  gains = below.tolerance - losses
  bets = np.minimum(free, np.where(gains >= 0.0, below.cap, above.cap))
  # An interval that reaches far up may allow ruin; it is then not rejected.
  return np.cumsum(np.log(np.maximum(1.0 + bets * gains, 1e-300)), axis=0)
