"""The paper's tables and figures as functions from one task's `Bench` to a frozen result."""

import dataclasses
import functools
import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from calm import calibrate as calibrate_lib
from calm import exits
from calm.calibrate import generations
from calm.calibrate import losses as sequence_losses
from calm.data import prompt_batches
from calm.exits import propagation, schedules
from calm.inference import panel, timing
from calm.paper import bench, perturbations, scores, tasks, trials
from calm.paper.scores import Point
from calm.t5 import costs

FULL, STATIC, ORACLE = "full model", "static", "oracle"
PER_LAYER, GEOMETRIC = "per layer", "geometric-like"
ALL_LAYERS, LAST_LAYER = "Eq. 6", "last layer only"
CONSTANT = "constant"
SHOWN_THRESHOLD = 0.8  # lambda of Fig. 2b
# Propagations of the oracle (section 3.3.1).
PROPAGATIONS = ("exit_state", "first_state", "copy_projections")


@dataclasses.dataclass(frozen=True)
class Curves:
  """Curves of one experiment on the same validation prompts, each from deep to shallow."""

  num_prompts: int
  points: tuple[Point, ...]  # curve after curve
  num_timed: int = 0  # of the prompts, decoded alone for the seconds

  @property
  def curves(self) -> dict[str, list[Point]]:
    """Name -> points."""
    names = dict.fromkeys(point.name for point in self.points)
    return {name: [p for p in self.points if p.name == name] for name in names}

  def first(self, name: str) -> Point:
    """The deepest point of the curve of a name."""
    return next(point for point in self.points if point.name == name)


@dataclasses.dataclass(frozen=True)
class Lengths:
  """Table 1 for one task; lengths are 'mean (5th - 95th percentile)' in tokens without EOS."""

  num_references: int  # prompts that have one
  references: str  # first references
  inputs: str  # prompts with their prefix
  outputs: str  # of the full model
  cut_inputs: float  # share of prompts longer than what is read, in [0, 1]


def lengths(of: bench.Bench) -> Lengths:
  """Table 1: how long references and outputs are."""
  options, encode = of.predictor.options, of.predictor.vocabulary.encode

  def counts(texts: Iterable[str]) -> np.ndarray:
    return np.array([len(encode(text)) for text in texts], float)

  def words(values: np.ndarray) -> str:
    low, high = np.percentile(values, [5, 95])
    return f"{values.mean():.0f} ({low:.0f} - {high:.0f})"

  references = counts(prompt.targets[0] for prompt in of.validation if prompt.targets)
  inputs = counts(options.task_prefix + prompt.input for prompt in of.validation)
  return Lengths(
    len(references),
    words(references),
    words(inputs),
    words(counts(record.prediction for record in of.full)),
    float(np.mean(inputs >= options.max_input_length)),
  )


# Curves: Fig. 2c, Fig. 3, section 3.3.1, App. D, Eq. 6


def scorer(of: bench.Bench, **more: Any) -> scores.Scorer:
  """Scores of the validation prompts."""
  return scores.Scorer([p.targets for p in of.validation], of.settings.metric, **more)


def tradeoff(of: bench.Bench) -> Curves:
  """Fig. 3: quality against layers, and against measured seconds, which the paper lacks."""
  oracle = of.records("oracle", exits.OracleExit(), of.validation)
  grids, depths = of.validation_grids, range(1, of.num_layers + 1)
  settings = of.timed_settings({measure: of.grid(measure) for measure in grids})
  settings += [timing.Setting(f"{STATIC} {k}", exits.StaticExit(k)) for k in depths]
  settings.append(timing.Setting(ORACLE, exits.OracleExit()))
  timed = timing.of_one_length(of.timed_model, of.validation, of.options.timed)
  timings = of.time("tradeoff", timed, settings)
  score, full = scorer(of, bleu=of.settings.bleu, timings=timings), of.full
  points = [p for name, cached in grids.items() for p in score.curve(name, cached, full)]
  points += [
    score.point(STATIC, of.static[k], full, timed_as=f"{STATIC} {k}") for k in reversed(depths)
  ]
  points.append(score.point(ORACLE, oracle, full))
  points.append(score.point(FULL, full, full, timed_as=timing.FULL))
  return Curves(len(of.validation), tuple(points), timings.num_prompts)


def schedule_kinds(max_length: int) -> Mapping[str, schedules.Schedule]:
  """The schedules compared: a constant, and Eq. 5 with tau 0 (which is another) and 4."""
  return {
    CONSTANT: schedules.Constant(),
    "decaying, τ = 0": schedules.Decaying(0.0, max_length),
    "decaying, τ = 4": schedules.Decaying(4.0, max_length),
  }


