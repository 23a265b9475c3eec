"""The timer of decoding: full depth and other settings, in turn, on the same prompts.

Every batch is decoded under every setting before the next batch, in rounds, so that other work
of the machine falls on all settings alike. Compiling is not counted.
"""

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax import monitoring

from calm import exits
from calm.calibrate import Prompt
from calm.calibrate.seconds import Pair, Seconds
from calm.data import prompt_batches
from calm.exits import schedules
from calm.inference import grid
from calm.inference.batch_decoder import BatchDecoder

FULL = "full depth"
# Prompts that `beside_full_depth` times one at a time, and rounds.
PROMPTS, ROUNDS = 24, 5


@dataclasses.dataclass(frozen=True)
class Setting:
  """One way of decoding that is timed; `model` None is the one that is measured."""

  name: str
  rule: exits.Rule
  threshold: float = schedules.NEVER_EXIT
  model: BatchDecoder | None = None


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
  model: BatchDecoder,
  prompts: Sequence[Prompt],
  settings: Sequence[Setting],
  *,
  rounds: int = 3,
  of_rounds: Callable[..., np.ndarray] = np.median,
  progress: grid.ShareProgress = grid.silent,
) -> Timings:
  """Times settings against the static full-depth program, one prompt at a time.

  Args:
    model: a model whose weights serve every setting (a shortlist's measure included).
    prompts: best of one padded length (`of_one_length`), or more is compiled.
    settings: full depth is added.
    rounds: repeats.
    of_rounds: what counts of them: `np.median`, or `np.min` where they are few and the machine
      has other work, which only ever adds.
    progress: told of the share done.
  """
  settings = [Setting(FULL, exits.StaticExit()), *settings]
  texts = [prompt.input for prompt in prompts]
  singles = {id(s.model): (s.model or model).with_options(batch_size=1) for s in settings}
  ways = [(singles[id(s.model)], s.rule, s.threshold) for s in settings]
  batches = singles[id(None)].plan(texts)
  seconds, encode, layers = _rounds(ways, batches, rounds, progress)
  seconds, encode = of_rounds(seconds, axis=0), of_rounds(encode, axis=0)
  order = np.argsort([batch.rows[0] for batch in batches])
  totals = seconds.sum(axis=1)
  whole = totals + encode.sum(axis=1)
  rows = tuple(
    Timed(
      name=setting.name,
      threshold=setting.threshold,
      layers=float(np.mean(layers[i])) if layers[i] else float("nan"),
      prompt_seconds=tuple(seconds[i, order].tolist()),
      decode_seconds=float(seconds[i].mean()),
      speedup=float(totals[0] / totals[i]),
      end_to_end=float(whole[0] / whole[i]),
    )
    for i, setting in enumerate(settings)
  )
  return Timings(
    num_prompts=len(prompts),
    rounds=rounds,
    encode_seconds=float(encode[0].mean()),
    full_seconds=rows[0].decode_seconds,
    rows=rows,
  )


def of_one_length(
  model: BatchDecoder, examples: Sequence[Prompt], limit: int | None = None
) -> tuple[Prompt, ...]:
  """The first prompts that have the commonest padded length: one compilation times them all."""
  batches = model.with_options(batch_size=1).plan([example.input for example in examples])
  rows = [int(batch.rows[0]) for batch in _commonest(batches)]
  return tuple(examples[row] for row in sorted(rows)[:limit])


def beside_full_depth(
  model: BatchDecoder,
  texts: Sequence[str],
  threshold: float,
  *,
  prompts: int | None = None,
  rounds: int | None = None,
  rule: exits.Rule | None = None,
  base: BatchDecoder | None = None,
  progress: grid.ShareProgress = grid.silent,
) -> Seconds:
  """Times a rule at a threshold against full depth, one prompt at a time and in batches.

  Args:
    model: the model under its options.
    texts: prompts; those of the commonest padded length are timed.
    threshold: lambda.
    prompts: most prompts that are timed one at a time; batches take four batches of them.
    rounds: times that each is decoded, after one uncounted.
    rule: how tokens go through the layers; None is the model's own.
    base: the model that decodes at full depth; None: the `reference` of `model`.
    progress: told of the share done.
  """
  way = (rule or model.options.rule, threshold)
  size, base = model.options.batch_size, base or model.reference
  single = model.with_options(batch_size=1)
  full = single if base is model else base.with_options(batch_size=1)
  part = lambda share, text: progress(0.6 * share, f"one at a time, {text}")
  alone = _pair(full, single, texts, way, prompts or PROMPTS, rounds or ROUNDS, part)
  assert alone is not None  # one prompt is a whole batch
  if size == 1:
    return Seconds(alone)
  part = lambda share, text: progress(0.6 + 0.4 * share, f"batches of {size}, {text}")
  return Seconds(alone, _pair(base, model, texts, way, 4 * size, rounds or ROUNDS, part))


