"""Arguments of the model in a gin file: T5X's bindings, which are honoured, and their checks.

Users bind `models.EncoderDecoderModel` of T5X, and its methods, in files that they do not want
to touch. Our class is another configurable to gin, and reads the bindings of theirs here. This
module does not import T5X.
"""

import contextlib
import functools
import inspect
from typing import Any

import gin
import numpy as np

from calm import exits
from calm.exits import schedules
from calm.inference import options as options_lib


def of(configurable: Any) -> dict[str, Any]:
  """What a function or class is bound to, references resolved; {} where gin knows none."""
  try:
    return gin.get_bindings(configurable)  # pyright: ignore[reportPrivateImportUsage]
  except ValueError:  # not registered
    return {}


def hold_checkpoints_to(check: Any) -> None:
  """Binds T5X's `RestoreCheckpointConfig.state_transformation_fns`, where nothing else does."""
  name = "RestoreCheckpointConfig."
  for other in ("state_transformation_fns", "fallback_to_scratch"):
    with contextlib.suppress(ValueError):  # not bound, or nothing is restored
      if gin.query_parameter(name + other):
        return
  with contextlib.suppress(ValueError), gin.unlock_config():
    gin.bind_parameter(name + "state_transformation_fns", (check,))


def configured(configurable: Any) -> Any:
  """A function or class as gin configures it; as it is where nothing binds it."""
  try:
    return gin.get_configurable(configurable)  # pyright: ignore[reportPrivateImportUsage]
  except ValueError:
    return configurable


def resolve(given: dict[str, Any], theirs: type, required: tuple[str, ...]) -> dict[str, Any]:
  """Arguments of a class in place of T5X's, from those that were given and T5X's bindings.

  An argument of `given` that is None is not given; `theirs` is T5X's class.

  Raises:
    TypeError: a required one is neither given nor bound.
  """
  found = {name: value for name, value in given.items() if value is not None}
  if len(found) < len(given):
    found = {k: v for k, v in of(theirs).items() if k in given} | found
  missing = [name for name in required if name not in found]
  if missing:
    raise TypeError(
      f"Expected {', '.join(f'`{name}`' for name in missing)} of EncoderDecoderModel, got"
      " none; give them, or bind them for T5X's class or for this one in a gin file."
    )
  return found


def bind_methods(model: Any, theirs: type) -> None:
  """Gives a model's methods what gin binds for T5X's methods of the same names.

  What gin binds for the model's own methods goes before it.
  """
  for name, method in inspect.getmembers(theirs, inspect.isfunction):
    if name.startswith("__"):
      continue
    ours = inspect.unwrap(getattr(type(model), name))
    own = {} if ours is method else of(ours)
    bound = {key: value for key, value in of(method).items() if key not in own}
    if bound:
      setattr(model, name, functools.partial(getattr(model, name), **bound))


def refuse_subclass(model: Any, theirs: type) -> None:
  """Raises for a model of a class that changes T5X's: ours would leave the changes out.

  Raises:
    TypeError: it is of a subclass other than gin's own, or no encoder-decoder model.
  """
  # Gin's subclasses take the name of what they configure.
  name = lambda cls: (cls.__module__, cls.__qualname__)
  classes = type(model).__mro__
  before = classes[: classes.index(theirs)] if theirs in classes else [type(model)]
  if {name(cls) for cls in before} - {name(theirs)}:
    raise TypeError(
      f"Expected `model` to be T5X's EncoderDecoderModel, got {type(model).__qualname__}, "
      + (
        "whose own methods would be lost; derive it from calm.t5x.models.EncoderDecoderModel."
        if theirs in classes
        else "which has no exits here; leave early_exit.gin out."
      )
    )


def check(rule: exits.Rule, threshold: float, matmul_precision: str | None) -> None:
  """Raises for what a model is not to be made with.

  Raises:
    TypeError: the threshold is not one number.
    ValueError: no rule, a threshold outside [0, 1] or one that the rule does not read, or a
      precision of another name than JAX's.
  """
  if not isinstance(getattr(rule, "reads_threshold", None), bool):
    raise ValueError(
      f"Expected `rule` to be an exit rule, got {rule!r}; for example `exits.StaticExit()`."
    )
  if np.ndim(threshold) or np.asarray(threshold).dtype.kind not in "fiu":
    raise TypeError(
      f"Expected `threshold` (the macro THRESHOLD) to be one number, got {threshold!r}; a grid"
      " is THRESHOLDS of scripts/t5x_sweep.py, or one call each with `decoder_params`."
    )
  schedules.check_threshold(float(threshold))
  if threshold != schedules.NEVER_EXIT and not rule.reads_threshold:
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


def described(rule: exits.Rule, threshold: float, num_layers: int) -> str:
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
