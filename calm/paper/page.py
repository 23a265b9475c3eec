"""Sections as one HTML file that needs no network, as files, and in a terminal."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jinja2
import markupsafe
from rich import console as rich_console

from calm import storage
from calm.console import print_table, print_text, sanitize
from calm.inference import outputs, result_cache
from calm.paper import experiments, figures, findings
from calm.paper.sections import INTERVALS, Section, gains_table
from calm.paper.tables import number, threshold


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
  environment = jinja2.Environment(
    loader=jinja2.PackageLoader("calm.paper", "templates"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
    finalize=lambda value: sanitize(value) if type(value) is str else value,
  )
  environment.filters["inline"] = lambda figure: markupsafe.Markup(figure.inline)
  environment.filters["data"] = script_data
  environment.filters["threshold"] = threshold
  environment.filters["number"] = number
  scale = enumerate(outputs.scale(page.num_layers), start=1)
  return environment.get_template("page.html.j2").render(
    page=page,
    palette=[(layer, colour, outputs.text_colour(colour)) for layer, colour in scale],
    on_dark=figures.ON_DARK,
    panel_data=panel_data,
    first_promise=first_promise,
    promise_text=promise_text,
  )


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


def panel_data(measures: Sequence[experiments.Examples]) -> dict[str, Any]:
  """The sliders' numbers, without the prompts, which stand on the page already."""
  return {
    "measures": [
      {
        "thresholds": list(map(threshold, measure.thresholds)),
        "promised": [
          [tolerance, at, promise_text(measure, tolerance, at)]
          for tolerance, at in measure.promised
        ],
        "items": [
          [
            {
              "p": visible(level.pieces),
              "l": level.exit_layers,
              "c": level.confidences,
              "m": round(level.layers, 3),
              "d": round(level.distance, 3),
              "r": round(level.risk_difference, 3),
            }
            for level in item.levels
          ]
          for item in measure.items
        ],
      }
      for measure in measures
    ]
  }


def promise_text(measure: experiments.Examples, tolerance: float, at: int) -> str:
  """The sentence under the sliders about a tolerance."""
  if not at:
    return f"δ = {tolerance:g}: nothing is certified, the full model serves"
  return (
    f"δ = {tolerance:g}: at threshold {threshold(measure.thresholds[at])} the mean distance is"
    f" at most {tolerance:g}, with probability {1.0 - measure.error_rate:.10g}"
  )


def first_promise(measure: experiments.Examples) -> int:
  """Position of the least tolerance that something is certified for, which is shown first."""
  return next((i for i, (_, at) in enumerate(measure.promised) if at), 0)


def visible(pieces: Sequence[str]) -> list[str]:
  """Pieces as text: SentencePiece's mark is a space, the first of a text is dropped."""
  text = [sanitize(piece).replace("\u2581", " ") for piece in pieces]
  return [text[0].lstrip(" "), *text[1:]] if text else []


def script_data(value: Any) -> markupsafe.Markup:
  """JSON that is safe inside a script element."""
  text = json.dumps(result_cache.to_json(value), ensure_ascii=False, separators=(",", ":"))
  return markupsafe.Markup(text.replace("<", "\\u003c").replace("\u2028", "\\u2028"))


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
