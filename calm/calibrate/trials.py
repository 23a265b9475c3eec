"""Repeated calibration on cached losses: the paper's protocol, and a test of the promise.

Two different questions, two functions:

(a) `split_trials`: the paper's 50 random 80/20 splits. Mean and spread of test risk and of
layers.
    A test risk above the tolerance is partly noise of the test split, so nothing here is called
    a violation.
(b) `validity_trials`: calibration sets drawn with replacement from the pool, whose own mean is
the
    true risk of that draw. The share of draws whose chosen threshold exceeds the tolerance is
    the share of violations, to be compared with the error rate.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy import stats

from calm.calibrate import methods, ordering, testing
from calm.calibrate.sequence_losses import SequenceLosses


@dataclasses.dataclass(frozen=True)
class SplitTrials:
  """Figure (a) at one tolerance, over random splits.

  Attributes:
    tolerance: delta.
    trials: number of splits.
    risk_mean: mean over splits of the mean test loss at the chosen threshold.
    risk_spread: its standard deviation.
    layers_mean: mean over splits of decoder layers per token on the test split; NaN without
      layers.
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
  """Figure (b) at one tolerance.

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
class Layers:
  """Decoder layers and tokens behind the losses.

  Attributes:
    layers: [num_examples, num_thresholds] layers summed over a prompt's tokens.
    tokens: [num_examples, num_thresholds] tokens.
    full_depth: decoder layers of the full model (`NEVER_EXIT`).
  """

  layers: np.ndarray
  tokens: np.ndarray
  full_depth: int


class _Pool:
  """Losses as one method tests them, with rows grouped into exchangeable units."""

  def __init__(self, losses: SequenceLosses, method: str, groups: Sequence[str] | None):
    low, high = losses.support.lower, losses.support.upper
    if not np.all((losses.values >= low - 1e-9) & (losses.values <= high + 1e-9)):
      raise ValueError(f"`losses` must lie in the declared range [{low}, {high}], without NaN.")
    names = [str(row) for row in range(len(losses.values))] if groups is None else groups
    self.method = methods.get_method(method, ordering.unit_support(losses, names))
    prepared, support = self.method.prepare(losses.values, losses.support)
    losses = dataclasses.replace(losses, values=prepared, support=support)
    self.units = ordering.cluster_means(losses, names)
    self.values = self.units.values
    low, high = support.lower, support.upper
    self.values = np.clip(self.values, low, high)
    _, self.unit_of_row = np.unique(np.asarray([str(n) for n in names]), return_inverse=True)

  def choose(self, rows: np.ndarray, tolerance: float, error_rate: float) -> int | None:
    """Column of the lowest threshold certified on some units, or None."""
    sample = methods.Sample(self.values[rows], self.units.support, tolerance, error_rate)
    p_values = np.exp(self.method.log_p_values(sample))
    rejected = testing.fixed_sequence(p_values, error_rate).rejected
    return int(rejected.sum()) - 1 if rejected.any() else None


def split_trials(
  losses: SequenceLosses,
  tolerances: Sequence[float],
  *,
  error_rate: float,
  method: str = "auto",
  layers: Layers | None = None,
  groups: Sequence[str] | None = None,
  trials: int = 50,
  seed: int = 0,
) -> tuple[SplitTrials, ...]:
  """Figure (a): random splits, 80 % calibrate and 20 % test, by whole clusters.

  Args:
    losses: pool of losses on a strictly descending grid.
    tolerances: deltas, each its own test (not simultaneous).
    error_rate: epsilon.
    method: as for `calibrate`.
    layers: layer counts, to report layers per token.
    groups: [num_examples] cluster of each row; None makes every row its own.
    trials: splits.
    seed: of the splits; the same splits serve all tolerances.

  Returns:
    One `SplitTrials` a tolerance.

  Raises:
    ValueError: the pool has fewer than 2 units, or losses leave their range.
  """
  pool = _Pool(losses, method, groups)
  count = len(pool.values)
  if count < 2:
    raise ValueError(f"`losses` must have at least 2 units to split, got {count}.")
  cut = min(count - 1, max(1, round(0.8 * count)))
  generator = np.random.default_rng(seed)
  splits = [generator.permutation(count) for _ in range(trials)]
  results = []
  for tolerance in tolerances:
    outcomes = [
      _split_outcome(pool, split, cut, (tolerance, error_rate), layers) for split in splits
    ]
    results.append(_summarize_splits(tolerance, outcomes, pool.units.thresholds))
  return tuple(results)


def _split_outcome(pool: _Pool, split, cut: int, rates, layers: Layers | None):
  chosen = pool.choose(split[:cut], *rates)
  test = split[cut:]
  risk = 0.0 if chosen is None else float(pool.values[test, chosen].mean())
  if layers is None:
    depth = np.nan
  elif chosen is None:
    depth = float(layers.full_depth)
  else:
    rows = np.isin(pool.unit_of_row, test)
    depth = layers.layers[rows, chosen].sum() / layers.tokens[rows, chosen].sum()
  return chosen, risk, depth


def _summarize_splits(tolerance: float, outcomes, thresholds: np.ndarray) -> SplitTrials:
  chosen = [outcome[0] for outcome in outcomes]
  risks = np.array([outcome[1] for outcome in outcomes])
  depths = np.array([outcome[2] for outcome in outcomes])
  certified = [column for column in chosen if column is not None]
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


def validity_trials(
  losses: SequenceLosses,
  tolerances: Sequence[float],
  *,
  error_rate: float,
  method: str = "auto",
  groups: Sequence[str] | None = None,
  calibration_size: int | None = None,
  trials: int = 200,
  seed: int = 0,
) -> tuple[ValidityTrials, ...]:
  """Figure (b): does the promise hold as often as it says?

  Calibration sets are drawn with replacement, so that prompts are independent draws from the
  pool and the pool's mean is their true expectation. The full model has loss 0 by definition.

  Args:
    losses: pool of losses on a strictly descending grid.
    tolerances: deltas, each its own test.
    error_rate: epsilon.
    method: as for `calibrate`.
    groups: [num_examples] cluster of each row; None makes every row its own.
    calibration_size: units per calibration set; None takes as many as the pool has.
    trials: calibration sets.
    seed: of the draws; the same draws serve all tolerances.

  Returns:
    One `ValidityTrials` a tolerance.

  Raises:
    ValueError: losses leave their range.
  """
  pool = _Pool(losses, method, groups)
  true_risk = pool.values.mean(axis=0)
  size = calibration_size or len(pool.values)
  generator = np.random.default_rng(seed)
  draws = [generator.integers(len(pool.values), size=size) for _ in range(trials)]
  results = []
  for tolerance in tolerances:
    chosen = [pool.choose(draw, tolerance, error_rate) for draw in draws]
    certified = [column for column in chosen if column is not None]
    violations = int(np.sum(true_risk[certified] > tolerance)) if certified else 0
    interval = stats.binomtest(violations, trials).proportion_ci(0.95)
    results.append(
      ValidityTrials(
        tolerance=float(tolerance),
        error_rate=error_rate,
        trials=trials,
        violations=violations,
        share=violations / trials,
        interval=(float(interval.low), float(interval.high)),
        certified_share=len(certified) / trials,
      )
    )
  return tuple(results)
