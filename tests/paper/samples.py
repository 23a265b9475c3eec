"""Results of one task from made-up generations, through the experiments' own
functions.
"""

import dataclasses
import functools
import pathlib
import types
from typing import Any
from unittest import mock

import numpy as np

from calm.calibrate import Prompt, Record, generations
from calm.data import prompt_batches
from calm.exits import schedules
from calm.inference import grid, timing
from calm.paper import bench, experiments

NUM_LAYERS = 4
GRID = (0.9, 0.6, 0.3)
WORDS = (
  "red",
  "green",
  "blue",
  "small",
  "large",
  "<b>",
  "&",
  "tool",
  "library",
)
MEASURES = ("softmax", "classifier", "state")
RESULTS = [
  n for n, v in vars(experiments.Task).items() if hasattr(v, "attrname")
]


def full_text(i: int) -> str:
  rng = np.random.default_rng(i)
  return " ".join(rng.choice(WORDS, size=4 + i % 4))


def prompts(count: int = 60) -> tuple[Prompt, ...]:
  """Prompts whose reference is the full model's text and a word more."""
  texts = [full_text(i) for i in range(count)]
  return tuple(
    Prompt(f"p{i}", f"long {text} </script>", (f"{text} more",), f"source{i}")
    for i, text in enumerate(texts)
  )


def record(i: int, depth: int, *, wrong: bool = False) -> Record:
  """Every token but the first leaves after `depth` layers; a wrong one loses
  its last word.
  """
  words = full_text(i).split()
  words = words[:-1] if wrong else words
  count = len(words) + 1
  return Record(
    id=f"p{i}",
    prediction=" ".join(words),
    tokens=(*range(5, 5 + len(words)), 1),
    exit_layers=(NUM_LAYERS, *(depth,) * (count - 1)),
    confidences=(0.5,) * count,
    rejected_confidences=(0.25,) * count,
    score=-1.0,
  )


@functools.cache
def cached(count: int = 60) -> generations.Generations:
  """At 0.9 nothing changes, at 0.6 every tenth output does, at 0.3 every second
  one.
  """
  columns = [
    tuple(
      record(i, depth, wrong=bool(every) and i % every == 0)
      for i in range(count)
    )
    for depth, every in ((3, 0), (2, 10), (1, 2))
  ]
  full = tuple(record(i, NUM_LAYERS) for i in range(count))
  return generations.Generations(
    prompts(count), np.array(GRID), tuple(columns), full
  )


def timings() -> timing.Timings:
  """Seconds in proportion to layers; the measure costs a tenth."""

  def timed(name: str, threshold: float, layers: float) -> timing.Timed:
    seconds = (
      layers * (1.0 if name.startswith(("static", "full")) else 1.1) * 1e-3
    )
    speedups = (4e-3 / seconds, 5e-3 / (seconds + 1e-3))
    return timing.Timed(name, threshold, (seconds,) * 3, seconds, *speedups)

  never = schedules.NEVER_EXIT
  rows = [timed(timing.FULL, never, 4.0), timed("oracle", never, 5.0)]
  rows += [timed(f"static {k}", never, k) for k in range(1, NUM_LAYERS + 1)]
  rows += [
    timed(m, t, d)
    for m in MEASURES
    for t, d in zip(GRID, (3, 2, 1), strict=True)
  ]
  return timing.Timings(3, tuple(rows))


class Model:
  """The parts of a predictor that experiments ask for beside decoding."""

  num_layers = NUM_LAYERS
  eos_id = 1
  options = types.SimpleNamespace(
    task_prefix="", max_input_length=8, max_decode_length=8
  )
  vocabulary = types.SimpleNamespace(
    encode=str.split, piece=lambda token: "▁" + WORDS[token % len(WORDS)]
  )

  def with_options(self, **options: Any) -> "Model":
    return self

  def step_costs(self, input_length: int) -> Any:
    return types.SimpleNamespace(
      savings=lambda layers: types.SimpleNamespace(flops=1.5)
    )

  def plan(self, texts) -> list[prompt_batches.PromptBatch]:
    batch = prompt_batches.PromptBatch
    active = np.ones(1, bool)
    return [
      batch(np.array([i]), np.zeros((1, 8), int), active)
      for i in range(len(texts))
    ]


class Task(experiments.Task):
  """A task whose prompts, records and seconds are made up."""

  step = staticmethod(lambda text: grid.silent)
  measures = MEASURES
  static = property(lambda self: {k: self._static(k) for k in range(1, 5)})

  def _static(self, depth):
    return tuple(
      record(i, depth, wrong=i % 4 >= depth) for i in range(len(self.test))
    )

  def records(self, name, rule, examples, measure=""):
    return self.full

  def grid(self, measure):
    return GRID

  def decoded(self, measure, examples):
    return cached(len(self.test))

  def over(self, *asked):
    return cached(len(self.test))

  def model(self, measure, **options):
    return self.predictor

  def time(self, name, examples, settings):
    return timings()

  def timed_settings(self, grids):
    return []


def sample(count: int = 60, **results: Any) -> Task:
  """A task, some of whose results are given."""
  model: Any = Model()
  settings = dataclasses.replace(
    bench.task("synopsis"), max_decode_length=8, bleu=True
  )
  other = {"geometric": model, "last_layer": model}
  options = bench.Options(step=0.3, examples=3)
  given = prompts(count)
  made = Task(model, settings, given, given, pathlib.Path(), options, **other)
  made.__dict__.update(results)
  return made


def wrong_tokens(first: float, last: float, error: float) -> experiments.Curves:
  """Similarities after wrong tokens at two positions, of every kind."""
  names = (experiments.UNPERTURBED, *experiments.RULES)
  points = tuple(
    experiments.Point(name, at, 60, 4.0, 0.5, 0.0, value, error, 0.5)
    for name in names
    for at, value in ((0.0, first), (9.0, last))
  )
  return experiments.Curves(60, points)


@functools.cache
def report() -> Task:
  """A task with all results."""
  short = {"TOLERANCES": (0.05, 0.2), "SPLITS": 5, "DRAWS": 10}
  made = sample(perturbations=wrong_tokens(0.75, 0.75, 0.05))
  with mock.patch.multiple(experiments, **short):
    for name in RESULTS:
      getattr(made, name)
  return made


def changed(**results: Any) -> Task:
  """The task with some results in place of its own."""
  return sample(**{name: getattr(report(), name) for name in RESULTS} | results)
