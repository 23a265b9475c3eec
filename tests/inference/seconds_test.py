"""Measured seconds go with a calibration, and say where it is not faster."""

import dataclasses

import numpy as np
import pytest

from calm import calibrate
from calm.calibrate import Calibration
from calm.inference import timing

FAST = timing.Pair(1, 8, full=4.0, early=2.0, speedup=2.0, end_to_end=1.5)
SLOW = dataclasses.replace(FAST, batch_size=8, early=5.0, speedup=0.8)


def made(losses=0.0):
  table = np.full((100, 2), losses)
  return calibrate.calibrate(table, [0.9, 0.5], tolerance=0.1, error_rate=0.05)


@pytest.mark.parametrize(
  ("measured", "words"),
  [
    (timing.Seconds(FAST), ""),
    (timing.Seconds(FAST, dataclasses.replace(FAST, batch_size=8)), ""),
    (timing.Seconds(FAST, SLOW), "x0.80 in batches of 8"),
    (timing.Seconds(dataclasses.replace(FAST, speedup=1.0), SLOW), "x1.00 one at a time and"),
  ],
)
def test_what_was_measured_is_kept_in_the_file_and_told(measured, words, tmp_path):
  timing.note(made(), measured).save(tmp_path / "calibration.json")
  read = Calibration.load(tmp_path / "calibration.json")
  assert timing.noted(read) == measured and read.threshold == 0.5
  told = timing.warning(read)
  assert words in told and bool(told) == bool(words)


def test_nothing_is_said_where_nothing_was_measured_or_certified():
  assert timing.noted(made()) is None and timing.warning(made()) == ""
  assert timing.note(made(), None) == made()
  assert timing.warning(made(1.0), timing.Seconds(SLOW)) == ""
  # A note of that name that somebody else wrote.
  for note in (
    {"single": {"speedup": 0.5}, "batched": None},
    "slow",
    {"single": dict.fromkeys(vars(FAST), "x"), "batched": None},
  ):
    provenance = dataclasses.replace(made().provenance, notes={"seconds": note})
    assert timing.noted(dataclasses.replace(made(), provenance=provenance)) is None
