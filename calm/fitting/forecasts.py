"""Grids and thresholds from what the validation part said: no model is run here."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from calm.fitting import candidates as candidates_lib
from calm.fitting import probe as probe_lib
from calm.fitting.candidates import Candidate

# Losses at which a grid has its points, as multiples of the tolerance.
_COARSE = (0.1, 0.3, 0.6, 0.9, 1.2, 1.8, 3.0)
_FINE = (0.1, 0.2, 0.3, 0.4, 0.5, *(0.55 + 0.05 * i for i in range(14)), 1.4, 1.7, 2.0)
# One-sided normal quantile at 5 %: a forecast of what will be certified, no promise.
_QUANTILE = 1.645


@dataclasses.dataclass(frozen=True)
class Tried:
  """One finalist.

  Attributes:
    candidate: the way to leave.
    thresholds: its grid on the validation part; empty where it was only timed, since others
      were faster.
    losses: [num_thresholds] mean loss there.
    depths: [num_thresholds] mean decoder layers a token.
    threshold: the lowest that calibration will probably certify; `NEVER_EXIT` where none. Of
      one that was only timed, what the probe forecasts.
    milliseconds: measured decode time a prompt at that threshold; NaN where none.
    speedup: full depth's over these, the fastest of rounds in turn; NaN where none.
    first_speedup: the same of a first look, in which all finalists took their turn on a few
      prompts at the threshold that the probe forecasts; NaN where none.
  """

  candidate: Candidate
  thresholds: tuple[float, ...]
  losses: tuple[float, ...]
  depths: tuple[float, ...]
  threshold: float
  milliseconds: float
  speedup: float
  first_speedup: float = float("nan")

  @property
  def decoded(self) -> bool:
    """Whether its loss was measured, and not only its seconds."""
    return bool(self.thresholds)


def coarse_grid(
  probe: probe_lib.Probe, candidate: Candidate, tolerance: float, max_length: int
) -> tuple[float, ...]:
  """Descending thresholds from where no text changes to where far too many do."""
  possible = candidates_lib.possible_thresholds(probe, candidate)
  _, losses = candidates_lib.simulate(probe, candidate, possible, max_length)
  losses = np.maximum.accumulate(losses)
  chosen = {0}
  for level in _COARSE:
    chosen.add(int(np.flatnonzero(losses <= max(level * tolerance, losses[0]))[-1]))
  return tuple(possible[sorted(chosen)].tolist())


def forecast(
  thresholds: Sequence[float], losses: np.ndarray, tolerance: float, num_calibration: int
) -> float:
  """The lowest threshold that so many prompts will probably certify.

  Args:
    thresholds: descending.
    losses: [num_prompts, num_thresholds] on the validation part.
    tolerance: delta.
    num_calibration: prompts that will certify.

  Returns:
    A threshold, between two of the grid where the bound crosses the tolerance there;
    `NEVER_EXIT` where none will do.
  """
  error = losses.std(axis=0, ddof=1) / np.sqrt(num_calibration)
  bound = np.maximum.accumulate(losses.mean(axis=0) + _QUANTILE * error)
  if bound[0] > tolerance:
    return float("inf")
  return _crossing(np.asarray(thresholds), bound, tolerance)


def _crossing(thresholds: np.ndarray, losses: np.ndarray, level: float) -> float:
  """Where losses, which rise along the grid, reach a level; its lowest threshold if nowhere."""
  above = np.flatnonzero(losses > level)
  if not len(above):
    return float(thresholds[-1])
  last = int(above[0])
  if last == 0:
    start, before = 1.0, 0.0
  else:
    start, before = float(thresholds[last - 1]), float(losses[last - 1])
  share = (level - before) / (losses[last] - before)
  return float(np.round(start + max(share, 0.0) * (thresholds[last] - start), 6))


def final_grid(tried: Tried, tolerance: float) -> tuple[float, ...]:
  """Thresholds to certify: densest where the validation loss nears the tolerance.

  Points that pass cost a fixed sequence nothing; points far above the tolerance are left out.
  """
  thresholds = np.asarray(tried.thresholds)
  losses = np.maximum.accumulate(np.asarray(tried.losses))
  points = {_crossing(thresholds, losses, level * tolerance) for level in _FINE}
  points |= {t for t, loss in zip(tried.thresholds, losses, strict=True) if loss <= tolerance}
  if np.isfinite(tried.threshold):
    points.add(tried.threshold)
  lowest = 0.0 if tried.candidate.can_cut else np.nextafter(0.0, 1.0)
  return tuple(sorted((t for t in points if lowest <= t <= 1.0), reverse=True))
