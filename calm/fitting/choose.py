"""Measure, exit layers, schedule and grid, by measured seconds on the validation part.

The full model's texts are read by `candidates`, whose ranking gives a few finalists. Each is
timed at the threshold that the ranking forecasts; the fastest are decoded over a grid of their
own, which gives loss by threshold; these are timed again, beside full depth, at the threshold
that calibration will probably certify. Every step costs more than the one before it and is made
for fewer candidates; results are kept, so a stopped run resumes.
"""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from calm import exits, inference
from calm.calibrate import Prompt, Record, seconds
from calm.calibrate import losses as sequence_losses
from calm.fitting import candidates as candidates_lib
from calm.fitting import train
from calm.fitting.candidates import Candidate, Reading
from calm.fitting.options import FitOptions
from calm.inference import grid, result_cache, timing

Progress = Callable[[float, str], None]

# Finalists that are timed; how many of them, the fastest first, get a grid with a threshold.
FINALISTS, DECODED = 5, 2
# (prompts, rounds) of the first timing and of the last one.
FIRST, LAST = (6, 3), (12, 5)
# Where decoding is slow, fewer prompts are decoded: seconds that a candidate may take.
_SECONDS, _LEAST_PROMPTS = 120.0, 32
# Heads and layers of fewer numbers gain nothing in 8 bits; how much faster a head must be, and
# a candidate in 8 bits.
LEAST_NUMBERS, LEAST_LAYERS, MARGIN, CLEARLY = 2**20, 2**21, 1.05, 1.15


@dataclasses.dataclass(frozen=True)
class Tried:
  """One finalist.

  Attributes:
    candidate: the way to leave.
    thresholds: its grid on the validation part; empty where it was only timed, since others
      were faster.
    losses: [num_thresholds] mean loss there.
    depths: [num_thresholds] mean decoder layers a token.
    threshold: the lowest that calibration will probably certify; `NEVER_EXIT` where none. Of
      one that was only timed, the ranking's forecast.
    milliseconds: measured decode time a prompt at that threshold; NaN where none.
    speedup: full depth's over these, the fastest of rounds in turn; NaN where none.
    first_speedup: the same of the first timing; NaN where none.
    end_to_end: as `speedup`, with the encoder's time on both sides.
  """

  candidate: Candidate
  thresholds: tuple[float, ...]
  losses: tuple[float, ...]
  depths: tuple[float, ...]
  threshold: float
  milliseconds: float
  speedup: float
  first_speedup: float = float("nan")
  end_to_end: float = float("nan")

  @property
  def decoded(self) -> bool:
    """Whether its loss was measured, and not only its seconds."""
    return bool(self.thresholds)

  @property
  def gains(self) -> bool:
    """Whether the decoder alone was faster, and the encoder with it."""
    return self.speedup > 1.0 and self.end_to_end > 1.0

  @property
  def score(self) -> float:
    """Full depth's time over this one's, encoder included; 8 bits must gain clearly, since
    texts then depend on the batch that they are decoded in."""
    return self.end_to_end / (CLEARLY if self.candidate.in_8_bits else 1.0)

  @property
  def line(self) -> str:
    """A line for the screen; the first timing decided which went on."""
    if np.isnan(self.speedup):
      return f"  {self.candidate}: no threshold within the tolerance"
    at = f"at threshold {self.threshold:g}"
    name = f"  {self.candidate.described(self.threshold)}:"
    first = f"x{self.first_speedup:.2f} in a first timing"
    if not self.decoded:
      return f"{name} {first}, {at}"
    more = "" if np.isnan(self.first_speedup) else f", {first}"
    return f"{name} x{self.speedup:.2f} as fast {at}{more}"


@dataclasses.dataclass(frozen=True)
class Choice:
  """The choice on the validation part.

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

  def lines(self) -> list[str]:
    """The finalists, those that were decoded first, the fastest first."""
    speed = lambda entry: 0.0 if np.isnan(entry.speedup) else entry.speedup
    ranked = sorted(self.tried, key=lambda entry: (not entry.decoded, -speed(entry)))
    mark = lambda entry: " (chosen)" if self.best is entry else ""
    return [entry.line + mark(entry) for entry in ranked]


@dataclasses.dataclass(frozen=True)
class Full:
  """The full model's texts of validation prompts."""

  records: tuple[Record, ...]


@dataclasses.dataclass(frozen=True)
class Seconds:
  """Finalists timed beside full depth, milliseconds a prompt."""

  full: float
  milliseconds: tuple[float, ...]
  speedups: tuple[float, ...]
  end_to_end: tuple[float, ...]
  num_prompts: int


