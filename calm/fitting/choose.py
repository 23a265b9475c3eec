"""Measure, exit layers, schedule and grid, by measured seconds on the
validation part.

Confidences at the full model's texts rank all candidates; a few are timed at
the threshold that this forecasts; the fastest are decoded over a grid and timed
again at the threshold that calibration will probably certify.
"""

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from calm import exits, inference, storage
from calm.calibrate import Prompt, Record, losses
from calm.console import Report
from calm.exits import confidence, schedules, walk
from calm.fitting import exit_maps, request
from calm.inference import grid, timing
from calm.inference.grid import part
from calm.t5 import caches, decoder, parameters

# Finalists that are timed; how many of them, the fastest first, get a grid with
# a threshold.
FINALISTS = 5
DECODED = 2
DECODE_TEXTS = "Decode the rows that train, at full depth"
# (prompts, rounds) of the first timing and of the last one.
FIRST = (6, 3)
LAST = (12, 5)
# Heads and layers of fewer numbers gain nothing in 8 bits; how much faster a
# head must be, and a candidate in 8 bits.
LEAST_NUMBERS = 2**20
LEAST_LAYERS = 2**20
MARGIN = 1.05
CLEARLY = 1.15
# The paper's tau of Eq. 5 (its Fig. 4 takes 4 for the tasks with long texts),
# and twice that, which needs the fewest layers on the translations of the model
# in the box; None: constant.
TEMPERATURES = (None, 4.0, 8.0)
# Layers that sets are made of, in deep decoders: a few evenly spread ones.
_MOST_LAYERS = 7
_NUM_QUANTILES = 48
# a measure may be right at its very highest only
_TOP = (0.999, 0.9975, 0.995, 0.99)
# ROUGE-L distance of two texts over the share of tokens from their first
# difference on; between 0.64 and 0.67 from one token in twenty to one in two,
# for the model in the box on synopses.
_CHANGED = 2 / 3
# Losses at which a grid has its points, as multiples of the tolerance.
_COARSE = (0.1, 0.3, 0.6, 0.9, 1.2, 1.8, 3.0)
_FINE = (
  0.1,
  0.2,
  0.3,
  0.4,
  0.5,
  *(0.55 + 0.05 * i for i in range(14)),
  1.4,
  1.7,
  2.0,
)
# One-sided normal quantile at 5 %: a forecast of what will be certified, no
# promise.
_QUANTILE = 1.645


@dataclasses.dataclass(frozen=True)
class Candidate:
  """One way to leave the decoder early."""

  # name of the confidence measure; 'verified': full depth, drafts off the
  # prompt
  measure: str
  # layers after which a token may leave, 1-based; (): full depth
  exit_layers: tuple[int, ...]
  # tau of a decaying threshold (Eq. 5); None: constant
  temperature: float | None = None
  propagation: str = "exit_state"  # what skipped layers store
  # What is rounded to 8 bits, a key of `IN_8_BITS`; the reference is still the
  # text of the float32 model.
  in_8_bits: str = ""

  def applied(self, predictor: inference.Predictor) -> inference.Predictor:
    """The model, leaving this way."""
    schedule: schedules.Schedule = schedules.Constant()
    if self.temperature is not None:
      schedule = schedules.Decaying(
        self.temperature, predictor.options.max_decode_length
      )
    return predictor.with_options(
      measure=self.measure,
      exit_layers=self.exit_layers,
      schedule=schedule,
      propagation=self.propagation,
      **IN_8_BITS[self.in_8_bits],
    )

  def __str__(self) -> str:
    several = "s" if len(self.exit_layers) > 1 else ""
    layers = several + " " + ",".join(map(str, self.exit_layers))
    decays = (
      ""
      if self.temperature is None
      else f", decaying with tau {self.temperature:g}"
    )
    rounds = "matrices" if self.in_8_bits == "layers" else self.in_8_bits
    bits = f", {rounds} in 8 bits" if rounds else ""
    drafts = (
      ", drafts off the prompt" if self.measure == inference.VERIFIED else ""
    )
    exits = f"{self.measure} after layer{layers}{decays}"
    return (exits if self.exit_layers else f"full depth{drafts}") + bits


# Texts depend on the batch size, and one prompt at a time is what is timed.
_ENCODER = {
  "encoder_dtype": "int8",
  "reference_dtype": "float32",
  "batch_size": 1,
}
# Fields of `DecodeOptions` by what is in 8 bits.
IN_8_BITS: Mapping[str, Mapping[str, Any]] = {
  "": {},
  "encoder": _ENCODER,
  "layers": {"weights_dtype": "int8", **_ENCODER},
}


