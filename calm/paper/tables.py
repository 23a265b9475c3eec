"""Tables as CSV, as Markdown and as cells for the page."""

import csv
import dataclasses
import io
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from calm.inference.panel import number

# A head, and its cell for one entry.
Column = tuple[str, Callable[[Any], str]]


@dataclasses.dataclass(frozen=True)
class Table:
  """A table of texts."""

  name: str  # file name without its ending; unique in a report
  title: str  # short
  columns: tuple[str, ...]  # heads
  rows: tuple[tuple[str, ...], ...]  # cells, as many as heads in each
  # (head above, columns it spans), or none; together they span all columns.
  groups: tuple[tuple[str, int], ...] = ()
  note: str = ""  # how to read it
  text_columns: int = 1  # columns that hold words, aligned left, from the first on

  @property
  def heads(self) -> tuple[str, ...]:
    """Heads that stand alone: with the group's in front where there are groups."""
    above = [label for label, span in self.groups for _ in range(span)]
    pairs = zip(above or [""] * len(self.columns), self.columns, strict=True)
    return tuple(f"{label}: {head}" if label else head for label, head in pairs)

  @property
  def csv(self) -> str:
    """The table as CSV with one line of heads."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([self.heads, *self.rows])
    return out.getvalue()

  @property
  def markdown(self) -> str:
    """The table as Markdown, title and note included."""
    mark = ["---"] * self.text_columns + ["---:"] * (len(self.columns) - self.text_columns)
    lines = [_line(self.heads), _line(mark), *map(_line, self.rows)]
    note = f"\n{self.note}\n" if self.note else ""
    return f"**{self.title}**\n\n" + "\n".join(lines) + "\n" + note


def tabulate(
  name: str, title: str, columns: Sequence[Column], entries: Iterable[Any], **options: Any
) -> Table:
  """A table with a row for each entry; `options` are other fields of `Table`."""
  rows = tuple(tuple(cell(entry) for _, cell in columns) for entry in entries)
  return Table(name, title, tuple(head for head, _ in columns), rows, **options)


def _line(cells: Sequence[str]) -> str:
  return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def percent(value: float, digits: int = 1) -> str:
  """A share in [0, 1] as a number of hundredths, or a dash."""
  return number(100.0 * value, digits)


def times(value: float) -> str:
  """A ratio like ×1.31, or a dash."""
  return "–" if math.isnan(value) else f"×{value:.2f}"


def interval(ends: tuple[float, float], digits: int = 2, dash: str = "–") -> str:
  """An interval like `0.02 to 0.12`, or a dash where it is unknown."""
  if any(map(math.isnan, ends)):
    return dash
  return f"{number(ends[0], digits)} to {number(ends[1], digits)}"
