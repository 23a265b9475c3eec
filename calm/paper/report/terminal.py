"""The main table and the coloured outputs in a terminal."""

import dataclasses
from collections.abc import Sequence
from typing import TextIO, cast

from rich import console as rich_console
from rich import markup as rich_markup
from rich import table as rich_table

from calm.calibrate.generations.shown import visible
from calm.inference import colours
from calm.paper.experiments import examples, suite
from calm.paper.report import document, page
from calm.paper.report.tables import Table, number, threshold, times


def print_report(
  console: rich_console.Console, reports: Sequence[suite.TaskReport], *, outputs: int = 2
) -> None:
  """Prints Table 2 and some outputs of every task.

  Args:
    console: where to.
    reports: one entry a task.
    outputs: examples a task.
  """
  for report in reports:
    print_table(console, narrow(document.gains_table(report)))
    for measure in report.examples[:1]:
      print_examples(console, measure, outputs)


def narrow(table: Table) -> Table:
  """Table 2 with the last method's columns only: both do not fit a terminal."""
  (_, words), *_, (method, span) = table.groups
  shown = [*range(words), *range(len(table.columns) - span, len(table.columns))]
  pick = lambda cells: tuple(cells[i] for i in shown)
  return dataclasses.replace(
    table,
    title=f"{table.title}, {method}",
    columns=pick(table.columns),
    rows=tuple(pick(row) for row in table.rows),
    groups=(),
  )


def print_table(console: rich_console.Console, table: Table) -> None:
  """A table with its note."""
  drawn = rich_table.Table(title=table.title, title_justify="left", padding=(0, 1))
  for index, head in enumerate(table.heads):
    drawn.add_column(head, justify="left" if index < table.text_columns else "right")
  previous = None
  for row in table.rows:
    if previous is not None and row[: table.text_columns - 1] != previous:
      drawn.add_section()
    previous = row[: table.text_columns - 1]
    drawn.add_row(*(rich_markup.escape(visible(cell)) for cell in row))
  console.print(drawn)
  if table.note:
    console.print(visible(table.note), style="dim", markup=False, highlight=False)


def print_examples(console: rich_console.Console, found: examples.Examples, count: int) -> None:
  """Outputs at the threshold shown first, each token on its layers' colour."""
  level_at = found.chosen
  console.print(
    f"\nmeasure {found.measure}, threshold {threshold(found.thresholds[level_at])}",
    highlight=False,
  )
  mode = colours.terminal_mode(stream=cast(TextIO, console.file))
  print(colours.legend_terminal(found.num_layers, mode=mode), file=console.file)
  for item in found.items[:count]:
    level = item.levels[level_at]
    pieces = page.visible(level.pieces)
    text = colours.to_terminal(pieces, level.exit_layers, found.num_layers, mode=mode)
    console.print(f"\n{visible(item.id)}", style="dim", markup=False, highlight=False)
    for name, value in (("reference", item.reference), ("full", item.full)):
      console.print(
        f"  {name:<10} {visible(value)}", markup=False, highlight=False, soft_wrap=True
      )
    print(f"  {'early':<10} {text}", file=console.file)
    console.print(
      f"  D {number(level.distance)}, R {number(level.risk_difference)}, {level.layers:.2f}"
      f" layers, speed-up {times(level.speedup)}",
      style="dim",
      highlight=False,
    )
