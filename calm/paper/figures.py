"""Figures: curves and intervals in styles that print and colour-vision deficiencies survive."""

import dataclasses
import io
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib import axes as mpl_axes
from matplotlib import figure as mpl_figure

from calm.console import sanitize
from calm.paper import scores
from calm.paper.experiments import ORACLE, STATIC

# Placeholders that the page replaces by its own colours.
INK, RULE = "#111213", "#cdcecf"
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
  title: str  # what was found, above the figure
  caption: str  # what it shows and how to read it
  svg: str  # a whole SVG file, its own colours
  png: bytes  # the same as PNG

  @property
  def inline(self) -> str:
    """The SVG element with the page's colours and ids that no other figure has."""
    svg = self.svg[self.svg.index("<svg") :]
    svg = svg.replace(INK, "currentColor").replace(RULE, "var(--rule)")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{self.name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{self.name}-\1)", svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{self.name}-\1"', svg)
    # The page sets the width; the view box keeps the shape.
    for size in ("height", "width"):
      svg = re.sub(rf'<svg ([^>]*?){size}="[^"]*" ?', r"<svg \1", svg, count=1)
    return svg


@dataclasses.dataclass(frozen=True)
class Style:
  """The look of one series."""

  colour: str
  marker: str
  line: str
  title: str


# Nine colours that stay apart for deuteranopes and protanopes, on light and on dark pages.
STYLES: Mapping[str, Style] = {
  "softmax": Style("#0077aa", "o", "-", "softmax"),
  "shortlist": Style("#8844ff", "D", "--", "softmax, shortlist first"),
  "classifier": Style("#dd6600", "s", "-", "classifier"),
  "state": Style("#889966", "^", "-.", "state"),
  STATIC: Style("#997766", "x", ":", "static"),
  ORACLE: Style("#7766dd", "*", "none", "oracle"),
}
# For all others, such as 'softmax@2,4' or a schedule, by their turn.
_VARIANTS = (("#339999", "v"), ("#bb5533", "P"), ("#6688ee", "h"))


def styles_of(names: Iterable[str]) -> dict[str, Style]:
  """The style of each series of a figure; those without one of their own take turns."""
  styles = {name: STYLES[name] for name in names if name in STYLES}
  variants = [name for name in dict.fromkeys(names) if name not in STYLES]
  for turn, name in enumerate(variants):
    colour, marker = _VARIANTS[turn % len(_VARIANTS)]
    line = "-" if turn < len(_VARIANTS) else "--"
    styles[name] = Style(colour, marker, line, series_title(name))
  return styles


def series_title(name: str) -> str:
  """The title of a series for a reader."""
  measure, _, layers = name.partition("@")
  title = STYLES[measure].title if measure in STYLES else measure
  return f"{title}, exits {layers}" if layers else title


@dataclasses.dataclass(frozen=True)
class Series:
  """Points of one look, with the interval of each where there is one."""

  style: Style
  x: Sequence[float]
  y: Sequence[float]
  ends: Sequence[scores.Interval] | None = None
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def curve_series(
  curves: Mapping[str, Iterable[scores.Point]], x: str, y: str, **options: Any
) -> list[Series]:
  """Every curve in its style, by two fields of its points; shares as hundredths."""
  styles = styles_of(curves)
  scale = {"layers": 1.0, "seconds": 1e3, "quality": 100, "similarity": 100}
  values = lambda points, field: [scale[field] * getattr(point, field) for point in points]
  return [
    Series(styles[name], values(points, x), values(points, y), options=options)
    for name, points in curves.items()
  ]


def draw(
  name: str,
  title: str,
  caption: str,
  labels: tuple[str, str],
  series: Iterable[Series],
  adjust: Callable[[mpl_axes.Axes], Any] = lambda axes: None,
) -> Figure:
  """A figure of one panel; `labels` are those of x and y, `adjust` comes last."""
  title = sanitize(title[:1].upper() + title[1:] if title[:1].isascii() else title)
  with matplotlib.rc_context({**_RC, "svg.hashsalt": name}):
    figure = mpl_figure.Figure(figsize=_SIZE, layout="constrained")
    axes = figure.subplots()
    for each in series:
      style, size = each.style, {"markersize": 11} if each.style.marker == "*" else {}
      look = {"color": style.colour, "marker": style.marker, "linestyle": style.line, **size}
      look |= {"label": style.title, **each.options}
      bars = each.ends and np.abs(np.transpose(each.ends) - np.asarray(each.y))
      axes.errorbar(each.x, each.y, bars, elinewidth=0.8, capsize=2, **look)
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    adjust(axes)
    handles, names = axes.get_legend_handles_labels()
    if len(handles) > 1:
      figure.legend(handles, names, loc="outside lower center", ncols=min(3, len(handles)))
    svg, png = io.StringIO(), io.BytesIO()
    figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
    lines = textwrap.fill(title, _TITLE_COLUMNS)
    figure.suptitle(lines, x=0.02, ha="left", fontsize=10, fontweight="bold", parse_math=False)
    figure.savefig(png, format="png", dpi=160, facecolor="white", metadata={"Software": None})
  return Figure(name, title, caption, svg.getvalue(), png.getvalue())


def full_depth(axes: mpl_axes.Axes, full: scores.Point) -> None:
  """The full model's quality and its 95 % interval, as a line and a band."""
  low, high = scores.normal_interval(100.0 * full.quality, 100.0 * full.quality_error)
  axes.axhline(100.0 * full.quality, color=INK, linewidth=0.8, linestyle=":")
  if not math.isnan(low):
    axes.axhspan(low, high, color=INK, alpha=0.07, linewidth=0)
