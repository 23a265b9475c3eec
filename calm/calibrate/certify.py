"""Losses -> a calibrated threshold with a promise (paper, section 4; Proposition 1)."""

import dataclasses
import hashlib
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy

import calm
from calm import arguments
from calm.calibrate import checks, clusters, methods, planning, testing
from calm.calibrate import losses as sequence_losses
from calm.calibrate import risks as risks_lib
from calm.calibrate import thresholds as thresholds_lib
from calm.calibrate.calibration import Calibration, Row
from calm.calibrate.generations.procedure import Provenance
from calm.calibrate.losses import UNKNOWN, SequenceLosses, Support
from calm.calibrate.risks import Part, Promise, Risk
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
      'betting_fixed_level' for fixed sequence testing, 'betting' for all other procedures),
      'paper' (Eq. 11 and the Hoeffding-Bentkus p-value, `p_values.hoeffding_bentkus`),
      'betting', 'betting_fixed_level', 'betting_early', 'convex_order' or 'binomial'.
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
  _check_rates(tolerance, error_rate)
  checks.check_seed(seed)
  tables = [sample, *(risk.losses for risk in risks or ())]
  if groups is None:
    groups = next(filter(None, map(clusters.declared_groups, tables)), None)
  if groups is not None:
    groups = checks.check_groups(groups, len(sample.values))
  sample = dataclasses.replace(sample, groups=groups)
  parts = promise.parts(sample, tolerance)
  run = Run(method, testing_procedure, error_rate)
  ordered = any(run.method_of(part.losses, groups).ordered for part in parts)
  seeds = (
    clusters.order_seeds(sample, seed) if ordered else (seed or clusters.order_seed(sample),)
  )
  names = clusters.names_of_rows(sample) if ordered else sample.ids
  evidence = tuple(run.test(part, sample, seeds, names) for part in parts)
  _warn(sample, ordered)
  decision = testing.decide(evidence, testing_procedure, error_rate)
  grid = sample.thresholds
  place = promise.place(decision.rejected)
  return record(
    sample,
    promise,
    evidence,
    decision,
    threshold=thresholds_lib.NEVER_EXIT if place is None else float(grid[place]),
    thresholds=grid.tolist(),
    reason=_reason(sample, decision, parts, evidence, run),
    tolerance=float(tolerance),
    error_rate=float(error_rate),
    testing=testing_procedure,
    num_examples=len(sample.values) if groups is None else len(set(groups)),
    groups_ignored=groups is None and any(table.groups_ignored for table in tables),
    order=sample.order if ordered else "irrelevant",
    seed=seeds[0],
    losses_digest=_digest(sample),
    knobs=sample.knobs,
  )


