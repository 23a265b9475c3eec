"""Generated texts with the exits of their tokens, shown in terminals and
notebooks.

Tokens are coloured by exit layer on Cividis (Nunez, Anderton and Renslow 2018),
whose lightness alone orders the layers; HTML has tooltips besides, a terminal
without colour has numbers.
"""

import dataclasses
import html
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from rich import console as rich_console
from rich import style as rich_style
from rich import text as rich_text

from calm.calibrate import Record
from calm.calibrate.thresholds import format_threshold
from calm.console import sanitize


@dataclasses.dataclass(frozen=True)
class Output:
  """One prompt's generated text and how deep each of its tokens went.

  Attributes:
    text: the decoded text.
    tokens: generated ids, EOS included.
    pieces: text of each token.
    exit_layers: decoder layers run for each token, 1-based.
    confidences: the measure at each token's exit, in [0, 1].
    rejected_confidences: the highest confidence refused at each token, 0 if
      none.
    score: log-probability of the tokens under the full head at their exit
      layer, nats.
    num_layers: decoder layers of the model.
    eos_id: the token that ends a text.
    drafted: of `exits.Speculative`: which tokens were drafted and accepted; the
      others are the full model's own.
    passes, drafts: of `exits.Speculative`: how many verified the text, and how
      many tokens were drafted, refused ones too.
  """

  text: str
  tokens: tuple[int, ...]
  pieces: tuple[str, ...]
  exit_layers: tuple[int, ...]
  confidences: tuple[float, ...]
  rejected_confidences: tuple[float, ...]
  score: float
  num_layers: int
  eos_id: int = 1
  drafted: tuple[bool, ...] = ()
  passes: int = 0
  drafts: int = 0

  @property
  def mean_layers(self) -> float:
    """Mean decoder layers a token (NaN without tokens)."""
    return mean_layers([self])

  @property
  def visible(self) -> tuple[str, ...]:
    """Pieces, EOS as a mark and without the space before the first word."""
    pairs = zip(self.tokens, self.pieces, strict=True)
    pieces = ["⏎" if token == self.eos_id else piece for token, piece in pairs]
    pieces[:1] = [piece.lstrip(" ") or piece for piece in pieces[:1]]
    return tuple(pieces)

  def coloured(self, console: rich_console.Console | None = None) -> str:
    """The text for a terminal, every token coloured by its exit layer."""
    return to_terminal(self.visible, self.exit_layers, self.num_layers, console)

  def __repr__(self) -> str:
    return (
      f"Output({self.text!r}, tokens={len(self.tokens)},"
      f" mean_layers={self.mean_layers:.2f}/{self.num_layers})"
    )

  def _repr_html_(self, legend: bool = True) -> str:
    """A coloured `<span>` a token, with titles like `layer 3 of 8, confidence
    0.97`.
    """
    titles = (f", confidence {c:.2f}" for c in self.confidences)
    tokens = zip(
      map(printable, self.visible), self.exit_layers, titles, strict=True
    )
    body = _spans(tokens, self.num_layers)
    body = f'<div style="white-space:pre-wrap;line-height:1.7">{body}</div>'
    return (
      f"<div>{body}{legend_html(self.num_layers)}</div>" if legend else body
    )


@dataclasses.dataclass(frozen=True)
class Timing:
  """Wall-clock of one `generate` call."""

  # encoder and cross-attention keys and values, without compiling
  encode_seconds: float
  decode_seconds: float  # the decode loops, without compiling
  # programs compiled during the call; one with none is the one to quote
  compilations: int
  compile_seconds: float = 0.0  # what tracing and compiling them took

  @property
  def seconds(self) -> float:
    return self.encode_seconds + self.decode_seconds

  def __add__(self, other: "Timing") -> "Timing":
    """Of two calls together."""
    pairs = zip(
      dataclasses.astuple(self), dataclasses.astuple(other), strict=True
    )
    return Timing(*map(sum, pairs))


@dataclasses.dataclass(frozen=True)
class Outputs(Sequence[Output]):
  """The outputs of a list of prompts, in its order."""

  items: tuple[Output, ...]
  num_layers: int  # decoder layers of the model
  threshold: float | None  # infinity: never exit; None where the rule has none
  # the calibration's promise in plain words, where there is one
  guarantee: str | None
  timing: Timing

  def __len__(self) -> int:
    return len(self.items)

  def __getitem__(self, index: Any) -> Any:
    return self.items[index]

  @property
  def texts(self) -> list[str]:
    return [output.text for output in self.items]

  @property
  def mean_layers(self) -> float:
    """Mean decoder layers over every real token, EOS included (NaN without
    tokens).
    """
    return mean_layers(self.items)

  def _heading(self, separator: str) -> str:
    threshold = (
      "none" if self.threshold is None else format_threshold(self.threshold)
    )
    count = "1 output" if len(self) == 1 else f"{len(self)} outputs"
    layers = (
      f"{self.mean_layers:.2f} of {self.num_layers} decoder layers a token"
    )
    return separator.join([count, f"threshold {threshold}", layers])

  def __repr__(self) -> str:
    lines = [
      self._heading(", "),
      *(f"  {output!r}" for output in self.items[:5]),
    ]
    if len(self) > 5:
      lines.append(f"  ... and {len(self) - 5} more")
    return "\n".join(lines)

  def _repr_html_(self) -> str:
    rows = [output._repr_html_(legend=False) for output in self.items[:20]]
    if len(self) > 20:
      rows.append(f"<p>… and {len(self) - 20} more</p>")
    note = (
      f"<p>{html.escape(sanitize(self.guarantee))}</p>"
      if self.guarantee
      else ""
    )
    legend = legend_html(self.num_layers)
    return (
      f"<div><p>{self._heading(' · ')}</p>{''.join(rows)}{legend}{note}</div>"
    )

  def plot(self, axes: Any = None) -> Any:
    """Draws the share of tokens by exit layer on axes of matplotlib, new ones
    if None.
    """
    if axes is None:
      from matplotlib import pyplot  # of the extra `report`

      axes = pyplot.subplots(layout="constrained")[1]
    layers = [layer for output in self.items for layer in output.exit_layers]
    places = range(1, self.num_layers + 1)
    shares = [
      100 * layers.count(layer) / max(1, len(layers)) for layer in places
    ]
    axes.bar(places, shares, color=scale(self.num_layers))
    axes.set(
      xlabel="decoder layers", ylabel="tokens, %", title=self._heading(", ")
    )
    axes.set_xticks(places)
    return axes


