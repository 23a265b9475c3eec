"""Multiple testing: from p-values in an order fixed before any loss is seen to
certificates.

Every procedure controls the family-wise error rate whatever the dependence
between p-values.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from calm import arguments
from calm.calibrate.losses import Support

# [num_hypotheses] adjusted p-values, rejected at error rate e exactly where <=
# e, and positions in the order they were looked at; fixed sequence testing
# stops early.
Tested = tuple[np.ndarray, Sequence[int]]


def fixed_sequence(p_values: npt.ArrayLike, error_rate: float) -> Tested:
  """Tests in order at the full level and stops at the first hypothesis that is
  not rejected.

      adjusted p_j = max over i <= j of p_i

  `p_values` are [num_hypotheses] in [0, 1], in the order fixed beforehand, of
  which rejections form a prefix (paper, section 4.3); `error_rate` is
  family-wise, in (0, 1).
  """
  adjusted = np.maximum.accumulate(np.asarray(p_values, np.float64))
  return adjusted, range(min(np.sum(adjusted <= error_rate) + 1, len(adjusted)))


def holm(p_values: npt.ArrayLike, error_rate: float) -> Tested:
  """Holm's step-down procedure (1979): the smallest p at error_rate / k, the
  next at / (k - 1).

      adjusted p of the j-th smallest = max over i <= j of min(1, (k - i + 1)
      p_(i))

  Arguments and result are those of `fixed_sequence`; the order does not matter.
  """
  p_values = np.asarray(p_values, np.float64)
  order = np.argsort(p_values, kind="stable")
  count = len(p_values)
  steps = np.minimum(p_values[order] / (1.0 / np.arange(count, 0, -1)), 1.0)
  adjusted = np.empty(count)
  adjusted[order] = np.maximum.accumulate(steps)
  return adjusted, order[: np.sum(adjusted <= error_rate) + 1].tolist()


def fallback(p_values: npt.ArrayLike, error_rate: float) -> Tested:
  """Fixed order with a level for each; a rejection hands its whole level to the
  next.

  Half of the level is on the first hypothesis and the rest is spread evenly, so
  that one bad hypothesis does not end the test as it ends `fixed_sequence`
  (Wiens and Dmitrienko 2005). Arguments and result are those of
  `fixed_sequence`.
  """
  del error_rate  # levels are looked at from the largest down
  p_values = np.asarray(p_values, np.float64)
  count = len(p_values)
  weights = np.full(count, 0.5 / max(1, count - 1))
  weights[0] = first_share("fallback", count)
  waiting = np.ones(count, bool)
  adjusted = np.empty(count)
  visited = []
  highest = 0.0
  while waiting.any():
    ratios = np.where(waiting, np.minimum(p_values / weights, 1.0), np.inf)
    chosen = int(np.argmin(ratios))
    highest = max(highest, float(ratios[chosen]))
    adjusted[chosen] = highest
    visited.append(chosen)
    waiting[chosen] = False
    if (after := np.flatnonzero(waiting[chosen:])).size:
      weights[chosen + after[0]] += weights[chosen]
  return adjusted, visited


PROCEDURES: Mapping[str, Callable[[npt.ArrayLike, float], Tested]] = {
  "fixed_sequence": fixed_sequence,
  "fallback": fallback,
  "holm": holm,
}
# Procedures of stored calibrations; the last was one once.
READABLE = {
  **PROCEDURES,
  "bonferroni": lambda p, _: (
    np.minimum(np.divide(p, 1.0 / len(p)), 1.0),
    range(len(p)),
  ),
}


def first_share(procedure: str, count: int) -> float:
  """Share of the error rate at which a procedure tests its first hypothesis of
  `count`.
  """
  shares = {
    "fixed_sequence": 1.0,
    "fallback": 0.5 if count > 1 else 1.0,
    "holm": 1.0 / count,
  }
  return shares[procedure]


@arguments.checked()
@dataclasses.dataclass(frozen=True)
class Test:
  """One test of a promise, as known before there is any loss."""

  __test__: ClassVar[bool] = False  # no test of pytest's

  name: str  # of the part of the promise, '' where there is one
  tolerance: float  # bound on the expectation of what is tested
  support: Support  # declared range of what is tested
  share: float = 1.0  # of the error rate
  ascending: bool = False  # whether thresholds are tested from the lowest up


@arguments.checked()
@dataclasses.dataclass(frozen=True, kw_only=True)
class Evidence(Test):
  """The result of one test of a promise at each threshold of the grid."""

  method: str  # p-value method
  num_examples: tuple[int, ...]  # prompts or clusters used
  means: tuple[float, ...]  # of what was tested; NaN where there is nothing
  log_p_values: tuple[float, ...]  # of H: expectation > tolerance
  # of the expectation, at `share` of the error rate
  upper_bounds: tuple[float, ...]


@arguments.checked()
@dataclasses.dataclass(frozen=True)
class Row:
  """What the least certain test of a promise found at one threshold."""

  threshold: float  # grid point
  num_examples: int  # prompts (or clusters) used
  mean: float  # mean loss of those
  # P-value of H: E[loss] > tolerance; underflows to 0 where `log_p_value` does
  # not.
  p_value: float
  log_p_value: float  # its logarithm
  upper_bound: float  # of E[loss] at `error_rate`, for this threshold alone
  # rejected at any family-wise error rate that is at least this
  adjusted_p_value: float
  rejected: bool  # whether E[loss] <= tolerance is certified


def decide(
  parts: Sequence[Evidence],
  thresholds: Sequence[float],
  procedure: str,
  error_rate: float,
  sequences: Sequence[int] = (),
) -> tuple[tuple[Row, ...], tuple[int, ...], np.ndarray]:
  """Certifies where every part is: rows, positions in the order of testing, the
  worst parts.

  A threshold that breaks the promise breaks one of its parts: these cost no
  share of the error rate (intersection-union). Ascending parts have a share of
  their own, and so have `sequences`, the lengths of grids, one after another,
  that are tested each for itself.
  """
  scaled = np.array(
    [
      np.minimum(np.array(p.log_p_values) - math.log(p.share), 0.0)
      for p in parts
    ]
  )
  up = np.array([part.ascending for part in parts])
  test = READABLE[procedure]
  ends = np.cumsum(sequences or [scaled.shape[1]])
  grids = np.split(np.exp(scaled[~up].max(axis=0)), ends[:-1])
  adjusted = np.empty(0)
  visited = []
  for p_values in grids:
    found, places = test(p_values, error_rate)
    visited += [len(adjusted) + place for place in places]
    adjusted = np.append(adjusted, found)
  if up.any():
    found, _ = test(np.exp(scaled[up].max(axis=0))[::-1], error_rate)
    adjusted = np.maximum(adjusted, found[::-1])
  worst = scaled.argmax(axis=0)
  rows = []
  for place, level in enumerate(thresholds):
    part = parts[worst[place]]
    log_p = scaled[worst[place], place]
    rows.append(
      Row(
        threshold=float(level),
        num_examples=part.num_examples[place],
        mean=part.means[place],
        p_value=float(np.exp(log_p)),
        log_p_value=float(log_p),
        upper_bound=part.upper_bounds[place],
        adjusted_p_value=float(adjusted[place]),
        rejected=bool(adjusted[place] <= error_rate),
      )
    )
  return tuple(rows), tuple(visited), worst
