"""What the experiments decode, on a toy model: wrong tokens, one shape, seconds, all of it."""

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
from calm.fitting import choose
from calm.fitting.candidates import Candidate
from calm.inference import grid, timing
from calm.paper import bench, perturbations, tasks
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
  rule = perturbations.RULES[perturbations.SAMPLING]
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
  rule = perturbations.RULES[perturbations.LAYER]
  changed = grid.with_rule(model, PROMPTS, rule, 0.0)
  shallow = grid.with_rule(model, PROMPTS, exits.StaticExit(1))
  assert [r.tokens[0] for r in changed] == [r.tokens[0] for r in shallow]


def test_perturbed_outputs_are_compared_where_they_have_that_token(model, full, tmp_path):
  task = dataclasses.replace(tasks.task("synopsis"), metric="rouge_l")
  own = tasks.OwnPrompts(tuple(PROMPTS), ())
  of = bench.Bench(model, task, own, tmp_path)
  of.__dict__.update(whole=model, static={2: full})
  result = perturbations.perturbations(of)
  assert [point.position for point in result.layer] == list(perturbations.positions(full))
  first, last = result.sampling[0], result.sampling[-1]
  assert first.prompts == 6 and first.changed > 0.5
  assert last.prompts == sum(len(record.tokens) > last.position for record in full)
  assert 0 <= first.similarity <= 1 and 0 <= first.quality <= 1


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


def small_tasks(monkeypatch, data):
  """Tasks as short as the toy; their names and metrics stay."""
  monkeypatch.setattr(
    tasks,
    "TASKS",
    {
      name: dataclasses.replace(task, max_input_length=80, max_decode_length=5)
      for name, task in tasks.TASKS.items()
    },
  )
  for name in ("debian_synopsis", "debian_qa", "debian_enfr"):
    (data / name).mkdir(parents=True)
    for split in ("validation", "test"):
      rows = [
        {"id": f"{split}{i}", "source": f"{split}{i}", "input": f"w{i} {t}", "target": [t]}
        for i, t in enumerate(TEXTS)
      ]
      lines = "".join(json.dumps(row) + "\n" for row in rows)
      (data / name / f"{split}.jsonl").write_text(lines, "utf-8")


def test_one_command_makes_the_report_and_goes_on(folder, tmp_path, monkeypatch, capsys):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
  data, output = tmp_path / "data", tmp_path / "report"
  small_tasks(monkeypatch, data)
  command = [
    *("report", f"--model={folder}", f"--data={data}", f"--output={output}", "--tasks", "enfr"),
    *("--limit=6", "--measures", "softmax", "--timed=1", "--rounds=1", "--examples=2"),
    *("--step=0.5", f"--geometric_model={folder}"),
  ]
  assert cli.main(command) == 0
  first = capsys.readouterr().out
  assert "translation: oracle" in first and "Table 2" in first
  page = (output / "index.html").read_text("utf-8")
  assert "Trainings side by side" in page and 'data-panel="debian_enfr"' in page
  made = sorted(path.name for path in output.rglob("*.csv"))
  assert "table2_debian_enfr.csv" in made and "table1.csv" in made
  stored = {path: path.read_bytes() for path in (output / "cache").rglob("*.json*")}

  assert cli.main(command) == 0
  second = capsys.readouterr().out
  # Nothing is decoded or timed again: no step is announced.
  assert "translation: oracle" not in second and "seconds" not in second.split("Table 2")[0]
  assert {p: p.read_bytes() for p in (output / "cache").rglob("*.json*")} == stored


def test_a_users_own_rows_are_split_as_fit_splits_them(folder, tmp_path, monkeypatch, capsys):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
  rows, output = tmp_path / "my rows.jsonl", tmp_path / "report"
  lines = [
    json.dumps({"id": f"r{i}", "source": f"s{i}", "input": f"w{i}", "target": f"<b>{i % 3}"})
    for i in range(120)
  ]
  rows.write_text("\n".join(lines) + "\n", "utf-8")
  command = ["report", f"--model={folder}", f"--train={rows}", f"--output={output}"]
  command += ["--measures", "softmax", "--metric=token_f1", "--limit=4", "--timed=1"]
  command += ["--rounds=1", "--step=0.5", "--ablated=2", "--batch_size=4"]
  assert cli.main(command) == 0
  said = capsys.readouterr().out
  assert "My rows: " in said and "] my rows: oracle" in said
  steps = [line for line in said.splitlines() if line.startswith("[")]
  numbers = [int(line[1:].split("/")[0]) for line in steps]
  planned = {int(line.split("/")[1].split("]")[0]) for line in steps}
  assert numbers == sorted(numbers) and planned == {max(numbers)}
  page = (output / "index.html").read_text("utf-8")
  assert "My rows: " in page and "token_f1" in page and "<b>" not in page.split("<main>")[1]
  with pytest.raises(SystemExit):
    cli.main([*command, f"--data={tmp_path}"])
  assert "not allowed with" in capsys.readouterr().err


def test_unknown_tasks_and_missing_data_are_named(folder, tmp_path, capsys):
  def run(*more):
    code = cli.main(["report", f"--model={folder}", f"--output={tmp_path / 'o'}", *more])
    return code, capsys.readouterr().err

  code, said = run(f"--data={tmp_path}", "--tasks=squad")
  assert code == 2 and "to be a task of" in said
  code, said = run(f"--data={tmp_path / 'none'}", "--tasks=qa")
  assert code == 2 and "debian_qa" in said and "does not exist" in said


def test_measures_that_a_model_lacks_are_left_out(plain):
  assert bench.available(plain, bench.MEASURES) == ("softmax", "classifier", "state")
  with pytest.raises(ValueError, match="a measure that the model has"):
    bench.available(plain, ["shortlist"])


@pytest.mark.parametrize(
  ("name", "value"),
  [
    *(("step", 0.0), ("error_rate", 1.0), ("error_rate", float("nan"))),
    *(("measures", (odd,)) for odd in ("sotfmax", "softmax@a", "softmax/-1", "verified")),
    ("measures", ("verified@2,4",)),
  ],
)
def test_options_without_meaning_are_refused(name, value):
  with pytest.raises(ValueError, match=f"`{name}`"):
    bench.Options(**{name: value})


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
