"""Measured seconds of a calibrated threshold beside full depth, noted in its calibration.

A threshold can be certified and decode no faster than the full model: exits cost something too.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from calm.calibrate.calibration import Calibration
from calm.calibrate.thresholds import format_threshold

_NOTE = "seconds"


@dataclasses.dataclass(frozen=True)
class Pair:
  """Decode milliseconds a prompt, the fastest of rounds in which both took their turn."""

  batch_size: int  # prompts decoded together
  num_prompts: int  # prompts timed
  full: float  # milliseconds a prompt at full depth
  early: float  # the same with calibrated exits
  speedup: float  # the first over the second
  end_to_end: float  # the same with the encoder on both sides

  def __str__(self) -> str:
    several = f"in batches of {self.batch_size}"
    return f"x{self.speedup:.2f} {several if self.batch_size > 1 else 'one at a time'}"


@dataclasses.dataclass(frozen=True)
class Seconds:
  """What was measured: one prompt at a time, and in full batches where prompts suffice."""

  single: Pair
  batched: Pair | None = None

  @property
  def slower(self) -> str:
    """Where calibrated exits are no faster than full depth, in words; '' where they are."""
    pairs = filter(None, (self.single, self.batched))
    return " and ".join(str(pair) for pair in pairs if not pair.speedup > 1.0)

  @property
  def told(self) -> str:
    """Full depth's time over that of calibrated exits, in words."""
    pairs = filter(None, (self.single, self.batched))
    return ", ".join(f"{p} (x{p.end_to_end:.2f} with the encoder)" for p in pairs)


def noted(calibration: Calibration, seconds: Seconds | None) -> Calibration:
  """The calibration with what was measured in the notes of its provenance."""
  if seconds is None:
    return calibration
  notes = {**(calibration.provenance.notes or {}), _NOTE: dataclasses.asdict(seconds)}
  provenance = dataclasses.replace(calibration.provenance, notes=notes)
  return dataclasses.replace(calibration, provenance=provenance)


def of(calibration: Calibration) -> Seconds | None:
  """What was measured for a calibration; None where nothing was, or the note is another's."""
  value = (calibration.provenance.notes or {}).get(_NOTE)
  single, batched = (
    _pair(value.get(name)) if isinstance(value, Mapping) else None
    for name in ("single", "batched")
  )
  return None if single is None else Seconds(single, batched)


def _pair(value: Any) -> Pair | None:
  names = {field.name for field in dataclasses.fields(Pair)}
  if not isinstance(value, Mapping) or set(value) != names:
    return None
  numbers = all(type(v) in (int, float) and math.isfinite(v) for v in value.values())
  return Pair(**value) if numbers else None


def warning(calibration: Calibration, seconds: Seconds | None = None) -> str:
  """What to say of a served threshold that is not faster as measured (or as noted), or ''."""
  seconds = of(calibration) if seconds is None else seconds
  slow = "" if seconds is None or not calibration.certified else seconds.slower
  return slow and (
    f"the calibrated threshold {format_threshold(calibration.threshold)} keeps its promise but"
    f" is not faster than full depth, as measured: {slow}; decode at full depth (the threshold"
    " 'never'), or fit other layers or another measure (`calm fit`)."
  )
