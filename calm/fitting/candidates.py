"""Candidates: measure, exit layers and schedule, ranked on one pass of the full model.

From the confidences of every layer at every token of the full model's texts all candidates'
exits and losses are simulated, as if states were not propagated; the few that rank best are
decoded (`choose`).
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from calm import inference
from calm.calibrate import Record
from calm.exits import confidence, evidence, schedules
from calm.fitting import exit_maps
from calm.inference import grid
from calm.t5 import parameters

# The paper's tau of Eq. 5 (its Fig. 4 takes 4 for the tasks with long texts), and twice that,
# which needs the fewest layers on the translations of the model in the box; None: constant.
TEMPERATURES = (None, 4.0, 8.0)
# Layers that sets are made of, in deep decoders: a few evenly spread ones.
_MOST_LAYERS = 7
_NUM_QUANTILES = 48
_TOP = (0.999, 0.9975, 0.995, 0.99)  # a measure may be right at its very highest only
# ROUGE-L distance of two texts over the share of tokens from their first difference on; between
# 0.64 and 0.67 from one token in twenty to one in two, for the model in the box on synopses.
_CHANGED = 2 / 3
# Losses at which a grid has its points, as multiples of the tolerance.
_COARSE = (0.1, 0.3, 0.6, 0.9, 1.2, 1.8, 3.0)
_FINE = (0.1, 0.2, 0.3, 0.4, 0.5, *(0.55 + 0.05 * i for i in range(14)), 1.4, 1.7, 2.0)
# One-sided normal quantile at 5 %: a forecast of what will be certified, no promise.
_QUANTILE = 1.645


@dataclasses.dataclass(frozen=True)
class Candidate:
  """One way to leave the decoder early."""

  measure: str  # name of the confidence measure
  exit_layers: tuple[int, ...]  # layers after which a token may leave, 1-based
  temperature: float | None = None  # tau of a decaying threshold (Eq. 5); None: constant
  propagation: str = "exit_state"  # what skipped layers store
  # What is multiplied in 8 bits, a key of `IN_8_BITS`; the reference is still the text of the
  # float32 model.
  in_8_bits: str = ""

  def options(self, max_decode_length: int) -> dict[str, Any]:
    """Fields of `DecodeOptions`."""
    schedule: schedules.Schedule = schedules.Constant()
    if self.temperature is not None:
      schedule = schedules.Decaying(self.temperature, max_decode_length)
    return {
      "measure": self.measure,
      "exit_layers": self.exit_layers,
      "schedule": schedule,
      "propagation": self.propagation,
      **IN_8_BITS[self.in_8_bits],
    }

  @property
  def can_cut(self) -> bool:
    """Whether at threshold 0 it is the decoder cut after one layer, with its translator."""
    constant = self.temperature is None and len(self.exit_layers) == 1
    return constant and self.measure == "softmax"

  def described(self, threshold: float) -> str:
    """The candidate at a threshold, in words."""
    if threshold == 0.0 and self.can_cut:
      return f"the decoder cut after layer {self.exit_layers[0]}{self._bits}"
    return str(self)

  def __str__(self) -> str:
    several = "s" if len(self.exit_layers) > 1 else ""
    layers = several + " " + ",".join(map(str, self.exit_layers))
    decays = "" if self.temperature is None else f", decaying with tau {self.temperature:g}"
    return f"{self.measure} after layer{layers}{decays}{self._bits}"

  @property
  def _bits(self) -> str:
    return f", {self.in_8_bits} in 8 bits" if self.in_8_bits else ""


_ENCODER = {"encoder_dtype": "int8", "reference_dtype": "float32"}
# Fields of `DecodeOptions` by what is in 8 bits.
IN_8_BITS: Mapping[str, Mapping[str, str]] = {
  "": {},
  "encoder": _ENCODER,
  "layers": {"weights_dtype": "int8", **_ENCODER},
}


def measures(predictor: inference.Predictor) -> tuple[str, ...]:
  """The measures that a model has: the classifier where it is trained, and so on."""
  decoder, listed = predictor.params["decoder"], bool(predictor.options.shortlist)
  # Exit parameters start at 0: those that are still 0 were never trained.
  trained = [
    part
    for part in ("exit_classifier", "exit_probes")
    if part in decoder and np.any(np.asarray(decoder[part]["kernel"]))
  ]
  return tuple(
    name
    for name, measure in confidence.MEASURES.items()
    if confidence.lacking(measure, trained, listed) is None
  )


def exit_layers(num_layers: int) -> tuple[int, ...]:
  """Layers that sets are made of, below the last: all, or a few evenly spread ones."""
  spread = np.linspace(1, num_layers - 1, min(_MOST_LAYERS, num_layers - 1))
  return tuple(sorted({round(float(layer)) for layer in spread}))


def layer_sets(num_layers: int) -> tuple[tuple[int, ...], ...]:
  """Sets of exit layers: all, from one on, runs of layers, and pairs."""
  layers = exit_layers(num_layers)
  sets = [tuple(range(first, num_layers)) for first in layers]
  ends = itertools.combinations(range(len(layers) + 1), 2)
  sets += [tuple(layers[start:end]) for start, end in ends]
  sets += list(itertools.combinations(layers, 2))
  return tuple(dict.fromkeys(sets))


# ---- Confidences of every layer


@dataclasses.dataclass(frozen=True, eq=False)
class Reading:
  """Every layer at every token of the full model's texts, one text after another."""

  confidences: Mapping[str, np.ndarray]  # measure -> [num_tokens, num_layers] in [0, 1]
  agrees: np.ndarray  # [num_tokens, num_layers] whether the argmax is the last layer's
  positions: np.ndarray  # [num_tokens] of a token in its text

  @property
  def num_layers(self) -> int:
    return self.agrees.shape[1]

  def of(self, candidate: Candidate) -> np.ndarray:
    """[num_tokens, num_layers] confidences of a candidate's measure."""
    measure = candidate.measure
    return self.confidences["softmax" if measure == "shortlist" else measure]