def mean_layers(made: Iterable[Output | Record]) -> float:
  """Mean decoder layers over all real tokens of outputs or records (NaN without
  tokens).
  """
  layers = [layer for each in made for layer in each.exit_layers or () if layer]
  return sum(layers) / len(layers) if layers else float("nan")


# ---- Colours of exit layers

_CIVIDIS = (
  *("#00224e", "#123570", "#3b496c", "#575d6d", "#707173"),
  *("#8a8678", "#a59c74", "#c3b369", "#e1cc55", "#fee838"),
)


def scale(num_layers: int) -> list[str]:
  """One background colour a decoder layer, `#rrggbb`, first layer first and
  brightest.
  """
  at = (
    np.arange(num_layers)[::-1] * (len(_CIVIDIS) - 1) / max(1, num_layers - 1)
  )
  stops = zip(*(bytes.fromhex(colour[1:]) for colour in _CIVIDIS), strict=True)
  channels = [
    np.interp(at, range(len(_CIVIDIS)), stop).round().astype(int)
    for stop in stops
  ]
  return [
    "#{:02x}{:02x}{:02x}".format(*mixed)
    for mixed in zip(*channels, strict=True)
  ]


def text_colour(background: str) -> str:
  """Black or white, whichever has more contrast: at least 4.5 on any background
  (WCAG 2).
  """
  red, green, blue = (
    (channel / 255) ** 2.2 for channel in bytes.fromhex(background[1:])
  )
  # Relative luminance L, where (L + 0.05) / 0.05 = 1.05 / (L + 0.05)
  return (
    "#000000"
    if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179
    else "#ffffff"
  )


def printable(piece: str) -> str:
  """A token's text, sanitized; SentencePiece's mark is a space."""
  return sanitize(piece).replace("\u2581", " ")


def _spans(tokens: Iterable[tuple[str, int, str]], num_layers: int) -> str:
  """Spans of (text, layer, end of the title)."""
  colours = scale(num_layers)
  spans = []
  for text, layer, more in tokens:
    colour = colours[layer - 1]
    style = f"background:{colour};color:{text_colour(colour)};padding:1px 0"
    title = f"layer {layer} of {num_layers}{more}"
    spans.append(
      f'<span style="{style}" title="{title}">{html.escape(text)}</span>'
    )
  return "".join(spans)


def legend_html(num_layers: int) -> str:
  """The scale with its numbers, as HTML."""
  swatches = _spans(
    ((f" {i} ", i, "") for i in range(1, num_layers + 1)), num_layers
  )
  return (
    '<div style="white-space:pre-wrap;font-size:85%;margin-top:4px">'
    f"decoder layers per token: {swatches}</div>"
  )


def to_terminal(
  pieces: Sequence[str],
  exit_layers: Sequence[int],
  num_layers: int,
  console: rich_console.Console | None = None,
) -> str:
  """The tokens on coloured backgrounds (ANSI), or with `[layers]` before each
  run of tokens.

  `exit_layers` are 1-based; `console` None is standard output, of which rich
  knows whether it has colours (an environment with NO_COLOR has none).
  """
  console = console or rich_console.Console(force_jupyter=False)
  tokens = list(zip(map(printable, pieces), exit_layers, strict=True))
  if console.color_system is not None and not console.no_color:
    painted = rich_text.Text()
    for text, layer in tokens:
      colour = scale(num_layers)[layer - 1]
      painted.append(
        text, rich_style.Style(color=text_colour(colour), bgcolor=colour)
      )
    with console.capture() as capture:
      console.print(painted, end="", soft_wrap=True)
    return capture.get()
  shown = ""
  previous = 0
  for text, layer in tokens:
    if layer != previous:
      # Between words as a word of its own; within one where a word's pieces
      # differ.
      text = text if previous else " " + text.lstrip(" ")
      text = f" [{layer}]{text}" if text[:1].isspace() else f"[{layer}]{text}"
    shown, previous = shown + text, layer
  return shown.lstrip(" ")


def legend_terminal(
  num_layers: int, console: rich_console.Console | None = None
) -> str:
  """The scale with its numbers, or what the brackets mean; one line."""
  layers = range(1, num_layers + 1)
  swatches = to_terminal(
    [f" {i} " for i in layers], layers, num_layers, console
  )
  if swatches.startswith("["):
    return (
      f"[n]: the text that follows took n of {num_layers} decoder layers a "
      "token"
    )
  return f"decoder layers per token: {swatches}"