def schedule_values(max_length: int) -> dict[str, np.ndarray]:
  """Fig. 2b: schedule -> the threshold of each token [max_length] at `SHOWN_THRESHOLD`."""
  shown: Any = np.float32(SHOWN_THRESHOLD)
  tokens: Any = np.arange(max_length)
  return {
    name: np.broadcast_to(np.asarray(schedule(shown, tokens)), tokens.shape)
    for name, schedule in schedule_kinds(max_length).items()
  }


def schedule_grid(step: float) -> tuple[float, ...]:
  """Thresholds of Fig. 2c, descending from 1 - step to step."""
  return tuple(round(1.0 - i * step, 6) for i in range(1, round(1.0 / step)))


def decay(of: bench.Bench) -> Curves:
  """Fig. 2c: the trade-off under each schedule, with the first measure."""
  kinds = schedule_kinds(of.predictor.options.max_decode_length)
  prompts, levels = of.validation[: of.options.ablated], schedule_grid(of.options.step)
  score, full, points = scorer(of), of.full[: len(prompts)], []
  score = dataclasses.replace(score, references=score.references[: len(prompts)])
  for name, schedule in kinds.items():
    model = of.model(of.measures[0], schedule=schedule)
    cached = of.over(model, prompts, levels, f"schedule {name}")
    points += score.curve(name, cached, full)
  return Curves(len(prompts), tuple(points))


def propagations(of: bench.Bench) -> Curves:
  """Section 3.3.1: the oracle's exits under three ways to fill the skipped layers."""
  score, full = scorer(of), of.full
  points = [score.point(FULL, full, full)]
  for name in PROPAGATIONS:
    rule = exits.OracleExit(propagation=propagation.propagation(name))
    step = "oracle" if name == PROPAGATIONS[0] else f"oracle {name}"
    points.append(score.point(name, of.records(step, rule, of.validation), full))
  return Curves(len(of.validation), tuple(points))


def classifiers(of: bench.Bench) -> Curves | None:
  """App. D: exit classifiers trained per layer and Elbayad's way; None without the second.

  Similarities are to each model's own full depth.
  """
  if of.geometric is None:
    return None
  other = dataclasses.replace(of, predictor=of.geometric)
  points = []
  for name, each in ((PER_LAYER, of), (GEOMETRIC, other)):
    cached = each.decoded("classifier", of.validation)
    points += scorer(of).curve(name, cached, cached.full)
  return Curves(len(of.validation), tuple(points))


def objectives(of: bench.Bench) -> Curves | None:
  """Eq. 6 against a loss on the last layer only: quality at every static depth, or None."""
  if of.last_layer is None:
    return None
  points = []
  for name, model in ((ALL_LAYERS, of.all_layers or of.predictor), (LAST_LAYER, of.last_layer)):
    static = dataclasses.replace(of, predictor=model).static
    full = static[max(static)]
    points += [scorer(of).point(name, static[k], full) for k in sorted(static, reverse=True)]
  return Curves(len(of.validation), tuple(points))


# Table 2

# (consistency, tolerance delta): the paper's; Debian's outputs are shorter, so that one wrong
# word costs more.
TARGETS = (("textual", 0.1), ("textual", 0.25), ("risk", 0.02), ("risk", 0.05))
# `method` of `calibrate` -> the loss behind risk consistency, Eq. 11's or Eq. 2's. Only betting
# takes signed losses, which reward prompts whose output improves.
METHODS = {"paper": "risk_clipped", "auto": "risk_signed"}


@dataclasses.dataclass(frozen=True)
class Gain:
  """A cell of Table 2: one guarantee by one method, for one measure."""

  consistency: str  # 'textual' or 'risk'
  tolerance: float  # delta
  measure: str
  method: str  # of `METHODS`
  # Calibrated lambda, or `NEVER_EXIT`: the full model.
  threshold: float = schedules.NEVER_EXIT
  risk: float = 0.0  # mean loss of unseen prompts at that threshold
  # 95 % interval of the expected loss, from the unseen prompts alone.
  risk_interval: scores.Interval = (0.0, 0.0)
  layers: float = float("nan")  # mean decoder layers a token on unseen prompts
  flops_reduction: float = 1.0  # decoder FLOPs of the full model over these; NaN: no formula
  speedup: float = 1.0  # measured decode seconds of the full model over these
  end_to_end: float = 1.0  # the same with the encoder's seconds on both sides
  speedup_interval: scores.Interval = (1.0, 1.0)  # 95 % interval of `speedup`, over prompts

  @property
  def exits(self) -> bool:
    """Whether a threshold was certified."""
    return self.threshold != schedules.NEVER_EXIT

  @property
  def above(self) -> bool:
    """Whether the risk that was measured on unseen prompts is above what was promised."""
    return self.risk > self.tolerance


