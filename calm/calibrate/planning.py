"""How many calibration prompts are needed, before any is decoded."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from calm.calibrate.evidence.draws import Pool
from calm.calibrate.losses.sequence_losses import SequenceLosses, Support


def min_calibration_size(tolerance: float, error_rate: float, *, lower: float = 0.0) -> int:
  """The fewest prompts with which any valid method can certify anything.

      n >= log(error_rate) / log((1 - tolerance) / (1 - lower))

  With fewer, losses that are `lower` on every prompt are still too likely under a true risk
  above tolerance: of the losses in [lower, 1] with mean `tolerance`, the one that takes only
  the two ends is `lower` n times with probability ((1 - tolerance) / (1 - lower))^n.

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
    raise ValueError(f"`tolerance` must be in (`lower`, 1) = ({lower}, 1), got {tolerance!r}.")
  if not 0.0 < error_rate < 1.0:
    raise ValueError(f"`error_rate` must be in (0, 1), got {error_rate!r}.")
  share = (1.0 - tolerance) / (1.0 - lower)
  size = math.log(error_rate) / math.log(share)
  # A whole number must not be rounded up by the last digit of two logarithms.
  nearest = round(size)
  return max(1, nearest if abs(size - nearest) < 1e-9 else math.ceil(size))


def refusal(
  num_examples: int, tolerance: float, error_rate: float, *, lower: float = 0.0
) -> str:
  """Why so few prompts cannot certify anything, and how many could; '' where they can.

  Args:
    num_examples: prompts there are.
    tolerance: in (lower, 1).
    error_rate: level of the first hypothesis that is tested.
    lower: declared lower bound of losses.

  Returns:
    A sentence, or ''.

  Raises:
    ValueError: `tolerance` or `error_rate` leaves its range.
  """
  needed = min_calibration_size(tolerance, error_rate, lower=lower)
  if num_examples >= needed:
    return ""
  return (
    f"{num_examples} prompts are too few at tolerance {tolerance} and error rate {error_rate},"
    f" whatever their losses; at least {needed} are needed."
  )


def forecast(
  num_examples: int, tolerance: float, error_rate: float, *, method: str = "auto"
) -> str:
  """What to expect of so few signed losses; '' where unchanged outputs would certify.

  Signed losses have a floor far below that of losses in [0, 1], but outputs that are never
  better certify no earlier. The forecast is a power curve on losses made up for it: the exit
  changes no prompt, or a share of them, as often for the better as for the worse.

  Args:
    num_examples: prompts there are.
    tolerance: in (0, 1).
    error_rate: level of the first hypothesis that is tested.
    method: as for `calibration.calibrate`.

  Returns:
    A sentence with a table under it, or ''.

  Raises:
    ValueError: an argument leaves its range.
  """
  unchanged = min_calibration_size(tolerance, error_rate)
  sizes = tuple(sorted({num_examples, unchanged, 2 * unchanged, 4 * unchanged}))
  table = {}
  for share in (0.0, 0.1, 0.2, 0.4):
    values = np.zeros((200, 1))
    values[: round(100 * share)], values[100 : 100 + round(100 * share)] = 0.5, -0.5
    pilot = SequenceLosses(values, np.array([0.5]), Support(lower=-1.0))
    curve = power_curve(
      pilot, sizes, tolerance=tolerance, error_rate=error_rate, method=method, draws=100
    )
    table[share] = dict(zip(sizes, curve.power[:, 0], strict=True))
  if table[0.0][num_examples] == 1.0:
    return ""
  lines = [
    f"{num_examples} prompts certify a signed loss at tolerance {tolerance} and error rate"
    f" {error_rate} only if outputs get better: where nothing changes, no method can with"
    f" fewer than {unchanged}. Power by prompts, where that share of them changes by 0.5, half"
    " of those for the worse:"
  ]
  for share, powers in table.items():
    cells = [f"{size}: {100 * power:.0f}%" for size, power in powers.items()]
    lines.append(f"  {100 * share:>3.0f}% changed   " + "   ".join(cells))
  return "\n".join(lines)


@dataclasses.dataclass(frozen=True, eq=False)
class PowerCurve:
  """How likely a calibration set of some size certifies a threshold, judged by pilot losses.

  Attributes:
    sizes: [num_sizes] calibration sizes.
    thresholds: [num_thresholds] grid.
    power: [num_sizes, num_thresholds] share of draws that certified the threshold.
    draws: calibration sets drawn per size.
  """

  sizes: tuple[int, ...]
  thresholds: np.ndarray
  power: np.ndarray
  draws: int

  def size_for(self, threshold: float, power: float = 0.8) -> int | None:
    """The smallest size that certifies `threshold` with at least that power, or None."""
    column = self.power[:, int(np.flatnonzero(self.thresholds == threshold)[0])]
    enough = [size for size, share in zip(self.sizes, column, strict=True) if share >= power]
    return min(enough, default=None)

  def __str__(self) -> str:
    head = "prompts " + " ".join(f"{threshold:>7.4g}" for threshold in self.thresholds)
    lines = [
      f"{size:>7} " + " ".join(f"{100 * share:>6.0f}%" for share in row)
      for size, row in zip(self.sizes, self.power, strict=True)
    ]
    return "\n".join([head, *lines])


def power_curve(
  pilot: SequenceLosses,
  sizes: Sequence[int],
  *,
  tolerance: float,
  error_rate: float,
  method: str = "auto",
  groups: Sequence[str] | None = None,
  draws: int = 200,
  seed: int = 0,
) -> PowerCurve:
  """Power of fixed sequence testing at several calibration sizes, from pilot losses.

  Calibration sets are drawn with replacement from the pilot's rows or clusters. It is a
  forecast, not a guarantee; pilot prompts (validation) must not be calibration prompts.

  Args:
    pilot: losses of pilot prompts on the grid that will be tested.
    sizes: calibration sizes to try.
    tolerance: delta, in (0, 1).
    error_rate: epsilon, in (0, 1).
    method: as for `calibrate`.
    groups: [num_examples] cluster of each pilot row (None: those of `pilot`, if any); sizes are
      then numbers of clusters.
    draws: calibration sets per size.
    seed: of the draws.

  Returns:
    A `PowerCurve`.

  Raises:
    ValueError: a size is below 1, losses leave their range, or `method` does not fit them.
  """
  if not len(sizes) or min(sizes) < 1 or draws < 1:
    raise ValueError(
      f"`sizes` must be at least 1 each and `draws` at least 1, got {sizes} and {draws}."
    )
  pool = Pool(pilot, method, groups)
  generator = np.random.default_rng(seed)
  columns = np.arange(pool.values.shape[1])
  power = []
  for size in sizes:
    sets = generator.integers(len(pool.values), size=(draws, size))
    lowest = pool.choose(sets, [tolerance], error_rate)
    power.append(np.mean(lowest >= columns, axis=0))
  return PowerCurve(tuple(sizes), pool.thresholds, np.stack(power), draws)