def read_layers(
  predictor: inference.Predictor,
  texts: Sequence[str],
  full: Sequence[Record],
  names: Sequence[str],
  progress: Callable[[float, str], None],
) -> Reading:
  """Reads every layer at every token of `full`, the full-depth records of `texts`.

  `names` are measures but 'shortlist', whose confidence is that of 'softmax'.
  """
  batches = grid.one_shape(predictor.with_options(batch_size=exit_maps.BATCH)).plan(texts)
  longest = max(len(record.tokens or ()) for record in full)
  read = jax.jit(functools.partial(_read, predictor, tuple(names)))
  found: list[tuple[np.ndarray, ...]] = []
  for number, batch in enumerate(batches):
    rows = [full[int(row)].tokens or () for row in batch.rows]
    targets = exit_maps.padded_targets(rows, len(batch.tokens), longest)
    layers = [np.asarray(x) for x in read(predictor.params, batch.tokens, targets)]
    for i, tokens in enumerate(rows):
      columns = [array[:, i, : len(tokens)].T for array in layers]
      found.append((*columns, np.arange(len(tokens))))
    share = (number + 1) / len(batches)
    progress(share, f"reading layers, batch {number + 1} of {len(batches)}")
  agrees, *values, positions = map(np.concatenate, zip(*found, strict=True))
  return Reading(dict(zip(names, values, strict=True)), agrees, positions)


def _read(predictor: inference.Predictor, names: Sequence[str], params, inputs, targets):
  """Whether layers agree with the last, and their confidences, [layers, batch, length] each."""
  config, num_pieces = predictor.config, predictor.vocabulary.vocab_size
  shortlist = np.asarray(predictor.options.shortlist or (), int)
  hidden, _, normed = exit_maps.full_states(config, params, inputs, targets)
  head = parameters.head_kernel(params, config)
  probes: Any = parameters.probes(params)

  def logits_of(layer, columns: Any = slice(num_pieces)):
    return normed[layer].astype(jnp.float32) @ head[:, columns]

  def exit_logit(layer):
    classifier = params["decoder"]["exit_classifier"]
    state = normed[layer].astype(jnp.float32)
    return (state @ classifier["kernel"])[..., 0] + classifier["bias"][0]

  def probe_logit(layer, previous):
    if layer + 1 == probes.num_layers:
      return jnp.full(hidden.shape[1:-1], evidence.CERTAIN)
    features = evidence.evidence(hidden[layer], previous, logits_of(layer, shortlist))
    return probes.logit(layer + 1, normed[layer], features)

  last, columns = None, []
  for layer in reversed(range(config.num_decoder_layers)):
    logits = logits_of(layer)
    best = jnp.argmax(logits, axis=-1)
    last = best if last is None else last
    previous = hidden[layer - 1] if layer else jnp.zeros_like(hidden[0])
    view = confidence.LayerView(
      layer + 1,
      hidden[layer],
      previous,
      logits=lambda logits=logits: logits,
      exit_logit=lambda layer=layer: exit_logit(layer),
      shortlist_logits=lambda layer=layer: logits_of(layer, shortlist),
      probe_logit=lambda layer=layer, previous=previous: probe_logit(layer, previous),
    )
    columns.append((best == last, *(confidence.measure(name)(view) for name in names)))
  return tuple(jnp.stack(part) for part in zip(*columns[::-1], strict=True))


