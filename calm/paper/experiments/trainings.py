"""Two trainings side by side: App. D's classifiers, and what Eq. 6 costs and gives."""

import dataclasses
from collections.abc import Mapping, Sequence

from calm.calibrate import Prompt, Record, generations
from calm.paper.bench import scores
from calm.paper.experiments import tradeoff

PER_LAYER, GEOMETRIC = "per layer", "geometric-like"
ALL_LAYERS, LAST_LAYER = "Eq. 6", "last layer only"


@dataclasses.dataclass(frozen=True)
class Comparison:
  """Curves of two trainings.

  Attributes:
    metric: bounded metric.
    num_prompts: validation prompts.
    curves: one entry a training; similarities are to each model's own full depth.
  """

  metric: str
  num_prompts: int
  curves: tuple[tradeoff.Curve, ...]


def classifiers(
  prompts: Sequence[Prompt], grids: Mapping[str, generations.Generations], metric: str
) -> Comparison:
  """App. D: the exit classifier trained per layer, and Elbayad's geometric-like way.

  Args:
    prompts: with references.
    grids: `PER_LAYER` and `GEOMETRIC` -> generations with the measure 'classifier'.
    metric: a bounded metric.
  """
  references = [prompt.targets for prompt in prompts]
  curves = tuple(
    tradeoff.Curve(
      name,
      tuple(
        tradeoff.Point(float(t), scores.score(records, references, cached.full, metric))
        for t, records in zip(cached.thresholds, cached.records, strict=True)
      ),
    )
    for name, cached in grids.items()
  )
  return Comparison(metric, len(prompts), curves)


def objectives(
  prompts: Sequence[Prompt],
  static: Mapping[str, Mapping[int, Sequence[Record]]],
  metric: str,
) -> Comparison:
  """Eq. 6 against a loss on the last layer only: quality at every static depth.

  Args:
    prompts: with references.
    static: `ALL_LAYERS` and `LAST_LAYER` -> depth -> records.
    metric: a bounded metric.
  """
  references = [prompt.targets for prompt in prompts]

  def curve(name: str, depths: Mapping[int, Sequence[Record]]) -> tradeoff.Curve:
    full = depths[max(depths)]
    return tradeoff.Curve(
      name,
      tuple(
        tradeoff.Point(float("nan"), scores.score(depths[k], references, full, metric))
        for k in sorted(depths, reverse=True)
      ),
    )

  curves = tuple(curve(name, depths) for name, depths in static.items())
  return Comparison(metric, len(prompts), curves)