def _pair(full: BatchDecoder, model: BatchDecoder, texts, way, most: int, rounds, progress):
  """Full depth of a model beside `way` (rule, threshold) of another, in whole batches."""
  batches = _commonest([batch for batch in model.plan(texts) if batch.active.all()])
  if not batches:
    return None
  batches = batches[: max(1, most // len(batches[0].active))]
  ways = [(full, exits.StaticExit(), schedules.NEVER_EXIT), (model, *way)]
  seconds, encode, _ = _rounds(ways, batches, rounds, progress)
  # The fastest round of each batch counts: other work of the machine only ever adds.
  slow, fast = np.min(seconds, axis=0).sum(axis=1)
  encoders = np.min(encode, axis=0).sum(axis=1)
  count = len(batches) * len(batches[0].rows)
  return Pair(
    batch_size=len(batches[0].active),
    num_prompts=count,
    full=1e3 * float(slow) / count,
    early=1e3 * float(fast) / count,
    speedup=float(slow / fast),
    end_to_end=float((slow + encoders[0]) / (fast + encoders[1])),
  )


def _commonest(
  batches: Sequence[prompt_batches.PromptBatch],
) -> list[prompt_batches.PromptBatch]:
  """The batches of the commonest padded length."""
  lengths = [batch.tokens.shape[1] for batch in batches]
  common = np.bincount(lengths).argmax() if lengths else 0
  return [batch for batch, length in zip(batches, lengths, strict=True) if length == common]


def _rounds(
  ways: Sequence[tuple[BatchDecoder, exits.Rule, float]],
  batches: Sequence[prompt_batches.PromptBatch],
  rounds: int,
  progress: grid.ShareProgress,
) -> tuple[np.ndarray, np.ndarray, list[list[int]]]:
  """Seconds of ways of decoding, each a model, a rule and a threshold.

  Returns:
    Decode and encode seconds [rounds, ways, batches], and the exit layers of every way's
    tokens. Ways whose encoders compute alike share the seconds of one.
  """
  seconds = np.zeros((rounds + 1, len(ways), len(batches)))
  encode = np.zeros_like(seconds)
  layers: list[list[int]] = [[] for _ in ways]
  encoders = [
    (model.config.dtype, model.options.weights_dtype, model.options.encoder_dtype)
    for model, _, _ in ways
  ]
  # Round by round: a text that is drafted begins with what those before it had accepted. Of the
  # first one, which compiles, nothing counts.
  for number in range(rounds + 1):
    for place, batch in enumerate(batches):
      states: dict[Any, Any] = {}
      spent: dict[Any, float] = {}
      for way, (model, _, _) in enumerate(ways):
        if encoders[way] not in states:
          start = time.perf_counter()
          states[encoders[way]] = jax.block_until_ready(model.encode(batch))
          spent[encoders[way]] = time.perf_counter() - start
        encode[number, way, place] = spent[encoders[way]]
      turn = list(enumerate(ways))
      for way, (model, rule, threshold) in turn if number % 2 else turn[::-1]:
        model.expect_drafts()
        start = time.perf_counter()
        generation = model.decode(states[encoders[way]], batch.active, threshold, rule)
        seconds[number, way, place] = time.perf_counter() - start
        if number == 0:
          depths = generation.exit_layers
          layers[way] += depths[depths > 0].tolist()
      done = (number + (place + 1) / len(batches)) / (rounds + 1)
      progress(done, f"round {number + 1} of {rounds + 1}")
  return seconds[1:], encode[1:], layers


# ---- Seconds of phases, and of compiling


_PREFIX = "/jax/core/compile/"
_lock = threading.Lock()
_spans: list[tuple[float, float]] = []
_compile_seconds = 0.0


def compile_seconds() -> float:
  """Seconds that JAX has spent on tracing, lowering and compiling in this process so far.

  Programs read from the cache on the disk count with the time that this took.
  """
  return _compile_seconds


def _listen(event: str, duration_secs: float, **_) -> None:
  global _compile_seconds
  if not event.startswith(_PREFIX):
    return
  end = time.perf_counter()
  start = end - duration_secs
  with _lock:
    # A span is reported when it ends, after those within it, which it replaces.
    while _spans and _spans[-1][0] >= start:
      first, last = _spans.pop()
      _compile_seconds -= last - first
    if _spans:
      start = max(start, _spans[-1][1])
    _spans.append((start, end))
    _compile_seconds += end - start
    del _spans[:-64]


monitoring.register_event_duration_secs_listener(_listen)


class Clock:
  """Exclusive seconds by phase: the seconds of an inner phase are not the outer's."""

  def __init__(self):
    self.seconds = {"encode": 0.0, "decode": 0.0}
    self._compiled = compile_seconds()

  @property
  def compile_seconds(self) -> float:
    """Compiling since the clock was made."""
    return compile_seconds() - self._compiled

  def run(self, name: str, work: Callable[[], Any]) -> Any:
    """The result of `work`, ready, counted in a phase."""
    with self.phase(name):
      return jax.block_until_ready(work())

  @contextlib.contextmanager
  def phase(self, name: str) -> Iterator[None]:
    """Counts the block, less its inner phases and compiling."""
    start, compiled = time.perf_counter(), compile_seconds()
    inner = sum(self.seconds.values())
    yield
    spent = time.perf_counter() - start - (compile_seconds() - compiled)
    self.seconds[name] += max(0.0, spent - (sum(self.seconds.values()) - inner))
