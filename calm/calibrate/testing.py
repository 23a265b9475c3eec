"""Multiple testing: from p-values in a fixed order to what is certified.

Every procedure controls the family-wise error rate: whatever the dependence between p-values,
the probability of rejecting any true hypothesis is at most `error_rate`. The order must be
fixed before any loss is seen.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from calm import arguments
from calm.calibrate.losses import Support


@dataclasses.dataclass(frozen=True, eq=False)
class Rejections:
  """The outcome of a procedure."""

  rejected: np.ndarray  # [num_hypotheses] bool
  # [num_hypotheses] in [0, 1]; rejected at error rate e exactly where <= e.
  adjusted_p_values: np.ndarray
  # Positions in the order they were looked at; fixed sequence testing stops early.
  visited: tuple[int, ...]


def fixed_sequence(p_values: npt.ArrayLike, error_rate: float) -> Rejections:
  """Tests in order at the full level and stops at the first hypothesis that is not rejected.

      adjusted p_j = max over i <= j of p_i

  `p_values` are [num_hypotheses] in [0, 1], in the order fixed beforehand, of which rejections
  form a prefix (paper, section 4.3); `error_rate` is family-wise, in (0, 1).

  >>> fixed_sequence([0.01, 0.2, 0.01], 0.05).rejected.tolist()
  [True, False, False]
  """
  p_values = np.asarray(p_values, np.float64)
  adjusted = np.maximum.accumulate(p_values)
  rejected = adjusted <= error_rate
  visited = min(int(rejected.sum()) + 1, len(p_values))
  return Rejections(rejected, adjusted, tuple(range(visited)))


def holm(p_values: npt.ArrayLike, error_rate: float) -> Rejections:
  """Holm's step-down procedure (1979): the smallest p at error_rate / k, the next at / (k - 1).

      adjusted p of the j-th smallest = max over i <= j of min(1, (k - i + 1) p_(i))

  Arguments and result are those of `fixed_sequence`; the order does not matter.
  """
  p_values = np.asarray(p_values, np.float64)
  order = np.argsort(p_values, kind="stable")
  count = len(p_values)
  steps = np.minimum(p_values[order] / (1.0 / np.arange(count, 0, -1)), 1.0)
  adjusted = np.empty(count)
  adjusted[order] = np.maximum.accumulate(steps)
  rejected = adjusted <= error_rate
  visited = order[: min(int(rejected.sum()) + 1, count)]
  return Rejections(rejected, adjusted, tuple(visited.tolist()))


def fallback(p_values: npt.ArrayLike, error_rate: float) -> Rejections:
  """Fixed order with a level for each; a rejection hands its whole level to the next.

  Half of the level is on the first hypothesis and the rest is spread evenly, so that one bad
  hypothesis does not end the test as it ends `fixed_sequence` (Wiens and Dmitrienko 2005).
  Arguments and result are those of `fixed_sequence`.
  """
  p_values = np.asarray(p_values, np.float64)
  count = len(p_values)
  weights = np.full(count, 0.5 / max(1, count - 1))
  weights[0] = first_share("fallback", count)
  waiting = np.ones(count, bool)
  adjusted, visited, highest = np.ones(count), [], 0.0
  while waiting.any():
    ratios = np.where(waiting, np.minimum(p_values / weights, 1.0), np.inf)
    chosen = int(np.argmin(ratios))
    highest = max(highest, float(ratios[chosen]))
    adjusted[chosen] = highest
    visited.append(chosen)
    waiting[chosen] = False
    if (after := np.flatnonzero(waiting[chosen:])).size:
      weights[chosen + after[0]] += weights[chosen]
  return Rejections(adjusted <= error_rate, adjusted, tuple(visited))


def _bonferroni(p_values: npt.ArrayLike, error_rate: float) -> Rejections:
  """p <= error_rate / k; only calibrations of earlier versions have it."""
  p_values = np.asarray(p_values, np.float64)
  adjusted = np.minimum(p_values / np.full(len(p_values), 1.0 / len(p_values)), 1.0)
  return Rejections(adjusted <= error_rate, adjusted, tuple(range(len(p_values))))


PROCEDURES: Mapping[str, Callable[[npt.ArrayLike, float], Rejections]] = {
  "fixed_sequence": fixed_sequence,
  "fallback": fallback,
  "holm": holm,
}
# Procedures of stored calibrations.
READABLE = {**PROCEDURES, "bonferroni": _bonferroni}


def first_share(procedure: str, count: int) -> float:
  """Share of the error rate at which a procedure tests its first hypothesis of `count`."""
  shares = {"fixed_sequence": 1.0, "fallback": 0.5 if count > 1 else 1.0, "holm": 1.0 / count}
  return shares[procedure]


@arguments.checked()
@dataclasses.dataclass(frozen=True)
class Evidence:
  """The result of one test of a promise at each threshold of the grid."""

  name: str  # of the part of the promise, '' where there is one
  tolerance: float  # bound that was tested
  method: str  # p-value method
  support: Support  # declared range of what was tested
  share: float  # of the error rate that it may use
  ascending: bool  # whether it is tested from the lowest threshold up
  num_examples: tuple[int, ...]  # prompts or clusters used
  means: tuple[float, ...]  # of what was tested; NaN where there is nothing
  log_p_values: tuple[float, ...]  # of H: expectation > tolerance
  upper_bounds: tuple[float, ...]  # of the expectation, at `share` of the error rate


@dataclasses.dataclass(frozen=True, eq=False)
class Decision:
  """Which thresholds are certified; arrays are [num_thresholds]."""

  log_p_values: np.ndarray  # largest over parts, each over its share
  worst: np.ndarray  # which part that is
  rejected: np.ndarray  # whether all parts are certified
  adjusted_p_values: np.ndarray  # rejected at any error rate that is at least this
  visited: tuple[int, ...]  # positions in the order of testing


def decide(
  parts: Sequence[Evidence],
  procedure: str,
  error_rate: float,
  sequences: Sequence[int] | None = None,
) -> Decision:
  """Certifies where every part is; used to certify and to verify.

  A threshold that breaks the promise breaks one of its parts, whose p-value alone is small with
  probability at most the error rate (intersection-union): parts cost no share of it. Ascending
  parts have a share of their own. `sequences` are the lengths of grids, one after another, that
  are tested each for itself; the share of every part then divides the error rate by their
  number.
  """
  scaled = np.array(
    [np.minimum(np.array(p.log_p_values) - math.log(p.share), 0.0) for p in parts]
  )
  up = np.array([part.ascending for part in parts])
  test = READABLE[procedure]
  ends = np.cumsum(sequences or [scaled.shape[1]])
  grids = np.split(np.exp(scaled[~up].max(axis=0)), ends[:-1])
  down = [test(p_values, error_rate) for p_values in grids]
  rejected = np.concatenate([found.rejected for found in down])
  adjusted = np.concatenate([found.adjusted_p_values for found in down])
  starts = [0, *ends[:-1].tolist()]
  pairs = zip(starts, down, strict=True)
  visited = tuple(start + place for start, found in pairs for place in found.visited)
  if up.any():
    other = test(np.exp(scaled[up].max(axis=0))[::-1], error_rate)
    rejected = rejected & other.rejected[::-1]
    adjusted = np.maximum(adjusted, other.adjusted_p_values[::-1])
  return Decision(scaled.max(axis=0), scaled.argmax(axis=0), rejected, adjusted, visited)
