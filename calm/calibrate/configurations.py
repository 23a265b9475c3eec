"""One of many configurations (measure, schedule, threshold, ...) with a promise.

`calibrate` walks down one grid. Where several are tried, with other measures or schedules, the
cheapest certified configuration of all is found by Pareto testing (`evidence.pareto`): half of
the prompts put the configurations in an order, the other half tests them in it.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import scipy

import calm
from calm import arguments
from calm.calibrate import checks, clusters
from calm.calibrate import decision as decision_lib
from calm.calibrate import thresholds as thresholds_lib
from calm.calibrate.calibration import Calibration, Row
from calm.calibrate.decision import Evidence
from calm.calibrate.evidence import pareto
from calm.calibrate.generations.procedure import Provenance
from calm.calibrate.losses import UNKNOWN, SequenceLosses
from calm.calibrate.promises import Configurations, Risk, as_promise
from calm.calibrate.promises.risks import check_outputs

# The one test that an order learned from other rows suits.
_TESTING = "fixed_sequence"


@arguments.checked()
def calibrate_configurations(
  risks: Mapping[str, Sequence[Risk]],
  costs: Mapping[str, npt.ArrayLike],
  *,
  error_rate: float,
  method: str = "auto",
  seed: str | None = None,
) -> Calibration:
  """Chooses the cheapest of all (family, threshold) pairs that are certified for all risks.

  With probability at least 1 - error_rate over the test prompts, every certified configuration
  has E[loss of risk r] <= tolerance of r for every r (Laufer-Goldshtein et al., ICLR 2023).

  Args:
    risks: {family: its risks}; every family has the same prompts, and risks of the same names
      and tolerances.
    costs: {family: [num_examples, num_thresholds]} what to make small, such as layers a token;
      finite and at least 0.
    error_rate: epsilon, in (0, 1).
    method: as for `calibrate`.
    seed: of an earlier `Calibration`, to repeat it; several must not be tried.

  Returns:
    A `Calibration` whose `promise` names the configurations and whose `rows` are in the tested
    order; its `threshold` and `procedure` are those of the chosen one. Where none is certified
    the threshold is `NEVER_EXIT`.

  Raises:
    ValueError: families differ in prompts or risks, or an argument leaves its range.
  """
  families = {name: tuple(several) for name, several in risks.items()}
  first = _check(families, costs, error_rate)
  as_promise(_of(families))  # refuses names that cannot be stored
  checks.check_seed(seed)
  places = [
    (name, float(threshold))
    for name, several in families.items()
    for threshold in several[0].losses.thresholds
  ]
  checks.check_lines([_configuration(*place) for place in places], "configurations")
  groups = clusters.declared_groups(first)
  tables = [_table(families, number, groups, method) for number in range(len(_of(families)))]
  price = np.concatenate([checks.as_amounts(costs[name], "costs") for name in families], axis=1)
  if groups is None and not first.groups_ignored and first.metric == UNKNOWN:
    checks.warn_of_copies(np.concatenate([table.values for table in tables], axis=1))
  found = pareto.pareto_test(
    tables,
    price if groups is None else _means(first, price, groups),
    error_rate=error_rate,
    names=first.ids if groups is None else sorted(set(groups)),
    contents=first.contents,
    seed=seed,
  )
  return _record(families, [places[column] for column in found.order], found, error_rate)


def _record(families, tested, found: pareto.ParetoResult, error_rate: float) -> Calibration:
  """What was found as a `Calibration`; `tested` has (family, threshold) in the tested order."""
  first = _of(families)[0].losses
  promise = Configurations(
    names=tuple(risk.called for risk in _of(families)),
    tolerances=tuple(float(risk.tolerance) for risk in _of(families)),
    configurations=tuple(_configuration(*place) for place in tested),
    costs=tuple(found.costs.tolist()),
  )
  parts = _parts(found, promise)
  decision = decision_lib.decide(parts, _TESTING, error_rate)
  place = promise.place(decision.rejected)
  family, threshold = (
    tested[place] if place is not None else (tested[0][0], thresholds_lib.NEVER_EXIT)
  )
  return Calibration(
    threshold=threshold,
    reason=promise.reason(decision.rejected),
    tolerance=promise.tolerances[0],
    error_rate=error_rate,
    method=parts[0].method,
    testing=_TESTING,
    kind=first.kind,
    metric=first.metric,
    support=parts[0].support,
    num_examples=found.num_examples,
    clusters=clusters.declared_groups(first) is not None,
    groups_ignored=first.groups_ignored,
    rows=tuple(
      Row.of(level, parts, decision, number) for number, (_, level) in enumerate(tested)
    ),
    visited=decision.visited,
    order="permuted",
    seed=found.seed,
    procedure=families[family][0].losses.procedure,
    provenance=_provenance(first, found, parts[0].method),
    promise=promise,
    parts=parts,
  )


def _configuration(family: str, threshold: float) -> str:
  return f"{family} at {threshold:.10g}"


def _of(families: Mapping[str, Sequence[Risk]]) -> Sequence[Risk]:
  return next(iter(families.values()))


def _check(families, costs: Mapping[str, npt.ArrayLike], error_rate: float) -> SequenceLosses:
  """The losses of the first risk of the first family.

  Raises:
    ValueError: families differ, or an argument leaves its range.
  """
  if not families or not all(families.values()) or set(families) != set(costs):
    raise ValueError(
      "Expected `risks` of at least one family, each with a table of `costs`, got families"
      f" {sorted(families)} and costs of {sorted(costs)}."
    )
  if not 0.0 < error_rate < 1.0:
    raise ValueError(f"Expected `error_rate` to be in (0, 1), got {error_rate!r}.")
  checks.warn_of_error_rate(error_rate)
  first = _of(families)[0].losses
  wanted = [(risk.called, risk.tolerance) for risk in _of(families)]
  for name, several in families.items():
    if [(risk.called, risk.tolerance) for risk in several] != wanted:
      raise ValueError(
        f"Expected `risks` to be {wanted} of every family, got others of {name!r}."
      )
    shape = several[0].losses.values.shape
    for risk in several:
      check_outputs(risk, several[0].losses)
      losses = risk.losses
      alike = losses.ids == first.ids and losses.groups == first.groups
      if losses.values.shape != shape or len(losses.values) != len(first.values) or not alike:
        raise ValueError(
          f"Expected `risks` of the same prompts everywhere, got others in {name!r}."
        )
    if np.shape(costs[name]) != shape:
      raise ValueError(
        f"Expected `costs` of {name!r} of shape {shape}, got {np.shape(costs[name])}."
      )
  return first


def _table(families, number: int, groups, method: str) -> pareto.Risk:
  """One risk at every configuration."""
  several = [risks[number] for risks in families.values()]
  supports = {risk.losses.support for risk in several}
  if len(supports) != 1:
    raise ValueError(
      f"Expected `risks` with one support of {several[0].called!r}, got {len(supports)}."
    )
  values = np.concatenate([risk.losses.values for risk in several], axis=1)
  support = clusters.unit_support(several[0].losses, groups)
  if groups is not None:
    values = _means(several[0].losses, values, groups)
  return pareto.Risk(values, several[0].tolerance, support, method)


def _means(losses: SequenceLosses, values: np.ndarray, groups: Sequence[str]) -> np.ndarray:
  """[num_clusters, num_configurations] means of clusters, sorted by name."""
  grid = np.linspace(1.0, 0.0, values.shape[1])
  table = SequenceLosses(values, grid, ids=losses.ids)
  return clusters.cluster_means(table, checks.check_groups(groups, len(values))).values


def _parts(found: pareto.ParetoResult, promise: Configurations) -> tuple[Evidence, ...]:
  return tuple(
    Evidence(
      name=name,
      tolerance=tolerance,
      method=each.method,
      support=each.support,
      share=1.0,
      ascending=False,
      num_examples=(found.num_examples,) * len(found.order),
      means=tuple(each.means.tolist()),
      log_p_values=tuple(each.log_p_values.tolist()),
      upper_bounds=tuple(each.upper_bounds.tolist()),
    )
    for name, tolerance, each in zip(
      promise.names, promise.tolerances, found.evidence, strict=True
    )
  )


def _provenance(losses: SequenceLosses, found: pareto.ParetoResult, method: str) -> Provenance:
  return Provenance(
    metric=losses.metric,
    references="full model" if losses.kind == "textual" else "targets",
    num_examples=found.num_examples,
    order="permuted",
    seed=found.seed,
    method=method,
    versions={
      "calm": calm.__version__,
      "numpy": np.__version__,
      "scipy": scipy.__version__,
    },
  )
