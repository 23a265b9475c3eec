"""A calibration on the terminal: its thresholds as a table, and its promise in words."""

from rich import console as rich_console
from rich import markup as rich_markup
from rich import table as rich_table

from calm import calibrate as calibrate_lib
from calm.calibrate import generations, thresholds
from calm.calibrate.generations.shown import visible


def print_calibration(
  console: rich_console.Console,
  result: calibrate_lib.Calibration,
  cached: generations.Generations | None = None,
) -> None:
  """The table of the tested thresholds and the promise in words."""
  layers = mean_layers(cached)
  table = rich_table.Table(
    title=rich_markup.escape(
      visible(f"{result.kind} loss, {result.metric}; p-values: {result.method}")
    )
  )
  for name in ("threshold", "mean loss", "upper bound", "p-value", "certified"):
    table.add_column(name, justify="right")
  if layers:
    table.add_column("layers / token", justify="right")
  for row in result.rows:
    cells = [
      thresholds.format_threshold(row.threshold),
      f"{row.mean:.4f}",
      f"{row.upper_bound:.4f}",
      f"{row.p_value:.3g}",
      "yes" if row.rejected else "no",
    ]
    if layers:
      cells.append(f"{layers[row.threshold]:.2f}")
    style = "bold" if row.threshold == result.threshold else None
    table.add_row(*cells, style=style)
  console.print(table)
  console.print(
    f"Calibrated threshold: [bold]{thresholds.format_threshold(result.threshold)}[/bold]"
    f" ({rich_markup.escape(visible(result.reason))})"
  )
  console.print(visible(result.guarantee), markup=False)


def mean_layers(cached: generations.Generations | None) -> dict[float, float]:
  """Mean decoder layers a token at every threshold, where the outputs record exits."""
  if cached is None:
    return {}
  counts = {}
  for threshold, column in zip(cached.thresholds.tolist(), cached.records, strict=True):
    layers = [layer for record in column for layer in record.exit_layers or ()]
    if not layers:
      return {}
    counts[threshold] = sum(layers) / len(layers)
  return counts