# ---- Simulation and ranking


def simulate(
  reading: Reading, candidate: Candidate, thresholds: np.ndarray, max_length: int
) -> tuple[np.ndarray, np.ndarray]:
  """Exit layers and loss at every threshold, if states were not propagated.

  Returns:
    (exit_layers [num_thresholds, num_tokens], loss [num_thresholds]): the loss is the mean over
    texts of the share of tokens from the first changed one on, times `_CHANGED`.
  """
  layers = np.array([*candidate.exit_layers, reading.num_layers])
  sure = reading.of(candidate)[:, layers - 1].copy()
  sure[:, -1] = np.inf
  levels = thresholds[:, None]
  if candidate.temperature is not None:
    decay = np.exp(-candidate.temperature * reading.positions / max_length)
    levels = np.clip(0.9 * levels + 0.1 * decay[None], 0.0, 1.0)
  choice = np.argmax(sure[None] >= levels[..., None], axis=-1)
  wrong = ~np.take_along_axis(reading.agrees[:, layers - 1], choice.T, axis=1).T
  # Tokens of a text lie one after another; after a wrong one the text is another to its end.
  starts = np.flatnonzero(reading.positions == 0)
  lengths = np.diff(np.append(starts, len(reading.positions)))
  seen = np.cumsum(wrong, axis=1)
  before = (seen - wrong)[:, starts]
  changed = seen > np.repeat(before, lengths, axis=1)
  sums = np.add.reduceat(changed.astype(float), starts, axis=1)
  return layers[choice], _CHANGED * (sums / lengths).mean(axis=1)


def possible_thresholds(reading: Reading, candidate: Candidate) -> np.ndarray:
  """Thresholds between which tokens change their layer: quantiles of the confidence."""
  values = np.sort(reading.of(candidate)[:, np.array(candidate.exit_layers) - 1].ravel())
  shares = np.concatenate([_TOP, np.linspace(1.0, 0.0, _NUM_QUANTILES + 2)[1:-1]])
  levels = np.unique(np.round(np.quantile(values, shares), 6))[::-1]
  levels = levels[(levels > 0.0) & (levels <= 1.0)]
  return np.append(levels, 0.0) if candidate.can_cut else levels


@dataclasses.dataclass(frozen=True)
class Ranked:
  """A candidate, the lowest threshold with a simulated loss within the tolerance (`inf` where
  none has), and the bytes moved a token there over full depth's."""

  candidate: Candidate
  threshold: float
  bytes: float


def rank(
  predictor: inference.Predictor, reading: Reading, tolerance: float, input_length: int
) -> list[Ranked]:
  """All candidates, the cheapest first."""
  length = predictor.options.max_decode_length
  learned = set(predictor.config.exit_propagation)
  sets = layer_sets(reading.num_layers)
  if predictor.config.exit_translators:  # other layers have no maps
    sets = tuple(layers for layers in sets if learned.issuperset(layers))
  found = []
  for name, layers, tau in itertools.product(measures(predictor), sets, TEMPERATURES):
    candidate = Candidate(name, layers, tau, "learned" if learned else "exit_state")
    levels = possible_thresholds(reading, candidate)
    if not len(levels):  # the confidence is 0 there, as the state's is after layer 1
      continue
    depth, loss = simulate(reading, candidate, levels, length)
    within = np.flatnonzero(np.maximum.accumulate(loss) <= tolerance)
    depths = depth[within[-1]] if len(within) else np.full(1, reading.num_layers)
    threshold = float(levels[within[-1]]) if len(within) else float("inf")
    costs = predictor.with_options(**candidate.options(length)).step_costs(input_length)
    counts = np.bincount(depths, minlength=costs.num_layers + 1)
    moved = sum(costs.early(int(i)).bytes * int(counts[i]) for i in np.flatnonzero(counts))
    found.append(Ranked(candidate, threshold, moved / (costs.full.bytes * counts.sum())))
  return sorted(found, key=lambda entry: entry.bytes)


