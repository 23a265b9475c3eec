"""App. B: risk on unseen prompts over random splits, and how often the promise fails."""

import dataclasses
from collections.abc import Mapping, Sequence

from calm.calibrate import generations, trials
from calm.calibrate.losses import sequence_losses
from calm.inference import grid

TOLERANCES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)
METHODS = ("paper", "auto")


@dataclasses.dataclass(frozen=True)
class MethodTrials:
  """One measure under one method of testing.

  Attributes:
    measure: confidence measure.
    method: `method` of `calibrate`.
    splits: figure (a), one entry a tolerance.
    validity: figure (b), one entry a tolerance.
  """

  measure: str
  method: str
  splits: tuple[trials.SplitTrials, ...]
  validity: tuple[trials.ValidityTrials, ...]


@dataclasses.dataclass(frozen=True)
class Validity:
  """App. B for one task: textual consistency.

  Attributes:
    metric: bounded metric of the losses.
    error_rate: epsilon.
    num_prompts: prompts of the pool.
    calibration_size: prompts of each drawn calibration set of figure (b).
    trials: one entry a measure and method.
  """

  metric: str
  error_rate: float
  num_prompts: int
  calibration_size: int
  trials: tuple[MethodTrials, ...]


def validity(
  grids: Mapping[str, generations.Generations],
  num_layers: int,
  metric: str,
  *,
  tolerances: Sequence[float] = TOLERANCES,
  methods: Sequence[str] = METHODS,
  error_rate: float = 0.05,
  calibration_size: int = 300,
  splits: int = 50,
  draws: int = 200,
  progress: grid.ShareProgress = grid.silent,
) -> Validity:
  """Calibrates again and again on the cached outputs of the test prompts.

  Args:
    grids: measure -> generations of exchangeable prompts.
    num_layers: decoder layers of the model.
    metric: a bounded metric.
    tolerances: deltas, each its own test.
    methods: of testing.
    error_rate: epsilon.
    calibration_size: prompts of each calibration set that figure (b) draws from the pool.
    splits: random splits of figure (a).
    draws: calibration sets of figure (b).
    progress: told after every measure and method.
  """
  count = len(next(iter(grids.values())).prompts)
  size = min(calibration_size, count)
  found = []
  for number, (measure, cached) in enumerate(grids.items()):
    losses = sequence_losses.compute(cached, "textual", metric=metric).ungrouped()
    counts = cached.layer_counts()
    layers = None if counts is None else trials.LayerCounts(*counts, full_depth=num_layers)
    for turn, method in enumerate(methods):
      progress((number + turn / len(methods)) / len(grids), f"{measure}, {method}")
      options = {"error_rate": error_rate, "method": method}
      found.append(
        MethodTrials(
          measure,
          method,
          trials.split_trials(losses, tolerances, layers=layers, trials=splits, **options),
          trials.validity_trials(
            losses, tolerances, calibration_size=size, trials=draws, **options
          ),
        )
      )
  return Validity(metric, error_rate, count, size, tuple(found))
