"""One of many configurations (measure, schedule, threshold, ...) with a promise.

`calibrate` walks down one grid. Where several families are tried, with other measures or
schedules, each has its grid, which is tested for itself at error_rate / (number of families) on
all prompts; the cheapest certified configuration of all is served. All certificates hold at
once (Bonferroni over families), so the choice among them costs nothing.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from calm import arguments
from calm.calibrate import checks, clusters, testing
from calm.calibrate import thresholds as thresholds_lib
from calm.calibrate.calibration import Calibration
from calm.calibrate.certify import Run, record
from calm.calibrate.losses import UNKNOWN, SequenceLosses
from calm.calibrate.risks import Configurations, Part, Risk, as_promise, check_outputs
from calm.calibrate.testing import Evidence


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

  With probability at least 1 - error_rate over the prompts, every certified configuration has
  E[loss of risk r] <= tolerance of r for every r.

  Args:
    risks: {family: its risks}; every family has the same prompts, and risks of the same names
      and tolerances.
    costs: {family: [num_examples, num_thresholds]} what to make small, such as layers a token;
      finite and at least 0.
    error_rate: epsilon, in (0, 1).
    method: as for `calibrate`.
    seed: of an earlier `Calibration`, to repeat it; several must not be tried.

  Returns:
    A `Calibration` whose `promise` names the configurations and whose `rows` are grid after
    grid; its `threshold` and `procedure` are those of the chosen one. Where none is certified
    the threshold is `NEVER_EXIT`.

  Raises:
    ValueError: families differ in prompts or risks, or an argument leaves its range.
  """
  families = {name: tuple(several) for name, several in risks.items()}
  first = _check(families, costs, error_rate)
  checks.check_seed(seed)
  tables = [risk.losses for several in families.values() for risk in several]
  values = np.concatenate([table.values for table in tables], axis=1)
  groups = clusters.declared_groups(first)
  if groups is None and not first.groups_ignored and first.metric == UNKNOWN:
    checks.warn_of_copies(values)
  grids = tuple(len(several[0].losses.thresholds) for several in families.values())
  places = [
    (name, float(threshold))
    for name, several in families.items()
    for threshold in several[0].losses.thresholds
  ]
  several = as_promise(next(iter(families.values())))
  promise = Configurations(
    names=several.names,
    tolerances=several.tolerances,
    configurations=tuple(f"{name} at {threshold:.10g}" for name, threshold in places),
    costs=tuple(_mean_costs(families, costs, groups).tolist()),
    grids=grids,
  )
  # One order of prompts for all: it depends on all losses and on no single procedure.
  grid = np.linspace(1.0, 0.0, values.shape[1])
  whole = SequenceLosses(values, grid, ids=first.ids, contents=first.contents, groups=groups)
  seeds, names = clusters.order_seeds(whole, seed), clusters.names_of_rows(whole)
  run = Run(method, "fixed_sequence", error_rate)
  parts = []
  for number, name in enumerate(several.names):
    found = []
    for risks_of in families.values():
      losses = risks_of[number].losses
      test = promise.tests(promise.tolerances[0], losses.support)[number]
      found.append(run.test(Part(test, losses), whole, seeds, names))
    if len({(each.method, each.support) for each in found}) != 1:
      raise ValueError(f"Expected `risks` with one support of {name!r}, got several.")
    parts.append(_joined(found))
  decision = testing.decide(parts, run.procedure, error_rate, grids)
  place = promise.place(decision.rejected)
  family, threshold = places[place or 0]
  return record(
    dataclasses.replace(first, groups=groups, order=whole.order),
    promise,
    tuple(parts),
    decision,
    threshold=thresholds_lib.NEVER_EXIT if place is None else threshold,
    thresholds=[level for _, level in places],
    reason=_reason(promise, place, int(decision.rejected.sum())),
    tolerance=promise.tolerances[0],
    error_rate=error_rate,
    testing=run.procedure,
    num_examples=max(parts[0].num_examples),
    groups_ignored=first.groups_ignored,
    order=whole.order,
    seed=seeds[0],
    grid=(),
    procedure=families[family][0].losses.procedure,
  )


def _reason(promise: Configurations, place: int | None, count: int) -> str:
  if place is None:
    return "Nothing is certified: the safest configuration of every family already fails."
  return (
    f"{promise.configurations[place]} is the cheapest ({promise.costs[place]:.4g}) of {count}"
    f" certified among {len(promise.configurations)} configurations."
  )


def _joined(found: Sequence[Evidence]) -> Evidence:
  """Evidence of one risk, grid after grid."""
  columns = ("num_examples", "means", "log_p_values", "upper_bounds")
  joined = {name: sum((getattr(each, name) for each in found), ()) for name in columns}
  return dataclasses.replace(found[0], **joined)


def _mean_costs(families, costs, groups) -> np.ndarray:
  """[num_configurations] means over prompts, or over clusters."""
  tables = []
  for name, several in families.items():
    losses, amounts = several[0].losses, checks.as_amounts(costs[name], "costs")
    table = SequenceLosses(amounts, losses.thresholds, ids=losses.ids)
    tables.append(table if groups is None else clusters.cluster_means(table, groups))
  return np.concatenate([table.values.mean(axis=0) for table in tables])


def _check(families, costs: Mapping[str, npt.ArrayLike], error_rate: float) -> SequenceLosses:
  """The losses of the first risk of the first family, once all families are checked."""
  if not families or not all(families.values()) or set(families) != set(costs):
    raise ValueError(
      "Expected `risks` of at least one family, each with a table of `costs`, got families"
      f" {sorted(families)} and costs of {sorted(costs)}."
    )
  if not 0.0 < error_rate < 1.0:
    raise ValueError(f"Expected `error_rate` to be in (0, 1), got {error_rate!r}.")
  checks.warn_of_error_rate(error_rate)
  of_first = next(iter(families.values()))
  first = of_first[0].losses
  wanted = [(risk.called, risk.tolerance) for risk in of_first]
  for name, several in families.items():
    if [(risk.called, risk.tolerance) for risk in several] != wanted:
      raise ValueError(
        f"Expected `risks` to be {wanted} of every family, got others of {name!r}."
      )
    losses = several[0].losses
    for risk in several:
      check_outputs(risk, losses)
    alike = losses.ids == first.ids and losses.groups == first.groups
    if len(losses.values) != len(first.values) or not alike:
      raise ValueError(f"Expected `risks` of the same prompts, got others in {name!r}.")
    if np.shape(costs[name]) != losses.values.shape:
      raise ValueError(
        f"Expected `costs` of {name!r} of shape {losses.values.shape}, got"
        f" {np.shape(costs[name])}."
      )
  return first
