"""Prompts to generations: the loop, compiled programs, engines, speculation, pools of rows."""

from calm.decode import (
  acceptance,
  compiled,
  engines,
  loop,
  pool,
  program,
  sharded,
  speculative,
  staged,
)
from calm.decode.loop import Generation
from calm.decode.program import ModelWeights, Program, model_weights

__all__ = [
  "Generation",
  "ModelWeights",
  "Program",
  "acceptance",
  "compiled",
  "engines",
  "loop",
  "model_weights",
  "pool",
  "program",
  "sharded",
  "speculative",
  "staged",
]
