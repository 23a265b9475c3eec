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
from calm.paper.scores import Curve
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
  """Curves of one experiment on the same validation prompts."""

  num_prompts: int
  curves: tuple[Curve, ...]
  num_timed: int = 0  # of the prompts, decoded alone for the seconds

  def first(self, name: str) -> scores.Point:
    """The deepest point of the curve of a name."""
    return next(curve.points[0] for curve in self.curves if curve.name == name)


@dataclasses.dataclass(frozen=True)
class Length:
  """Tokens of a set of texts: their number, mean, 5th and 95th percentile."""

  count: int
  mean: float
  low: float
  high: float

  def __str__(self) -> str:
    return f"{self.mean:.0f} ({self.low:.0f} - {self.high:.0f})"


@dataclasses.dataclass(frozen=True)
class Lengths:
  """Table 1 for one task; EOS is not counted."""

  references: Length  # first references
  inputs: Length  # prompts with their prefix
  outputs: Length  # of the full model
  cut_inputs: float  # share of prompts longer than what is read, in [0, 1]


def lengths(of: bench.Bench) -> Lengths:
  """Table 1: how long references and outputs are."""
  options, encode = of.predictor.options, of.predictor.vocabulary.encode

  def counts(texts: Iterable[str]) -> np.ndarray:
    return np.array([len(encode(text)) for text in texts], float)

  def length(values: np.ndarray) -> Length:
    low, high = np.percentile(values, [5, 95])
    return Length(len(values), float(values.mean()), float(low), float(high))

  inputs = counts(options.task_prefix + prompt.input for prompt in of.validation)
  return Lengths(
    length(counts(prompt.targets[0] for prompt in of.validation if prompt.targets)),
    length(inputs),
    length(counts(record.prediction for record in of.full)),
    float(np.mean(inputs >= options.max_input_length)),
  )


# Curves: Fig. 2c, Fig. 3, section 3.3.1, App. D, Eq. 6


def scorer(of: bench.Bench, *, ablated: bool = False, bleu: bool = False) -> scores.Scorer:
  """Scores of the validation prompts, or of those of Fig. 2."""
  prompts = of.validation[: of.options.ablated] if ablated else of.validation
  return scores.Scorer([p.targets for p in prompts], of.settings.metric, bleu)


def static_name(depth: int) -> str:
  """The name under which the static model of a depth is timed."""
  return f"{STATIC} {depth}"


def tradeoff(of: bench.Bench) -> Curves:
  """Fig. 3: quality against layers, and against measured seconds, which the paper lacks."""
  oracle = of.records("oracle", exits.OracleExit(), of.validation)
  grids, depths = of.validation_grids, range(1, of.num_layers + 1)
  settings = of.timed_settings({measure: of.grid(measure) for measure in grids})
  settings += [timing.Setting(static_name(k), exits.StaticExit(k)) for k in depths]
  settings.append(timing.Setting(ORACLE, exits.OracleExit()))
  timed = timing.of_one_length(of.timed_model, of.validation, of.options.timed)
  timings = of.time("tradeoff", timed, settings)
  score, full = scorer(of, bleu=of.settings.bleu), of.full
  point = lambda records, name: score.point(records, full, name=name, timings=timings)
  curves = [score.curve(name, cached, full, timings) for name, cached in grids.items()]
  static = tuple(point(of.static[k], static_name(k)) for k in reversed(depths))
  curves += [Curve(STATIC, static), Curve(ORACLE, (point(oracle, ORACLE),))]
  curves.append(Curve(FULL, (point(full, timing.FULL),)))
  return Curves(len(of.validation), tuple(curves), timings.num_prompts)


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
  levels, measure = schedule_grid(of.options.step), of.measures[0]
  prompts = of.validation[: of.options.ablated]
  score, full, curves = scorer(of, ablated=True), of.full[: len(prompts)], []
  for name, schedule in kinds.items():
    model = of.model(measure, schedule=schedule)
    cached = of.over(model, prompts, levels, f"schedule {name}")
    curves.append(score.curve(name, cached, full))
  return Curves(len(prompts), tuple(curves))


def reachable_layers(curve: Curve, least: float) -> float:
  """Fewest mean layers of a curve's points whose similarity is at least `least`."""
  kept = [p.scores.layers for p in curve.points if p.scores.similarity >= least]
  return min(kept, default=float("nan"))


def propagations(of: bench.Bench) -> Curves:
  """Section 3.3.1: the oracle's exits under three ways to fill the skipped layers."""
  score, full = scorer(of), of.full
  curves = [Curve(FULL, (score.point(full, full),))]
  for name in PROPAGATIONS:
    rule = exits.OracleExit(propagation=propagation.propagation(name))
    step = "oracle" if name == PROPAGATIONS[0] else f"oracle {name}"
    records = of.records(step, rule, of.validation)
    curves.append(Curve(name, (score.point(records, full),)))
  return Curves(len(of.validation), tuple(curves))


def classifiers(of: bench.Bench) -> Curves | None:
  """App. D: exit classifiers trained per layer and Elbayad's way; None without the second.

  Similarities are to each model's own full depth.
  """
  if of.geometric is None:
    return None
  score = scorer(of)
  other = dataclasses.replace(of, predictor=of.geometric)
  curves = []
  for name, each in ((PER_LAYER, of), (GEOMETRIC, other)):
    cached = each.decoded("classifier", of.validation)
    curves.append(score.curve(name, cached, cached.full))
  return Curves(len(of.validation), tuple(curves))


