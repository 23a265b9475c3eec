"""Sections as one HTML file that needs no network, as files, and in a terminal."""

import dataclasses
import pathlib
from collections.abc import Sequence

import markupsafe
from rich import console as rich_console

from calm import storage
from calm.console import print_table, print_text
from calm.inference import panel
from calm.paper import experiments, figures, findings
from calm.paper.sections import INTERVALS, Section, gains_table


@dataclasses.dataclass(frozen=True)
class Page:
  """A whole report."""

  title: str  # of the page
  # (name, value) about the model, the machine and the command.
  facts: tuple[tuple[str, str], ...]
  sections: tuple[Section, ...]  # in the order of reading
  num_layers: int  # decoder layers of the model, for the colours
  # (speed-up, the result in a sentence) of each task, under the title.
  headlines: tuple[tuple[str, str], ...] = ()


def render(page: Page) -> str:
  """The page as HTML; text of others is shown with its control and direction marks visible."""
  environment = panel.environment("calm.paper", page.num_layers)
  environment.filters["inline"] = lambda figure: markupsafe.Markup(figure.inline)
  return environment.get_template("page.html.j2").render(page=page, on_dark=figures.ON_DARK)


def write(output: pathlib.Path, page: Page) -> str:
  """Writes index.html, figures/ and tables/; returns a sentence that says so."""
  figures = [figure for section in page.sections for figure in section.figures]
  tables = [table for section in page.sections for table in section.tables]
  files: dict[str, str | bytes] = {}
  for figure in figures:
    files |= {
      f"figures/{figure.name}.svg": figure.svg,
      f"figures/{figure.name}.png": figure.png,
    }
  for table in tables:
    files |= {f"tables/{table.name}.csv": table.csv, f"tables/{table.name}.md": table.markdown}
  for name, content in (files | {"index.html": render(page)}).items():
    (output / name).parent.mkdir(parents=True, exist_ok=True)
    storage.write_atomically(output / name, content)
  return f"{len(figures)} figures, {len(tables)} tables and one page are in {output}"


def print_report(
  console: rich_console.Console, reports: Sequence[experiments.TaskReport]
) -> None:
  """Prints every task's headline and Table 2 in a terminal."""
  for report in reports:
    print_text(console, f"\n{findings.headline(report)}", "bold")
    table = gains_table(report)
    # The headline and the page have the intervals.
    shown = [i for i, head in enumerate(table.heads) if "95 %" not in head]
    print_table(
      console,
      [table.heads[i] for i in shown],
      [[row[i] for i in shown] for row in table.rows],
      title=table.title,
      words=table.text_columns,
    )
    print_text(console, table.note.replace(INTERVALS, ""), "dim")
