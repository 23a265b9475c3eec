"""What can be made can be loaded: texts of a calibration are refused before there is one."""

import numpy as np
import pytest

from calm.calibrate import (
  Calibration,
  SequenceLosses,
  calibrate,
  calibrate_configurations,
  risks,
)
from calm.calibrate.metrics import Metric

RATES = dict(tolerance=0.1, error_rate=0.05)
VALUES, GRID = np.zeros((200, 2)), [0.9, 0.5]


def losses(**fields):
  return SequenceLosses(VALUES, GRID, **fields)


def configured(family="a", name="r", seed="ab"):
  risk = risks.Risk(losses(), 0.1, name=name)
  return calibrate_configurations(
    {family: [risk]}, {family: VALUES}, error_rate=0.05, seed=seed
  )


def labelled(text):
  groups = risks.EveryGroup(labels=[text] * 100 + ["other"] * 100)
  return calibrate(losses(), **RATES, promise=groups)


# Everything that takes a text which is stored, or said of what is stored.
MADE = {
  "knob": lambda text: calibrate(losses(knobs=(text, "other")), **RATES),
  "metric": lambda text: calibrate(losses(metric=Metric(text, lambda *_: 1.0).name), **RATES),
  "kind": lambda text: calibrate(losses(kind=text), **RATES),
  "label": labelled,
  "risk": lambda text: configured(name=text),
  "configuration": lambda text: configured(family=text),
}


@pytest.mark.parametrize("made", MADE.values(), ids=MADE)
def test_what_is_made_is_loaded_and_else_not_made(made, tmp_path):
  found = made("日本 b")
  found.save(tmp_path / "c.json")
  assert found.certified and Calibration.load(tmp_path / "c.json") == found
  for text in ("a\nb", "\x1b[31m", "\ud800", "x" * 5000):
    with pytest.raises(ValueError, match=r"Expected .* printable characters, got ") as caught:
      made(text)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("seed", ["xyz", "a" * 65, "a\n"])
def test_seeds_that_would_not_be_loaded_are_not_tried(seed):
  for made in (
    lambda: calibrate(VALUES, GRID, **RATES, seed=seed),
    lambda: configured(seed=seed),
  ):
    with pytest.raises(ValueError, match=r"Expected `seed` .*64 hexadecimal digits, got "):
      made()