@dataclasses.dataclass(frozen=True)
class Tried:
  """One finalist; seconds are NaN where it was not timed."""

  candidate: Candidate
  # its grid on the validation part; empty: only timed
  thresholds: tuple[float, ...] = ()
  losses: tuple[float, ...] = ()  # [num_thresholds] mean loss there
  # The lowest that calibration will probably certify; `NEVER_EXIT` where none.
  # Of one that was only timed, the ranking's forecast.
  threshold: float = float("nan")
  # measured decode time a prompt at that threshold
  milliseconds: float = float("nan")
  # full depth's over these, the fastest of rounds in turn
  speedup: float = float("nan")
  # as `speedup`, with the encoder's time on both sides
  end_to_end: float = float("nan")

  @property
  def decoded(self) -> bool:
    """Whether its loss was measured, and not only its seconds."""
    return bool(self.thresholds)

  @property
  def cut(self) -> bool:
    """Whether it is the decoder cut after a layer, with its translator: all
    tokens leave.
    """
    return self.thresholds == (0.0,)

  @property
  def gains(self) -> bool:
    """Whether the decoder alone was faster, and the encoder with it."""
    return self.speedup > 1.0 and self.end_to_end > 1.0

  @property
  def score(self) -> float:
    """Full depth's time over this one's, encoder included; 8 bits must gain
    clearly, since texts then depend on the batch that they are decoded in.
    """
    return self.end_to_end / (CLEARLY if self.candidate.in_8_bits else 1.0)

  @property
  def way(self) -> str:
    """The candidate in words."""
    candidate = self.candidate
    return (
      f"cut after layer {candidate.exit_layers[0]}"
      if self.cut
      else str(candidate)
    )

  def __str__(self) -> str:
    if np.isnan(self.speedup):
      return f"{self.way}: no threshold within the tolerance"
    at = f"at threshold {self.threshold:g}"
    timing = "as fast" if self.decoded else "in a first timing,"
    return f"{self.way}: x{self.speedup:.2f} {timing} {at}"


@dataclasses.dataclass(frozen=True)
class Choice:
  """The choice on the validation part."""

  tried: tuple[Tried, ...]  # every finalist
  chosen: int | None  # position of the fastest; None where full depth is
  # thresholds to certify, descending; empty for full depth
  grid: tuple[float, ...]
  full_milliseconds: float  # measured decode time a prompt at full depth
  num_prompts: int  # validation prompts

  @property
  def best(self) -> Tried | None:
    """The finalist that was chosen."""
    return None if self.chosen is None else self.tried[self.chosen]

  @property
  def compared(self) -> str:
    """The cut decoder beside the fastest exits; '' where these break the
    promise.
    """
    able = [
      entry
      for entry in self.tried
      if entry.decoded and np.isfinite(entry.speedup)
    ]
    cut = next((entry for entry in able if entry.cut), None)
    leave = [e.speedup for e in able if e.candidate.exit_layers and not e.cut]
    fastest = max(leave, default=None)
    if fastest is None:
      return ""
    speed = (
      f"{cut.way}: x{cut.speedup:.2f} under the same promise" if cut else ""
    )
    return (
      f"{speed or 'no cut decoder keeps the promise'}; exits: x{fastest:.2f}"
    )

  def lines(self) -> list[str]:
    """The finalists, those that were decoded first, the fastest first."""

    def order(entry):
      return (not entry.decoded, -np.nan_to_num(entry.speedup))

    def mark(entry):
      return " (chosen)" if self.best is entry else ""

    lines = [f"{entry}{mark(entry)}" for entry in sorted(self.tried, key=order)]
    return [f"  {line}" for line in (*lines, self.compared) if line]


def exit_layers(num_layers: int) -> tuple[int, ...]:
  """Layers that sets are made of, below the last: all, or a few evenly spread
  ones.
  """
  spread = np.linspace(1, num_layers - 1, min(_MOST_LAYERS, num_layers - 1))
  return tuple(sorted({round(float(layer)) for layer in spread}))


# ---- Confidences of every layer


