"""The paper's tables and figures: results of one task, each computed when it is asked for."""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from calm import exits
from calm.calibrate import calibrate, losses
from calm.data import prompt_batches
from calm.exits import propagation, schedules
from calm.inference import panel, timing
from calm.paper import bench, perturbations, scores, trials
from calm.paper.scores import Curves

FULL, STATIC, ORACLE = "full model", "static", "oracle"
SHOWN_THRESHOLD = 0.8  # lambda of Fig. 2b
# Propagations of the oracle (section 3.3.1).
PROPAGATIONS = ("exit_state", "first_state", "copy_projections")
# (consistency, tolerance delta) of Table 2: the paper's; Debian's outputs are shorter, so that
# one wrong word costs more.
TARGETS = (("textual", 0.1), ("textual", 0.25), ("risk", 0.02), ("risk", 0.05))
# `method` of `calibrate` -> the loss behind risk consistency, Eq. 11's or Eq. 2's. Only betting
# takes signed losses, which reward prompts whose output improves.
METHODS = {"paper": "risk_clipped", "auto": "risk_signed"}
# App. B: deltas, random splits of figure (a), calibration sets of figure (b).
TOLERANCES = panel.TOLERANCES
SPLITS, DRAWS = 50, 200
MAX_TOKENS = 60  # of an output that is shown


def lengths(of: bench.Bench) -> tuple[str, ...]:
  """Table 1: prompts with a reference; tokens without EOS, 'mean (5th - 95th percentile)', of
  references, full model's outputs and inputs; the share of inputs that is cut, in %."""
  options, encode = of.predictor.options, of.predictor.vocabulary.encode

  def counts(texts: Iterable[str]) -> np.ndarray:
    return np.array([len(encode(text)) for text in texts], float)

  def words(values: np.ndarray) -> str:
    low, high = np.percentile(values, [5, 95])
    return f"{values.mean():.0f} ({low:.0f} - {high:.0f})"

  references = counts(prompt.targets[0] for prompt in of.validation if prompt.targets)
  inputs = counts(options.task_prefix + prompt.input for prompt in of.validation)
  outputs = counts(record.prediction for record in of.full)
  cut = f"{100.0 * float(np.mean(inputs >= options.max_input_length)):.1f}"
  return str(len(references)), words(references), words(outputs), words(inputs), cut


def tradeoff(of: bench.Bench) -> Curves:
  """Fig. 3: quality against layers, and against measured seconds, which the paper lacks."""
  oracle = of.records("oracle", exits.OracleExit(), of.validation)
  grids, depths = of.validation_grids, range(1, of.num_layers + 1)
  settings = of.timed_settings({measure: of.grid(measure) for measure in grids})
  settings += [timing.Setting(f"{STATIC} {k}", exits.StaticExit(k)) for k in depths]
  settings.append(timing.Setting(ORACLE, exits.OracleExit()))
  timed = timing.of_one_length(of.timed_model, of.validation, of.options.timed)
  timings, full = of.time("tradeoff", timed, settings), of.full
  more: dict[str, Any] = {"bleu": of.settings.bleu, "timings": timings}
  point = functools.partial(
    scores.point, full=full, prompts=of.validation, metric=of.settings.metric, **more
  )
  points = []
  for measure, cached in grids.items():
    points += scores.curve(measure, cached, full, of.settings.metric, **more)
  points += [point(STATIC, of.static[k], timed_as=f"{STATIC} {k}") for k in reversed(depths)]
  points += [point(ORACLE, oracle), point(FULL, full, timed_as=timing.FULL)]
  return Curves(len(of.validation), tuple(points), timings.num_prompts)