def finalists(ranked: Sequence[Ranked], most: int) -> list[Ranked]:
  """At most `most` candidates that are timed, of those ranked, the cheapest first: the best of
  every measure, the first one's constant or decaying counterpart, others with other layers."""
  best = {entry.candidate.measure: entry for entry in reversed(ranked)}
  chosen = sorted(best.values(), key=ranked.index)
  # Texts are short or long: seconds decide which schedule is better.
  alike = lambda one: (one.measure, one.exit_layers, one.temperature is None)
  first = ranked[0].candidate
  other = (first.measure, first.exit_layers, first.temperature is not None)
  chosen += [entry for entry in ranked if alike(entry.candidate) == other][:1]
  for entry in ranked:
    # Sets that differ by one layer resemble each other.
    layers = {e.candidate.exit_layers for e in chosen}
    if len(chosen) < most and entry.candidate.exit_layers not in layers:
      chosen.append(entry)
  return list(dict.fromkeys(chosen))


# ---- Grids


def coarse_grid(
  reading: Reading, candidate: Candidate, tolerance: float, max_length: int
) -> tuple[float, ...]:
  """Descending thresholds from where no text changes to where far too many do."""
  possible = possible_thresholds(reading, candidate)
  _, losses = simulate(reading, candidate, possible, max_length)
  losses = np.maximum.accumulate(losses)
  levels = [max(level * tolerance, losses[0]) for level in _COARSE]
  chosen = {0} | {int(np.flatnonzero(losses <= level)[-1]) for level in levels}
  return tuple(possible[sorted(chosen)].tolist())


def forecast(
  thresholds: Sequence[float], losses: np.ndarray, tolerance: float, num_calibration: int
) -> float:
  """The lowest threshold that `num_calibration` prompts will probably certify; `inf`: none.

  It may lie between two of the descending thresholds, at which the validation part has the
  losses [num_prompts, num_thresholds].
  """
  error = losses.std(axis=0, ddof=1) / np.sqrt(num_calibration)
  bound = np.maximum.accumulate(losses.mean(axis=0) + _QUANTILE * error)
  if bound[0] > tolerance:
    return float("inf")
  return _crossing(np.asarray(thresholds), bound, tolerance)


def final_grid(
  candidate: Candidate,
  thresholds: Sequence[float],
  losses: Sequence[float],
  threshold: float,
  tolerance: float,
) -> tuple[float, ...]:
  """Thresholds to certify, densest where the mean validation loss nears the tolerance.

  Points that pass cost a fixed sequence nothing; points far above the tolerance are left out.
  """
  rising = np.maximum.accumulate(np.asarray(losses))
  points = {_crossing(np.asarray(thresholds), rising, level * tolerance) for level in _FINE}
  points |= {t for t, loss in zip(thresholds, rising, strict=True) if loss <= tolerance}
  if np.isfinite(threshold):
    points.add(threshold)
  lowest = 0.0 if candidate.can_cut else np.nextafter(0.0, 1.0)
  return tuple(sorted((t for t in points if lowest <= t <= 1.0), reverse=True))


def _crossing(thresholds: np.ndarray, losses: np.ndarray, level: float) -> float:
  """Where losses, which rise along the grid, reach a level; its lowest threshold if nowhere."""
  above = np.flatnonzero(losses > level)
  if not len(above):
    return float(thresholds[-1])
  last = int(above[0])
  start, before = (1.0, 0.0) if last == 0 else (thresholds[last - 1], losses[last - 1])
  share = (level - before) / (losses[last] - before)
  return float(np.round(start + max(share, 0.0) * (thresholds[last] - start), 6))