@dataclasses.dataclass(frozen=True, eq=False)
class Reading:
  """Every layer at every token of the full model's texts, one text after
  another.
  """

  # Measure -> [num_tokens, num_layers] in [0, 1]; a shortlist's are softmax's.
  confidences: Mapping[str, np.ndarray]
  # [num_tokens, num_layers] whether the argmax is the last layer's
  agrees: np.ndarray
  positions: np.ndarray  # [num_tokens] of a token in its text


def read_layers(
  predictor: inference.Predictor,
  texts: Sequence[str],
  full: Sequence[Record],
  progress: Report,
) -> Reading:
  """Reads every layer at every token of `full`, the full-depth records of
  `texts`.
  """
  names = [
    name
    for name in inference.options.measures(predictor)
    if name != "shortlist"
  ]
  bulk = predictor.with_options(batch_size=exit_maps.BATCH).changed(
    one_shape=True
  )
  tokens = [record.tokens or () for record in full]
  batches = list(exit_maps.with_targets(bulk.plan(texts), tokens))
  read = jax.jit(functools.partial(_read, predictor, tuple(names)))
  found: list[tuple[np.ndarray, ...]] = []
  for number, (rows, *given) in enumerate(batches, start=1):
    layers = jax.device_get(
      read(predictor.weights.decoder, predictor.params, *given)
    )
    for i, length in enumerate(len(tokens[row]) for row in rows):
      columns = [array[:, i, :length].T for array in layers]
      found.append((*columns, np.arange(length)))
    progress(
      number / len(batches), f"reading layers, batch {number} of {len(batches)}"
    )
  agrees, *values, positions = map(np.concatenate, zip(*found, strict=True))
  confidences = dict(zip(names, values, strict=True))
  confidences["shortlist"] = confidences["softmax"]
  return Reading(confidences, agrees, positions)


def _read(
  predictor: inference.Predictor,
  names: Sequence[str],
  weights,
  params,
  inputs,
  targets,
):
  """Whether layers agree with the last, and their confidences, [layers, batch,
  length] each.
  """
  config = predictor.config
  shape = targets.shape
  states, *_ = exit_maps.full_states(config, params, inputs, targets)
  states = [
    state.reshape(-1, config.emb_dim)
    for state in (jnp.zeros_like(states[0]), *states)
  ]
  # no layer attends to anything
  nothing = caches.Encoded((), jnp.zeros(0), jnp.zeros(0))
  heads = decoder.DecoderStep(weights, config, nothing, (), ()).layers(())

  def after(layer: int) -> tuple[jax.Array, ...]:
    view = walk.view_after(heads, layer, states[layer], states[layer - 1])
    peaks = view.peaks()
    view = dataclasses.replace(view, peaks=lambda: peaks)
    return peaks.token, *(confidence.measure(name)(view) for name in names)

  columns = zip(*map(after, range(1, len(states))), strict=True)
  best, *values = (jnp.stack(column).reshape(-1, *shape) for column in columns)
  return best == best[-1:], *values


# ---- Simulation and ranking


def simulate(
  reading: Reading,
  candidate: Candidate,
  thresholds: np.ndarray,
  max_length: int,
) -> tuple[np.ndarray, np.ndarray]:
  """Exit layers [num_thresholds, num_tokens] and loss [num_thresholds], if
  states were not propagated: the mean share of a text's tokens from the first
  changed one on, times `_CHANGED`.
  """
  layers = np.array([*candidate.exit_layers, reading.agrees.shape[1]])
  sure = reading.confidences[candidate.measure][:, layers - 1]
  sure[:, -1] = np.inf
  levels = thresholds[:, None]
  if candidate.temperature is not None:
    decay = np.exp(-candidate.temperature * reading.positions / max_length)
    levels = np.clip(0.9 * levels + 0.1 * decay[None], 0.0, 1.0)
  choice = np.argmax(sure[None] >= levels[..., None], axis=-1)
  wrong = ~np.take_along_axis(reading.agrees[:, layers - 1], choice.T, axis=1).T
  # Tokens of a text lie one after another; after a wrong one the text is
  # another to its end.
  texts = np.split(wrong, np.flatnonzero(reading.positions == 0)[1:], axis=1)
  shares = [
    np.logical_or.accumulate(text, axis=1).mean(axis=1) for text in texts
  ]
  return layers[choice], _CHANGED * np.mean(shares, axis=0)


