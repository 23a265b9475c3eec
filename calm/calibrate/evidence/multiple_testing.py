"""Multiple testing: p-values of hypotheses in a fixed order -> which are rejected.

Every procedure controls the family-wise error rate: whatever the dependence between p-values,
the probability of rejecting any true hypothesis is at most `error_rate`. The order and the
weights must be fixed before any loss is seen. A hypothesis is rejected when p <= its level. NaN
counts as p = 1.
"""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt


@dataclasses.dataclass(frozen=True, eq=False)
class Rejections:
  """What a procedure decided.

  Attributes:
    rejected: [num_hypotheses] bool.
    adjusted_p_values: [num_hypotheses] in [0, 1]; rejected at error rate e exactly where <= e.
    visited: positions in the order they were looked at; fixed sequence testing stops early.
  """

  rejected: np.ndarray
  adjusted_p_values: np.ndarray
  visited: tuple[int, ...]


MultipleTest = Callable[[npt.ArrayLike, float], Rejections]


def _check(p_values: npt.ArrayLike, error_rate: float) -> np.ndarray:
  p_values = np.asarray(p_values, np.float64)
  if p_values.ndim != 1 or not p_values.size:
    raise ValueError(
      "Expected `p_values` to be a non-empty vector in the tested order, got shape"
      f" {p_values.shape}."
    )
  if np.any((p_values < 0.0) | (p_values > 1.0)):
    raise ValueError(
      "Expected `p_values` to lie in [0, 1] (or be NaN, which counts as 1), got others."
    )
  if not 0.0 < error_rate < 1.0:
    raise ValueError(f"Expected `error_rate` to be in (0, 1), got {error_rate!r}.")
  return np.where(np.isnan(p_values), 1.0, p_values)


def fixed_sequence(p_values: npt.ArrayLike, error_rate: float) -> Rejections:
  """Tests in order at the full level and stops at the first hypothesis that is not rejected.

      adjusted p_j = max over i <= j of p_i

  Args:
    p_values: [num_hypotheses] in the order fixed beforehand.
    error_rate: family-wise error rate, in (0, 1).

  Returns:
    Rejections form a prefix of the order (paper, section 4.3).

  Raises:
    ValueError: p-values or `error_rate` leave their range.

  >>> fixed_sequence([0.01, 0.2, 0.01], 0.05).rejected.tolist()
  [True, False, False]
  """
  p_values = _check(p_values, error_rate)
  adjusted = np.maximum.accumulate(p_values)
  rejected = adjusted <= error_rate
  visited = min(int(rejected.sum()) + 1, len(p_values))
  return Rejections(rejected, adjusted, tuple(range(visited)))


def bonferroni(
  p_values: npt.ArrayLike, error_rate: float, *, weights: npt.ArrayLike | None = None
) -> Rejections:
  """Rejects where p <= weight * error_rate; adjusted p = min(1, p / weight).

  Args:
    p_values: [num_hypotheses].
    error_rate: family-wise error rate, in (0, 1).
    weights: [num_hypotheses], at least 0, sum at most 1; equal by default.

  Returns:
    `Rejections` of [num_hypotheses].

  Raises:
    ValueError: an argument leaves its range.
  """
  p_values = _check(p_values, error_rate)
  weights = check_weights(weights, len(p_values))
  adjusted = _divide(p_values, weights)
  return Rejections(adjusted <= error_rate, adjusted, tuple(range(len(p_values))))


def holm(p_values: npt.ArrayLike, error_rate: float) -> Rejections:
  """Holm's step-down procedure: the smallest p at error_rate / k, the next at / (k - 1), ...

      adjusted p of the j-th smallest = max over i <= j of min(1, (k - i + 1) p_(i))

  (Holm 1979.)

  Args:
    p_values: [num_hypotheses]; their order does not matter.
    error_rate: family-wise error rate, in (0, 1).

  Returns:
    `Rejections` of [num_hypotheses].

  Raises:
    ValueError: p-values or `error_rate` leave their range.
  """
  p_values = _check(p_values, error_rate)
  order = np.argsort(p_values, kind="stable")
  count = len(p_values)
  steps = _divide(p_values[order], 1.0 / np.arange(count, 0, -1))
  adjusted = np.empty(count)
  adjusted[order] = np.maximum.accumulate(steps)
  rejected = adjusted <= error_rate
  visited = order[: min(int(rejected.sum()) + 1, count)]
  return Rejections(rejected, adjusted, tuple(visited.tolist()))


def fallback(
  p_values: npt.ArrayLike, error_rate: float, *, weights: npt.ArrayLike | None = None
) -> Rejections:
  """Fixed order with a level for each; a rejection hands its whole level to the next.

  One bad hypothesis does not end the test, as it ends `fixed_sequence` (weights 1, 0, 0, ...).
  (Wiens and Dmitrienko 2005.)

  Args:
    p_values: [num_hypotheses] in the order fixed beforehand.
    error_rate: family-wise error rate, in (0, 1).
    weights: [num_hypotheses], at least 0, sum at most 1; by default half on the first
      hypothesis and the rest spread evenly.

  Returns:
    `Rejections` of [num_hypotheses].

  Raises:
    ValueError: an argument leaves its range.
  """
  p_values = _check(p_values, error_rate)
  if weights is None:
    weights = front_loaded_weights(len(p_values))
  return graphical(p_values, error_rate, weights=weights, transitions=chain(len(p_values)))


