"""Wealth of a gambler who bets against E[loss] > tolerance, prompt by prompt.

Under that hypothesis each factor 1 + bet_i (tolerance - loss_i) has expectation at most 1 given
the past, if bet_i >= 0 was chosen before loss_i was seen. Wealth is then a nonnegative
supermartingale, and it ever reaches 1 / error_rate with probability at most error_rate,
whenever one stops (Ville 1939).
"""

import dataclasses

import numpy as np
import numpy.typing as npt

from calm.calibrate.evidence import strategies
from calm.calibrate.evidence.strategies import (
  CAP_SHARE,
  EARLY,
  FIXED_LEVEL,
  LEAST_VARIANCE,
  PLUG_IN,
  PRIOR_VARIANCE,
  Design,
  Strategy,
)

__all__ = [
  "CAP_SHARE",
  "EARLY",
  "FIXED_LEVEL",
  "LEAST_VARIANCE",
  "PLUG_IN",
  "PRIOR_VARIANCE",
  "Design",
  "Strategy",
  "certifies",
  "check_levels",
  "check_losses",
  "log_wealth",
  "reaches",
]

# Rows, and pairs of a column and a tolerance, whose wealth is followed at once.
_BLOCK, _PAIRS, _HEDGED_PAIRS = 64, 1024, 8192
# Of a few pairs more rows are followed at once, in logarithms.
_CELLS = 2**16


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
      "Expected `losses` to be [num_examples] or [num_examples, num_thresholds] with at least"
      " one row,"
      f" got shape {losses.shape}."
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
      f"Expected `planned_size` to be at least the number of losses, got {design.planned_size}"
      " for"
      f" {len(losses)}."
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
  """Whether wealth ever reaches the target, for many columns and tolerances.

  The answer of `log_wealth(losses[:, columns], design).max(axis=0) >= design.target`, sooner.

  Args:
    losses: [num_examples, num_columns], in the fixed order.
    columns: [num_pairs] column of each pair.
    design: `tolerance` is [num_pairs].
    strategy: how bets are chosen.

  Returns:
    [num_pairs] bool.
  """
  if not strategy.aims:
    return reaches(losses, strategy.free(losses, design), columns, design)
  tolerance = np.broadcast_to(np.asarray(design.tolerance, np.float64), len(columns))
  squares, reached = strategies.squares_before(losses), np.zeros(len(columns), bool)
  for start in range(0, len(columns), _HEDGED_PAIRS):
    part = slice(start, start + _HEDGED_PAIRS)
    pairs = dataclasses.replace(design, tolerance=tolerance[part])
    reached[part] = _hedge_reaches(losses, squares, columns[part], pairs)
  return reached


def _hedge_reaches(
  losses: np.ndarray, squares: np.ndarray, columns: np.ndarray, design: Design
) -> np.ndarray:
  """`certifies` for bets that aim; pairs that have got there leave."""
  hedge, going = strategies.Hedge(design, len(columns)), np.arange(len(columns))
  reached = np.zeros(len(columns), bool)
  while (start := hedge.row) < len(losses) and len(going):
    rows, at = slice(start, start + hedge.look), columns[going]
    hedge.advance(losses[rows].take(at, axis=1), squares[rows].take(at, axis=1))
    there = hedge.highest >= design.target
    if there.any():
      reached[going[there]] = True
      going = going[~there]
      hedge.keep(~there)
  return reached


def reaches(
  losses: np.ndarray, free: np.ndarray, columns: np.ndarray, design: Design
) -> np.ndarray:
  """Whether wealth by given bets ever reaches the target, for many columns and tolerances.

  Bets before the cap are shared by all tolerances of a column, logarithms are taken once in a
  block of rows, and pairs that have got there leave.

  Args:
    losses: [num_examples, num_columns], in the fixed order.
    free: [num_examples, num_columns] bets before they are cut.
    columns: [num_pairs] column of each pair.
    design: `tolerance` is [num_pairs].

  Returns:
    [num_pairs] bool.
  """
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
      highest, last = strategies.follow(gains)
      reached[part] = wealth[part] + highest >= design.target
      wealth[part] += last
  return reached
