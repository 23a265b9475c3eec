"""A folder of a model, opened for decoding under the promise that it holds."""

import dataclasses
import functools
import pathlib
import warnings
from typing import Any

import numpy.typing as npt

from calm import arguments, checkpoints
from calm import exits as exits_lib
from calm.calibrate import NEVER_EXIT, Calibration
from calm.calibrate.generations.procedure import describe_differences
from calm.checkpoints import files
from calm.decode import sharded
from calm.inference import options as options_lib
from calm.inference.predictor import Predictor, can_be_exact
from calm.t5 import limits

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
      platform that it was made on and its matmul precision. Outputs carry no promise; with
      `generate(online=...)` this platform earns one of its own.
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
  stored = options_lib.stored_options(directory)
  procedure = None if calibration is None else calibration.procedure
  if procedure is None:
    base = options_lib.DecodeOptions(**stored)
  else:
    base = options_lib.options_of(procedure, stored.get("shortlist"))
    dtype = dtype or procedure.activation_dtype
  config = checkpoint.config
  if dtype is not None:
    config = dataclasses.replace(config, dtype=dtype)
  changed = options_lib.change(config, base, **options)
  predictor = Predictor(config, checkpoint.params, checkpoint.vocabulary, changed)
  if calibration is not None and void_guarantee:
    return dataclasses.replace(predictor, threshold=calibration.threshold)
  if calibration is not None:
    return predictor.under(calibration, allow_platform=allow_platform)
  own, full_depth = directory / CALIBRATION, directory / FULL_DEPTH
  given = bool(options) or dtype is not None
  if own.exists() and not void_guarantee:
    return _under_own(predictor, own, given, allow_platform)
  if full_depth.exists():
    exact = None if given or not can_be_exact(predictor) else stored_rule(full_depth)
    return dataclasses.replace(predictor, threshold=NEVER_EXIT, exact=exact)
  if checkpoint.exits_trained is False and not config.exit_translators and not own.exists():
    warnings.warn(
      UntrainedExits(
        f"the exits of {directory} were never trained: only its last decoder layer has learned"
        " to write, so tokens that leave before it are often wrong. Train them (`calm fit`, or"
        " `calm train`), or decode at full depth (the threshold 'never')."
      ),
      stacklevel=3,
    )
  return predictor


def _under_own(
  predictor: Predictor, path: pathlib.Path, options_given: bool, allow_platform: bool
) -> Predictor:
  """The model under the calibration of its own folder, or bare under options of a user's."""
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


def stored_rule(path: pathlib.Path) -> exits_lib.Speculative | None:
  """The rule that a folder's `full_depth.json` names, where it was measured to be faster."""
  stored = files.read_json(path).get("exact")
  if stored is None:
    return None
  known = {field.name for field in dataclasses.fields(exits_lib.Speculative)}
  with files.naming(path):
    if not isinstance(stored, dict) or set(stored) != known:
      raise ValueError(f"Expected `exact` to have {sorted(known)}, got {stored!r}.")
    limits.whole("draft_layer", stored["draft_layer"], 1, limits.SIZES["num_decoder_layers"][1])
    return exits_lib.Speculative(**stored)
