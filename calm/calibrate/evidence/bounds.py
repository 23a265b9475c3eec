"""Upper confidence bounds on E[loss], by inverting each p-value.

The bound at `error_rate` is the largest tolerance that is not rejected: P(E[loss] > bound) is
at most `error_rate`, for one threshold at a time (not for the whole grid at once).
"""

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
  def excess(tolerance: float) -> float:
    return float(p_value(total, num_examples, tolerance, log=True)) - level

  low = min(max(total / num_examples, _LEAST), _MOST)
  if excess(_MOST) > 0.0:
    return 1.0
  if excess(low) <= 0.0:
    return low
  root = float(optimize.brentq(excess, low, _MOST, xtol=_PRECISION / 4))  # type: ignore
  # The root may lie a hair on the unrejected side; the bound may not.
  return min(1.0, root + _PRECISION)


def betting(
  losses: npt.ArrayLike,
  *,
  error_rate: float,
  lower: float = 0.0,
  upper: float = 1.0,
  planned_size: int | None = None,
  precision: float = 1e-4,
) -> np.ndarray:
  """Upper bound from the betting p-value; it holds whenever one stops.

  The set of rejected tolerances need not be an interval, because bets depend on the tolerance.
  So whole intervals are rejected from the top: for tolerances m in [a, b], bets lie in
  [bet(a), bet(b)] and every factor is at least 1 + bet(a) (a - loss) where a >= loss, else
  1 + bet(b) (a - loss). The result is the lower end of the last interval rejected so: all above
  it is rejected.

  Args:
    losses: [num_examples] or [num_examples, num_thresholds], in the fixed order.
    error_rate: in (0, 1).
    lower: declared lower bound of losses.
    upper: declared upper bound of losses.
    planned_size: prompts that were planned; None takes the number of losses.
    precision: intervals are halved down to this share of `upper - lower`.

  Returns:
    [] or [num_thresholds], in (lower, upper].

  Raises:
    ValueError: losses leave their range, or `error_rate` does.
  """
  losses = betting_lib.check_losses(losses, upper)
  betting_lib.check_levels(lower, error_rate, upper)
  columns = losses.reshape(len(losses), -1)
  size = planned_size or len(losses)
  free = betting_lib.free_bets(columns, betting_lib.Design(lower, error_rate, size, upper))
  bound = np.full(columns.shape[1], float(upper))
  step = (bound - np.maximum(columns.mean(axis=0), lower)) / 2.0
  least = precision * (upper - lower)
  while np.any(active := step > least):
    above = betting_lib.Design(bound[active], error_rate, size, upper)
    below = betting_lib.Design(bound[active] - step[active], error_rate, size, upper)
    wealth = betting_lib.least_log_wealth(columns[:, active], free[:, active], below, above)
    rejected = wealth.max(axis=0) >= above.target
    bound[active] -= np.where(rejected, step[active], 0.0)
    step[active] /= np.where(rejected, 1.0, 2.0)
    step = np.minimum(step, (bound - lower) / 2.0)
  return bound.reshape(losses.shape[1:])