def part(progress: Progress, start: float, end: float) -> Progress:
  """A step's progress as a part of the whole's."""
  return lambda share, text: progress(start + share * (end - start), text)


@dataclasses.dataclass(frozen=True)
class Choosing:
  """A choice on validation prompts; `run` makes it.

  Attributes:
    predictor: the model with its exits.
    prompts: the validation part.
    options: of the fit.
    num_calibration: prompts that will certify.
    folder: keeps results, so that a stopped run resumes.
    reference: the model whose full-depth texts losses compare with; None: `predictor`.
  """

  predictor: inference.Predictor
  prompts: tuple[Prompt, ...]
  options: FitOptions
  num_calibration: int
  folder: pathlib.Path
  reference: inference.Predictor | None = None

  @functools.cached_property
  def cache(self) -> result_cache.ResultCache:
    return result_cache.ResultCache(self.folder)

  @functools.cached_property
  def key(self) -> dict[str, Any]:
    """Everything that the results depend on."""
    return {
      "procedure": self.predictor.procedure.to_json(),
      "prompts": result_cache.prompts_digest(self.prompts),
      "options": self.options.request,
    }

  @functools.cached_property
  def bulk(self) -> inference.Predictor:
    """The same procedure, in batches for many prompts."""
    return grid.in_bulk(self.predictor)

  def run(self, progress: Progress) -> Choice:
    full = self.cache.get(Full, "full", self.key, lambda: self._full(part(progress, 0.0, 0.2)))
    prompts = self.prompts[: len(full.records)]
    texts = [prompt.input for prompt in prompts]
    names = [m for m in candidates_lib.measures(self.predictor) if m != "shortlist"]
    told = part(progress, 0.2, 0.35)
    reading = candidates_lib.read_layers(self.predictor, texts, full.records, names, told)
    first = [self._forecast(reading, one) for one in self._finalists(texts, reading)]
    first, _ = self._timed("first", first, FIRST, part(progress, 0.35, 0.55))
    first = [dataclasses.replace(entry, first_speedup=entry.speedup) for entry in first]
    compared = full.records
    if self.reference is not None:
      static, model = exits.StaticExit(), grid.in_bulk(self.reference)
      compared = grid.with_rule(model, prompts, static)
    told = part(progress, 0.55, 0.85)
    tried = self._decoded(prompts, compared, reading, first, told)
    tried, found = self._timed("seconds", tried, LAST, part(progress, 0.85, 1.0))
    faster = [i for i, entry in enumerate(tried) if entry.decoded and entry.gains]
    chosen = max(faster, key=lambda i: tried[i].score, default=None)
    levels: tuple[float, ...] = ()
    if chosen is not None:
      best = tried[chosen]
      known = best.candidate, best.thresholds, best.losses, best.threshold
      levels = candidates_lib.final_grid(*known, self.options.tolerance)
    return Choice(tuple(tried), chosen, levels, found.full, len(prompts), found.num_prompts)

  def _full(self, progress: Progress) -> Full:
    """Full-depth texts of as many prompts as a candidate has time for."""
    size, static = self.bulk.options.batch_size, exits.StaticExit()
    first = grid.with_rule(self.bulk, self.prompts[:size], static)  # compiles
    start = time.perf_counter()
    second = grid.with_rule(self.bulk, self.prompts[size : 2 * size], static)
    spent = (time.perf_counter() - start) / max(len(second), 1)
    # A grid costs a candidate about four times the texts.
    affordable = int(_SECONDS / 4 / spent) if second else len(self.prompts)
    count = min(len(self.prompts), max(affordable, _LEAST_PROMPTS, 2 * size))
    rest = self.prompts[2 * size : count]
    return Full((*first, *second, *grid.with_rule(self.bulk, rest, static, progress=progress)))

  def _finalists(self, texts: Sequence[str], reading: Reading) -> list[Candidate]:
    longest = max(batch.tokens.shape[1] for batch in self.predictor.plan(texts))
    tolerance = self.options.tolerance
    ranked = candidates_lib.rank(self.predictor, reading, tolerance, longest)
    return candidates_lib.finalists(ranked, FINALISTS)

  def _forecast(self, reading: Reading, candidate: Candidate) -> Tried:
    """A finalist at the threshold that the ranking forecasts for it."""
    length = self.predictor.options.max_decode_length
    tolerance = self.options.tolerance
    lowest = candidates_lib.lowest_threshold(reading, candidate, tolerance, length)
    return Tried(candidate, (), (), (), lowest, float("nan"), float("nan"))

  def _decoded(self, prompts, full, reading, first, progress: Progress) -> list[Tried]:
    """Finalists with their losses, the fastest first, until `DECODED` have a threshold.

    Where layers are large, the fastest is decoded in 8 bits too.
    """
    tried: list[Tried] = []
    encodings: dict[int, Any] = {}
    fastest = sorted(
      first, key=lambda entry: (not entry.gains, -np.nan_to_num(entry.end_to_end))
    )
    for number, entry in enumerate(fastest):
      found = sum(e.decoded and np.isfinite(e.threshold) for e in tried)
      if found < DECODED:
        share = [(number + i) / (number + DECODED - found) for i in (0, 1)]
        told = part(progress, *share)
        entry = self._decode(prompts, full, reading, entry, encodings, told)
      tried.append(entry)
    if has_large_layers(self.predictor):
      for part_ in filter(None, candidates_lib.IN_8_BITS):
        narrow = dataclasses.replace(fastest[0].candidate, in_8_bits=part_)
        entry = self._forecast(reading, narrow)
        tried.append(self._decode(prompts, full, reading, entry, encodings, progress))
    return tried

  def _decode(self, prompts, full, reading, entry: Tried, encodings, progress) -> Tried:
    """A finalist decoded over the grid that its confidences ask for."""
    options, candidate = self.options, entry.candidate
    length = self.bulk.options.max_decode_length
    model = grid.in_bulk(self.predictor.with_options(**candidate.options(length)))
    levels = candidates_lib.coarse_grid(reading, candidate, options.tolerance, length)
    told = lambda share, text: progress(share, f"{candidate}, {text.split(' at ')[-1]}")
    shared = {} if candidate.in_8_bits else encodings
    cached = grid.on_grid(
      model, prompts, levels, self.folder, full=full, encodings=shared, progress=told
    )
    losses = sequence_losses.compute(cached, options.kind, metric=options.metric).values
    return dataclasses.replace(
      entry,
      thresholds=levels,
      losses=tuple(losses.mean(axis=0).tolist()),
      depths=tuple(map(grid.mean_layers, cached.records)),
      threshold=candidates_lib.forecast(
        levels, losses, options.tolerance, self.num_calibration
      ),
      milliseconds=float("nan"),
      speedup=float("nan"),
      end_to_end=float("nan"),
    )

  def _timed(self, name: str, tried: Sequence[Tried], size: tuple[int, int], progress):
    """(finalists, seconds): those that have a threshold and no seconds yet get them."""
    able = [
      i for i, e in enumerate(tried) if np.isfinite(e.threshold) and not np.isfinite(e.speedup)
    ]
    entries = [tried[i] for i in able]
    key = {**self.key, "entries": [(str(e.candidate), e.threshold) for e in entries]}
    measure = lambda: timed(self.predictor, self.prompts, entries, size, progress)
    found = self.cache.get(Seconds, name, key, measure)
    made = list(tried)
    numbers = zip(able, found.milliseconds, found.speedups, found.end_to_end, strict=True)
    for i, spent, speedup, whole in numbers:
      made[i] = dataclasses.replace(
        tried[i], milliseconds=spent, speedup=speedup, end_to_end=whole
      )
    return made, found


