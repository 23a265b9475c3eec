"""Measure, layers, schedule and grid, by measured seconds on the validation part.

the full model's texts -> `probe` -> `candidates.rank` -> a few finalists
each finalist timed at the threshold that the probe forecasts -> the fastest go on
those decoded over a grid of their own -> loss by threshold
the threshold that so many calibration prompts would certify -> timed beside full depth

Every step costs more than the one before it and is made for fewer; the results of each are
kept, so that a run that was stopped goes on.
"""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from calm import exits, inference
from calm.calibrate import Prompt, Record, generations
from calm.calibrate.losses import sequence_losses
from calm.fitting import candidates as candidates_lib
from calm.fitting import forecasts
from calm.fitting import probe as probe_lib
from calm.fitting.candidates import Candidate
from calm.fitting.forecasts import Tried
from calm.fitting.options import FitOptions
from calm.inference import offline, result_cache, timing
from calm.paper.bench import scores

Progress = Callable[[float, str], None]

# Ways to leave that are timed; those of them, the fastest first, that are decoded over a grid
# until so many have a threshold.
FINALISTS, DECODED = 5, 2
TIMED, ROUNDS = 12, 3
_FIRST_TIMED, _FIRST_ROUNDS = 6, 2
# Where decoding is slow, fewer prompts are looked at: seconds that a candidate may take.
_SECONDS, _LEAST_PROMPTS = 120.0, 32


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
    folder: keeps what was found so far, so that a stopped run goes on.
    progress: told of the share done.
  """
  return _Choosing(predictor, tuple(prompts), options, num_calibration, folder).run(progress)


@dataclasses.dataclass(frozen=True)
class Full:
  """The full model's texts of the validation prompts that are looked at."""

  records: tuple[Record, ...]


@dataclasses.dataclass(frozen=True)
class Seconds:
  """Finalists timed beside full depth, milliseconds a prompt."""

  full: float
  milliseconds: tuple[float, ...]
  speedups: tuple[float, ...]
  num_prompts: int


@dataclasses.dataclass(frozen=True)
class _Choosing:
  """A choice at work; see `choose`."""

  predictor: inference.Predictor
  prompts: tuple[Prompt, ...]
  options: FitOptions
  num_calibration: int
  folder: pathlib.Path

  @functools.cached_property
  def cache(self) -> result_cache.ResultCache:
    return result_cache.ResultCache(self.folder)

  @functools.cached_property
  def key(self) -> dict[str, Any]:
    """What everything here depends on."""
    return {
      "procedure": self.predictor.procedure.to_json(),
      "prompts": result_cache.prompts_digest(self.prompts),
      "options": self.options.request,
    }

  @functools.cached_property
  def shaped(self) -> inference.Predictor:
    """Of the procedure that will be certified, in batches for many prompts."""
    return offline.in_bulk(self.predictor)

  def run(self, progress: Progress) -> Choice:
    found = self.cache.get(Full, "full", self.key, lambda: self._full(part(progress, 0.0, 0.2)))
    prompts = self.prompts[: len(found.records)]
    ranked, probe = self._rank(prompts, found.records, part(progress, 0.2, 0.35))
    first = [self._forecast(probe, candidate) for candidate in ranked]
    first, _ = self._timed("first", first, (_FIRST_TIMED, _FIRST_ROUNDS), progress, 0.35, 0.55)
    first = [dataclasses.replace(entry, first_speedup=entry.speedup) for entry in first]
    tried = self._decoded(prompts, found.records, probe, first, part(progress, 0.55, 0.85))
    tried, seconds = self._timed("seconds", tried, (TIMED, ROUNDS), progress, 0.85, 1.0)
    faster = [i for i, entry in enumerate(tried) if entry.decoded and entry.speedup > 1.0]
    chosen = max(faster, key=lambda i: tried[i].speedup, default=None)
    return Choice(
      tried=tuple(tried),
      chosen=chosen,
      grid=()
      if chosen is None
      else forecasts.final_grid(tried[chosen], self.options.tolerance),
      full_milliseconds=seconds.full,
      num_prompts=len(prompts),
      num_timed=seconds.num_prompts,
    )

  def _full(self, progress: Progress) -> Full:
    """Full-depth texts of as many prompts as a candidate has time for."""
    size = self.shaped.options.batch_size
    first = offline.with_rule(self.shaped, self.prompts[:size], exits.StaticExit())  # compiles
    start = time.perf_counter()
    second = offline.with_rule(self.shaped, self.prompts[size : 2 * size], exits.StaticExit())
    seconds = (time.perf_counter() - start) / max(len(second), 1)
    # A grid costs a candidate about four times the texts.
    affordable = int(_SECONDS / 4 / seconds) if second else len(self.prompts)
    count = min(len(self.prompts), max(affordable, _LEAST_PROMPTS, 2 * size))
    rest = offline.with_rule(
      self.shaped, self.prompts[2 * size : count], exits.StaticExit(), progress=progress
    )
    return Full((*first, *second, *rest))

  def _rank(self, prompts, full, progress: Progress):
    """The finalists, the cheapest first, and the probe that says so."""
    texts = [prompt.input for prompt in prompts]
    names = [m for m in candidates_lib.measures(self.predictor) if m != "shortlist"]
    probe = probe_lib.probe(self.predictor, texts, full, names, progress)
    longest = max(batch.tokens.shape[1] for batch in self.predictor.plan(texts))
    ranked = candidates_lib.rank(self.predictor, probe, self.options.tolerance, longest)
    return candidates_lib.finalists(ranked, FINALISTS), probe

  def _forecast(self, probe: probe_lib.Probe, candidate: Candidate) -> Tried:
    """A finalist at the threshold that the probe forecasts for it."""
    length = self.predictor.options.max_decode_length
    threshold = candidates_lib.lowest(probe, candidate, self.options.tolerance, length)
    return Tried(candidate, (), (), (), threshold, float("nan"), float("nan"))

  def _decoded(self, prompts, full, probe, first, progress: Progress) -> list[Tried]:
    """Finalists with their losses, the fastest first, until `DECODED` have a threshold."""
    order = sorted(first, key=lambda entry: -np.nan_to_num(entry.speedup))
    tried: list[Tried] = []
    encodings: dict[int, Any] = {}
    for number, entry in enumerate(order):
      found = sum(e.decoded and np.isfinite(e.threshold) for e in tried)
      if found == DECODED:
        tried.append(entry)
        continue
      inner = part(progress, *((number + i) / (number + DECODED - found) for i in (0, 1)))
      tried.append(self._try(prompts, full, probe, entry, encodings, inner))
    return tried

  def _try(self, prompts, full, probe, entry: Tried, encodings, progress: Progress) -> Tried:
    """A finalist decoded over the grid that its confidences ask for."""
    options, candidate = self.options, entry.candidate
    length = self.shaped.options.max_decode_length
    model = self.shaped.with_options(**candidate.options(length))
    levels = forecasts.coarse_grid(probe, candidate, options.tolerance, length)
    told = lambda share, text: progress(share, f"{candidate}, {text.split(' at ')[-1]}")
    cached = offline.on_grid(
      model, prompts, levels, self.folder, full=full, encodings=encodings, progress=told
    )
    losses = sequence_losses.compute(cached, options.kind, metric=options.metric).values
    return dataclasses.replace(
      entry,
      thresholds=levels,
      losses=tuple(losses.mean(axis=0).tolist()),
      depths=mean_depths(cached),
      threshold=forecasts.forecast(levels, losses, options.tolerance, self.num_calibration),
      milliseconds=float("nan"),
      speedup=float("nan"),
    )

  def _timed(
    self,
    name: str,
    tried: Sequence[Tried],
    size: tuple[int, int],
    progress: Progress,
    *share: float,
  ) -> tuple[list[Tried], Seconds]:
    """Those that have a threshold, with their seconds beside full depth's.

    One that was only timed keeps the seconds that it has.
    """
    able = [
      i
      for i, entry in enumerate(tried)
      if np.isfinite(entry.threshold) and not np.isfinite(entry.speedup)
    ]
    entries = [tried[i] for i in able]
    key = {**self.key, "entries": [(str(e.candidate), e.threshold) for e in entries]}
    told = part(progress, *share)
    seconds = self.cache.get(
      Seconds, name, key, lambda: timed(self.predictor, self.prompts, entries, size, told)
    )
    made = list(tried)
    for i, spent, speedup in zip(able, seconds.milliseconds, seconds.speedups, strict=True):
      made[i] = dataclasses.replace(tried[i], milliseconds=spent, speedup=speedup)
    return made, seconds


