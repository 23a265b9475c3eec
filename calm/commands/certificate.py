"""A calibration on the terminal: its thresholds as a table, and its promise in words."""

import pathlib
from collections.abc import Sequence

from rich import console as rich_console
from rich import markup as rich_markup

from calm import calibrate as calibrate_lib
from calm.calibrate import generations, ledger, thresholds, views
from calm.calibrate.generations import columns
from calm.console import print_table, print_text, sanitize


def print_calibration(
  console: rich_console.Console,
  result: calibrate_lib.Calibration,
  cached: generations.Generations | None = None,
) -> None:
  """The table of the tested thresholds and the promise in words."""
  layers = mean_layers(cached)
  heads = [views.unit(result), "mean loss", "upper bound", "p-value", "certified"]
  rows, chosen = [], views.place(result)
  for name, row in zip(views.names(result), result.rows, strict=True):
    cells = [
      name,
      f"{row.mean:.4f}",
      f"{row.upper_bound:.4f}",
      f"{row.p_value:.2g}",
      "yes" if row.rejected else "no",
    ]
    rows.append([*cells, f"{layers[row.threshold]:.2f}"] if layers else cells)
  heads += ["layers / token"] if layers else []
  title = f"{views.title(result)}; p-values: {result.method}"
  print_table(console, heads, rows, title=title, words=0, bold=chosen)
  found = thresholds.NEVER_EXIT_TEXT if chosen is None else views.names(result)[chosen]
  console.print(
    f"Calibrated {views.unit(result)}: [bold]{rich_markup.escape(sanitize(found))}[/bold]"
    f" ({rich_markup.escape(sanitize(result.reason))})"
  )
  print_text(console, result.guarantee)


def record(
  console: rich_console.Console,
  folder: str | pathlib.Path,
  result: calibrate_lib.Calibration,
  prompts: Sequence[calibrate_lib.Prompt],
) -> None:
  """Writes the folder's ledger, and says what else was asked of the same prompts."""
  said = ledger.keep(folder, result, prompts)
  if said:
    print_text(console, said, "yellow")


def mean_layers(cached: generations.Generations | None) -> dict[float, float]:
  """Mean decoder layers a token at every threshold, where the outputs record exits."""
  if cached is None:
    return {}
  counts = {}
  for threshold, column in zip(cached.thresholds.tolist(), cached.records, strict=True):
    sums = columns.layer_sums(column)
    if sums is None or not sums[1].sum():
      return {}
    counts[threshold] = float(sums[0].sum() / sums[1].sum())
  return counts