def possible_thresholds(reading: Reading, candidate: Candidate) -> np.ndarray:
  """Thresholds between which tokens change their layer: quantiles of the
  confidence.
  """
  values = reading.confidences[candidate.measure][
    :, np.array(candidate.exit_layers) - 1
  ]
  shares = np.concatenate(
    [_TOP, np.linspace(1.0, 0.0, _NUM_QUANTILES + 2)[1:-1]]
  )
  levels = np.unique(np.round(np.quantile(values, shares), 6))[::-1]
  return levels[(levels > 0.0) & (levels <= 1.0)]


def rank(
  predictor: inference.Predictor,
  reading: Reading,
  tolerance: float,
  input_length: int,
) -> list[Tried]:
  """All candidates, those first that move the fewest bytes a token at the
  lowest threshold with a simulated loss within the tolerance (`inf` where none
  has).
  """
  length = predictor.options.max_decode_length
  learned = set(predictor.config.exit_propagation)
  # All layers, all from one on, runs of them, and pairs.
  layers = exit_layers(predictor.num_layers)
  sets = [tuple(range(first, predictor.num_layers)) for first in layers]
  ends = itertools.combinations(range(len(layers) + 1), 2)
  sets += [layers[start:end] for start, end in ends]
  sets = tuple(dict.fromkeys([*sets, *itertools.combinations(layers, 2)]))
  if predictor.config.exit_translators:  # other layers have no maps
    sets = tuple(layers for layers in sets if learned.issuperset(layers))
  found = []
  for name, layers, tau in itertools.product(
    inference.options.measures(predictor), sets, TEMPERATURES
  ):
    candidate = Candidate(
      name, layers, tau, "learned" if learned else "exit_state"
    )
    levels = possible_thresholds(reading, candidate)
    # the confidence is 0 there, as the state's is after layer 1
    if not len(levels):
      continue
    depth, loss = simulate(reading, candidate, levels, length)
    within = np.flatnonzero(np.maximum.accumulate(loss) <= tolerance)
    depths = np.full(1, predictor.num_layers)
    threshold = float("inf")
    if len(within):
      depths = depth[within[-1]]
      threshold = float(levels[within[-1]])
    costs = candidate.applied(predictor).step_costs(input_length)
    found.append(
      (costs.savings([depths]).bytes, Tried(candidate, threshold=threshold))
    )
  return [entry for _, entry in sorted(found, key=lambda pair: -pair[0])]


def finalists(ranked: Sequence[Tried], most: int) -> list[Tried]:
  """At most `most` of those ranked, which are timed: the best of every measure,
  the first one's constant or decaying counterpart, others with other layers.
  """
  best = {entry.candidate.measure: entry for entry in reversed(ranked)}
  chosen = sorted(best.values(), key=ranked.index)

  # Texts are short or long: seconds decide which schedule is better.
  def alike(one):
    return (one.measure, one.exit_layers, one.temperature is None)

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
  """Descending thresholds from where no text changes to where far too many
  do.
  """
  if not candidate.exit_layers:
    return (1.0,)
  possible = possible_thresholds(reading, candidate)
  rising = np.maximum.accumulate(
    simulate(reading, candidate, possible, max_length)[1]
  )
  levels = [max(level * tolerance, rising[0]) for level in _COARSE]
  chosen = {0} | {int(np.flatnonzero(rising <= level)[-1]) for level in levels}
  return tuple(possible[sorted(chosen)].tolist())


def forecast(
  thresholds: Sequence[float],
  losses: np.ndarray,
  tolerance: float,
  num_calibration: int,
) -> float:
  """The lowest threshold that `num_calibration` prompts will probably certify,
  maybe between two, by `losses` [num_prompts, num_thresholds] of the validation
  part; `inf`: none, or the first, without which no other is tested, is in doubt
  by what two draws of prompts differ.
  """
  means = losses.mean(axis=0)
  spread = _QUANTILE * losses.std(axis=0, ddof=1)
  bound = np.maximum.accumulate(means + spread / np.sqrt(num_calibration))
  if (
    means[0] + spread[0] * np.sqrt(1 / len(losses) + 1 / num_calibration)
    > tolerance
  ):
    return float("inf")
  return float(np.round(np.interp(tolerance, bound, thresholds), 6))


