"""What the experiments decode, on a toy model: wrong tokens, seconds, and the
command.
"""

import dataclasses
import itertools
import json
import types

import pytest

pytest.importorskip("jax", reason="needs the extra 'decode'")
pytest.importorskip("matplotlib", reason="needs the extra 'report'")
pytest.importorskip("jinja2", reason="needs the extra 'report'")

from calm import checkpoints, exits, inference
from calm.calibrate import Prompt
from calm.commands import cli
from calm.data import vocabulary
from calm.exits import schedules
from calm.fitting import choose, request
from calm.inference import grid, timing
from calm.paper import bench, experiments, sections
from calm.t5 import network
from tests import toys

SIZES = toys.Config(
  vocab_size=264, num_pieces=259, num_encoder_layers=1, num_decoder_layers=2
)
TEXTS = [
  "a few words",
  "another",
  "b",
  "one that is longer than others",
  "the end",
  "é",
]
PROMPTS = [Prompt(f"p{i}", text, (text,)) for i, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp("experiments") / "model"
  config = network.T5Config(**toys.network_fields(SIZES))
  words = vocabulary.ByteVocabulary(extra_ids=0)
  checkpoints.save(path, toys.params(SIZES, 1), config, vocabulary=words)
  return path


@pytest.fixture(scope="module")
def plain(folder):
  lengths = {"max_input_length": 40, "max_decode_length": 6}
  return inference.load(folder, measure="softmax", batch_size=4, **lengths)


@pytest.fixture(scope="module")
def model(plain):
  return plain.changed(one_shape=True)


@pytest.fixture(scope="module")
def full(model):
  return grid.with_rule(model, PROMPTS, exits.StaticExit())


def test_one_token_is_another_choice_and_what_came_before_stays(model, full):
  tenth = experiments.RULES["sampling-based"]
  shallow = experiments.RULES["layer-based"]
  changed = grid.with_rule(model, PROMPTS, tenth, 2.0)
  reached = [row for row, record in enumerate(full) if len(record.tokens) > 2]
  assert len(reached) > 2
  for row in reached:
    before = full[row].tokens
    after = changed[row].tokens
    assert after[:2] == before[:2] and after[2] != before[2]
  # The tenth choice: nine tokens are likelier there.
  first = grid.with_rule(model, PROMPTS, experiments.PerturbedRule(rank=1), 2.0)
  assert [r.tokens for r in first] == [r.tokens for r in full]
  changed = grid.with_rule(model, PROMPTS, shallow, 0.0)
  own = grid.with_rule(model, PROMPTS, exits.StaticExit(1))
  assert [r.tokens[0] for r in changed] == [r.tokens[0] for r in own]


def test_perturbed_outputs_are_compared_where_they_have_that_token(
  model, full, tmp_path
):
  task = dataclasses.replace(bench.task("synopsis"), metric="rouge_l")
  of = bench.Bench(model, task, tuple(PROMPTS), (), tmp_path)
  of.__dict__.update(whole=model, static={2: full})
  found = experiments.perturbations(of).curves
  before, _, after = (
    found[name] for name in (experiments.UNPERTURBED, *experiments.RULES)
  )
  assert [point.threshold for point in after] == list(
    experiments.positions(full)
  )
  reach = [
    sum(len(record.tokens) > point.threshold for record in full)
    for point in after
  ]
  assert [point.num_prompts for point in after] == reach and after[
    0
  ].identical < 0.5
  assert {point.identical for point in before} == {1.0}


def test_a_rest_in_one_round_makes_no_way_to_leave_slow(plain, monkeypatch):
  candidates = [
    choose.Candidate("softmax", (1,)),
    choose.Candidate("state", (1,)),
  ]
  tried = [
    choose.Tried(c, (0.9, 0.5), (0.0, 0.1), threshold=0.5) for c in candidates
  ]
  readings = itertools.count()

  # A second between any two readings, and a minute more at one of them.
  def clock():
    return (reading := next(readings)) + 60.0 * (reading > 6)

  monkeypatch.setattr(timing, "time", types.SimpleNamespace(perf_counter=clock))
  found, full = choose.timed(
    plain, PROMPTS, tried, (2, 2), lambda share, text: None
  )
  assert [entry.speedup for entry in found] == [1.0, 1.0] and full == 1000.0


def test_one_command_makes_the_report_and_goes_on(
  folder, tmp_path, monkeypatch, capsys
):
  task = dataclasses.replace(
    bench.task("enfr"), max_input_length=80, max_decode_length=5
  )
  monkeypatch.setattr(bench, "TASKS", {task.name: task})
  data = tmp_path / "data" / task.name
  output = tmp_path / "report"
  data.mkdir(parents=True)
  for split in ("validation", "test"):
    names = [f"{split}{i}" for i in range(len(TEXTS))]
    rows = (
      {
        "id": name,
        "source": name,
        "input": f"w{i} {text}",
        "target": [f"<b>{text}"],
      }
      for i, (name, text) in enumerate(zip(names, TEXTS, strict=True))
    )
    (data / f"{split}.jsonl").write_text(
      "".join(json.dumps(row) + "\n" for row in rows)
    )
  command = [
    *(
      "report",
      f"--model={folder}",
      f"--data={data.parent}",
      f"--output={output}",
    ),
    *(
      "--tasks",
      "enfr",
      "--limit=6",
      "--measures",
      "softmax",
      "--timed=1",
      "--rounds=1",
    ),
    *("--examples=2", "--step=0.5", f"--geometric_model={folder}"),
  ]
  assert cli.main(command) == 0
  first = capsys.readouterr().out
  assert "translation: oracle" in first and "\nTranslation: " in first
  page = (output / "index.html").read_text("utf-8")
  assert "Trainings side by side" in page and 'data-panel="debian_enfr"' in page
  assert "<b>" not in page.split("<main>")[1]
  made = {path.name for path in output.rglob("*.csv")}
  assert {"table2_debian_enfr.csv", "table1.csv"} <= made
  stored = {
    path: path.read_bytes() for path in (output / "cache").rglob("*.json*")
  }
  # Nothing is decoded or timed again: no step of either is announced.
  assert cli.main(command) == 0
  second = capsys.readouterr().out.split("Translation: ")[0]
  assert "translation: oracle" not in second and "seconds" not in second
  assert {
    p: p.read_bytes() for p in (output / "cache").rglob("*.json*")
  } == stored


def test_a_users_own_rows_are_split_as_fit_splits_them(
  folder, tmp_path, monkeypatch, capsys
):
  rows = tmp_path / "my rows.jsonl"
  output = tmp_path / "report"
  found = []
  lines = [
    json.dumps({"source": f"s{i}", "input": f"w{i}", "target": "b"})
    for i in range(120)
  ]
  rows.write_text("\n".join(lines) + "\n", "utf-8")
  monkeypatch.setattr(
    sections, "sections", lambda made: found.extend(made) or []
  )
  monkeypatch.setattr(sections, "headline", lambda task: ("x1", "nothing"))
  command = [
    "report",
    f"--model={folder}",
    f"--train={rows}",
    f"--output={output}",
  ]
  command += ["--measures", "softmax", "--metric=token_f1", "--limit=4"]
  assert cli.main(command) == 0 and "nothing" in capsys.readouterr().out
  (task,) = found
  assert (task.settings.name, task.settings.title) == ("my_rows", "my rows")
  options = request.FitOptions(metric="token_f1")
  prompts = request.read_rows(rows, options)
  limits, _ = request.length_limits(inference.load(folder), prompts, None)
  splits = request.split(prompts, options, trains=True)
  assert (
    task.validation == splits.validation[:4]
    and task.test == splits.calibration[:4]
  )
  assert task.predictor.options.max_input_length == limits["max_input_length"]


@pytest.mark.parametrize(
  ("options", "words"),
  [
    (["--tasks=squad"], "to be a task of"),
    (["--tasks=qa"], "debian_qa"),
    (["--step=0"], "`step`"),
    (["--measures", "softmax@a"], "`measures`"),
    (["--measures", "verified@2,4"], "`measures`"),
  ],
)
def test_what_cannot_be_reported_is_named(
  folder, tmp_path, capsys, options, words
):
  command = [
    "report",
    f"--model={folder}",
    f"--data={tmp_path}",
    f"--output={tmp_path / 'o'}",
  ]
  assert cli.main([*command, *options]) == 2
  assert words in capsys.readouterr().err


def test_a_name_says_measure_layers_and_decay(plain):
  packed = inference.load("packed", max_decode_length=24)
  options = bench.under(packed, "softmax@2,4/8").options
  assert (options.measure, options.exit_layers) == ("softmax", (2, 4))
  assert options.schedule == schedules.Decaying(8.0, 24)
  assert bench.under(packed, "softmax").options.schedule == schedules.Constant()
  # Drafts with slack: every model can draft.
  rule = bench.under(packed, "verified@2").options.rule
  assert isinstance(rule, exits.Speculative) and rule.draft_layer == 2
  assert bench.available(packed, ("probe/2", "verified@2")) == ("verified@2",)
  assert bench.available(plain, bench.MEASURES) == (
    "softmax",
    "classifier",
    "state",
  )
  with pytest.raises(ValueError, match="a measure that the model has"):
    bench.available(plain, ["shortlist"])
