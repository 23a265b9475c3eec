"""95 % intervals of what rests on few prompts: mean losses, and ratios of seconds."""

from collections.abc import Sequence

import numpy as np

from calm.calibrate.evidence import bounds
from calm.inference import timing

LEVEL = 0.95
Interval = tuple[float, float]
UNKNOWN: Interval = (float("nan"), float("nan"))
_DRAWS = 2000


def of_mean(losses: Sequence[float] | np.ndarray, lower: float = 0.0) -> Interval:
  """The expected loss of a prompt, by inverting a betting test on both sides.

  It covers at any number of prompts, however few of their losses differ from 0, where a normal
  interval would be a point.

  Args:
    losses: [num_prompts] in [`lower`, 1].
    lower: declared lower bound.

  Returns:
    (low, high), each missed with a probability of at most (1 - LEVEL) / 2; unknown without
    prompts.
  """
  values = np.asarray(losses, np.float64)
  if not values.size:
    return UNKNOWN
  values = np.random.default_rng(0).permutation(values)
  miss = (1.0 - LEVEL) / 2.0
  high = bounds.betting(values, error_rate=miss, lower=lower)
  # The same test of 1 + lower - loss, which has the same range.
  low = 1.0 + lower - bounds.betting(1.0 + lower - values, error_rate=miss, lower=lower)
  return max(lower, float(low)), float(high)


def of_ratio(over: Sequence[float], under: Sequence[float]) -> Interval:
  """A ratio of sums over prompts, by drawing prompts with replacement.

  Args:
    over: [num_prompts] seconds above the line.
    under: [num_prompts] seconds below it, of the same prompts.

  Returns:
    (low, high) percentiles; unknown below two prompts.
  """
  count = len(over)
  if count < 2:
    return UNKNOWN
  drawn = np.random.default_rng(0).integers(0, count, size=(_DRAWS, count))
  ratios = np.asarray(over)[drawn].sum(axis=1) / np.asarray(under)[drawn].sum(axis=1)
  miss = 50.0 * (1.0 - LEVEL)
  low, high = np.percentile(ratios, [miss, 100.0 - miss])
  return float(low), float(high)


def of_speedup(timings: timing.Timings, timed: timing.Timed) -> Interval:
  """The interval of a setting's speed-up over full depth; unknown without full depth."""
  full = timings.find(timing.FULL)
  return UNKNOWN if full is None else of_ratio(full.prompt_seconds, timed.prompt_seconds)


def of_error(value: float, error: float) -> Interval:
  """A mean and its standard error, normal."""
  return value - 1.96 * error, value + 1.96 * error
