"""The tasks on Debian texts, and one task's prompts decoded and timed by cached
steps.
"""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from calm import exits, inference, storage
from calm.calibrate import (
  Prompt,
  Record,
  SequenceLosses,
  generations,
  losses,
  thresholds,
)
from calm.console import Report
from calm.data import prompt_files
from calm.exits import confidence, schedules
from calm.inference import grid, timing
from calm.inference.options import VERIFIED


@dataclasses.dataclass(frozen=True)
class TaskSettings:
  """How one task is decoded and scored."""

  name: str  # its folder in the data
  title: str  # its name on the page
  prefix: str  # text put before every prompt
  max_input_length: int  # tokens of a prompt that are read, EOS included
  max_decode_length: int  # most tokens generated, EOS included; N of Eq. 5
  metric: str  # bounded metric of losses and of quality
  metric_title: str  # the metric's name on the page
  stands_for: str = ""  # the corresponding task of the paper
  paper_length: str = ""  # the paper's Table 1 for that task
  bleu: bool = False  # whether corpus BLEU is reported too


_SYNOPSIS: tuple[Any, ...] = ("rouge_l", "ROUGE-L", "CNN/DM", "82 (42 - 141)")
_QUESTIONS: tuple[Any, ...] = ("token_f1", "token F1", "SQuAD", "5 (1 - 13)")
_TRANSLATION: tuple[Any, ...] = (
  "chrf",
  "chrF",
  "WMT15 EN-FR",
  "39 (10 - 82)",
  True,
)
TASKS: Mapping[str, TaskSettings] = {
  name: TaskSettings(
    name, title, prompt_files.DEBIAN[name].prefix, *lengths, *scored
  )
  for name, title, lengths, scored in (
    ("debian_synopsis", "summaries", (256, 24), _SYNOPSIS),
    ("debian_qa", "questions", (256, 24), _QUESTIONS),
    ("debian_enfr", "translation", (96, 96), _TRANSLATION),
  )
}


def task(name: str) -> TaskSettings:
  """A task by its name or the end of it ('qa'); ValueError for another."""
  for known, settings in TASKS.items():
    if name == known or known.endswith(f"_{name}"):
      return settings
  raise ValueError(
    f"Expected `name` to be a task of {sorted(TASKS)} (or the end of one), "
    f"got {name!r}."
  )


def read_prompts(
  data: str | pathlib.Path,
  settings: TaskSettings,
  split: str,
  *,
  limit: int | None = None,
) -> tuple[Prompt, ...]:
  """At most `limit` prompts of a split, one of every source, in a random order.

  Rows of one source resemble each other, and files are sorted: so prompts are
  exchangeable, as a calibration needs.
  """
  path = prompt_files.DEBIAN[settings.name].path(data, split)
  examples = prompt_files.open_prompts(path, require_target=True)
  by_source: dict[str, Prompt] = {}
  for index in np.random.default_rng(0).permutation(len(examples)):
    example = examples[int(index)]
    by_source.setdefault(example.group or example.id, example)
  return tuple(by_source.values())[:limit]


MEASURES = ("softmax", "shortlist", "classifier", "state")
_NAMED = re.compile(
  rf"({'|'.join(confidence.MEASURES)})(@\d+(,\d+)*)?(/\d+)?|{VERIFIED}@\d+"
)


@dataclasses.dataclass(frozen=True)
class Options:
  """How much is done; ValueError for rates outside (0, 1) and unknown
  measures.
  """

  timed: int = 16  # prompts decoded alone for the seconds
  rounds: int = 3  # repeats of each timing
  ablated: int = 200  # validation prompts of Fig. 2, whose runs are many
  step: float = 0.02  # between the thresholds of Fig. 2c; the paper's is 0.01
  examples: int = 6  # outputs to show
  error_rate: float = 0.05  # epsilon
  # Confidence measures; the model must have them. See `under` for their names.
  measures: tuple[str, ...] = MEASURES

  def __post_init__(self):
    for name in ("step", "error_rate"):
      if not 0.0 < getattr(self, name) < 1.0:
        raise ValueError(
          f"Expected `{name}` in (0, 1), got {getattr(self, name)}."
        )
    if odd := [name for name in self.measures if not _NAMED.fullmatch(name)]:
      raise ValueError(
        f"Expected `measures` of {', '.join(confidence.MEASURES)}, like "
        "softmax, softmax@2,4"
        f" or softmax@2,4/8, or drafts as in {VERIFIED}@2, got {odd[0]!r}."
      )


