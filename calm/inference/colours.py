"""Text coloured by the decoder layers that each token took: HTML, terminals, legends.

Pure Python, no dependence. The scale is Cividis (Nunez, Anderton and Renslow 2018), which
readers with the common colour-vision deficiencies see much as everybody does, and whose
lightness alone orders the layers, in print too. The first layer is bright and the last dark, on
every page and terminal: a colour means the same wherever it is seen. Colour is never the only
sign: HTML has tooltips, and a terminal without colour gets the number of layers in brackets
before each run of tokens.
"""

import html
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, TextIO

Mode = Literal["plain", "256", "truecolor"]

_CIVIDIS = (
  *("#00224e", "#123570", "#3b496c", "#575d6d", "#707173"),
  *("#8a8678", "#a59c74", "#c3b369", "#e1cc55", "#fee838"),
)
_RESET = "\x1b[0m"
_CUBE = (0, 95, 135, 175, 215, 255)


def scale(num_layers: int) -> list[str]:
  """One background colour a decoder layer, `#rrggbb`, first layer first and brightest.

  Args:
    num_layers: decoder layers of the model, at least 1.

  Raises:
    ValueError: if `num_layers` is below 1.
  """
  if num_layers < 1:
    raise ValueError(f"Expected `num_layers` of at least 1, got {num_layers}.")
  span = len(_CIVIDIS) - 1
  steps = max(1, num_layers - 1)
  colours = [_blend(span * i / steps) for i in range(num_layers)]
  return colours[::-1]


def _blend(position: float) -> str:
  """The scale at a real position between its stops."""
  low = min(int(position), len(_CIVIDIS) - 2)
  pairs = zip(_rgb(_CIVIDIS[low]), _rgb(_CIVIDIS[low + 1]), strict=True)
  mixed = [round(a + (b - a) * (position - low)) for a, b in pairs]
  return "#{:02x}{:02x}{:02x}".format(*mixed)


def _rgb(colour: str) -> list[int]:
  return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]


def luminance(colour: str) -> float:
  """Relative luminance of `#rrggbb` in [0, 1] (WCAG 2)."""
  linear = [
    c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
    for c in (channel / 255 for channel in _rgb(colour))
  ]
  return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
  """Contrast ratio of two colours, 1 to 21 (WCAG 2)."""
  light, dim = sorted((luminance(a), luminance(b)), reverse=True)
  return (light + 0.05) / (dim + 0.05)


def text_colour(background: str) -> str:
  """Black or white, whichever reads better; the ratio is at least 4.5 on any background."""
  return max("#000000", "#ffffff", key=lambda colour: contrast(colour, background))


def _checked(
  pieces: Sequence[str], exit_layers: Sequence[int], num_layers: int
) -> Iterator[tuple[int, str, int]]:
  """(position, text, exit layer) of the real tokens."""
  if len(pieces) != len(exit_layers):
    raise ValueError(
      f"Expected one of `exit_layers` for each of `pieces`, got {len(exit_layers)} for"
      f" {len(pieces)}; cut both at the same token."
    )
  for i, (piece, layer) in enumerate(zip(pieces, exit_layers, strict=True)):
    if not 0 <= layer <= num_layers:
      raise ValueError(
        f"Expected `exit_layers` from 0 (padding) to `num_layers` = {num_layers}, got {layer}"
        f" at token {i}; pass the decoder layers of the model that wrote it."
      )
    if layer:
      yield i, _printable(piece), int(layer)


def _printable(piece: str) -> str:
  """SentencePiece's space mark as a space; control characters made harmless."""
  piece = piece.replace("\u2581", " ")
  kept = "\n\t\u200c\u200d"  # joiners are letters of Persian, Hindi and others
  return "".join(c if c.isprintable() or c in kept else "\ufffd" for c in piece)


def to_html(
  pieces: Sequence[str],
  exit_layers: Sequence[int],
  num_layers: int,
  *,
  confidences: Sequence[float] | None = None,
  legend: bool = True,
) -> str:
  """A `<div>` of one coloured `<span>` a token; styles are inline, nothing is fetched.

  Args:
    pieces: text of each token; SentencePiece's U+2581 becomes a space. Escaped here.
    exit_layers: decoder layers that each token took, 1-based; 0 (padding) is left out.
    num_layers: decoder layers of the model.
    confidences: confidence at each token's exit, in [0, 1]; shown in the tooltips.
    legend: append the legend.

  Returns:
    HTML. Each span's `title` reads like `layer 3 of 8, confidence 0.97`.

  Raises:
    ValueError: if the lengths differ or an exit layer is out of range.
  """
  if confidences is not None and len(confidences) != len(pieces):
    raise ValueError(
      f"Expected one of `confidences` for each of `pieces`, got {len(confidences)} for"
      f" {len(pieces)}."
    )
  styles = _styles(num_layers)
  spans = []
  for i, text, layer in _checked(pieces, exit_layers, num_layers):
    title = f"layer {layer} of {num_layers}"
    if confidences is not None:
      title += f", confidence {confidences[i]:.2f}"
    spans.append(_span(text, styles[layer - 1], title))
  body = f'<div style="white-space:pre-wrap;line-height:1.7">{"".join(spans)}</div>'
  if not legend:
    return body
  return f"<div>{body}{legend_html(num_layers)}</div>"


