"""Made-up results of one task, through the experiments' own functions; no model and no JAX."""

import functools

import numpy as np

from calm.calibrate import Prompt, Record, generations
from calm.exits import schedules
from calm.inference import timing
from calm.paper.bench import tasks
from calm.paper.experiments import (
  decay,
  examples,
  gains,
  lengths,
  perturbations,
  propagations,
  suite,
  tradeoff,
  trainings,
  validity,
)

NUM_LAYERS = 4
GRID = (0.9, 0.6, 0.3)
WORDS = ("red", "green", "blue", "small", "large", "<b>", "&", "tool", "library")
SETTINGS = tasks.task("synopsis")


def prompts(count: int = 60) -> tuple[Prompt, ...]:
  """Prompts whose reference is what the full model says, with a word more."""
  texts = [full_text(i) for i in range(count)]
  return tuple(
    Prompt(f"p{i}", f"long {text} </script>", (f"{text} more",), f"source{i}")
    for i, text in enumerate(texts)
  )


def full_text(i: int) -> str:
  rng = np.random.default_rng(i)
  return " ".join(rng.choice(WORDS, size=4 + i % 4))


def record(i: int, depth: int, *, wrong: bool = False) -> Record:
  """Every token but the first leaves after `depth` layers; a wrong one loses its last word."""
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


def cached(count: int = 60) -> generations.Generations:
  """At 0.9 nothing changes, at 0.6 every tenth output does, at 0.3 every second one."""
  columns = [
    tuple(record(i, depth, wrong=bool(every) and i % every == 0) for i in range(count))
    for depth, every in ((3, 0), (2, 10), (1, 2))
  ]
  full = tuple(record(i, NUM_LAYERS) for i in range(count))
  return generations.Generations(prompts(count), np.array(GRID), tuple(columns), full)


def timings(ids: int = 3) -> timing.Timings:
  """Seconds in proportion to layers; the measure costs a tenth."""

  def timed(name: str, threshold: float, layers: float) -> timing.Timed:
    seconds = layers * (1.0 if name.startswith(("static", "full")) else 1.1) * 1e-3
    full = NUM_LAYERS * 1e-3
    return timing.Timed(
      name,
      threshold,
      layers,
      (seconds,) * ids,
      seconds,
      full / seconds,
      (full + 1e-3) / (seconds + 1e-3),
    )

  never = schedules.NEVER_EXIT
  rows = [timed(timing.FULL, never, 4.0), timed("oracle", never, 5.0)]
  rows += [timed(f"static {k}", never, k) for k in range(1, NUM_LAYERS + 1)]
  rows += [timed(m, t, d) for m in MEASURES for t, d in zip(GRID, (3, 2, 1), strict=True)]
  return timing.Timings(ids, 3, 1e-3, 4e-3, tuple(rows))


MEASURES = ("softmax", "classifier", "state")


def pieces(token: int) -> str:
  return "▁" + WORDS[token % len(WORDS)]


def shown():
  """Example outputs of every measure."""
  return tuple(
    examples.examples(
      cached(),
      measure,
      (0, 10, 11),
      pieces,
      SETTINGS.metric,
      NUM_LAYERS,
      certified=examples.Certified(0.6, 0.25, 0.05),
    )
    for measure in MEASURES
  )


def schedules_tried():
  over = cached()
  return decay.decay(
    prompts(),
    {name: over for name in decay.kinds(8)},
    list(over.full),
    SETTINGS.metric,
    measure="softmax",
    max_length=8,
    step=0.3,
  )


def lengths_of(full):
  asked = prompts()
  return lengths.lengths(
    [p.targets[0] for p in asked],
    [p.input for p in asked],
    [r.prediction for r in full],
    lambda text: [0] * len(text.split()),
    8,
  )


@functools.cache
def report() -> suite.TaskReport:
  """All results of the made-up task."""
  asked, over = prompts(), cached()
  grids = {measure: over for measure in MEASURES}
  static = {k: [record(i, k, wrong=i % 4 >= k) for i in range(60)] for k in range(1, 5)}
  full = list(over.full)
  metric = SETTINGS.metric
  table = gains.gains(grids, NUM_LAYERS, metric, flops=lambda measure, exits: 1.5)
  made_tradeoff = tradeoff.tradeoff(
    asked, grids, static, full, metric, timings=timings(), bleu=True
  )
  point = perturbations.Position(0, 60, 0.5, 0.75, 0.5, 0.6)
  return suite.TaskReport(
    settings=SETTINGS,
    measures=MEASURES,
    full=made_tradeoff.full.scores,
    lengths=lengths_of(full),
    tradeoff=made_tradeoff,
    gains=gains.with_times(table, timings()),
    perturbations=perturbations.Perturbations(metric, 60, (point,) * 3, (point,) * 3),
    decay=schedules_tried(),
    propagations=propagations.propagations(
      asked, {name: full for name in propagations.TITLES}, full, metric
    ),
    validity=validity.validity(
      grids, NUM_LAYERS, metric, tolerances=(0.05, 0.2), splits=5, draws=10
    ),
    examples=shown(),
    classifiers=trainings.classifiers(
      asked, {trainings.PER_LAYER: over, trainings.GEOMETRIC: over}, metric
    ),
    objectives=trainings.objectives(
      asked, {trainings.ALL_LAYERS: static, trainings.LAST_LAYER: static}, metric
    ),
  )
