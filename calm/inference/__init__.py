"""A model that decodes under a threshold: one prompt, or a grid."""

from calm.checkpoints import PACKED
from calm.inference import grid, options, outputs, timing
from calm.inference.options import (
  LOOKED_UP,
  VERIFIED,
  DecodeOptions,
  options_of,
)
from calm.inference.predictor import (
  CALIBRATION,
  FULL_DEPTH,
  Predictor,
  SlowerThanFullDepth,
  UntrainedExits,
  exact_rule,
  load,
)

__all__ = [
  "CALIBRATION",
  "FULL_DEPTH",
  "LOOKED_UP",
  "PACKED",
  "VERIFIED",
  "DecodeOptions",
  "Predictor",
  "SlowerThanFullDepth",
  "UntrainedExits",
  "exact_rule",
  "grid",
  "load",
  "options",
  "options_of",
  "outputs",
  "timing",
]
