"""When a token leaves the decoder: rules, confidence measures, schedules,
skipped layers.
"""

from calm.exits import confidence, layers, propagation, schedules, walk
from calm.exits.rules import (
  DraftHead,
  DynamicExits,
  OracleExit,
  Rule,
  Speculative,
  StaticExit,
  StepRule,
  TokenExit,
  allowed_layers,
  mapped_layers,
  token_exit,
)

__all__ = [
  "DraftHead",
  "DynamicExits",
  "OracleExit",
  "Rule",
  "Speculative",
  "StaticExit",
  "StepRule",
  "TokenExit",
  "allowed_layers",
  "confidence",
  "layers",
  "mapped_layers",
  "propagation",
  "schedules",
  "token_exit",
  "walk",
]
