"""How many calibration prompts are needed, before any is decoded."""

import math


def min_calibration_size(tolerance: float, error_rate: float, *, lower: float = 0.0) -> int:
  """The fewest prompts with which any valid method can certify anything.

      n >= log(error_rate) / log((1 - tolerance) / (1 - lower))

  With fewer, losses that are `lower` on every prompt are still too likely under a true risk
  above tolerance: of the losses in [lower, 1] with mean `tolerance`, the one that takes only
    the two ends is
  `lower` n times with probability ((1 - tolerance) / (1 - lower))^n.

  Args:
    tolerance: in (lower, 1).
    error_rate: level of the first hypothesis that is tested, in (0, 1).
    lower: declared lower bound of losses; -1 for signed differences.

  Returns:
    Prompts, at least 1.

  Raises:
    ValueError: an argument leaves its range.

  >>> [min_calibration_size(tolerance, 0.05) for tolerance in (0.02, 0.05, 0.1, 0.25)]
  [149, 59, 29, 11]
  """
  if not lower < tolerance < 1.0:
    raise ValueError(f'`tolerance` must be in (`lower`, 1) = ({lower}, 1), got {tolerance!r}.')
  if not 0.0 < error_rate < 1.0:
    raise ValueError(f'`error_rate` must be in (0, 1), got {error_rate!r}.')
  share = (1.0 - tolerance) / (1.0 - lower)
  size = math.log(error_rate) / math.log(share)
  # A whole number must not be rounded up by the last digit of two logarithms.
  nearest = round(size)
  return max(1, nearest if abs(size - nearest) < 1e-9 else math.ceil(size))
