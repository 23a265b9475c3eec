"""Every experiment of one task, each step cached: a report that goes on where it stopped."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence

from calm import costs, exits, inference, schedules
from calm import prompts as prompts_lib
from calm.calibrate import Prompt, Record, generations
from calm.experiments import (
  decode,
  examples,
  gains,
  grids,
  lengths,
  results,
  scores,
  task_settings,
  timing,
  tradeoff,
)

MEASURES = ("softmax", "shortlist", "classifier", "state")

# What is about to be done -> where its progress goes.
Announce = Callable[[str], decode.Progress]


@dataclasses.dataclass(frozen=True)
class Options:
  """How much is done.

  Attributes:
    limit: prompts of each split; None: one of every source.
    timed: prompts decoded alone for the seconds.
    rounds: repeats of each timing.
    examples: outputs to show.
    error_rate: epsilon.
    seed: draws the prompts.
    measures: confidence measures; the model must have them.
  """

  limit: int | None = None
  timed: int = 16
  rounds: int = 3
  examples: int = 6
  error_rate: float = 0.05
  seed: int = 0
  measures: tuple[str, ...] = MEASURES


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
    examples: Fig. 4, one entry a measure.
  """

  settings: task_settings.TaskSettings
  measures: tuple[str, ...]
  full: scores.Scores
  lengths: lengths.Lengths
  tradeoff: tradeoff.TradeOff
  gains: gains.Gains
  examples: tuple[examples.Examples, ...]


def available(predictor: inference.Predictor, measures: Sequence[str]) -> tuple[str, ...]:
  """The measures that a model can compute, in the order given."""
  lacking = set()
  if not predictor.config.exit_classifier:
    lacking.add("classifier")
  if predictor.options.shortlist is None:
    lacking.add("shortlist")
  return tuple(measure for measure in measures if measure not in lacking)


