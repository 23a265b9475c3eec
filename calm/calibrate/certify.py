"""Losses -> a calibrated threshold with a promise (paper, section 4; Proposition 1).

`calibrate` walks down one grid, `calibrate_configurations` down one grid a family.
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy

import calm
from calm import arguments
from calm.calibrate import checks, clusters, methods, p_values, planning, testing
from calm.calibrate import losses as sequence_losses
from calm.calibrate import risks as risks_lib
from calm.calibrate import thresholds as thresholds_lib
from calm.calibrate.calibration import Calibration, Row
from calm.calibrate.generations import order as order_lib
from calm.calibrate.generations.procedure import Provenance
from calm.calibrate.losses import UNKNOWN, SequenceLosses, Support
from calm.calibrate.risks import Configurations, Part, Promise, Risk, SeveralRisks
from calm.calibrate.testing import Decision, Evidence


@arguments.checked(promise=risks_lib.of_name)
def calibrate(
  losses: SequenceLosses | np.ndarray | Sequence[Sequence[float]] | None = None,
  thresholds: Sequence[float] | np.ndarray | None = None,
  *,
  tolerance: float | None = None,
  error_rate: float,
  method: str = "auto",
  testing_procedure: str = "fixed_sequence",
  groups: Sequence[Any] | None = None,
  support: Support | None = None,
  promise: Promise | None = None,
  risks: Sequence[Risk] | None = None,
  seed: str | None = None,
  randomized: bool = True,
  largest_cluster: int = 0,
) -> Calibration:
  """Chooses the lowest threshold whose expected loss is certified to be within the tolerance.

  With probability at least 1 - error_rate over the calibration prompts, every certified
  threshold has E[loss] <= tolerance (paper, Eq. 7 and Proposition 1), or keeps what `promise`
  says instead. Nothing is written; `ledger.keep(folder, calibration, prompts)` records a
  calibration, so that a second one on the same prompts is noticed.

  Args:
    losses: [num_examples, num_thresholds], rows are exchangeable prompts; best a
      `SequenceLosses`, which carries its declared support, ids and procedure. A DataFrame of
      pandas or polars has a column a threshold, and may have `id` and `group`.
    thresholds: [num_thresholds], strictly descending, chosen before any loss was seen; None
      takes those of a `SequenceLosses`.
    tolerance: delta, in (0, 1), in the unit of the loss.
    error_rate: epsilon, in (0, 1).
    method: 'auto' (binary support, or a plain array of 0 and 1: 'binomial'; else
      'betting_randomized' for fixed sequence testing, 'betting' for all other procedures),
      'paper' (Eq. 11 and the Hoeffding-Bentkus p-value, `p_values.hoeffding_bentkus`),
      'betting', 'betting_fixed_level', 'convex_order' or 'binomial'.
    testing_procedure: 'fixed_sequence', 'fallback' or 'holm'.
    groups: [num_examples] cluster of each row; the test is then on cluster means. None takes
      those of a `SequenceLosses`, which has none after `.ungrouped()` (the guarantee says so).
    support: declared range of plain arrays; [0, 1] by default, binary for 'auto' where the
      values are 0 and 1 alone, which the guarantee repeats.
    promise: the risk functional, one of `risks` or its name; None is the mean loss.
    risks: several losses, each with its tolerance, instead of `losses` and `tolerance`.
    seed: of the order of a betting test: that of an earlier `Calibration` of the same losses,
      to repeat it, or one that was drawn before these losses were seen. None makes it of ids,
      contents and procedure. Where rows are of at most eight kinds and nothing is known of what
      the prompts say, 16 orders are made so and the largest p-value counts. Trying several
      seeds until one certifies breaks the promise.
    randomized: whether 'auto' may let a uniform, drawn by `seed`, decide what the bets leave
      open at the end; False takes 'betting_fixed_level' for 'betting_randomized', and so do
      rows of at most eight kinds of which nothing else is known.
    largest_cluster: the most prompts that a cluster has, here and when served, declared before
      any loss was seen: the promise is then about prompts, of which each counts once. 0: it is
      about clusters.

  Returns:
    A `Calibration`. Failure is a value: `threshold` is `NEVER_EXIT` and `reason` says why (too
    few prompts, nothing certified, NaN losses, losses out of their range).

  Raises:
    ValueError: an argument is malformed (shapes, grid, tolerance, error rate, names), or
      `method` does not fit the declared support.
  """
  losses, tolerance, promise = _promise_and_losses(losses, tolerance, promise, risks)
  sample = _as_losses(losses, thresholds, support)
  if sample is not losses and support is None and method == "auto":
    sample = _declare_binary(sample)
  checks.in_range("tolerance", tolerance, 0.0, 1.0)
  _check_error_rate(error_rate)
  checks.check_seed(seed)
  tables = [sample, *(risk.losses for risk in risks or ())]
  if groups is None:
    groups = next(filter(None, map(clusters.declared_groups, tables)), None)
  if groups is not None:
    groups = checks.check_groups(groups, len(sample.values))
  sample = dataclasses.replace(sample, groups=groups)
  parts = promise.parts(sample, tolerance)
  randomized = randomized and clusters.draws_uniform(sample, seed)
  run = Run(method, testing_procedure, error_rate, randomized, largest_cluster)
  ordered = any(run.method_of(part.losses, groups).ordered for part in parts)
  seeds = (
    clusters.order_seeds(sample, seed) if ordered else (seed or clusters.order_seed(sample),)
  )
  names = clusters.names_of_rows(sample) if ordered else sample.ids
  evidence = tuple(run.test(part, sample, seeds, names) for part in parts)
  numbers_alone = sample.metric == UNKNOWN or (sample.ids is None and not sample.contents)
  if groups is None and numbers_alone and not sample.groups_ignored:
    checks.warn_of_copies(sample.values)
  decision = testing.decide(evidence, testing_procedure, error_rate)
  grid = sample.thresholds
  place = promise.place(decision.rejected)
  return _record(
    sample,
    promise,
    evidence,
    decision,
    threshold=thresholds_lib.NEVER_EXIT if place is None else float(grid[place]),
    thresholds=grid.tolist(),
    reason=_reason(sample, decision, parts, evidence, run)
    + _binary_hint(sample, decision, parts, run),
    tolerance=float(tolerance),
    error_rate=float(error_rate),
    testing=testing_procedure,
    num_examples=len(sample.values) if groups is None else len(set(groups)),
    groups_ignored=groups is None and any(table.groups_ignored for table in tables),
    order="permuted" if ordered else "irrelevant",
    seed=seeds[0],
    losses_digest=_digest(sample),
    knobs=sample.knobs,
    largest_cluster=0 if groups is None else largest_cluster,
  )


def _record(
  sample: SequenceLosses,
  promise: Promise,
  evidence: tuple[Evidence, ...],
  decision: Decision,
  *,
  thresholds: Sequence[float],
  seed: str,
  **fields: Any,
) -> Calibration:
  """The `Calibration` of a decision, with what follows from the losses and the evidence."""
  method = evidence[0].method
  versions = {"calm": calm.__version__, "numpy": np.__version__, "scipy": scipy.__version__}
  return Calibration(
    method=method,
    kind=sample.kind,
    metric=sample.metric,
    support=evidence[0].support,
    clusters=sample.groups is not None,
    rows=tuple(Row.of(level, evidence, decision, j) for j, level in enumerate(thresholds)),
    visited=decision.visited,
    seed=seed,
    procedure=fields.pop("procedure", sample.procedure),
    provenance=Provenance(
      metric=sample.metric,
      references="full model" if sample.kind == "textual" else "targets",
      grid=fields.pop("grid", tuple(thresholds)),
      num_examples=max(evidence[0].num_examples),
      order="permuted",
      seed=seed,
      method=method,
      versions=versions,
    ),
    promise=promise,
    # The rows of a calibration say all that there is of one part.
    parts=() if len(evidence) == 1 and not evidence[0].name else evidence,
    **fields,
  )


@arguments.checked()
def each_group(
  losses: SequenceLosses, labels: Sequence[Any], *, error_rate: float, **options: Any
) -> dict[str, Calibration]:
  """A threshold for each group, served by group; all their promises hold at once.

  Each group is calibrated by itself at error_rate / (number of groups) (Bonferroni), so that
  with probability at least 1 - error_rate no group exceeds its tolerance. The group must be
  known when a prompt is served.

  Args:
    losses: as for `calibrate`, `SequenceLosses`.
    labels: [num_examples] group of each prompt.
    error_rate: epsilon for all groups together.
    options: as for `calibrate`.

  Returns:
    {group: `Calibration`}, groups sorted.

  Raises:
    ValueError: as `calibrate`.
  """
  checks.in_range("error_rate", error_rate, 0.0, 1.0)
  names = risks_lib.EveryGroup(labels=labels).groups
  column = risks_lib.rows_of(np.asarray(labels), losses, "labels", table=False)
  rows = {name: losses.rows(np.flatnonzero(column == name)) for name in names}
  level = error_rate / len(names)
  return {name: calibrate(rows[name], error_rate=level, **options) for name in names}


@dataclasses.dataclass(frozen=True)
class Run:
  """What all parts of a promise are tested with."""

  method: str  # name of the p-value method
  procedure: str  # name of the multiple-testing procedure
  error_rate: float  # epsilon
  randomized: bool = True  # whether a uniform may be drawn beside the losses
  largest_cluster: int = 0  # declared; 0: each cluster counts once

  def method_of(self, losses: SequenceLosses, groups) -> methods.Method:
    """The p-value method for such losses."""
    if self.procedure not in testing.PROCEDURES:
      raise ValueError(
        f"Expected `testing_procedure` to be one of {sorted(testing.PROCEDURES)}, got"
        f" {self.procedure!r}."
      )
    several_levels = self.procedure != "fixed_sequence"
    units = clusters.unit_support(losses, groups)
    chosen = methods.get_method(
      self.method, units, any_level=several_levels, randomized=self.randomized
    )
    if several_levels and not chosen.any_level:
      raise ValueError(
        f"Expected `testing_procedure` 'fixed_sequence' with `method` {chosen.name!r}, which"
        f" bets for the level `error_rate` alone, got {self.procedure!r}; use 'betting'"
        " with it."
      )
    return chosen

  def test(self, part: Part, sample: SequenceLosses, seeds, names) -> Evidence:
    """Tests one part, column by column where other rows count at each threshold."""
    test, groups = part.test, sample.groups
    losses = dataclasses.replace(part.losses, groups=groups, ids=names)
    chosen, usable = self.method_of(losses, groups), np.array([not f for f in _faults(losses)])
    _, declared = chosen.prepare(losses.values[:1], losses.support)
    size = losses.values.shape[1]
    counts, log_p = np.zeros(size, np.int64), np.zeros(size)
    means, bounds = np.full(size, np.nan), np.full(size, np.nan)
    all_orders = []
    if chosen.ordered and groups is None:
      all_orders = clusters.tested_orders(losses, seeds)
    for rows, places in _alike(part.rows, size):
      every = part.rows is None
      values = losses.values if every else losses.values[np.ix_(rows, places)]
      units, support = chosen.prepare(values, losses.support)
      orders = [clusters.order_among(order, rows) for order in all_orders] or [None]
      if groups is not None:
        grid = losses.thresholds[places]
        some = losses if every else losses.rows(rows)
        some = dataclasses.replace(some, values=units, support=support, thresholds=grid)
        fill = float(test.tolerance)
        some = clusters.cluster_means(some, some.groups or (), self.largest_cluster, fill)
        units, support = some.values, some.support
        orders = clusters.tested_orders(some, seeds) if chosen.ordered else [None]
      values, order = units, None
      if len(orders) > 1:  # side by side, as columns
        values = np.concatenate([values[rows] for rows in orders], axis=1)
      else:
        order = orders[0]
      level = self.error_rate * test.share
      uniforms = map(order_lib.seeded_uniform, seeds[: len(orders)])
      uniform = np.repeat([*uniforms], units.shape[1]) if self.randomized else 1.0
      rates = methods.Sample(values, support, test.tolerance, level, order, uniform)
      found = chosen.evidence(rates, np.tile(usable[places], len(orders)))
      log_p[places], bounds[places] = np.reshape(found, (2, len(orders), -1)).max(axis=1)
      means[places], counts[places] = units.mean(axis=0), len(units)
    return Evidence(
      name=test.name,
      tolerance=float(test.tolerance),
      method=chosen.name,
      support=dataclasses.replace(declared, binary=declared.binary and groups is None),
      share=test.share,
      ascending=test.ascending,
      num_examples=tuple(counts.tolist()),
      means=tuple(np.where(np.isfinite(means), means, np.nan).tolist()),
      log_p_values=tuple(log_p.tolist()),
      upper_bounds=tuple(bounds.tolist()),
    )


def _alike(rows: np.ndarray | None, size: int) -> Iterator[tuple[Any, list[int]]]:
  """(rows that count, places in the grid) of the thresholds at which the same rows count."""
  if rows is None:
    yield slice(None), list(range(size))
    return
  alike: dict[bytes, list[int]] = {}
  for column in range(size):
    alike.setdefault(np.packbits(rows[:, column]).tobytes(), []).append(column)
  for places in alike.values():
    index = np.flatnonzero(rows[:, places[0]])
    if len(index):  # no rows, no evidence
      yield index, places


def _promise_and_losses(losses, tolerance, promise, risks):
  """(losses, tolerance, promise), of whichever of the arguments were given."""
  if risks is None:
    if losses is None or tolerance is None:
      raise ValueError("Expected `losses` and `tolerance`, or `risks`, got neither.")
    return losses, tolerance, promise or risks_lib.Mean()
  if losses is not None or tolerance is not None or promise is not None:
    raise ValueError(
      "Expected `risks` alone, which bring their losses and tolerances, got `losses`,"
      " `tolerance` or `promise` beside; leave these out."
    )
  several = risks_lib.SeveralRisks(risks=risks)
  return risks[0].losses, risks[0].tolerance, several


def _digest(sample: SequenceLosses) -> str:
  """SHA-256 (hexadecimal) of grid, ids and losses as they were given."""
  digest = hashlib.sha256()
  for array in (sample.thresholds, *checks.row_blocks(sample.values)):
    digest.update(np.ascontiguousarray(array, "<f8").data)
  digest.update("\n".join(sample.ids or ()).encode("utf-8"))
  return digest.hexdigest()


def _check_error_rate(error_rate: float) -> None:
  checks.in_range("error_rate", error_rate, 0.0, 1.0)
  checks.warn_of_error_rate(error_rate)


def _as_losses(losses, thresholds, support: Support | None) -> SequenceLosses:
  if sequence_losses.is_frame(losses):
    losses, support = sequence_losses.from_frame(losses, support), None
  if not isinstance(losses, SequenceLosses):
    if thresholds is None:
      raise ValueError(
        "Expected `thresholds` beside `losses` that are a plain array, got none; give one a"
        " column."
      )
    return SequenceLosses(losses, thresholds, support or Support(), kind="loss")
  if support is not None and support != losses.support:
    raise ValueError(
      f"Expected no `support` beside `losses` that declare theirs, got {support} beside"
      f" {losses.support}; leave it out."
    )
  if thresholds is not None:
    grid = thresholds_lib.validate_grid(thresholds)
    if not np.array_equal(grid, losses.thresholds):
      raise ValueError(
        "Expected `thresholds` to be those of `losses`, got others; leave them out."
      )
  return losses


def _declare_binary(sample: SequenceLosses) -> SequenceLosses:
  """`sample`, declared binary where it holds 0 and 1 and nothing else.

  The binomial test is then exact, whatever the order, if every loss is 0 or 1 by its nature,
  which the guarantee says.
  """
  blocks = list(checks.row_blocks(sample.values))
  binary = all(np.isin(block, (0.0, 1.0)).all() for block in blocks)
  if not binary or not any(block.any() for block in blocks):
    return sample
  return dataclasses.replace(sample, support=Support(binary=True))


def _faults(losses: SequenceLosses) -> list[str]:
  """Per threshold why its losses cannot be tested, or ''."""
  low, high = losses.support.lower, losses.support.upper
  wanted = "0 or 1" if losses.support.binary else f"in the declared range [{low}, {high}]"
  faults = []
  for column in losses.values.T:
    bad = ~((column >= low - 1e-9) & (column <= high + 1e-9))
    if losses.support.binary:
      bad |= (column != 0.0) & (column != 1.0)
    row = int(np.argmax(bad))
    if not bad[row]:
      faults.append("")
      continue
    name = "" if losses.ids is None else f" (id {losses.ids[row]!r:.200})"
    fault = f"the loss of row {row}{name} is {float(column[row])!r} and must be {wanted}"
    if np.isnan(column[row]):
      fault += f" (a failure counts as {high:g}; prompts that are left out bias the mean)"
    faults.append(fault)
  return faults


def _reason(
  sample: SequenceLosses,
  decision: Decision,
  parts: Sequence[Part],
  evidence: Sequence[Evidence],
  run: Run,
) -> str:
  grid, rejected = sample.knobs or sample.thresholds.tolist(), decision.rejected
  if rejected.all():
    return f"Every threshold of the grid is certified; {grid[-1]} is the lowest."
  first = int(np.argmin(rejected))
  worst = parts[decision.worst[first]]
  name = f" ({worst.test.name})" if worst.test.name else ""
  fault = _faults(worst.losses)[first]
  why = f"{name}: {fault}" if fault else name
  if rejected.any():
    last = int(np.flatnonzero(rejected)[-1])
    lowest, beyond = grid[last], grid[last + 1 :]
    shown = grid[first] if not rejected[0] or not len(beyond) else beyond[0]
    return f"{lowest} is the lowest certified threshold; {shown} is not certified{why}."
  unit = "prompts" if sample.groups is None else "clusters of prompts"
  for part in evidence:
    if few := _too_few(part, run, len(grid), unit):
      return f"Nothing can be certified: {few}"
  return f"Nothing is certified: the first threshold {grid[first]} already fails{why}."


def _binary_hint(
  sample: SequenceLosses, decision: Decision, parts: Sequence[Part], run: Run
) -> str:
  """What the exact test of 0-or-1 losses would certify, where it was not asked for and can."""
  (part, *more), rejected = parts, decision.rejected
  plain = part.losses.support == Support() and sample.groups is None and part.rows is None
  if more or not plain or run.procedure != "fixed_sequence" or rejected.all():
    return ""
  if _declare_binary(part.losses) is part.losses:
    return ""
  sums, count = part.losses.values.sum(axis=0), len(part.losses.values)
  p = p_values.binomial(sums, count, part.test.tolerance)
  passed = int(np.argmin(np.append(p <= run.error_rate, False)))
  if passed <= rejected.sum():
    return ""
  grid = sample.knobs or sample.thresholds.tolist()
  return (
    f" These losses are 0 and 1 alone: declared so, `Support(binary=True)`, {grid[passed - 1]}"
    " would be certified."
  )


def _too_few(part: Evidence, run: Run, count: int, unit: str) -> str:
  """Why a part has too few prompts to certify anything, or ''."""
  if not part.support.lower < part.tolerance < part.support.upper:
    return ""  # no matter of how many
  text = planning.refusal(
    max(part.num_examples),
    part.tolerance,
    run.error_rate * part.share,
    support=part.support,
    method=part.method,
    share=testing.first_share(run.procedure, count),
    unit=unit,
  )
  text = text[:1].lower() + text[1:]  # it ends a sentence
  return (text and part.name and f"{part.name}: {text}") or text


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
  first = _check_families(families, costs, error_rate)
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
  several = SeveralRisks(risks=next(iter(families.values())))
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
  run = Run(method, "fixed_sequence", error_rate, clusters.draws_uniform(whole, seed))
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
  return _record(
    dataclasses.replace(first, groups=groups),
    promise,
    tuple(parts),
    decision,
    threshold=thresholds_lib.NEVER_EXIT if place is None else threshold,
    thresholds=[level for _, level in places],
    reason=_reason_of_families(promise, place, int(decision.rejected.sum())),
    tolerance=promise.tolerances[0],
    error_rate=error_rate,
    testing=run.procedure,
    num_examples=max(parts[0].num_examples),
    groups_ignored=first.groups_ignored,
    order="permuted",
    seed=seeds[0],
    grid=(),
    procedure=families[family][0].losses.procedure,
  )


def _reason_of_families(promise: Configurations, place: int | None, count: int) -> str:
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


def _check_families(
  families, costs: Mapping[str, npt.ArrayLike], error_rate: float
) -> SequenceLosses:
  """The losses of the first risk of the first family, once all families are checked."""
  if not families or not all(families.values()) or set(families) != set(costs):
    raise ValueError(
      "Expected `risks` of at least one family, each with a table of `costs`, got families"
      f" {sorted(families)} and costs of {sorted(costs)}."
    )
  _check_error_rate(error_rate)
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
      risks_lib.check_outputs(risk, losses)
    alike = losses.ids == first.ids and losses.groups == first.groups
    if len(losses.values) != len(first.values) or not alike:
      raise ValueError(f"Expected `risks` of the same prompts, got others in {name!r}.")
    if np.shape(costs[name]) != losses.values.shape:
      raise ValueError(
        f"Expected `costs` of {name!r} of shape {losses.values.shape}, got"
        f" {np.shape(costs[name])}."
      )
  return first
