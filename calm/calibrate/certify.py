"""Losses -> a calibrated threshold with a promise (paper, section 4; Proposition 1)."""

import dataclasses
import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy

from calm.calibrate import planning
from calm.calibrate import thresholds as thresholds_lib
from calm.calibrate.calibration import Calibration, Row
from calm.calibrate.evidence import methods
from calm.calibrate.evidence import multiple_testing as testing
from calm.calibrate.generations.procedures import Provenance
from calm.calibrate.losses import checks, clusters
from calm.calibrate.losses.sequence_losses import SequenceLosses, Support


def calibrate(
  losses: SequenceLosses | np.ndarray | Sequence[Sequence[float]],
  thresholds: Sequence[float] | np.ndarray | None = None,
  *,
  tolerance: float,
  error_rate: float,
  method: str = "auto",
  testing_procedure: str = "fixed_sequence",
  groups: Sequence[str] | None = None,
  support: Support | None = None,
  seed: str | None = None,
) -> Calibration:
  """Chooses the lowest threshold whose expected loss is certified to be within the tolerance.

  With probability at least 1 - error_rate over the calibration prompts, every certified
  threshold has E[loss] <= tolerance (paper, Eq. 7 and Proposition 1).

  Args:
    losses: [num_examples, num_thresholds], rows are exchangeable prompts; best a
      `SequenceLosses`, which carries its declared support, ids and procedure.
    thresholds: [num_thresholds], strictly descending, chosen before any loss was seen; None
      takes those of a `SequenceLosses`.
    tolerance: delta, in (0, 1), in the unit of the loss.
    error_rate: epsilon, in (0, 1).
    method: 'auto' (binary support: 'binomial'; else 'betting_fixed_level' for fixed sequence
      testing, 'betting' for all other procedures), 'paper' (Eq. 11, Hoeffding-Bentkus),
      'betting', 'betting_fixed_level', 'convex_order', 'hoeffding_bentkus', 'hoeffding' or
      'binomial'.
    testing_procedure: 'fixed_sequence', 'fallback', 'holm' or 'bonferroni'.
    groups: [num_examples] cluster of each row; the test is then on cluster means. None takes
      those of a `SequenceLosses`, which has none after `.ungrouped()`.
    support: declared range of plain arrays; [0, 1] by default.
    seed: of the order of a betting test, from an earlier `Calibration` of the same losses, to
      repeat it. None makes it of ids, contents and procedure, or where rows are of few kinds
      draws it. Trying several until one certifies breaks the promise.

  Returns:
    A `Calibration`. Failure is a value: `threshold` is `NEVER_EXIT` and `reason` says why (too
    few prompts, nothing certified, NaN losses, losses out of their range).

  Raises:
    ValueError: an argument is malformed (shapes, grid, tolerance, error rate, names), or
      `method` does not fit the declared support.
  """
  sample = _as_losses(losses, thresholds, support)
  _check_rates(tolerance, error_rate)
  faults = _faults(sample)
  groups = clusters.declared_groups(sample) if groups is None else groups
  several_levels = testing_procedure != "fixed_sequence"
  units = clusters.unit_support(sample, groups)
  chosen = methods.get_method(method, units, any_level=several_levels)
  _check_procedure(chosen, testing_procedure)
  if groups is None:
    _warn(sample, chosen.ordered)
  if chosen.ordered:
    sample = clusters.with_contents(sample)
  prepared, declared = chosen.prepare(sample.values, sample.support)
  sample = dataclasses.replace(sample, values=prepared, support=declared)
  if groups is not None:
    sample = clusters.cluster_means(sample, groups)
  order, seed = clusters.tested_order(sample, seed)
  order = order if chosen.ordered else None
  rates = methods.Sample(sample.values, sample.support, tolerance, error_rate, order)
  log_p, bound = chosen.evidence(rates, np.array([not fault for fault in faults]))
  result = testing.PROCEDURES[testing_procedure](np.exp(log_p), error_rate)
  test = (tolerance, error_rate, testing_procedure, chosen.name)
  return Calibration(
    threshold=_lowest(sample.thresholds, result.rejected),
    reason=_reason(sample, result, faults, test),
    tolerance=float(tolerance),
    error_rate=float(error_rate),
    method=chosen.name,
    testing=testing_procedure,
    rows=_rows(sample, log_p, bound, result),
    visited=result.visited,
    order=sample.order if chosen.ordered else "irrelevant",
    seed=seed,
    clusters=groups is not None,
    provenance=_provenance(sample, chosen, seed),
    **_described(sample),
  )


def _described(sample: SequenceLosses) -> dict[str, Any]:
  """What the losses say of themselves."""
  return {
    "kind": sample.kind,
    "metric": sample.metric,
    "support": sample.support,
    "num_examples": len(sample.values),
    "procedure": sample.procedure,
  }


def _provenance(sample: SequenceLosses, method: methods.Method, seed: str) -> Provenance:
  return Provenance(
    metric=sample.metric,
    references="full model" if sample.kind == "textual" else "targets",
    grid=tuple(sample.thresholds.tolist()),
    num_examples=len(sample.values),
    order=sample.order,
    seed=seed,
    method=method.name,
    versions={"numpy": np.__version__, "scipy": scipy.__version__},
  )


