"""Figures: as SVG and PNG files, and as SVG that takes the page's colours.

Series differ by marker and line as well as by colour (Okabe and Ito's, which read on light and
on dark), so that they survive print and colour-vision deficiencies.
"""

import dataclasses
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib import axes as mpl_axes
from matplotlib import figure as mpl_figure

from calm.paper.experiments import tradeoff

# Placeholders that the page replaces by its own colours.
INK, RULE = "#111213", "#cdcecf"
_SIZE = (4.7, 3.5)  # inches; narrow, so that text stays legible on a phone


@dataclasses.dataclass(frozen=True)
class Style:
  """How one series looks."""

  colour: str
  marker: str
  line: str
  title: str


STYLES: Mapping[str, Style] = {
  "softmax": Style("#0072b2", "o", "-", "softmax"),
  "shortlist": Style("#8b6fc0", "D", "--", "softmax, shortlist first"),
  "classifier": Style("#d55e00", "s", "-", "classifier"),
  "state": Style("#009e73", "^", "-.", "state"),
  tradeoff.STATIC: Style("#808080", "x", ":", "static"),
  tradeoff.ORACLE: Style("#c2588f", "*", "none", "oracle"),
}

# For measures that may leave after some layers only ('softmax@2,4').
_VARIANTS = (("#b8860b", "v"), ("#56b4e9", "P"), ("#404040", "h"))


def style_of(name: str) -> Style:
  """The style of a series by its name; a variant of a measure has one of its own."""
  if name in STYLES:
    return STYLES[name]
  measure, _, layers = name.partition("@")
  colour, marker = _VARIANTS[sum(map(ord, layers)) % len(_VARIANTS)]
  return Style(colour, marker, "-", f"{STYLES[measure].title}, exits {layers}")


_RC: dict[Any, Any] = {
  "font.size": 10,
  "font.family": "sans-serif",
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
  "lines.linewidth": 1.5,
  "lines.markersize": 4.5,
}


@dataclasses.dataclass(frozen=True)
class Figure:
  """One drawn figure.

  Attributes:
    name: file name without its ending; unique in a report.
    title: short, above the figure.
    caption: what it shows and how to read it.
    svg: a whole SVG file, its own colours.
    png: the same as PNG.
  """

  name: str
  title: str
  caption: str
  svg: str
  png: bytes

  @property
  def inline(self) -> str:
    """The SVG element with the page's ink and ids that no other figure has."""
    svg = self.svg[self.svg.index("<svg") :]
    svg = svg.replace(INK, "currentColor").replace(RULE, "var(--rule)")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{self.name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{self.name}-\1)", svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{self.name}-\1"', svg)
    # The page sets the width; the view box keeps the shape.
    return re.sub(r'<svg ([^>]*?)width="[^"]*" ?', r"<svg \1", _without_height(svg), count=1)


def _without_height(svg: str) -> str:
  return re.sub(r'<svg ([^>]*?)height="[^"]*" ?', r"<svg \1", svg, count=1)


def draw(name: str, title: str, caption: str, paint: Callable[[mpl_axes.Axes], None]) -> Figure:
  """Makes a figure of one panel.

  Args:
    name: file name without its ending.
    title: short.
    caption: one or two sentences.
    paint: draws into the axes.
  """
  with matplotlib.rc_context({**_RC, "svg.hashsalt": name}):
    figure = mpl_figure.Figure(figsize=_SIZE, layout="constrained")
    axes = figure.subplots()
    paint(axes)
    handles, labels = axes.get_legend_handles_labels()
    if len(handles) > 1:
      figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(handles)))
    svg, png = io.StringIO(), io.BytesIO()
    figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
    figure.savefig(png, format="png", dpi=160, facecolor="white", metadata={"Software": None})
  return Figure(name, title, caption, svg.getvalue(), png.getvalue())


def plot(axes: mpl_axes.Axes, name: str, x: Sequence[float], y: Sequence[float]) -> None:
  """One series in its style."""
  style = style_of(name)
  size = 11 if style.marker == "*" else None
  axes.plot(
    x,
    y,
    color=style.colour,
    marker=style.marker,
    linestyle=style.line,
    label=style.title,
    markersize=size,
  )


def quality_against_layers(
  found: tradeoff.TradeOff, name: str, title: str, metric: str
) -> Figure:
  """Fig. 3: one point a threshold."""

  def paint(axes: mpl_axes.Axes) -> None:
    for curve in found.curves:
      scored = [point.scores for point in curve.points]
      plot(axes, curve.name, [s.layers for s in scored], [100 * s.quality for s in scored])
    axes.axhline(100 * found.full.scores.quality, color=INK, linewidth=0.8, linestyle=":")
    axes.set_xlabel("mean decoder layers a token")
    axes.set_ylabel(f"{metric} against references")
    axes.set_xlim(0.8, found.num_layers + 0.2)

  caption = (
    f"{found.num_prompts} validation prompts. One point a threshold; up and left is better."
    " Dotted: the full model."
  )
  return draw(name, title, caption, paint)


def quality_against_seconds(
  found: tradeoff.TradeOff, name: str, title: str, metric: str
) -> Figure | None:
  """Fig. 3 against measured time; None where nothing was timed."""
  if not found.num_timed:
    return None
  beyond: list[str] = []

  def paint(axes: mpl_axes.Axes) -> None:
    limit = 1e3 * max(
      p.seconds for c in found.curves if c.name != tradeoff.ORACLE for p in c.points
    )
    for curve in found.curves:
      points = [point for point in curve.points if not math.isnan(point.seconds)]
      milliseconds = [1e3 * point.seconds for point in points]
      if curve.name == tradeoff.ORACLE and max(milliseconds, default=0) > 1.1 * limit:
        beyond.append(f"{milliseconds[0]:.0f} ms")
        continue
      plot(axes, curve.name, milliseconds, [100 * p.scores.quality for p in points])
    axes.axhline(100 * found.full.scores.quality, color=INK, linewidth=0.8, linestyle=":")
    axes.axvline(1e3 * found.full.seconds, color=INK, linewidth=0.8, linestyle=":")
    axes.set_xlabel("measured decode time a prompt, ms")
    axes.set_ylabel(f"{metric} against references")
    axes.set_xlim(left=0)
    axes.locator_params(axis="x", nbins=6)

  figure = draw(name, title, "", paint)
  caption = (
    f"The same points against time: {found.num_timed} of the prompts, each decoded alone, all"
    " settings in turn; median of the rounds. Dotted: the full model (static, no confidence)."
    " Left of its line is faster."
  )
  if beyond:
    caption += (
      f" The oracle ({beyond[0]}) is out of the picture: it runs every layer to know where it"
      " may leave."
    )
  return dataclasses.replace(figure, caption=caption)
