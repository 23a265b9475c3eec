"""Fig. 2b and 2c: threshold schedules, and the trade-off under each."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from calm.calibrate import Prompt, Record, generations
from calm.exits import schedules
from calm.paper.bench import scores
from calm.paper.experiments import tradeoff

CONSTANT = "constant"


@dataclasses.dataclass(frozen=True)
class Values:
  """Fig. 2b: one schedule at one threshold.

  Attributes:
    name: of the schedule.
    threshold: lambda.
    values: the threshold of each token, from the first.
  """

  name: str
  threshold: float
  values: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Decay:
  """Fig. 2b and 2c for one task.

  Attributes:
    metric: bounded metric.
    measure: confidence measure.
    num_prompts: validation prompts.
    max_length: N of Eq. 5.
    step: between thresholds.
    values: Fig. 2b.
    curves: Fig. 2c, one entry a schedule.
  """

  metric: str
  measure: str
  num_prompts: int
  max_length: int
  step: float
  values: tuple[Values, ...]
  curves: tuple[tradeoff.Curve, ...]


def kinds(max_length: int) -> Mapping[str, schedules.Schedule]:
  """The schedules compared: a constant, and Eq. 5 with tau 0 (which is another) and 4."""
  return {
    CONSTANT: schedules.Constant(),
    "decaying, τ = 0": schedules.Decaying(0.0, max_length),
    "decaying, τ = 4": schedules.Decaying(4.0, max_length),
  }


def search_grid(step: float) -> tuple[float, ...]:
  """Thresholds of Fig. 2c, descending from 1 - step to step."""
  count = round(1.0 / step)
  return tuple(round(1.0 - i * step, 6) for i in range(1, count))


def decay(
  prompts: Sequence[Prompt],
  grids: Mapping[str, generations.Generations],
  full: Sequence[Record],
  metric: str,
  *,
  measure: str,
  max_length: int,
  step: float,
  shown: float = 0.8,
) -> Decay:
  """Scores every schedule.

  Args:
    prompts: with references.
    grids: schedule name of `kinds` -> generations over `search_grid`.
    full: the full model's records of these prompts.
    metric: a bounded metric.
    measure: the measure they were decoded with.
    max_length: N of Eq. 5.
    step: between thresholds.
    shown: lambda of Fig. 2b.
  """
  references = [prompt.targets for prompt in prompts]
  return Decay(
    metric=metric,
    measure=measure,
    num_prompts=len(prompts),
    max_length=max_length,
    step=step,
    values=tuple(
      Values(name, shown, _values(schedule, shown, max_length))
      for name, schedule in kinds(max_length).items()
    ),
    curves=tuple(
      tradeoff.Curve(
        name,
        tuple(
          tradeoff.Point(float(threshold), scores.score(records, references, full, metric))
          for threshold, records in zip(cached.thresholds, cached.records, strict=True)
        ),
      )
      for name, cached in grids.items()
    ),
  )


def _values(
  schedule: schedules.Schedule, threshold: float, max_length: int
) -> tuple[float, ...]:
  tokens = np.arange(max_length)
  values = np.broadcast_to(
    np.asarray(schedule(np.float32(threshold), tokens)),  # type: ignore[arg-type]
    tokens.shape,
  )
  return tuple(map(float, values))


def reachable_layers(curve: tradeoff.Curve, least: float) -> float:
  """Fewest mean layers of a curve's points whose similarity is at least `least`."""
  return min(
    (p.scores.layers for p in curve.points if p.scores.similarity >= least),
    default=float("nan"),
  )
