"""What can be made can be loaded: texts of a calibration are refused before there is one."""

import numpy as np
import pytest

from calm.calibrate import (
  Calibration,
  SequenceLosses,
  calibrate,
  calibrate_configurations,
  from_texts,
  metrics,
  risks,
)
from calm.calibrate.risks import Risk

RATES = dict(tolerance=0.1, error_rate=0.05)
VALUES = np.zeros((200, 2))
GRID = [0.9, 0.5]
FULL = [f"answer {row}" for row in range(100)]
ODD = ["a\u00a0b", "a\nb", "\x1b[31m", "\ud800", "x" * 5000]
PLAIN = ["a b", "日本"]


def losses(**fields):
  return SequenceLosses(VALUES, GRID, **fields)


def configured(family="a", name="r", seed="ab", **fields):
  risk = Risk(losses(**fields), 0.1, name=name)
  return calibrate_configurations(
    {family: [risk]}, {family: VALUES}, error_rate=0.05, seed=seed
  )


# Everything that takes a text which is stored, or said of what is stored.
MADE = {
  "knob": lambda text: calibrate(losses(knobs=(text, "other")), **RATES),
  "knob of texts": lambda text: calibrate(from_texts(FULL, {text: FULL}), **RATES),
  "metric": lambda text: calibrate(losses(metric=text), **RATES),
  "metric function": lambda text: calibrate(
    from_texts(FULL, {"a": FULL}, metric=metrics.Metric(text, lambda *_: 1.0)), **RATES
  ),
  "kind": lambda text: calibrate(losses(kind=text), **RATES),
  "label": lambda text: calibrate(
    losses(), **RATES, promise=risks.EveryGroup(labels=[text] * 100 + ["other"] * 100)
  ),
  "risk": lambda text: configured(name=text),
  "risk's kind": lambda text: configured(name="", kind=text),
  "configuration": lambda text: configured(family=text),
}


@pytest.mark.parametrize("made", MADE.values(), ids=MADE)
def test_what_is_made_is_loaded_and_else_not_made(made, tmp_path):
  for text in PLAIN:
    found = made(text)
    found.save(tmp_path / "c.json")
    assert found.certified and Calibration.load(tmp_path / "c.json") == found
  for text in ODD:
    with pytest.raises(ValueError, match=r"Expected .* printable characters, got ") as caught:
      made(text)
    assert repr(text)[:-1][:20] in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize("seed", ["xyz", "AB", "a" * 65, "a\n"])
def test_seeds_that_would_not_be_loaded_are_not_tried(seed):
  for made in (
    lambda: calibrate(VALUES, GRID, **RATES, seed=seed),
    lambda: configured(seed=seed),
  ):
    with pytest.raises(ValueError, match=r"Expected `seed` .*64 hexadecimal digits, got "):
      made()
