"""The script that times limits: what it holds beside each other, and that it can say no."""

import pathlib

import numpy as np
import pytest

from calm import exits, inference
from calm.decode import compiled, staged

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


def test_a_grid_is_decoded_with_the_whole_limit_and_in_stages(script, model):
  made = script.grids(model.with_options(measure="softmax", exit_layers=(2, 4)), TEXTS)
  begun = compiled.num_made("Program.resume")
  line = script.line({}, made, len(TEXTS), repeats=1)
  # Caches of 2, 4 and 8 positions; and of 8 alone, which is a program of the stages too.
  assert compiled.num_made("Program.resume") == begun + 3
  assert line["same tokens"] == "yes" and line["tokens a text"] > 8
  assert staged.FIRST == 2
