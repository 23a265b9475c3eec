"""Long limits: prompts go through stages where sums' last bits decide nothing."""

import pytest

from calm import calibrate, exits, inference
from calm.decode import compiled, staged
from calm.exits import schedules
from calm.inference import grid
from calm.t5 import costs as costs_lib
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


def test_exact_texts_are_reached_in_stages_too(directory, monkeypatch):
  long = inference.load(directory, **OPTIONS | {"max_decode_length": 40})
  monkeypatch.setattr(staged, "FIRST", 5)
  before = compiled.num_made("Stage.begin")
  rule = exits.Speculative(1, draft_head="full", adapts=False)
  exact = long.generate(TEXTS, rule=rule)
  assert compiled.num_made("Stage.begin") > before
  full = long.generate(TEXTS, rule=exits.StaticExit())
  assert exact.texts == full.texts and max(len(o.tokens) for o in exact) > 5


def test_a_grid_is_decoded_in_stages_too(directory, tmp_path, monkeypatch):
  long = inference.load(directory, **OPTIONS | {"max_decode_length": 40})
  prompts = [calibrate.Prompt(str(i), text) for i, text in enumerate(TEXTS)]
  levels, made = (0.8, 0.6), {}
  for first in (40, 5):
    monkeypatch.setattr(staged, "FIRST", first)
    writer = calibrate.open_writer(
      tmp_path / str(first), prompts=prompts, thresholds=levels, procedure=long.procedure
    )
    before = compiled.num_made("Program.resume")
    grid.generate(long, prompts, levels, writer)
    made[first] = [writer.completed_records(x) for x in (schedules.NEVER_EXIT, *levels)]
  # What the whole limit was decoded with is compiled already; shorter stages are not.
  assert compiled.num_made("Program.resume") > before
  strip = lambda level: {i: (r.prediction, r.exit_layers) for i, r in level.items()}
  assert list(map(strip, made[5])) == list(map(strip, made[40]))


def test_where_last_bits_decide_one_program_decodes(directory, monkeypatch):
  monkeypatch.setattr(staged, "FIRST", 2)
  before = compiled.num_made("Stage.begin"), compiled.num_made("Program.decode_packed")
  narrow = inference.load(directory, **OPTIONS, dtype="bfloat16")
  narrow.generate(TEXTS[:1], threshold=0.6)
  after = compiled.num_made("Stage.begin"), compiled.num_made("Program.decode_packed")
  assert after == (before[0], before[1] + 1)


def test_costs_count_the_caches_that_a_text_has_read(directory, monkeypatch):
  model = inference.load(directory, **OPTIONS | {"max_decode_length": 8})
  monkeypatch.setattr(staged, "FIRST", 4)
  rule = exits.StaticExit()
  longest = max(model.generate(TEXTS, rule=rule), key=lambda output: len(output.tokens))
  layers = longest.exit_layers
  assert len(layers) > 4  # made with short caches, then with long ones
  step = lambda positions: model.step_costs(longest.input_length, rule, positions)
  got = model.total_costs([longest], rule)
  first, rest = costs_lib.totals(step(4), [layers[:4]]), costs_lib.totals(step(8), [layers[4:]])
  assert got == first + rest
  monkeypatch.setattr(staged, "FIRST", 8)
  assert model.total_costs([longest], rule).full.bytes > got.full.bytes
