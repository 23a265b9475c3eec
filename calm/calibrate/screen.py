"""Text and tables on a terminal of any width, whatever is written in them.

Where a table's columns do not fit, a row is some lines of words.
"""

import re
import textwrap
from collections.abc import Sequence

from rich import box as rich_box
from rich import console as rich_console
from rich import measure as rich_measure
from rich import table as rich_table
from rich import text as rich_text

from calm.calibrate.generations.shown import visible


def say(
  console: rich_console.Console, text: object, style: str = "", *, soft_wrap: bool = False
) -> None:
  """Prints a text of others as it is: no markup, no emoji codes, no control characters.

  Args:
    console: where to.
    text: anything; see `generations.shown.visible`.
    style: of all of it.
    soft_wrap: whether the terminal folds long lines, so that they can be copied.
  """
  console.print(rich_text.Text(visible(text), style), soft_wrap=soft_wrap)


def print_table(
  console: rich_console.Console,
  heads: Sequence[str],
  rows: Sequence[Sequence[str]],
  *,
  title: str = "",
  words: int = 1,
  bold: int | None = None,
) -> None:
  """Prints a table; what others wrote in it is shown and does nothing.

  Heads break between words where that makes room, then lines between columns go, and in the
  end every row becomes a paragraph.

  Args:
    console: where to.
    heads: of the columns.
    rows: cells, as many as heads in each.
    title: above the table.
    words: columns that hold words, aligned left, from the first on; the last of them does not
      repeat, the others part the table where they change.
    bold: position of a row that stands out.
  """
  stacked = [re.sub(r" (?!/)", "\n", head) for head in heads]
  for names, box in (
    (heads, rich_box.HEAVY_HEAD),
    (stacked, rich_box.HEAVY_HEAD),
    (stacked, rich_box.SIMPLE_HEAD),
  ):
    table = _table(names, rows, title, words, bold, box)
    anywhere = console.options.update(width=10_000)
    if rich_measure.Measurement.get(console, anywhere, table).maximum <= console.width:
      console.print(table)
      return
  if title:
    console.print(rich_text.Text(visible(title), "italic"))
  for number, row in enumerate(rows):
    console.print(_paragraph(heads, row, words, console.width, number == bold))


def _table(heads, rows, title: str, words: int, bold: int | None, box) -> rich_table.Table:
  table = rich_table.Table(
    title=rich_text.Text(visible(title)) if title else None,
    title_justify="left",
    box=box,
    show_edge=box is rich_box.HEAVY_HEAD,
    padding=(0, 1) if box is rich_box.HEAVY_HEAD else (0, 1, 0, 0),
  )
  for index, head in enumerate(heads):
    table.add_column(
      rich_text.Text(visible(head)), justify="left" if index < words else "right"
    )
  previous = None
  for number, row in enumerate(rows):
    if previous is not None and row[: words - 1] != previous:
      table.add_section()
    previous = row[: words - 1] if words > 1 else None
    cells = [rich_text.Text(visible(cell)) for cell in row]
    table.add_row(*cells, style="bold" if number == bold else None)
  return table


def _paragraph(heads, row, words: int, width: int, bold: bool) -> rich_text.Text:
  """`0.12: mean loss 0.05, ...`, folded."""
  name = " ".join(visible(cell) for cell in row[: max(1, words)] if cell)
  pairs = zip(heads[max(1, words) :], row[max(1, words) :], strict=True)
  told = ", ".join(f"{visible(head)} {visible(cell)}" for head, cell in pairs if cell)
  lines = textwrap.wrap(f"{name}: {told}", width, subsequent_indent="  ")
  return rich_text.Text("\n".join(lines), "bold" if bold else "")
