"""Figures, in styles that print and colour-vision deficiencies survive, and
tables: as one HTML file that needs no network, and as files.
"""

import csv
import dataclasses
import io
import itertools
import math
import pathlib
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import markupsafe
import matplotlib
import numpy as np
from matplotlib import axes as mpl_axes
from matplotlib import figure as mpl_figure

from calm import storage
from calm.console import sanitize
from calm.inference import panel
from calm.inference.panel import number
from calm.paper import experiments

# Placeholders that the page replaces by its own colours.
INK = "#111213"
RULE = "#cdcecf"
_TITLE_COLUMNS = 52
_SIZE = (4.7, 3.5)  # inches; narrow, so that text stays legible on a phone
_RC: dict[Any, Any] = {
  "svg.fonttype": "none",  # text stays text: found, selected and read aloud
  "axes.edgecolor": INK,
  "axes.labelcolor": INK,
  "axes.grid": True,
  "axes.axisbelow": True,
  "axes.spines.top": False,
  "axes.spines.right": False,
  "grid.color": RULE,
  "grid.linewidth": 0.6,
  "text.color": INK,
  "xtick.color": INK,
  "ytick.color": INK,
  "legend.frameon": False,
  "legend.fontsize": 9,
  "lines.markersize": 4.5,
}


@dataclasses.dataclass(frozen=True)
class Figure:
  """One drawn figure."""

  name: str  # file name without its ending; unique in a report
  title: str  # above the figure
  caption: str  # what it shows and how to read it
  svg: str  # a whole SVG file, its own colours
  png: bytes  # the same as PNG

  @property
  def inline(self) -> str:
    """The SVG element with the page's colours and ids that no other figure
    has.
    """
    svg = self.svg[self.svg.index("<svg") :]
    svg = svg.replace(INK, "currentColor").replace(RULE, "var(--rule)")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<0>{self.name}-", svg)
    # The page sets the width; the view box keeps the shape.
    for size in ("height", "width"):
      svg = re.sub(rf'<svg ([^>]*?){size}="[^"]*" ?', r"<svg \1", svg, count=1)
    return svg


# Series -> (colour, marker, line). The nine colours stay apart for deuteranopes
# and protanopes, on light and on dark pages.
STYLES: Mapping[str, tuple[str, str, str]] = {
  "softmax": ("#0077aa", "o", "-"),
  "shortlist": ("#8844ff", "D", "--"),
  "classifier": ("#dd6600", "s", "-"),
  "state": ("#889966", "^", "-."),
  experiments.STATIC: ("#997766", "x", ":"),
  experiments.ORACLE: ("#7766dd", "*", "none"),
}
# For all others, such as 'softmax@2,4' or a schedule, by their turn.
_OTHERS = [
  (colour, marker, line)
  for line in ("-", "--")
  for colour, marker in (("#339999", "v"), ("#bb5533", "P"), ("#6688ee", "h"))
]


def series_title(name: str) -> str:
  """The title of a series for a reader."""
  measure, _, layers = name.partition("@")
  title = "softmax, shortlist first" if measure == "shortlist" else measure
  return f"{title}, exits {layers}" if layers else title


@dataclasses.dataclass(frozen=True)
class Series:
  """Points of one look, with the interval of each where there is one."""

  name: str
  x: Sequence[float]
  y: Sequence[float]
  ends: Sequence[experiments.Interval] | None = None
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def curve_series(
  curves: Mapping[str, Iterable[experiments.Point]], x: str, y: str
) -> list[Series]:
  """Every curve by two fields of its points; shares as hundredths."""
  scale = {"layers": 1.0, "seconds": 1e3, "quality": 100, "similarity": 100}

  def values(points, field):
    return [scale[field] * getattr(point, field) for point in points]

  return [
    Series(name, values(made, x), values(made, y))
    for name, made in curves.items()
  ]


