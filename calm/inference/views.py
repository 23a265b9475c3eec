"""A model in a line or two, for notebooks and terminals."""

from typing import TYPE_CHECKING

from calm import exits
from calm.calibrate import Calibration, views
from calm.calibrate.losses.sequence_losses import UNKNOWN
from calm.calibrate.thresholds import NEVER_EXIT, format_threshold
from calm.console import sanitize

if TYPE_CHECKING:
  from calm.inference import predictor as predictor_lib

# Layers that are still listed one by one.
_FEW = 4


def in_short(predictor: "predictor_lib.Predictor") -> str:
  """Sizes, what it decodes with and, on a line of its own, what is promised.

  The rest is in `predictor.options` and `predictor.calibration`.
  """
  config = predictor.config
  layers = f"{config.num_encoder_layers} + {config.num_decoder_layers} layers"
  first = f"{layers}, emb_dim {config.emb_dim}, {config.dtype}; {_way(predictor)}"
  made = predictor.calibration
  if made is None:
    return f"Predictor({first})"
  return f"Predictor({first},\n  promise: {_promised(made)})"


def _promised(calibration: Calibration) -> str:
  """Like `mean textual loss at most 0.1 by rouge_l (error rate 0.05, 200 prompts)`."""
  if not calibration.certified:
    return "none, no threshold is certified"
  metric = "" if calibration.metric == UNKNOWN else f" by {sanitize(calibration.metric)}"
  return (
    f"{calibration.promise.name} {views.loss_name(calibration)} at most"
    f" {calibration.tolerance:g}{metric} (error rate {calibration.error_rate:g},"
    f" {calibration.num_examples} prompts)"
  )


def _way(predictor: "predictor_lib.Predictor") -> str:
  """Like `softmax at layers 2, 4, threshold 0.35`."""
  options, level = predictor.options, predictor.threshold
  if level == NEVER_EXIT:
    served = predictor.served_rule(level)
    drafts = isinstance(served, exits.Verified)
    return f"full depth, drafts by layer {served.draft_layer}" if drafts else "full depth"
  layers = options.exit_layers
  if layers is None:
    where = "every layer"
  elif len(layers) == 1:
    where = f"layer {layers[0]}"
  elif len(layers) > 2 and layers[-1] - layers[0] == len(layers) - 1:
    where = f"layers {layers[0]} to {layers[-1]}"
  elif len(layers) <= _FEW:
    where = f"layers {', '.join(map(str, layers))}"
  else:
    where = f"{len(layers)} layers"
  way = f"{options.measure} at {where}"
  return way if level is None else f"{way}, threshold {format_threshold(level)}"
