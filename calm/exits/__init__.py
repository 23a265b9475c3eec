"""When a token leaves the decoder: rules, confidence measures, schedules, skipped layers."""

from calm.exits import (
  confidence,
  evidence,
  layers,
  propagation,
  schedules,
  verified,
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
from calm.exits.verified import Rule, Verified

__all__ = [
  "DynamicExits",
  "OracleExit",
  "Rule",
  "StaticExit",
  "StepRule",
  "TokenExit",
  "Verified",
  "allowed_layers",
  "confidence",
  "evidence",
  "layers",
  "mapped_layers",
  "propagation",
  "schedules",
  "token_exit",
  "verified",
  "walk",
]