def timed(
  predictor: inference.Predictor,
  prompts: Sequence[Prompt],
  tried: Sequence[Tried],
  size: tuple[int, int],
  progress: Progress,
) -> Seconds:
  """Times finalists at their thresholds and full depth, all in turn on the same prompts.

  The fastest of the rounds counts, prompt by prompt: other work on the machine only ever adds.

  Args:
    predictor: the model with its exits.
    prompts: so many of those of the commonest length are timed.
    tried: finalists with thresholds.
    size: (prompts, rounds).
    progress: called with the share done.
  """
  chosen = timing.of_one_length(predictor, prompts, size[0])
  length = predictor.options.max_decode_length
  # Weights that serve every measure, a shortlist's too.
  asked = any(entry.candidate.measure == "shortlist" for entry in tried)
  serving = predictor.with_options(measure="shortlist") if asked else predictor
  parts = {entry.candidate.in_8_bits for entry in tried} - {""}
  narrow = {part: serving.with_options(**candidates_lib.IN_8_BITS[part]) for part in parts}
  settings = [
    timing.Setting(
      f"{number}: {entry.candidate}",
      predictor.with_options(**entry.candidate.options(length)).options.rule,
      entry.threshold,
      narrow.get(entry.candidate.in_8_bits),
    )
    for number, entry in enumerate(tried)
  ]
  told = lambda share, text: progress(share, text.split(": ")[-1])
  found = timing.measure(
    serving, chosen, settings, rounds=size[1], of_rounds=np.min, progress=told
  )
  rows = [row for row in found.rows if row.name != timing.FULL]
  return Seconds(
    full=1e3 * found.full_seconds,
    milliseconds=tuple(1e3 * row.decode_seconds for row in rows),
    speedups=tuple(row.speedup for row in rows),
    end_to_end=tuple(row.end_to_end for row in rows),
    num_prompts=len(chosen),
  )


