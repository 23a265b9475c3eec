"""Pareto testing: one choice among many configurations, for several risks at once.

Configurations (threshold, schedule, measure, ...) have no natural order. Half of the rows (the
optimization split) is spent on finding one: configurations that no other beats in every risk
and in cost, the safest first. The rest of the rows is tested in that order at the full level.
The order may depend on the first half in any way, because the second half never saw it.
(Laufer-Goldshtein et al., ICLR 2023.)
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from calm.calibrate.evidence import methods, multiple_testing
from calm.calibrate.losses.sequence_losses import Support


@dataclasses.dataclass(frozen=True, eq=False)
class Risk:
  """One risk to be controlled for every configuration.

  Attributes:
    values: [num_examples, num_configurations] losses.
    tolerance: bound on the expected loss, in (0, 1).
    support: declared range.
    method: p-value method, as for `calibrate`.
  """

  values: np.ndarray
  tolerance: float
  support: Support = dataclasses.field(default_factory=Support)
  method: str = "auto"


@dataclasses.dataclass(frozen=True, eq=False)
class ParetoResult:
  """What Pareto testing found.

  Attributes:
    chosen: the cheapest certified configuration, or None.
    order: configurations on the front, in the tested order.
    p_values: [len(order)] largest p over risks, on the test rows.
    rejected: [len(order)] whether all risks are certified.
    num_examples: test rows.
  """

  chosen: int | None
  order: tuple[int, ...]
  p_values: np.ndarray
  rejected: np.ndarray
  num_examples: int


def front(objectives: npt.ArrayLike) -> np.ndarray:
  """Rows that no other row beats: as good everywhere and better somewhere.

  Args:
    objectives: [num_configurations, num_objectives], smaller is better.

  Returns:
    Row numbers, ascending; of equal rows the first alone (a duplicate would waste a test).
  """
  points = np.asarray(objectives, np.float64)
  _, first = np.unique(points, axis=0, return_index=True)
  kept = np.sort(first)
  points = points[kept]
  better = (points[:, None] <= points[None]).all(axis=2) & (points[:, None] < points[None]).any(
    2
  )
  return kept[~better.any(axis=0)]


def max_log_p_values(
  risks: Sequence[Risk],
  rows: npt.ArrayLike,
  configurations: npt.ArrayLike,
  error_rate: float,
  *,
  any_level: bool = True,
) -> np.ndarray:
  """Largest log p over risks: a p-value of "some risk exceeds its tolerance".

  Args:
    risks: the risks.
    rows: rows used, in the tested order.
    configurations: columns used.
    error_rate: level that bets are tuned for.
    any_level: whether 'auto' must give p-values that can be compared and tested at any level,
      or at `error_rate` alone.

  Returns:
    [len(configurations)], at most 0.

  Raises:
    ValueError: losses leave their declared range, or a method does not fit them.
  """
  found = []
  for risk in risks:
    method = methods.get_method(risk.method, risk.support, any_level=any_level)
    values, support = method.prepare(np.asarray(risk.values, np.float64), risk.support)
    values = values[np.ix_(np.asarray(rows), np.asarray(configurations))]
    outside = ~((values >= support.lower - 1e-9) & (values <= support.upper + 1e-9))
    if outside.any():
      raise ValueError(
        f"Expected losses of a risk to lie in the declared range [{support.lower},"
        f" {support.upper}],"
        f" got {float(values[outside].flat[0])!r}."
      )
    values = np.clip(values, support.lower, support.upper)
    sample = methods.Sample(values, support, risk.tolerance, error_rate)
    found.append(method.log_p_values(sample))
  return np.max(found, axis=0)


def pareto_test(
  risks: Sequence[Risk],
  costs: npt.ArrayLike,
  *,
  optimization_rows: npt.ArrayLike,
  error_rate: float,
) -> ParetoResult:
  """Certifies configurations for all risks at once and returns the cheapest.

  With probability at least 1 - error_rate over the test rows, every rejected configuration
  keeps all its risks within their tolerances.

  Args:
    risks: at least one; all on the same rows and configurations.
    costs: [num_configurations] what to make small (layers per token); must not come from the
      test rows.
    optimization_rows: row numbers (or a mask) of the optimization split; all other rows are
      tested, in the order in which they stand, so that the two are disjoint whatever is passed.
    error_rate: epsilon, in (0, 1).

  Rows must be exchangeable units: where prompts come in clusters, pass cluster means
  (`clusters.cluster_means`). The order of rows must not come from their losses.

  Returns:
    A `ParetoResult`.

  Raises:
    ValueError: shapes disagree, a split is empty, or losses leave their declared range.
  """
  costs = np.asarray(costs, np.float64)
  if not np.isfinite(costs).all():
    raise ValueError(
      f"Expected `costs` to be finite, got {float(costs[~np.isfinite(costs)].flat[0])!r}: a"
      " configuration of unknown cost cannot be called the cheapest."
    )
  shapes = {np.shape(risk.values) for risk in risks}
  if len(shapes) != 1 or (shape := shapes.pop())[1:] != costs.shape or len(shape) != 2:
    raise ValueError(
      "Expected `risks` to hold losses [num_examples, num_configurations] of one shape with a"
      " cost for"
      f" each configuration, got {[np.shape(risk.values) for risk in risks]} and costs"
      f" {costs.shape}."
    )
  chosen_rows = np.zeros(shape[0], bool)
  picked = np.asarray(optimization_rows)
  chosen_rows[picked if picked.dtype == bool else picked.astype(np.int64)] = True
  first, second = np.flatnonzero(chosen_rows), np.flatnonzero(~chosen_rows)
  if not len(first) or not len(second):
    raise ValueError(
      f"Expected `optimization_rows` to leave rows on both sides, got {len(first)} of"
      f" {shape[0]}."
    )
  means = np.stack([np.asarray(risk.values)[first].mean(axis=0) for risk in risks], axis=1)
  candidates = front(np.column_stack([means, costs]))
  guesses = max_log_p_values(risks, first, candidates, error_rate)
  order = candidates[np.lexsort((costs[candidates], guesses))]
  p_values = np.exp(max_log_p_values(risks, second, order, error_rate, any_level=False))
  rejected = multiple_testing.fixed_sequence(p_values, error_rate).rejected
  certified = order[rejected]
  return ParetoResult(
    chosen=int(certified[np.argmin(costs[certified])]) if len(certified) else None,
    order=tuple(order.tolist()),
    p_values=p_values,
    rejected=rejected,
    num_examples=len(second),
  )