@dataclasses.dataclass(frozen=True, eq=False)
class Suite:
  """One task's prompts, decoded and measured step by step.

  Attributes:
    predictor: the model under the task's prefix and lengths.
    settings: the task.
    data: folder of the data sets.
    folder: where generations and results are kept.
    options: how much is done.
    announce: told before every step.
  """

  predictor: inference.Predictor
  settings: task_settings.TaskSettings
  data: pathlib.Path
  folder: pathlib.Path
  options: Options = Options()
  announce: Announce = lambda text: decode.silent

  def run(self) -> TaskReport:
    """All experiments, in an order that reuses what came before."""
    return TaskReport(
      settings=self.settings,
      measures=self.measures,
      full=self.quality_and_cost.full.scores,
      lengths=self.output_lengths,
      tradeoff=self.quality_and_cost,
      gains=self.calibrated_gains,
      examples=self.shown_examples,
    )

  @property
  def measures(self) -> tuple[str, ...]:
    """Confidence measures that the model has."""
    return available(self.predictor, self.options.measures)

  @functools.cached_property
  def validation(self) -> tuple[Prompt, ...]:
    """Prompts on which grids are chosen and trade-offs shown."""
    return self._prompts("validation")

  @functools.cached_property
  def test(self) -> tuple[Prompt, ...]:
    """Prompts to calibrate on and, after those, unseen ones."""
    return self._prompts("test")

  def _prompts(self, split: str) -> tuple[Prompt, ...]:
    return task_settings.read_prompts(
      self.data, self.settings, split, limit=self.options.limit, seed=self.options.seed
    )

  def model(self, measure: str, **options) -> inference.Predictor:
    """The predictor under a measure (and other options), with batches of one shape."""
    return self.whole.with_options(measure=measure, **options)

  @functools.cached_property
  def whole(self) -> inference.Predictor:
    """The predictor with batches of one shape."""
    return decode.one_shape(self.predictor)

  @functools.cached_property
  def timed_model(self) -> inference.Predictor:
    """A predictor whose weights serve every measure."""
    measure = "shortlist" if "shortlist" in self.measures else self.measures[0]
    return self.predictor.with_options(measure=measure)

  def result(self, kind, name: str, make, *, prompts: Sequence[Prompt], **key):
    """A result that depends on the model, the task, some prompts and `key`."""
    cache = results.Cache(self.folder / "results" / self.settings.name)
    everything = {
      "procedure": self.predictor.procedure.to_json(),
      "metric": self.settings.metric,
      "prompts": results.prompts_digest(prompts),
      **key,
    }
    return cache.get(kind, name, everything, make)

  def records(
    self, name: str, rule: exits.StepRule | None, prompts: Sequence[Prompt], measure: str = ""
  ) -> tuple[Record, ...]:
    """Prompts under a rule, or under a measure's own at `NEVER_EXIT`; cached."""
    model = self.model(measure) if measure else self.whole

    def make() -> tuple[Record, ...]:
      progress = self.announce(f"{self.settings.title}: {name}")
      return decode.with_rule(model, prompts, rule, progress=progress)

    key = {"rule": repr(rule), "measure": measure}
    slug = name.replace(" ", "_").replace("'", "")
    return self.result(tuple[Record, ...], f"records-{slug}", make, prompts=prompts, **key)

  def grid(self, measure: str) -> tuple[float, ...]:
    """The measure's grid, chosen on validation prompts."""
    records = self.records(f"grid of {measure}", None, self.validation, measure)
    return grids.from_validation(records, measure)

  def decoded(self, measure: str, prompts: Sequence[Prompt]) -> generations.Generations:
    """Prompts over a measure's grid; cached and resumable."""
    progress = self.announce(f"{self.settings.title}: grid of {measure}")
    return decode.on_grid(
      self.model(measure),
      prompts,
      self.grid(measure),
      self.folder / "generations" / self.settings.name,
      progress=progress,
    )

  @functools.cached_property
  def validation_grids(self) -> Mapping[str, generations.Generations]:
    """Measure -> validation prompts over its grid."""
    return {measure: self.decoded(measure, self.validation) for measure in self.measures}

  @functools.cached_property
  def test_grids(self) -> Mapping[str, generations.Generations]:
    """Measure -> test prompts over its grid."""
    return {measure: self.decoded(measure, self.test) for measure in self.measures}

  @functools.cached_property
  def static(self) -> dict[int, tuple[Record, ...]]:
    """Depth -> validation prompts through that many layers."""
    return {
      depth: self.records(f"static {depth}", exits.StaticExit(depth), self.validation)
      for depth in range(1, self.predictor.num_layers + 1)
    }

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

  def rule(self, measure: str) -> exits.DynamicExits:
    """The exit rule of a measure."""
    return self.model(measure).options.rule

  def time(self, name: str, prompts: Sequence[Prompt], settings) -> timing.Timings:
    """Measured seconds; cached."""

    def make() -> timing.Timings:
      progress = self.announce(f"{self.settings.title}: seconds, {name}")
      return timing.measure(
        self.timed_model, prompts, settings, rounds=self.options.rounds, progress=progress
      )

    key = {
      "settings": [[s.name, s.threshold] for s in settings],
      "rounds": self.options.rounds,
    }
    return self.result(timing.Timings, f"seconds-{name}", make, prompts=prompts, **key)

  def timed_settings(self, thresholds: Mapping[str, Sequence[float]]) -> list[timing.Setting]:
    """A setting for every measure and threshold."""
    return [
      timing.Setting(measure, self.rule(measure), float(threshold))
      for measure, levels in thresholds.items()
      for threshold in levels
    ]

  @functools.cached_property
  def quality_and_cost(self) -> tradeoff.TradeOff:
    """Fig. 3."""
    oracle = self.records("oracle", exits.OracleExit(), self.validation)
    cached = self.validation_grids
    settings = self.timed_settings({m: self.grid(m) for m in cached})
    depths = range(1, self.predictor.num_layers + 1)
    settings += [timing.Setting(tradeoff.static_name(k), exits.StaticExit(k)) for k in depths]
    settings.append(timing.Setting(tradeoff.ORACLE, exits.OracleExit()))
    timed = decode.of_one_length(self.timed_model, self.validation, self.options.timed)
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
      timings=results.digest(timings),
    )

  def flops_reduction(self, measure: str, exit_layers: Sequence[Sequence[int]]) -> float:
    """Decoder FLOPs of the full model over those of recorded exits (`calm.costs`)."""
    model = self.model(measure)
    options = model.options
    read = round(self.output_lengths.inputs.mean) + 1
    step = costs.decoding_costs(
      model.config,
      input_length=prompts_lib.bucket_length(read, options.max_input_length),
      cache_length=options.max_decode_length,
      rule=options.rule,
      num_pieces=model.vocabulary.vocab_size,
      shortlist=len(options.shortlist or ()),
    )
    return costs.totals(step, exit_layers).flops_ratio

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
    )
    chosen: dict[str, list[float]] = {measure: [] for measure in self.measures}
    for row in found.rows:
      for gain in row.gains:
        if gain.threshold not in (*chosen[row.measure], schedules.NEVER_EXIT):
          chosen[row.measure].append(gain.threshold)
    unseen = self.test[found.num_calibration :]
    timed = decode.of_one_length(self.timed_model, unseen, 2 * self.options.timed)
    return gains.with_times(found, self.time("gains", timed, self.timed_settings(chosen)))

  @functools.cached_property
  def shown_examples(self) -> tuple[examples.Examples, ...]:
    """Fig. 4."""
    unseen = self.test[self.calibrated_gains.num_calibration :]
    among = {prompt.id for prompt in decode.of_one_length(self.timed_model, unseen)}
    first = self.test_grids[self.measures[0]]
    rows = examples.choose(first, self.options.examples, among)
    settings = self.timed_settings({m: self.grid(m) for m in self.measures})
    times = {
      self.test[row].id: self.time(f"example_{number}", [self.test[row]], settings)
      for number, row in enumerate(rows, start=1)
    }
    return tuple(
      examples.examples(
        cached,
        measure,
        rows,
        self.predictor.vocabulary.piece,
        self.settings.metric,
        self.predictor.num_layers,
        chosen=self._calibrated(measure),
        eos_id=self.predictor.eos_id,
        times=times,
      )
      for measure, cached in self.test_grids.items()
    )

  def _calibrated(self, measure: str) -> float:
    """The lowest threshold of Table 2's loosest textual target."""
    thresholds = [
      gain.threshold
      for row in self.calibrated_gains.rows
      for gain in row.gains
      if row.measure == measure and row.target.consistency == "textual"
    ]
    return min(thresholds, default=schedules.NEVER_EXIT)
