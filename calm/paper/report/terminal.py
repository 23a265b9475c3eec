"""The main table and the coloured outputs in a terminal."""

from collections.abc import Sequence
from typing import TextIO, cast

from rich import console as rich_console

from calm.console import print_table, print_text
from calm.inference import outputs
from calm.paper.experiments import examples, suite
from calm.paper.report import findings, page, table2
from calm.paper.report.tables import Table, number, threshold


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
    print_text(console, f"\n{findings.headline(report)}", "bold")
    print_report_table(console, table2.gains_table(report))
    for measure in report.examples[:1]:
      print_examples(console, measure, outputs)


def print_report_table(console: rich_console.Console, table: Table) -> None:
  """A table with its note."""
  # The headline and the page have the intervals.
  shown = [i for i, head in enumerate(table.heads) if "95 %" not in head]
  print_table(
    console,
    [table.heads[i] for i in shown],
    [[row[i] for i in shown] for row in table.rows],
    title=table.title,
    words=table.text_columns,
  )
  if table.note:
    print_text(console, table.note.replace(table2.INTERVALS, ""), "dim")


def print_examples(console: rich_console.Console, found: examples.Examples, count: int) -> None:
  """Outputs at the threshold shown first, each token on its layers' colour."""
  level_at = found.chosen
  console.print(
    f"\nmeasure {found.measure}, threshold {threshold(found.thresholds[level_at])}",
    highlight=False,
  )
  mode = outputs.terminal_mode(stream=cast(TextIO, console.file))
  if mode != "plain":
    print(outputs.legend_terminal(found.num_layers, mode=mode), file=console.file)
  for item in found.items[:count]:
    level = item.levels[level_at]
    pieces = page.visible(level.pieces)
    text = outputs.to_terminal(pieces, level.exit_layers, found.num_layers, mode=mode)
    print_text(console, f"\n{item.id}", "dim")
    for name, value in (("reference", item.reference), ("full", item.full)):
      print_text(console, f"  {name:<10} {value}", soft_wrap=True)
    layers = f"{level.layers:.2f} layers a token"
    if mode == "plain":
      print_text(console, f"  {'early':<10} {''.join(pieces)}", soft_wrap=True)
      layers = f"layers {' '.join(map(str, level.exit_layers))}"
    else:
      print(f"  {'early':<10} {text}", file=console.file)
    told = f"D {number(level.distance)}, R {number(level.risk_difference)}, {layers}"
    print_text(console, f"  {told}", "dim")