def _check_procedure(chosen: methods.Method, testing_procedure: str) -> None:
  if testing_procedure not in testing.PROCEDURES:
    raise ValueError(
      f"`testing_procedure` must be one of {sorted(testing.PROCEDURES)}, got"
      f" {testing_procedure!r}."
    )
  if not chosen.any_level and testing_procedure != "fixed_sequence":
    raise ValueError(
      f"`method` {chosen.name!r} bets for the level `error_rate` alone and needs"
      f" `testing_procedure` 'fixed_sequence', got {testing_procedure!r}. Use 'betting'."
    )


def _check_rates(tolerance: float, error_rate: float) -> None:
  for name, value in (("tolerance", tolerance), ("error_rate", error_rate)):
    if not (isinstance(value, int | float | np.number) and 0.0 < value < 1.0):
      raise ValueError(
        f"`{name}` must be in (0, 1), got {value!r}. `tolerance` (delta) bounds the expected"
        " loss, `error_rate` (epsilon) the probability that the bound fails."
      )


def _as_losses(losses, thresholds, support: Support | None) -> SequenceLosses:
  if not isinstance(losses, SequenceLosses):
    if thresholds is None:
      raise ValueError("`thresholds` must be given when `losses` is a plain array.")
    return SequenceLosses(losses, thresholds, support or Support(), kind="loss")
  if support is not None and support != losses.support:
    raise ValueError(
      f"`support` is declared by `losses` already as {losses.support}; leave it out."
    )
  if thresholds is not None:
    grid = thresholds_lib.validate_grid(thresholds)
    if not np.array_equal(grid, losses.thresholds):
      raise ValueError("`thresholds` must be those of `losses`; leave them out.")
  return losses


def _warn(sample: SequenceLosses, ordered: bool) -> None:
  """Says where the table itself suggests that prompts are no independent draws."""
  finite = sample.values[np.isfinite(sample.values).all(axis=1)]
  if not len(finite):
    return
  if ordered and sample.order == "given" and checks.looks_sorted(finite):
    warnings.warn(
      "the order given follows the losses, and a betting test in such an order proves nothing:"
      " leave `in_given_order` out, or give an order that was fixed before any loss was seen.",
      stacklevel=3,
    )
  if checks.looks_copied(finite):
    warnings.warn(
      "every row of losses occurs at least twice: copies of one prompt count once. Give them"
      " one of the `groups`.",
      stacklevel=3,
    )


def _faults(losses: SequenceLosses) -> list[str]:
  """Per threshold why its losses cannot be tested, or ''."""
  low, high = losses.support.lower, losses.support.upper
  values = losses.values
  faults = []
  for column in values.T:
    bad = ~((column >= low - 1e-9) & (column <= high + 1e-9))
    if losses.support.binary:
      bad |= (column != 0.0) & (column != 1.0)
    row = int(np.argmax(bad))
    name = "" if losses.ids is None else f" (id {losses.ids[row]!r})"
    wanted = "0 or 1" if losses.support.binary else f"in the declared range [{low}, {high}]"
    faults.append(
      f"the loss of row {row}{name} is {float(column[row])!r} and must be {wanted}"
      if bad.any()
      else ""
    )
  return faults


def _lowest(grid: np.ndarray, rejected: np.ndarray) -> float:
  return float(grid[rejected].min()) if rejected.any() else thresholds_lib.NEVER_EXIT


def _rows(losses, log_p, bound, result: testing.Rejections) -> tuple[Row, ...]:
  means = losses.values.mean(axis=0)
  return tuple(
    Row(
      threshold=float(losses.thresholds[j]),
      num_examples=len(losses.values),
      mean=float(means[j]) if math.isfinite(means[j]) else math.nan,
      p_value=float(np.exp(log_p[j])),
      log_p_value=float(log_p[j]),
      upper_bound=float(bound[j]),
      adjusted_p_value=float(result.adjusted_p_values[j]),
      rejected=bool(result.rejected[j]),
    )
    for j in range(len(losses.thresholds))
  )


def _reason(losses, result: testing.Rejections, faults: list[str], test) -> str:
  tolerance, error_rate, procedure, method = test
  grid, rejected = losses.thresholds, result.rejected
  first = int(np.argmin(rejected))
  if rejected.all():
    return f"Every threshold of the grid is certified; {grid[-1]} is the lowest."
  fault = f": {faults[first]}" if faults[first] else ""
  if rejected.any():
    lowest = _lowest(grid, rejected)
    return f"{lowest} is the lowest certified threshold; {grid[first]} is not certified{fault}."
  share = testing.first_share(procedure, len(grid))
  refusal = planning.refusal(
    len(losses.values),
    tolerance,
    error_rate,
    support=losses.support,
    method=method,
    share=share,
  )
  if refusal:
    return f"Nothing can be certified: {refusal}"
  return f"Nothing is certified: the first threshold {grid[first]} already fails{fault}."
