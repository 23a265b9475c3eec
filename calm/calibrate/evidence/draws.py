"""A pool of losses from which calibration sets are drawn and tested, many at once.

Repeated calibration asks the same of every drawn set: which is the lowest threshold that fixed
sequence testing certifies? All sets and tolerances walk down the grid in lockstep, and those
that failed drop out, so that no p-value beyond a first failure is computed.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from calm.calibrate import clusters
from calm.calibrate.evidence import methods
from calm.calibrate.losses import SequenceLosses

# Units of all sets together that are drawn at once: 2 GB of numbers.
MOST_DRAWN = 2**28


def check_size(name: str, count: int, size: int, seed: int) -> None:
  """What is to be drawn.

  Args:
    name: of the argument that says how many sets.
    count: sets.
    size: units of each.
    seed: of the generator.

  Raises:
    ValueError: it is more than memory would hold, or the seed is below 0.
  """
  if count * size > MOST_DRAWN:
    raise ValueError(
      f"Expected `{name}` sets of {size} units to have at most {MOST_DRAWN} units together,"
      f" got {count} sets; draw fewer or smaller ones."
    )
  if seed < 0:
    raise ValueError(f"Expected `seed` to be at least 0, got {seed}.")


class Draws:
  """Losses as one method tests them, with rows grouped into exchangeable units.

  Attributes:
    method: the p-value method, 'auto' resolved.
    values: [num_units, num_thresholds] losses.
    thresholds: [num_thresholds], strictly descending.
    support: declared range of `values`.
    unit_of_row: [num_examples] unit of each row of the losses.
  """

  def __init__(self, losses: SequenceLosses, method: str, groups: Sequence[str] | None = None):
    """Groups rows into units.

    Args:
      losses: on a strictly descending grid.
      method: as for `calibrate`.
      groups: [num_examples] cluster of each row; None takes those of `losses`, without which
        every row is its own.

    Raises:
      ValueError: losses leave their range, `method` does not fit them, or `groups` has another
        length.
    """
    low, high = losses.support.lower, losses.support.upper
    if not np.all((losses.values >= low - 1e-9) & (losses.values <= high + 1e-9)):
      raise ValueError(
        f"Expected `losses` to lie in the declared range [{low}, {high}], without NaN, got"
        " others; declare the range that they lie in."
      )
    groups = clusters.declared_groups(losses) if groups is None else groups
    names = [str(row) for row in range(len(losses.values))] if groups is None else groups
    self.method = methods.get_method(method, clusters.unit_support(losses, names))
    prepared, support = self.method.prepare(losses.values, losses.support)
    losses = dataclasses.replace(losses, values=prepared, support=support)
    units = clusters.cluster_means(losses, names)
    self.values = np.clip(units.values, support.lower, support.upper)
    self.thresholds, self.support = np.asarray(units.thresholds), units.support
    _, self.unit_of_row = np.unique([str(name) for name in names], return_inverse=True)

  def choose(
    self, draws: npt.ArrayLike, tolerances: Sequence[float], error_rate: float
  ) -> np.ndarray:
    """The lowest threshold that fixed sequence testing certifies, for sets and tolerances.

    Args:
      draws: [num_sets, set_size] units of each calibration set, in the tested order.
      tolerances: [num_tolerances] deltas, each its own test.
      error_rate: epsilon.

    Returns:
      [num_sets, num_tolerances] columns of `values`; -1 where nothing is certified.
    """
    draws, levels = np.asarray(draws), np.asarray(tolerances, np.float64)
    chosen = np.full((len(draws), len(levels)), -1)
    for column in range(self.values.shape[1]):
      # Who has certified everything so far goes on.
      sets, positions = np.nonzero(chosen == column - 1)
      going, places = np.unique(sets, return_inverse=True)
      losses = self.values[:, column][draws[going].T]
      sample = methods.Sample(losses, self.support, levels[positions], error_rate)
      passed = self.method.certifies(sample, places)
      chosen[sets[passed], positions[passed]] = column
    return chosen
