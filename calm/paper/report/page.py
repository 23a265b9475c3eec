"""Sections -> one HTML file that needs no network: styles, figures and script inside."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import markupsafe

from calm.console import sanitize
from calm.inference import drawing, outputs, result_cache
from calm.paper.experiments import examples
from calm.paper.report.section import Panel, Section
from calm.paper.report.tables import number, threshold


@dataclasses.dataclass(frozen=True)
class Page:
  """A whole report.

  Attributes:
    title: of the page.
    facts: (name, value) about the model, the machine and the command.
    sections: in the order of reading.
    num_layers: decoder layers of the model, for the colours.
    headlines: what was found, one sentence a task, under the title.
  """

  title: str
  facts: tuple[tuple[str, str], ...]
  sections: tuple[Section, ...]
  num_layers: int
  headlines: tuple[str, ...] = ()


def render(page: Page) -> str:
  """The page as HTML."""
  environment = jinja2.Environment(
    loader=jinja2.PackageLoader("calm.paper.report", "templates"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
    finalize=shown,
  )
  environment.filters["inline"] = lambda figure: markupsafe.Markup(figure.inline)
  environment.filters["data"] = _script_data
  environment.filters["threshold"] = threshold
  environment.filters["number"] = number
  return environment.get_template("page.html.j2").render(
    page=page,
    palette=_palette(page.num_layers),
    on_dark=drawing.ON_DARK,
    panel_data=panel_data,
    certified_text=certified_text,
    first_level=lambda item, measure: item.levels[measure.chosen],
  )


def shown(value: Any) -> Any:
  """What a template writes: text of others with its control and direction marks visible."""
  return sanitize(value) if type(value) is str else value


def _palette(num_layers: int) -> list[tuple[int, str, str]]:
  """(layer, background, text colour) of every layer."""
  return [
    (layer, colour, outputs.text_colour(colour))
    for layer, colour in enumerate(outputs.scale(num_layers), start=1)
  ]


def panel_data(panel: Panel) -> dict[str, Any]:
  """What the slider needs, without the prompts, which stand on the page already."""
  return {
    "measures": [
      {
        "name": measure.measure,
        "chosen": measure.chosen,
        "certified": certified_text(measure.certified),
        "thresholds": list(measure.thresholds),
        "items": [[_level(level) for level in item.levels] for item in measure.items],
      }
      for measure in panel.measures
    ]
  }


def certified_text(certified: examples.Certified | None) -> str:
  """What stands under the slider about the point where it begins."""
  if certified is None:
    return "nothing is certified: the safest threshold is shown"
  return (
    f"certified: at {threshold(certified.threshold)} the mean distance is at most"
    f" {certified.tolerance:g}, with probability {1.0 - certified.error_rate:.10g}"
  )


def _level(level: examples.Level) -> Mapping[str, Any]:
  return {
    "p": visible(level.pieces),
    "l": level.exit_layers,
    "c": level.confidences,
    "m": round(level.layers, 3),
    "d": round(level.distance, 3),
    "r": round(level.risk_difference, 3),
  }


def visible(pieces: Sequence[str]) -> list[str]:
  """Pieces as text: SentencePiece's mark is a space, the first of a text is dropped."""
  text = [sanitize(piece).replace("\u2581", " ") for piece in pieces]
  return [text[0].lstrip(" "), *text[1:]] if text else []


def _script_data(value: Any) -> markupsafe.Markup:
  """JSON that is safe inside a script element."""
  text = json.dumps(result_cache.to_json(value), ensure_ascii=False, separators=(",", ":"))
  return markupsafe.Markup(text.replace("<", "\\u003c").replace("\u2028", "\\u2028"))
