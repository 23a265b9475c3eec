"""When a token leaves the decoder: rules, confidence measures, schedules, skipped layers."""

from calm.exits import confidence, evidence, layers, propagation, schedules, walk
from calm.exits.rules import (
  DynamicExits,
  OracleExit,
  StaticExit,
  StepRule,
  TokenExit,
  allowed_layers,
  token_exit,
)

__all__ = [
  "DynamicExits",
  "OracleExit",
  "StaticExit",
  "StepRule",
  "TokenExit",
  "allowed_layers",
  "confidence",
  "evidence",
  "layers",
  "propagation",
  "schedules",
  "token_exit",
  "walk",
]