def record(
  sample: SequenceLosses,
  promise: Promise,
  evidence: tuple[Evidence, ...],
  decision: Decision,
  *,
  thresholds: Sequence[float],
  order: str,
  seed: str,
  **fields: Any,
) -> Calibration:
  """The `Calibration` of a decision, with what follows from the losses and the evidence."""
  method = evidence[0].method
  return Calibration(
    method=method,
    kind=sample.kind,
    metric=sample.metric,
    support=evidence[0].support,
    clusters=sample.groups is not None,
    rows=tuple(Row.of(level, evidence, decision, j) for j, level in enumerate(thresholds)),
    visited=decision.visited,
    order=order,
    seed=seed,
    procedure=fields.pop("procedure", sample.procedure),
    provenance=Provenance(
      metric=sample.metric,
      references="full model" if sample.kind == "textual" else "targets",
      grid=fields.pop("grid", tuple(thresholds)),
      num_examples=max(evidence[0].num_examples),
      order=sample.order,
      seed=seed,
      method=method,
      versions={
        "calm": calm.__version__,
        "numpy": np.__version__,
        "scipy": scipy.__version__,
      },
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
  risks_lib.in_range("error_rate", error_rate, 0.0, 1.0)
  names = risks_lib.EveryGroup(labels=labels).groups
  column = risks_lib.rows_of(np.asarray(labels), losses, "labels", table=False)
  rows = {name: losses.rows(np.flatnonzero(column == name)) for name in names}
  level = error_rate / len(names)
  return {name: calibrate(rows[name], error_rate=level, **options) for name in names}


@dataclasses.dataclass(frozen=True)
class Run:
  """What all parts of a promise are tested with.

  Attributes:
    method: name of the p-value method.
    procedure: name of the multiple-testing procedure.
    error_rate: epsilon.
  """

  method: str
  procedure: str
  error_rate: float

  def method_of(self, losses: SequenceLosses, groups) -> methods.Method:
    """The p-value method for such losses."""
    if self.procedure not in testing.PROCEDURES:
      raise ValueError(
        f"Expected `testing_procedure` to be one of {sorted(testing.PROCEDURES)}, got"
        f" {self.procedure!r}."
      )
    several_levels = self.procedure != "fixed_sequence"
    units = clusters.unit_support(losses, groups)
    chosen = methods.get_method(self.method, units, any_level=several_levels)
    if several_levels and not chosen.any_level:
      raise ValueError(
        f"Expected `testing_procedure` 'fixed_sequence' with `method` {chosen.name!r}, which"
        f" bets for the level `error_rate` alone, got {self.procedure!r}; use 'betting'"
        " with it."
      )
    return chosen

  def test(self, part: Part, sample: SequenceLosses, seeds, names) -> Evidence:
    """Tests one part, column by column where other rows count at each threshold."""
    test = part.test
    losses = dataclasses.replace(part.losses, groups=sample.groups, order=sample.order)
    chosen = self.method_of(losses, losses.groups)
    faults = _faults(losses)
    _, declared = chosen.prepare(losses.values[:1], losses.support)
    losses = dataclasses.replace(losses, ids=names)
    size = losses.values.shape[1]
    counts, log_p = np.zeros(size, np.int64), np.zeros(size)
    means, bounds = np.full(size, np.nan), np.full(size, np.nan)
    for places in _alike(part.rows, size):
      some = _subset(losses, part.rows, places)
      if some is None:  # no rows, no evidence
        continue
      prepared, support = chosen.prepare(some.values, some.support)
      some = dataclasses.replace(some, values=prepared, support=support)
      if some.groups is not None:
        some = clusters.cluster_means(some, some.groups)
      usable = np.array([not faults[place] for place in places])
      values, order = some.values, None
      orders = clusters.tested_orders(some, seeds) if chosen.ordered else [None]
      if len(orders) > 1:  # side by side, as columns
        values = np.concatenate([values[rows] for rows in orders], axis=1)
      else:
        order = orders[0]
      level = self.error_rate * test.share
      rates = methods.Sample(values, some.support, test.tolerance, level, order)
      found = chosen.evidence(rates, np.tile(usable, len(orders)))
      log_p[places], bounds[places] = np.reshape(found, (2, len(orders), -1)).max(axis=1)
      means[places], counts[places] = some.values.mean(axis=0), len(some.values)
    return Evidence(
      name=test.name,
      tolerance=float(test.tolerance),
      method=chosen.name,
      support=dataclasses.replace(declared, binary=declared.binary and losses.groups is None),
      share=test.share,
      ascending=part.ascending,
      num_examples=tuple(counts.tolist()),
      means=tuple(np.where(np.isfinite(means), means, np.nan).tolist()),
      log_p_values=tuple(log_p.tolist()),
      upper_bounds=tuple(bounds.tolist()),
    )


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
  several = risks_lib.as_promise(risks)
  return risks[0].losses, risks[0].tolerance, several


def _alike(rows: np.ndarray | None, size: int) -> list[list[int]]:
  """Thresholds at which the same rows count, which are tested at once."""
  if rows is None:
    return [list(range(size))]
  found: dict[bytes, list[int]] = {}
  for column in range(size):
    found.setdefault(np.packbits(rows[:, column]).tobytes(), []).append(column)
  return list(found.values())


def _subset(losses, rows: np.ndarray | None, places: list[int]) -> SequenceLosses | None:
  """The rows that count at some thresholds, and these alone; None where there are none."""
  if rows is None:
    return losses
  index = np.flatnonzero(rows[:, places[0]])
  if not len(index):
    return None
  some = losses.rows(index)
  return dataclasses.replace(
    some, values=some.values[:, places], thresholds=losses.thresholds[places]
  )


def _digest(sample: SequenceLosses) -> str:
  """SHA-256 (hexadecimal) of grid, ids and losses as they were given."""
  digest = hashlib.sha256()
  for array in (sample.thresholds, *checks.row_blocks(sample.values)):
    digest.update(np.ascontiguousarray(array, "<f8").data)
  digest.update("\n".join(sample.ids or ()).encode("utf-8"))
  return digest.hexdigest()


def _check_rates(tolerance: float, error_rate: float) -> None:
  for name, value in (("tolerance", tolerance), ("error_rate", error_rate)):
    if not (isinstance(value, int | float | np.number) and 0.0 < value < 1.0):
      raise ValueError(
        f"Expected `{name}` to be in (0, 1), got {value!r}; `tolerance` (delta) bounds the"
        " expected loss, `error_rate` (epsilon) the probability that the bound fails."
      )
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


def _warn(sample: SequenceLosses, ordered: bool) -> None:
  """Says where the table itself suggests that prompts are no independent draws."""
  if sample.groups is not None:
    return
  kept = np.concatenate([np.isfinite(b).all(axis=1) for b in checks.row_blocks(sample.values)])
  finite = sample.values if kept.all() else sample.values[kept]
  if not len(finite):
    return
  if ordered and sample.order == "given" and checks.looks_sorted(finite):
    warnings.warn(
      "the order given follows the losses, and a betting test in such an order proves nothing:"
      " leave `in_given_order` out, or give an order that was fixed before any loss was seen.",
      stacklevel=4,
    )
  numbers_alone = sample.metric == UNKNOWN or (sample.ids is None and not sample.contents)
  if numbers_alone and not sample.groups_ignored:
    checks.warn_of_copies(finite)


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
