"""Seconds of full depth and of calibrated exits, in turn, on the last part."""

import dataclasses
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from calm import exits, inference
from calm.calibrate import Prompt
from calm.paper.bench import decode, timing

PROMPTS, ROUNDS = 24, 5


@dataclasses.dataclass(frozen=True)
class Pair:
  """Decode seconds a prompt, medians over rounds in which both took their turn.

  Attributes:
    batch_size: prompts decoded together.
    num_prompts: prompts timed.
    full: milliseconds a prompt at full depth.
    early: the same with calibrated exits.
    speedup: the first over the second.
    end_to_end: the same with the encoder on both sides.
  """

  batch_size: int
  num_prompts: int
  full: float
  early: float
  speedup: float
  end_to_end: float


@dataclasses.dataclass(frozen=True)
class Seconds:
  """One prompt at a time, and in batches where there are enough prompts of one length."""

  single: Pair
  batched: Pair | None

  @property
  def slower(self) -> str:
    """Where calibrated exits are no faster than full depth, in words; '' where they are."""
    pairs = [pair for pair in (self.single, self.batched) if pair is not None]
    slow = [f"x{p.speedup:.2f} in batches of {p.batch_size}" for p in pairs if p.speedup <= 1.0]
    return " and ".join(slow)


def measure(
  predictor: inference.Predictor,
  prompts: Sequence[Prompt],
  threshold: float,
  progress: Callable[[float, str], None],
) -> Seconds:
  """Times the model's own rule at a threshold against the static full-depth program.

  Args:
    predictor: the model under its options.
    prompts: those of the commonest padded length are timed.
    threshold: lambda.
    progress: told of the share done.
  """
  alone = decode.of_one_length(predictor, prompts, PROMPTS)
  setting = timing.Setting("early exit", predictor.options.rule, threshold)
  half = lambda share, text: progress(0.6 * share, text)
  found = timing.measure(predictor, alone, [setting], rounds=ROUNDS, progress=half)
  (row,) = (row for row in found.rows if row.name == setting.name)
  single = Pair(
    batch_size=1,
    num_prompts=len(alone),
    full=1e3 * found.full_seconds,
    early=1e3 * row.decode_seconds,
    speedup=row.speedup,
    end_to_end=row.end_to_end,
  )
  progress(0.6, "batches")
  return Seconds(single, batched(predictor, prompts, threshold))


def batched(
  predictor: inference.Predictor, prompts: Sequence[Prompt], threshold: float
) -> Pair | None:
  """The same for full batches of the model's own size; None where there is no full one."""
  size = predictor.options.batch_size
  same = decode.of_one_length(predictor, prompts, 4 * size)
  same = same[: len(same) // size * size]
  if size == 1 or not same:
    return None
  batches = [
    (batch, predictor.encode(batch)) for batch in predictor.plan([p.input for p in same])
  ]
  rules = ((exits.StaticExit(), float("inf")), (predictor.options.rule, threshold))
  seconds = np.zeros((ROUNDS + 1, len(rules)))  # the first round compiles
  encoder = np.zeros(ROUNDS + 1)
  for repeat in range(ROUNDS + 1):
    for batch, encoded in batches:
      start = time.perf_counter()
      jax.block_until_ready(predictor.encode(batch))
      encoder[repeat] += time.perf_counter() - start
      for column in (0, 1) if repeat % 2 else (1, 0):
        rule, level = rules[column]
        start = time.perf_counter()
        predictor.decode(encoded, batch.active, level, rule)
        seconds[repeat, column] += time.perf_counter() - start
  full, early = np.median(seconds[1:], axis=0)
  both = np.median(encoder[1:])
  return Pair(
    batch_size=size,
    num_prompts=len(same),
    full=1e3 * float(full) / len(same),
    early=1e3 * float(early) / len(same),
    speedup=float(np.median(seconds[1:, 0] / seconds[1:, 1])),
    end_to_end=float((full + both) / (early + both)),
  )
