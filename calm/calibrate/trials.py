"""Repeated calibration on cached losses: the paper's protocol, and a test of the promise.

`split_trials` are the paper's 50 random 80/20 splits; a test risk above the tolerance is partly
noise of the test split. `validity_trials` draw calibration sets with replacement from the pool,
whose own mean is the true risk: the share of draws whose chosen threshold exceeds the tolerance
is compared with the error rate.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

from calm import arguments
from calm.calibrate import clusters, methods
from calm.calibrate.losses import SequenceLosses

# Units of all sets together that are drawn at once: 2 GB of numbers.
MOST_DRAWN = 2**28


def check_size(name: str, count: int, size: int, seed: int) -> None:
  """Refuses draws that memory would not hold, and a seed below 0."""
  if count * size > MOST_DRAWN:
    raise ValueError(
      f"Expected `{name}` sets of {size} units to have at most {MOST_DRAWN} units together,"
      f" got {count} sets; draw fewer or smaller ones."
    )
  if seed < 0:
    raise ValueError(f"Expected `seed` to be at least 0, got {seed}.")


class Draws:
  """A pool of losses from which calibration sets are drawn and tested, many at once.

  All sets and tolerances walk down the grid in lockstep, and those that failed drop out.

  Attributes:
    method: the p-value method, 'auto' resolved.
    values: [num_units, num_thresholds] losses.
    thresholds: [num_thresholds], strictly descending.
    support: declared range of `values`.
    unit_of_row: [num_examples] unit of each row of the losses.
  """

  def __init__(self, losses: SequenceLosses, method: str, groups: Sequence[str] | None = None):
    low, high = losses.support.lower, losses.support.upper
    if not np.all((losses.values >= low - 1e-9) & (losses.values <= high + 1e-9)):
      raise ValueError(
        f"Expected `losses` to lie in the declared range [{low}, {high}], without NaN, got"
        " others; declare the range that they lie in."
      )
    groups = clusters.declared_groups(losses) if groups is None else groups
    names = [str(row) for row in range(len(losses.values))] if groups is None else groups
    self.method = methods.get_method(method, clusters.unit_support(losses, names))
    prepared, support = self.method.prepare(losses.values, losses.support)
    losses = dataclasses.replace(losses, values=prepared, support=support)
    units = clusters.cluster_means(losses, names)
    self.values = np.clip(units.values, support.lower, support.upper)
    self.thresholds, self.support = np.asarray(units.thresholds), units.support
    _, self.unit_of_row = np.unique([str(name) for name in names], return_inverse=True)

  def choose(
    self, draws: npt.ArrayLike, tolerances: Sequence[float], error_rate: float
  ) -> np.ndarray:
    """The lowest threshold that fixed sequence testing certifies, for sets and tolerances.

    Args:
      draws: [num_sets, set_size] units of each calibration set, in the tested order.
      tolerances: [num_tolerances] deltas, each its own test.
      error_rate: epsilon.

    Returns:
      [num_sets, num_tolerances] columns of `values`; -1 where nothing is certified.
    """
    draws, levels = np.asarray(draws), np.asarray(tolerances, np.float64)
    chosen = np.full((len(draws), len(levels)), -1)
    for column in range(self.values.shape[1]):
      # Who has certified everything so far goes on.
      sets, positions = np.nonzero(chosen == column - 1)
      going, places = np.unique(sets, return_inverse=True)
      losses = self.values[:, column][draws[going].T]
      sample = methods.Sample(losses, self.support, levels[positions], error_rate)
      passed = self.method.certifies(sample, places)
      chosen[sets[passed], positions[passed]] = column
    return chosen


@dataclasses.dataclass(frozen=True)
class SplitTrials:
  """Results over random splits at one tolerance.

  Attributes:
    tolerance: delta.
    trials: number of splits.
    risk_mean: mean over splits of the mean test loss at the chosen threshold.
    risk_spread: its standard deviation.
    layers_mean: mean of decoder layers per token on the test split; NaN without layers.
    layers_spread: its standard deviation.
    certified_share: share of splits with any threshold certified.
    threshold_mean: mean of the certified thresholds; NaN if none.
  """

  tolerance: float
  trials: int
  risk_mean: float
  risk_spread: float
  layers_mean: float
  layers_spread: float
  certified_share: float
  threshold_mean: float


@dataclasses.dataclass(frozen=True)
class ValidityTrials:
  """Violations at one tolerance.

  Attributes:
    tolerance: delta.
    error_rate: epsilon, the most violations that the promise allows.
    trials: calibration sets drawn.
    violations: of those, with a pool risk above delta at the chosen threshold.
    share: violations / trials.
    interval: 95 % Clopper-Pearson interval of the share.
    certified_share: share of draws with any threshold certified.
  """

  tolerance: float
  error_rate: float
  trials: int
  violations: int
  share: float
  interval: tuple[float, float]
  certified_share: float


@dataclasses.dataclass(frozen=True, eq=False)
class LayerCounts:
  """Decoder layers and tokens behind the losses.

  Attributes:
    layers: [num_examples, num_thresholds] layers summed over a prompt's tokens.
    tokens: [num_examples, num_thresholds] tokens.
    full_depth: decoder layers of the full model (`NEVER_EXIT`).
  """

  layers: np.ndarray
  tokens: np.ndarray
  full_depth: int


def _check_rates(tolerances: Sequence[float], error_rate: float, trials: int) -> None:
  """Raises ValueError unless tolerances and error rate are in (0, 1) and trials at least 1."""
  for name, values in (("tolerances", tuple(tolerances)), ("error_rate", (error_rate,))):
    odd = [value for value in values if not 0.0 < value < 1.0]
    if odd or not values:
      raise ValueError(f"Expected `{name}` to be in (0, 1), got {odd[0] if odd else 'none'}.")
  if trials < 1:
    raise ValueError(f"Expected `trials` to be at least 1, got {trials!r}.")


@arguments.checked()
def split_trials(
  losses: SequenceLosses,
  tolerances: Sequence[float],
  *,
  error_rate: float,
  method: str = "auto",
  layers: LayerCounts | None = None,
  groups: Sequence[Any] | None = None,
  trials: int = 50,
  seed: int = 0,
) -> tuple[SplitTrials, ...]:
  """The paper's protocol: random splits, 80 % calibrate and 20 % test, by whole clusters.

  Args:
    losses: pool of losses on a strictly descending grid.
    tolerances: deltas, each its own test (not simultaneous).
    error_rate: epsilon.
    method: as for `calibrate`.
    layers: layer counts, to report layers per token.
    groups: [num_examples] cluster of each row; None takes those of `losses`, if any.
    trials: splits.
    seed: of the splits; the same splits serve all tolerances.

  Returns:
    One `SplitTrials` a tolerance.

  Raises:
    ValueError: the pool has fewer than 2 units, losses leave their range, or a rate does.
  """
  _check_rates(tolerances, error_rate, trials)
  pool = Draws(losses, method, groups)
  count = len(pool.values)
  if count < 2:
    raise ValueError(f"Expected `losses` to have at least 2 units to split, got {count}.")
  check_size("trials", trials, count, seed)
  cut = min(count - 1, max(1, round(0.8 * count)))
  generator = np.random.default_rng(seed)
  splits = np.stack([generator.permutation(count) for _ in range(trials)])
  chosen = pool.choose(splits[:, :cut], tolerances, error_rate)
  outcomes = [
    [_test_outcome(pool, column, test, layers) for column in columns]
    for test, columns in zip(splits[:, cut:], chosen.tolist(), strict=True)
  ]
  return tuple(
    _summarize_splits(tolerance, list(column), pool.thresholds)
    for tolerance, column in zip(tolerances, zip(*outcomes, strict=True), strict=True)
  )


def _test_outcome(pool: Draws, column: int, test: np.ndarray, layers: LayerCounts | None):
  """(column, mean loss, layers a token) on test units; column -1 is the full model."""
  risk = 0.0 if column < 0 else float(pool.values[test, column].mean())
  if layers is None:
    depth = np.nan
  elif column < 0:
    depth = float(layers.full_depth)
  else:
    rows = np.isin(pool.unit_of_row, test)
    depth = layers.layers[rows, column].sum() / layers.tokens[rows, column].sum()
  return column, risk, depth


def _summarize_splits(tolerance: float, outcomes, thresholds: np.ndarray) -> SplitTrials:
  chosen = [outcome[0] for outcome in outcomes]
  risks = np.array([outcome[1] for outcome in outcomes])
  depths = np.array([outcome[2] for outcome in outcomes])
  certified = [column for column in chosen if column >= 0]
  return SplitTrials(
    tolerance=float(tolerance),
    trials=len(outcomes),
    risk_mean=float(risks.mean()),
    risk_spread=float(risks.std()),
    layers_mean=float(depths.mean()),
    layers_spread=float(depths.std()),
    certified_share=len(certified) / len(outcomes),
    threshold_mean=float(np.mean(thresholds[certified])) if certified else float("nan"),
  )


@arguments.checked()
def validity_trials(
  losses: SequenceLosses,
  tolerances: Sequence[float],
  *,
  error_rate: float,
  method: str = "auto",
  groups: Sequence[Any] | None = None,
  calibration_size: int | None = None,
  trials: int = 200,
  seed: int = 0,
) -> tuple[ValidityTrials, ...]:
  """Measures how often the promise holds.

  Calibration sets are drawn with replacement, so that prompts are independent draws from the
  pool and the pool's mean is their true expectation. The full model has loss 0 by definition.

  Args:
    losses: pool of losses on a strictly descending grid.
    tolerances: deltas, each its own test.
    error_rate: epsilon.
    method: as for `calibrate`.
    groups: [num_examples] cluster of each row; None takes those of `losses`, if any.
    calibration_size: units per calibration set; None takes as many as the pool has.
    trials: calibration sets.
    seed: of the draws; the same draws serve all tolerances.

  Returns:
    One `ValidityTrials` a tolerance.

  Raises:
    ValueError: losses leave their range, or a rate does.
  """
  _check_rates(tolerances, error_rate, trials)
  if calibration_size is not None and calibration_size < 1:
    raise ValueError(f"Expected `calibration_size` to be at least 1, got {calibration_size!r}.")
  pool = Draws(losses, method, groups)
  size = calibration_size or len(pool.values)
  check_size("trials", trials, size, seed)
  generator = np.random.default_rng(seed)
  draws = np.stack([generator.integers(len(pool.values), size=size) for _ in range(trials)])
  chosen = pool.choose(draws, tolerances, error_rate)
  # The last entry is what -1 reads: the full model, whose loss is 0 by definition.
  true_risk = np.append(pool.values.mean(axis=0), 0.0)
  return tuple(
    _summarize_draws(float(tolerance), error_rate, columns, true_risk)
    for tolerance, columns in zip(tolerances, chosen.T, strict=True)
  )


def _summarize_draws(
  tolerance: float, error_rate: float, chosen: np.ndarray, true_risk: np.ndarray
) -> ValidityTrials:
  violations = int(np.sum((chosen >= 0) & (true_risk[chosen] > tolerance)))
  interval = stats.binomtest(violations, len(chosen)).proportion_ci(0.95)
  return ValidityTrials(
    tolerance=tolerance,
    error_rate=error_rate,
    trials=len(chosen),
    violations=violations,
    share=violations / len(chosen),
    interval=(float(interval.low), float(interval.high)),
    certified_share=float(np.mean(chosen >= 0)),
  )
