"""Opening a model for decoding, with its promise where its folder has one."""

import dataclasses
import functools
import pathlib
import warnings
from typing import Any

import numpy.typing as npt

from calm import arguments, checkpoints
from calm.calibrate import NEVER_EXIT, Calibration
from calm.calibrate.generations.procedures import describe_differences
from calm.decode import sharded
from calm.inference import exact as exact_lib
from calm.inference.options import DecodeOptions, change, stored_options
from calm.inference.predictor import Predictor
from calm.inference.procedures import options_of

# What a folder with a promise holds beside the model.
CALIBRATION = "calibration.json"
# Or this, where full depth is what it should be served with.
FULL_DEPTH = "full_depth.json"


class UntrainedExits(UserWarning):
  """No decoder layer but the last has learned to write tokens."""


@arguments.checked()
def load(
  path: str | pathlib.Path = "packed",
  *,
  calibration: Calibration | str | pathlib.Path | None = None,
  void_guarantee: bool = False,
  allow_platform: bool = False,
  dtype: npt.DTypeLike | None = None,
  exits: str | pathlib.Path | None = None,
  **options: Any,
) -> Predictor:
  """Opens a model for decoding.

  Args:
    path: a checkpoint directory of any format that `checkpoints.load` knows, or 'packed' for
      the small model inside this package.
    calibration: a `Calibration` or its JSON file. Its procedure sets the options that are not
      given; a model or an option that differs from it is refused. None takes the
      `calibration.json` of the model's own folder, where there is one and no option that is
      given differs from it.
    void_guarantee: decode under another procedure all the same: the calibrated threshold
      stays, the promise goes.
    allow_platform: decode all the same where the calibration differs in nothing but the
      platform that it was made on and its matmul precision. Outputs carry no promise until a
      sample of them was checked: `calm infer --allow_platform` does, where a mean loss is
      promised, or `calibrate.audit.Monitor`.
    dtype: activation dtype, 'float32' or 'bfloat16'; None takes the checkpoint's.
    exits: a file of exits that `calm fit` learned beside this model's weights, or the folder
      that it wrote; None takes the model folder's own, where there is one.
    **options: fields of `DecodeOptions`.

  Raises:
    ValueError: the calibration is for another procedure (the message names the fields), or the
      checkpoint has no vocabulary.
  """
  sharded.make_cpu_devices(options.get("num_devices"))
  directory = checkpoints.PACKED if str(path) == "packed" else pathlib.Path(path)
  checkpoint = checkpoints.load(directory, exits=exits)
  if checkpoint.vocabulary is None:
    raise ValueError(
      f"Expected a vocabulary beside the checkpoint in {directory}, got none; save the model"
      " with one (`checkpoints.save(..., vocabulary=...)`)."
    )
  if isinstance(calibration, str | pathlib.Path):
    calibration = Calibration.load(calibration)
  stored = stored_options(directory)
  procedure = None if calibration is None else calibration.procedure
  if procedure is None:
    base = dataclasses.replace(DecodeOptions(), **stored)
  else:
    base = options_of(procedure, stored.get("shortlist"))
    dtype = dtype or procedure.activation_dtype
  config = checkpoint.config
  if dtype is not None:
    config = dataclasses.replace(config, dtype=dtype)
  predictor = Predictor(
    config=config,
    params=checkpoint.params,
    vocabulary=checkpoint.vocabulary,
    options=exact_lib.with_draft_head(config, change(base, **options), options),
  )
  untrained = checkpoint.exits_trained is False and not config.exit_translators
  if untrained and calibration is None:
    _warn_of_untrained_exits(directory)
  if calibration is None:
    own = directory / CALIBRATION
    given = bool(options) or dtype is not None
    kept = own.exists() and not void_guarantee
    if (directory / FULL_DEPTH).exists() and not kept:
      exact = None if given else exact_lib.stored_rule(directory / FULL_DEPTH)
      exact = exact if exact_lib.can_be_exact(predictor) else None
      return dataclasses.replace(predictor, threshold=NEVER_EXIT, exact=exact)
    return _under_its_own(predictor, own, given, allow_platform) if kept else predictor
  if not void_guarantee:
    return predictor.under(calibration, allow_platform=allow_platform)
  return dataclasses.replace(predictor, threshold=calibration.threshold)


def _warn_of_untrained_exits(directory: pathlib.Path) -> None:
  if not (directory / CALIBRATION).exists() and not (directory / FULL_DEPTH).exists():
    warnings.warn(
      UntrainedExits(
        f"the exits of {directory} were never trained: only its last decoder layer has learned"
        " to write, so tokens that leave before it are often wrong. Train them (`calm fit`, or"
        " `calm train`), or decode at full depth (the threshold 'never')."
      ),
      stacklevel=4,
    )


def _under_its_own(
  predictor: Predictor, path: pathlib.Path, options_given: bool, allow_platform: bool
) -> Predictor:
  """The model under the calibration of its folder, where that is for it as it is opened."""
  calibration = Calibration.load(path)
  compare = functools.partial(describe_differences, calibration.procedure, predictor.procedure)
  difference = compare(allow_platform=allow_platform)
  if not difference:
    return predictor.under(calibration, allow_platform=allow_platform)
  if not compare(allow_platform=True):  # the same options, at another place
    calibration.refuse_other(predictor.procedure)
  if not options_given:  # the folder disagrees with itself
    raise ValueError(
      f"Expected {str(path)!r} to be for the model beside it, got one for another procedure:"
      f" {difference}; calibrate again, or take the file away to decode without a promise."
    )
  return predictor