def _styles(num_layers: int) -> list[str]:
  """The inline style of a token of each layer, first layer first."""
  return [
    f"background:{back};color:{text_colour(back)};padding:1px 0" for back in scale(num_layers)
  ]


def _span(text: str, style: str, title: str) -> str:
  return f'<span style="{style}" title="{html.escape(title)}">{html.escape(text)}</span>'


def legend_html(num_layers: int) -> str:
  """The scale with its numbers, as HTML."""
  swatches = "".join(
    _span(f" {i} ", style, f"layer {i} of {num_layers}")
    for i, style in enumerate(_styles(num_layers), start=1)
  )
  return (
    '<div style="white-space:pre-wrap;font-size:85%;margin-top:4px">'
    f"decoder layers per token: {swatches}</div>"
  )


def terminal_mode(
  environ: Mapping[str, str] | None = None, stream: TextIO | None = None
) -> Mode:
  """What a terminal can show.

  Args:
    environ: environment variables; None: this process's. `NO_COLOR` (non-empty) and
      `TERM=dumb` turn colour off, `COLORTERM=truecolor` (or `24bit`) gives 24-bit colour.
    stream: where the text goes; None: standard output. Without colour if no terminal, unless
      `FORCE_COLOR` (non-empty) is set.

  Returns:
    `plain`, `256` or `truecolor`.
  """
  environ = os.environ if environ is None else environ
  target: TextIO = sys.stdout if stream is None else stream
  if environ.get("NO_COLOR") or environ.get("TERM") == "dumb":
    return "plain"
  if not (environ.get("FORCE_COLOR") or target.isatty()):
    return "plain"
  return "truecolor" if environ.get("COLORTERM") in ("truecolor", "24bit") else "256"


def to_terminal(
  pieces: Sequence[str],
  exit_layers: Sequence[int],
  num_layers: int,
  *,
  mode: Mode | None = None,
) -> str:
  """The tokens on coloured backgrounds (ANSI), or with `[layers]` before each run of tokens.

  Args:
    pieces: text of each token; control characters are replaced, so that no generated text can
      steer the terminal.
    exit_layers: decoder layers that each token took, 1-based; 0 (padding) is left out.
    num_layers: decoder layers of the model.
    mode: `plain`, `256` or `truecolor`; None: what `terminal_mode` finds.

  Raises:
    ValueError: if the lengths differ or an exit layer is out of range.
  """
  mode = mode or terminal_mode()
  paint, colours = _PAINTERS[mode], scale(num_layers)
  out, previous = [], 0
  for _, text, layer in _checked(pieces, exit_layers, num_layers):
    if mode == "plain" and not previous:
      text = " " + text.lstrip(" ")
    out.append(paint(text, layer, layer == previous, colours[layer - 1]))
    previous = layer
  made = "".join(out)
  return made.lstrip(" ") if mode == "plain" else made


def legend_terminal(num_layers: int, *, mode: Mode | None = None) -> str:
  """The scale with its numbers, or what the brackets mean; one line."""
  mode = mode or terminal_mode()
  if mode == "plain":
    return f"[n]: the text that follows took n of {num_layers} decoder layers a token"
  layers = range(1, num_layers + 1)
  swatches = to_terminal([f" {i} " for i in layers], layers, num_layers, mode=mode)
  return f"decoder layers per token: {swatches}"


def _paint_plain(text: str, layer: int, same: bool, colour: str) -> str:
  del colour
  if same:
    return text
  # Between words as a word of its own; within one where a word's pieces differ.
  return f" [{layer}]{text}" if text[:1].isspace() else f"[{layer}]{text}"


def _paint_256(text: str, layer: int, same: bool, colour: str) -> str:
  del layer, same
  back, front = _xterm(colour), _xterm(text_colour(colour))
  return _painted(text, f"\x1b[48;5;{back}m\x1b[38;5;{front}m")


def _paint_truecolor(text: str, layer: int, same: bool, colour: str) -> str:
  del layer, same
  back, front = (";".join(map(str, _rgb(c))) for c in (colour, text_colour(colour)))
  return _painted(text, f"\x1b[48;2;{back}m\x1b[38;2;{front}m")


_PAINTERS: Mapping[Mode, Callable[[str, int, bool, str], str]] = {
  "plain": _paint_plain,
  "256": _paint_256,
  "truecolor": _paint_truecolor,
}


def _painted(text: str, start: str) -> str:
  # Colour ends before a line does, or the rest of the line would be painted too.
  return "\n".join(start + line + _RESET if line else "" for line in text.split("\n"))


def _xterm(colour: str) -> int:
  """Nearest of xterm's 240 fixed colours: a cube of six levels and 24 greys."""
  rgb = _rgb(colour)
  nearest = [min(range(6), key=lambda i, c=channel: abs(_CUBE[i] - c)) for channel in rgb]
  grey = min(range(24), key=lambda i: abs(8 + 10 * i - sum(rgb) / 3))
  cube = [_CUBE[i] for i in nearest]
  distances = [
    sum((a - b) ** 2 for a, b in zip(rgb, other, strict=True))
    for other in (cube, [8 + 10 * grey] * 3)
  ]
  if distances[1] < distances[0]:
    return 232 + grey
  return 16 + 36 * nearest[0] + 6 * nearest[1] + nearest[2]
