"""A calibration as a table."""

from typing import Any

import numpy as np

from calm.calibrate.losses import UNKNOWN
from calm.calibrate.thresholds import format_threshold
from calm.console import sanitize


def names(calibration: Any) -> tuple[str, ...]:
  """What its rows are called: its knobs or configurations, or its
  thresholds.
  """
  others = calibration.knobs or getattr(
    calibration.promise, "configurations", ()
  )
  return tuple(others) or tuple(
    format_threshold(row.threshold) for row in calibration.rows
  )


def unit(calibration: Any) -> str:
  """What one row is: a knob's setting, a configuration or a threshold."""
  configured = hasattr(calibration.promise, "configurations")
  return (
    "knob"
    if calibration.knobs
    else "configuration"
    if configured
    else "threshold"
  )


def place(calibration: Any) -> int | None:
  """Position of the row that was chosen, or None."""
  return calibration.promise.place([row.rejected for row in calibration.rows])


def table(calibration: Any, cached: Any = None) -> str:
  """The tested thresholds, an arrow at the chosen one.

  There is a column of decoder layers a token where `cached`, the `Generations`
  that were calibrated on, knows them.
  """
  rows = [
    (unit(calibration), "mean loss", "upper bound", "p-value", "certified")
  ]
  for name, row in zip(names(calibration), calibration.rows, strict=True):
    numbers = (
      f"{row.mean:.4f}",
      f"{row.upper_bound:.4f}",
      f"{row.p_value:.2g}",
    )
    rows.append((name, *numbers, "yes" if row.rejected else "no"))
  if counts := None if cached is None else cached.layer_counts():
    layers = counts[0].sum(0) / np.maximum(counts[1].sum(0), 1)
    column = ("layers / token", *(f"{value:.2f}" for value in layers))
    rows = [(*row, cell) for row, cell in zip(rows, column, strict=True)]
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  title = "loss" if calibration.kind == "loss" else f"{calibration.kind} loss"
  if calibration.metric != UNKNOWN:
    title += f", {calibration.metric}"
  lines = [sanitize(title)]
  chosen = place(calibration)
  for number, row in enumerate(rows, -1):
    line = "  ".join(
      cell.rjust(width) for cell, width in zip(row, widths, strict=True)
    )
    lines.append(("> " if number == chosen else "  ") + line)
  return "\n".join(lines)