def final_grid(best: Tried, tolerance: float) -> tuple[float, ...]:
  """Thresholds to certify, densest where the mean validation loss nears the
  tolerance.
  """
  if best.cut:
    return best.thresholds
  levels = np.asarray(best.thresholds)
  rising = np.maximum.accumulate(best.losses)
  wanted = tolerance * np.array(_FINE)  # above threshold 1 nothing is lost
  crossed = np.interp(wanted, [0.0, *rising], [1.0, *levels])
  points = {
    *np.round(crossed, 6).tolist(),
    *levels[rising <= tolerance].tolist(),
  }
  if np.isfinite(best.threshold):
    points.add(best.threshold)
  return tuple(sorted((t for t in points if 0.0 < t <= 1.0), reverse=True))


# ---- The choice


def in_8_bits(ways: Sequence[Candidate]) -> list[Candidate]:
  """What is tried in 8 bits: these ways to leave, and full depth, with drafts
  off the prompt. Texts change, which the promise covers.
  """

  def of(name, few):
    return [dataclasses.replace(way, in_8_bits=name) for way in few]

  whole = Candidate(inference.VERIFIED, ())
  return [*of("layers", ways), *of("encoder", ways[:1]), *of("layers", [whole])]


def full_texts(
  model: inference.Predictor,
  prompts: Sequence[Prompt],
  folder: pathlib.Path,
  progress: Report,
) -> tuple[Record, ...]:
  """[num_prompts] full-depth records, decoded once into a `folder`."""
  key = {
    "model": model.procedure.to_json(),
    "prompts": storage.prompts_digest(prompts),
  }

  def make():
    return grid.with_rule(model, prompts, exits.StaticExit(), progress=progress)

  return storage.cached(folder, tuple[Record, ...], "full_texts", key, make)


def choose(
  fit: request.Fit, predictor: inference.Predictor, progress: Report
) -> Choice:
  """The choice on the validation part; losses compare with the given model's
  texts.
  """
  prompts = fit.splits.validation
  options = fit.options
  folder = fit.work / "validation"
  length = predictor.options.max_decode_length
  full = full_texts(
    grid.in_bulk(predictor), prompts, folder, part(progress, 0.0, 0.2)
  )
  texts = [prompt.input for prompt in prompts]
  reading = read_layers(predictor, texts, full, part(progress, 0.2, 0.35))
  longest = max(batch.tokens.shape[1] for batch in predictor.plan(texts))
  ranked = rank(predictor, reading, options.tolerance, longest)
  first = finalists(ranked, FINALISTS)
  first, _ = timed(predictor, prompts, first, FIRST, part(progress, 0.35, 0.55))
  if options.train_all:
    told = part(progress, 0.55, 0.6)
    full = full_texts(grid.in_bulk(fit.source), prompts, folder, told)

  def decode(
    candidate: Candidate, progress: Report, levels: tuple[float, ...] = ()
  ) -> Tried:
    """A finalist decoded over a grid, else the one that its confidences ask
    for.
    """
    model = grid.in_bulk(candidate.applied(predictor))
    levels = levels or coarse_grid(
      reading, candidate, options.tolerance, length
    )
    told = part(progress, 0.0, 1.0, f"{candidate}, ")
    cached = grid.on_grid(
      model, prompts, levels, folder, full=full, progress=told
    )
    values = losses.compute(cached, options.kind, metric=options.metric).values
    return Tried(
      candidate,
      levels,
      tuple(values.mean(axis=0).tolist()),
      forecast(levels, values, options.tolerance, len(fit.splits.calibration)),
    )

  tried: list[Tried] = []
  fastest = sorted(
    first, key=lambda e: (not e.gains, -np.nan_to_num(e.end_to_end))
  )
  for number, entry in enumerate(fastest):  # until enough have a threshold
    found = sum(e.decoded and np.isfinite(e.threshold) for e in tried)
    if found < DECODED:
      start, end = (
        0.6 + 0.25 * (number + i) / (number + DECODED - found) for i in (0, 1)
      )
      entry = decode(entry.candidate, part(progress, start, end))
    tried.append(entry)
  able = [
    entry.candidate
    for entry in tried
    if np.isfinite(entry.threshold) and entry.decoded
  ]
  # The decoder cut after the first layer whose texts will probably be
  # certified.
  for layer in sorted({entry.candidate.exit_layers[0] for entry in ranked}):
    cut = Candidate("softmax", (layer,), None, ranked[0].candidate.propagation)
    if simulate(reading, cut, np.zeros(1), length)[1] <= options.tolerance:
      entry = decode(cut, part(progress, 0.85, 0.85), (0.0,))
      if np.isfinite(entry.threshold):
        tried.append(entry)
        break
  leaves = parameters.flatten(predictor.params).items()
  numbers = sum(leaf.size for path, leaf in leaves if "/layers_" in path)
  narrows = numbers >= LEAST_LAYERS and not predictor.batch_size_affects_output
  narrows = narrows and predictor.options.weights_dtype is None
  ways = in_8_bits(able or [fastest[0].candidate]) if narrows else []
  tried += [decode(way, part(progress, 0.85, 0.85)) for way in ways]
  tried, milliseconds = timed(
    predictor, prompts, tried, LAST, part(progress, 0.85, 1.0)
  )
  faster = [i for i, entry in enumerate(tried) if entry.decoded and entry.gains]
  chosen = max(faster, key=lambda i: tried[i].score, default=None)
  levels = (
    () if chosen is None else final_grid(tried[chosen], options.tolerance)
  )
  return Choice(tuple(tried), chosen, levels, milliseconds, len(prompts))


