"""Table 2: what a calibrated threshold saves on prompts that it has not seen."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from calm import calibrate as calibrate_lib
from calm.calibrate import generations
from calm.calibrate.losses import sequence_losses
from calm.exits import schedules
from calm.inference import timing
from calm.paper.bench import intervals

# (measure, exit layers of the real tokens of every output) -> decoder FLOPs of the full model
# for as many tokens, over those of these exits.
FlopsReduction = Callable[[str, Sequence[Sequence[int]]], float]


@dataclasses.dataclass(frozen=True)
class Target:
  """What is promised.

  Attributes:
    consistency: 'textual' or 'risk'.
    tolerance: delta.
  """

  consistency: str
  tolerance: float


# The paper's; Debian's outputs are shorter, so that one wrong word costs more.
TARGETS = (
  Target("textual", 0.1),
  Target("textual", 0.25),
  Target("risk", 0.02),
  Target("risk", 0.05),
)


@dataclasses.dataclass(frozen=True)
class Method:
  """How losses are tested.

  Attributes:
    name: `method` of `calibrate`.
    risk_kind: the loss behind risk consistency: clipped as in Eq. 11, or signed as in Eq. 2.
  """

  name: str
  risk_kind: str


# Only a betting test takes signed losses, which reward prompts whose output improves.
METHODS = (Method("paper", "risk_clipped"), Method("auto", "risk_signed"))


@dataclasses.dataclass(frozen=True)
class Gain:
  """One method's cell of Table 2.

  Attributes:
    method: name of the p-value method.
    kind: which loss was tested.
    threshold: calibrated lambda, or `NEVER_EXIT`.
    reason: why, in one sentence.
    calibration_risk: mean loss of the calibration prompts at that threshold (0 for never).
    risk: mean loss of unseen prompts at that threshold.
    layers: mean decoder layers a token on unseen prompts.
    flops_reduction: decoder FLOPs of the full model over these; NaN without a formula.
    speedup: measured decode seconds of the full model over these; NaN if not timed.
    end_to_end: the same with the encoder's seconds on both sides.
    risk_interval: 95 % interval of the expected loss, from the unseen prompts alone.
    speedup_interval: 95 % interval of `speedup`, over prompts.
  """

  method: str
  kind: str
  threshold: float
  reason: str
  calibration_risk: float
  risk: float
  layers: float
  flops_reduction: float
  speedup: float = float("nan")
  end_to_end: float = float("nan")
  risk_interval: intervals.Interval = intervals.UNKNOWN
  speedup_interval: intervals.Interval = intervals.UNKNOWN


@dataclasses.dataclass(frozen=True)
class Row:
  """One row of Table 2.

  Attributes:
    target: consistency and tolerance.
    measure: confidence measure.
    gains: one entry a method.
  """

  target: Target
  measure: str
  gains: tuple[Gain, ...]


@dataclasses.dataclass(frozen=True)
class Gains:
  """Table 2 for one task.

  Attributes:
    metric: bounded metric of the losses.
    error_rate: epsilon.
    num_calibration: prompts calibrated on.
    num_unseen: prompts of the risk, layers and FLOPs.
    num_timed: unseen prompts decoded alone for the seconds; 0 before they are.
    num_layers: decoder layers of the model.
    rows: one entry a target and measure.
  """

  metric: str
  error_rate: float
  num_calibration: int
  num_unseen: int
  num_timed: int
  num_layers: int
  rows: tuple[Row, ...]


def gains(
  grids: Mapping[str, generations.Generations],
  num_layers: int,
  metric: str,
  *,
  targets: Sequence[Target] = TARGETS,
  methods: Sequence[Method] = METHODS,
  error_rate: float = 0.05,
  calibration_share: float = 0.8,
  flops: FlopsReduction | None = None,
) -> Gains:
  """Calibrates on the first prompts and looks at the others.

  Args:
    grids: measure -> generations of exchangeable prompts in a random order, with references.
    num_layers: decoder layers of the model.
    metric: a bounded metric.
    targets: consistencies and tolerances.
    methods: p-value methods.
    error_rate: epsilon, of each cell by itself.
    calibration_share: share of the prompts that is calibrated on; the paper's is 0.8.
    flops: FLOPs reduction of recorded exits.
  """
  count = len(next(iter(grids.values())).prompts)
  cut = round(calibration_share * count)
  kinds = {kind: None for method in methods for kind in ("textual", method.risk_kind)}
  rows = {}
  for measure, cached in grids.items():
    losses = {k: sequence_losses.compute(cached, k, metric=metric) for k in kinds}
    depth = _Depth(cached, range(cut, count), num_layers, flops, measure)
    for target in targets:
      cells = tuple(
        _gain(losses[_kind(target, method)], cut, target, method.name, error_rate, depth)
        for method in methods
      )
      rows[target, measure] = Row(target, measure, cells)
  return Gains(
    metric=metric,
    error_rate=error_rate,
    num_calibration=cut,
    num_unseen=count - cut,
    num_timed=0,
    num_layers=num_layers,
    rows=tuple(rows[target, measure] for target in targets for measure in grids),
  )


def _kind(target: Target, method: Method) -> str:
  return method.risk_kind if target.consistency == "risk" else target.consistency


def _gain(losses, cut: int, target: Target, method: str, error_rate: float, depth) -> Gain:
  count = len(losses.values)
  found = calibrate_lib.calibrate(
    losses.ungrouped().rows(range(cut)),
    tolerance=target.tolerance,
    error_rate=error_rate,
    method=method,
  )
  unseen, seen = losses.values[cut:count], losses.values[:cut]
  column = _column(losses.thresholds, found.threshold)
  return Gain(
    method=found.method,
    kind=losses.kind,
    threshold=found.threshold,
    reason=found.reason,
    calibration_risk=0.0 if column is None else float(seen[:, column].mean()),
    risk=0.0 if column is None else float(unseen[:, column].mean()),
    layers=depth.layers(column),
    flops_reduction=depth.flops_reduction(column),
    risk_interval=(0.0, 0.0)
    if column is None
    else intervals.of_mean(unseen[:, column], losses.support.lower),
  )


def _column(thresholds: np.ndarray, threshold: float) -> int | None:
  hits = np.flatnonzero(thresholds == threshold)
  return int(hits[0]) if hits.size else None


@dataclasses.dataclass(frozen=True)
class _Depth:
  """Layers and FLOPs of the unseen prompts; the column None is the full model."""

  cached: generations.Generations
  rows: Sequence[int]
  num_layers: int
  flops: FlopsReduction | None
  measure: str

  def layers(self, column: int | None) -> float:
    if column is None:
      return float(self.num_layers)
    exits = self._exits(column)
    return sum(map(sum, exits)) / sum(map(len, exits))

  def flops_reduction(self, column: int | None) -> float:
    if self.flops is None:
      return float("nan")
    return 1.0 if column is None else self.flops(self.measure, self._exits(column))

  def _exits(self, column: int) -> list[Sequence[int]]:
    return [self.cached.records[column][row].exit_layers or () for row in self.rows]


def with_times(found: Gains, timings: timing.Timings) -> Gains:
  """The same table with the measured speed-ups of its thresholds.

  Args:
    found: from `gains`.
    timings: settings by measure and threshold; the full model is static.
  """

  def timed(row: Row, gain: Gain) -> Gain:
    if gain.threshold == schedules.NEVER_EXIT:
      return dataclasses.replace(gain, speedup=1.0, end_to_end=1.0, speedup_interval=(1.0, 1.0))
    time = timings.find(row.measure, gain.threshold)
    if time is None:
      return gain
    return dataclasses.replace(
      gain,
      speedup=time.speedup,
      end_to_end=time.end_to_end,
      speedup_interval=intervals.of_speedup(timings, time),
    )

  rows = tuple(
    dataclasses.replace(row, gains=tuple(timed(row, gain) for gain in row.gains))
    for row in found.rows
  )
  return dataclasses.replace(found, num_timed=timings.num_prompts, rows=rows)
