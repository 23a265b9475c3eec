"""Losses -> a calibrated threshold with a promise (paper, section 4;
Proposition 1).

`calibrate` walks down one grid, `calibrate_configurations` down one grid a
family.
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
from calm.calibrate import checks, clusters, methods, planning, testing
from calm.calibrate import losses as sequence_losses
from calm.calibrate import risks as risks_lib
from calm.calibrate.calibration import Calibration
from calm.calibrate.generations.procedure import Procedure, Provenance
from calm.calibrate.losses import UNKNOWN, SequenceLosses, Support
from calm.calibrate.risks import (
  Configurations,
  Part,
  Promise,
  Risk,
  SeveralRisks,
)
from calm.calibrate.testing import Evidence
from calm.calibrate.thresholds import NEVER_EXIT


@arguments.checked()
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
  """Chooses the lowest threshold whose expected loss is certified to be within
  the tolerance.

  With probability at least 1 - error_rate over the calibration prompts, every
  certified threshold has E[loss] <= tolerance (paper, Eq. 7 and Proposition 1),
  or keeps what `promise` says instead.

  Args:
    losses: [num_examples, num_thresholds], rows are exchangeable prompts; best
      a `SequenceLosses`, or a DataFrame with a column a threshold, `id` and
      `group`.
    thresholds: [num_thresholds], strictly descending, chosen before any loss
      was seen; None takes those of a `SequenceLosses`.
    tolerance: delta, in (0, 1), in the unit of the loss.
    error_rate: epsilon, in (0, 1).
    method: a name of `methods.METHODS`, or 'auto': 'binomial' for binary
      losses, else 'betting_randomized' for fixed sequence testing and 'betting'
      for other procedures.
    testing_procedure: 'fixed_sequence', 'fallback' or 'holm'.
    groups: [num_examples] cluster of each row; the test is then on cluster
      means. None takes those of a `SequenceLosses`.
    support: declared range of plain arrays; [0, 1] by default.
    promise: the risk functional, one of `risks`; None is the mean loss.
    risks: several losses, each with its tolerance, instead of `losses` and
      `tolerance`.
    seed: of the order of a betting test: that of an earlier `Calibration` of
      the same losses, to repeat it, or one that was drawn before these losses
      were seen. None makes it of ids, contents and procedure. Trying several
      until one certifies breaks the promise.
    randomized: whether 'auto' may let a uniform, drawn by `seed`, decide what
      the bets leave open at the end; else it is 'betting_fixed_level'.
    largest_cluster: the most prompts that a cluster may have, declared before
      any loss was seen: the promise is then about prompts. 0: it is about
      clusters.

  Returns:
    A `Calibration`. Failure is a value: `threshold` is `NEVER_EXIT` and
      `reason` says why.

  Raises:
    ValueError: an argument is malformed, or `method` does not fit the declared
      support.
  """
  if risks is not None:
    if losses is not None or tolerance is not None or promise is not None:
      raise ValueError(
        "Expected `risks` alone, got `losses`, `tolerance` or `promise` "
        "beside; leave them out."
      )
    promise = SeveralRisks(risks=risks)
    losses = risks[0].losses
    tolerance = risks[0].tolerance
  if losses is None or tolerance is None:
    raise ValueError(
      "Expected `losses` and `tolerance`, or `risks`, got neither."
    )
  sample, promise = (
    _as_losses(losses, thresholds, support),
    promise or risks_lib.Mean(),
  )
  # The binomial test is exact where every loss is 0 or 1 by its nature; the
  # guarantee says so.
  if (
    sample is not losses
    and support is None
    and method == "auto"
    and _is_binary(sample)
  ):
    sample = dataclasses.replace(sample, support=Support(binary=True))
  checks.in_range("tolerance", tolerance, 0.0, 1.0)
  tables = [sample, *(risk.losses for risk in risks or ())]
  if groups is None:
    known = (clusters.known_groups(table.groups) for table in tables)
    groups = next(filter(None, known), None)
  ignored = any(table.groups_ignored for table in tables)
  sample = dataclasses.replace(sample, groups=groups, groups_ignored=ignored)
  return _certify(
    promise,
    promise.parts(sample, tolerance),
    sample,
    Run(method, testing_procedure, error_rate, randomized, largest_cluster),
    seed,
    tolerance=float(tolerance),
    thresholds=sample.thresholds.tolist(),
    procedures=[sample.procedure] * len(sample.thresholds),
    losses_digest=_digest(sample),
    knobs=sample.knobs,
    largest_cluster=0 if groups is None else largest_cluster,
  )


@arguments.checked()
def each_group(
  losses: SequenceLosses,
  labels: Sequence[Any],
  *,
  error_rate: float,
  **options: Any,
) -> dict[str, Calibration]:
  """A threshold for each group, served by group; all their promises hold at
  once.

  Each is calibrated by itself at error_rate / (number of groups) (Bonferroni):
  with probability at least 1 - error_rate no group exceeds its tolerance.

  Args:
    losses: as for `calibrate`, `SequenceLosses`.
    labels: [num_examples] group of each prompt.
    error_rate: epsilon for all groups together.
    options: as for `calibrate`.

  Returns:
    {group: `Calibration`}, groups sorted.
  """
  checks.in_range("error_rate", error_rate, 0.0, 1.0)
  names = risks_lib.EveryGroup(labels=labels).groups
  column = risks_lib.rows_of(np.asarray(labels), losses, "labels", table=False)
  rows = {name: losses.rows(np.flatnonzero(column == name)) for name in names}
  level = error_rate / len(names)
  return {
    name: calibrate(rows[name], error_rate=level, **options) for name in names
  }


@arguments.checked()
def calibrate_configurations(
  risks: Mapping[str, Sequence[Risk]],
  costs: Mapping[str, npt.ArrayLike],
  *,
  error_rate: float,
  method: str = "auto",
  seed: str | None = None,
) -> Calibration:
  """Chooses the cheapest of all (family, threshold) pairs that are certified
  for all risks.

  With probability at least 1 - error_rate over the prompts, every certified
  configuration has E[loss of risk r] <= tolerance of r for every r.

  Args:
    risks: {family: its risks}; every family has the same prompts, and risks of
      the same names and tolerances.
    costs: {family: [num_examples, num_thresholds]} what to make small, such as
      layers a token; finite and at least 0.
    error_rate: epsilon, in (0, 1).
    method, seed: as for `calibrate`.

  Returns:
    A `Calibration` whose `promise` names the configurations and whose `rows`
    are grid after grid; its `threshold` and `procedure` are those of the chosen
    one.

  Raises:
    ValueError: families differ in prompts or risks, or an argument leaves its
      range.
  """
  if not risks or not all(risks.values()) or set(risks) != set(costs):
    raise ValueError(
      "Expected `risks` of at least one family, each with a table of "
      "`costs`, got families"
      f" {sorted(risks)} and costs of {sorted(costs)}."
    )
  several = {
    name: SeveralRisks(risks=of_family) for name, of_family in risks.items()
  }
  one = next(iter(several.values()))
  first = next(iter(risks.values()))[0].losses
  groups = clusters.known_groups(first.groups)
  families = []
  amounts = []
  names = []
  thresholds = []
  procedures = []
  for name, of_family in several.items():
    losses = risks[name][0].losses
    if of_family != one:
      wanted = list(zip(one.names, one.tolerances, strict=True))
      raise ValueError(
        f"Expected `risks` to be {wanted} of every family, got others of "
        f"{name!r}."
      )
    alike = losses.ids == first.ids and losses.groups == first.groups
    if len(losses.values) != len(first.values) or not alike:
      raise ValueError(
        f"Expected `risks` of the same prompts, got others in {name!r}."
      )
    table = risks_lib.rows_of(
      costs[name], losses, f"costs[{name!r}]", table=True
    )
    table = table if groups is None else clusters.means(table, groups)[1]
    amounts += table.mean(axis=0).tolist()
    names += [f"{name} at {level:.10g}" for level in losses.thresholds]
    thresholds += losses.thresholds.tolist()
    procedures += [losses.procedure] * len(losses.thresholds)
    families.append(
      [part.losses for part in of_family.parts(losses, one.tolerances[0])]
    )
  grids = tuple(len(tables[0].thresholds) for tables in families)
  promise = Configurations(
    one.names, one.tolerances, None, tuple(names), tuple(amounts), grids
  )
  parts = []
  tests = promise.tests(promise.tolerances[0], first.support)
  for test, tables in zip(tests, zip(*families, strict=True), strict=True):
    if len({table.support for table in tables}) > 1:
      raise ValueError(
        f"Expected `risks` with one support of {test.name!r}, got several."
      )
    parts.append(Part(test, _side_by_side(tables)))
  # One order of prompts for all: it depends on all losses and on no single
  # procedure.
  return _certify(
    promise,
    parts,
    _side_by_side(
      [table for of_family in families for table in of_family], groups=groups
    ),
    Run(method, "fixed_sequence", error_rate),
    seed,
    tolerance=promise.tolerances[0],
    thresholds=thresholds,
    procedures=procedures,
  )


def _side_by_side(
  tables: Sequence[SequenceLosses], **fields: Any
) -> SequenceLosses:
  """One table with the columns of several."""
  values = np.concatenate([table.values for table in tables], axis=1)
  grid = np.linspace(1.0, 0.0, values.shape[1])
  fields |= {
    "values": values,
    "thresholds": grid,
    "procedure": None,
    "knobs": (),
  }
  return dataclasses.replace(tables[0], **fields)


def _as_losses(losses, thresholds, support: Support | None) -> SequenceLosses:
  if arguments.is_table(losses):
    losses, support = sequence_losses.from_frame(losses, support), None
  if not isinstance(losses, SequenceLosses):
    if thresholds is None:
      raise ValueError(
        "Expected `thresholds` beside `losses` that are a plain array, got "
        "none; give them."
      )
    return SequenceLosses(losses, thresholds, support or Support(), kind="loss")
  same = thresholds is None or np.array_equal(thresholds, losses.thresholds)
  if support not in (None, losses.support) or not same:
    raise ValueError(
      "Expected no `support` or `thresholds` beside `losses` that declare "
      "theirs, got others;"
      " leave them out."
    )
  return losses


def _is_binary(sample: SequenceLosses) -> bool:
  """Whether losses are 0 and 1 and nothing else, some of each."""
  blocks = list(checks.row_blocks(sample.values))
  binary = all(np.isin(block, (0.0, 1.0)).all() for block in blocks)
  return binary and any(block.any() for block in blocks)


def _digest(sample: SequenceLosses) -> str:
  """SHA-256 (hexadecimal) of grid, ids and losses as they were given."""
  digest = hashlib.sha256()
  for array in (sample.thresholds, *checks.row_blocks(sample.values)):
    digest.update(np.ascontiguousarray(array, "<f8").data)
  digest.update("\n".join(sample.ids or ()).encode("utf-8"))
  return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class Run:
  """What all parts of a promise are tested with."""

  method: str  # name of the p-value method
  procedure: str  # name of the multiple-testing procedure
  error_rate: float  # epsilon
  randomized: bool = True  # whether a uniform may be drawn beside the losses
  largest_cluster: int = 0  # declared; 0: each cluster counts once
  # cluster of each row; None: rows are no clusters
  groups: Sequence[str] | None = None
  seeds: tuple[str, ...] = ()  # of the tested orders
  # [num_examples] place of each row in each of these, where rows are no
  # clusters.
  ranks: tuple[np.ndarray, ...] = ()

  def method_of(self, losses: SequenceLosses) -> methods.Method:
    """The p-value method for such losses."""
    arguments.one_of("testing_procedure", self.procedure, testing.PROCEDURES)
    units = losses.support
    any_level = self.procedure != "fixed_sequence"
    # means of several losses of 0 or 1 are neither
    if clusters.known_groups(self.groups):
      units = dataclasses.replace(units, binary=False)
    options = {"any_level": any_level, "randomized": self.randomized}
    return methods.get_method(self.method, units, **options)

  def test(self, part: Part) -> Evidence:
    """Tests one part, column by column where other rows count at each
    threshold.
    """
    test = part.test
    losses = part.losses
    groups = self.groups
    chosen = self.method_of(losses)
    size = losses.values.shape[1]
    if chosen.ordered:
      checks.in_range(
        "tolerance", test.tolerance, -np.inf, losses.support.upper
      )
    usable = np.array([not _fault(losses, place) for place in range(size)])
    values, declared = chosen.prepare(losses.values, losses.support)
    uniform = clusters.seeded_uniform(self.seeds[0]) if self.randomized else 1.0
    level = self.error_rate * test.share
    clustered = np.array(groups or ())
    counts = np.zeros(size, np.int64)
    log_p = np.zeros(size)
    means = np.full(size, np.nan)
    bounds = np.full(size, np.nan)
    for rows, places in _alike(part.rows):
      units = values[:, places][rows]
      orders = [np.argsort(rank[rows]) for rank in self.ranks]
      if groups is not None:
        fill = float(test.tolerance)
        ids, units = clusters.means(
          units, clustered[rows], self.largest_cluster, fill
        )
        orders = [clusters.seeded_order(ids, seed) for seed in self.seeds]
      design = chosen.design(
        test.tolerance, level, len(units), declared.upper, uniform
      )
      options = (units, declared, design, usable[places])
      orders = orders if chosen.ordered else [None]
      found = [chosen.evidence(*options, order) for order in orders]
      log_p[places], bounds[places] = np.max(found, axis=0)
      means[places], counts[places] = units.mean(axis=0), len(units)
    binary = declared.binary and groups is None
    return Evidence(
      **{**vars(test), "support": dataclasses.replace(declared, binary=binary)},
      method=chosen.name,
      num_examples=tuple(counts.tolist()),
      means=tuple(np.where(np.isfinite(means), means, np.nan).tolist()),
      log_p_values=tuple(log_p.tolist()),
      upper_bounds=tuple(bounds.tolist()),
    )


def _alike(rows: np.ndarray | None) -> Iterator[tuple[Any, Any]]:
  """(rows that count, places in the grid) of the thresholds at which the same
  rows count.
  """
  if rows is None:
    yield slice(None), slice(None)
    return
  columns = [column.tobytes() for column in rows.T]
  for column in dict.fromkeys(columns):
    index = np.flatnonzero(np.frombuffer(column, bool))
    if len(index):  # no rows, no evidence
      yield (
        index,
        [place for place, other in enumerate(columns) if other == column],
      )


def _certify(
  promise: Promise,
  parts: Sequence[Part],
  sample: SequenceLosses,
  run: Run,
  seed: str | None,
  *,
  thresholds: Sequence[float],
  procedures: Sequence[Procedure | None],
  **fields: Any,
) -> Calibration:
  """Tests the parts of a promise; `sample` decides the order of prompts and
  names losses.
  """
  checks.in_range("error_rate", run.error_rate, 0.0, 1.0)
  checks.warn_of_error_rate(run.error_rate)
  checks.check_seed(seed)
  run, groups = dataclasses.replace(run, groups=sample.groups), sample.groups
  grid = () if isinstance(promise, Configurations) else thresholds
  ordered = not grid or any(
    run.method_of(part.losses).ordered for part in parts
  )
  if ordered:
    seeds, drawn, orders = clusters.tested_orders(sample, seed)
  else:
    seeds = (seed or clusters.order_seed(sample),)
    drawn = False
    orders = []
  randomized = run.randomized and drawn
  ranks = tuple(map(np.argsort, orders))
  run = dataclasses.replace(
    run, randomized=randomized, seeds=seeds, ranks=ranks
  )
  evidence = tuple(run.test(part) for part in parts)
  numbers_alone = sample.metric == UNKNOWN or (
    sample.ids is None and not sample.contents
  )
  if groups is None and numbers_alone and not sample.groups_ignored:
    checks.warn_of_copies(sample.values)
  options = (run.procedure, run.error_rate, promise.grids)
  rows, visited, worst = testing.decide(evidence, thresholds, *options)
  rejected = np.array([row.rejected for row in rows])
  place = promise.place(rejected)
  first = evidence[0]
  if isinstance(promise, Configurations):
    reason = promise.reason(rejected)
  else:
    reason = _reason(sample, rejected, parts, evidence, worst, run)
  provenance = Provenance(
    metric=sample.metric,
    references="full model" if sample.kind == "textual" else "targets",
    grid=tuple(grid),
    num_examples=max(first.num_examples),
    order="permuted",
    seed=seeds[0],
    method=first.method,
    versions={
      "calm": calm.__version__,
      "numpy": np.__version__,
      "scipy": scipy.__version__,
    },
  )
  return Calibration(
    threshold=NEVER_EXIT if place is None else float(thresholds[place]),
    reason=reason,
    error_rate=float(run.error_rate),
    method=first.method,
    testing=run.procedure,
    kind=sample.kind,
    metric=sample.metric,
    support=first.support,
    num_examples=len(sample.values) if groups is None else len(set(groups)),
    clusters=groups is not None,
    groups_ignored=groups is None and sample.groups_ignored,
    rows=rows,
    visited=visited,
    order="permuted" if ordered else "irrelevant",
    seed=seeds[0],
    procedure=procedures[place or 0],
    provenance=provenance,
    promise=promise,
    # The rows of a calibration say all that there is of one part.
    parts=() if len(evidence) == 1 and not first.name else evidence,
    **fields,
  )


def _fault(losses: SequenceLosses, place: int) -> str:
  """Why the losses at a threshold cannot be tested, or ''."""
  low = losses.support.lower
  high = losses.support.upper
  column = losses.values[:, place]
  wanted = (
    "0 or 1"
    if losses.support.binary
    else f"in the declared range [{low}, {high}]"
  )
  bad = ~((column >= low - 1e-9) & (column <= high + 1e-9))
  if losses.support.binary:
    bad |= (column != 0.0) & (column != 1.0)
  row = int(np.argmax(bad))
  if not bad[row]:
    return ""
  name = "" if losses.ids is None else f" (id {losses.ids[row]!r:.200})"
  fault = (
    f"the loss of row {row}{name} is {float(column[row])!r} and must be "
    f"{wanted}"
  )
  if np.isnan(column[row]):
    fault += (
      f" (a failure counts as {high:g}; prompts that are left out bias the "
      "mean)"
    )
  return fault


def _reason(
  sample: SequenceLosses,
  rejected: np.ndarray,
  parts: Sequence[Part],
  evidence: Sequence[Evidence],
  worst: np.ndarray,
  run: Run,
) -> str:
  """Why the lowest certified threshold is the lowest."""
  grid = sample.knobs or sample.thresholds.tolist()
  if rejected.all():
    return (
      f"Every threshold of the grid is certified; {grid[-1]} is the lowest."
    )
  first = int(np.argmin(rejected))
  part = parts[worst[first]]
  why = f" ({part.test.name})" if part.test.name else ""
  fault = _fault(part.losses, first)
  why += f": {fault}." if fault else "."
  plain = (
    len(parts) == 1 and part.rows is None and part.losses.support == Support()
  )
  if plain and sample.groups is None and _is_binary(part.losses):
    why += (
      " Declare losses that are 0 or 1 alone, `Support(binary=True)`: the "
      "test is exact."
    )
  if rejected.any():
    last = int(np.flatnonzero(rejected)[-1])
    return (
      f"{grid[last]} is the lowest certified threshold; {grid[first]} is not "
      f"certified{why}"
    )
  for part in evidence:
    few = (
      part.support.lower < part.tolerance < part.support.upper
      and planning.refusal(
        max(part.num_examples),
        part.tolerance,
        run.error_rate * part.share,
        support=part.support,
        method=part.method,
        share=testing.first_share(run.procedure, len(grid)),
        unit="prompts" if sample.groups is None else "clusters of prompts",
      )
    )
    if few:
      name = f"{part.name}: " if part.name else ""
      return f"Nothing can be certified: {name}{few[0].lower()}{few[1:]}"
  return (
    f"Nothing is certified: the first threshold {grid[first]} already "
    f"fails{why}"
  )
