"""The timer of decoding: all batches under full depth, then under each setting,
in rounds, so that other work of the machine falls on all alike. Compiling is
not counted.
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np

from calm import exits, storage
from calm.calibrate import NEVER_EXIT, Calibration, Prompt
from calm.calibrate.thresholds import format_threshold
from calm.console import Report
from calm.inference import grid

if TYPE_CHECKING:
  from calm.inference.predictor import Predictor

FULL = "full depth"
_NOTE = "seconds"  # in the notes of a calibration's provenance


@dataclasses.dataclass(frozen=True)
class Setting:
  """One way of decoding that is timed; `model` None is the one that is
  measured.
  """

  name: str
  rule: exits.Rule
  threshold: float = NEVER_EXIT
  model: "Predictor | None" = None


@dataclasses.dataclass(frozen=True)
class Timed:
  """Seconds of one setting."""

  name: str  # of its curve
  threshold: float
  # each prompt's (or batch's) to decode, over its rounds
  prompt_seconds: tuple[float, ...]
  decode_seconds: float  # their mean over prompts
  speedup: float  # full depth's decode seconds over these
  end_to_end: float  # the same with the encoder's seconds on both sides


@dataclasses.dataclass(frozen=True)
class Timings:
  """All settings on the same prompts, of which full depth is the first row."""

  num_prompts: int
  rows: tuple[Timed, ...]

  def find(self, name: str, threshold: float = NEVER_EXIT) -> Timed | None:
    """The row of a setting, or None."""
    return next(
      (r for r in self.rows if r.name == name and r.threshold == threshold),
      None,
    )


@dataclasses.dataclass(frozen=True)
class Pair:
  """Decode milliseconds a prompt, the fastest of rounds in which both took
  their turn.
  """

  batch_size: int  # prompts decoded together
  num_prompts: int  # prompts timed
  full: float  # milliseconds a prompt at full depth
  early: float  # the same with calibrated exits
  speedup: float  # the first over the second
  end_to_end: float  # the same with the encoder on both sides

  def __str__(self) -> str:
    several = f"in batches of {self.batch_size}"
    return (
      f"x{self.speedup:.2f} "
      f"{several if self.batch_size > 1 else 'one at a time'}"
    )


@dataclasses.dataclass(frozen=True)
class Seconds:
  """A threshold beside full depth: one prompt at a time, and in full batches,
  if any.
  """

  single: Pair
  batched: Pair | None = None

  @property
  def slower(self) -> str:
    """Where calibrated exits are no faster than full depth, in words; '' where
    they are.
    """
    return " and ".join(
      str(pair) for pair in self._pairs() if not pair.speedup > 1.0
    )

  def _pairs(self) -> list[Pair]:
    return [pair for pair in (self.single, self.batched) if pair]

  def __str__(self) -> str:
    return ", ".join(
      f"{p} (x{p.end_to_end:.2f} with the encoder)" for p in self._pairs()
    )


def note(calibration: Calibration, seconds: Seconds) -> Calibration:
  """The calibration with what was measured in the notes of its provenance."""
  notes = {
    **(calibration.provenance.notes or {}),
    _NOTE: dataclasses.asdict(seconds),
  }
  provenance = dataclasses.replace(calibration.provenance, notes=notes)
  return dataclasses.replace(calibration, provenance=provenance)


def noted(calibration: Calibration) -> Seconds | None:
  """What was measured for a calibration; None where nothing was, or the note is
  another's.
  """
  try:
    return storage.from_json(
      Seconds, (calibration.provenance.notes or {}).get(_NOTE)
    )
  except (AttributeError, TypeError):
    return None


def warning(calibration: Calibration) -> str:
  """What to say of a served threshold that was measured not to be faster, or
  ''.
  """
  seconds = noted(calibration) if calibration.certified else None
  if seconds is None or not seconds.slower:
    return ""
  return (
    f"the calibrated threshold {format_threshold(calibration.threshold)} is "
    "not faster than"
    f" full depth, as measured: {seconds.slower}; decode at full depth (the "
    "threshold 'never'),"
    " or fit other layers or another measure (`calm fit`)."
  )


def measure(
  model: "Predictor",
  prompts: Sequence[Prompt],
  settings: Sequence[Setting],
  *,
  batch_size: int = 1,
  full: "Predictor | None" = None,
  rounds: int = 3,
  of_rounds: Callable[..., np.ndarray] = np.median,
  progress: Report = grid.silent,
) -> Timings:
  """Times settings against the static full-depth program, which is added.

  Args:
    model: a model whose weights serve every setting (a shortlist's measure
      included).
    prompts: best of one padded length (`of_one_length`), or more is compiled.
    full: the model that decodes at full depth; None: `model`.
    of_rounds: what counts of the rounds: `np.median`, or `np.min` where they
      are few.
  """
  settings = [Setting(FULL, exits.StaticExit(), model=full), *settings]
  sized = functools.cache(lambda each: each.with_options(batch_size=batch_size))
  turn = [(way, sized(s.model or model), s) for way, s in enumerate(settings)]
  batches = sized(model).plan([prompt.input for prompt in prompts])
  batches.sort(key=lambda batch: batch.rows[0])
  # decoding, and encoding
  spent = np.zeros((2, rounds + 1, len(turn), len(batches)))
  for number, i in itertools.product(range(rounds + 1), range(len(turn))):
    # One way after the other through all prompts, as in use: in turn at each
    # they would find the processor's caches full of one another's weights and
    # programs.
    way, own, setting = turn[i if number % 2 else -1 - i]
    for place, batch in enumerate(batches):
      own.expect_drafts()
      begin = time.perf_counter()
      state = jax.block_until_ready(own.encode(batch))
      encoded = time.perf_counter()
      own.decode(state, batch.active, setting.threshold, setting.rule)
      spent[:, number, way, place] = (
        time.perf_counter() - encoded,
        encoded - begin,
      )
    done = (number + (i + 1) / len(turn)) / (rounds + 1)
    progress(done, f"round {number + 1} of {rounds + 1}")
  # Of the first round, which compiles, nothing counts.
  seconds, encode = of_rounds(spent[:, 1:], axis=1)
  # Ways whose encoders compute alike share the seconds of one.
  kinds = [
    (m.config.dtype, m.options.weights_dtype, m.options.encoder_dtype)
    for _, m, _ in turn
  ]
  alike = [[other == kind for other in kinds] for kind in kinds]
  encode = np.stack([of_rounds(encode[same], axis=0) for same in alike])
  totals = seconds.sum(axis=1)
  whole = totals + encode.sum(axis=1)
  rows = tuple(
    Timed(
      name=setting.name,
      threshold=setting.threshold,
      prompt_seconds=tuple(seconds[i].tolist()),
      decode_seconds=float(totals[i] / len(prompts)),
      speedup=float(totals[0] / totals[i]),
      end_to_end=float(whole[0] / whole[i]),
    )
    for i, setting in enumerate(settings)
  )
  return Timings(len(prompts), rows)


def of_one_length(
  model: "Predictor", examples: Sequence[Prompt], limit: int | None = None
) -> tuple[Prompt, ...]:
  """The first prompts that have the commonest padded length: one compilation
  times them all.
  """
  batches = model.with_options(batch_size=1).plan(
    [example.input for example in examples]
  )
  common = np.bincount(
    [b.tokens.shape[1] for b in batches], minlength=1
  ).argmax()
  rows = sorted(int(b.rows[0]) for b in batches if b.tokens.shape[1] == common)
  return tuple(examples[row] for row in rows[:limit])


def beside_full_depth(
  model: "Predictor",
  texts: Sequence[str],
  threshold: float,
  *,
  prompts: int = 24,
  rounds: int = 5,
  rule: exits.Rule | None = None,
  progress: Report = grid.silent,
) -> Seconds:
  """Times a rule at a threshold against the full depth of `model.reference`,
  one prompt at a time and in batches.

  The fastest round of each batch counts: other work of the machine only ever
  adds. Texts of the commonest padded length are timed: at most `prompts` one at
  a time, and four batches.

  Args:
    rounds: times that each is decoded, after one uncounted.
    rule: how tokens go through the layers; None is the model's own.
  """
  setting = Setting("", rule or model.options.rule, threshold)
  chosen = of_one_length(
    model, [Prompt(str(i), text) for i, text in enumerate(texts)]
  )
  size = model.options.batch_size
  pairs = []
  for batch_size, most in [(1, prompts), (size, 4 * size)][: 1 + (size > 1)]:
    if count := min(most, len(chosen)) // batch_size * batch_size:
      how = "one at a time" if batch_size == 1 else f"batches of {batch_size}"
      share = (0.6, 1.0) if pairs else (0.0, 0.6)
      full, row = measure(
        model,
        chosen[:count],
        [setting],
        batch_size=batch_size,
        full=model.reference,
        rounds=rounds,
        of_rounds=np.min,
        progress=grid.part(progress, *share, f"{how}, "),
      ).rows
      spent = 1e3 * full.decode_seconds, 1e3 * row.decode_seconds
      pairs.append(Pair(batch_size, count, *spent, row.speedup, row.end_to_end))
  return Seconds(*pairs)