def under(
  predictor: inference.Predictor, name: str, **options
) -> inference.Predictor:
  """The predictor under a measure by its name here, and other
  `inference.DecodeOptions`.

  'softmax', 'softmax@2,4' for exits after those layers only, 'softmax@2,4/8'
  for a threshold with temperature 8 too; 'verified@2' for drafts of layer 2,
  accepted with slack.
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


def available(
  predictor: inference.Predictor, measures: Sequence[str]
) -> tuple[str, ...]:
  """The measures that a model can compute, in the order given."""
  # every model can draft
  has = (*inference.options.measures(predictor), VERIFIED)
  computed = tuple(name for name in measures if measure_of(name) in has)
  if not computed:
    raise ValueError(
      f"Expected a measure that the model has, of {', '.join(has)}, got "
      f"{list(measures)};"
      " train its exits, or take 'softmax'."
    )
  return computed


def grid_of(
  records: Sequence[Record], measure: str, *, points: int = 10
) -> tuple[float, ...]:
  """The measure's default grid, and points in between where its confidences
  really lie: over tokens, quantiles of the highest refused confidence of
  records decoded with `NEVER_EXIT`.

  A classifier's confidences may crowd above 0.9, where a grid with steps of
  0.05 has one point.
  """
  refused = np.array(
    [c for record in records for c in record.rejected_confidences or ()]
  )
  quantiles = np.quantile(refused, np.linspace(1.0, 0.0, points + 2)[1:-1])
  found: list[float] = []
  default = thresholds.default_grid(measure)
  for value in sorted(
    {*np.round(quantiles, 6).tolist(), *default.tolist()}, reverse=True
  ):
    # Closer neighbours would be one point to a float32 confidence.
    if 0.0 < value <= 1.0 and (not found or found[-1] - value > 1e-6):
      found.append(value)
  return tuple(found)


@dataclasses.dataclass(frozen=True, eq=False)
class Bench:
  """One task's prompts, decoded and measured step by step."""

  # the model under the task's prefix and lengths
  predictor: inference.Predictor
  settings: TaskSettings  # the task
  # prompts on which grids are chosen and trade-offs shown
  validation: tuple[Prompt, ...]
  # prompts to calibrate on and, after those, unseen ones
  test: tuple[Prompt, ...]
  folder: pathlib.Path  # where generations and results are kept
  options: Options = Options()  # how much is done
  # Called with the name of every step; returns its progress.
  announce: Callable[[str], Report] = lambda text: grid.silent
  # The same model with an exit classifier trained Elbayad's way, or None.
  geometric: inference.Predictor | None = None
  # a model trained without Eq. 6, or None
  last_layer: inference.Predictor | None = None
  # A model trained like `last_layer`, but with Eq. 6; None: the predictor.
  all_layers: inference.Predictor | None = None

  @property
  def num_calibration(self) -> int:
    """Test prompts that calibrate: four fifths, the paper's share."""
    return round(0.8 * len(self.test))

  @property
  def unseen(self) -> tuple[Prompt, ...]:
    return self.test[self.num_calibration :]

  @functools.cached_property
  def measures(self) -> tuple[str, ...]:
    return available(self.predictor, self.options.measures)

  @functools.cached_property
  def whole(self) -> inference.Predictor:
    """The predictor with batches of one shape."""
    return self.predictor.changed(one_shape=True)

  def model(self, measure: str, **options) -> inference.Predictor:
    """`whole` under a measure (and other options)."""
    return under(self.whole, measure, **options)

  def step(self, text: str) -> Report:
    return self.announce(f"{self.settings.title}: {text}")

  def result(self, kind, name: str, make, *, prompts: Sequence[Prompt], **key):
    """A result that depends on the model, the task, some prompts and `key`;
    cached.
    """
    folder = self.folder / "results" / self.settings.name
    key |= {
      "procedure": self.predictor.procedure.to_json(),
      "metric": self.settings.metric,
      "prompts": storage.prompts_digest(prompts),
    }
    return storage.cached(folder, kind, name, key, make)

  def records(
    self,
    name: str,
    rule: exits.Rule | None,
    prompts: Sequence[Prompt],
    measure: str = "",
  ) -> tuple[Record, ...]:
    """Prompts under a rule, or under a measure's own at `NEVER_EXIT`;
    cached.
    """
    model = self.model(measure) if measure else self.whole

    def make():
      return grid.with_rule(model, prompts, rule, progress=self.step(name))

    key = {"rule": repr(rule), "decoded_by": model.procedure.to_json()}
    slug = name.replace(" ", "_").replace("'", "")
    return self.result(
      tuple[Record, ...], f"records-{slug}", make, prompts=prompts, **key
    )

  def over(
    self,
    model: inference.Predictor,
    prompts: Sequence[Prompt],
    levels,
    name: str,
  ) -> generations.Generations:
    """Prompts over any grid under any options; cached and resumable."""
    folder = self.folder / "generations" / self.settings.name
    return grid.on_grid(
      model, prompts, levels, folder, progress=self.step(name)
    )

  def grid(self, measure: str) -> tuple[float, ...]:
    """The measure's grid, chosen on validation prompts before a test prompt is
    decoded.
    """
    records = self.records(f"grid of {measure}", None, self.validation, measure)
    return grid_of(records, measure_of(measure))

  def decoded(
    self, measure: str, prompts: Sequence[Prompt]
  ) -> generations.Generations:
    """Prompts over a measure's grid; cached and resumable."""
    levels = self.grid(measure)
    return self.over(self.model(measure), prompts, levels, f"grid of {measure}")

  @functools.cached_property
  def test_grids(self) -> Mapping[str, generations.Generations]:
    return {
      measure: self.decoded(measure, self.test) for measure in self.measures
    }

  @functools.cached_property
  def textual(self) -> Mapping[str, SequenceLosses]:
    """Measure -> distances of the test prompts' texts to the full model's."""
    return {
      measure: losses.compute(
        cached, "textual", metric=self.settings.metric
      ).ungrouped()
      for measure, cached in self.test_grids.items()
    }

  @functools.cached_property
  def static(self) -> dict[int, tuple[Record, ...]]:
    """Depth -> validation prompts through that many layers."""
    return {
      depth: self.records(
        f"static {depth}", exits.StaticExit(depth), self.validation
      )
      for depth in range(1, self.predictor.num_layers + 1)
    }

  @property
  def full(self) -> tuple[Record, ...]:
    return self.static[self.predictor.num_layers]

  def time(
    self, name: str, prompts: Sequence[Prompt], settings
  ) -> timing.Timings:
    options: dict[str, Any] = {"rounds": self.options.rounds}
    told = self.step(f"seconds, {name}")

    def make():
      return timing.measure(
        self.predictor, prompts, settings, progress=told, **options
      )

    key = options | {"settings": [[s.name, s.threshold] for s in settings]}
    return self.result(
      timing.Timings, f"seconds-{name}", make, prompts=prompts, **key
    )

  def timed_settings(
    self, grids: Mapping[str, Sequence[float]]
  ) -> list[timing.Setting]:
    return [
      timing.Setting(
        measure, self.model(measure).options.rule, float(threshold)
      )
      for measure, levels in grids.items()
      for threshold in levels
    ]
