"""Ways to leave the decoder: measure, layers and schedule, ranked before any is decoded."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from calm import inference
from calm.exits import confidence, schedules
from calm.fitting import probe as probe_lib

# The paper's tau of Eq. 5 (its Fig. 4 takes 4 for the tasks with long texts), and twice that,
# which needs the fewest layers on the translations of the model in the box; None: constant.
TEMPERATURES = (None, 4.0, 8.0)
# Layers that sets are made of, in deep decoders: a few evenly spread ones.
_MOST_LAYERS = 7
_NUM_QUANTILES = 48
_TOP = (0.999, 0.9975, 0.995, 0.99)  # a measure may be right at its very highest alone
# ROUGE-L distance of two texts over the share of tokens from their first difference on; between
# 0.64 and 0.67 from one token in twenty to one in two, for the model in the box on synopses.
_CHANGED = 2 / 3
# Nowhere clearly ahead of 'softmax' and 'probe', which cost as much, on the three tasks of the
# model in the box (scripts/rank_measures.py).
_LEFT_OUT = ("entropy", "patience")


@dataclasses.dataclass(frozen=True)
class Candidate:
  """One way to leave.

  Attributes:
    measure: name of the confidence measure.
    exit_layers: layers after which a token may leave, 1-based.
    temperature: tau of a decaying threshold (Eq. 5); None: constant.
    propagation: what skipped layers store.
  """

  measure: str
  exit_layers: tuple[int, ...]
  temperature: float | None = None
  propagation: str = "exit_state"

  def options(self, max_decode_length: int) -> dict[str, Any]:
    """As fields of `DecodeOptions`."""
    schedule: schedules.Schedule = schedules.Constant()
    if self.temperature is not None:
      schedule = schedules.Decaying(self.temperature, max_decode_length)
    return {
      "measure": self.measure,
      "exit_layers": self.exit_layers,
      "schedule": schedule,
      "propagation": self.propagation,
    }

  @property
  def can_cut(self) -> bool:
    """Whether at threshold 0 it is the decoder cut after one layer, with its translator."""
    constant = self.temperature is None and len(self.exit_layers) == 1
    return constant and self.measure == "softmax"

  def described(self, threshold: float) -> str:
    """The way to leave at a threshold, in words."""
    if threshold == 0.0 and self.can_cut:
      return f"the decoder cut after layer {self.exit_layers[0]}"
    return str(self)

  def __str__(self) -> str:
    several = "s" if len(self.exit_layers) > 1 else ""
    layers = several + " " + ",".join(map(str, self.exit_layers))
    decays = "" if self.temperature is None else f", decaying with tau {self.temperature:g}"
    return f"{self.measure} after layer{layers}{decays}"


def measures(predictor: inference.Predictor) -> tuple[str, ...]:
  """The measures that a model has: the classifier where it is trained, and so on."""
  decoder, listed = predictor.params["decoder"], bool(predictor.options.shortlist)
  # Parts start at 0: one that is still there was never trained.
  trained = [
    part for part in ("exit_classifier", "exit_probes") if np.any(_kernel(decoder.get(part)))
  ]
  return tuple(
    name
    for name, measure in confidence.MEASURES.items()
    if name not in _LEFT_OUT and confidence.lacking(measure, trained, listed) is None
  )


def _kernel(part) -> np.ndarray:
  return np.zeros(1) if part is None else np.asarray(part["kernel"])


def exit_layers(num_layers: int) -> tuple[int, ...]:
  """Layers that sets are made of, below the last: all, or a few evenly spread ones."""
  spread = np.linspace(1, num_layers - 1, min(_MOST_LAYERS, num_layers - 1))
  return tuple(sorted({round(float(layer)) for layer in spread}))


def layer_sets(num_layers: int) -> tuple[tuple[int, ...], ...]:
  """Sets of layers worth a look: all, from one on, some in a row, and pairs."""
  layers = exit_layers(num_layers)
  sets = [tuple(range(first, num_layers)) for first in layers]
  ends = itertools.combinations(range(len(layers) + 1), 2)
  sets += [tuple(layers[start:end]) for start, end in ends]
  sets += list(itertools.combinations(layers, 2))
  return tuple(dict.fromkeys(sets))


def simulate(
  probe: probe_lib.Probe, candidate: Candidate, thresholds: np.ndarray, max_length: int
) -> tuple[np.ndarray, np.ndarray]:
  """Exit layers, and texts' loss, at every threshold, if states were not propagated.

  Returns:
    (exit_layers [num_thresholds, num_tokens], loss [num_thresholds]): the loss is the mean over
    texts of the share of tokens from the first on that another word would stand for, as far as
    what follows it is another text (`_CHANGED`).
  """
  layers = np.array([*candidate.exit_layers, probe.num_layers])
  name = "softmax" if candidate.measure == "shortlist" else candidate.measure
  sure = probe.confidences[name][:, layers - 1].copy()
  sure[:, -1] = np.inf
  levels = thresholds[:, None]
  if candidate.temperature is not None:
    decay = np.exp(-candidate.temperature * probe.positions / max_length)
    levels = np.clip(0.9 * levels + 0.1 * decay[None], 0.0, 1.0)
  choice = np.argmax(sure[None] >= levels[..., None], axis=-1)
  wrong = ~np.take_along_axis(probe.agrees[:, layers - 1], choice.T, axis=1).T
  # Tokens of a text lie one after another: what begins with a wrong one is wrong to its end.
  starts = np.flatnonzero(probe.positions == 0)
  lengths = np.diff(np.append(starts, len(probe.positions)))
  seen = np.cumsum(wrong, axis=1)
  before = (seen - wrong)[:, starts]
  changed = seen > np.repeat(before, lengths, axis=1)
  sums = np.add.reduceat(changed.astype(float), starts, axis=1)
  return layers[choice], _CHANGED * (sums / lengths).mean(axis=1)


def possible_thresholds(probe: probe_lib.Probe, candidate: Candidate) -> np.ndarray:
  """Thresholds between which tokens change their layer: quantiles of what is measured."""
  name = "softmax" if candidate.measure == "shortlist" else candidate.measure
  layers = np.array(candidate.exit_layers)
  values = np.sort(probe.confidences[name][:, layers - 1].ravel())
  shares = np.concatenate([_TOP, np.linspace(1.0, 0.0, _NUM_QUANTILES + 2)[1:-1]])
  quantiles = np.quantile(values, shares)
  levels = np.unique(np.round(quantiles, 6))[::-1]
  levels = levels[(levels > 0.0) & (levels <= 1.0)]
  return np.append(levels, 0.0) if candidate.can_cut else levels


@dataclasses.dataclass(frozen=True)
class Ranked:
  """A candidate's forecast at the lowest threshold within the tolerance.

  Attributes:
    candidate: the way to leave.
    bytes: moved a token, over full depth's.
    layers: decoder layers a token.
  """

  candidate: Candidate
  bytes: float
  layers: float


def rank(
  predictor: inference.Predictor, probe: probe_lib.Probe, tolerance: float, input_length: int
) -> list[Ranked]:
  """All candidates, the cheapest first."""
  length = predictor.options.max_decode_length
  learned = set(predictor.config.exit_propagation)
  found = []
  for measure in measures(predictor):
    for layers in layer_sets(probe.num_layers):
      if predictor.config.exit_translators and not learned.issuperset(layers):
        continue  # the others have no maps
      for temperature in TEMPERATURES:
        candidate = Candidate(
          measure, layers, temperature, "learned" if learned else "exit_state"
        )
        levels = possible_thresholds(probe, candidate)
        if not len(levels):  # the measure is 0 there, as the state's is after layer 1
          continue
        depth, loss = simulate(probe, candidate, levels, length)
        within = np.flatnonzero(loss <= tolerance)
        exit_layers = depth[within[-1]] if len(within) else np.full(1, probe.num_layers)
        moved = _bytes(predictor, candidate, exit_layers, input_length)
        found.append(Ranked(candidate, moved, float(exit_layers.mean())))
  return sorted(found, key=lambda entry: entry.bytes)


def _bytes(
  predictor, candidate: Candidate, exit_layers: np.ndarray, input_length: int
) -> float:
  options = candidate.options(predictor.options.max_decode_length)
  costs = inference.costs.of_a_step(predictor.with_options(**options), input_length)
  counts = np.bincount(exit_layers, minlength=costs.num_layers + 1)
  moved = sum(
    costs.early(int(layer)).bytes * int(counts[layer]) for layer in np.flatnonzero(counts)
  )
  return float(moved / (costs.full.bytes * counts.sum()))


def lowest(
  probe: probe_lib.Probe, candidate: Candidate, tolerance: float, max_length: int
) -> float:
  """The lowest threshold whose loss the probe puts within the tolerance; `inf` where none."""
  levels = possible_thresholds(probe, candidate)
  _, loss = simulate(probe, candidate, levels, max_length)
  within = np.flatnonzero(np.maximum.accumulate(loss) <= tolerance)
  return float(levels[within[-1]]) if len(within) else float("inf")


def finalists(ranked: Sequence[Ranked], most: int) -> list[Candidate]:
  """What is timed: the best of every measure, the best one constant or decaying where it is the
  other, then others.

  Args:
    ranked: the cheapest first.
    most: how many, at least one a measure.
  """
  chosen: list[Candidate] = []
  for entry in ranked:
    if all(entry.candidate.measure != other.measure for other in chosen):
      chosen.append(entry.candidate)
  # Texts are short or long: seconds will tell which schedule is better.
  first = ranked[0].candidate
  alike = lambda one: (one.measure, one.exit_layers, one.temperature is None)
  other = (first.measure, first.exit_layers, first.temperature is not None)
  chosen += [entry.candidate for entry in ranked if alike(entry.candidate) == other][:1]
  for entry in ranked:
    if len(chosen) >= most:
      break
    # Others by one layer in sets that resemble each other tell little.
    if entry.candidate.exit_layers not in {c.exit_layers for c in chosen}:
      chosen.append(entry.candidate)
  return list(dict.fromkeys(chosen))