def part(progress: Progress, start: float, end: float) -> Progress:
  """A step's progress as a part of the whole's."""
  return lambda share, text: progress(start + share * (end - start), text)


def mean_depths(cached: generations.Generations) -> tuple[float, ...]:
  """Mean decoder layers a token at every threshold."""
  return tuple(scores.mean_layers(records) for records in cached.records)


def timed(
  predictor: inference.Predictor,
  prompts: Sequence[Prompt],
  tried: Sequence[Tried],
  size: tuple[int, int],
  progress: Progress,
) -> Seconds:
  """Finalists at their thresholds and full depth, all in turn on the same prompts.

  The fastest of the rounds counts, prompt by prompt: a process that rested for a minute made
  half of its medians of two rounds, and a way to leave x0.02 as fast.

  Args:
    predictor: the trained model.
    prompts: so many of those of the commonest length are timed.
    tried: finalists with thresholds.
    size: (prompts, rounds).
    progress: told of the share done.
  """
  chosen = offline.of_one_length(predictor, prompts, size[0])
  length = predictor.options.max_decode_length
  settings = [
    timing.Setting(
      f"{number}: {entry.candidate}",
      predictor.with_options(**entry.candidate.options(length)).options.rule,
      entry.threshold,
    )
    for number, entry in enumerate(tried)
  ]
  # Weights that serve every measure, a shortlist's too.
  serving = predictor.with_options(measure=_with_shortlist(tried, predictor))
  told = lambda share, text: progress(share, text.split(": ")[-1])
  found = timing.measure(
    serving, chosen, settings, rounds=size[1], of_rounds=np.min, progress=told
  )
  rows = [row for row in found.rows if row.name != timing.FULL]
  return Seconds(
    full=1e3 * found.full_seconds,
    milliseconds=tuple(1e3 * row.decode_seconds for row in rows),
    speedups=tuple(row.speedup for row in rows),
    num_prompts=len(chosen),
  )


def _with_shortlist(tried: Sequence[Tried], predictor: inference.Predictor) -> str:
  asked = any(entry.candidate.measure == "shortlist" for entry in tried)
  return "shortlist" if asked else predictor.options.measure
