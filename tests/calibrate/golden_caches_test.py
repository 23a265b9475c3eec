"""Caches and ledgers that earlier versions wrote are read as they were then, bit for bit."""

import json
import pathlib

import pytest

from calm.calibrate import Calibration
from tests.calibrate import golden_caches

FOLDER = pathlib.Path(__file__).parents[1] / "golden" / "caches"
EXPECTED = json.loads((FOLDER / "expected.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def found():
  return golden_caches.read(FOLDER)


@pytest.mark.parametrize("name", EXPECTED)
def test_what_was_written_before_is_read_as_before(found, name):
  assert found[name] == EXPECTED[name]


def test_calibrations_of_then_are_read_and_equal():
  kinds = EXPECTED["whole"]["losses"]
  for kind in golden_caches.KINDS:
    calibration = kinds[kind]["calibration"]
    assert Calibration.from_json(calibration).to_json() == calibration


def test_the_golden_caches_are_all_looked_at(found):
  assert set(found) == set(EXPECTED) and found["merging"]["same"] == [True, True]
