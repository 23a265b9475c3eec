"""Texts of a few prompts at every threshold, on a page where a tolerance is
dragged.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from calm import storage
from calm.calibrate import (
  Prompt,
  Record,
  SequenceLosses,
  calibrate,
  metrics,
  thresholds,
)
from calm.console import sanitize
from calm.inference import outputs

# Tolerances that a reader may ask about.
TOLERANCES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)


@dataclasses.dataclass(frozen=True)
class Level:
  """One output at one threshold."""

  pieces: tuple[str, ...]  # text of each token
  exit_layers: tuple[int, ...]  # decoder layers of each token
  confidences: tuple[float, ...]  # confidence at each exit
  layers: float  # mean decoder layers a token
  distance: float  # D, 1 - metric against the full model's text
  # R(early) - R(full) against the references, R = 1 - metric
  risk_difference: float


@dataclasses.dataclass(frozen=True)
class ShownPrompt:
  """One prompt and its outputs; `levels` has one entry a threshold."""

  id: str
  input: str
  reference: str
  full: str
  levels: tuple[Level, ...]


@dataclasses.dataclass(frozen=True)
class Panel:
  """A few prompts under one measure, and what is certified at which
  tolerance.
  """

  measure: str  # confidence measure
  # descending, from `NEVER_EXIT`, the full model, on
  thresholds: tuple[float, ...]
  items: tuple[ShownPrompt, ...]
  error_rate: float  # epsilon of each tolerance by itself
  # (delta, position of the threshold that is certified for it; 0 where none
  # is), ascending.
  promised: tuple[tuple[float, int], ...]
  first: int  # position in `promised` of the tolerance that is shown first

  @property
  def data(self) -> dict[str, Any]:
    """The sliders' numbers, without the prompts, which stand on the page
    already.
    """
    return {
      "thresholds": list(map(threshold, self.thresholds)),
      "first": self.first,
      "promised": [
        [delta, at, self.promise_text(delta, at)] for delta, at in self.promised
      ],
      "items": [storage.to_json(item.levels) for item in self.items],
    }

  def promise_text(self, tolerance: float, at: int) -> str:
    """The sentence under the sliders about a tolerance."""
    if not at:
      return f"δ = {tolerance:g}: nothing is certified, the full model serves"
    return (
      f"δ = {tolerance:g}: at threshold {threshold(self.thresholds[at])} the "
      "mean loss is"
      f" at most {tolerance:g}, with probability {1.0 - self.error_rate:.10g}"
    )


def promised(
  losses: SequenceLosses, error_rate: float, tolerances: Sequence[float]
) -> tuple[tuple[float, int], ...]:
  """`Panel.promised` of losses on a grid; each tolerance is tested by
  itself.
  """
  levels = [thresholds.NEVER_EXIT, *losses.thresholds.tolist()]

  def certified(tolerance):
    return calibrate(losses, tolerance=tolerance, error_rate=error_rate)

  return tuple(
    (t, levels.index(certified(t).threshold)) for t in sorted({*tolerances})
  )


def shown_prompt(
  prompt: Prompt,
  records: Sequence[Record],
  piece: Callable[[int], str],
  metric: metrics.MetricLike,
  eos_id: int,
) -> ShownPrompt:
  """The outputs of one prompt, of which the first is the full model's; `piece`
  is the text of a token.
  """
  full, metric = records[0], metrics.get_metric(metric)

  def against(text):
    return metric(text, prompt.targets) if prompt.targets else float("nan")

  levels = []
  for record in records:
    layers = record.exit_layers or ()
    tokens = record.tokens or ()
    pieces = [
      "⏎" if token == eos_id else outputs.printable(piece(token))
      for token in tokens
    ]
    pieces[:1] = [first.lstrip(" ") for first in pieces[:1]]
    levels.append(
      Level(
        pieces=tuple(pieces),
        exit_layers=layers,
        confidences=tuple(round(c, 3) for c in record.confidences or ()),
        layers=sum(layers) / max(1, len(layers)),
        distance=1.0 - metric(record.prediction, (full.prediction,)),
        risk_difference=against(full.prediction) - against(record.prediction),
      )
    )
  reference = prompt.targets[0] if prompt.targets else ""
  return ShownPrompt(
    prompt.id, prompt.input, reference, full.prediction, tuple(levels)
  )


def environment(package: str, num_layers: int) -> Any:
  """A Jinja environment for the templates of a package, which may include
  `panel.*`.

  Text of others is shown with its control and direction marks visible.
  """
  import jinja2  # of the extras 'train' and 'report'

  loaders = [
    jinja2.PackageLoader(name, "templates")
    for name in (package, "calm.inference")
  ]
  made = jinja2.Environment(
    loader=jinja2.ChoiceLoader(loaders),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
    finalize=lambda value: sanitize(value) if type(value) is str else value,
  )
  scale = enumerate(outputs.scale(num_layers), start=1)
  made.filters |= {"number": number, "threshold": threshold}
  made.globals["palette"] = [
    (n, back, outputs.text_colour(back)) for n, back in scale
  ]
  return made


def number(value: float, digits: int = 2) -> str:
  """A number, or a dash for NaN."""
  return "–" if math.isnan(value) else f"{value:.{digits}f}"


def threshold(value: float) -> str:
  """A threshold, short; `never` for the full model."""
  return (
    thresholds.NEVER_EXIT_TEXT
    if value == thresholds.NEVER_EXIT
    else f"{value:.4g}"
  )