@dataclasses.dataclass(frozen=True)
class Gains:
  """Table 2 for one task."""

  error_rate: float
  num_calibration: int
  num_unseen: int  # prompts of the risk, layers and FLOPs
  num_timed: int  # unseen prompts decoded alone for the seconds
  cells: tuple[Gain, ...]  # by target, then measure, then method


def gains(
  of: bench.Bench,
  targets: Sequence[tuple[str, float]] = TARGETS,
  methods: Mapping[str, str] = METHODS,
) -> Gains:
  """Table 2: what calibrated thresholds save on unseen prompts.

  Four fifths of the test prompts, the paper's share, are calibrated on; each cell has its own
  test at epsilon. FLOPs are those at the padded length of a prompt of mean length.
  """
  encode, options = of.predictor.vocabulary.encode, of.predictor.options
  read = np.mean([len(encode(options.task_prefix + p.input)) for p in of.validation])
  padded = prompt_batches.bucket_length(round(read) + 1, options.max_input_length)
  rate, cut = of.options.error_rate, round(0.8 * len(of.test))

  @functools.cache
  def risk(measure: str, kind: str):
    return sequence_losses.compute(of.test_grids[measure], kind, metric=of.settings.metric)

  def table(cell: Gain):
    textual = cell.consistency == "textual"
    return of.textual[cell.measure] if textual else risk(cell.measure, methods[cell.method])

  def calibrated(cell: Gain) -> Gain:
    made = calibrate_lib.calibrate(
      table(cell).ungrouped().rows(range(cut)),
      tolerance=cell.tolerance,
      error_rate=rate,
      method=cell.method,
    )
    return dataclasses.replace(cell, threshold=made.threshold, layers=float(of.num_layers))

  asked = itertools.product(targets, of.measures, methods)
  cells = [calibrated(Gain(*target, measure, method)) for target, measure, method in asked]
  chosen = {
    measure: list(dict.fromkeys(c.threshold for c in cells if c.measure == measure and c.exits))
    for measure in of.measures
  }
  alone = timing.of_one_length(of.timed_model, of.test[cut:], 2 * of.options.timed)
  timings = of.time("gains", alone, of.timed_settings(chosen))

  def measured(cell: Gain) -> Gain:
    if not cell.exits:
      return cell
    of_task, timed = table(cell), timings.find(cell.measure, cell.threshold)
    column = int(np.flatnonzero(of_task.thresholds == cell.threshold)[0])
    unseen = of_task.values[cut:, column]
    layers = [r.exit_layers or () for r in of.test_grids[cell.measure].records[column][cut:]]
    model = bench.under(of.predictor, cell.measure)
    assert timed is not None  # every threshold that was chosen is timed
    return dataclasses.replace(
      cell,
      risk=float(unseen.mean()),
      risk_interval=scores.mean_interval(unseen, of_task.support.lower),
      layers=sum(map(sum, layers)) / sum(map(len, layers)),
      flops_reduction=costs.totals(model.step_costs(padded), layers).flops_ratio,
      speedup=timed.speedup,
      end_to_end=timed.end_to_end,
      speedup_interval=scores.speedup_interval(timings, timed),
    )

  found = tuple(map(measured, cells))
  return Gains(rate, cut, len(of.test) - cut, timings.num_prompts, found)


# App. B: deltas, random splits of figure (a), calibration sets of figure (b).
TOLERANCES = panel.TOLERANCES
SPLITS, DRAWS = 50, 200


@dataclasses.dataclass(frozen=True)
class MethodTrials:
  """One measure under one method: figures (a) and (b), one entry a tolerance each."""

  measure: str
  method: str
  splits: tuple[trials.SplitTrials, ...]
  validity: tuple[trials.ValidityTrials, ...]


@dataclasses.dataclass(frozen=True)
class Validity:
  """App. B for one task: textual consistency, one entry of `trials` a measure and method."""

  error_rate: float
  num_prompts: int
  calibration_size: int  # prompts of each drawn calibration set of figure (b)
  trials: tuple[MethodTrials, ...]


