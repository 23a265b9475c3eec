"""Every experiment of one task, each step cached: a report that goes on where it stopped."""

import dataclasses
import functools
from collections.abc import Sequence

from calm import exits, inference
from calm.calibrate import Prompt
from calm.data import prompt_batches as prompts_lib
from calm.exits import schedules
from calm.inference import result_cache, timing
from calm.paper.bench import bench, intervals, scores, tasks
from calm.paper.experiments import (
  decay,
  examples,
  gains,
  lengths,
  perturbations,
  tradeoff,
  trainings,
  validity,
)
from calm.paper.experiments import propagations as propagations_lib
from calm.t5 import costs


@dataclasses.dataclass(frozen=True)
class TaskReport:
  """What was found on one task.

  Attributes:
    settings: the task.
    measures: confidence measures that the model has.
    full: the full model on validation prompts.
    lengths: Table 1.
    tradeoff: Fig. 3.
    gains: Table 2.
    perturbations: Fig. 2a.
    decay: Fig. 2b and 2c.
    propagations: section 3.3.1.
    validity: App. B.
    examples: Fig. 4, one entry a measure.
    classifiers: App. D, or None without a second classifier.
    objectives: what Eq. 6 costs and gives, or None without a second model.
  """

  settings: tasks.TaskSettings
  measures: tuple[str, ...]
  full: scores.Scores
  lengths: lengths.Lengths
  tradeoff: tradeoff.TradeOff
  gains: gains.Gains
  perturbations: perturbations.Perturbations
  decay: decay.Decay
  propagations: propagations_lib.Propagations
  validity: validity.Validity
  examples: tuple[examples.Examples, ...]
  classifiers: trainings.Comparison | None
  objectives: trainings.Comparison | None


def flops_reduction(
  predictor: inference.Predictor,
  measure: str,
  exit_layers: Sequence[Sequence[int]],
  input_length: int,
) -> float:
  """Decoder FLOPs of the full model over those of recorded exits (`calm.t5.costs`).

  Args:
    predictor: the model.
    measure: what the exits were decided by; its own cost counts.
    exit_layers: of the real tokens of every output.
    input_length: positions of the padded prompt.
  """
  step = bench.under(predictor, measure).step_costs(input_length)
  return costs.totals(step, exit_layers).flops_ratio


