"""Losses from a DataFrame of pandas or polars, neither of which is imported."""

from typing import Any

import numpy as np

from calm.calibrate.losses import checks
from calm.calibrate.losses.sequence_losses import SequenceLosses, Support

# Columns that are no threshold.
_ID, _GROUP = "id", "group"


def is_frame(value: Any) -> bool:
  """Whether a value is a table with named columns."""
  return hasattr(value, "columns") and hasattr(value, "__getitem__")


def losses_of(frame: Any, support: Support | None = None) -> SequenceLosses:
  """The losses of a DataFrame: one row a prompt, one column a threshold.

  Args:
    frame: columns named by thresholds (numbers or their text, in any order), and `id` and
      `group` where there are such.
    support: declared range; [0, 1] by default.

  Returns:
    `SequenceLosses` on the descending grid.

  Raises:
    ValueError: another column has no number for a name, or holds no numbers, or two columns
      are of one threshold.
  """
  columns, names = {}, {}
  for name in frame.columns:
    if name in (_ID, _GROUP):
      continue
    threshold = _threshold(name)
    if threshold in names:
      raise ValueError(
        f"Expected one column of `losses` a threshold, got {names[threshold]!r} and {name!r}"
        f" for {threshold}; leave one out, or name it by its own threshold."
      )
    names[threshold] = name
    columns[threshold] = checks.as_numbers(np.asarray(frame[name]), f"column {name!r}")
  if not columns:
    raise ValueError("Expected `losses` to have a column a threshold, got no such column.")
  grid = sorted(columns, reverse=True)
  return SequenceLosses(
    np.stack([columns[threshold] for threshold in grid], axis=1),
    np.array(grid),
    support or Support(),
    kind="loss",
    ids=_names(frame, _ID),
    groups=_groups(frame),
  )


def _threshold(name: Any) -> float:
  try:
    return float(name)
  except (TypeError, ValueError):
    raise ValueError(
      f"Expected columns of `losses` to be named by thresholds, `id` or `group`, got {name!r}."
    ) from None


def _names(frame: Any, name: str) -> tuple[str, ...] | None:
  return tuple(str(v) for v in frame[name]) if name in list(frame.columns) else None


def _groups(frame: Any) -> tuple[Any, ...] | None:
  """The clusters as texts; what is missing (None, NaN, NaT, NA) stays and will be refused."""
  if _GROUP not in list(frame.columns):
    return None
  missing = lambda v: v is None or type(v).__name__ in ("NAType", "NaTType") or v != v
  return tuple(v if missing(v) else str(v) for v in frame[_GROUP])
