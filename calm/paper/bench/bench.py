"""One task's prompts, decoded and timed step by step; every step is cached and goes on."""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence

from calm import exits, inference
from calm.calibrate import Prompt, Record, generations
from calm.exits import confidence, schedules
from calm.inference import grid, result_cache, timing
from calm.inference.options import VERIFIED
from calm.paper.bench import grids, tasks

MEASURES = ("softmax", "shortlist", "classifier", "state")

# What is about to be done -> where its progress goes.
Announce = Callable[[str], grid.ShareProgress]


@dataclasses.dataclass(frozen=True)
class Options:
  """How much is done.

  Attributes:
    limit: prompts of each split; None: one of every source.
    timed: prompts decoded alone for the seconds.
    rounds: repeats of each timing.
    ablated: validation prompts of Fig. 2, whose runs are many.
    step: between the thresholds of Fig. 2c; the paper's is 0.01.
    examples: outputs to show.
    error_rate: epsilon.
    seed: draws the prompts.
    measures: confidence measures; the model must have them. See `under` for their names.

  Raises:
    ValueError: a number without meaning, or an unknown measure.
  """

  limit: int | None = None
  timed: int = 16
  rounds: int = 3
  ablated: int = 200
  step: float = 0.02
  examples: int = 6
  error_rate: float = 0.05
  seed: int = 0
  measures: tuple[str, ...] = MEASURES

  def __post_init__(self):
    for name in ("limit", "timed", "rounds", "ablated"):
      value = getattr(self, name)
      if value is not None and value < 1:
        raise ValueError(f"Expected `{name}` of at least 1, got {value}.")
    if self.examples < 0:
      raise ValueError(f"Expected `examples` of at least 0, got {self.examples}.")
    for name in ("step", "error_rate"):
      if not 0.0 < getattr(self, name) < 1.0:
        raise ValueError(f"Expected `{name}` in (0, 1), got {getattr(self, name)}.")
    named = "|".join(confidence.MEASURES)
    known = re.compile(rf"({named})(@\d+(,\d+)*)?(/\d+)?|{VERIFIED}@\d+")
    for name in self.measures:
      if not known.fullmatch(name):
        raise ValueError(
          f"Expected `measures` of {', '.join(confidence.MEASURES)}, with layers as in"
          " softmax@2,4 and a decay as in softmax@2,4/8, or drafts and slack, as in"
          f" {VERIFIED}@2, got {name!r}."
        )


def under(predictor: inference.Predictor, name: str, **options) -> inference.Predictor:
  """The predictor under a measure by its name here.

  Args:
    predictor: the model.
    name: 'softmax', or 'softmax@2,4' for exits after those layers only; 'softmax@2,4/8' for a
      threshold that falls along the text as well, with the paper's temperature 8; 'verified@2'
      for drafts of layer 2, accepted with slack.
    **options: other fields of `inference.DecodeOptions`.
  """
  name, _, decay = name.partition("/")
  measure, _, layers = name.partition("@")
  if decay:
    length = predictor.options.max_decode_length
    options["schedule"] = schedules.Decaying(float(decay), length)
  if layers:
    options["exit_layers"] = tuple(int(layer) for layer in layers.split(","))
  return predictor.with_options(measure=measure, **options)


def measure_of(name: str) -> str:
  """The measure in a name that `under` reads."""
  return re.split("[@/]", name)[0]


def available(predictor: inference.Predictor, measures: Sequence[str]) -> tuple[str, ...]:
  """The measures that a model can compute, in the order given."""
  has = predictor.params["decoder"], bool(predictor.options.shortlist)
  lacks = {
    name: confidence.lacking(confidence.measure(measure_of(name)), *has)
    for name in measures
    if measure_of(name) != VERIFIED  # every model can draft
  }
  found = tuple(name for name in measures if lacks.get(name) is None)
  if not found:
    raise ValueError(
      f"Expected a measure that the model has, got {list(measures)}; it lacks"
      f" {sorted(set(filter(None, lacks.values())))}; train its exits, or take 'softmax'."
    )
  return found


@dataclasses.dataclass(frozen=True, eq=False)
class Bench:
  """One task's prompts, decoded and measured step by step.

  Attributes:
    predictor: the model under the task's prefix and lengths.
    settings: the task.
    data: folder of the data sets, or a user's own prompts.
    folder: where generations and results are kept.
    options: how much is done.
    announce: told before every step.
  """

  predictor: inference.Predictor
  settings: tasks.TaskSettings
  data: pathlib.Path | tasks.OwnPrompts
  folder: pathlib.Path
  options: Options = Options()
  announce: Announce = lambda text: grid.silent

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
    return tasks.read_prompts(
      self.data, self.settings, split, limit=self.options.limit, seed=self.options.seed
    )

  def model(self, measure: str, **options) -> inference.Predictor:
    """The predictor under a measure (and other options), with batches of one shape."""
    return under(self.whole, measure, **options)

  @functools.cached_property
  def whole(self) -> inference.Predictor:
    """The predictor with batches of one shape."""
    return grid.one_shape(self.predictor)

  @functools.cached_property
  def timed_model(self) -> inference.Predictor:
    """A predictor whose weights serve every measure."""
    listed = [name for name in self.measures if self.model(name).options.uses_shortlist]
    measure = (listed or self.measures)[0]
    return under(self.predictor, measure)

  def result(self, kind, name: str, make, *, prompts: Sequence[Prompt], **key):
    """A result that depends on the model, the task, some prompts and `key`."""
    cache = result_cache.ResultCache(self.folder / "results" / self.settings.name)
    everything = {
      "procedure": self.predictor.procedure.to_json(),
      "metric": self.settings.metric,
      "prompts": result_cache.prompts_digest(prompts),
      **key,
    }
    return cache.get(kind, name, everything, make)

  def records(
    self, name: str, rule: exits.Rule | None, prompts: Sequence[Prompt], measure: str = ""
  ) -> tuple[Record, ...]:
    """Prompts under a rule, or under a measure's own at `NEVER_EXIT`; cached."""
    model = self.model(measure) if measure else self.whole

    def make() -> tuple[Record, ...]:
      progress = self.announce(f"{self.settings.title}: {name}")
      return grid.with_rule(model, prompts, rule, progress=progress)

    key = {"rule": repr(rule), "decoded_by": model.procedure.to_json()}
    slug = name.replace(" ", "_").replace("'", "")
    return self.result(tuple[Record, ...], f"records-{slug}", make, prompts=prompts, **key)

  def grid(self, measure: str) -> tuple[float, ...]:
    """The measure's grid, chosen on validation prompts."""
    records = self.records(f"grid of {measure}", None, self.validation, measure)
    return grids.from_validation(records, measure_of(measure))

  def decoded(self, measure: str, prompts: Sequence[Prompt]) -> generations.Generations:
    """Prompts over a measure's grid; cached and resumable."""
    levels = self.grid(measure)
    return self.over(self.model(measure), prompts, levels, f"grid of {measure}")

  def over(
    self,
    model: inference.Predictor,
    prompts: Sequence[Prompt],
    levels: Sequence[float],
    name: str,
  ) -> generations.Generations:
    """Prompts over any grid under any options; cached and resumable."""
    folder = self.folder / "generations" / self.settings.name
    progress = self.announce(f"{self.settings.title}: {name}")
    return grid.on_grid(model, prompts, levels, folder, progress=progress)

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

  def rule(self, measure: str) -> exits.Rule:
    """The rule of a measure."""
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
