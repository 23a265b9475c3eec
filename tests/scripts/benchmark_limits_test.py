"""The script that times limits: what it holds beside each other, and that it can say no."""

import pathlib

import numpy as np
import pytest

from calm import exits, inference
from calm.decode import staged

SCRIPTS = pathlib.Path(__file__).parents[2] / "scripts"
TEXTS = ["a", "some words", "b" * 9]


@pytest.fixture
def script(monkeypatch):
  monkeypatch.syspath_prepend(str(SCRIPTS))
  import benchmark_limits

  monkeypatch.setattr(staged, "FIRST", 2)
  monkeypatch.setattr(staged, "RATIO", 2)
  return benchmark_limits


@pytest.fixture(scope="module")
def model():
  return inference.load("packed", batch_size=3, max_decode_length=8)


@pytest.mark.parametrize("rule", [exits.StaticExit(), exits.Verified(2, draft_head="full")])
def test_a_row_says_milliseconds_and_whether_tokens_are_the_same(rule, script, model):
  full, setting = rule, {"rows": 3}
  line = script.line(setting, script.runs(model, TEXTS, full, np.inf, False), 3, repeats=2)
  assert line["rows"] == 3 and line["same tokens"] == "yes"
  assert line["tokens a text"] == 8  # none ends before its limit
  for name in ("one program", "stages"):
    assert line[f"{name}, ms a text"] > 0
  made = script.runs(model, TEXTS, full, np.inf, True)
  other = script.runs(model, TEXTS[::-1], full, np.inf, False)
  wrong = script.line(setting, made | {"stages": other["stages"]}, 3, repeats=1)
  assert wrong["same tokens"] == "no"
