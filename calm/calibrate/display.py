"""A calibration as a table and as a picture; needs pandas, polars or matplotlib when called."""

import dataclasses
import html
import importlib
import io
from typing import Any

import numpy as np

from calm.calibrate.losses import UNKNOWN
from calm.calibrate.thresholds import format_threshold
from calm.console import sanitize

_HEADS = ("mean loss", "upper bound", "p-value", "certified")


def to_frame(calibration: Any, library: str = "pandas") -> Any:
  """A DataFrame of 'pandas' or 'polars', one line a threshold, one column a field of `Row`."""
  if library not in ("pandas", "polars"):
    raise ValueError(f"Expected `library` 'pandas' or 'polars', got {library!r}.")
  rows = [dataclasses.asdict(row) for row in calibration.rows]
  columns = {"knob": list(calibration.knobs)} if calibration.knobs else {}
  columns |= {name: [row[name] for row in rows] for name in rows[0]}
  return importlib.import_module(library).DataFrame(columns)


def names(calibration: Any) -> tuple[str, ...]:
  """What its rows are called: its knobs or configurations, or its thresholds."""
  others = calibration.knobs or getattr(calibration.promise, "configurations", ())
  return tuple(others) or tuple(format_threshold(row.threshold) for row in calibration.rows)


def unit(calibration: Any) -> str:
  """What one row is: a knob's setting, a configuration or a threshold."""
  configured = hasattr(calibration.promise, "configurations")
  return "knob" if calibration.knobs else "configuration" if configured else "threshold"


def place(calibration: Any) -> int | None:
  """Position of the row that was chosen, or None."""
  return calibration.promise.place([row.rejected for row in calibration.rows])


def title(calibration: Any, metric: bool = True) -> str:
  """Like `textual loss, rouge_l`; losses that were given have no metric that is known."""
  kind = "loss" if calibration.kind == "loss" else f"{calibration.kind} loss"
  metric = metric and calibration.metric != UNKNOWN
  return sanitize(f"{kind}, {calibration.metric}" if metric else kind)


def in_short(calibration: Any) -> str:
  """What a calibration says, in a few words."""
  certified = sum(row.rejected for row in calibration.rows)
  return (
    f"Calibration(threshold={format_threshold(calibration.threshold)},"
    f" tolerance={calibration.tolerance:g}, error_rate={calibration.error_rate:g}:"
    f" {title(calibration)}; {certified} of {len(calibration.rows)} thresholds certified on"
    f" {calibration.num_examples} {calibration.unit})"
  )


def cells(calibration: Any) -> list[tuple[str, ...]]:
  """The table's head and lines."""
  lines: list[tuple[str, ...]] = [(unit(calibration), *_HEADS)]
  for name, row in zip(names(calibration), calibration.rows, strict=True):
    numbers = (f"{row.mean:.4f}", f"{row.upper_bound:.4f}", f"{row.p_value:.2g}")
    lines.append((name, *numbers, "yes" if row.rejected else "no"))
  return lines


def as_text(calibration: Any) -> str:
  """The tested thresholds as a table, and the promise below."""
  return f"{table(calibration)}\n{sanitize(calibration.promised)}"


def table(calibration: Any, layers: Any = None) -> str:
  """The tested thresholds, an arrow at the chosen one; `layers` are as for `plot`."""
  rows, chosen = cells(calibration), place(calibration)
  if layers is not None:
    column = ("layers / token", *(f"{value:.2f}" for value in _layers(calibration, layers)))
    rows = [(*row, cell) for row, cell in zip(rows, column, strict=True)]
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = [title(calibration)]
  for number, row in enumerate(rows, -1):
    line = "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
    lines.append(("> " if number == chosen else "  ") + line)
  return "\n".join(lines)


