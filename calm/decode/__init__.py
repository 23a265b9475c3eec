"""Prompts to generations: the loop, compiled programs, engines, speculation."""

from calm.decode import engines
from calm.decode.loop import Generation
from calm.decode.program import ModelWeights, Program, model_weights

__all__ = ["Generation", "ModelWeights", "Program", "engines", "model_weights"]
