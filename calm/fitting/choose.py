"""Measure, layers, schedule and grid, by measured seconds on the validation part.

the full model's texts -> `probe` -> `candidates.rank` -> a few finalists
each finalist decoded over a grid of its own -> its loss by threshold
the threshold that so many calibration prompts would certify -> timed beside full depth
"""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from calm import exits, inference
from calm.calibrate import Prompt, generations
from calm.calibrate.losses import sequence_losses
from calm.fitting import candidates as candidates_lib
from calm.fitting import probe as probe_lib
from calm.fitting.candidates import Candidate
from calm.fitting.options import FitOptions
from calm.paper.bench import decode, scores, timing

Progress = Callable[[float, str], None]

# Losses at which a grid has its points, as multiples of the tolerance.
_COARSE = (0.1, 0.3, 0.6, 0.9, 1.2, 1.8, 3.0)
_FINE = (0.1, 0.2, 0.3, 0.4, 0.5, *(0.55 + 0.05 * i for i in range(14)), 1.4, 1.7, 2.0)
# One-sided normal quantile at 5 %: a forecast of what will be certified, no promise.
_QUANTILE = 1.645
FINALISTS = 5
TIMED, ROUNDS = 12, 3


@dataclasses.dataclass(frozen=True)
class Tried:
  """One finalist.

  Attributes:
    candidate: the way to leave.
    thresholds: its grid on the validation part.
    losses: [num_thresholds] mean loss there.
    depths: [num_thresholds] mean decoder layers a token.
    threshold: the lowest that calibration will probably certify; `NEVER_EXIT` where none.
    milliseconds: measured decode time a prompt at that threshold; NaN where none.
    speedup: full depth's over these, medians of prompts decoded in turn; NaN where none.
  """

  candidate: Candidate
  thresholds: tuple[float, ...]
  losses: tuple[float, ...]
  depths: tuple[float, ...]
  threshold: float
  milliseconds: float
  speedup: float


@dataclasses.dataclass(frozen=True)
class Choice:
  """What was found on the validation part.

  Attributes:
    tried: every finalist.
    chosen: position of the fastest in `tried`; None where full depth is.
    grid: thresholds to certify, descending; empty where full depth is chosen.
    full_milliseconds: measured decode time a prompt at full depth.
    num_prompts: validation prompts.
    num_timed: those of them that were timed.
  """

  tried: tuple[Tried, ...]
  chosen: int | None
  grid: tuple[float, ...]
  full_milliseconds: float
  num_prompts: int
  num_timed: int

  @property
  def best(self) -> Tried | None:
    """The finalist that was chosen."""
    return None if self.chosen is None else self.tried[self.chosen]


def choose(
  predictor: inference.Predictor,
  prompts: Sequence[Prompt],
  options: FitOptions,
  num_calibration: int,
  folder: pathlib.Path,
  progress: Progress,
) -> Choice:
  """Chooses on validation prompts.

  Args:
    predictor: the trained model.
    prompts: the validation part.
    options: what the fit is asked for.
    num_calibration: prompts that will certify.
    folder: keeps generations, so that a stopped run goes on.
    progress: told of the share done.
  """
  shaped = decode.one_shape(predictor.with_options(batch_size=2 * options.batch_size))
  texts = [prompt.input for prompt in prompts]
  full = decode.with_rule(
    shaped, prompts, exits.StaticExit(), progress=_part(progress, 0.0, 0.1)
  )
  measures = [m for m in candidates_lib.measures(predictor) if m != "shortlist"]
  probe = probe_lib.probe(predictor, texts, full, measures, _part(progress, 0.1, 0.15))
  longest = max(batch.tokens.shape[1] for batch in predictor.plan(texts))
  ranked = candidates_lib.rank(predictor, probe, options.tolerance, longest)
  finalists = candidates_lib.finalists(ranked, FINALISTS)
  tried = []
  for number, candidate in enumerate(finalists):
    start, end = (0.2 + 0.5 * (number + i) / len(finalists) for i in (0, 1))
    inner = _part(progress, start, end)
    tried.append(
      _try(shaped, prompts, probe, candidate, options, num_calibration, folder, inner)
    )
  timed = decode.of_one_length(predictor, prompts, TIMED)
  tried, full_seconds = _timed(predictor, timed, tried, _part(progress, 0.7, 1.0))
  faster = [i for i, entry in enumerate(tried) if entry.speedup > 1.0]
  chosen = max(faster, key=lambda i: tried[i].speedup, default=None)
  return Choice(
    tried=tuple(tried),
    chosen=chosen,
    grid=() if chosen is None else final_grid(tried[chosen], options.tolerance),
    full_milliseconds=1e3 * full_seconds,
    num_prompts=len(prompts),
    num_timed=len(timed),
  )


def _part(progress: Progress, start: float, end: float) -> Progress:
  return lambda share, text: progress(start + share * (end - start), text)