def graphical(
  p_values: npt.ArrayLike,
  error_rate: float,
  *,
  weights: npt.ArrayLike,
  transitions: npt.ArrayLike,
) -> Rejections:
  """Sequentially rejective graphs: fixed sequence, fallback and Holm are special cases.

  Hypothesis j holds the level weights[j] * error_rate. When it is rejected its level flows
  along its edges, transitions[j, l] of it to l, and the graph closes over it (Bretz et al.
  2009, algorithm 1):

      w_l <- w_l + w_j g_jl,    g_lm <- (g_lm + g_lj g_jm) / (1 - g_lj g_jl)

  Args:
    p_values: [num_hypotheses].
    error_rate: family-wise error rate, in (0, 1).
    weights: [num_hypotheses], at least 0, sum at most 1.
    transitions: [num_hypotheses, num_hypotheses], at least 0, zero diagonal, rows sum to at
      most 1.

  Returns:
    `Rejections` of [num_hypotheses].

  Raises:
    ValueError: an argument leaves its range.
  """
  p_values = _check(p_values, error_rate)
  weights = check_weights(weights, len(p_values)).copy()
  edges = check_transitions(transitions, len(p_values)).copy()
  open_ = np.ones(len(p_values), bool)
  adjusted = np.ones(len(p_values))
  highest, visited = 0.0, []
  while open_.any():
    ratios = np.where(open_, _divide(p_values, weights), np.inf)
    chosen = int(np.argmin(ratios))
    highest = max(highest, float(ratios[chosen]))
    adjusted[chosen] = highest
    visited.append(chosen)
    open_[chosen] = False
    weights, edges = _close(weights, edges, chosen, open_)
  rejected = adjusted <= error_rate
  return Rejections(rejected, adjusted, tuple(visited))


def _close(weights: np.ndarray, edges: np.ndarray, chosen: int, open_: np.ndarray):
  weights = np.where(open_, weights + weights[chosen] * edges[chosen], 0.0)
  through = edges[:, chosen]
  loops = 1.0 - through * edges[chosen]
  joined = edges + np.outer(through, edges[chosen])
  edges = np.divide(
    joined, loops[:, None], out=np.zeros_like(edges), where=loops[:, None] > 1e-12
  )
  np.fill_diagonal(edges, 0.0)
  return weights, edges


def _divide(p_values: np.ndarray, weights: np.ndarray) -> np.ndarray:
  """min(1, p / weight); a weight of 0 never rejects."""
  ratio = np.ones(len(p_values))
  np.divide(p_values, weights, out=ratio, where=weights > 0.0)
  return np.minimum(ratio, 1.0)


def check_weights(weights: npt.ArrayLike | None, count: int) -> np.ndarray:
  """Weights as float64; None gives equal ones.

  Raises:
    ValueError: not `count` numbers of at least 0 that sum to at most 1.
  """
  if weights is None:
    return np.full(count, 1.0 / count)
  weights = np.asarray(weights, np.float64)
  if weights.shape != (count,) or not np.all(weights >= 0.0) or weights.sum() > 1.0 + 1e-12:
    raise ValueError(
      f"Expected `weights` to be {count} numbers of at least 0 with sum at most 1, got shape"
      f" {weights.shape} and sum {weights.sum()}."
    )
  return weights


def check_transitions(transitions: npt.ArrayLike, count: int) -> np.ndarray:
  """Transitions as float64.

  Raises:
    ValueError: not a [count, count] matrix of at least 0 with zero diagonal and row sums at
      most 1.
  """
  edges = np.asarray(transitions, np.float64)
  square = edges.shape == (count, count)
  if not square or not np.all(edges >= 0.0) or np.any(np.diagonal(edges) != 0.0):
    raise ValueError(
      f"Expected `transitions` to be [{count}, {count}] of at least 0 with a zero diagonal,"
      " got shape"
      f" {edges.shape}."
    )
  if np.any(edges.sum(axis=1) > 1.0 + 1e-12):
    raise ValueError(
      f"Expected rows of `transitions` to sum to at most 1, got {edges.sum(axis=1)}."
    )
  return edges


def chain(count: int) -> np.ndarray:
  """Transitions of a fixed order: everything to the next hypothesis."""
  return np.eye(count, k=1)


def complete_graph(count: int) -> np.ndarray:
  """Transitions of Holm's procedure: equally to all others."""
  return (np.ones((count, count)) - np.eye(count)) / max(1, count - 1)


def front_loaded_weights(count: int, first: float = 0.5) -> np.ndarray:
  """`first` on the first hypothesis, the rest spread evenly over the others."""
  if count == 1:
    return np.ones(1)
  return np.concatenate([[first], np.full(count - 1, (1.0 - first) / (count - 1))])


PROCEDURES: Mapping[str, MultipleTest] = {
  "fixed_sequence": fixed_sequence,
  "fallback": fallback,
  "holm": holm,
  "bonferroni": bonferroni,
}

# Largest share of the error rate that any hypothesis starts with.
_FIRST_SHARES: Mapping[str, Callable[[int], float]] = {
  "fixed_sequence": lambda count: 1.0,
  "fallback": lambda count: float(front_loaded_weights(count)[0]),
  "holm": lambda count: 1.0 / count,
  "bonferroni": lambda count: 1.0 / count,
}


def first_share(procedure: str, count: int) -> float:
  """Share of the error rate at which a procedure of `PROCEDURES` tests its first hypothesis."""
  return _FIRST_SHARES[procedure](count)