def schedule_kinds(max_length: int) -> Mapping[str, schedules.Schedule]:
  """The schedules compared: a constant, and Eq. 5 with tau 0 (which is another) and 4."""
  return {
    "constant": schedules.Constant(),
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


def decay(of: bench.Bench) -> Curves:
  """Fig. 2c: the trade-off under each schedule, with the first measure."""
  prompts, step, points = of.validation[: of.options.ablated], of.options.step, []
  levels = [round(1.0 - i * step, 6) for i in range(1, round(1.0 / step))]
  for name, schedule in schedule_kinds(of.predictor.options.max_decode_length).items():
    model = of.model(of.measures[0], schedule=schedule)
    cached = of.over(model, prompts, levels, f"schedule {name}")
    points += scores.curve(name, cached, of.full[: len(prompts)], of.settings.metric)
  return Curves(len(prompts), tuple(points))


def propagations(of: bench.Bench) -> Curves:
  """Section 3.3.1: the oracle's exits under three ways to fill the skipped layers."""
  records = {FULL: of.full}
  for name in PROPAGATIONS:
    rule = exits.OracleExit(propagation=propagation.propagation(name))
    step = "oracle" if name == PROPAGATIONS[0] else f"oracle {name}"
    records[name] = of.records(step, rule, of.validation)
  given = of.full, of.validation, of.settings.metric
  points = tuple(scores.point(name, made, *given) for name, made in records.items())
  return Curves(len(of.validation), points)


def classifiers(of: bench.Bench) -> Curves | None:
  """App. D: exit classifiers trained per layer and Elbayad's way; None without the second.

  Similarities are to each model's own full depth.
  """
  if of.geometric is None:
    return None
  points = []
  for name, model in (("per layer", of.predictor), ("geometric-like", of.geometric)):
    cached = dataclasses.replace(of, predictor=model).decoded("classifier", of.validation)
    points += scores.curve(name, cached, cached.full, of.settings.metric)
  return Curves(len(of.validation), tuple(points))


def objectives(of: bench.Bench) -> Curves | None:
  """Eq. 6 against a loss on the last layer only: quality at every static depth, or None."""
  if of.last_layer is None:
    return None
  models, points = (
    {"Eq. 6": of.all_layers or of.predictor, "last layer only": of.last_layer},
    [],
  )
  for name, model in models.items():
    static = dataclasses.replace(of, predictor=model).static
    given = static[max(static)], of.validation, of.settings.metric
    points += [scores.point(name, static[k], *given) for k in sorted(static, reverse=True)]
  return Curves(len(of.validation), tuple(points))


@dataclasses.dataclass(frozen=True)
class Gain:
  """A cell of Table 2: one guarantee by one method, for one measure."""

  consistency: str  # 'textual' or 'risk'
  tolerance: float  # delta
  measure: str
  method: str  # of `METHODS`
  threshold: float  # calibrated lambda, or `NEVER_EXIT`: the full model
  layers: float  # mean decoder layers a token on unseen prompts
  risk: float = 0.0  # mean loss of unseen prompts at that threshold
  # 95 % interval of the expected loss, from the unseen prompts alone.
  risk_interval: scores.Interval = (0.0, 0.0)
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


def gains(
  of: bench.Bench,
  targets: Sequence[tuple[str, float]] = TARGETS,
  methods: Mapping[str, str] = METHODS,
) -> tuple[Gain, ...]:
  """Table 2: what calibrated thresholds save on unseen prompts, by target, measure, method.

  Each cell has its own test at epsilon. FLOPs are those at the padded length of a prompt of
  mean length.
  """
  encode, options = of.predictor.vocabulary.encode, of.predictor.options
  read = np.mean([len(encode(options.task_prefix + p.input)) for p in of.validation])
  padded = prompt_batches.bucket_length(round(read) + 1, options.max_input_length)
  cut, cells, metric = of.num_calibration, [], of.settings.metric

  @functools.cache
  def table(consistency: str, measure: str, method: str):
    if consistency == "textual":
      return of.textual[measure]
    return losses.compute(of.test_grids[measure], methods[method], metric=metric).ungrouped()

  for target, measure, method in itertools.product(targets, of.measures, methods):
    made = calibrate(
      table(target[0], measure, method).rows(range(cut)),
      tolerance=target[1],
      error_rate=of.options.error_rate,
      method=method,
    )
    cells.append(Gain(*target, measure, method, made.threshold, float(of.num_layers)))
  chosen = {
    measure: list(dict.fromkeys(c.threshold for c in cells if c.measure == measure and c.exits))
    for measure in of.measures
  }
  alone = timing.of_one_length(of.timed_model, of.unseen, 2 * of.options.timed)
  timings = of.time("gains", alone, of.timed_settings(chosen))

  def measured(cell: Gain) -> Gain:
    found = table(cell.consistency, cell.measure, cell.method)
    timed = timings.find(cell.measure, cell.threshold)
    assert timed is not None  # every threshold that was chosen is timed
    column = found.thresholds.tolist().index(cell.threshold)
    unseen = found.values[cut:, column]
    layers = [r.exit_layers or () for r in of.test_grids[cell.measure].records[column][cut:]]
    model = bench.under(of.predictor, cell.measure)
    return dataclasses.replace(
      cell,
      risk=float(unseen.mean()),
      risk_interval=scores.mean_interval(unseen, found.support.lower),
      layers=sum(map(sum, layers)) / sum(map(len, layers)),
      flops_reduction=model.step_costs(padded).savings(layers).flops,
      speedup=timed.speedup,
      end_to_end=timed.end_to_end,
      speedup_interval=scores.speedup_interval(timings, timed),
    )

  return tuple(measured(cell) if cell.exits else cell for cell in cells)


def validity(of: bench.Bench) -> tuple[trials.Trial, ...]:
  """App. B: calibrates again and again on the cached outputs of the test prompts."""
  count, found, progress = len(of.test), [], of.step("repeated calibration")
  rows = sorted(range(count), key=str)  # the order that splits were always drawn from
  for number, (measure, cached) in enumerate(of.test_grids.items()):
    counts = cached.layer_counts()
    for turn, method in enumerate(METHODS):
      progress((number + turn / 2) / len(of.measures), f"{measure}, {method}")
      found += trials.repeat(
        of.textual[measure].rows(rows),
        method,
        TOLERANCES,
        of.options.error_rate,
        min(300, count),
        measure=measure,
        layers=counts and (counts[0][rows], counts[1][rows], of.num_layers),
        splits=SPLITS,
        draws=DRAWS,
      )
  return tuple(found)


def examples(of: bench.Bench) -> tuple[panel.Panel, ...]:
  """Fig. 4, a panel a measure: outputs with each token's layers at every threshold.

  Of unseen prompts with outputs of 3 to `MAX_TOKENS` tokens first those whose output changes in
  the lower half of the grid; none is chosen by its quality.
  """
  cut, shown = of.num_calibration, []
  among = {prompt.id for prompt in timing.of_one_length(of.timed_model, of.unseen)}
  first = of.test_grids[of.measures[0]]
  texts = [[r.prediction for r in made] for made in first.records[len(first.records) // 2 :]]
  rows = [
    row
    for row, (prompt, record) in enumerate(zip(first.prompts, first.full, strict=True))
    if prompt.id in among and 3 <= len(record.tokens or ()) <= MAX_TOKENS
  ]
  changes = lambda row: any(each[row] != first.full[row].prediction for each in texts)
  rows = sorted(rows, key=lambda row: not changes(row))[: of.options.examples]
  given = of.predictor.vocabulary.piece, of.settings.metric, of.predictor.eos_id
  for measure, cached in of.test_grids.items():
    calibrated = of.textual[measure].rows(range(cut))
    promised = panel.promised(calibrated, of.options.error_rate, TOLERANCES)
    columns = cached.full, *cached.records
    items = [
      panel.shown_prompt(cached.prompts[row], [c[row] for c in columns], *given) for row in rows
    ]
    levels = schedules.NEVER_EXIT, *cached.thresholds.tolist()
    # The least tolerance that something is certified for.
    start = next((i for i, (_, at) in enumerate(promised) if at), 0)
    sizes = measure, of.num_layers, levels, tuple(items), of.options.error_rate
    shown.append(panel.Panel(*sizes, promised, first=start))
  return tuple(shown)


class Task(bench.Bench):
  """A bench with all results."""

  tradeoff = functools.cached_property(tradeoff)
  lengths = functools.cached_property(lengths)
  gains = functools.cached_property(gains)
  perturbations = functools.cached_property(perturbations.perturbations)
  decay = functools.cached_property(decay)
  propagations = functools.cached_property(propagations)
  validity = functools.cached_property(validity)
  examples = functools.cached_property(examples)
  classifiers = functools.cached_property(classifiers)
  objectives = functools.cached_property(objectives)

  @property
  def num_steps(self) -> int:
    """Steps that are announced where nothing is cached."""
    steps = 3 * len(self.measures) + self.num_layers  # each grid, its prompts twice; static
    steps += len(PROPAGATIONS) + len(schedule_kinds(1))
    steps += 4  # wrong tokens, repeated calibration, seconds twice
    if self.geometric is not None:
      steps += 2
    if self.last_layer is not None:
      steps += self.num_layers * (1 if self.all_layers is None else 2)
    return steps
