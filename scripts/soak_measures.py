"""Every confidence measure on the packed model, for `soak.py`: random batches, each text held
against itself alone.

Where they differ, the first difference has to be a tie: the text alone comes out so too at a
threshold within 1e-5, or the two likeliest tokens of that exit are as near to each other. That
holds for measures of any kind, since no confidence is taken for a margin. A flip that is
neither fails.
"""

import collections
import dataclasses
import random
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from calm import exits, inference
from calm.exits import confidence, schedules
from calm.t5 import parameters

MEASURES = (*confidence.MEASURES, "verified")
TIE = 1e-5
EXITS = (3, 4)
DRAFTS = 2  # the layer that drafts, of 'verified'


@dataclasses.dataclass(frozen=True)
class Margins:
  """`rule`, whose confidences are the margins of the tokens that are emitted."""

  rule: exits.DynamicExits

  def depth(self, num_layers: int) -> int:
    return self.rule.depth(num_layers)

  def __call__(self, layers, hidden, active, threshold, generated) -> exits.TokenExit:
    made = self.rule(layers, hidden, active, threshold, generated)
    return dataclasses.replace(made, confidence=confidence.softmax_margin(made.logits))


def steps(output: Any) -> list[tuple[int, int]]:
  """(token, exit layer) of each position."""
  return list(zip(output.tokens, output.exit_layers, strict=True))


def is_tie(model: inference.Predictor, text: str, threshold: float, ours: Any) -> bool:
  """Whether the first difference of `ours` from the text alone is a tie.

  Args:
    model: decodes it alone.
    text: the prompt.
    threshold: lambda of both.
    ours: its output among others.
  """
  alone = lambda at, rule=None: model.generate([text], threshold=at, rule=rule)[0]
  theirs, found = steps(alone(threshold)), steps(ours)
  same = (a == b for a, b in zip(found, theirs, strict=False))
  at = next((i for i, equal in enumerate(same) if not equal), None)
  if at is None:  # one goes on where the other ends
    return False
  nearby = (max(threshold - TIE, 0.0), min(threshold + TIE, 1.0))
  if any(steps(alone(moved))[: at + 1] == found[: at + 1] for moved in nearby):
    return True
  rule = model.options.rule
  if found[at][1] != theirs[at][1] or not isinstance(rule, exits.DynamicExits):
    return False
  watched = alone(threshold, Margins(rule))
  return steps(watched)[:at] == theirs[:at] and watched.confidences[at] < TIE


def load(name: str, **options: Any) -> inference.Predictor:
  """The packed model under a measure; probes, which it has none of, are drawn."""
  layers = (DRAFTS,) if name == "verified" else EXITS
  model = inference.load("packed", batch_size=1, **options).with_options(
    measure=name, exit_layers=layers
  )
  if name != "probe":
    return model
  config = dataclasses.replace(model.config, exit_probes=True)
  draw = np.random.default_rng(0)
  params = parameters.add_exit_parts(model.params, config)
  params["decoder"]["exit_probes"] = jax.tree.map(
    lambda leaf: draw.normal(0.0, 0.1, leaf.shape).astype(np.float32),
    params["decoder"]["exit_probes"],
  )
  return dataclasses.replace(model, config=config, params=params)


def resized(model: inference.Predictor, batch_size: int) -> inference.Predictor:
  """The model with another batch size, its weights laid out once for all."""
  options = dataclasses.replace(model.options, batch_size=batch_size)
  other = dataclasses.replace(model, options=options)
  vars(other)["weights"] = model.weights
  return other


def middle(model: inference.Predictor, texts: Sequence[str]) -> float:
  """The median of the confidences that full depth refuses.

  Four digits, so that no token's own confidence is the threshold.
  """
  never = model.generate(texts, threshold=schedules.NEVER_EXIT, rule=model.options.rule)
  seen = [value for output in never for value in output.rejected_confidences if value > 0]
  return round(float(np.median(seen)), 4)


class Subject:
  """One measure, its pool of texts, and what was seen of it.

  Attributes:
    name: the measure.
    threshold: lambda.
    batches, rows, different, ties: so many until now.
  """

  def __init__(self, name: str, texts: Sequence[str], most_rows: int, **options: Any):
    self.name, self._texts = name, texts
    model = load(name, **options)
    self.threshold = middle(model, texts)
    decoded = model.generate(texts, threshold=self.threshold)
    self._alone = dict(zip(texts, decoded, strict=True))
    self._models = [resized(model, size) for size in range(1, most_rows + 1)]
    self.batches = self.rows = self.different = self.ties = 0

  def meet_shapes(self) -> None:
    """Decodes a batch of every size and padded length, so that each program was compiled once.

    What was compiled is later loaded from the disk, and takes half as much room again.
    """
    of_length = {self._models[0].plan([t])[0].tokens.shape[1]: t for t in self._alone}
    for size, model in enumerate(self._models, start=1):
      for text in of_length.values():
        model.generate([text] * size, threshold=self.threshold)

  def decode(self, rng: random.Random) -> None:
    """A batch of random texts and size."""
    chosen = rng.choices(self._texts, k=rng.randint(1, len(self._models)))
    outputs = self._models[len(chosen) - 1].generate(chosen, threshold=self.threshold)
    self.batches += 1
    self.rows += len(chosen)
    for text, ours in zip(chosen, outputs, strict=True):
      if steps(ours) != steps(self._alone[text]):
        self.different += 1
        self.ties += is_tie(self._models[0], text, self.threshold, ours)

  @property
  def good(self) -> bool:
    """Whether all that differs is a tie, and few do."""
    return self.different == self.ties <= 0.005 * self.rows

  @property
  def layers(self) -> str:
    """Part of the pool's tokens by exit layer; of 'verified', of drafts that were accepted."""
    outputs = self._alone.values()
    if self.name == "verified":
      drafted = [value for output in outputs for value in output.drafted]
      return f"drafted {np.mean(drafted):.0%}"
    counts = collections.Counter(layer for output in outputs for layer in output.exit_layers)
    return ", ".join(f"{k}: {counts[k] / counts.total():.0%}" for k in sorted(counts))

  @property
  def says(self) -> str:
    return f"{self.different} of {self.rows}, {self.ties} of them ties"
