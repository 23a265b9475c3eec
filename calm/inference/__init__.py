"""A model that decodes under a threshold: one prompt, a grid, or until the outcome is clear."""

from calm.inference.options import DecodeOptions, options_of
from calm.inference.predictor import PACKED, Predictor, UntrainedExits, load

__all__ = ["PACKED", "DecodeOptions", "Predictor", "UntrainedExits", "load", "options_of"]