def validity(of: bench.Bench) -> Validity:
  """App. B: calibrates again and again on the cached outputs of the test prompts.

  Figure (a): random splits of the prompts. Figure (b): calibration sets drawn from them.
  """
  rate, size = of.options.error_rate, min(300, len(of.test))
  entries, progress = [], of.step("repeated calibration")
  for number, (measure, cached) in enumerate(of.test_grids.items()):
    counts = cached.layer_counts()
    layers = counts and (*counts, of.num_layers)
    for turn, method in enumerate(METHODS):
      progress((number + turn / 2) / len(of.measures), f"{measure}, {method}")
      pool = trials.Draws(of.textual[measure].ungrouped(), method)
      splits = trials.split_trials(pool, TOLERANCES, rate, layers=layers, trials=SPLITS)
      draws = trials.validity_trials(pool, TOLERANCES, rate, size, trials=DRAWS)
      entries.append(MethodTrials(measure, method, splits, draws))
  return Validity(rate, len(of.test), size, tuple(entries))


# Fig. 4


def choose_examples(
  cached: generations.Generations, count: int, among: Collection[str], *, max_tokens: int = 60
) -> tuple[int, ...]:
  """Positions of up to `count` prompts, by id among some, of 3 to `max_tokens` tokens: first
  those whose output changes in the lower half of the grid; none is chosen by its quality."""
  fitting = [
    row
    for row, (prompt, record) in enumerate(zip(cached.prompts, cached.full, strict=True))
    if prompt.id in among and 3 <= len(record.tokens or ()) <= max_tokens
  ]
  half = cached.records[len(cached.records) // 2 :]
  changes = lambda row: any(r[row].prediction != cached.full[row].prediction for r in half)
  return tuple(sorted(fitting, key=lambda row: not changes(row))[:count])


def examples(of: bench.Bench, table: Gains) -> tuple[panel.Panel, ...]:
  """Fig. 4: outputs with each token's layers at every threshold, and what is certified."""
  cut, rate = table.num_calibration, of.options.error_rate
  among = {prompt.id for prompt in timing.of_one_length(of.timed_model, of.test[cut:])}
  rows = choose_examples(of.test_grids[of.measures[0]], of.options.examples, among)
  vocabulary, eos_id = of.predictor.vocabulary, of.predictor.eos_id
  shown = []
  for measure, cached in of.test_grids.items():
    promised = panel.promised(
      of.textual[measure].ungrouped().rows(range(cut)), rate, TOLERANCES
    )
    columns = (cached.full, *cached.records)
    items = (
      panel.shown_prompt(
        cached.prompts[row],
        [column[row] for column in columns],
        vocabulary.piece,
        of.settings.metric,
        eos_id,
      )
      for row in rows
    )
    shown.append(
      panel.Panel(
        measure,
        of.num_layers,
        (schedules.NEVER_EXIT, *cached.thresholds.tolist()),
        tuple(items),
        rate,
        promised,
        # The least tolerance that something is certified for.
        first=next((i for i, (_, at) in enumerate(promised) if at), 0),
      )
    )
  return tuple(shown)


@dataclasses.dataclass(frozen=True)
class TaskReport:
  """All results of one task."""

  settings: tasks.TaskSettings
  measures: tuple[str, ...]
  num_layers: int
  step: float  # between the thresholds of Fig. 2c
  lengths: Lengths
  tradeoff: Curves
  gains: Gains
  perturbations: perturbations.Perturbations
  decay: Curves
  propagations: Curves
  validity: Validity
  examples: tuple[panel.Panel, ...]  # one entry a measure
  classifiers: Curves | None
  objectives: Curves | None


def run(of: bench.Bench) -> TaskReport:
  """All experiments of one task, in an order that reuses what came before."""
  return TaskReport(
    of.settings,
    of.measures,
    of.num_layers,
    of.options.step,
    tradeoff=tradeoff(of),
    lengths=lengths(of),
    gains=(table_2 := gains(of)),
    perturbations=perturbations.perturbations(of),
    decay=decay(of),
    propagations=propagations(of),
    validity=validity(of),
    examples=examples(of, table_2),
    classifiers=classifiers(of),
    objectives=objectives(of),
  )


def num_steps(of: bench.Bench) -> int:
  """Steps that `run` announces where nothing is cached."""
  steps = 3 * len(of.measures) + of.num_layers  # each grid, its prompts twice; static models
  steps += len(PROPAGATIONS) + len(schedule_kinds(1))
  steps += 4  # wrong tokens, repeated calibration, seconds twice
  if of.geometric is not None:
    steps += 2
  if of.last_layer is not None:
    steps += of.num_layers * (1 if of.all_layers is None else 2)
  return steps
