"""A model that decodes under a threshold: one prompt, a grid, or until the outcome is clear."""

from calm.checkpoints import PACKED
from calm.inference import certified, colours, grid, options, outputs, until_certified
from calm.inference.opening import CALIBRATION, FULL_DEPTH, UntrainedExits, load
from calm.inference.options import DecodeOptions, options_of
from calm.inference.predictor import Predictor

__all__ = [
  "CALIBRATION",
  "FULL_DEPTH",
  "PACKED",
  "DecodeOptions",
  "Predictor",
  "UntrainedExits",
  "certified",
  "colours",
  "grid",
  "load",
  "options",
  "options_of",
  "outputs",
  "until_certified",
]
