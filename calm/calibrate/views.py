"""A calibration as a table and as a picture; needs pandas, polars or matplotlib when called."""

import dataclasses
import importlib
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
  from calm.calibrate.calibration import Calibration


def _module(name: str) -> Any:
  try:
    return importlib.import_module(name)
  except ModuleNotFoundError as error:
    package = name.split(".")[0]
    raise ModuleNotFoundError(
      f"Expected the package {package!r}, which is not installed. Install it, or read"
      " `calibration.rows`.",
      name=package,
    ) from error


def to_frame(calibration: "Calibration", library: str = "pandas") -> Any:
  """One line a threshold, one column a field of `Row`.

  Args:
    calibration: any.
    library: 'pandas' or 'polars'.

  Returns:
    A DataFrame of that library.

  Raises:
    ValueError: another library.
    ModuleNotFoundError: it is not installed.
  """
  if library not in ("pandas", "polars"):
    raise ValueError(f"Expected `library` 'pandas' or 'polars', got {library!r}.")
  rows = [dataclasses.asdict(row) for row in calibration.rows]
  columns = {name: [row[name] for row in rows] for name in rows[0]}
  if calibration.knobs:
    columns = {"knob": list(calibration.knobs), **columns}
  return _module(library).DataFrame(columns)


def plot(calibration: "Calibration", axes: Any = None) -> Any:
  """Mean loss and upper bound along the grid, the tolerance, and what is certified.

  Args:
    calibration: any.
    axes: matplotlib axes to draw on; None makes a figure.

  Returns:
    The axes; `axes.figure.savefig(path)` writes them.

  Raises:
    ModuleNotFoundError: matplotlib is not installed.
  """
  if axes is None:
    # Not pyplot, which would keep every figure alive and ask for a screen.
    axes = _module("matplotlib.figure").Figure(figsize=(6.0, 4.0)).subplots()
  grid, bound = calibration.column("threshold"), calibration.column("upper_bound")
  certified = calibration.column("rejected").astype(bool)
  axes.plot(grid, calibration.column("mean"), "o-", color="0.4", label="mean loss")
  axes.plot(grid, bound, "--", color="0.4", label="upper bound, one threshold at a time")
  if certified.any():
    axes.plot(grid[certified], bound[certified], "o", color="tab:green", label="certified")
  tested = (calibration.parts or calibration.rows)[0]
  tolerance = getattr(tested, "tolerance", calibration.tolerance)
  axes.axhline(tolerance, color="tab:red", linewidth=1.0, label=f"tolerance {tolerance:g}")
  axes.set(xlabel="threshold, from the safest down", ylabel=f"{calibration.kind} loss")
  axes.invert_xaxis()
  if calibration.knobs:
    axes.set(xticks=grid, xticklabels=calibration.knobs, xlabel="the best first")
  shown = np.isfinite(bound)
  axes.set_title(
    f"{calibration.threshold:g} is the lowest of {len(grid)} thresholds that is certified"
    if calibration.certified
    else f"none of {len(grid)} thresholds is certified"
  )
  if shown.any():
    axes.legend(loc="upper left", frameon=False)
  return axes
