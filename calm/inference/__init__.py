"""A model that decodes under a threshold: one prompt, a grid, or until the outcome is clear."""

from calm.checkpoints import PACKED
from calm.inference import colours, grid, outputs, until_certified
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
  "colours",
  "grid",
  "load",
  "options_of",
  "outputs",
  "until_certified",
]