def draw(
  name: str,
  title: str,
  caption: str,
  labels: tuple[str, str],
  series: Iterable[Series],
  adjust: Callable[[mpl_axes.Axes], Any] = lambda axes: None,
) -> Figure:
  """A figure of one panel; `labels` are those of x and y, `adjust` comes
  last.
  """
  title = sanitize(
    title[:1].upper() + title[1:] if title[:1].isascii() else title
  )
  with matplotlib.rc_context({**_RC, "svg.hashsalt": name}):
    figure = mpl_figure.Figure(figsize=_SIZE, layout="constrained")
    axes = figure.subplots()
    others = itertools.cycle(_OTHERS)
    for each in series:
      colour, marker, line = STYLES.get(each.name) or next(others)
      look: dict[str, Any] = {
        "color": colour,
        "marker": marker,
        "linestyle": line,
      }
      look |= {"markersize": 11} if marker == "*" else {}
      look |= {"label": series_title(each.name), **each.options}
      bars = each.ends and np.abs(np.transpose(each.ends) - np.asarray(each.y))
      axes.errorbar(each.x, each.y, bars, elinewidth=0.8, capsize=2, **look)
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    adjust(axes)
    handles, names = axes.get_legend_handles_labels()
    if len(handles) > 1:
      figure.legend(
        handles, names, loc="outside lower center", ncols=min(3, len(handles))
      )
    svg = io.StringIO()
    png = io.BytesIO()
    figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
    lines = textwrap.fill(title, _TITLE_COLUMNS)
    figure.suptitle(
      lines, x=0.02, ha="left", fontsize=10, fontweight="bold", parse_math=False
    )
    figure.savefig(
      png, format="png", dpi=160, facecolor="white", metadata={"Software": None}
    )
  return Figure(name, title, caption, svg.getvalue(), png.getvalue())


def full_depth(axes: mpl_axes.Axes, full: experiments.Point) -> None:
  """The full model's quality and its 95 % interval, as a line and a band."""
  low, high = experiments.normal_interval(
    100.0 * full.quality, 100.0 * full.quality_error
  )
  axes.axhline(100.0 * full.quality, color=INK, linewidth=0.8, linestyle=":")
  if not math.isnan(low):
    axes.axhspan(low, high, color=INK, alpha=0.07, linewidth=0)


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
  # columns that hold words, aligned left, from the first on
  text_columns: int = 1

  @property
  def csv(self) -> str:
    """The table as CSV with one line of heads."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([self.columns, *self.rows])
    return out.getvalue()


def percent(value: float, digits: int = 1) -> str:
  """A share in [0, 1] as a number of hundredths, or a dash."""
  return number(100.0 * value, digits)


def times(value: float) -> str:
  """A ratio like ×1.31, or a dash."""
  return "–" if math.isnan(value) else f"×{value:.2f}"


def interval(ends: tuple[float, float], digits: int = 2) -> str:
  """An interval like `0.02 to 0.12`, or a dash where it is unknown."""
  if any(map(math.isnan, ends)):
    return "–"
  return f"{number(ends[0], digits)} to {number(ends[1], digits)}"


class Section(NamedTuple):
  """One part of the page."""

  name: str  # anchor
  title: str  # heading
  text: str  # one paragraph, or none
  figures: list[Figure]  # side by side where there is room
  tables: list[Table]  # below the figures
  panels: list[experiments.Task]  # tasks whose coloured outputs are shown


@dataclasses.dataclass(frozen=True)
class Page:
  """A whole report."""

  title: str  # of the page
  # (name, value) about the model, machine and command
  facts: tuple[tuple[str, str], ...]
  sections: Sequence[Section]  # in the order of reading
  num_layers: int  # decoder layers of the model, for the colours
  # (speed-up, the result in a sentence) of each task, under the title.
  headlines: tuple[tuple[str, str], ...] = ()


def render(page: Page) -> str:
  """The page as HTML; text of others is shown with its control and direction
  marks visible.
  """
  environment = panel.environment("calm.paper", page.num_layers)
  environment.filters["inline"] = lambda figure: markupsafe.Markup(
    figure.inline
  )
  return environment.get_template("page.html.j2").render(page=page)


def write(output: pathlib.Path, page: Page) -> str:
  """Writes index.html, figures/ and tables/; returns a sentence that says
  so.
  """
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
  return (
    f"{len(drawn)} figures, {len(tables)} tables and one page are in {output}"
  )
