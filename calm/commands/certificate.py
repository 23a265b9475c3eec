"""A calibration on the terminal: its thresholds as a table, and its promise in words."""

from rich import console as rich_console
from rich import markup as rich_markup
from rich import table as rich_table

from calm import calibrate as calibrate_lib
from calm.calibrate import generations, thresholds
from calm.calibrate.generations import columns
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
  for name in (_unit(result), "mean loss", "upper bound", "p-value", "certified"):
    table.add_column(name, justify="right")
  if layers:
    table.add_column("layers / token", justify="right")
  place = result.promise.place([row.rejected for row in result.rows])
  for number, row in enumerate(result.rows):
    cells = [
      _name(result, number),
      f"{row.mean:.4f}",
      f"{row.upper_bound:.4f}",
      f"{row.p_value:.3g}",
      "yes" if row.rejected else "no",
    ]
    if layers:
      cells.append(f"{layers[row.threshold]:.2f}")
    table.add_row(*cells, style="bold" if number == place else None)
  console.print(table)
  console.print(
    f"Calibrated {_unit(result)}: [bold]"
    f"{thresholds.NEVER_EXIT_TEXT if place is None else _name(result, place)}[/bold]"
    f" ({rich_markup.escape(visible(result.reason))})"
  )
  console.print(visible(result.guarantee), markup=False)


def _names(result: calibrate_lib.Calibration) -> tuple[str, ...]:
  """What rows are called, where that is no threshold."""
  return result.knobs or getattr(result.promise, "configurations", ())


def _name(result: calibrate_lib.Calibration, place: int) -> str:
  if _names(result):
    return rich_markup.escape(visible(_names(result)[place]))
  return thresholds.format_threshold(result.rows[place].threshold)


def _unit(result: calibrate_lib.Calibration) -> str:
  if result.knobs:
    return "knob"
  return "configuration" if _names(result) else "threshold"


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
