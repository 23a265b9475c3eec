"""Measured decode seconds of many settings, prompt by prompt and in turn.

Every prompt is decoded alone (a batch of one) under every setting before the next prompt
comes, in rounds, so that what else the machine does falls on all settings alike. Encoders run
once.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from calm import exits
from calm.calibrate import Prompt
from calm.exits import schedules
from calm.inference import offline
from calm.inference.predictor import Predictor

FULL = "full depth"


@dataclasses.dataclass(frozen=True)
class Setting:
  """One way of decoding that is timed.

  Attributes:
    name: of its curve.
    rule: how tokens go through the layers.
    threshold: lambda.
  """

  name: str
  rule: exits.Rule
  threshold: float = schedules.NEVER_EXIT


@dataclasses.dataclass(frozen=True)
class Timed:
  """Seconds of one setting.

  Attributes:
    name: of its curve.
    threshold: lambda.
    layers: mean decoder layers a token on the timed prompts.
    prompt_seconds: [num_prompts] each prompt's decode seconds, `of_rounds` over its rounds.
    decode_seconds: their mean.
    speedup: full depth's decode seconds over these.
    end_to_end: the same with the encoder's seconds on both sides.
  """

  name: str
  threshold: float
  layers: float
  prompt_seconds: tuple[float, ...]
  decode_seconds: float
  speedup: float
  end_to_end: float


@dataclasses.dataclass(frozen=True)
class Timings:
  """All settings on the same prompts.

  Attributes:
    num_prompts: prompts timed, each alone.
    rounds: times that each was decoded under each setting, after one uncounted.
    encode_seconds: mean encoder seconds a prompt.
    full_seconds: mean decode seconds a prompt of the full model (static, no confidence).
    rows: one entry a setting.
  """

  num_prompts: int
  rounds: int
  encode_seconds: float
  full_seconds: float
  rows: tuple[Timed, ...]

  def find(self, name: str, threshold: float = schedules.NEVER_EXIT) -> Timed | None:
    """The row of a setting, or None."""
    return next((r for r in self.rows if r.name == name and r.threshold == threshold), None)


def measure(
  predictor: Predictor,
  prompts: Sequence[Prompt],
  settings: Sequence[Setting],
  *,
  rounds: int = 3,
  of_rounds: Callable[..., np.ndarray] = np.median,
  progress: offline.Progress = offline.silent,
) -> Timings:
  """Times settings against the static full-depth program.

  Args:
    predictor: a model whose weights serve every setting (a shortlist's measure included).
    prompts: best of one padded length (`decode.of_one_length`), or more is compiled.
    settings: what to time; full depth is added.
    rounds: repeats.
    of_rounds: what counts of them: `np.median`, or `np.min` where they are few and the machine
      has other work, which only ever adds.
    progress: told of the share done.
  """
  settings = [Setting(FULL, exits.StaticExit()), *settings]
  items = offline.one_by_one(predictor, prompts)
  one = predictor.with_options(batch_size=1)
  _compile(one, items, settings, progress)
  seconds = np.zeros((len(settings), len(items), rounds))
  encode = np.zeros((len(items), rounds))
  depths: list[list[int]] = [[] for _ in settings]
  # Round by round: a text that is drafted begins with what those before it had accepted.
  for repeat in range(rounds):
    for row, item in enumerate(items):
      start = time.perf_counter()
      jax.block_until_ready(one.encode(item.batch))
      encode[row, repeat] = time.perf_counter() - start
      for column in _turn(len(settings), repeat):
        setting = settings[column]
        start = time.perf_counter()
        generation = one.decode(
          item.encoded, item.batch.active, setting.threshold, setting.rule
        )
        seconds[column, row, repeat] = time.perf_counter() - start
        if not repeat:
          depths[column] += [int(layer) for layer in generation.exit_layers[0] if layer]
      done = (repeat + (row + 1) / len(items)) / rounds
      progress(done, f"round {repeat + 1} of {rounds}")
  encoder = of_rounds(encode, axis=1)
  rows = _rows(settings, of_rounds(seconds, axis=2), encoder, depths)
  return Timings(
    num_prompts=len(items),
    rounds=rounds,
    encode_seconds=float(encoder.mean()),
    full_seconds=rows[0].decode_seconds,
    rows=rows,
  )


def _turn(count: int, repeat: int) -> list[int]:
  """Settings in this order, the other way about every second time."""
  order = list(range(count))
  return order if repeat % 2 == 0 else order[::-1]


def _compile(one, items, settings, progress) -> None:
  shapes = {item.batch.tokens.shape: item for item in items}
  for item in shapes.values():
    rules = {setting.rule: setting for setting in settings}
    for number, setting in enumerate(rules.values()):
      progress(0.0, f"compiling {setting.name} ({number + 1} of {len(rules)})")
      one.decode(item.encoded, item.batch.active, setting.threshold, setting.rule)


def _rows(settings, seconds: np.ndarray, encode: np.ndarray, depths) -> tuple[Timed, ...]:
  """From what counts of the rounds, [settings, prompts] and [prompts]."""
  totals, encoder = seconds.sum(axis=1), encode.sum()
  return tuple(
    Timed(
      name=setting.name,
      threshold=setting.threshold,
      layers=float(np.mean(layers)) if layers else float("nan"),
      prompt_seconds=tuple(map(float, own)),
      decode_seconds=float(own.mean()),
      speedup=float(totals[0] / total),
      end_to_end=float((totals[0] + encoder) / (total + encoder)),
    )
    for setting, own, total, layers in zip(settings, seconds, totals, depths, strict=True)
  )
