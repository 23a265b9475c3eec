"""Sections with figures and tables as one HTML file that needs no network, and as files."""

import csv
import dataclasses
import io
import math
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import markupsafe

from calm import storage
from calm.inference import panel
from calm.inference.panel import number
from calm.paper.experiments import Task
from calm.paper.figures import Figure

# A head, and its cell for one entry.
Column = tuple[str, Callable[[Any], str]]


@dataclasses.dataclass(frozen=True)
class Table:
  """A table of texts."""

  name: str  # file name without its ending; unique in a report
  title: str  # short
  columns: tuple[str, ...]  # heads
  rows: tuple[tuple[str, ...], ...]  # cells, as many as heads in each
  note: str = ""  # how to read it
  text_columns: int = 1  # columns that hold words, aligned left, from the first on

  @property
  def csv(self) -> str:
    """The table as CSV with one line of heads."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([self.columns, *self.rows])
    return out.getvalue()


def tabulate(
  name: str, title: str, columns: Sequence[Column], entries: Iterable[Any], **options: Any
) -> Table:
  """A table with a row for each entry; `options` are other fields of `Table`."""
  rows = tuple(tuple(cell(entry) for _, cell in columns) for entry in entries)
  return Table(name, title, tuple(head for head, _ in columns), rows, **options)


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


class Section(NamedTuple):
  """One part of the page."""

  name: str  # anchor
  title: str  # heading
  text: str  # one paragraph, or none
  figures: list[Figure]  # side by side where there is room
  tables: list[Table]  # below the figures
  panels: list[Task]  # tasks whose coloured outputs are shown


@dataclasses.dataclass(frozen=True)
class Page:
  """A whole report."""

  title: str  # of the page
  facts: tuple[tuple[str, str], ...]  # (name, value) about the model, machine and command
  sections: Sequence[Section]  # in the order of reading
  num_layers: int  # decoder layers of the model, for the colours
  # (speed-up, the result in a sentence) of each task, under the title.
  headlines: tuple[tuple[str, str], ...] = ()


def render(page: Page) -> str:
  """The page as HTML; text of others is shown with its control and direction marks visible."""
  environment = panel.environment("calm.paper", page.num_layers)
  environment.filters["inline"] = lambda figure: markupsafe.Markup(figure.inline)
  return environment.get_template("page.html.j2").render(page=page)


def write(output: pathlib.Path, page: Page) -> str:
  """Writes index.html, figures/ and tables/; returns a sentence that says so."""
  drawn = [figure for section in page.sections for figure in section.figures]
  tables = [table for section in page.sections for table in section.tables]
  files: dict[str, str | bytes] = {"index.html": render(page)}
  for figure in drawn:
    files[f"figures/{figure.name}.svg"] = figure.svg
    files[f"figures/{figure.name}.png"] = figure.png
  files |= {f"tables/{table.name}.csv": table.csv for table in tables}
  for name, content in files.items():
    (output / name).parent.mkdir(parents=True, exist_ok=True)
    storage.write_atomically(output / name, content)
  return f"{len(drawn)} figures, {len(tables)} tables and one page are in {output}"
