"""Measured seconds of a calibrated threshold beside full depth, kept with its calibration.

A threshold can be certified and decode no faster than the full model: exits cost something too.
Whoever calibrates with a model at hand measures both, notes it, and whoever serves the
threshold is told where it is not faster.
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
  """Decode milliseconds a prompt, the fastest of rounds in which both took their turn.

  Attributes:
    batch_size: prompts decoded together.
    num_prompts: prompts timed.
    full: milliseconds a prompt at full depth.
    early: the same with calibrated exits.
    speedup: the first over the second.
    end_to_end: the same with the encoder on both sides.
  """

  batch_size: int
  num_prompts: int
  full: float
  early: float
  speedup: float
  end_to_end: float


@dataclasses.dataclass(frozen=True)
class Seconds:
  """What was measured.

  Attributes:
    single: one prompt at a time.
    batched: in full batches, where there were enough prompts of one length.
  """

  single: Pair
  batched: Pair | None = None

  @property
  def slower(self) -> str:
    """Where calibrated exits are no faster than full depth, in words; '' where they are."""
    slow = [f"x{p.speedup:.2f} {together(p)}" for p in self._pairs if not p.speedup > 1.0]
    return " and ".join(slow)

  @property
  def told(self) -> str:
    """Full depth's time over that of calibrated exits, in words."""
    return ", ".join(
      f"x{pair.speedup:.2f} {together(pair)} (x{pair.end_to_end:.2f} with the encoder)"
      for pair in self._pairs
    )

  @property
  def _pairs(self) -> list["Pair"]:
    return [pair for pair in (self.single, self.batched) if pair is not None]


def together(pair: Pair) -> str:
  """How prompts were decoded, in words."""
  return "one at a time" if pair.batch_size == 1 else f"in batches of {pair.batch_size}"


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
  if not isinstance(value, Mapping):
    return None
  single = _pair(value.get("single"))
  return None if single is None else Seconds(single, _pair(value.get("batched")))


def _pair(value: Any) -> Pair | None:
  names = [field.name for field in dataclasses.fields(Pair)]
  if not isinstance(value, Mapping) or sorted(value) != sorted(names):
    return None
  numbers = all(type(v) in (int, float) and math.isfinite(v) for v in value.values())
  return Pair(**value) if numbers else None


def warning(calibration: Calibration, seconds: Seconds | None = None) -> str:
  """What to say of a threshold that is served though it is not faster; '' where it is, or
  nothing was measured.

  Args:
    calibration: the one that is served.
    seconds: what was measured; None takes what is noted in the calibration.
  """
  seconds = of(calibration) if seconds is None else seconds
  slow = "" if seconds is None or not calibration.certified else seconds.slower
  return slow and (
    f"the calibrated threshold {format_threshold(calibration.threshold)} keeps its promise but"
    f" is not faster than full depth, as measured: {slow}; decode at full depth (the threshold"
    " 'never'), or fit other layers or another measure (`calm fit`)."
  )
