"""Measured seconds go with a calibration, and say where it is not faster."""

import dataclasses

import numpy as np
import pytest

from calm import calibrate
from calm.calibrate import Calibration, seconds

FAST = seconds.Pair(1, 8, full=4.0, early=2.0, speedup=2.0, end_to_end=1.5)
SLOW = dataclasses.replace(FAST, batch_size=8, early=5.0, speedup=0.8)


@pytest.fixture(scope="module")
def calibration():
  return calibrate.calibrate(np.zeros((100, 2)), [0.9, 0.5], tolerance=0.1, error_rate=0.05)


@pytest.mark.parametrize(
  ("measured", "words"),
  [
    (seconds.Seconds(FAST), ""),
    (seconds.Seconds(FAST, dataclasses.replace(FAST, batch_size=8)), ""),
    (seconds.Seconds(FAST, SLOW), "x0.80 in batches of 8"),
    (seconds.Seconds(dataclasses.replace(FAST, speedup=1.0), SLOW), "x1.00 one at a time and"),
  ],
)
def test_what_was_measured_is_kept_in_the_file_and_told(calibration, measured, words, tmp_path):
  noted = seconds.noted(calibration, measured)
  noted.save(tmp_path / "calibration.json")
  read = Calibration.load(tmp_path / "calibration.json")
  assert seconds.of(read) == measured and read.threshold == calibration.threshold
  told = seconds.warning(read)
  assert words in told and bool(told) == bool(words)


def test_nothing_is_said_where_nothing_was_measured_or_certified(calibration):
  assert seconds.of(calibration) is None and seconds.warning(calibration) == ""
  assert seconds.noted(calibration, None) is calibration
  losses = np.ones((100, 2))
  never = calibrate.calibrate(losses, [0.9, 0.5], tolerance=0.1, error_rate=0.05)
  assert seconds.warning(never, seconds.Seconds(SLOW)) == ""
  # A note of that name that somebody else wrote.
  for note in (
    {"single": {"speedup": 0.5}},
    "slow",
    {"single": dict.fromkeys(vars(FAST), "x")},
  ):
    provenance = dataclasses.replace(calibration.provenance, notes={"seconds": note})
    assert seconds.of(dataclasses.replace(calibration, provenance=provenance)) is None