def as_html(calibration: Any) -> str:
  """The same for a notebook, in the page's own colours."""
  safe = lambda text: html.escape(sanitize(text))
  lines = []
  for number, row in enumerate(cells(calibration), -1):
    tag = "th" if number < 0 else "td"
    style = ' style="font-weight:bold"' if number == place(calibration) else ""
    line = "".join(f'<{tag} style="text-align:right">{safe(text)}</{tag}>' for text in row)
    lines.append(f"<tr{style}>{line}</tr>")
  return (
    f"<div><table><caption>{html.escape(title(calibration))}</caption>{''.join(lines)}</table>"
    f'<p title="{safe(calibration.guarantee)}">{safe(calibration.promised)}</p></div>'
  )


def new_axes() -> Any:
  """Axes of a figure of matplotlib, which a notebook shows."""
  # Not pyplot, which would keep every figure alive and ask for a screen; but then notebooks,
  # which ask for what pyplot made, need to be told.
  figure = importlib.import_module("matplotlib.figure").Figure((6, 4), layout="constrained")
  axes = figure.subplots()

  def png() -> bytes:
    written = io.BytesIO()
    figure.savefig(written, format="png")
    return written.getvalue()

  figure._repr_png_ = axes._repr_png_ = png
  return axes


def _layers(calibration: Any, layers: Any) -> np.ndarray:
  if hasattr(layers, "layer_counts"):
    counts = layers.layer_counts()
    layers = () if counts is None else counts[0].sum(0) / np.maximum(counts[1].sum(0), 1)
  values = np.asarray(layers, np.float64)
  if values.shape != (len(calibration.rows),):
    raise ValueError(
      f"Expected `layers` of [{len(calibration.rows)}], one a threshold, or generations that"
      f" know them, got shape {values.shape}; leave it out to draw against the threshold."
    )
  return values


def plot(calibration: Any, axes: Any = None, *, layers: Any = None) -> Any:
  """Axes with mean loss and upper bound along the grid, and the chosen threshold (matplotlib).

  Args:
    calibration: any.
    axes: axes to draw on; None makes a figure, which `axes.figure.savefig(path)` writes.
    layers: mean decoder layers a token at every threshold, [num_thresholds], or the
      `Generations` that were calibrated on; None draws against the threshold.
  """
  x = calibration.column("threshold") if layers is None else _layers(calibration, layers)
  axes = new_axes() if axes is None else axes
  mean, bound = calibration.column("mean"), calibration.column("upper_bound")
  certified, chosen = calibration.column("rejected").astype(bool), place(calibration)
  tested = (calibration.parts or calibration.rows)[0]
  tolerance = getattr(tested, "tolerance", calibration.tolerance)
  found = f"Nothing is certified at a tolerance of {tolerance:g}: the full model serves"
  axes.plot(x, mean, "o-", color="#0072b2", label="mean loss")
  axes.plot(x, bound, "--", color="#d55e00", label="upper bound, one threshold at a time")
  if certified.any():
    axes.plot(x[certified], bound[certified], "s", color="#009e73", label="certified")
  if chosen is not None:
    name = sanitize(names(calibration)[chosen])
    axes.plot(x[chosen], mean[chosen], "*k", markersize=14, label=f"chosen: {name}")
    down = f"{unit(calibration)} {name}"
    if layers is not None:
      down = f"{x[chosen]:.2f} layers a token"
    probability = f"{1.0 - calibration.error_rate:.10g}"
    found = f"Certified down to {down}: at most {tolerance:g}, with probability {probability}"
  axes.axhline(tolerance, color="0.4", linestyle=":", label=f"tolerance {tolerance:g}")
  axes.set_ylabel(title(calibration, metric=False), parse_math=False)
  axes.set_xlabel("mean decoder layers a token")
  if layers is None:
    axes.set_xlabel("threshold, from the safest down")
    axes.invert_xaxis()
    if calibration.knobs:
      axes.set(xticks=x, xticklabels=calibration.knobs, xlabel="the best first")
  axes.set_title(found, fontsize=10)
  axes.legend(frameon=False, fontsize=9)
  return axes