# ---- The output head in 8 bits, and exact decoding: the texts do not change


@dataclasses.dataclass(frozen=True)
class HeadReading:
  """Full depth with the output head as it is stored, and read in 8 bits.

  Attributes:
    stored, narrow: milliseconds a prompt.
    num_prompts: prompts that were timed.
  """

  stored: float
  narrow: float
  num_prompts: int

  @property
  def pays(self) -> bool:
    """Whether the head is read in 8 bits."""
    return self.stored / self.narrow > MARGIN

  def __str__(self) -> str:
    return (
      f"Output head: read {'in 8 bits' if self.pays else 'as it is stored'}; in 8 bits full"
      f" depth is x{self.stored / self.narrow:.2f} as fast ({self.stored:.1f} ->"
      f" {self.narrow:.1f} ms a prompt, {self.num_prompts} prompts)."
    )


def has_large_head(predictor: inference.Predictor) -> bool:
  """Whether reading the output head in 8 bits is worth timing; its tokens are the same."""
  size = predictor.vocabulary.vocab_size * predictor.config.emb_dim
  return size >= LEAST_NUMBERS and predictor.options.head_dtype is None


def has_large_layers(predictor: inference.Predictor) -> bool:
  """Whether layers in 8 bits are a candidate; they change texts, which the promise covers."""
  config, options = predictor.config, predictor.options
  heads = 1 if config.logits_via_embedding else 2
  layers = train.num_parameters(config) - heads * config.vocab_size * config.emb_dim
  exact = not inference.options.batch_size_affects_output(config, options)
  return exact and options.weights_dtype is None and layers >= LEAST_LAYERS


def read_head(
  predictor: inference.Predictor, prompts: Sequence[Prompt], progress: Progress
) -> HeadReading:
  """Times full depth with the head read either way, prompt by prompt and in turn."""
  chosen = timing.of_one_length(predictor, prompts, 8)
  setting = timing.Setting(
    "8 bits", exits.StaticExit(), model=predictor.with_options(head_dtype="int8")
  )
  found = timing.measure(predictor, chosen, [setting], progress=progress)
  narrow = 1e3 * found.rows[1].decode_seconds
  return HeadReading(1e3 * found.full_seconds, narrow, len(chosen))


def fastest_exact(
  predictor: inference.Predictor, texts: Sequence[str], cache: result_cache.ResultCache
) -> tuple[inference.Predictor, seconds.Seconds | None]:
  """The model that decodes its full texts fastest from verified drafts, and its seconds.

  A pass over drafts asks the head about several positions, of which 8 bits save more time than
  of one. The texts are the same.

  Args:
    predictor: the model.
    texts: prompts to time.
    cache: of earlier measurements.

  Returns:
    The model and its seconds beside full depth; `predictor` and None where drafts are not
    faster, there is one layer only, or states are rounded to few bits.
  """
  if predictor.num_layers == 1 or not inference.can_be_exact(predictor):
    return predictor, None
  rule, best, least = inference.exact_rule(predictor), (predictor, None), 1.0
  models = [predictor]
  if has_large_head(predictor):
    models.append(predictor.with_options(head_dtype="int8"))
  for model in models:
    found = cache.get(
      seconds.Seconds,
      "exact" if model is predictor else "exact_in_8_bits",
      {
        "procedure": model.procedure.to_json(),
        "head": model.options.head_dtype,
        "beside": predictor.options.head_dtype,
        "rule": dataclasses.asdict(rule),
      },
      lambda model=model: inference.timing.beside_full_depth(
        model, texts, 1.0, rule=rule, base=predictor
      ),
    )
    if not found.slower and found.single.speedup > least:
      best, least = (model, found), found.single.speedup * MARGIN
  return best
