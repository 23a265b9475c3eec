"""Prompts to generations: the loop, compiled programs, engines, pools of rows."""

from calm.decode import (
  compiled,
  drafting,
  engines,
  loop,
  packed,
  pool,
  pool_program,
  program,
  sharded,
  staged,
  verified,
  verified_passes,
)
from calm.decode.loop import Generation
from calm.decode.program import ModelWeights, Program, model_weights

__all__ = [
  "Generation",
  "ModelWeights",
  "Program",
  "compiled",
  "drafting",
  "engines",
  "loop",
  "model_weights",
  "packed",
  "pool",
  "pool_program",
  "program",
  "sharded",
  "staged",
  "verified",
  "verified_passes",
]
