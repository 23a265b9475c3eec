"""Figures: curves and intervals in styles that print and colour-vision deficiencies survive."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from matplotlib import axes as mpl_axes

from calm.inference import drawing
from calm.paper import scores
from calm.paper.experiments import ORACLE, STATIC


@dataclasses.dataclass(frozen=True)
class Style:
  """The look of one series."""

  colour: str
  marker: str
  line: str
  title: str


# Nine colours that stay apart for deuteranopes and protanopes, on light and on dark pages
# (tests/paper/colours_test.py says by how much).
STYLES: Mapping[str, Style] = {
  "softmax": Style("#0077aa", "o", "-", "softmax"),
  "shortlist": Style("#6611ff", "D", "--", "softmax, shortlist first"),
  "classifier": Style("#dd6600", "s", "-", "classifier"),
  "state": Style("#889966", "^", "-.", "state"),
  STATIC: Style("#775555", "x", ":", "static"),
  ORACLE: Style("#5544cc", "*", "none", "oracle"),
}
# For measures that may leave after some layers only ('softmax@2,4').
_VARIANTS = (("#339999", "v"), ("#994422", "P"), ("#6688ee", "h"))
# Series that are no measures: (colour, marker, line).
LINES = (("#0077aa", "o", "-"), ("#dd6600", "s", "--"), ("#889966", "^", "-."))


def styles_of(names: Sequence[str]) -> dict[str, Style]:
  """The style of each series of a figure; variants of measures take theirs in this order.

  Args:
    names: of the series; the same order in every figure of a report gives the same styles.
  """
  styles = {name: STYLES[name] for name in names if name in STYLES}
  variants = [name for name in dict.fromkeys(names) if name not in STYLES]
  for turn, name in enumerate(variants):
    colour, marker = _VARIANTS[turn % len(_VARIANTS)]
    line = "-" if turn < len(_VARIANTS) else "--"
    styles[name] = Style(colour, marker, line, series_title(name))
  return styles


def line_styles(names: Sequence[str]) -> dict[str, Style]:
  """The styles of series that are no measures, by their turn."""
  return {name: Style(*LINES[i % len(LINES)], name) for i, name in enumerate(names)}


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

  def plot(self, axes: mpl_axes.Axes) -> None:
    """Draws them."""
    style = self.style
    look: dict[str, Any] = {"markersize": 11} if style.marker == "*" else {}
    look |= {"color": style.colour, "marker": style.marker, "linestyle": style.line}
    look |= {"label": style.title, **self.options}
    if self.ends is None:
      axes.plot(self.x, self.y, **look)
      return
    low = [max(0.0, value - end[0]) for value, end in zip(self.y, self.ends, strict=True)]
    high = [max(0.0, end[1] - value) for value, end in zip(self.y, self.ends, strict=True)]
    axes.errorbar(self.x, self.y, [low, high], elinewidth=0.8, capsize=2, **look)


def curve_series(
  curves: Iterable[scores.Curve],
  styles: Mapping[str, Style],
  x: Callable[[scores.Point], float],
  y: Callable[[scores.Point], float],
  **options: Any,
) -> list[Series]:
  """Every curve in its style, by two numbers of its points."""
  return [
    Series(styles[c.name], list(map(x, c.points)), list(map(y, c.points)), options=options)
    for c in curves
  ]


def draw(
  name: str,
  title: str,
  caption: str,
  labels: tuple[str, str],
  series: Iterable[Series],
  adjust: Callable[[mpl_axes.Axes], Any] = lambda axes: None,
) -> drawing.Figure:
  """A figure of series; `labels` are those of x and y, `adjust` comes last."""

  def paint(axes: mpl_axes.Axes) -> None:
    for each in series:
      each.plot(axes)
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    adjust(axes)

  return drawing.draw(name, title, caption, paint)


def full_depth(axes: mpl_axes.Axes, full: scores.Scores) -> None:
  """The full model's quality and its 95 % interval, as a line and a band."""
  low, high = scores.normal_interval(100.0 * full.quality, 100.0 * full.quality_error)
  axes.axhline(100.0 * full.quality, color=drawing.INK, linewidth=0.8, linestyle=":")
  if not math.isnan(low):
    axes.axhspan(low, high, color=drawing.INK, alpha=0.07, linewidth=0)
