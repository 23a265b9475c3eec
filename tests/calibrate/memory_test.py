"""A table of losses is tested in little more memory than it fills itself."""

import tracemalloc

import numpy as np
import pytest

from calm.calibrate import calibrate


def peak(method: str) -> float:
  """Most bytes held while a table is calibrated, itself included, in tables."""
  generator = np.random.default_rng(0)
  losses = generator.random((30_000, 100)) * (generator.random((30_000, 100)) < 0.1)
  grid = np.linspace(0.99, 0.0, 100)
  tracemalloc.start()
  try:
    calibrate(losses, grid, tolerance=0.1, error_rate=0.05, method=method)
    return 1.0 + tracemalloc.get_traced_memory()[1] / losses.nbytes
  finally:
    tracemalloc.stop()


@pytest.mark.parametrize("method", ["auto", "paper"])
def test_a_table_is_calibrated_in_at_most_four_times_its_memory(method):
  assert peak(method) <= 4.0
