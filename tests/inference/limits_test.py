"""Long limits: prompts go through stages where sums' last bits decide nothing."""

import pytest

from calm import inference
from calm.decode import compiled, staged
from tests.inference.predictor_test import OPTIONS, TEXTS, save


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
  return save(tmp_path_factory.mktemp("model") / "toy")


def test_a_long_limit_is_reached_in_stages_and_changes_no_text(directory, monkeypatch):
  long = inference.load(directory, **OPTIONS | {"max_decode_length": 40})
  monkeypatch.setattr(staged, "FIRST", 5)
  assert staged.lengths(40) == (5, 20, 40)
  before = compiled.num_made("Stage.begin")
  in_stages = long.generate(TEXTS, threshold=0.6)
  assert compiled.num_made("Stage.begin") > before
  monkeypatch.setattr(staged, "FIRST", 40)
  whole = long.generate(TEXTS, threshold=0.6)
  assert in_stages.texts == whole.texts
  assert [o.exit_layers for o in in_stages] == [o.exit_layers for o in whole]


def test_where_last_bits_decide_one_program_decodes(directory, monkeypatch):
  monkeypatch.setattr(staged, "FIRST", 2)
  before = compiled.num_made("Stage.begin"), compiled.num_made("Program.decode")
  narrow = inference.load(directory, **OPTIONS, dtype="bfloat16")
  narrow.generate(TEXTS[:1], threshold=0.6)
  after = compiled.num_made("Stage.begin"), compiled.num_made("Program.decode")
  assert after == (before[0], before[1] + 1)
