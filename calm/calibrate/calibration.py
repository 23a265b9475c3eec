"""Losses -> a calibrated threshold with a promise (paper, section 4; Proposition 1)."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy

from calm.calibrate import planning
from calm.calibrate import thresholds as thresholds_lib
from calm.calibrate.evidence import methods
from calm.calibrate.evidence import multiple_testing as testing
from calm.calibrate.generations import files
from calm.calibrate.generations import order as order_lib
from calm.calibrate.generations.procedures import Procedure, Provenance, describe_differences
from calm.calibrate.guarantee import describe
from calm.calibrate.losses.sequence_losses import SequenceLosses, Support

SCHEMA_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Row:
  """What was found at one threshold.

  Attributes:
    threshold: grid point.
    num_examples: prompts (or clusters) used.
    mean: mean loss of those.
    p_value: p-value of H: E[loss] > tolerance; underflows to 0 where `log_p_value` does not.
    log_p_value: its logarithm.
    upper_bound: upper confidence bound of E[loss] at `error_rate`, for this threshold alone.
    adjusted_p_value: rejected at any family-wise error rate that is at least this.
    rejected: whether E[loss] <= tolerance is certified.
  """

  threshold: float
  num_examples: int
  mean: float
  p_value: float
  log_p_value: float
  upper_bound: float
  adjusted_p_value: float
  rejected: bool

  def to_json(self) -> dict[str, Any]:
    """All fields as JSON values; NaN is null."""
    return {
      name: None if isinstance(value, float) and math.isnan(value) else value
      for name, value in dataclasses.asdict(self).items()
    }

  @classmethod
  def from_json(cls, value: Mapping[str, Any]) -> "Row":
    """The inverse of `to_json`."""
    fields: dict[str, Any] = {
      name: math.nan if entry is None else entry for name, entry in value.items()
    }
    return cls(**fields)


@dataclasses.dataclass(frozen=True)
class Calibration:
  """A calibrated threshold and everything that it stands on.

  Attributes:
    threshold: the lowest certified threshold, or `NEVER_EXIT` (the full model).
    reason: why it is this one, in one sentence.
    tolerance: bound on the expected loss.
    error_rate: allowed probability that the bound does not hold.
    method: name of the p-value method, 'auto' resolved.
    testing: name of the multiple-testing procedure.
    kind: what the loss is ('textual', 'risk_signed', 'risk_clipped' or the caller's word).
    metric: name of the text metric.
    support: declared range of losses.
    num_examples: prompts (or clusters) in the calibration set.
    clusters: whether losses are means of clusters of prompts.
    rows: one `Row` a grid point, in grid order.
    visited: grid positions in the order of testing.
    order: 'permuted' (by `seed`), 'given', or 'irrelevant' where the method does not depend on
      it.
    seed: hexadecimal seed of the permutation.
    sequential: whether prompts stopped being decoded when the outcome was clear.
    procedure: how outputs were decoded; None when they came from elsewhere.
    provenance: the story of the numbers.
  """

  threshold: float
  reason: str
  tolerance: float
  error_rate: float
  method: str
  testing: str
  kind: str
  metric: str
  support: Support
  num_examples: int
  clusters: bool
  rows: tuple[Row, ...]
  visited: tuple[int, ...]
  order: str
  seed: str
  sequential: bool = False
  procedure: Procedure | None = None
  provenance: Provenance = dataclasses.field(default_factory=Provenance)

  @property
  def certified(self) -> bool:
    """Whether any threshold of the grid was certified."""
    return self.threshold != thresholds_lib.NEVER_EXIT

  @property
  def guarantee(self) -> str:
    """The promise in plain words, with what it does not say."""
    return describe(self)

  def column(self, name: str) -> np.ndarray:
    """One field of `rows` as an array [num_thresholds]."""
    return np.array([getattr(row, name) for row in self.rows])

  def refuse_other(self, procedure: Procedure | None) -> None:
    """Does nothing if the promise holds for outputs decoded by `procedure`.

    Raises:
      ValueError: it does not; the message names each differing field.
    """
    if self.procedure is None:
      raise ValueError(
        "the calibration has `procedure` null: it was made from outputs decoded elsewhere, so"
        " that nothing here can check that the promise holds for this model. Calibrate on"
        " outputs of this model, or say that the guarantee is void (`--void_guarantee`, or"
        " `void_guarantee=True`)."
      )
    difference = describe_differences(self.procedure, procedure)
    if difference:
      raise ValueError(
        f"the calibration is for another procedure: {difference}. Calibrate again under this"
        " one, or say that the guarantee is void (`--void_guarantee`, or"
        " `void_guarantee=True`)."
      )

  def to_json(self) -> dict[str, Any]:
    """All fields as JSON values, and the guarantee for people who read the file."""
    value = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
    return {
      "schema_version": SCHEMA_VERSION,
      **value,
      "threshold": thresholds_lib.threshold_to_json(self.threshold),
      "support": dataclasses.asdict(self.support),
      "rows": [row.to_json() for row in self.rows],
      "visited": list(self.visited),
      "procedure": None if self.procedure is None else self.procedure.to_json(),
      "provenance": self.provenance.to_json(),
      "guarantee": self.guarantee,
    }

  @classmethod
  def from_json(cls, value: Mapping[str, Any]) -> "Calibration":
    """The inverse of `to_json`.

    Raises:
      ValueError: another schema version, or a field is missing or has no meaning.
    """
    if not isinstance(value, Mapping) or value.get("schema_version") != SCHEMA_VERSION:
      got = value.get("schema_version") if isinstance(value, Mapping) else type(value).__name__
      raise ValueError(
        f"`calibration` must have schema_version {SCHEMA_VERSION}, got {got!r}: calibrate"
        " again."
      )
    names = {field.name for field in dataclasses.fields(cls)}
    missing = sorted(names - set(value))
    if missing:
      raise ValueError(f"`calibration` lacks the fields {missing}; the file is damaged.")
    procedure = value["procedure"]
    return cls(
      **{
        **{name: value[name] for name in names},
        "threshold": thresholds_lib.parse_threshold(value["threshold"]),
        "support": Support(**value["support"]),
        "rows": tuple(Row.from_json(row) for row in value["rows"]),
        "visited": tuple(value["visited"]),
        "procedure": None if procedure is None else Procedure.from_json(procedure),
        "provenance": Provenance.from_json(value["provenance"]),
      }
    )

  def save(self, path: str | pathlib.Path) -> None:
    """Writes JSON under a temporary name and renames it.

    Raises:
      OSError: the file cannot be written.
    """
    text = json.dumps(self.to_json(), indent=1, ensure_ascii=False, allow_nan=False)
    files.write_atomically(path, text + "\n")

  @classmethod
  def load(cls, path: str | pathlib.Path) -> "Calibration":
    """Reads what `save` wrote.

    Raises:
      ValueError: the file is missing, no JSON, or no calibration; the message names it.
    """
    try:
      value = json.loads(pathlib.Path(path).read_text("utf-8"))
      return cls.from_json(value)
    except OSError as error:
      raise ValueError(f"{path}: cannot be read ({error.strerror}).") from error
    except (KeyError, TypeError, ValueError) as error:
      raise ValueError(f"{path}: is no calibration: {error}") from error


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
    method: 'auto' (binary support: 'binomial', else 'betting'), 'paper' (Eq. 11,
      Hoeffding-Bentkus), 'betting', 'convex_order', 'hoeffding_bentkus', 'hoeffding' or
      'binomial'.
    testing_procedure: 'fixed_sequence', 'fallback', 'holm' or 'bonferroni'.
    groups: [num_examples] cluster of each row; the test is then on cluster means.
    support: declared range of plain arrays; [0, 1] by default.

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
  chosen = methods.get_method(method, order_lib.unit_support(sample, groups))
  _check_procedure(chosen, testing_procedure)
  prepared, declared = chosen.prepare(sample.values, sample.support)
  sample = dataclasses.replace(sample, values=prepared, support=declared)
  if groups is not None:
    sample = order_lib.cluster_means(sample, groups)
  order, seed = order_lib.tested_order(sample)
  values = sample.values[order] if chosen.ordered else sample.values
  rates = methods.Sample(values, sample.support, tolerance, error_rate)
  log_p, bound = _evidence(chosen, rates, np.array([not fault for fault in faults]))
  result = testing.PROCEDURES[testing_procedure](np.exp(log_p), error_rate)
  return Calibration(
    threshold=_lowest(sample.thresholds, result.rejected),
    reason=_reason(sample, result, faults, (tolerance, error_rate, testing_procedure)),
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
    losses = SequenceLosses(
      np.asarray(losses, np.float64), np.asarray(thresholds), support or Support(), kind="loss"
    )
  elif support is not None and support != losses.support:
    raise ValueError(
      f"`support` is declared by `losses` already as {losses.support}; leave it out."
    )
  values = np.asarray(losses.values, np.float64)
  grid = thresholds_lib.validate_grid(losses.thresholds if thresholds is None else thresholds)
  if values.ndim != 2 or values.shape[1] != len(grid) or not len(values):
    raise ValueError(
      f"`losses` must be [num_examples, num_thresholds] = [n, {len(grid)}] with n at least 1,"
      f" got shape {values.shape}: one row a prompt, one column a threshold."
    )
  if not np.array_equal(grid, np.asarray(losses.thresholds, np.float64)):
    raise ValueError("`thresholds` must be those of `losses`; leave them out.")
  return dataclasses.replace(losses, values=values, thresholds=grid)


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
      f"the loss of row {row}{name} is {column[row]!r} and must be {wanted}"
      if bad.any()
      else ""
    )
  return faults


def _evidence(method: methods.Method, sample: methods.Sample, usable: np.ndarray):
  """(log p, upper bounds); columns that are not usable have p = 1 and no bound."""
  log_p, bound = np.zeros(len(usable)), np.full(len(usable), np.nan)
  if usable.any():
    # What is left leaves the range by rounding at most.
    inside = np.clip(sample.values[:, usable], sample.support.lower, sample.support.upper)
    sample = dataclasses.replace(sample, values=inside)
    log_p[usable] = method.log_p_values(sample)
    bound[usable] = method.upper_bounds(sample)
  return log_p, bound


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
  tolerance, error_rate, procedure = test
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
    len(losses.values), tolerance, error_rate * share, lower=losses.support.lower
  )
  if refusal:
    return f"Nothing can be certified: {refusal}"
  return f"Nothing is certified: the first threshold {grid[first]} already fails{fault}."
