"""Fig. 3: quality against layers, and against measured seconds, which the paper lacks."""

import dataclasses
from collections.abc import Mapping, Sequence

from calm.calibrate import Prompt, Record, generations
from calm.exits import schedules
from calm.inference import timing
from calm.paper.bench import intervals, scores

STATIC, ORACLE = "static", "oracle"


@dataclasses.dataclass(frozen=True)
class Point:
  """One setting of one curve.

  Attributes:
    threshold: lambda; `NEVER_EXIT` where the setting has none.
    scores: quality, similarity and layers on all prompts.
    seconds: measured decode seconds a prompt, on the timed prompts; NaN if not timed.
    speedup: full depth's decode seconds over these; NaN if not timed.
    speedup_interval: its 95 % interval, over prompts.
  """

  threshold: float
  scores: scores.Scores
  seconds: float = float("nan")
  speedup: float = float("nan")
  speedup_interval: intervals.Interval = intervals.UNKNOWN


@dataclasses.dataclass(frozen=True)
class Curve:
  """One line of the figure.

  Attributes:
    name: a measure, 'static' or 'oracle'.
    points: from the deepest to the shallowest.
  """

  name: str
  points: tuple[Point, ...]


@dataclasses.dataclass(frozen=True)
class TradeOff:
  """Fig. 3 for one task.

  Attributes:
    metric: bounded metric.
    num_prompts: validation prompts scored.
    num_timed: of those, decoded alone for the seconds; 0 if none.
    num_layers: decoder layers of the model.
    full: the full model.
    curves: measures, static depths, the oracle.
  """

  metric: str
  num_prompts: int
  num_timed: int
  num_layers: int
  full: Point
  curves: tuple[Curve, ...]

  def curve(self, name: str) -> Curve | None:
    """The curve of a name, or None."""
    return next((curve for curve in self.curves if curve.name == name), None)


def tradeoff(
  prompts: Sequence[Prompt],
  grids: Mapping[str, generations.Generations],
  static: Mapping[int, Sequence[Record]],
  oracle: Sequence[Record],
  metric: str,
  *,
  timings: timing.Timings | None = None,
  bleu: bool = False,
) -> TradeOff:
  """Scores every curve.

  Args:
    prompts: with references; the records are theirs, in this order.
    grids: measure -> generations over its grid.
    static: depth -> records; the largest is the full model.
    oracle: records of the oracle with state propagation.
    metric: a bounded metric.
    timings: measured seconds of the settings, by curve name and threshold (a depth's curve is
      'static k').
    bleu: whether corpus BLEU is computed.
  """
  references = [prompt.targets for prompt in prompts]
  num_layers = max(static)
  full = static[num_layers]

  def point(records, threshold: float, name: str) -> Point:
    scored = scores.score(records, references, full, metric, bleu=bleu)
    timed = timings.find(name, threshold) if timings is not None else None
    if timed is None or timings is None:
      return Point(threshold, scored)
    spread = intervals.of_speedup(timings, timed)
    return Point(threshold, scored, timed.decode_seconds, timed.speedup, spread)

  never = schedules.NEVER_EXIT
  curves = [
    Curve(
      measure,
      tuple(
        point(records, float(threshold), measure)
        for threshold, records in zip(cached.thresholds, cached.records, strict=True)
      ),
    )
    for measure, cached in grids.items()
  ]
  depths = sorted(static, reverse=True)
  curves += [
    Curve(STATIC, tuple(point(static[k], never, static_name(k)) for k in depths)),
    Curve(ORACLE, (point(oracle, never, ORACLE),)),
  ]
  return TradeOff(
    metric=metric,
    num_prompts=len(prompts),
    num_timed=0 if timings is None else timings.num_prompts,
    num_layers=num_layers,
    full=point(full, never, timing.FULL),
    curves=tuple(curves),
  )


def static_name(depth: int) -> str:
  """The name under which the static model of a depth is timed."""
  return f"{STATIC} {depth}"
