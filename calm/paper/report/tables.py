"""Tables as CSV, as Markdown and as cells for the page."""

import csv
import dataclasses
import io
import math
from collections.abc import Sequence

from calm.calibrate import thresholds


@dataclasses.dataclass(frozen=True)
class Table:
  """A table of texts.

  Attributes:
    name: file name without its ending; unique in a report.
    title: short.
    columns: heads.
    rows: cells, as many as heads in each.
    groups: (head above, columns it spans), or none; together they span all columns.
    note: how to read it.
    text_columns: columns that hold words, aligned left, from the first on.
    wrap: whether cells hold sentences, which break into lines.
  """

  name: str
  title: str
  columns: tuple[str, ...]
  rows: tuple[tuple[str, ...], ...]
  groups: tuple[tuple[str, int], ...] = ()
  note: str = ""
  text_columns: int = 1
  wrap: bool = False

  def __post_init__(self):
    if any(len(row) != len(self.columns) for row in self.rows):
      raise ValueError(
        f"Expected `rows` of {self.name!r} to have {len(self.columns)} cells each, got others."
      )
    if self.groups and sum(span for _, span in self.groups) != len(self.columns):
      raise ValueError(
        f"Expected `groups` of {self.name!r} to span all {len(self.columns)} columns, got"
        " others."
      )

  @property
  def heads(self) -> tuple[str, ...]:
    """Heads that stand alone: with the group's in front where there are groups."""
    above = [label for label, span in self.groups for _ in range(span)]
    if not above:
      return self.columns
    return tuple(
      f"{label}: {head}" if label else head
      for label, head in zip(above, self.columns, strict=True)
    )

  @property
  def csv(self) -> str:
    """The table as CSV with one line of heads."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerows([self.heads, *self.rows])
    return out.getvalue()

  @property
  def markdown(self) -> str:
    """The table as Markdown, title and note included."""
    mark = ["---"] * self.text_columns + ["---:"] * (len(self.columns) - self.text_columns)
    lines = [_line(self.heads), _line(mark), *map(_line, self.rows)]
    note = f"\n{self.note}\n" if self.note else ""
    return f"**{self.title}**\n\n" + "\n".join(lines) + "\n" + note


def _line(cells: Sequence[str]) -> str:
  return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def number(value: float, digits: int = 2) -> str:
  """A number, or a dash for NaN."""
  return "–" if math.isnan(value) else f"{value:.{digits}f}"


def percent(value: float, digits: int = 1) -> str:
  """A share in [0, 1] as a number of hundredths, or a dash."""
  return number(100.0 * value, digits)


def times(value: float) -> str:
  """A ratio like ×1.31, or a dash."""
  return "–" if math.isnan(value) else f"×{value:.2f}"


def threshold(value: float) -> str:
  """A threshold, short; `never` for the full model."""
  if value == thresholds.NEVER_EXIT:
    return thresholds.NEVER_EXIT_TEXT
  return f"{value:.4g}"
