"""Wealth of a gambler who bets against E[loss] > tolerance, prompt by prompt.

Under that hypothesis each factor 1 + bet_i (tolerance - loss_i) has expectation at most 1 given
the past, if bet_i >= 0 was chosen before loss_i was seen. Wealth is then a nonnegative
supermartingale, and it ever reaches 1 / error_rate with probability at most error_rate (Ville
1939), whenever one stops.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

# Bets stop short of the largest that keeps wealth nonnegative: one loss of 1 must not ruin.
CAP_SHARE = 0.75
# What the running estimates hold before the first prompt.
_PRIOR_VARIANCE = 0.25


@dataclasses.dataclass(frozen=True)
class Strategy:
  """A rule for bets.

  Attributes:
    name: what it is called in results.
    bets: (losses [n, k], tolerance, cap, error_rate) -> bets [n, k] in [0, cap]; row i may
      depend on rows before i of the same column, on the other arguments and on n alone.
    any_level: whether p-values are useful at levels other than `error_rate`.
  """

  name: str
  bets: Callable[[np.ndarray, npt.ArrayLike, npt.ArrayLike, float], np.ndarray]
  any_level: bool = True


def _before(running: np.ndarray, first: float) -> np.ndarray:
  """Row i of the result is row i - 1 of `running`: what was known before prompt i."""
  return np.concatenate([np.full_like(running[:1], first), running[:-1]])


def _plug_in_bets(losses, tolerance, cap, error_rate) -> np.ndarray:
  del tolerance  # only the cap depends on it
  count = np.arange(1.0, len(losses) + 1.0)[:, None]
  mean = np.cumsum(losses, axis=0) / (count + 1.0)
  spread = _PRIOR_VARIANCE + np.cumsum((losses - mean) ** 2, axis=0)
  variance = _before(spread / (count + 1.0), _PRIOR_VARIANCE)
  target = math.sqrt(2.0 * math.log(1.0 / error_rate) / len(losses))
  return np.minimum(target / np.sqrt(np.maximum(variance, 1e-12)), cap)


PLUG_IN = Strategy('plug_in', _plug_in_bets)


def check_losses(losses: npt.ArrayLike, upper: float) -> np.ndarray:
  """Losses as float64, checked.

  Raises:
    ValueError: they are empty, NaN, infinite, above `upper`, or no vector or matrix.
  """
  losses = np.asarray(losses, np.float64)
  if losses.ndim not in (1, 2) or not losses.size:
    raise ValueError(
      '`losses` must be [num_examples] or [num_examples, num_thresholds] with at least one row,'
      ' got'
      f' shape {losses.shape}.'
    )
  if not np.all(losses <= upper) or np.any(np.isneginf(losses)):
    bad = losses[~(losses <= upper) | np.isneginf(losses)].flat[0]
    raise ValueError(f'`losses` must be finite and at most `upper` = {upper}, got {bad!r}.')
  return losses


def check_levels(tolerance: float, error_rate: float, upper: float) -> None:
  """Raises ValueError unless `tolerance` < `upper` and `error_rate` is in (0, 1)."""
  if not (np.isfinite(tolerance) and tolerance < upper):
    raise ValueError(f'`tolerance` must be below `upper` = {upper}, got {tolerance!r}.')
  if not 0.0 < error_rate < 1.0:
    raise ValueError(f'`error_rate` must be in (0, 1), got {error_rate!r}.')


def log_wealth(
  losses: npt.ArrayLike,
  tolerance: float,
  *,
  error_rate: float = 0.05,
  upper: float = 1.0,
  strategy: Strategy = PLUG_IN,
) -> np.ndarray:
  """log wealth after each prompt.

  Args:
    losses: [num_examples] or [num_examples, num_thresholds], in the fixed order.
    tolerance: below `upper`.
    error_rate: level the bets are tuned for.
    upper: declared upper bound of losses.
    strategy: how bets are chosen.

  Returns:
    The shape of `losses`, in nats; wealth starts at 1 before the first row.

  Raises:
    ValueError: losses are not finite or above `upper`, or another argument leaves its range.
  """
  losses = check_losses(losses, upper)
  check_levels(tolerance, error_rate, upper)
  columns = losses.reshape(len(losses), -1)
  bets = strategy.bets(columns, tolerance, CAP_SHARE / (upper - tolerance), error_rate)
  wealth = np.cumsum(np.log(1.0 + bets * (tolerance - columns)), axis=0)
  return wealth.reshape(losses.shape)


def least_log_wealth(
  losses: np.ndarray,
  below: np.ndarray,
  above: np.ndarray,
  levels: tuple[float, float],
  strategy: Strategy = PLUG_IN,
) -> np.ndarray:
  """A lower bound of log wealth, the same for every tolerance between `below` and `above`.

  Args:
    losses: [num_examples, num_thresholds].
    below: [num_thresholds] lower ends of the intervals of tolerances.
    above: [num_thresholds] upper ends, at most the upper bound of losses.
    levels: (error_rate, upper bound of losses).
    strategy: how bets are chosen; bets may not fall as the tolerance grows.

  Returns:
    [num_examples, num_thresholds] nats.
  """
  error_rate, upper = levels
  caps = [CAP_SHARE / np.maximum(upper - end, 1e-9) for end in (below, above)]
  least, most = (
    strategy.bets(losses, end, cap, error_rate)
    for end, cap in zip((below, above), caps, strict=True)
  )
  gains = below - losses
  factors = 1.0 + np.where(gains >= 0.0, least, most) * gains
  # An interval that reaches far up may allow ruin; it is then not rejected.
  return np.cumsum(np.log(np.maximum(factors, 1e-300)), axis=0)