def objectives(of: bench.Bench) -> Curves | None:
  """Eq. 6 against a loss on the last layer only: quality at every static depth, or None."""
  if of.last_layer is None:
    return None
  score = scorer(of)
  models = {ALL_LAYERS: of.all_layers or of.predictor, LAST_LAYER: of.last_layer}
  curves = []
  for name, model in models.items():
    static = dataclasses.replace(of, predictor=model).static
    full = static[max(static)]
    points = tuple(score.point(static[k], full) for k in sorted(static, reverse=True))
    curves.append(Curve(name, points))
  return Curves(len(of.validation), tuple(curves))


# Table 2


@dataclasses.dataclass(frozen=True)
class Target:
  """A guarantee: consistency 'textual' or 'risk', and the tolerance delta."""

  consistency: str
  tolerance: float


@dataclasses.dataclass(frozen=True)
class Method:
  """`method` of `calibrate`, and the loss behind risk consistency: Eq. 11's or Eq. 2's."""

  name: str
  risk_kind: str


# The paper's; Debian's outputs are shorter, so that one wrong word costs more.
TARGETS = (
  Target("textual", 0.1),
  Target("textual", 0.25),
  Target("risk", 0.02),
  Target("risk", 0.05),
)
# Only a betting test takes signed losses, which reward prompts whose output improves.
METHODS = (Method("paper", "risk_clipped"), Method("auto", "risk_signed"))


@dataclasses.dataclass(frozen=True)
class Gain:
  """One method's cell of Table 2."""

  threshold: float  # calibrated lambda, or `NEVER_EXIT`
  risk: float  # mean loss of unseen prompts at that threshold
  # 95 % interval of the expected loss, from the unseen prompts alone.
  risk_interval: scores.Interval
  layers: float  # mean decoder layers a token on unseen prompts
  flops_reduction: float  # decoder FLOPs of the full model over these; NaN without a formula
  speedup: float  # measured decode seconds of the full model over these
  end_to_end: float  # the same with the encoder's seconds on both sides
  speedup_interval: scores.Interval  # 95 % interval of `speedup`, over prompts


@dataclasses.dataclass(frozen=True)
class Row:
  """One row of Table 2; `gains` has one entry a method."""

  target: Target
  measure: str
  gains: tuple[Gain, ...]


@dataclasses.dataclass(frozen=True)
class Gains:
  """Table 2 for one task."""

  error_rate: float
  num_calibration: int
  num_unseen: int  # prompts of the risk, layers and FLOPs
  num_timed: int  # unseen prompts decoded alone for the seconds
  rows: tuple[Row, ...]


def gains(
  of: bench.Bench, targets: Sequence[Target] = TARGETS, methods: Sequence[Method] = METHODS
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

  def table(measure: str, target: Target, method: Method):
    textual = target.consistency == "textual"
    return of.textual[measure] if textual else risk(measure, method.risk_kind)

  cells = list(itertools.product(targets, of.measures, methods))
  found = {
    (target, measure, method): calibrate_lib.calibrate(
      table(measure, target, method).ungrouped().rows(range(cut)),
      tolerance=target.tolerance,
      error_rate=rate,
      method=method.name,
    ).threshold
    for target, measure, method in cells
  }
  chosen: dict[str, list[float]] = {measure: [] for measure in of.measures}
  for (_, measure, _), level in found.items():
    if level not in (*chosen[measure], schedules.NEVER_EXIT):
      chosen[measure].append(level)
  alone = timing.of_one_length(of.timed_model, of.test[cut:], 2 * of.options.timed)
  timings = of.time("gains", alone, of.timed_settings(chosen))

  def gain(measure: str, target: Target, method: Method) -> Gain:
    level = found[target, measure, method]
    if level == schedules.NEVER_EXIT:
      return Gain(
        level, 0.0, (0.0, 0.0), float(of.num_layers), 1.0, 1.0, 1.0, speedup_interval=(1.0, 1.0)
      )
    of_task, timed = table(measure, target, method), timings.find(measure, level)
    column = int(np.flatnonzero(of_task.thresholds == level)[0])
    unseen = of_task.values[cut:, column]
    layers = [r.exit_layers or () for r in of.test_grids[measure].records[column][cut:]]
    assert timed is not None  # every threshold that was chosen is timed
    return Gain(
      level,
      float(unseen.mean()),
      scores.mean_interval(unseen, of_task.support.lower),
      sum(map(sum, layers)) / sum(map(len, layers)),
      costs.totals(bench.under(of.predictor, measure).step_costs(padded), layers).flops_ratio,
      timed.speedup,
      timed.end_to_end,
      scores.speedup_interval(timings, timed),
    )

  rows = tuple(
    Row(target, measure, tuple(gain(measure, target, method) for method in methods))
    for target, measure in itertools.product(targets, of.measures)
  )
  return Gains(rate, cut, len(of.test) - cut, timings.num_prompts, rows)


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

  metric: str
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
    losses, counts = of.textual[measure].ungrouped(), cached.layer_counts()
    layers = counts and (*counts, of.num_layers)
    for turn, method in enumerate(("paper", "auto")):
      progress((number + turn / 2) / len(of.measures), f"{measure}, {method}")
      common = {"error_rate": rate, "method": method}
      splits = trials.split_trials(losses, TOLERANCES, layers=layers, trials=SPLITS, **common)
      common |= {"calibration_size": size, "trials": DRAWS}
      draws = trials.validity_trials(losses, TOLERANCES, **common)
      entries.append(MethodTrials(measure, method, splits, draws))
  return Validity(of.settings.metric, rate, len(of.test), size, tuple(entries))


# Fig. 4


def choose_examples(
  cached: generations.Generations, count: int, among: Collection[str], *, max_tokens: int = 60
) -> tuple[int, ...]:
  """Positions of up to `count` prompts, by id among some, of 3 to `max_tokens` tokens.

  The first prompts, in the random order of the run, whose output changes somewhere in the
  lower half of the grid, then the others: nothing is chosen by its quality.
  """
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