def _try(
  shaped, prompts, probe, candidate, options, num_calibration, folder, progress
) -> Tried:
  """A finalist decoded over the grid that its confidences ask for."""
  length = shaped.options.max_decode_length
  model = shaped.with_options(**candidate.options(length))
  levels = coarse_grid(probe, candidate, options.tolerance, length)
  told = lambda share, text: progress(share, f"{candidate}: {text.split(' at ')[-1]}")
  cached = decode.on_grid(model, prompts, levels, folder, progress=told)
  losses = sequence_losses.compute(cached, options.kind, metric=options.metric).values
  return Tried(
    candidate=candidate,
    thresholds=levels,
    losses=tuple(losses.mean(axis=0).tolist()),
    depths=mean_depths(cached),
    threshold=forecast(levels, losses, options.tolerance, num_calibration),
    milliseconds=float("nan"),
    speedup=float("nan"),
  )


def mean_depths(cached: generations.Generations) -> tuple[float, ...]:
  """Mean decoder layers a token at every threshold."""
  return tuple(scores.mean_layers(records) for records in cached.records)


def coarse_grid(
  probe: probe_lib.Probe, candidate: Candidate, tolerance: float, max_length: int
) -> tuple[float, ...]:
  """Descending thresholds from where no text changes to where far too many do."""
  possible = candidates_lib.possible_thresholds(probe, candidate)
  _, losses = candidates_lib.simulate(probe, candidate, possible, max_length)
  losses = np.maximum.accumulate(losses)
  chosen = {0}
  for level in _COARSE:
    chosen.add(int(np.flatnonzero(losses <= max(level * tolerance, losses[0]))[-1]))
  return tuple(possible[sorted(chosen)].tolist())


def forecast(
  thresholds: Sequence[float], losses: np.ndarray, tolerance: float, num_calibration: int
) -> float:
  """The lowest threshold that so many prompts will probably certify.

  Args:
    thresholds: descending.
    losses: [num_prompts, num_thresholds] on the validation part.
    tolerance: delta.
    num_calibration: prompts that will certify.

  Returns:
    A threshold, between two of the grid where the bound crosses the tolerance there;
    `NEVER_EXIT` where none will do.
  """
  error = losses.std(axis=0, ddof=1) / np.sqrt(num_calibration)
  bound = np.maximum.accumulate(losses.mean(axis=0) + _QUANTILE * error)
  if bound[0] > tolerance:
    return float("inf")
  return _crossing(np.asarray(thresholds), bound, tolerance)


def _crossing(thresholds: np.ndarray, losses: np.ndarray, level: float) -> float:
  """Where losses, which rise along the grid, reach a level; its lowest threshold if nowhere."""
  above = np.flatnonzero(losses > level)
  if not len(above):
    return float(thresholds[-1])
  last = int(above[0])
  if last == 0:
    start, before = 1.0, 0.0
  else:
    start, before = float(thresholds[last - 1]), float(losses[last - 1])
  share = (level - before) / (losses[last] - before)
  return float(np.round(start + max(share, 0.0) * (thresholds[last] - start), 6))


def final_grid(tried: Tried, tolerance: float) -> tuple[float, ...]:
  """Thresholds to certify: densest where the validation loss nears the tolerance.

  Points that pass cost a fixed sequence nothing; points far above the tolerance are left out.
  """
  thresholds = np.asarray(tried.thresholds)
  losses = np.maximum.accumulate(np.asarray(tried.losses))
  points = {_crossing(thresholds, losses, level * tolerance) for level in _FINE}
  points |= {t for t, loss in zip(tried.thresholds, losses, strict=True) if loss <= tolerance}
  if np.isfinite(tried.threshold):
    points.add(tried.threshold)
  return tuple(sorted((t for t in points if 0.0 < t <= 1.0), reverse=True))


def _timed(predictor, prompts, tried: list[Tried], progress) -> tuple[list[Tried], float]:
  """The finalists with their seconds, and full depth's, all in turn on the same prompts."""
  able = [entry for entry in tried if np.isfinite(entry.threshold)]
  length = predictor.options.max_decode_length
  settings = [
    timing.Setting(
      str(entry.candidate),
      predictor.with_options(**entry.candidate.options(length)).options.rule,
      entry.threshold,
    )
    for entry in able
  ]
  # Weights that serve every measure, a shortlist's too.
  serving = predictor.with_options(measure=_with_shortlist(able, predictor))
  found = timing.measure(serving, prompts, settings, rounds=ROUNDS, progress=progress)
  by_name = {row.name: row for row in found.rows}
  return [
    dataclasses.replace(
      entry,
      milliseconds=1e3 * by_name[str(entry.candidate)].decode_seconds,
      speedup=by_name[str(entry.candidate)].speedup,
    )
    if str(entry.candidate) in by_name
    else entry
    for entry in tried
  ], found.full_seconds


def _with_shortlist(tried: Sequence[Tried], predictor: inference.Predictor) -> str:
  asked = any(entry.candidate.measure == "shortlist" for entry in tried)
  return "shortlist" if asked else predictor.options.measure
