"""What `inference` returns: texts with their exits, printable in terminals and notebooks."""

import dataclasses
import html
from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np

from calm import checkpoints
from calm.calibrate.thresholds import format_threshold
from calm.console import sanitize
from calm.decode import loop
from calm.inference import colours


@dataclasses.dataclass(frozen=True)
class Output:
  """One prompt's generated text and how deep each of its tokens went.

  Attributes:
    text: the decoded text.
    tokens: generated ids, EOS included.
    pieces: text of each token.
    exit_layers: decoder layers run for each token, 1-based.
    confidences: the measure at each token's exit, in [0, 1].
    rejected_confidences: the highest confidence refused at each token, 0 if none.
    score: log-probability of the tokens under the full head at their exit layer, nats.
    num_layers: decoder layers of the model.
    eos_id: the token that ends a text.
    input_length: positions of the prompt as it was encoded, padding included.
    drafted: of `exits.Verified`: which tokens were drafted and accepted; the others are the
      full model's own.
    passes: of `exits.Verified`: how many verified the text.
    drafts: of `exits.Verified`: tokens drafted, refused ones too.
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
  input_length: int = 0
  drafted: tuple[bool, ...] = ()
  passes: int = 0
  drafts: int = 0

  @property
  def mean_layers(self) -> float:
    """Mean decoder layers a token (NaN without tokens)."""
    count = len(self.exit_layers)
    return sum(self.exit_layers) / count if count else float("nan")

  @property
  def tokens_per_pass(self) -> float:
    """Tokens that a verifying pass gave, its own included (NaN without passes)."""
    return len(self.tokens) / self.passes if self.passes else float("nan")

  @property
  def visible(self) -> tuple[tuple[str, ...], tuple[int, ...], tuple[float, ...]]:
    """Pieces, exit layers and confidences, with EOS shown as a mark.

    The space before the first word, which is no part of the text, is left out.
    """
    pieces = ["⏎" if token == self.eos_id else piece for token, piece in self._pairs()]
    pieces[:1] = [piece.lstrip(" ") or piece for piece in pieces[:1]]
    return tuple(pieces), self.exit_layers, self.confidences

  def coloured(self, mode: colours.Mode | None = None) -> str:
    """The text for a terminal, every token coloured by its exit layer."""
    pieces, exit_layers, _ = self.visible
    return colours.to_terminal(pieces, exit_layers, self.num_layers, mode=mode)

  def _pairs(self):
    return zip(self.tokens, self.pieces, strict=True)

  def __repr__(self) -> str:
    return (
      f"Output({self.text!r}, tokens={len(self.tokens)},"
      f" mean_layers={self.mean_layers:.2f}/{self.num_layers})"
    )

  def _repr_html_(self) -> str:
    pieces, exit_layers, confidences = self.visible
    return colours.to_html(pieces, exit_layers, self.num_layers, confidences=confidences)


def from_generation(
  generation: loop.Generation,
  row: int,
  vocabulary: checkpoints.Vocabulary,
  *,
  num_layers: int,
  eos_id: int,
  input_length: int = 0,
) -> Output:
  """One row of a generation as text with its exits.

  Args:
    generation: numpy arrays [batch, max_decode_length]; scores [batch].
    row: which row of the batch.
    vocabulary: ids -> text.
    num_layers: decoder layers of the model.
    eos_id: the token that ends a text.
    input_length: positions of the prompt as it was encoded, padding included.
  """
  length = int(np.sum(np.asarray(generation.exit_layers[row]) > 0))
  seen = generation.verification
  tokens = tuple(int(token) for token in generation.tokens[row][:length])
  return Output(
    text=vocabulary.decode(list(tokens)),
    tokens=tokens,
    pieces=tuple(vocabulary.piece(token) for token in tokens),
    exit_layers=tuple(int(layer) for layer in generation.exit_layers[row][:length]),
    confidences=tuple(generation.confidences[row][:length].tolist()),
    rejected_confidences=tuple(generation.rejected_confidences[row][:length].tolist()),
    score=float(generation.scores[row]),
    num_layers=num_layers,
    eos_id=eos_id,
    input_length=input_length,
    drafted=() if seen is None else tuple(seen.drafted[row][:length].tolist()),
    passes=0 if seen is None else int(seen.passes[row]),
    drafts=0 if seen is None else int(seen.drafts[row]),
  )


@dataclasses.dataclass(frozen=True)
class Timing:
  """Wall-clock of one `generate` call.

  Attributes:
    encode_seconds: encoder and cross-attention keys and values, compiling left out.
    decode_seconds: the decode loops, compiling left out.
    compilations: programs compiled during the call; one with none is the one to quote.
    compile_seconds: what tracing and compiling them took.
  """

  encode_seconds: float
  decode_seconds: float
  compilations: int
  compile_seconds: float = 0.0

  @property
  def seconds(self) -> float:
    """Encoding and decoding together."""
    return self.encode_seconds + self.decode_seconds

  def __add__(self, other: "Timing") -> "Timing":
    """Of two calls together."""
    pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
    return Timing(*(ours + theirs for ours, theirs in pairs))


@dataclasses.dataclass(frozen=True)
class Outputs(Sequence[Output]):
  """The outputs of a list of prompts, in its order.

  Attributes:
    items: one `Output` a prompt.
    num_layers: decoder layers of the model.
    threshold: the threshold decoded with (infinity: never exit), or None where the rule has
      none.
    guarantee: the calibration's promise in plain words, or None where there is none.
    timing: wall-clock.
  """

  items: tuple[Output, ...]
  num_layers: int
  threshold: float | None
  guarantee: str | None
  timing: Timing

  def __len__(self) -> int:
    return len(self.items)

  @overload
  def __getitem__(self, index: int) -> Output: ...
  @overload
  def __getitem__(self, index: slice) -> tuple[Output, ...]: ...
  def __getitem__(self, index):
    return self.items[index]

  def __iter__(self) -> Iterator[Output]:
    return iter(self.items)

  @property
  def texts(self) -> list[str]:
    """The decoded texts."""
    return [output.text for output in self.items]

  @property
  def mean_layers(self) -> float:
    """Mean decoder layers over every real token, EOS included (NaN without tokens)."""
    layers = [layer for output in self.items for layer in output.exit_layers]
    return sum(layers) / len(layers) if layers else float("nan")

  def _heading(self, separator: str) -> str:
    threshold = "none" if self.threshold is None else format_threshold(self.threshold)
    count = "1 output" if len(self) == 1 else f"{len(self)} outputs"
    layers = f"{self.mean_layers:.2f} of {self.num_layers} decoder layers a token"
    return separator.join([count, f"threshold {threshold}", layers])

  def __repr__(self) -> str:
    head = self._heading(", ")
    shown = [f"  {output!r}" for output in self.items[:5]]
    if len(self) > 5:
      shown.append(f"  ... and {len(self) - 5} more")
    return "\n".join([head, *shown])

  def _repr_html_(self) -> str:
    rows = [
      colours.to_html(
        *output.visible[:2],
        self.num_layers,
        confidences=output.confidences,
        legend=False,
      )
      for output in self.items[:20]
    ]
    head = self._heading(" · ")
    if len(self) > 20:
      rows.append(f"<p>… and {len(self) - 20} more</p>")
    note = f"<p>{html.escape(sanitize(self.guarantee))}</p>" if self.guarantee else ""
    legend = colours.legend_html(self.num_layers)
    return f"<div><p>{head}</p>{''.join(rows)}{legend}{note}</div>"
