import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm.calibrate import Support, calibrate, p_values, planning


@given(st.floats(0.01, 0.9), st.floats(0.001, 0.5))
def test_it_is_exactly_where_losses_of_zero_certify(tolerance, error_rate):
  size = planning.min_calibration_size(tolerance, error_rate)
  level = math.log(error_rate) + 1e-8
  assert p_values.binomial(0, size, tolerance, log=True) <= level
  assert (
    size == 1
    or p_values.binomial(0, size - 1, tolerance, log=True) > level - 2e-8
  )
  assert p_values.convex_order(0, size, tolerance, log=True) <= level


def test_numbers_of_signed_losses_and_of_whole_quotients():
  # log 0.05 / log 0.45
  assert planning.min_calibration_size(0.1, 0.05, lower=-1.0) == 4
  # exactly log 0.25 / log 0.5
  assert planning.min_calibration_size(0.5, 0.25) == 2
  assert planning.min_calibration_size(0.5, 0.9) == 1


METHODS = ("betting_fixed_level", "paper", "convex_order", "betting")
RANGES = (Support(0.0, 0.5), Support(-1.0, 1.0), Support(-0.5, 2.0))


@pytest.mark.parametrize(
  ("method", "support"),
  [
    *((method, Support()) for method in METHODS),
    *(("betting_fixed_level", s) for s in RANGES),
  ],
)
@pytest.mark.parametrize("tolerance", [0.02, 0.1, 0.25])
def test_a_method_needs_what_calibrate_needs(method, support, tolerance):
  """Prompts whose losses are all the lowest, one fewer than planned or as
  many.
  """
  rates = dict(
    tolerance=tolerance, error_rate=0.05, method=method, support=support
  )
  size = planning.method_size(**rates)
  lowest = np.full((size, 1), support.lower)
  few = calibrate(lowest[1:], [0.5], **rates)
  assert (
    not few.certified and f"got {size - 1}, which are too few" in few.reason
  )
  assert calibrate(lowest, [0.5], **rates).certified
  assert str(size) in planning.refusal(size - 1, **rates)
  assert planning.refusal(size, **rates) == ""


def test_a_randomised_method_needs_what_certifies_in_half_of_all_draws():
  rates = dict(tolerance=0.1, error_rate=0.05)
  size = planning.method_size("auto", **rates)
  assert 22 == planning.min_calibration_size(0.1, 0.1) <= size
  assert size < planning.method_size("betting_fixed_level", **rates)
  seeds = [f"{number:04x}" for number in range(80)]

  def share(count):
    return np.mean(
      [
        calibrate(np.zeros((count, 1)), [0.5], **rates, seed=seed).certified
        for seed in seeds
      ]
    )

  assert share(size - 1) < 0.5 + 0.17 and share(size) > 0.5 - 0.17


def test_no_number_of_prompts_is_enough_for_next_to_nothing():
  assert planning.min_calibration_size(1e-300, 0.05) > 10**299
  assert planning.method_size("auto", 1e-300, 0.05) is None
  assert planning.method_size("paper", 1e-6, 0.05) is None
  found = calibrate(np.zeros((20, 1)), [0.5], tolerance=1e-300, error_rate=0.05)
  assert "got 20, which are too few" in found.reason
