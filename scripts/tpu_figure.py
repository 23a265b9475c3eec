"""Draws step time against exit layer, on TPUs as their compiler estimates it and on a CPU.

`python scripts/tpu_report.py --figure` calls it; it compiles nothing and needs matplotlib.
"""

import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

FOLDER = pathlib.Path(__file__).parent
OUTPUT = FOLDER / "figures" / "tpu_exit_layers.png"
CPU = FOLDER / "results" / "small_one_row.json"
# Cycles of a millisecond, in thousands: 940 MHz and 1.5 GHz.
KILOCYCLES = {"v3:2x2": 940.0, "v5e:2x2": 1500.0}
Series = Mapping[str, Mapping[int, float]]


def cpu(path: pathlib.Path = CPU) -> Series:
  """Milliseconds by exit layer as measured: of static models, and of exits forced there.

  Raises:
    ValueError: the table has no such rows.
  """
  result = json.loads(path.read_text("utf-8"))
  system, layers, step = map(result["columns"].index, ("system", "layers", "ms a step"))
  named = {r"static \d+|full depth": "static", r"classifier, forced \d+, default": "early exit"}
  found: dict[str, dict[int, float]] = {name: {} for name in named.values()}
  for line in result["rows"]:
    for pattern, name in named.items():
      if re.fullmatch(pattern, line[system]):
        found[name][int(line[layers])] = line[step]
  if not all(found.values()):
    raise ValueError(
      f"Expected static and forced exits in {path}, got {found}; measure them with"
      " scripts/benchmark.py."
    )
  return {name: dict(sorted(points.items())) for name, points in found.items()}


def tpu(programs: list[dict[str, Any]], topology: str, rows: int) -> Series:
  """Milliseconds by exit layer as estimated, float32."""
  found = {}
  for one in programs:
    place = one["topology"], one["dtype"], one["batch"], one["length"]
    name = {"static": "static", "deferred": "early exit"}.get(one["program"])
    if name and place == (topology, "float32", rows, 64):
      cycles = one["kilocycles"].items()
      found[name] = {int(k): v / KILOCYCLES[topology] for k, v in cycles}
  return found


def draw(results: pathlib.Path, output: pathlib.Path = OUTPUT) -> None:
  """Three panels, one row each: TPU v3, TPU v5e, CPU."""
  import matplotlib
  from matplotlib import figure as mpl_figure

  programs = json.loads(results.read_text("utf-8"))["programs"]
  panels = {
    "TPU v3, estimated by its compiler": tpu(programs, "v3:2x2", 1),
    "TPU v5e, estimated by its compiler": tpu(programs, "v5e:2x2", 1),
    "two CPU cores, measured": cpu(),
  }
  styles = {"static": ("#808080", "x", ":"), "early exit": ("#d55e00", "s", "-")}
  titles = {"static": "a model of k layers", "early exit": "8 layers, classifier, exit after k"}
  with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False}):
    figure = mpl_figure.Figure(figsize=(9.5, 3.2), layout="constrained")
    for axes, (title, series) in zip(figure.subplots(1, 3), panels.items(), strict=True):
      for name, points in series.items():
        colour, marker, line = styles[name]
        options = dict(color=colour, marker=marker, linestyle=line, label=titles[name])
        axes.plot(list(points), list(points.values()), **options)
      axes.set_title(title, fontsize=9)
      axes.set_xlabel("exit after layer k")
      axes.set_xticks([1, 2, 4, 8])
      axes.set_ylim(bottom=0)
      axes.grid(alpha=0.25)
    figure.axes[0].set_ylabel("ms a decode step, one row")
    figure.axes[0].legend(frameon=False, loc="lower right")
    figure.savefig(output, dpi=150)
