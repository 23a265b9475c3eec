"""Pareto testing: one choice among many configurations, for several risks at once.

Configurations (threshold, schedule, measure, ...) have no natural order. Half of the rows (the
optimization split) is spent on finding one: configurations that no other beats in every risk
and in cost, the safest first. The rest of the rows is tested in that order at the full level.
The order may depend on the first half in any way, because the second half never saw it.
(Laufer-Goldshtein et al., ICLR 2023.)
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from calm.calibrate import clusters
from calm.calibrate.evidence import methods, multiple_testing
from calm.calibrate.losses import SequenceLosses, Support


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
class RiskEvidence:
  """What the test rows say of one risk, over the tested order.

  Attributes:
    method: p-value method, 'auto' resolved.
    support: declared range of what was tested.
    means: [num_tested] mean losses.
    log_p_values: [num_tested] of H: expected loss > tolerance.
    upper_bounds: [num_tested] of the expected loss, for one configuration at a time.
  """

  method: str
  support: Support
  means: np.ndarray
  log_p_values: np.ndarray
  upper_bounds: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class ParetoResult:
  """What Pareto testing found.

  Attributes:
    chosen: the cheapest certified configuration, or None.
    order: configurations on the front, in the tested order.
    costs: [len(order)] their costs, by the optimization rows.
    p_values: [len(order)] largest p over risks, on the test rows.
    rejected: [len(order)] whether all risks are certified.
    rows: test rows, in the tested order.
    evidence: of each risk.
    seed: hexadecimal seed of the order of rows.
  """

  chosen: int | None
  order: tuple[int, ...]
  costs: np.ndarray
  p_values: np.ndarray
  rejected: np.ndarray
  rows: np.ndarray
  evidence: tuple[RiskEvidence, ...]
  seed: str

  @property
  def num_examples(self) -> int:
    """Test rows."""
    return len(self.rows)


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


def evidence(
  risk: Risk,
  rows: npt.ArrayLike,
  configurations: npt.ArrayLike,
  error_rate: float,
  *,
  any_level: bool = True,
  bounded: bool = True,
) -> RiskEvidence:
  """p-values of "this risk exceeds its tolerance", and what else some rows say of it.

  Args:
    risk: the risk.
    rows: rows used, in the tested order.
    configurations: columns used.
    error_rate: level that bets are tuned for.
    any_level: whether 'auto' must give p-values that can be compared and tested at any level,
      or at `error_rate` alone.
    bounded: whether upper bounds are wanted, which take most of the time.

  Returns:
    [len(configurations)] each.

  Raises:
    ValueError: losses leave their declared range, or a method does not fit them.
  """
  method = methods.get_method(risk.method, risk.support, any_level=any_level)
  values, support = method.prepare(np.asarray(risk.values, np.float64), risk.support)
  values = values[np.ix_(np.asarray(rows), np.asarray(configurations))]
  outside = ~((values >= support.lower - 1e-9) & (values <= support.upper + 1e-9))
  if outside.any():
    raise ValueError(
      f"Expected `values` of a risk to lie in the declared range [{support.lower},"
      f" {support.upper}], got {float(values[outside].flat[0])!r}."
    )
  sample = methods.Sample(values, support, risk.tolerance, error_rate)
  count = values.shape[1]
  if bounded:
    log_p, bounds = method.evidence(sample, np.ones(count, bool))
  else:
    log_p = method.log_p_values(sample.block(np.arange(count)))
    bounds = np.full(count, np.nan)
  return RiskEvidence(method.name, support, values.mean(axis=0), log_p, bounds)


def pareto_test(
  risks: Sequence[Risk],
  costs: npt.ArrayLike,
  *,
  error_rate: float,
  optimization_rows: npt.ArrayLike | None = None,
  names: Sequence[str] | None = None,
  contents: str = "",
  seed: str | None = None,
) -> ParetoResult:
  """Certifies configurations for all risks at once and returns the cheapest.

  With probability at least 1 - error_rate over the test rows, every rejected configuration
  keeps all its risks within their tolerances. Both splits and the order of the test come from a
  permutation that is seeded by names and losses, as in `calibrate`: how rows are stored plays
  no part.

  Args:
    risks: at least one; all on the same rows and configurations.
    costs: what to make small (layers per token): [num_examples, num_configurations], of which
      the optimization rows are used, or [num_configurations], not made from the test rows.
    error_rate: epsilon, in (0, 1).
    optimization_rows: row numbers (or a mask) of the optimization split, chosen by nothing that
      goes with losses; all other rows are tested, so that the two are disjoint whatever is
      passed. None takes the first half of the permutation.
    names: [num_examples] unique names of rows; None numbers them.
    contents: digest of what the prompts say; '' takes that of losses.
    seed: of an earlier result, to repeat it, or one that was drawn before these losses were
      seen; several must not be tried. Without it, rows of at most eight kinds and no `contents`
      are split and tested in 16 ways, and what all of them certify is certified.

  Rows must be exchangeable units: where prompts come in clusters, pass cluster means
  (`clusters.cluster_means`).

  Returns:
    A `ParetoResult`.

  Raises:
    ValueError: shapes disagree, a split is empty, or losses leave their declared range.
  """
  costs = np.asarray(costs, np.float64)
  _check(risks, costs)
  orders, seed = _permutations(risks, names, contents, seed)
  run = functools.partial(_test_in_order, risks, costs, optimization_rows, error_rate)
  found = run(orders[0], seed)
  common = set(np.array(found.order)[found.rejected].tolist())
  for rows in orders[1:]:
    if common:
      other = run(rows, seed, bounded=False)
      common &= set(np.array(other.order)[other.rejected].tolist())
  return found if len(orders) == 1 else _keep(found, common)


def _keep(first: ParetoResult, common: set[int]) -> ParetoResult:
  """A result in which what all orders certify comes first, and p = 1 for all others."""
  kept = np.array([column in common for column in first.order])
  places = np.argsort(~kept, kind="stable")
  rejected = kept[places]
  order = np.array(first.order)[places]
  evidence = tuple(
    dataclasses.replace(
      found,
      means=found.means[places],
      log_p_values=np.where(rejected, found.log_p_values[places], 0.0),
      upper_bounds=np.where(rejected, found.upper_bounds[places], found.support.upper),
    )
    for found in first.evidence
  )
  costs = first.costs[places]
  return dataclasses.replace(
    first,
    chosen=int(order[np.argmin(np.where(rejected, costs, np.inf))]) if common else None,
    order=tuple(order.tolist()),
    costs=costs,
    p_values=np.where(rejected, first.p_values[places], 1.0),
    rejected=rejected,
    evidence=evidence,
  )


def _test_in_order(
  risks: Sequence[Risk],
  costs: np.ndarray,
  optimization_rows,
  error_rate: float,
  rows: np.ndarray,
  seed: str,
  *,
  bounded: bool = True,
) -> ParetoResult:
  """`pareto_test` with rows in one order, with or without upper bounds."""
  first, second = _split(rows, optimization_rows)
  prices = costs if costs.ndim == 1 else costs[first].mean(axis=0)
  means = np.stack([np.asarray(risk.values)[first].mean(axis=0) for risk in risks], axis=1)
  candidates = front(np.column_stack([means, prices]))
  guesses = np.max(
    [
      evidence(risk, first, candidates, error_rate, bounded=False).log_p_values
      for risk in risks
    ],
    axis=0,
  )
  order = candidates[np.lexsort((prices[candidates], guesses))]
  found = tuple(
    evidence(risk, second, order, error_rate, any_level=False, bounded=bounded)
    for risk in risks
  )
  p_values = np.exp(np.max([each.log_p_values for each in found], axis=0))
  rejected = multiple_testing.fixed_sequence(p_values, error_rate).rejected
  certified = order[rejected]
  return ParetoResult(
    chosen=int(certified[np.argmin(prices[certified])]) if len(certified) else None,
    order=tuple(order.tolist()),
    costs=prices[order],
    p_values=p_values,
    rejected=rejected,
    rows=second,
    evidence=found,
    seed=seed,
  )


def _check(risks: Sequence[Risk], costs: np.ndarray) -> None:
  if not np.isfinite(costs).all():
    raise ValueError(
      "Expected `costs` to be finite, as what is of unknown cost cannot be called the"
      f" cheapest, got {float(costs[~np.isfinite(costs)].flat[0])!r}."
    )
  shapes = {np.shape(risk.values) for risk in risks}
  shape = shapes.pop() if len(shapes) == 1 else ()
  if len(shape) != 2 or costs.shape not in (shape, shape[1:]):
    raise ValueError(
      "Expected `risks` to hold losses [num_examples, num_configurations] of one shape with a"
      " cost for"
      f" each configuration, got {[np.shape(risk.values) for risk in risks]} and costs"
      f" {costs.shape}."
    )


def _permutations(risks, names, contents: str, seed: str | None):
  """(orders of rows that have nothing to do with how they are stored, seed of the first)."""
  values = np.concatenate([np.asarray(risk.values, np.float64) for risk in risks], axis=1)
  grid = np.linspace(1.0, 0.0, values.shape[1])
  ids = None if names is None else tuple(names)
  table = SequenceLosses(values, grid, ids=ids, contents=contents)
  seeds = clusters.order_seeds(table, seed)
  return clusters.tested_orders(table, seeds), seeds[0]


def _split(rows: np.ndarray, picked: npt.ArrayLike | None) -> tuple[np.ndarray, np.ndarray]:
  """(optimization rows, test rows), each in the order of `rows`."""
  if picked is None:
    picked = rows[: len(rows) // 2]
  picked = np.asarray(picked)
  mask = np.zeros(len(rows), bool)
  mask[picked if picked.dtype == bool else picked.astype(np.int64)] = True
  first, second = rows[mask[rows]], rows[~mask[rows]]
  if not len(first) or not len(second):
    raise ValueError(
      f"Expected `optimization_rows` to leave rows on both sides, got {len(first)} of"
      f" {len(rows)}."
    )
  return first, second
