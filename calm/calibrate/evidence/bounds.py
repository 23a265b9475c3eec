"""Upper confidence bounds on E[loss], by inverting each p-value.

The bound at `error_rate` is the largest tolerance that is not rejected: P(E[loss] > bound) is
at most `error_rate`, for one threshold at a time (not for the whole grid at once).
"""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from scipy import optimize

from calm.calibrate.evidence import betting as betting_lib

SumPValue = Callable[..., np.ndarray]

_PRECISION = 1e-9
# Tolerances of p-values are in (0, 1); bounds are sought between these.
_LEAST, _MOST = 1e-12, 1.0 - 1e-12


def invert(
  p_value: SumPValue, sums: npt.ArrayLike, num_examples: int, *, error_rate: float
) -> np.ndarray:
  """Upper bound from a p-value of the sum, which falls as the tolerance grows.

  Args:
    p_value: `p_values.hoeffding`, `hoeffding_bentkus`, `binomial` or `convex_order`.
    sums: [num_thresholds] sums of losses in [0, 1].
    num_examples: prompts summed over.
    error_rate: in (0, 1).

  Returns:
    [num_thresholds] in (0, 1], rounded up by at most 1e-9.

  Raises:
    ValueError: an argument leaves its range.
  """
  betting_lib.check_levels(0.0, error_rate, 1.0)
  totals = np.atleast_1d(np.asarray(sums, np.float64))
  level = np.log(error_rate)
  found = {
    total: _invert_one(p_value, total, num_examples, level)
    for total in np.unique(totals).tolist()
  }
  return np.array([found[total] for total in totals.tolist()]).reshape(np.shape(sums))


def _invert_one(p_value: SumPValue, total: float, num_examples: int, level: float) -> float:
  @functools.cache  # brentq asks for both ends again
  def excess(tolerance: float) -> float:
    return float(p_value(total, num_examples, tolerance, log=True)) - level

  low = min(max(total / num_examples, _LEAST), _MOST)
  # Hoeffding's own bound is near, and hardly any p-value is worse; far tails take longest.
  high = min(low + np.sqrt(-level / (2 * num_examples)), _MOST)
  if excess(high) > 0.0:
    high = _MOST
    if excess(high) > 0.0:
      return 1.0
  if excess(low) <= 0.0:
    return low
  root = float(optimize.brentq(excess, low, high, xtol=_PRECISION / 4))  # type: ignore
  # The root may lie a hair on the unrejected side; the bound may not.
  return min(1.0, root + _PRECISION)


def betting(
  losses: npt.ArrayLike,
  *,
  error_rate: float,
  lower: float = 0.0,
  upper: float = 1.0,
  planned_size: int | None = None,
  tolerance: float | None = None,
  strategy: betting_lib.Strategy = betting_lib.PLUG_IN,
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
    losses: [num_examples] or [num_examples, num_thresholds], in the fixed order.
    error_rate: in (0, 1).
    lower: declared lower bound of losses.
    upper: declared upper bound of losses.
    planned_size: prompts that were planned; None takes the number of losses.
    tolerance: the tolerance that was tested; bets may aim at it.
    strategy: how bets are chosen.
    precision: how far the bound may lie above that lower end, as a share of `upper - lower`.

  Returns:
    [] or [num_thresholds], in (lower, upper].

  Raises:
    ValueError: losses leave their range, `error_rate` does, or bets need a tolerance to aim at.
  """
  losses = betting_lib.check_losses(losses, upper)
  betting_lib.check_levels(lower, error_rate, upper)
  if tolerance is None and strategy.aims:
    raise ValueError(
      f"Expected `tolerance` for the bets of {strategy.name!r}, which aim at it, got None."
    )
  columns = losses.reshape(len(losses), -1)
  count = columns.shape[1]
  tested = lower if tolerance is None else tolerance
  design = strategy.design(tested, error_rate, planned_size or len(losses), upper)
  free = strategy.free(columns, design)
  low, high = np.full(count, float(lower)), np.full(count, float(upper))
  middle = (low + high) / 2.0 if tolerance is None else np.full(count, float(tolerance))
  while np.any(active := high - low > precision * (upper - lower)):
    (at,) = np.nonzero(active)
    tried = dataclasses.replace(design, tolerance=middle[at])
    rejected = betting_lib.reaches(columns, free, at, tried)
    high[at] = np.where(rejected, middle[at], high[at])
    low[at] = np.where(rejected, low[at], middle[at])
    middle = (low + high) / 2.0
  return high.reshape(losses.shape[1:])
