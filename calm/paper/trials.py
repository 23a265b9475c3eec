"""App. B: repeated calibration on cached losses, and a test of the promise."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy import stats

from calm.calibrate import SequenceLosses, methods


@dataclasses.dataclass(frozen=True)
class Trial:
  """Figures (a) and (b) at one tolerance; spreads are standard deviations over splits."""

  measure: str
  method: str
  tolerance: float  # delta
  risk_mean: float  # mean over splits of the mean test loss at the chosen threshold
  risk_spread: float
  layers_mean: float  # mean of decoder layers a token on the test part; NaN without layers
  layers_spread: float
  certified_share: float  # share of splits with any threshold certified
  draws: int  # calibration sets drawn
  violations: int  # of those, with a pool risk above delta at the chosen threshold
  interval: tuple[float, float]  # 95 % Clopper-Pearson interval of their share

  @property
  def share(self) -> float:
    """Of the drawn sets whose threshold breaks the promise."""
    return self.violations / self.draws


def repeat(
  losses: SequenceLosses,
  method: str,
  tolerances: Sequence[float],
  error_rate: float,
  size: int,
  *,
  measure: str = "",
  layers: tuple[np.ndarray, np.ndarray, int] | None = None,
  splits: int = 50,
  draws: int = 200,
  seed: int = 0,
) -> tuple[Trial, ...]:
  """Calibrates again and again, for every tolerance, each of which has its own test.

  Figure (a), the paper's protocol: random splits, 80 % calibrate and 20 % test; a test risk
  above the tolerance is partly noise of the test part. Figure (b): sets of `size` prompts drawn
  with replacement, so that the pool's mean is their true expectation. `layers` are decoder
  layers summed over a prompt's tokens, and tokens, both [num_prompts, num_thresholds], and
  layers of the full model.
  """
  test = methods.get_method(method, losses.support)
  values, support = test.prepare(losses.values, losses.support)
  count, generator = len(values), np.random.default_rng(seed)
  cut = min(count - 1, max(1, round(0.8 * count)))
  orders = np.stack([generator.permutation(count) for _ in range(splits)])
  asked = test, values, support.upper, tolerances, error_rate
  chosen = choose(*asked, orders[:, :cut], generator.random(splits))
  generator = np.random.default_rng(seed)
  sets = np.stack([generator.integers(count, size=size) for _ in range(draws)])
  of_draws = choose(*asked, sets, generator.random(draws))
  # The last entry is what -1 reads: the full model, whose loss is 0 by definition.
  true_risk, found = np.append(values.mean(axis=0), 0.0), []

  def depth(column: int, rows: np.ndarray) -> float:
    if layers is None or column < 0:
      return np.nan if layers is None else float(layers[2])
    return layers[0][rows, column].sum() / layers[1][rows, column].sum()

  for place, tolerance in enumerate(tolerances):
    columns = chosen[:, place].tolist()
    pairs = list(zip(columns, orders[:, cut:], strict=True))
    risks = np.array([0.0 if c < 0 else values[rows, c].mean() for c, rows in pairs])
    depths = np.array([depth(c, rows) for c, rows in pairs])
    certified = sum(column >= 0 for column in columns) / splits
    column = of_draws[:, place]
    broken = int(np.sum((column >= 0) & (true_risk[column] > tolerance)))
    low, high = stats.binomtest(broken, draws).proportion_ci(0.95)
    found.append(
      Trial(
        measure,
        method,
        float(tolerance),
        float(risks.mean()),
        float(risks.std()),
        float(depths.mean()),
        float(depths.std()),
        certified,
        draws,
        broken,
        (float(low), float(high)),
      )
    )
  return tuple(found)


def choose(
  method: methods.Method,
  values: np.ndarray,
  upper: float,
  tolerances: Sequence[float],
  error_rate: float,
  draws: np.ndarray,
  uniforms: np.ndarray,
) -> np.ndarray:
  """[num_sets, num_tolerances] lowest columns that fixed sequence testing certifies, or -1.

  `draws` [num_sets, set_size] are rows of `values` in the tested order, one `uniforms` a set.
  All sets and tolerances walk down the grid in lockstep, and those that failed drop out.
  """
  levels = np.asarray(tolerances)
  chosen = np.full((len(draws), len(levels)), -1)
  for column in range(values.shape[1]):
    # Who has certified everything so far goes on.
    sets, places = np.nonzero(chosen == column - 1)
    losses = values[:, column][draws[sets].T]
    tested = (levels[places], error_rate, len(losses), upper, uniforms[sets])
    passed = np.exp(method.log_p_values(losses, method.design(*tested))) <= error_rate
    chosen[sets[passed], places[passed]] = column
  return chosen
