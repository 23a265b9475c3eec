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
    model: the model that decodes, under its options; None: the one that is measured.
  """

  name: str
  rule: exits.Rule
  threshold: float = schedules.NEVER_EXIT
  model: Predictor | None = None


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
    prompts: best of one padded length (`offline.of_one_length`), or more is compiled.
    settings: what to time; full depth is added.
    rounds: repeats.
    of_rounds: what counts of them: `np.median`, or `np.min` where they are few and the machine
      has other work, which only ever adds.
    progress: told of the share done.
  """
  settings = [Setting(FULL, exits.StaticExit()), *settings]
  one = predictor.with_options(batch_size=1)
  # Settings of one model share what its encoder makes of a prompt.
  models = {id(s.model): (s.model or predictor).with_options(batch_size=1) for s in settings}
  models[id(None)] = one
  items = [offline.one_by_one(model, prompts) for model in models.values()]
  which = [list(models).index(id(setting.model)) for setting in settings]
  programs = list(models.values())
  _compile(programs, items, settings, which, progress)
  seconds = np.zeros((len(settings), len(prompts), rounds))
  encode = np.zeros((len(programs), len(prompts), rounds))
  depths: list[list[int]] = [[] for _ in settings]
  # Round by round: a text that is drafted begins with what those before it had accepted.
  for repeat in range(rounds):
    for row in range(len(prompts)):
      for model in _turn(len(programs), repeat):
        start = time.perf_counter()
        jax.block_until_ready(programs[model].encode(items[model][row].batch))
        encode[model, row, repeat] = time.perf_counter() - start
      for column in _turn(len(settings), repeat):
        setting, item = settings[column], items[which[column]][row]
        start = time.perf_counter()
        generation = programs[which[column]].decode(
          item.encoded, item.batch.active, setting.threshold, setting.rule
        )
        seconds[column, row, repeat] = time.perf_counter() - start
        if not repeat:
          depths[column] += [int(layer) for layer in generation.exit_layers[0] if layer]
      done = (repeat + (row + 1) / len(prompts)) / rounds
      progress(done, f"round {repeat + 1} of {rounds}")
  encoder = of_rounds(encode, axis=2)[which]
  rows = _rows(settings, of_rounds(seconds, axis=2), encoder, depths)
  return Timings(
    num_prompts=len(prompts),
    rounds=rounds,
    encode_seconds=float(encoder[0].mean()),
    full_seconds=rows[0].decode_seconds,
    rows=rows,
  )


def _turn(count: int, repeat: int) -> list[int]:
  """Settings in this order, the other way about every second time."""
  order = list(range(count))
  return order if repeat % 2 == 0 else order[::-1]


def _compile(programs, items, settings, which, progress) -> None:
  distinct = {(s.rule, model): s for s, model in zip(settings, which, strict=True)}
  for number, ((rule, model), setting) in enumerate(distinct.items()):
    progress(0.0, f"compiling {setting.name} ({number + 1} of {len(distinct)})")
    for item in {item.batch.tokens.shape: item for item in items[model]}.values():
      programs[model].decode(item.encoded, item.batch.active, setting.threshold, rule)


def _rows(settings, seconds: np.ndarray, encode: np.ndarray, depths) -> tuple[Timed, ...]:
  """From what counts of the rounds, [settings, prompts] each."""
  totals, encoders = seconds.sum(axis=1), encode.sum(axis=1)
  return tuple(
    Timed(
      name=setting.name,
      threshold=setting.threshold,
      layers=float(np.mean(layers)) if layers else float("nan"),
      prompt_seconds=tuple(map(float, own)),
      decode_seconds=float(own.mean()),
      speedup=float(totals[0] / total),
      end_to_end=float((totals[0] + encoders[0]) / (total + encoder)),
    )
    for setting, own, total, encoder, layers in zip(
      settings, seconds, totals, encoders, depths, strict=True
    )
  )
