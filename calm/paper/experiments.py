"""The paper's tables and figures: results of one task, each computed when it is
asked for.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from calm import exits
from calm.calibrate import (
  Prompt,
  Record,
  SequenceLosses,
  betting,
  calibrate,
  generations,
  losses,
  methods,
  metrics,
)
from calm.data import prompt_batches
from calm.exits import propagation, schedules
from calm.inference import grid, outputs, panel, timing
from calm.paper import bench

FULL = "full model"
STATIC = "static"
ORACLE = "oracle"
SHOWN_THRESHOLD = 0.8  # lambda of Fig. 2b
# Propagations of the oracle (section 3.3.1).
PROPAGATIONS = ("exit_state", "first_state", "copy_projections")
# (consistency, tolerance delta) of Table 2: the paper's; Debian's outputs are
# shorter, so that one wrong word costs more.
TARGETS = (("textual", 0.1), ("textual", 0.25), ("risk", 0.02), ("risk", 0.05))
# `method` of `calibrate` -> the loss behind risk consistency, Eq. 11's or Eq.
# 2's. Only betting takes signed losses, which reward prompts whose output
# improves.
METHODS = {"paper": "risk_clipped", "auto": "risk_signed"}
# App. B: deltas, random splits of figure (a), calibration sets of figure (b).
TOLERANCES = panel.TOLERANCES
SPLITS = 50
DRAWS = 200
MAX_TOKENS = 60  # of an output that is shown


# Quality, similarity to the full model and layers of records, with 95 %
# intervals.

LEVEL = 0.95  # of every interval
Interval = tuple[float, float]
UNKNOWN: Interval = (float("nan"), float("nan"))


@dataclasses.dataclass(frozen=True)
class Point:
  """One setting of a curve, scored on some prompts; seconds are NaN where it
  was not timed.
  """

  name: str  # of its curve: a measure, schedule or training
  threshold: float  # lambda; `NEVER_EXIT` where the setting has none
  num_prompts: int
  # mean decoder layers a token over all real tokens, EOS included
  layers: float
  quality: float  # mean metric against the references, in [0, 1]
  quality_error: float  # its standard error over prompts
  similarity: float  # mean metric against the full model's text, in [0, 1]
  similarity_error: float  # its standard error over prompts
  identical: float  # share of texts equal to the full model's, in [0, 1]
  bleu: float = float("nan")  # corpus BLEU in [0, 100]; NaN where not computed
  # measured decode seconds a prompt, on the timed prompts
  seconds: float = float("nan")
  speedup: float = float("nan")  # full depth's decode seconds over these
  speedup_interval: Interval = UNKNOWN  # its 95 % interval, over prompts


@dataclasses.dataclass(frozen=True)
class Curves:
  """Curves of one experiment on the same validation prompts, each from deep to
  shallow.
  """

  num_prompts: int
  points: tuple[Point, ...]  # curve after curve
  num_timed: int = 0  # of the prompts, decoded alone for the seconds

  @property
  def curves(self) -> dict[str, list[Point]]:
    """Name -> points."""
    names = dict.fromkeys(point.name for point in self.points)
    return {name: [p for p in self.points if p.name == name] for name in names}


def point(
  name: str,
  records: Sequence[Record],
  full: Sequence[Record],
  prompts: Sequence[Prompt],
  metric: metrics.MetricLike,
  threshold: float = schedules.NEVER_EXIT,
  *,
  bleu: bool = False,
  timings: timing.Timings | None = None,
  timed_as: str = "",
) -> Point:
  """A point of the curve `name`: records beside the full model's of the same
  prompts.

  Its seconds are those of the setting `timed_as`, or `name`, at that threshold.
  """
  texts = [r.prediction for r in records]
  references = [prompt.targets for prompt in prompts]
  metric, pairs = (
    metrics.get_metric(metric),
    functools.partial(zip, texts, strict=True),
  )
  quality = metrics.compute(metric, list(pairs(references)))
  similarity = metrics.compute(
    metric, list(pairs([(r.prediction,) for r in full]))
  )
  same = [
    text == record.prediction for text, record in zip(texts, full, strict=True)
  ]
  more: dict[str, Any] = {}
  if bleu:
    more["bleu"] = metrics.corpus_scores(texts, references)["bleu"]
  if timings and (timed := timings.find(timed_as or name, threshold)):
    more |= {"seconds": timed.decode_seconds, "speedup": timed.speedup}
    more["speedup_interval"] = speedup_interval(timings, timed)
  return Point(
    name,
    threshold,
    len(texts),
    outputs.mean_layers(records),
    *(*_mean(quality), *_mean(similarity)),
    identical=sum(same) / len(same),
    **more,
  )


def curve(
  name: str,
  cached: generations.Generations,
  full: Sequence[Record],
  metric: metrics.MetricLike,
  **more: Any,
) -> list[Point]:
  """One point a threshold."""
  return [
    point(name, records, full, cached.prompts, metric, float(level), **more)
    for level, records in zip(cached.thresholds, cached.records, strict=True)
  ]


def _mean(values: np.ndarray) -> Interval:
  """Mean of values [num_prompts] and its standard error, NaN below two."""
  error = (
    float(values.std(ddof=1)) / len(values) ** 0.5
    if len(values) > 1
    else float("nan")
  )
  return float(values.mean()), error


def mean_interval(losses: np.ndarray, lower: float = 0.0) -> Interval:
  """Interval of the expected loss of a prompt, by inverting a betting test on
  both sides.

  It covers at any number of prompts, however few of their losses differ from 0.
  Losses [num_prompts] lie in [`lower`, 1]; each end is missed with a
  probability of at most (1 - LEVEL) / 2; unknown without prompts.
  """
  if not losses.size:
    return UNKNOWN
  values = np.random.default_rng(0).permutation(losses)
  design = betting.Design((lower + 1.0) / 2.0, (1.0 - LEVEL) / 2.0, len(values))

  def bound(losses):
    return float(betting.upper_bound(losses[:, None], design, lower)[0])

  # The same test of 1 + lower - loss, which has the same range.
  return max(lower, 1.0 + lower - bound(1.0 + lower - values)), bound(values)


def speedup_interval(timings: timing.Timings, timed: timing.Timed) -> Interval:
  """Interval of a setting's speed-up over full depth, the first of the timings,
  prompts drawn with replacement; unknown below two prompts.
  """
  count = len(timed.prompt_seconds)
  if count < 2:
    return UNKNOWN
  drawn = np.random.default_rng(0).integers(0, count, size=(2000, count))
  sums = [
    np.asarray(r.prompt_seconds)[drawn].sum(axis=1)
    for r in (timings.rows[0], timed)
  ]
  miss = 50.0 * (1.0 - LEVEL)
  low, high = np.percentile(sums[0] / sums[1], [miss, 100.0 - miss])
  return float(low), float(high)


def normal_interval(value: float, error: float) -> Interval:
  """Interval of a mean by its standard error."""
  return value - 1.96 * error, value + 1.96 * error


# ---- The results of a task, each computed when it is asked for


def lengths(of: bench.Bench) -> tuple[str, ...]:
  """Table 1: prompts with a reference; tokens without EOS, 'mean (5th - 95th
  percentile)', of references, full model's outputs and inputs; the share of
  inputs that is cut, in %.
  """
  options = of.predictor.options
  encode = of.predictor.vocabulary.encode

  def counts(texts: Iterable[str]) -> np.ndarray:
    return np.array([len(encode(text)) for text in texts], float)

  def words(values: np.ndarray) -> str:
    low, high = np.percentile(values, [5, 95])
    return f"{values.mean():.0f} ({low:.0f} - {high:.0f})"

  references = counts(
    prompt.targets[0] for prompt in of.validation if prompt.targets
  )
  inputs = counts(
    options.task_prefix + prompt.input for prompt in of.validation
  )
  outputs = counts(record.prediction for record in of.full)
  cut = f"{100.0 * float(np.mean(inputs >= options.max_input_length)):.1f}"
  return (
    str(len(references)),
    words(references),
    words(outputs),
    words(inputs),
    cut,
  )


def tradeoff(of: bench.Bench) -> Curves:
  """Fig. 3: quality against layers, and against measured seconds, which the
  paper lacks.
  """
  oracle = of.records("oracle", exits.OracleExit(), of.validation)
  grids = {
    measure: of.decoded(measure, of.validation) for measure in of.measures
  }
  depths = range(1, of.predictor.num_layers + 1)
  settings = of.timed_settings({measure: of.grid(measure) for measure in grids})
  settings += [
    timing.Setting(f"{STATIC} {k}", exits.StaticExit(k)) for k in depths
  ]
  settings.append(timing.Setting(ORACLE, exits.OracleExit()))
  timed = timing.of_one_length(of.predictor, of.validation, of.options.timed)
  timings = of.time("tradeoff", timed, settings)
  full = of.full
  more: dict[str, Any] = {"bleu": of.settings.bleu, "timings": timings}
  scored = functools.partial(
    point, full=full, prompts=of.validation, metric=of.settings.metric, **more
  )
  points = []
  for measure, cached in grids.items():
    points += curve(measure, cached, full, of.settings.metric, **more)
  points += [
    scored(STATIC, of.static[k], timed_as=f"{STATIC} {k}")
    for k in reversed(depths)
  ]
  points += [scored(ORACLE, oracle), scored(FULL, full, timed_as=timing.FULL)]
  return Curves(len(of.validation), tuple(points), timings.num_prompts)


def schedule_kinds(max_length: int) -> Mapping[str, schedules.Schedule]:
  """The schedules compared: a constant, and Eq. 5 with tau 0 (which is another)
  and 4.
  """
  return {
    "constant": schedules.Constant(),
    "decaying, τ = 0": schedules.Decaying(0.0, max_length),
    "decaying, τ = 4": schedules.Decaying(4.0, max_length),
  }


def schedule_values(max_length: int) -> dict[str, np.ndarray]:
  """Fig. 2b: schedule -> the threshold of each token [max_length] at
  `SHOWN_THRESHOLD`.
  """
  shown: Any = np.float32(SHOWN_THRESHOLD)
  tokens: Any = np.arange(max_length)
  return {
    name: np.broadcast_to(np.asarray(schedule(shown, tokens)), tokens.shape)
    for name, schedule in schedule_kinds(max_length).items()
  }


def decay(of: bench.Bench) -> Curves:
  """Fig. 2c: the trade-off under each schedule, with the first measure."""
  prompts = of.validation[: of.options.ablated]
  step = of.options.step
  points = []
  levels = [round(1.0 - i * step, 6) for i in range(1, round(1.0 / step))]
  for name, schedule in schedule_kinds(
    of.predictor.options.max_decode_length
  ).items():
    model = of.model(of.measures[0], schedule=schedule)
    cached = of.over(model, prompts, levels, f"schedule {name}")
    points += curve(name, cached, of.full[: len(prompts)], of.settings.metric)
  return Curves(len(prompts), tuple(points))


def propagations(of: bench.Bench) -> Curves:
  """Section 3.3.1: the oracle's exits under three ways to fill the skipped
  layers.
  """
  records = {FULL: of.full}
  for name in PROPAGATIONS:
    rule = exits.OracleExit(propagation=propagation.propagation(name))
    step = "oracle" if name == PROPAGATIONS[0] else f"oracle {name}"
    records[name] = of.records(step, rule, of.validation)
  given = of.full, of.validation, of.settings.metric
  points = tuple(point(name, made, *given) for name, made in records.items())
  return Curves(len(of.validation), points)


def classifiers(of: bench.Bench) -> Curves | None:
  """App. D: exit classifiers trained per layer and Elbayad's way; None without
  the second.

  Similarities are to each model's own full depth.
  """
  if of.geometric is None:
    return None
  points = []
  for name, model in (
    ("per layer", of.predictor),
    ("geometric-like", of.geometric),
  ):
    cached = dataclasses.replace(of, predictor=model).decoded(
      "classifier", of.validation
    )
    points += curve(name, cached, cached.full, of.settings.metric)
  return Curves(len(of.validation), tuple(points))


def objectives(of: bench.Bench) -> Curves | None:
  """Eq. 6 against a loss on the last layer only: quality at every static depth,
  or None.
  """
  if of.last_layer is None:
    return None
  models = {"Eq. 6": of.all_layers or of.predictor}
  points = []
  models["last layer only"] = of.last_layer
  for name, model in models.items():
    static = dataclasses.replace(of, predictor=model).static
    given = static[max(static)], of.validation, of.settings.metric
    points += [
      point(name, static[k], *given) for k in sorted(static, reverse=True)
    ]
  return Curves(len(of.validation), tuple(points))


# Fig. 2a: one wrong token at each position, and its effect on the whole output.


@dataclasses.dataclass(frozen=True)
class PerturbedRule(exits.StepRule):
  """Full depth but for one token: an `exits.StepRule` whose threshold is the
  token's index.
  """

  # Emits this layer's own prediction there (layer-based); None: the token of
  # `rank`.
  layer: int | None = None
  # of the last layer's tokens, 1 = the most likely (sampling-based)
  rank: int = 10

  def __call__(
    self, layers, hidden, active, threshold, generated
  ) -> exits.TokenExit:
    given = layers, hidden, active, threshold, generated
    full = exits.StaticExit()(*given)
    logits = full.logits
    if self.layer is None:
      rank = min(self.rank, logits.shape[-1])
      token = jax.lax.top_k(logits, rank)[1][:, rank - 1]
      chosen = jax.nn.one_hot(token, logits.shape[-1], dtype=bool)
      other = jnp.where(
        chosen, jnp.max(logits, axis=-1, keepdims=True) + 1.0, logits
      )
    else:
      other = exits.StaticExit(self.layer)(*given).logits
    here = jnp.asarray(generated, jnp.float32) == jnp.asarray(
      threshold, jnp.float32
    )
    here = jnp.broadcast_to(here, active.shape)[:, None]
    return dataclasses.replace(
      full, logits=jnp.where(here, other, logits), greedy=None
    )


# Curve -> rule.
RULES = {
  "layer-based": PerturbedRule(layer=1),
  "sampling-based": PerturbedRule(),
}
UNPERTURBED = "unperturbed"


def positions(full: Sequence[Record], most: int = 16) -> tuple[int, ...]:
  """Positions to perturb: evenly spaced, as far as a quarter of the outputs
  reach.
  """
  reach = int(np.percentile([len(record.tokens or ()) for record in full], 75))
  return tuple(
    sorted(
      {int(p) for p in np.linspace(0, max(0, reach - 1), min(most, reach))}
    )
  )


def perturbations(of: bench.Bench) -> Curves:
  """Perturbs every output of the validation prompts of Fig. 2 at `positions`,
  in both ways.

  The curves of `RULES` and of the unperturbed texts have a point a position,
  their threshold, over the prompts whose output has a token there.
  """
  prompts = of.validation[: of.options.ablated]
  full = of.full[: len(prompts)]
  progress = of.step("perturbed tokens")
  asked = list(itertools.product((UNPERTURBED, *RULES), positions(full)))

  def perturb() -> Curves:
    points = []
    for number, (kind, position) in enumerate(asked):
      rows = [
        row
        for row, record in enumerate(full)
        if len(record.tokens or ()) > position
      ]
      some = [prompts[row] for row in rows]
      whole = [full[row] for row in rows]
      rule = RULES.get(kind)
      early = whole
      if rule is not None:
        early = grid.with_rule(of.whole, some, rule, float(position))
      points.append(
        point(kind, early, whole, some, of.settings.metric, float(position))
      )
      progress((number + 1) / len(asked), f"{kind}, token {position + 1}")
    return Curves(len(prompts), tuple(points))

  key = {"rules": repr(RULES), "intervals": LEVEL}
  return of.result(Curves, "wrong_tokens", perturb, prompts=prompts, **key)


# Table 2


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
  risk_interval: Interval = (0.0, 0.0)
  # decoder FLOPs of the full model over these; NaN: no formula
  flops_reduction: float = 1.0
  speedup: float = 1.0  # measured decode seconds of the full model over these
  end_to_end: float = 1.0  # the same with the encoder's seconds on both sides
  # 95 % interval of `speedup`, over prompts
  speedup_interval: Interval = (1.0, 1.0)

  @property
  def exits(self) -> bool:
    """Whether a threshold was certified."""
    return self.threshold != schedules.NEVER_EXIT

  @property
  def above(self) -> bool:
    """Whether the risk that was measured on unseen prompts is above what was
    promised.
    """
    return self.risk > self.tolerance


def gains(
  of: bench.Bench,
  targets: Sequence[tuple[str, float]] = TARGETS,
  methods: Mapping[str, str] = METHODS,
) -> tuple[Gain, ...]:
  """Table 2: what calibrated thresholds save on unseen prompts, by target,
  measure, method.

  Each cell has its own test at epsilon. FLOPs are those at the padded length of
  a prompt of mean length.
  """
  encode = of.predictor.vocabulary.encode
  options = of.predictor.options
  read = np.mean(
    [len(encode(options.task_prefix + p.input)) for p in of.validation]
  )
  padded = prompt_batches.bucket_length(
    round(read) + 1, options.max_input_length
  )
  cut = of.num_calibration
  cells = []
  metric = of.settings.metric

  @functools.cache
  def table(consistency: str, measure: str, method: str):
    if consistency == "textual":
      return of.textual[measure]
    return losses.compute(
      of.test_grids[measure], methods[method], metric=metric
    ).ungrouped()

  for target, measure, method in itertools.product(
    targets, of.measures, methods
  ):
    made = calibrate(
      table(target[0], measure, method).rows(range(cut)),
      tolerance=target[1],
      error_rate=of.options.error_rate,
      method=method,
    )
    cells.append(
      Gain(
        *target, measure, method, made.threshold, float(of.predictor.num_layers)
      )
    )
  chosen = {
    measure: list(
      dict.fromkeys(
        c.threshold for c in cells if c.measure == measure and c.exits
      )
    )
    for measure in of.measures
  }
  alone = timing.of_one_length(of.predictor, of.unseen, 2 * of.options.timed)
  timings = of.time("gains", alone, of.timed_settings(chosen))

  def measured(cell: Gain) -> Gain:
    found = table(cell.consistency, cell.measure, cell.method)
    timed = timings.find(cell.measure, cell.threshold)
    assert timed is not None  # every threshold that was chosen is timed
    column = found.thresholds.tolist().index(cell.threshold)
    unseen = found.values[cut:, column]
    layers = [
      r.exit_layers or ()
      for r in of.test_grids[cell.measure].records[column][cut:]
    ]
    model = bench.under(of.predictor, cell.measure)
    return dataclasses.replace(
      cell,
      risk=float(unseen.mean()),
      risk_interval=mean_interval(unseen, found.support.lower),
      layers=sum(map(sum, layers)) / sum(map(len, layers)),
      flops_reduction=model.step_costs(padded).savings(layers).flops,
      speedup=timed.speedup,
      end_to_end=timed.end_to_end,
      speedup_interval=speedup_interval(timings, timed),
    )

  return tuple(measured(cell) if cell.exits else cell for cell in cells)


# App. B: repeated calibration on cached losses, and a test of the promise.


@dataclasses.dataclass(frozen=True)
class Trial:
  """Figures (a) and (b) at one tolerance; spreads are standard deviations over
  splits.
  """

  measure: str
  method: str
  tolerance: float  # delta
  # mean over splits of the mean test loss at the chosen threshold
  risk_mean: float
  risk_spread: float
  layers_mean: float  # mean of decoder layers a token on the test part
  layers_spread: float
  certified_share: float  # share of splits with any threshold certified
  draws: int  # calibration sets drawn
  # of those, with a pool risk above delta at the chosen threshold
  violations: int
  interval: tuple[float, float]  # 95 % Clopper-Pearson interval of their share

  @property
  def share(self) -> float:
    """Of the drawn sets whose threshold breaks the promise."""
    return self.violations / self.draws


def repeat(
  losses: SequenceLosses,
  method: str,
  tolerances: Sequence[float],
  error_rate: float,
  size: int,
  layers: tuple[np.ndarray, np.ndarray, int],
  *,
  measure: str = "",
  splits: int = SPLITS,
  draws: int = DRAWS,
) -> tuple[Trial, ...]:
  """Calibrates again and again, for every tolerance, each of which has its own
  test.

  Figure (a), the paper's protocol: random splits, 80 % calibrate and 20 % test.
  Figure (b): sets of `size` prompts drawn with replacement; the pool's mean is
  their true expectation. `layers` are decoder layers summed over a prompt's
  tokens, and tokens, both [num_prompts, num_thresholds], and layers of the full
  model.
  """
  test = methods.get_method(method, losses.support)
  values, support = test.prepare(losses.values, losses.support)
  count = len(values)
  generator = np.random.default_rng(0)
  cut = min(count - 1, max(1, round(0.8 * count)))
  orders = np.stack([generator.permutation(count) for _ in range(splits)])
  asked = test, values, support.upper, tolerances, error_rate
  chosen = choose(*asked, orders[:, :cut], generator.random(splits))
  generator = np.random.default_rng(0)
  sets = np.stack([generator.integers(count, size=size) for _ in range(draws)])
  of_draws = choose(*asked, sets, generator.random(draws))
  # The last entry is what -1 reads: the full model, whose loss is 0 by
  # definition.
  true_risk = np.append(values.mean(axis=0), 0.0)
  found = []

  def depth(c, rows):
    return layers[0][rows, c].sum() / layers[1][rows, c].sum()

  for place, tolerance in enumerate(tolerances):
    columns = chosen[:, place].tolist()
    pairs = list(zip(columns, orders[:, cut:], strict=True))
    risks = np.array(
      [0.0 if c < 0 else values[rows, c].mean() for c, rows in pairs]
    )
    depths = np.array(
      [layers[2] if c < 0 else depth(c, rows) for c, rows in pairs]
    )
    certified = sum(column >= 0 for column in columns) / splits
    broken = int(np.sum(true_risk[of_draws[:, place]] > tolerance))
    low, high = stats.binomtest(broken, draws).proportion_ci(0.95)
    trial = Trial(
      measure,
      method,
      float(tolerance),
      *(float(risks.mean()), float(risks.std())),
      *(float(depths.mean()), float(depths.std())),
      certified,
      draws,
      broken,
      (float(low), float(high)),
    )
    found.append(trial)
  return tuple(found)


def choose(
  method: methods.Method,
  values: np.ndarray,
  upper: float,
  tolerances: Sequence[float],
  error_rate: float,
  draws: np.ndarray,
  uniforms: np.ndarray,
) -> np.ndarray:
  """[num_sets, num_tolerances] lowest columns that fixed sequence testing
  certifies, or -1.

  `draws` [num_sets, set_size] are rows of `values` in the tested order, one
  `uniforms` a set. All sets and tolerances walk down the grid in lockstep, and
  those that failed drop out.
  """
  levels = np.asarray(tolerances)
  chosen = np.full((len(draws), len(levels)), -1)
  for column in range(values.shape[1]):
    # Who has certified everything so far goes on.
    sets, places = np.nonzero(chosen == column - 1)
    losses = values[:, column][draws[sets].T]
    tested = (levels[places], error_rate, len(losses), upper, uniforms[sets])
    passed = (
      np.exp(method.log_p_values(losses, method.design(*tested))) <= error_rate
    )
    chosen[sets[passed], places[passed]] = column
  return chosen


def validity(of: bench.Bench) -> tuple[Trial, ...]:
  """App. B: calibrates again and again on the cached outputs of the test
  prompts.
  """
  count = len(of.test)
  found = []
  progress = of.step("repeated calibration")
  # the order that splits were always drawn from
  rows = sorted(range(count), key=str)
  for number, (measure, cached) in enumerate(of.test_grids.items()):
    counts: Any = cached.layer_counts()
    for turn, method in enumerate(METHODS):
      progress((number + turn / 2) / len(of.measures), f"{measure}, {method}")
      found += repeat(
        of.textual[measure].rows(rows),
        method,
        TOLERANCES,
        of.options.error_rate,
        min(300, count),
        (counts[0][rows], counts[1][rows], of.predictor.num_layers),
        measure=measure,
      )
  return tuple(found)


def examples(of: bench.Bench) -> tuple[panel.Panel, ...]:
  """Fig. 4, a panel a measure: outputs with each token's layers at every
  threshold.

  Of unseen prompts with outputs of 3 to `MAX_TOKENS` tokens first those whose
  output changes in the lower half of the grid; none is chosen by its quality.
  """
  cut = of.num_calibration
  shown = []
  first = of.test_grids[of.measures[0]]
  texts = [
    [r.prediction for r in made]
    for made in first.records[len(first.records) // 2 :]
  ]
  lengths = [len(record.tokens or ()) for record in first.full]
  rows = [
    row for row in range(cut, len(lengths)) if 3 <= lengths[row] <= MAX_TOKENS
  ]

  def changes(row):
    return any(each[row] != first.full[row].prediction for each in texts)

  rows = sorted(rows, key=lambda row: not changes(row))[: of.options.examples]
  given = of.predictor.vocabulary.piece, of.settings.metric, of.predictor.eos_id
  for measure, cached in of.test_grids.items():
    calibrated = of.textual[measure].rows(range(cut))
    promised = panel.promised(calibrated, of.options.error_rate, TOLERANCES)
    columns = cached.full, *cached.records
    items = [
      panel.shown_prompt(cached.prompts[row], [c[row] for c in columns], *given)
      for row in rows
    ]
    levels = schedules.NEVER_EXIT, *cached.thresholds.tolist()
    # The least tolerance that something is certified for.
    start = next((i for i, (_, at) in enumerate(promised) if at), 0)
    sizes = measure, levels, tuple(items), of.options.error_rate
    shown.append(panel.Panel(*sizes, promised, first=start))
  return tuple(shown)


class Task(bench.Bench):
  """A bench with all results."""

  tradeoff = functools.cached_property(tradeoff)
  lengths = functools.cached_property(lengths)
  gains = functools.cached_property(gains)
  perturbations = functools.cached_property(perturbations)
  decay = functools.cached_property(decay)
  propagations = functools.cached_property(propagations)
  validity = functools.cached_property(validity)
  examples = functools.cached_property(examples)
  classifiers = functools.cached_property(classifiers)
  objectives = functools.cached_property(objectives)
