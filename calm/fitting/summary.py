"""One page about a fit, as Markdown and as HTML that needs no network."""

import math
from collections.abc import Mapping

import jinja2
import markupsafe

from calm.calibrate import thresholds as thresholds_lib
from calm.fitting import curve
from calm.fitting.choose import Choice
from calm.fitting.options import FitOptions
from calm.fitting.result import Result, ShownText
from calm.inference import colours
from calm.paper.report import page


def pages(result: Result, options: FitOptions, folder: str) -> Mapping[str, str]:
  """File name -> text of the summaries.

  Args:
    result: the fit.
    options: what it was asked for.
    folder: where it lies, for the commands that are shown.
  """
  environment = jinja2.Environment(
    loader=jinja2.PackageLoader("calm.fitting", "templates"),
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
    finalize=page.shown,
    autoescape=jinja2.select_autoescape(["html.j2"]),
  )
  environment.filters["number"] = number
  environment.filters["times"] = lambda value: "–" if math.isnan(value) else f"x{value:.2f}"
  environment.filters["threshold"] = thresholds_lib.format_threshold
  values = {
    "result": result,
    "options": options,
    "folder": folder,
    "headline": result.headline(options),
    "certified": result.last.risk is not None,
    "never": thresholds_lib.NEVER_EXIT,
  }
  figure = curve.draw(result, options)
  html = environment.get_template("summary.html.j2").render(
    **values,
    figure=None if figure is None else markupsafe.Markup(figure.inline),
    coloured=lambda example: coloured(example, result.num_layers),
    legend=markupsafe.Markup(colours.legend_html(result.num_layers)),
  )
  markdown = environment.get_template("summary.md.j2").render(
    **values, plain=lambda example: plain(example, result.num_layers)
  )
  return {"summary.md": markdown, "summary.html": html}


def number(value: float, digits: int = 2) -> str:
  """A number for a table; a dash where there is none."""
  return "–" if math.isnan(value) else f"{value:.{digits}f}"


def coloured(example: ShownText, num_layers: int) -> markupsafe.Markup:
  """A text with its tokens on the colours of their layers."""
  confidences = example.confidences or None
  return markupsafe.Markup(
    colours.to_html(
      example.pieces, example.exit_layers, num_layers, confidences=confidences, legend=False
    )
  )


def plain(example: ShownText, num_layers: int) -> str:
  """The same with the number of layers before each run of tokens, on one line."""
  text = colours.to_terminal(example.pieces, example.exit_layers, num_layers, mode="plain")
  return " ".join(text.replace("`", "'").split())


def tried_lines(choice: Choice) -> list[str]:
  """What was tried, the fastest first, a line each; last, what was only looked at first.

  A first look has seconds of its own, on fewer prompts: every line says what it found, since
  by that some went on and others did not.
  """
  lines = []
  speed = lambda entry: 0.0 if math.isnan(entry.speedup) else entry.speedup
  order = sorted(choice.tried, key=lambda entry: (not entry.decoded, -speed(entry)))
  for entry in order:
    if math.isnan(entry.speedup):
      lines.append(f"  {entry.candidate}: no threshold within the tolerance")
      continue
    at = f"at threshold {thresholds_lib.format_threshold(entry.threshold)}"
    found = f"x{entry.speedup:.2f} as fast {at}, " if entry.decoded else ""
    rest = "" if entry.decoded else f", {at}"
    mark = " (chosen)" if choice.best is entry else ""
    first = f"x{entry.first_speedup:.2f} in a first look"
    lines.append(f"  {entry.candidate.described(entry.threshold)}: {found}{first}{rest}{mark}")
  return lines
