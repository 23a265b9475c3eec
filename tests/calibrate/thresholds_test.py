"""Thresholds as text and JSON, and grids: read, refused by name, and the
defaults.
"""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm.calibrate import thresholds


@given(st.floats(0.0, 1.0) | st.just(math.inf))
def test_text_of_a_threshold_reads_back_as_the_same_float(threshold):
  assert (
    thresholds.parse_threshold(thresholds.format_threshold(threshold))
    == threshold
  )
  assert (
    thresholds.parse_threshold(thresholds.threshold_to_json(threshold))
    == threshold
  )


@pytest.mark.parametrize("value", ["1.5", "nan", "inf", "x", "", None, 2.0])
def test_anything_else_is_refused_by_name(value):
  assert thresholds.parse_threshold(" Never ") == math.inf
  with pytest.raises(ValueError, match=r"`threshold` to be .* got"):
    thresholds.parse_threshold(value)


@pytest.mark.parametrize(
  ("grid", "message"),
  [
    ([], "non-empty"),
    ([[0.9, 0.8]], "one-dimensional"),
    ([math.inf, 0.5], "no grid point"),
    ([0.5, math.nan], r"nan at position 1"),
    ([0.5, 0.5], "descend strictly"),
  ],
)
def test_errors_say_what_is_wrong_with_a_grid(grid, message):
  with pytest.raises(ValueError, match=message):
    thresholds.validate_grid(grid)


def test_default_grids():
  even = np.round(np.arange(0.95, 0.0, -0.05), 2)
  np.testing.assert_array_equal(thresholds.default_grid("softmax"), even)
  gaps = 1.0 - (state := thresholds.default_grid("state"))
  assert state[0] == 0.999 and state[-1] == 0.5
  np.testing.assert_allclose(gaps[1:] / gaps[:-1], gaps[1] / gaps[0], rtol=2e-3)
  # Slacks of 0, 0.05, ..., 0.95: the safest keeps every text as full depth has
  # it.
  np.testing.assert_allclose(
    thresholds.default_grid("verified"), 1.0 - 0.05 * np.arange(20)
  )
  with pytest.raises(
    ValueError, match=r"`measure` to be one of .* got 'oracle'"
  ):
    thresholds.default_grid("oracle")
