"""From p-values of one or more tests to what is certified; used to certify and to verify."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from calm.calibrate.evidence import multiple_testing as testing
from calm.calibrate.losses import Support


@dataclasses.dataclass(frozen=True)
class Evidence:
  """What one test of a promise found, at each threshold of the grid.

  Attributes:
    name: of the part of the promise, '' where there is one.
    tolerance: bound that was tested.
    method: p-value method.
    support: declared range of what was tested.
    share: of the error rate that it may use.
    ascending: whether it is tested from the lowest threshold up.
    num_examples: prompts or clusters used.
    means: of what was tested; NaN where there is nothing.
    log_p_values: of H: expectation > tolerance.
    upper_bounds: of the expectation, at `share` of the error rate.
  """

  name: str
  tolerance: float
  method: str
  support: Support
  share: float
  ascending: bool
  num_examples: tuple[int, ...]
  means: tuple[float, ...]
  log_p_values: tuple[float, ...]
  upper_bounds: tuple[float, ...]

  def to_json(self) -> dict[str, Any]:
    """All fields as JSON values; NaN is null."""
    value = dataclasses.asdict(self)
    for name in ("means", "log_p_values", "upper_bounds"):
      value[name] = [None if math.isnan(entry) else entry for entry in value[name]]
    return {**value, "num_examples": list(self.num_examples)}

  @classmethod
  def from_json(cls, value: Mapping[str, Any]) -> "Evidence":
    """The inverse of `to_json`."""
    fields = dict(value)
    for name in ("means", "log_p_values", "upper_bounds"):
      fields[name] = tuple(math.nan if entry is None else entry for entry in value[name])
    fields["num_examples"] = tuple(value["num_examples"])
    return cls(**{**fields, "support": Support(**value["support"])})


@dataclasses.dataclass(frozen=True, eq=False)
class Decision:
  """What is certified.

  Attributes:
    log_p_values: [num_thresholds] largest over parts, each over its share.
    worst: [num_thresholds] which part that is.
    rejected: [num_thresholds] whether all parts are certified.
    adjusted_p_values: [num_thresholds] rejected at any error rate that is at least this.
    visited: positions in the order of testing.
  """

  log_p_values: np.ndarray
  worst: np.ndarray
  rejected: np.ndarray
  adjusted_p_values: np.ndarray
  visited: tuple[int, ...]


def decide(parts: Sequence[Evidence], procedure: str, error_rate: float) -> Decision:
  """Certifies where every part is; see `promises.promise` for why that costs nothing.

  Args:
    parts: at least one; ascending ones have a share of their own.
    procedure: name of the multiple-testing procedure.
    error_rate: epsilon.
  """
  scaled = np.array(
    [np.minimum(np.array(p.log_p_values) - math.log(p.share), 0.0) for p in parts]
  )
  up = np.array([part.ascending for part in parts])
  down = testing.PROCEDURES[procedure](np.exp(scaled[~up].max(axis=0)), error_rate)
  rejected, adjusted = down.rejected, down.adjusted_p_values
  if up.any():
    other = testing.PROCEDURES[procedure](np.exp(scaled[up].max(axis=0))[::-1], error_rate)
    rejected = rejected & other.rejected[::-1]
    adjusted = np.maximum(adjusted, other.adjusted_p_values[::-1])
  return Decision(
    log_p_values=scaled.max(axis=0),
    worst=scaled.argmax(axis=0),
    rejected=rejected,
    adjusted_p_values=adjusted,
    visited=down.visited,
  )
