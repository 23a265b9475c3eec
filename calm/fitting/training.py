"""The stages of a fit, one after another, and the texts that two of them learn from."""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Mapping

from calm import inference
from calm.fitting import folder as folder_lib
from calm.fitting import own_texts, pilot, stages
from calm.fitting import splits as splits_lib
from calm.fitting.options import FitOptions
from calm.fitting.result import Trained

OWN_TEXTS = "Decode the rows that train, at full depth"
Progress = Callable[[float, str], None]
# The least budget that is named has room for a machine that is slower the next time.
_ROOM = 1.25


def titles(options: FitOptions) -> list[str]:
  """What is done, in order."""
  found = [_title(name) for name in options.trains]
  if options.learns_own_texts:
    found.insert(int(options.trains[0] == "one"), OWN_TEXTS)
  return found


def _title(name: str) -> str:
  return f"Train stage {name}"


def folder_of(model: str) -> pathlib.Path:
  """Where a model lies that is given as a folder or as 'packed'."""
  return inference.PACKED if model == "packed" else pathlib.Path(model)


def time_stages(
  source: inference.Predictor,
  model: str,
  splits: splits_lib.Splits,
  options: FitOptions,
  say: Callable[[str], None],
) -> Mapping[str, pilot.Timed]:
  """An update of every stage, timed on the model that is given; none without a budget.

  Raises:
    ValueError: the budget leaves a stage too few steps after compiling (says the least).
  """
  if options.budget is None:
    return {}
  nowhere, silent, least = pathlib.Path(), lambda share, text: None, {}
  timed: dict[str, pilot.Timed] = {}
  for name in options.trains:
    say(f"A step of stage {name} is compiled and timed, to see what the budget has room for.")
    stage = stages.Stage(name, folder_of(model), source, splits, nowhere, nowhere, options)
    timed[name] = stage.measure(silent)
    least[name] = stage.least_budget(timed[name])
  short = max(least, key=lambda name: least[name], default=None)
  if short is not None and least[short] > options.budget:
    enough = _ROOM * least[short]
    raise ValueError(
      f"Expected `budget` to be at least {_time(enough)}, got {_time(options.budget)}, which"
      f" leaves stage {short} fewer than {pilot.LEAST_STEPS} steps after compiling; give that"
      " much, or fewer stages, or no budget."
    )
  return timed


def _time(seconds: float) -> str:
  """As `parse_budget` reads it, rounded up."""
  return f"{math.ceil(seconds)}s" if seconds < 120 else f"{math.ceil(seconds / 60)}m"


@dataclasses.dataclass(frozen=True)
class Training:
  """Training at work.

  Attributes:
    source: the model that is given, under its limits and prefix.
    model: where it lies, or 'packed'.
    splits: rows.
    folder: keeps what is finished, so that a stopped run goes on.
    options: what the fit is asked for.
    timed: updates of the stages, timed for the budget.
  """

  source: inference.Predictor
  model: str
  splits: splits_lib.Splits
  folder: folder_lib.Folder
  options: FitOptions
  timed: Mapping[str, pilot.Timed] = dataclasses.field(default_factory=dict)

  def run(
    self, step: Callable[[str], Progress], say: Callable[[str], None]
  ) -> tuple[inference.Predictor, tuple[Trained, ...]]:
    """The trained model under its limits, and what its stages did.

    Args:
      step: (title) -> progress of what begins.
      say: told of what was done.
    """
    initial = folder_of(self.model)
    predictor, splits, done = self.source, self.splits, []
    rows_folder = self.folder.path / "splits"
    for name in self.options.trains:
      if name != "one" and splits is self.splits:
        rows_folder = self.folder.work / "own_texts"
        splits = self._own_texts(predictor, rows_folder, step(OWN_TEXTS), say)
      stage = stages.Stage(
        name=name,
        initial=initial,
        model=predictor,
        splits=splits,
        rows_folder=rows_folder,
        folder=self.folder.work / f"stage_{name}",
        options=self.options,
        timed=self.timed.get(name),
      )
      progress = step(_title(name))
      done.append(
        self.folder.cache.get(
          Trained,
          f"stage_{name}",
          {"initial": str(initial)},
          lambda stage=stage, progress=progress: stage.train(progress, say),
        )
      )
      initial = stage.exported
      predictor = inference.load(initial, batch_size=self.options.batch_size)
    return predictor, tuple(done)

  def _own_texts(self, predictor, folder: pathlib.Path, progress: Progress, say):
    """Rows whose targets are what the model writes; as many as the budget has room for."""
    seconds = stages.seconds_of(stages.TEXTS, self.options)
    made = own_texts.write(predictor, self.splits, folder, seconds, progress)
    late = (
      ""
      if len(made.train) == len(self.splits.train)
      else ", as many as the budget has time for"
    )
    say(f"Own texts: of {len(made.train)} of {len(self.splits.train)} rows that train{late}.")
    return made
