"""A figure of one panel, as SVG and PNG files and as SVG that takes a page's colours."""

import dataclasses
import io
import re
import textwrap
from collections.abc import Callable
from typing import Any

from calm.console import sanitize

# Placeholders that the page replaces by its own colours.
INK, RULE = "#111213", "#cdcecf"
_TITLE_COLUMNS = 52
_SIZE = (4.7, 3.5)  # inches; narrow, so that text stays legible on a phone
# What is dim on a dark page, or like another there, and what stands for it.
ON_DARK = {
  "#6611ff": "#8844ff",
  "#775555": "#ffddcc",
  "#5544cc": "#ccbbff",
  "#994422": "#bb5533",
  "#889966": "#88aa77",
}
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
    title: what was found, above the figure.
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
    """The SVG element with the page's colours and ids that no other figure has."""
    svg = self.svg[self.svg.index("<svg") :]
    svg = svg.replace(INK, "currentColor").replace(RULE, "var(--rule)")
    for colour in ON_DARK:
      svg = svg.replace(colour, f"var(--on-{colour[1:]}, {colour})")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{self.name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{self.name}-\1)", svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{self.name}-\1"', svg)
    # The page sets the width; the view box keeps the shape.
    for size in ("height", "width"):
      svg = re.sub(rf'<svg ([^>]*?){size}="[^"]*" ?', r"<svg \1", svg, count=1)
    return svg


def draw(name: str, title: str, caption: str, paint: Callable[[Any], None]) -> Figure:
  """Makes a figure of one panel.

  Args:
    name: file name without its ending.
    title: what was found, in a sentence; above the figure on the page and inside the PNG.
    caption: one or two sentences.
    paint: draws into the axes.
  """
  import matplotlib
  from matplotlib import figure as mpl_figure

  title = sanitize(title[:1].upper() + title[1:] if title[:1].isascii() else title)
  with matplotlib.rc_context({**_RC, "svg.hashsalt": name}):
    figure = mpl_figure.Figure(figsize=_SIZE, layout="constrained")
    axes = figure.subplots()
    paint(axes)
    handles, labels = axes.get_legend_handles_labels()
    if len(handles) > 1:
      figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(handles)))
    svg, png = io.StringIO(), io.BytesIO()
    figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
    lines = textwrap.fill(title, _TITLE_COLUMNS)
    figure.suptitle(lines, x=0.02, ha="left", fontsize=10, fontweight="bold", parse_math=False)
    figure.savefig(png, format="png", dpi=160, facecolor="white", metadata={"Software": None})
  return Figure(name, title, caption, svg.getvalue(), png.getvalue())
