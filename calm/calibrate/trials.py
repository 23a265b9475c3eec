"""Repeated calibration on cached losses: the paper's protocol, and a test of the promise.

`split_trials` are the paper's 50 random 80/20 splits; a test risk above the tolerance is partly
noise of the test split. `validity_trials` draw calibration sets with replacement from the pool,
whose own mean is the true risk: the share of draws whose chosen threshold exceeds the tolerance
is compared with the error rate.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

from calm import arguments
from calm.calibrate import checks, clusters, methods
from calm.calibrate.losses import SequenceLosses

# Units of all sets together that are drawn at once: 2 GB of numbers.
MOST_DRAWN = 2**28


class Draws:
  """A pool of losses from which calibration sets are drawn and tested, many at once.

  All sets and tolerances walk down the grid in lockstep, and those that failed drop out.
  `values` [num_units, num_thresholds] are prompts or cluster means, clipped where the method
  does; `unit_of_row` [num_examples] is the unit of each row of the losses.
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
    self,
    draws: npt.ArrayLike,
    tolerances: Sequence[float],
    error_rate: float,
    uniforms: npt.ArrayLike = 1.0,
  ) -> np.ndarray:
    """[num_sets, num_tolerances] lowest columns that fixed sequence testing certifies, or -1.

    `draws` are [num_sets, set_size] units of each calibration set, in the tested order;
    `tolerances` each have their own test.
    """
    draws, levels = np.asarray(draws), np.asarray(tolerances, np.float64)
    chosen = np.full((len(draws), len(levels)), -1)
    uniforms = np.broadcast_to(uniforms, len(draws))
    for column in range(self.values.shape[1]):
      # Who has certified everything so far goes on.
      sets, positions = np.nonzero(chosen == column - 1)
      going, places = np.unique(sets, return_inverse=True)
      losses = self.values[:, column][draws[going].T]
      sample = methods.Sample(
        losses, self.support, levels[positions], error_rate, uniform=uniforms[sets]
      )
      passed = self.method.certifies(sample, places)
      chosen[sets[passed], positions[passed]] = column
    return chosen


@dataclasses.dataclass(frozen=True)
class SplitTrials:
  """Results over random splits at one tolerance; spreads are standard deviations."""

  tolerance: float  # delta
  trials: int  # number of splits
  risk_mean: float  # mean over splits of the mean test loss at the chosen threshold
  risk_spread: float
  layers_mean: float  # mean of decoder layers per token on the test split; NaN without layers
  layers_spread: float
  certified_share: float  # share of splits with any threshold certified
  threshold_mean: float  # mean of the certified thresholds; NaN if none


@dataclasses.dataclass(frozen=True)
class ValidityTrials:
  """Violations at one tolerance."""

  tolerance: float  # delta
  error_rate: float  # epsilon, the most violations that the promise allows
  trials: int  # calibration sets drawn
  violations: int  # of those, with a pool risk above delta at the chosen threshold
  share: float  # violations / trials
  interval: tuple[float, float]  # 95 % Clopper-Pearson interval of the share
  certified_share: float  # share of draws with any threshold certified


@dataclasses.dataclass(frozen=True, eq=False)
class LayerCounts:
  """Decoder layers and tokens behind the losses."""

  layers: np.ndarray  # [num_examples, num_thresholds] layers summed over a prompt's tokens
  tokens: np.ndarray  # [num_examples, num_thresholds] tokens
  full_depth: int  # decoder layers of the full model (`NEVER_EXIT`)


def _check(
  name: str, tolerances: Sequence[float], error_rate: float, trials: int, size: int, seed: int
) -> None:
  checks.in_range("error_rate", error_rate, 0.0, 1.0)
  for tolerance in tolerances or (math.nan,):
    checks.in_range("tolerances", tolerance, 0.0, 1.0)
  for kind, count in (("trials", trials), (name, size)):
    if count < 1:
      raise ValueError(f"Expected `{kind}` to be at least 1, got {count!r}.")
  if trials * size > MOST_DRAWN:
    raise ValueError(
      f"Expected `trials` sets of {size} units to have at most {MOST_DRAWN} units together, got"
      f" {trials} sets; draw fewer or smaller ones."
    )
  if seed < 0:
    raise ValueError(f"Expected `seed` to be at least 0, got {seed}.")


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
  pool = Draws(losses, method, groups)
  count = len(pool.values)
  _check("losses", tolerances, error_rate, trials, count, seed)
  if count < 2:
    raise ValueError(f"Expected `losses` to have at least 2 units to split, got {count}.")
  cut = min(count - 1, max(1, round(0.8 * count)))
  generator = np.random.default_rng(seed)
  splits = np.stack([generator.permutation(count) for _ in range(trials)])
  chosen = pool.choose(splits[:, :cut], tolerances, error_rate, generator.random(trials))
  found = []
  for tolerance, columns in zip(tolerances, chosen.T.tolist(), strict=True):
    pairs = list(zip(columns, splits[:, cut:], strict=True))
    risks = np.array([0.0 if c < 0 else pool.values[test, c].mean() for c, test in pairs])
    depths = np.array([_depth(pool, layers, c, test) for c, test in pairs])
    certified = [column for column in columns if column >= 0]
    found.append(
      SplitTrials(
        tolerance=float(tolerance),
        trials=trials,
        risk_mean=float(risks.mean()),
        risk_spread=float(risks.std()),
        layers_mean=float(depths.mean()),
        layers_spread=float(depths.std()),
        certified_share=len(certified) / trials,
        threshold_mean=float(np.mean(pool.thresholds[certified])) if certified else np.nan,
      )
    )
  return tuple(found)


def _depth(pool: Draws, layers: LayerCounts | None, column: int, test: np.ndarray) -> float:
  """Layers a token of test units; column -1 is the full model."""
  if layers is None or column < 0:
    return np.nan if layers is None else float(layers.full_depth)
  rows = np.isin(pool.unit_of_row, test)
  return layers.layers[rows, column].sum() / layers.tokens[rows, column].sum()


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
  Arguments and errors are those of `split_trials`; the same draws serve all tolerances.

  Args:
    losses: pool of losses.
    tolerances: deltas.
    error_rate: epsilon.
    method: as for `calibrate`.
    groups: clusters.
    calibration_size: units per calibration set; None takes as many as the pool has.
    trials: calibration sets.
    seed: of the draws.

  Returns:
    One `ValidityTrials` a tolerance.
  """
  pool = Draws(losses, method, groups)
  size = len(pool.values) if calibration_size is None else calibration_size
  _check("calibration_size", tolerances, error_rate, trials, size, seed)
  generator = np.random.default_rng(seed)
  draws = np.stack([generator.integers(len(pool.values), size=size) for _ in range(trials)])
  # The last entry is what -1 reads: the full model, whose loss is 0 by definition.
  true_risk = np.append(pool.values.mean(axis=0), 0.0)
  found = []
  chosen = pool.choose(draws, tolerances, error_rate, generator.random(trials))
  for tolerance, columns in zip(tolerances, chosen.T, strict=True):
    violations = int(np.sum((columns >= 0) & (true_risk[columns] > tolerance)))
    interval = stats.binomtest(violations, trials).proportion_ci(0.95)
    found.append(
      ValidityTrials(
        tolerance=float(tolerance),
        error_rate=error_rate,
        trials=trials,
        violations=violations,
        share=violations / trials,
        interval=(float(interval.low), float(interval.high)),
        certified_share=float(np.mean(columns >= 0)),
      )
    )
  return tuple(found)
