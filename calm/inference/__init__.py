"""A model that decodes under a threshold: one prompt, a grid, or until the outcome is clear."""

from calm.checkpoints import PACKED
from calm.inference import (
  calibrating,
  colours,
  costs,
  drawing,
  grid,
  offline,
  options,
  outputs,
  procedures,
  result_cache,
  seconds,
  timing,
  until_certified,
)
from calm.inference.exact import can_be_exact, exact_rule
from calm.inference.opening import CALIBRATION, FULL_DEPTH, UntrainedExits, load
from calm.inference.options import DecodeOptions
from calm.inference.predictor import Predictor, SlowerThanFullDepth
from calm.inference.procedures import options_of

__all__ = [
  "CALIBRATION",
  "FULL_DEPTH",
  "PACKED",
  "DecodeOptions",
  "Predictor",
  "SlowerThanFullDepth",
  "UntrainedExits",
  "calibrating",
  "can_be_exact",
  "colours",
  "costs",
  "drawing",
  "exact_rule",
  "grid",
  "load",
  "offline",
  "options",
  "options_of",
  "outputs",
  "procedures",
  "result_cache",
  "seconds",
  "timing",
  "until_certified",
]
