"""How many calibration prompts are needed, before any is decoded."""

import bisect
import math

import numpy as np

from calm import arguments
from calm.calibrate import checks, methods
from calm.calibrate.losses import Support

_MOST_PROMPTS = 10**6  # a method's own size is sought no further


@arguments.checked()
def min_calibration_size(
  tolerance: float, error_rate: float, *, lower: float = 0.0, upper: float = 1.0
) -> int:
  """The fewest prompts with which a valid method that draws nothing can certify
  anything.

      n >= log(error_rate) / log((upper - tolerance) / (upper - lower))

  With fewer, losses that are `lower` throughout are too likely under a risk
  above `tolerance`.

  Args:
    tolerance: in (lower, upper).
    error_rate: level of the first hypothesis that is tested, in (0, 1).
    lower: declared lower bound of losses; -1 for signed differences.
    upper: declared upper bound of losses.

  Returns:
    Prompts, at least 1; ValueError where an argument leaves its range.

  >>> [min_calibration_size(delta, 0.05) for delta in (0.02, 0.05, 0.1, 0.25)]
  [149, 59, 29, 11]
  """
  checks.in_range("lower", lower, -math.inf, upper)
  checks.in_range("upper", upper, lower, math.inf)
  checks.in_range("tolerance", tolerance, lower, upper)
  checks.in_range("error_rate", error_rate, 0.0, 1.0)
  size = math.log(error_rate) / math.log1p(
    -(tolerance - lower) / (upper - lower)
  )
  # A whole number must not be rounded up by the last digit of two logarithms.
  nearest = round(size)
  return max(1, nearest if abs(size - nearest) < 1e-9 else math.ceil(size))


@arguments.checked()
def method_size(
  method: str,
  tolerance: float,
  error_rate: float,
  *,
  support: Support | None = None,
  share: float = 1.0,
) -> int | None:
  """The fewest prompts with which one method certifies losses that are the
  lowest throughout.

  Of a randomised method: in at least half of all draws. It may be more than
  `min_calibration_size`: bets stop short of the largest one.

  Args:
    method: as for `calibrate`.
    tolerance: delta, in (lower, upper).
    error_rate: epsilon, in (0, 1).
    support: declared range of losses; [0, 1] by default.
    share: of the error rate at which the first hypothesis is tested, in (0, 1].

  Returns:
    Prompts, or None where a million are not enough.

  >>> method_size("convex_order", 0.1, 0.05)
  29
  """
  checks.in_range("share", share, 0.0, math.nextafter(1.0, 2.0))
  checks.in_range("error_rate", error_rate, 0.0, 1.0)
  support = support or Support()
  chosen = methods.get_method(method, support, any_level=share < 1.0)
  lowest, declared = chosen.prepare(np.full((1, 1), support.lower), support)

  def certifies(size: int) -> bool:
    design = chosen.design(
      tolerance, error_rate, size, declared.upper, uniform=0.5
    )
    log_p = chosen.log_p_values(np.full((size, 1), lowest[0, 0]), design)
    return float(log_p[0]) <= math.log(error_rate * share) + 1e-12

  few = enough = _floor(chosen, declared, tolerance, error_rate * share)
  while enough <= _MOST_PROMPTS and not certifies(enough):
    few, enough = enough + 1, 2 * enough
  if enough > _MOST_PROMPTS:
    return None
  return bisect.bisect_left(range(enough), True, lo=few, key=certifies)


def _floor(
  chosen: methods.Method, support: Support, tolerance: float, level: float
) -> int:
  """`min_calibration_size`; of a randomised method for a certificate in half of
  all draws.
  """
  level = min(2.0 * level, 0.999) if chosen.randomized else level
  # 'paper' counts improvements as 0.
  lower = max(support.lower, 0.0) if chosen.clips else support.lower
  return min_calibration_size(
    tolerance, level, lower=lower, upper=support.upper
  )


@arguments.checked()
def refusal(
  num_examples: int,
  tolerance: float,
  error_rate: float,
  *,
  support: Support | None = None,
  method: str = "auto",
  share: float = 1.0,
  unit: str = "prompts",
) -> str:
  """Why so few prompts (or `unit`), below `method_size`, can certify nothing,
  or ''.
  """
  support = support or Support()
  own = method_size(method, tolerance, error_rate, support=support, share=share)
  if own is not None and num_examples >= own:
    return ""
  chosen = methods.get_method(method, support, any_level=share < 1.0)
  needed = _floor(chosen, support, tolerance, error_rate * share)
  own = own or f"more than {_MOST_PROMPTS}"
  least = needed if num_examples < needed else own
  few = (
    " (at most half of all draws would certify)" if chosen.randomized else ""
  )
  return (
    f"Expected at least {least} {unit} at tolerance {tolerance} and error rate"
    f" {error_rate * share} ({own} by the method {method!r}), got "
    f"{num_examples}, which are too"
    f" few whatever their losses{few}; give more, or allow a larger loss or "
    "error rate."
  )
