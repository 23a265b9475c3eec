"""Thresholds as text and JSON, and grids: read, refused by name, and the defaults."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm.calibrate import thresholds


@given(st.floats(0.0, 1.0))
def test_text_of_a_threshold_reads_back_as_the_same_float(threshold):
  assert thresholds.parse_threshold(thresholds.format_threshold(threshold)) == threshold
  assert thresholds.parse_threshold(thresholds.threshold_to_json(threshold)) == threshold


@pytest.mark.parametrize("value", ["never", " Never ", math.inf])
def test_never_is_infinity_and_no_number(value):
  assert thresholds.parse_threshold(value) == math.inf == thresholds.NEVER_EXIT
  assert thresholds.format_threshold(math.inf) == "never"
  assert thresholds.threshold_to_json(math.inf) == "never"


@pytest.mark.parametrize("value", ["1.5", "-0.1", "nan", "inf", "x", "", None, math.nan, 2.0])
def test_anything_else_is_refused_by_name(value):
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
    ([0.5, 0.6], "descending order"),
    ([1.1, 0.6], r"\[0, 1\], got 1.1"),
  ],
)
def test_errors_say_what_is_wrong_with_a_grid(grid, message):
  with pytest.raises(ValueError, match=message):
    thresholds.validate_grid(grid)


def test_default_grids():
  even = np.round(np.arange(0.95, 0.0, -0.05), 2)
  for measure in ("softmax", "classifier"):
    np.testing.assert_array_equal(thresholds.default_grid(measure), even)
  state = thresholds.default_grid("state")
  assert state[0] == 0.999 and state[-1] == 0.5
  gaps = 1.0 - state
  np.testing.assert_allclose(gaps[1:] / gaps[:-1], gaps[1] / gaps[0], rtol=2e-3)
  # Slacks of 0, 0.05, ..., 0.95: the safest keeps every text as full depth has it.
  np.testing.assert_allclose(thresholds.default_grid("verified"), 1.0 - 0.05 * np.arange(20))
  for measure in ("softmax", "state", "verified"):
    grid = thresholds.default_grid(measure)
    np.testing.assert_array_equal(thresholds.validate_grid(grid), grid)
  with pytest.raises(ValueError, match=r"`measure` to be one of .* got 'oracle'"):
    thresholds.default_grid("oracle")
