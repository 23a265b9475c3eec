"""Threshold grids from validation prompts, before any calibration prompt is seen."""

from collections.abc import Sequence

import numpy as np

from calm.calibrate import Record, thresholds

# Closer neighbours than this would be one point to a float32 confidence.
_MIN_GAP = 1e-6


def from_validation(
  records: Sequence[Record], measure: str, *, points: int = 10
) -> tuple[float, ...]:
  """The measure's default grid with the points in between where its confidences really lie.

  The added points are quantiles, over the tokens of a full-depth pass that measured, of each
  token's highest refused confidence: at the quantile q, a share 1 - q of the tokens would leave
  before the last layer. A classifier's confidences may crowd above 0.9, where a grid with
  steps of 0.05 has one point.

  Args:
    records: validation prompts decoded with `NEVER_EXIT` through the exit rule.
    measure: name of the confidence measure.
    points: quantiles.

  Returns:
    Strictly descending thresholds in [0, 1].
  """
  refused = np.array([c for record in records for c in record.rejected_confidences or ()])
  if not refused.size:
    raise ValueError(
      "Expected records with `rejected_confidences`, got none; decode with threshold never"
      " through the measure's own rule, not with a static one."
    )
  quantiles = np.quantile(refused, np.linspace(1.0, 0.0, points + 2)[1:-1])
  default = thresholds.default_grid(measure)
  chosen: list[float] = []
  for value in sorted({*np.round(quantiles, 6).tolist(), *default.tolist()}, reverse=True):
    if 0.0 < value <= 1.0 and (not chosen or chosen[-1] - value > _MIN_GAP):
      chosen.append(value)
  return tuple(chosen)
