"""What a fit is given, checked before any work: rows and a model."""

import pathlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from calm import inference
from calm.calibrate import Prompt
from calm.data import prompt_files, prompt_tables
from calm.fitting.options import FitOptions

# Rows in memory; or a DataFrame, which has no type that could be named here.
Rows = Sequence[Prompt | str | Mapping[str, Any]] | Any


def read_rows(train: str | pathlib.Path | Rows, options: FitOptions) -> tuple[Prompt, ...]:
  """Rows of a file in any format of `calm infer`, of a DataFrame, or those given, checked.

  Raises:
    ValueError: rows without references where they are needed, or ids that occur twice.
  """
  if isinstance(train, str | pathlib.Path):
    rows = tuple(prompt_files.open_prompts(train, input_key=options.input_key))
  else:
    rows = prompt_tables.prompts_of(train, input_key=options.input_key)
  bare = [row.id for row in rows if not any(target.strip() for target in row.targets)]
  if bare and options.needs_targets:
    raise ValueError(
      f"Expected `train` to be rows with references (`target`), got {len(bare)} of {len(rows)}"
      f" without, first {bare[:3]}; give them, or learn exits beside frozen weights (no"
      " `train_all`) with textual consistency, or take stages='own' with `accept_quality`:"
      " nothing would measure how well trained weights write."
    )
  ids = [row.id for row in rows]
  if len(set(ids)) < len(ids):
    raise ValueError(
      f"Expected `train` to be rows with ids of their own, got {len(ids) - len(set(ids))} ids"
      " twice; number them."
    )
  return rows


def open_model(
  model: str | pathlib.Path, options: FitOptions, say: Callable[[str], None]
) -> inference.Predictor:
  """The model that is given; says so where nothing is trained and nothing says that it was."""
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    source = inference.load(model, void_guarantee=True)
  for warning in caught:
    if not issubclass(warning.category, inference.UntrainedExits):
      warnings.warn_explicit(
        warning.message, warning.category, warning.filename, warning.lineno
      )
    elif not options.trains and not options.learns_exits:
      say(
        f"The exits of {model} are taken for trained (stages='none'); its folder does not say"
        " so. Where they are not, full depth will be served."
      )
  return source
