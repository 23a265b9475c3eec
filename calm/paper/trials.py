"""Repeated calibration on cached losses: the paper's protocol, and a test of the promise."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy import stats

from calm.calibrate import clusters, methods
from calm.calibrate.losses import SequenceLosses


class Draws:
  """A pool of losses from which calibration sets are drawn and tested, many at once.

  All sets and tolerances walk down the grid in lockstep, and those that failed drop out.
  `values` [num_units, num_thresholds] are prompts or cluster means, clipped where the method
  does; `unit_of_row` [num_examples] is the unit of each row of the losses.
  """

  def __init__(self, losses: SequenceLosses, method: str):
    names = losses.groups or tuple(map(str, range(len(losses.values))))
    self.method = methods.get_method(method, clusters.unit_support(losses, names))
    prepared, support = self.method.prepare(losses.values, losses.support)
    losses = dataclasses.replace(losses, values=prepared, support=support)
    units = clusters.cluster_means(losses, names)
    self.values = np.clip(units.values, support.lower, support.upper)
    self.support = units.support
    _, self.unit_of_row = np.unique(names, return_inverse=True)

  def choose(
    self,
    draws: np.ndarray,
    tolerances: Sequence[float],
    error_rate: float,
    uniforms: npt.ArrayLike = 1.0,
  ) -> np.ndarray:
    """[num_sets, num_tolerances] lowest columns that fixed sequence testing certifies, or -1.

    `draws` are [num_sets, set_size] units of each calibration set, in the tested order;
    `tolerances` each have their own test.
    """
    levels, uniforms = np.asarray(tolerances), np.broadcast_to(uniforms, len(draws))
    chosen, upper = np.full((len(draws), len(levels)), -1), self.support.upper
    for column in range(self.values.shape[1]):
      # Who has certified everything so far goes on.
      sets, places = np.nonzero(chosen == column - 1)
      losses = self.values[:, column][draws[sets].T]
      tested = (levels[places], error_rate, len(losses), upper, uniforms[sets])
      log_p = self.method.log_p_values(losses, self.method.design(*tested))
      passed = np.exp(log_p) <= error_rate
      chosen[sets[passed], places[passed]] = column
    return chosen


@dataclasses.dataclass(frozen=True)
class SplitTrials:
  """Results over random splits at one tolerance; spreads are standard deviations."""

  tolerance: float  # delta
  risk_mean: float  # mean over splits of the mean test loss at the chosen threshold
  risk_spread: float
  layers_mean: float  # mean of decoder layers per token on the test split; NaN without layers
  layers_spread: float
  certified_share: float  # share of splits with any threshold certified


@dataclasses.dataclass(frozen=True)
class ValidityTrials:
  """Violations at one tolerance."""

  tolerance: float  # delta
  trials: int  # calibration sets drawn
  violations: int  # of those, with a pool risk above delta at the chosen threshold
  share: float  # violations / trials
  interval: tuple[float, float]  # 95 % Clopper-Pearson interval of the share


def split_trials(
  pool: Draws,
  tolerances: Sequence[float],
  error_rate: float,
  *,
  layers: tuple[np.ndarray, np.ndarray, int] | None = None,
  trials: int = 50,
  seed: int = 0,
) -> tuple[SplitTrials, ...]:
  """The paper's protocol: random splits, 80 % calibrate and 20 % test, by whole clusters.

  A test risk above the tolerance is partly noise of the test split.

  Args:
    pool: prompts or clusters.
    tolerances: deltas, each its own test (not simultaneous).
    error_rate: epsilon.
    layers: decoder layers, summed over a prompt's tokens, and tokens, both [num_examples,
      num_thresholds], and layers of the full model; to report layers per token.
    trials: splits.
    seed: of the splits; the same splits serve all tolerances.
  """
  count = len(pool.values)
  cut = min(count - 1, max(1, round(0.8 * count)))
  generator = np.random.default_rng(seed)
  splits = np.stack([generator.permutation(count) for _ in range(trials)])
  chosen = pool.choose(splits[:, :cut], tolerances, error_rate, generator.random(trials))
  found = []
  for tolerance, columns in zip(tolerances, chosen.T.tolist(), strict=True):
    pairs = list(zip(columns, splits[:, cut:], strict=True))
    risks = np.array([0.0 if c < 0 else pool.values[test, c].mean() for c, test in pairs])
    depths = np.array([_depth(pool, layers, c, test) for c, test in pairs])
    found.append(
      SplitTrials(
        tolerance=float(tolerance),
        risk_mean=float(risks.mean()),
        risk_spread=float(risks.std()),
        layers_mean=float(depths.mean()),
        layers_spread=float(depths.std()),
        certified_share=sum(column >= 0 for column in columns) / trials,
      )
    )
  return tuple(found)


def _depth(pool: Draws, layers, column: int, test: np.ndarray) -> float:
  """Layers a token of test units; column -1 is the full model."""
  if layers is None or column < 0:
    return np.nan if layers is None else float(layers[2])
  rows = np.isin(pool.unit_of_row, test)
  return layers[0][rows, column].sum() / layers[1][rows, column].sum()


def validity_trials(
  pool: Draws,
  tolerances: Sequence[float],
  error_rate: float,
  calibration_size: int,
  *,
  trials: int = 200,
  seed: int = 0,
) -> tuple[ValidityTrials, ...]:
  """Measures how often the promise holds.

  Calibration sets of `calibration_size` units are drawn with replacement, so that prompts are
  independent draws from the pool and the pool's mean is their true expectation. The full model
  has loss 0 by definition. Other arguments are those of `split_trials`; the same draws serve
  all tolerances.
  """
  count, generator = len(pool.values), np.random.default_rng(seed)
  draws = np.stack([generator.integers(count, size=calibration_size) for _ in range(trials)])
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
        trials=trials,
        violations=violations,
        share=violations / trials,
        interval=(float(interval.low), float(interval.high)),
      )
    )
  return tuple(found)
