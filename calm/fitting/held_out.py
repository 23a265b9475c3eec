"""The rows that a fit does not train on, for whoever judges a model on them."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from calm import inference
from calm.calibrate import Prompt
from calm.fitting import inputs, lengths, splits
from calm.fitting.options import FitOptions


@dataclasses.dataclass(frozen=True)
class HeldOut:
  """Rows that `fit` with the same options neither trains on nor draws otherwise.

  Attributes:
    validation: on which it chooses, one a group.
    test: on which it certifies, then those that it looks at once in the end, one a group.
    decoding: `task_prefix`, `max_input_length` and `max_decode_length` for these rows.
  """

  validation: tuple[Prompt, ...]
  test: tuple[Prompt, ...]
  decoding: Mapping[str, Any]


def held_out(
  predictor: inference.Predictor,
  train: str | pathlib.Path | inputs.Rows,
  options: FitOptions,
) -> HeldOut:
  """Splits rows as `fit` does where it trains, and leaves the rows of training out.

  Args:
    predictor: the model whose tokens count for the lengths.
    train: rows of {input, target, source}: a file, a DataFrame, or `Prompt`s.
    options: rates, prefix and seed of the fit.

  Returns:
    The rows that are left.

  Raises:
    ValueError: rows that cannot do, or too few of them (says how many are needed).
  """
  rows = inputs.read_rows(train, options)
  parts = splits.split(
    rows,
    trains=True,
    tolerance=options.tolerance,
    error_rate=options.error_rate,
    seed=options.seed,
  )
  limits, _ = lengths.of_rows(predictor, rows, options.prefix)
  return HeldOut(parts.validation, parts.calibration + parts.last, dataclasses.asdict(limits))
