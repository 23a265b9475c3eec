"""A model that decodes under a threshold: one prompt, or a grid."""

from calm.checkpoints import PACKED
from calm.inference import certified, grid, options, outputs, result_cache, timing
from calm.inference.loading import CALIBRATION, FULL_DEPTH, UntrainedExits, load
from calm.inference.options import DecodeOptions, options_of
from calm.inference.predictor import Predictor, SlowerThanFullDepth, can_be_exact, exact_rule

__all__ = [
  "CALIBRATION",
  "FULL_DEPTH",
  "PACKED",
  "DecodeOptions",
  "Predictor",
  "SlowerThanFullDepth",
  "UntrainedExits",
  "can_be_exact",
  "certified",
  "exact_rule",
  "grid",
  "load",
  "options",
  "options_of",
  "outputs",
  "result_cache",
  "timing",
]