def timed(
  predictor: inference.Predictor,
  prompts: Sequence[Prompt],
  tried: Sequence[Tried],
  size: tuple[int, int],
  progress: Report,
) -> tuple[list[Tried], float]:
  """Finalists with their seconds beside full depth's, and its milliseconds a
  prompt. Those with a threshold and no seconds yet take turns on (prompts,
  rounds) of `size`; the fastest of the rounds counts, prompt by prompt: other
  work only ever adds.
  """
  able = [
    i
    for i, e in enumerate(tried)
    if np.isfinite(e.threshold) and np.isnan(e.speedup)
  ]
  settings = []
  for entry in (tried[i] for i in able):
    model = entry.candidate.applied(predictor)
    name = str(entry.candidate)
    rule = model.options.rule
    settings.append(timing.Setting(name, rule, entry.threshold, model))
  chosen = timing.of_one_length(predictor, prompts, size[0])
  found = timing.measure(
    predictor,
    chosen,
    settings,
    rounds=size[1],
    of_rounds=np.min,
    progress=progress,
  )
  made = list(tried)
  for i, row in zip(able, found.rows[1:], strict=True):
    made[i] = dataclasses.replace(
      tried[i],
      milliseconds=1e3 * row.decode_seconds,
      speedup=row.speedup,
      end_to_end=row.end_to_end,
    )
  return made, 1e3 * found.rows[0].decode_seconds


# ---- The output head in 8 bits, and exact decoding: the texts do not change


def fastest_head(
  fit: request.Fit, predictor: inference.Predictor
) -> inference.Predictor:
  """The model with a large output head in 8 bits where full depth is clearly
  faster so; its tokens are the same.
  """
  size = predictor.vocabulary.vocab_size * predictor.config.emb_dim
  if size < LEAST_NUMBERS or predictor.options.head_dtype is not None:
    return predictor
  progress = fit.step("Time the output head in 8 bits")
  narrow = predictor.with_options(head_dtype="int8")
  setting = timing.Setting("8 bits", exits.StaticExit(), model=narrow)
  chosen = timing.of_one_length(predictor, fit.splits.validation, 8)
  found = timing.measure(predictor, chosen, [setting], progress=progress)
  full, row = found.rows
  pays = row.speedup > MARGIN
  fit.say(
    f"Output head: read {'in 8 bits' if pays else 'as it is stored'}; in 8 "
    "bits full depth is"
    f" x{row.speedup:.2f} as fast ({1e3 * full.decode_seconds:.1f} ->"
    f" {1e3 * row.decode_seconds:.1f} ms a prompt, {found.num_prompts} "
    "prompts)."
  )
  return narrow if pays else predictor


def faster_exact(
  predictor: inference.Predictor, prompts: Sequence[Prompt]
) -> tuple[timing.Seconds, exits.Speculative] | None:
  """Seconds of full texts from verified drafts, of the model's exits or off the
  prompt, beside full depth's; None where neither is faster one prompt at a
  time, there is one layer, or states are rounded to few bits.
  """
  if predictor.num_layers == 1 or predictor.batch_size_affects_output:
    return None
  texts = [prompt.input for prompt in prompts]
  seconds = timing.beside_full_depth
  rules = inference.exact_rule(predictor), inference.LOOKED_UP
  found = [(seconds(predictor, texts, 1.0, rule=rule), rule) for rule in rules]
  best = max(found, key=lambda pair: pair[0].single.speedup)
  return best if best[0].single.speedup > MARGIN else None
