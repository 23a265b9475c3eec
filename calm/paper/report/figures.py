"""Figures: as SVG and PNG files, and as SVG that takes the page's colours.

Series differ by marker and line as well as by colour, and colours are such that they survive
print and colour-vision deficiencies.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import axes as mpl_axes

from calm.inference.drawing import INK, Figure, draw
from calm.paper.bench import intervals
from calm.paper.experiments import tradeoff


@dataclasses.dataclass(frozen=True)
class Style:
  """How one series looks."""

  colour: str
  marker: str
  line: str
  title: str


# Nine colours that stay apart for deuteranopes and protanopes, on light and on dark pages
# (tests/paper/report/colours_test.py says by how much).
STYLES: Mapping[str, Style] = {
  "softmax": Style("#0077aa", "o", "-", "softmax"),
  "shortlist": Style("#6611ff", "D", "--", "softmax, shortlist first"),
  "classifier": Style("#dd6600", "s", "-", "classifier"),
  "state": Style("#889966", "^", "-.", "state"),
  tradeoff.STATIC: Style("#775555", "x", ":", "static"),
  tradeoff.ORACLE: Style("#5544cc", "*", "none", "oracle"),
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
  variants = [name for name in dict.fromkeys(names) if name not in STYLES]
  made = {name: STYLES[name] for name in names if name in STYLES}
  for turn, name in enumerate(variants):
    measure, _, layers = name.partition("@")
    colour, marker = _VARIANTS[turn % len(_VARIANTS)]
    line = "-" if turn < len(_VARIANTS) else "--"
    made[name] = Style(colour, marker, line, series_title(f"{measure}@{layers}"))
  return made


def series_title(name: str) -> str:
  """What a reader calls a series."""
  measure, _, layers = name.partition("@")
  title = STYLES[measure].title if measure in STYLES else measure
  return f"{title}, exits {layers}" if layers else title


def plot(
  axes: mpl_axes.Axes, style: Style, x: Sequence[float], y: Sequence[float], **options: Any
) -> None:
  """One series in its style."""
  look = {"markersize": 11} if style.marker == "*" else {}
  look |= {"color": style.colour, "marker": style.marker, "linestyle": style.line}
  axes.plot(x, y, label=style.title, **{**look, **options})


def bars(
  axes: mpl_axes.Axes,
  style: Style,
  x: Sequence[float],
  y: Sequence[float],
  ends: Sequence[intervals.Interval],
) -> None:
  """One series with the interval of every point."""
  low = [max(0.0, value - end[0]) for value, end in zip(y, ends, strict=True)]
  high = [max(0.0, end[1] - value) for value, end in zip(y, ends, strict=True)]
  axes.errorbar(
    x,
    y,
    yerr=[low, high],
    color=style.colour,
    marker=style.marker,
    linestyle=style.line,
    elinewidth=0.8,
    capsize=2,
    label=style.title,
  )


def line_style(turn: int, title: str) -> Style:
  """The style of a series that is no measure, by its turn."""
  return Style(*LINES[turn % len(LINES)], title)


def full_depth(axes: mpl_axes.Axes, quality: float, error: float) -> None:
  """The full model's quality and its 95 % interval, both in [0, 1], as a line and a band."""
  low, high = (100.0 * end for end in intervals.of_error(quality, error))
  axes.axhline(100.0 * quality, color=INK, linewidth=0.8, linestyle=":")
  if not math.isnan(low):
    axes.axhspan(low, high, color=INK, alpha=0.07, linewidth=0)


_BAND = (
  "Dotted: the full model, with its 95 % interval as a band; other points are of the same"
  " prompts, so that they rise and fall with it."
)


def quality_against_layers(
  found: tradeoff.TradeOff, name: str, title: str, metric: str
) -> Figure:
  """Fig. 3: one point a threshold."""

  def paint(axes: mpl_axes.Axes) -> None:
    styles = styles_of([curve.name for curve in found.curves])
    for curve in found.curves:
      scored = [point.scores for point in curve.points]
      x, y = [s.layers for s in scored], [100 * s.quality for s in scored]
      plot(axes, styles[curve.name], x, y)
    full_depth(axes, found.full.scores.quality, found.full.scores.quality_error)
    axes.set_xlabel("mean decoder layers a token")
    axes.set_ylabel(f"{metric} against references")
    axes.set_xlim(0.8, found.num_layers + 0.2)

  caption = (
    f"{found.num_prompts} validation prompts. One point a threshold; up and left is better."
    f" {_BAND}"
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
    styles = styles_of([curve.name for curve in found.curves])
    limit = 1e3 * max(
      p.seconds for c in found.curves if c.name != tradeoff.ORACLE for p in c.points
    )
    for curve in found.curves:
      points = [point for point in curve.points if not math.isnan(point.seconds)]
      milliseconds = [1e3 * point.seconds for point in points]
      if curve.name == tradeoff.ORACLE and max(milliseconds, default=0) > 1.1 * limit:
        beyond.append(f"{milliseconds[0]:.0f} ms")
        continue
      plot(axes, styles[curve.name], milliseconds, [100 * p.scores.quality for p in points])
    full_depth(axes, found.full.scores.quality, found.full.scores.quality_error)
    axes.axvline(1e3 * found.full.seconds, color=INK, linewidth=0.8, linestyle=":")
    axes.set_xlabel("measured decode time a prompt, ms")
    axes.set_ylabel(f"{metric} against references")
    axes.set_xlim(left=0)
    axes.locator_params(axis="x", nbins=6)

  figure = draw(name, title, "", paint)
  caption = (
    f"The same points against time: {found.num_timed} of the prompts, each decoded alone, all"
    f" settings in turn; median of the rounds. Left of the upright line is faster than the full"
    f" model (static, no confidence). {_BAND}"
  )
  if beyond:
    caption += (
      f" The oracle ({beyond[0]}) is out of the picture: it runs every layer to know where it"
      " may leave."
    )
  return dataclasses.replace(figure, caption=caption)
