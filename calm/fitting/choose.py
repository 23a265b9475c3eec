"""Measure, exit layers, schedule and grid, by measured seconds on the validation part.

The full model's texts are read by `candidates`, whose ranking gives a few finalists. Each is
timed at the threshold that the ranking forecasts; the fastest are decoded over a grid of their
own, which gives loss by threshold; these are timed again, beside full depth, at the threshold
that calibration will probably certify. Every step costs more than the one before it and is made
for fewer candidates; results are kept, so a stopped run resumes.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from calm import exits, inference
from calm.calibrate import Prompt, Record, losses
from calm.console import Report
from calm.fitting import candidates
from calm.fitting.candidates import Candidate
from calm.fitting.request import FitOptions
from calm.inference import grid, result_cache, timing
from calm.t5 import parameters

# Finalists that are timed; how many of them, the fastest first, get a grid with a threshold.
FINALISTS, DECODED = 5, 2
DECODE_TEXTS = "Decode the rows that train, at full depth"
# (prompts, rounds) of the first timing and of the last one.
FIRST, LAST = (6, 3), (12, 5)
# Heads and layers of fewer numbers gain nothing in 8 bits; how much faster a head must be, and
# a candidate in 8 bits.
LEAST_NUMBERS, LEAST_LAYERS, MARGIN, CLEARLY = 2**20, 2**21, 1.05, 1.15
_NAN = float("nan")


@dataclasses.dataclass(frozen=True)
class Tried:
  """One finalist; seconds are NaN where it was not timed."""

  candidate: Candidate
  thresholds: tuple[float, ...] = ()  # its grid on the validation part; empty: only timed
  losses: tuple[float, ...] = ()  # [num_thresholds] mean loss there
  # The lowest that calibration will probably certify; `NEVER_EXIT` where none. Of one that was
  # only timed, the ranking's forecast.
  threshold: float = _NAN
  milliseconds: float = _NAN  # measured decode time a prompt at that threshold
  speedup: float = _NAN  # full depth's over these, the fastest of rounds in turn
  first_speedup: float = _NAN  # the same of the first timing
  end_to_end: float = _NAN  # as `speedup`, with the encoder's time on both sides

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

  def __str__(self) -> str:
    if np.isnan(self.speedup):
      return f"{self.candidate}: no threshold within the tolerance"
    at = f"at threshold {self.threshold:g}"
    name = self.candidate.described(self.threshold)
    first = f"x{self.first_speedup:.2f} in a first timing"
    if not self.decoded:
      return f"{name}: {first}, {at}"
    more = "" if np.isnan(self.first_speedup) else f", {first}"
    return f"{name}: x{self.speedup:.2f} as fast {at}{more}"


@dataclasses.dataclass(frozen=True)
class Choice:
  """The choice on the validation part."""

  tried: tuple[Tried, ...]  # every finalist
  chosen: int | None  # position of the fastest; None where full depth is
  grid: tuple[float, ...]  # thresholds to certify, descending; empty for full depth
  full_milliseconds: float  # measured decode time a prompt at full depth
  num_prompts: int  # validation prompts

  @property
  def best(self) -> Tried | None:
    """The finalist that was chosen."""
    return None if self.chosen is None else self.tried[self.chosen]

  def lines(self) -> list[str]:
    """The finalists, those that were decoded first, the fastest first."""
    order = lambda entry: (not entry.decoded, -np.nan_to_num(entry.speedup))
    mark = lambda entry: " (chosen)" if self.best is entry else ""
    return [f"  {entry}{mark(entry)}" for entry in sorted(self.tried, key=order)]


def part(progress: Report, start: float, end: float) -> Report:
  """A step's progress as a part of the whole's."""
  return lambda share, text: progress(start + share * (end - start), text)


def full_texts(
  model: inference.Predictor,
  prompts: Sequence[Prompt],
  cache: result_cache.ResultCache,
  progress: Report,
) -> tuple[Record, ...]:
  """[num_prompts] full-depth records, decoded once."""
  key = {"model": model.procedure.to_json(), "prompts": result_cache.prompts_digest(prompts)}
  make = lambda: grid.with_rule(model, prompts, exits.StaticExit(), progress=progress)
  return cache.get(tuple[Record, ...], "full_texts", key, make)


def choose(
  predictor: inference.Predictor,
  prompts: tuple[Prompt, ...],
  options: FitOptions,
  num_calibration: int,
  folder: pathlib.Path,
  reference: inference.Predictor | None,
  progress: Report,
) -> Choice:
  """The choice of measure, exit layers, schedule and grid on the validation part's prompts.

  `num_calibration` prompts will certify; `folder` keeps generations, so that a stopped run
  resumes; losses compare with the full-depth texts of `reference` (None: of `predictor`).
  """
  cache, length = result_cache.ResultCache(folder), predictor.options.max_decode_length
  full = full_texts(grid.in_bulk(predictor), prompts, cache, part(progress, 0.0, 0.2))
  texts = [prompt.input for prompt in prompts]
  names = [m for m in candidates.measures(predictor) if m != "shortlist"]
  told = part(progress, 0.2, 0.35)
  reading = candidates.read_layers(predictor, texts, full, names, told)
  longest = max(batch.tokens.shape[1] for batch in predictor.plan(texts))
  ranked = candidates.rank(predictor, reading, options.tolerance, longest)
  first = [
    Tried(entry.candidate, threshold=entry.threshold)
    for entry in candidates.finalists(ranked, FINALISTS)
  ]
  first, _ = timed(predictor, prompts, first, FIRST, part(progress, 0.35, 0.55))
  first = [dataclasses.replace(entry, first_speedup=entry.speedup) for entry in first]
  if reference is not None:
    told = part(progress, 0.55, 0.6)
    full = full_texts(grid.in_bulk(reference), prompts, cache, told)

  def decode(entry: Tried, encodings: dict[int, Any], progress: Report) -> Tried:
    """A finalist decoded over the grid that its confidences ask for."""
    candidate = entry.candidate
    model = grid.in_bulk(predictor.with_options(**candidate.options(length)))
    levels = candidates.coarse_grid(reading, candidate, options.tolerance, length)
    told = lambda share, text: progress(share, f"{candidate}, {text.split(' at ')[-1]}")
    cached = grid.on_grid(
      model, prompts, levels, folder, full=full, encodings=encodings, progress=told
    )
    values = losses.compute(cached, options.kind, metric=options.metric).values
    return Tried(
      candidate,
      levels,
      tuple(values.mean(axis=0).tolist()),
      candidates.forecast(levels, values, options.tolerance, num_calibration),
      first_speedup=entry.first_speedup,
    )

  in_8_bits = has_large_layers(predictor)
  tried = _decoded(first, decode, in_8_bits, part(progress, 0.6, 0.85))
  tried, milliseconds = timed(predictor, prompts, tried, LAST, part(progress, 0.85, 1.0))
  faster = [i for i, entry in enumerate(tried) if entry.decoded and entry.gains]
  chosen = max(faster, key=lambda i: tried[i].score, default=None)
  levels: tuple[float, ...] = ()
  if chosen is not None:
    best = tried[chosen]
    known = best.candidate, best.thresholds, best.losses, best.threshold
    levels = candidates.final_grid(*known, options.tolerance)
  return Choice(tuple(tried), chosen, levels, milliseconds, len(prompts))


def _decoded(first: Sequence[Tried], decode, in_8_bits: bool, progress: Report) -> list[Tried]:
  """Finalists with their losses, the fastest first, until `DECODED` have a threshold; the
  fastest is decoded `in_8_bits` too."""
  tried: list[Tried] = []
  encodings: dict[int, Any] = {}
  order = lambda entry: (not entry.gains, -np.nan_to_num(entry.end_to_end))
  fastest = sorted(first, key=order)
  for number, entry in enumerate(fastest):
    found = sum(e.decoded and np.isfinite(e.threshold) for e in tried)
    if found < DECODED:
      share = [(number + i) / (number + DECODED - found) for i in (0, 1)]
      entry = decode(entry, encodings, part(progress, *share))
    tried.append(entry)
  for name in filter(None, candidates.IN_8_BITS if in_8_bits else ()):
    narrow = dataclasses.replace(fastest[0].candidate, in_8_bits=name)
    tried.append(decode(Tried(narrow), {}, progress))
  return tried


def timed(
  predictor: inference.Predictor,
  prompts: Sequence[Prompt],
  tried: Sequence[Tried],
  size: tuple[int, int],
  progress: Report,
) -> tuple[list[Tried], float]:
  """Times finalists at their thresholds beside full depth, all in turn on the same prompts.

  The fastest of the rounds counts, prompt by prompt: other work on the machine only ever adds.
  Those that have a threshold and no seconds yet are timed, on (prompts, rounds) of `size`.

  Returns:
    The finalists with their seconds, and full depth's milliseconds a prompt.
  """
  length = predictor.options.max_decode_length
  able = [i for i, e in enumerate(tried) if np.isfinite(e.threshold) and np.isnan(e.speedup)]
  ways = [tried[i].candidate for i in able]
  # Weights that serve every measure, a shortlist's too.
  asked = any(way.measure == "shortlist" for way in ways)
  serving = predictor.with_options(measure="shortlist") if asked else predictor
  narrow = {
    name: serving.with_options(**candidates.IN_8_BITS[name])
    for name in {way.in_8_bits for way in ways} - {""}
  }
  settings = [
    timing.Setting(
      str(tried[i].candidate),
      predictor.with_options(**way.options(length)).options.rule,
      tried[i].threshold,
      narrow.get(way.in_8_bits),
    )
    for i, way in zip(able, ways, strict=True)
  ]
  chosen = timing.of_one_length(predictor, prompts, size[0])
  found = timing.measure(
    serving, chosen, settings, rounds=size[1], of_rounds=np.min, progress=progress
  )
  made = list(tried)
  for i, row in zip(able, found.rows[1:], strict=True):
    made[i] = dataclasses.replace(
      tried[i],
      milliseconds=1e3 * row.decode_seconds,
      speedup=row.speedup,
      end_to_end=row.end_to_end,
    )
  return made, 1e3 * found.full_seconds


# ---- The output head in 8 bits, and exact decoding: the texts do not change


def has_large_head(predictor: inference.Predictor) -> bool:
  """Whether reading the output head in 8 bits is worth timing; its tokens are the same."""
  size = predictor.vocabulary.vocab_size * predictor.config.emb_dim
  return size >= LEAST_NUMBERS and predictor.options.head_dtype is None


def has_large_layers(predictor: inference.Predictor) -> bool:
  """Whether layers in 8 bits are a candidate; they change texts, which the promise covers."""
  config, options = predictor.config, predictor.options
  flat = parameters.flatten(predictor.params)
  numbers = sum(leaf.size for path, leaf in flat.items() if "/layers_" in path)
  exact = not inference.options.batch_size_affects_output(config, options)
  return exact and options.weights_dtype is None and numbers >= LEAST_LAYERS


def fastest_head(
  predictor: inference.Predictor,
  prompts: Sequence[Prompt],
  cache: result_cache.ResultCache,
  progress: Report,
) -> tuple[inference.Predictor, str]:
  """The model with its head in 8 bits where full depth is clearly faster so, and a sentence."""
  narrow = predictor.with_options(head_dtype="int8")
  setting = timing.Setting("8 bits", exits.StaticExit(), model=narrow)
  found = cache.get(
    timing.Timings,
    "head",
    {"model": predictor.parameters_digest, "options": repr(predictor.options)},
    lambda: timing.measure(
      predictor, timing.of_one_length(predictor, prompts, 8), [setting], progress=progress
    ),
  )
  row = found.rows[1]
  pays = row.speedup > MARGIN
  return narrow if pays else predictor, (
    f"Output head: read {'in 8 bits' if pays else 'as it is stored'}; in 8 bits full depth is"
    f" x{row.speedup:.2f} as fast ({1e3 * found.full_seconds:.1f} ->"
    f" {1e3 * row.decode_seconds:.1f} ms a prompt, {found.num_prompts} prompts)."
  )


def faster_exact(
  predictor: inference.Predictor, prompts: Sequence[Prompt], cache: result_cache.ResultCache
) -> timing.Seconds | None:
  """Seconds of full texts from the model's own verified drafts, beside full depth's.

  None where drafts are not faster, there is one layer only, or states are rounded to few bits.
  """
  if predictor.num_layers == 1 or not inference.can_be_exact(predictor):
    return None
  rule, texts = inference.exact_rule(predictor), [prompt.input for prompt in prompts]
  key = {
    "procedure": predictor.procedure.to_json(),
    "rule": dataclasses.asdict(rule),
    "head": predictor.options.head_dtype,
  }
  measure = lambda: timing.beside_full_depth(predictor, texts, 1.0, rule=rule, base=predictor)
  found = cache.get(timing.Seconds, "exact", key, measure)
  return None if found.slower else found
