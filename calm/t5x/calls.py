"""What a call of the model decodes with: rule and threshold, and how it is told.

This module does not import T5X.
"""

from typing import Any

import numpy as np
from jax import core

from calm import exits
from calm.exits import schedules
from calm.inference import options as options_lib


def check(rule: exits.Rule, threshold: float, matmul_precision: str | None) -> None:
  """Raises for what a model is not to be made with.

  Raises:
    TypeError: the threshold is not one number.
    ValueError: the threshold lies outside [0, 1], or the rule would not look at it, or the
      precision has another name than JAX's.
  """
  if np.ndim(threshold) or np.asarray(threshold).dtype.kind not in "fiu":
    raise TypeError(
      f"Expected `threshold` (the macro THRESHOLD) to be one number, got {threshold!r}; a grid"
      " is THRESHOLDS of scripts/t5x_sweep.py, or one call each with `decoder_params`."
    )
  schedules.check_threshold(float(threshold))
  compares = isinstance(rule, exits.DynamicExits | exits.Verified)
  if threshold != schedules.NEVER_EXIT and not compares:
    raise ValueError(
      f"Expected no `threshold` with {type(rule).__name__}, which compares none, got"
      f" {threshold}; leave it out, or choose `exits.DynamicExits`."
    )
  names = options_lib.CHOICES["matmul_precision"]
  if matmul_precision not in (None, *names):
    raise ValueError(
      f"Expected `matmul_precision` to be one of {', '.join(names)}, or None, got"
      f" {matmul_precision!r}; choose one of these."
    )


def depth(rule: exits.Rule, default: float, given: Any) -> tuple[exits.Rule, Any]:
  """The rule to run and the threshold to report; the full model's where nothing exits.

  Args:
    rule: the model's.
    default: its threshold.
    given: that of the call, which may be traced; None: none.

  Raises:
    ValueError: the one given lies outside [0, 1].
  """
  threshold = default if given is None else given
  if given is not None and not isinstance(given, core.Tracer):
    for value in np.ravel(given).tolist():
      schedules.check_threshold(value)
  dynamic = isinstance(rule, exits.DynamicExits)
  if dynamic and given is None and threshold == schedules.NEVER_EXIT:
    return exits.StaticExit(), threshold
  return rule, threshold


def spoken(rule: exits.Rule, threshold: float, num_layers: int) -> str:
  """One line of what decodes where a call gives no threshold: "no exits", or which."""
  if not isinstance(rule, exits.DynamicExits):
    return f"exits: {rule}, threshold {threshold:g}"
  if threshold == schedules.NEVER_EXIT:
    return f"no exits: every token runs {num_layers} layers, unless a call gives a threshold"
  allowed = exits.allowed_layers(rule.allowed, num_layers)
  first, last = (min(allowed), max(allowed)) if allowed else (0, 0)
  is_range = last - first > 1 and len(allowed) == last - first + 1
  layers = f"{first}-{last}" if is_range else ", ".join(map(str, allowed))
  schedule = "" if rule.schedule == schedules.Constant() else f" by {rule.schedule}"
  return f"exits: {rule.measure.name} after {layers}, threshold {threshold:g}{schedule}"
