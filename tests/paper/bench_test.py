"""What the experiments decode, on a toy model: wrong tokens, one shape, seconds, all of it."""

import dataclasses
import itertools
import json
import re
import types

import pytest

pytest.importorskip("jax", reason="needs the extra 'decode'")
pytest.importorskip("matplotlib", reason="needs the extra 'report'")
pytest.importorskip("jinja2", reason="needs the extra 'report'")

from calm import checkpoints, exits, fitting, inference
from calm.calibrate import Prompt
from calm.commands import cli
from calm.data import vocabulary
from calm.exits import schedules
from calm.fitting import choose
from calm.fitting.choose import Candidate
from calm.inference import grid, timing
from calm.paper import bench, findings, perturbations, sections, tasks
from calm.t5 import network
from tests import toys

SIZES = toys.Config(vocab_size=264, num_pieces=259, num_encoder_layers=1, num_decoder_layers=2)
TEXTS = ["a few words", "another", "b", "one that is longer than others", "the end", "é"]
PROMPTS = [Prompt(f"p{i}", text, (text,)) for i, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp("experiments") / "model"
  checkpoints.save(
    path,
    toys.params(SIZES, 1),
    network.T5Config(**toys.network_fields(SIZES)),
    vocabulary=vocabulary.ByteVocabulary(extra_ids=0),
  )
  return path


@pytest.fixture(scope="module")
def plain(folder):
  return inference.load(
    folder, measure="softmax", max_input_length=40, max_decode_length=6, batch_size=4
  )


@pytest.fixture(scope="module")
def model(plain):
  return grid.one_shape(plain)


@pytest.fixture(scope="module")
def full(model):
  return grid.with_rule(model, PROMPTS, exits.StaticExit())


def tokens(records):
  return [record.tokens for record in records]


@pytest.mark.parametrize("position", [0, 2])
def test_one_token_is_the_tenth_choice_and_what_came_before_stays(model, full, position):
  rule = perturbations.RULES["sampling-based"]
  changed = grid.with_rule(model, PROMPTS, rule, float(position))
  reached = [row for row, record in enumerate(full) if len(record.tokens) > position]
  assert len(reached) > 2
  for row in reached:
    before, after = full[row].tokens, changed[row].tokens
    assert after[:position] == before[:position] and after[position] != before[position]
  # The tenth choice: nine tokens are likelier there.
  first = perturbations.PerturbedRule(rank=1)
  assert tokens(grid.with_rule(model, PROMPTS, first, float(position))) == tokens(full)


def test_one_token_is_the_first_layers_own(model):
  rule = perturbations.RULES["layer-based"]
  changed = grid.with_rule(model, PROMPTS, rule, 0.0)
  shallow = grid.with_rule(model, PROMPTS, exits.StaticExit(1))
  assert [r.tokens[0] for r in changed] == [r.tokens[0] for r in shallow]


def test_perturbed_outputs_are_compared_where_they_have_that_token(model, full, tmp_path):
  task = dataclasses.replace(tasks.task("synopsis"), metric="rouge_l")
  of = bench.Bench(model, task, tuple(PROMPTS), (), tmp_path)
  of.__dict__.update(whole=model, static={2: full})
  found = perturbations.perturbations(of).curves
  before, _, after = (found[name] for name in (perturbations.UNPERTURBED, *perturbations.RULES))
  assert [point.threshold for point in after] == list(perturbations.positions(full))
  assert after[0].num_prompts == 6 and after[0].identical < 0.5
  reach = [sum(len(record.tokens) > point.threshold for record in full) for point in after]
  assert [point.num_prompts for point in after] == reach
  assert 0 <= after[0].similarity <= 1 and {point.identical for point in before} == {1.0}


def test_a_rest_in_one_round_makes_no_way_to_leave_slow(plain, monkeypatch):
  candidates = [Candidate("softmax", (1,)), Candidate("state", (1,))]
  tried = [choose.Tried(c, (0.9, 0.5), (0.0, 0.1), threshold=0.5) for c in candidates]
  readings = itertools.count()
  # A second between any two readings, and a minute more at one of them.
  clock = lambda: (reading := next(readings)) + 60.0 * (reading > 6)
  monkeypatch.setattr(timing, "time", types.SimpleNamespace(perf_counter=clock))
  silent = lambda share, text: None
  found, full = choose.timed(plain, PROMPTS, tried, (2, 2), silent)
  assert [entry.speedup for entry in found] == [1.0, 1.0] and full == 1000.0


def test_one_command_makes_the_report_and_goes_on(folder, tmp_path, monkeypatch, capsys):
  task = dataclasses.replace(tasks.task("enfr"), max_input_length=80, max_decode_length=5)
  monkeypatch.setattr(tasks, "TASKS", {task.name: task})
  data, output = tmp_path / "data" / task.name, tmp_path / "report"
  data.mkdir(parents=True)
  for split in ("validation", "test"):
    rows = [
      {
        "id": f"{split}{i}",
        "source": f"{split}{i}",
        "input": f"w{i} {t}",
        "target": [f"<b>{t}"],
      }
      for i, t in enumerate(TEXTS)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (data / f"{split}.jsonl").write_text(lines, "utf-8")
  command = [
    *("report", f"--model={folder}", f"--data={data.parent}", f"--output={output}"),
    *("--tasks", "enfr", "--limit=6", "--measures", "softmax", "--timed=1", "--rounds=1"),
    *("--examples=2", "--step=0.5", f"--geometric_model={folder}"),
  ]
  assert cli.main(command) == 0
  first = capsys.readouterr().out
  assert "translation: oracle" in first and "\nTranslation: " in first
  steps = re.findall(r"^\[(\d+)/(\d+)\]", first, re.M)
  numbers, totals = [int(number) for number, _ in steps], {int(total) for _, total in steps}
  assert numbers == sorted(numbers) and len(totals) == 1 and numbers[-1] <= min(totals)
  page = (output / "index.html").read_text("utf-8")
  assert "Trainings side by side" in page and 'data-panel="debian_enfr"' in page
  assert "<b>" not in page.split("<main>")[1]
  made = sorted(path.name for path in output.rglob("*.csv"))
  assert "table2_debian_enfr.csv" in made and "table1.csv" in made
  stored = {path: path.read_bytes() for path in (output / "cache").rglob("*.json*")}

  assert cli.main(command) == 0
  second = capsys.readouterr().out
  # Nothing is decoded or timed again: no step is announced.
  assert (
    "translation: oracle" not in second and "seconds" not in second.split("Translation: ")[0]
  )
  assert {p: p.read_bytes() for p in (output / "cache").rglob("*.json*")} == stored


def test_a_users_own_rows_are_split_as_fit_splits_them(folder, tmp_path, monkeypatch, capsys):
  rows, output = tmp_path / "my rows.jsonl", tmp_path / "report"
  lines = [json.dumps({"source": f"s{i}", "input": f"w{i}", "target": "b"}) for i in range(120)]
  rows.write_text("\n".join(lines) + "\n", "utf-8")
  found = []
  monkeypatch.setattr(sections, "sections", lambda made: found.extend(made) or [])
  monkeypatch.setattr(findings, "headline", lambda task: ("x1", "nothing"))
  command = ["report", f"--model={folder}", f"--train={rows}", f"--output={output}"]
  command += ["--measures", "softmax", "--metric=token_f1", "--limit=4"]
  assert cli.main(command) == 0 and "nothing" in capsys.readouterr().out
  (task,) = found
  assert (task.settings.name, task.settings.title) == ("my_rows", "my rows")
  splits, limits = fitting.held_out(
    inference.load(folder), rows, fitting.FitOptions(metric="token_f1")
  )
  assert task.validation == splits.validation[:4] and task.test == splits.calibration[:4]
  assert task.predictor.options.max_input_length == limits["max_input_length"]
  with pytest.raises(SystemExit):
    cli.main([*command, f"--data={tmp_path}"])
  assert "not allowed with" in capsys.readouterr().err


@pytest.mark.parametrize(
  ("options", "words"),
  [
    (["--data={}", "--tasks=squad"], "to be a task of"),
    (["--data={}/none", "--tasks=qa"], "debian_qa"),
    (["--data={}", "--step=0"], "`step`"),
    (["--data={}", "--error_rate=1"], "`error_rate`"),
    *(
      (["--data={}", "--measures", o], "`measures`")
      for o in ("sotfmax", "softmax@a", "verified")
    ),
    *((["--data={}", "--measures", o], "`measures`") for o in ("softmax/-1", "verified@2,4")),
  ],
)
def test_what_cannot_be_reported_is_named(folder, tmp_path, capsys, options, words):
  options = [option.format(tmp_path) for option in options]
  assert cli.main(["report", f"--model={folder}", f"--output={tmp_path / 'o'}", *options]) == 2
  assert words in capsys.readouterr().err


def test_measures_that_a_model_lacks_are_left_out(plain):
  assert bench.available(plain, bench.MEASURES) == ("softmax", "classifier", "state")
  with pytest.raises(ValueError, match="a measure that the model has"):
    bench.available(plain, ["shortlist"])


def test_a_name_says_measure_layers_and_decay():
  packed = inference.load("packed", max_decode_length=24)
  options = bench.under(packed, "softmax@2,4/8").options
  assert (options.measure, options.exit_layers) == ("softmax", (2, 4))
  assert options.schedule == schedules.Decaying(8.0, 24)
  assert bench.under(packed, "softmax").options.schedule == schedules.Constant()
  assert bench.available(packed, ("softmax@2,4/8", "probe/2")) == ("softmax@2,4/8",)
  # Drafts with slack: every model can draft.
  assert bench.Options(measures=("verified@2",)).measures == ("verified@2",)
  rule = bench.under(packed, "verified@2").options.rule
  assert isinstance(rule, exits.Speculative) and rule.draft_layer == 2
  assert bench.available(packed, ("probe", "verified@2")) == ("verified@2",)
