"""When a token leaves the decoder: rules, confidence measures, schedules, skipped layers."""

from calm.exits import (
  confidence,
  evidence,
  layers,
  propagation,
  schedules,
  speculative,
  walk,
)
from calm.exits.rules import (
  DynamicExits,
  OracleExit,
  StaticExit,
  StepRule,
  TokenExit,
  allowed_layers,
  mapped_layers,
  token_exit,
)
from calm.exits.speculative import Rule, Speculative

__all__ = [
  "DynamicExits",
  "OracleExit",
  "Rule",
  "Speculative",
  "StaticExit",
  "StepRule",
  "TokenExit",
  "allowed_layers",
  "confidence",
  "evidence",
  "layers",
  "mapped_layers",
  "propagation",
  "schedules",
  "speculative",
  "token_exit",
  "walk",
]
