"""Exit thresholds as numbers, as text and as grids.

`NEVER_EXIT` is the full model, which 1 is not: float32 confidences saturate to
exactly 1.0.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from calm import arguments
from calm.calibrate import checks

NEVER_EXIT = math.inf
NEVER_EXIT_TEXT = "never"


def parse_threshold(value: str | float) -> float:
  """A threshold in [0, 1], or `NEVER_EXIT` for 'never', from the command line
  or JSON.
  """
  text = isinstance(value, str)
  if value == NEVER_EXIT or (text and value.strip().lower() == NEVER_EXIT_TEXT):
    return NEVER_EXIT
  try:
    threshold = float(value)
  except (TypeError, ValueError):
    threshold = math.nan
  if not 0.0 <= threshold <= 1.0:
    raise ValueError(
      f"Expected `threshold` to be a number in [0, 1] or {NEVER_EXIT_TEXT!r} "
      "(the full model),"
      f" got {value!r}."
    )
  return threshold


def format_threshold(threshold: float) -> str:
  """The text that `parse_threshold` reads back as the same float."""
  return str(threshold_to_json(threshold))


def threshold_to_json(threshold: float) -> float | str:
  """A JSON value: the number itself, or 'never' (JSON has no infinity)."""
  return NEVER_EXIT_TEXT if threshold == NEVER_EXIT else float(threshold)


def validate_grid(thresholds: Sequence[float] | np.ndarray) -> np.ndarray:
  """A grid, [num_thresholds] float64, from the safest to the fastest.

  ValueError unless it is a list of numbers in [0, 1] that strictly descends.
  """
  grid = checks.as_numbers(thresholds, "thresholds")
  if grid.ndim != 1 or grid.size == 0:
    raise ValueError(
      "Expected `thresholds` to be a non-empty one-dimensional grid, as "
      "[0.9, 0.8, 0.7], got an"
      f" array of shape {grid.shape}."
    )
  for place, threshold in enumerate(grid.tolist()):
    if not 0.0 <= threshold <= 1.0:
      raise ValueError(
        f"Expected `thresholds` to lie in [0, 1], got {threshold} at "
        f"position {place}; the full"
        f" model ({NEVER_EXIT_TEXT!r}) is always there and no grid point."
      )
    if place and threshold >= grid[place - 1]:
      raise ValueError(
        "Expected `thresholds` to descend strictly, from the safest to the "
        "fastest, got"
        f" {grid[place - 1]} before {threshold}; sort them in descending "
        "order, each once."
      )
  return grid


def grid_of_knobs(knobs: Sequence[Any]) -> tuple[np.ndarray, tuple[str, ...]]:
  """(grid, knobs as texts) of any ordered knob, the best first: layers, beams,
  names of models.

  Numbers in [0, 1] that descend are the grid, and no knobs; for all else the
  grid is 1 - i / len(knobs). ValueError where there are none, two have the same
  text, or a calibration cannot store one.
  """
  numbers = [
    knob for knob in knobs if isinstance(knob, int | float | np.number)
  ]
  if (
    knobs
    and len(numbers) == len(knobs)
    and all(0.0 <= knob <= 1.0 for knob in knobs)
  ):
    return validate_grid(knobs), ()
  names = tuple(map(str, knobs))
  if (
    not names
    or len(set(names)) != len(names)
    or not all(map(np.isfinite, numbers))
  ):
    raise ValueError(
      "Expected `knobs` to be finite numbers or names, at least one, all "
      "different and without"
      f" the full system, got {list(names)}."
    )
  checks.check_lines(names, "knobs")
  return 1.0 - np.arange(len(names)) / len(names), names


_EVEN = np.round(np.arange(19, 0, -1) * 0.05, 2)
_DEFAULT_GRIDS: Mapping[str, np.ndarray] = {
  **dict.fromkeys(("softmax", "shortlist", "classifier", "probe"), _EVEN),
  # Neighbouring residual states differ by a few per cent or less, so cosines
  # crowd near 1.
  "state": np.round(1.0 - np.geomspace(1e-3, 0.5, 19), 6),
  # The first slack is 0, where the loss is: a test that begins there begins
  # with a truth.
  "verified": np.round(np.arange(20, 0, -1) * 0.05, 2),
}


@arguments.checked()
def default_grid(measure: str) -> np.ndarray:
  """The grid of a confidence measure, [num_thresholds] float64, fixed before
  any loss is seen.

  `measure` is 'state' (19 points, 1 minus a geometric sequence from 0.001 to
  0.5, because cosines of residual states live near 1), 'verified' (1.00, 0.95,
  ..., 0.05: slacks 0, 0.05,
  ..., 0.95), or another (0.95, 0.90, ..., 0.05).

  Raises:
    ValueError: it has no default grid.
  """
  if measure not in _DEFAULT_GRIDS:
    raise ValueError(
      f"Expected `measure` to be one of {sorted(_DEFAULT_GRIDS)}, got "
      f"{measure!r}; for another"
      " choose a grid on validation prompts and pass it."
    )
  return _DEFAULT_GRIDS[measure].copy()
