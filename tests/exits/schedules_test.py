"""Threshold schedules: Eq. 5 by hand, and what never may drift."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calm.exits import schedules

NEVER = schedules.NEVER_EXIT


@pytest.mark.parametrize(
  ("threshold", "temperature", "generated", "expected"),
  [
    (0.5, 4.0, 0, 0.55),  # 0.45 + 0.1
    (0.5, 4.0, 16, 0.4867879441),  # 0.45 + 0.1 / e
    (0.5, 4.0, 64, 0.4518315639),  # 0.45 + 0.1 / e^4
    (1.0, 4.0, 0, 1.0),  # 0.9 + 0.1
    (1.0, 4.0, 16, 0.9367879441),  # below 1 though lambda is 1
    (0.0, 4.0, 0, 0.1),
    (0.0, 4.0, 64, 0.0018315639),
    (0.5, 0.0, 0, 0.55),  # tau = 0 is 0.9 lambda + 0.1, not lambda
    (0.5, 0.0, 63, 0.55),
  ],
)
def test_eq_5_by_hand(threshold, temperature, generated, expected):
  schedule = schedules.Decaying(temperature, 64)
  got = schedule(jnp.float32(threshold), jnp.int32(generated))
  np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize(
  "schedule",
  [
    schedules.Constant(),
    schedules.Decaying(0.0, 8),
    schedules.Decaying(4.0, 8),
  ],
)
def test_never_stays_infinite_and_only_never(schedule):
  thresholds = jnp.array([1.0, NEVER, 0.0])
  for generated in (0, 3, 100):
    got = jax.jit(schedule)(thresholds, jnp.int32(generated))
    assert jnp.isinf(got).tolist() == [False, True, False]
    assert jnp.delete(got, 1, assume_unique_indices=True).max() <= 1


def test_schedules_by_name():
  assert schedules.schedule("constant") == schedules.Constant()
  made = schedules.schedule("decaying", temperature=2.0, max_length=9)
  assert made == schedules.Decaying(2.0, 9)
  with pytest.raises(
    ValueError, match=r"`schedule`.*\['constant', 'decaying'\].*'linear'"
  ):
    schedules.schedule("linear")
  for numbers in ((-1.0, 8), (math.nan, 8), (4.0, 0)):
    with pytest.raises(
      ValueError, match="`temperature` >= 0 and a whole `max_length` >= 1"
    ):
      schedules.Decaying(*numbers)