@dataclasses.dataclass(frozen=True, eq=False)
class Suite(bench.Bench):
  """The experiments of one task.

  Attributes:
    geometric: the same model with an exit classifier trained Elbayad's way, or None.
    last_layer: a model trained without Eq. 6, or None.
    all_layers: a model trained like `last_layer`, but with Eq. 6; None: the predictor.
  """

  geometric: inference.Predictor | None = None
  last_layer: inference.Predictor | None = None
  all_layers: inference.Predictor | None = None

  def run(self) -> TaskReport:
    """All experiments, in an order that reuses what came before."""
    return TaskReport(
      settings=self.settings,
      measures=self.measures,
      full=self.quality_and_cost.full.scores,
      lengths=self.output_lengths,
      tradeoff=self.quality_and_cost,
      gains=self.calibrated_gains,
      perturbations=self.perturbed_tokens,
      decay=self.schedules_compared,
      propagations=self.oracles,
      validity=self.promises_kept,
      examples=self.shown_examples,
      classifiers=self.classifiers_compared,
      objectives=self.objectives_compared,
    )

  @property
  def num_steps(self) -> int:
    """Steps that are announced where nothing is cached."""
    measures, depths = len(self.measures), self.predictor.num_layers
    steps = 3 * measures + depths  # each grid, its prompts twice; static models
    steps += len(propagations_lib.rules()) + len(decay.kinds(1))
    steps += 4  # wrong tokens, repeated calibration, seconds twice
    if self.geometric is not None:
      steps += 2
    if self.last_layer is not None:
      steps += depths * (1 if self.all_layers is None else 2)
    return steps

  @functools.cached_property
  def output_lengths(self) -> lengths.Lengths:
    """Table 1."""
    options = self.predictor.options
    return lengths.lengths(
      [prompt.targets[0] for prompt in self.validation if prompt.targets],
      [options.task_prefix + prompt.input for prompt in self.validation],
      [record.prediction for record in self.static[self.predictor.num_layers]],
      self.predictor.vocabulary.encode,
      options.max_input_length,
    )

  @functools.cached_property
  def quality_and_cost(self) -> tradeoff.TradeOff:
    """Fig. 3."""
    oracle = self.records("oracle", exits.OracleExit(), self.validation)
    cached = self.validation_grids
    settings = self.timed_settings({m: self.grid(m) for m in cached})
    depths = range(1, self.predictor.num_layers + 1)
    settings += [timing.Setting(tradeoff.static_name(k), exits.StaticExit(k)) for k in depths]
    settings.append(timing.Setting(tradeoff.ORACLE, exits.OracleExit()))
    timed = timing.of_one_length(self.timed_model, self.validation, self.options.timed)
    timings = self.time("tradeoff", timed, settings)
    return self.result(
      tradeoff.TradeOff,
      "tradeoff",
      lambda: tradeoff.tradeoff(
        self.validation,
        cached,
        self.static,
        oracle,
        self.settings.metric,
        timings=timings,
        bleu=self.settings.bleu,
      ),
      prompts=self.validation,
      grids={measure: list(map(float, c.thresholds)) for measure, c in cached.items()},
      timings=result_cache.digest(timings),
      intervals=intervals.LEVEL,
    )

  def flops_reduction(self, measure: str, exit_layers: Sequence[Sequence[int]]) -> float:
    """`flops_reduction` at the padded length of a prompt of mean length."""
    read = round(self.output_lengths.inputs.mean) + 1
    padded = prompts_lib.bucket_length(read, self.predictor.options.max_input_length)
    return flops_reduction(self.predictor, measure, exit_layers, padded)

  @functools.cached_property
  def calibrated_gains(self) -> gains.Gains:
    """Table 2."""
    found = self.result(
      gains.Gains,
      "gains",
      lambda: gains.gains(
        self.test_grids,
        self.predictor.num_layers,
        self.settings.metric,
        error_rate=self.options.error_rate,
        flops=self.flops_reduction,
      ),
      prompts=self.test,
      grids={measure: self.grid(measure) for measure in self.measures},
      targets=[dataclasses.asdict(target) for target in gains.TARGETS],
      error_rate=self.options.error_rate,
      intervals=intervals.LEVEL,
    )
    chosen: dict[str, list[float]] = {measure: [] for measure in self.measures}
    for row in found.rows:
      for gain in row.gains:
        if gain.threshold not in (*chosen[row.measure], schedules.NEVER_EXIT):
          chosen[row.measure].append(gain.threshold)
    unseen = self.test[found.num_calibration :]
    timed = timing.of_one_length(self.timed_model, unseen, 2 * self.options.timed)
    return gains.with_times(found, self.time("gains", timed, self.timed_settings(chosen)))

  @functools.cached_property
  def shown_examples(self) -> tuple[examples.Examples, ...]:
    """Fig. 4."""
    unseen = self.test[self.calibrated_gains.num_calibration :]
    among = {prompt.id for prompt in timing.of_one_length(self.timed_model, unseen)}
    first = self.test_grids[self.measures[0]]
    rows = examples.choose(first, self.options.examples, among)
    return tuple(
      examples.examples(
        cached,
        measure,
        rows,
        self.predictor.vocabulary.piece,
        self.settings.metric,
        self.predictor.num_layers,
        certified=self._certified(measure),
        eos_id=self.predictor.eos_id,
      )
      for measure, cached in self.test_grids.items()
    )

  def _certified(self, measure: str) -> examples.Certified | None:
    """The lowest threshold of Table 2's loosest textual target that was certified."""
    found = [
      (gain.threshold, row.target.tolerance)
      for row in self.calibrated_gains.rows
      for gain in row.gains
      if row.measure == measure and row.target.consistency == "textual"
    ]
    threshold, tolerance = min(found, default=(schedules.NEVER_EXIT, 0.0))
    if threshold == schedules.NEVER_EXIT:
      return None
    return examples.Certified(threshold, tolerance, self.options.error_rate)

  @property
  def ablated(self) -> tuple[Prompt, ...]:
    """The validation prompts of Fig. 2."""
    return self.validation[: self.options.ablated]

  @functools.cached_property
  def perturbed_tokens(self) -> perturbations.Perturbations:
    """Fig. 2a."""
    full = self.static[self.predictor.num_layers][: len(self.ablated)]
    return self.result(
      perturbations.Perturbations,
      "perturbations",
      lambda: perturbations.perturbations(
        self.whole,
        self.ablated,
        full,
        self.settings.metric,
        progress=self.announce(f"{self.settings.title}: perturbed tokens"),
      ),
      prompts=self.ablated,
      rules=repr(perturbations.RULES),
      intervals=intervals.LEVEL,
    )

  @functools.cached_property
  def schedules_compared(self) -> decay.Decay:
    """Fig. 2b and 2c, with the paper's measure there."""
    length = self.predictor.options.max_decode_length
    levels = decay.search_grid(self.options.step)
    measure = self.measures[0]

    def make() -> decay.Decay:
      cached = {
        name: self.over(
          self.model(measure, schedule=schedule), self.ablated, levels, f"schedule {name}"
        )
        for name, schedule in decay.kinds(length).items()
      }
      return decay.decay(
        self.ablated,
        cached,
        self.static[self.predictor.num_layers][: len(self.ablated)],
        self.settings.metric,
        measure=measure,
        max_length=length,
        step=self.options.step,
      )

    return self.result(
      decay.Decay,
      "decay",
      make,
      prompts=self.ablated,
      grid=levels,
      kinds=repr(decay.kinds(length)),
      measure=measure,
      intervals=intervals.LEVEL,
    )

  @functools.cached_property
  def oracles(self) -> propagations_lib.Propagations:
    """Section 3.3.1."""
    records = {
      name: self.records(
        "oracle" if name == "exit_state" else f"oracle {name}", rule, self.validation
      )
      for name, rule in propagations_lib.rules().items()
    }
    full = self.static[self.predictor.num_layers]
    return propagations_lib.propagations(self.validation, records, full, self.settings.metric)

  @functools.cached_property
  def promises_kept(self) -> validity.Validity:
    """App. B."""
    return self.result(
      validity.Validity,
      "validity",
      lambda: validity.validity(
        self.test_grids,
        self.predictor.num_layers,
        self.settings.metric,
        error_rate=self.options.error_rate,
        progress=self.announce(f"{self.settings.title}: repeated calibration"),
      ),
      prompts=self.test,
      grids={measure: self.grid(measure) for measure in self.measures},
      tolerances=validity.TOLERANCES,
      error_rate=self.options.error_rate,
    )

  @functools.cached_property
  def classifiers_compared(self) -> trainings.Comparison | None:
    """App. D."""
    if self.geometric is None:
      return None
    other = dataclasses.replace(self, predictor=self.geometric)
    cached = {
      trainings.PER_LAYER: self.decoded("classifier", self.validation),
      trainings.GEOMETRIC: other.decoded("classifier", self.validation),
    }
    return trainings.classifiers(self.validation, cached, self.settings.metric)

  @functools.cached_property
  def objectives_compared(self) -> trainings.Comparison | None:
    """What Eq. 6 costs at full depth, and gives below it."""
    if self.last_layer is None:
      return None
    with_eq_6 = dataclasses.replace(self, predictor=self.all_layers or self.predictor)
    other = dataclasses.replace(self, predictor=self.last_layer)
    depths = {trainings.ALL_LAYERS: with_eq_6.static, trainings.LAST_LAYER: other.static}
    return trainings.objectives(self.validation, depths, self.settings.metric)
