"""Generate, calibrate, infer on a toy model, as a shell runs them."""

import io
import json
import shlex
import shutil
import subprocess
import sys

import pytest

from calm.calibrate import Calibration, generations, ledger
from calm.commands import cli, monitoring
from tests.commands import toy

pytestmark = pytest.mark.usefixtures("cache_in_tmp")


def test_generate_calibrate_infer(model, prompts, cached, tmp_path, capsys):
  loaded = generations.load(cached)
  assert loaded.ids == tuple(f"p{i}" for i in range(len(toy.TEXTS)))
  assert [len(records) for records in loaded.records] == [len(toy.TEXTS)] * 2
  saved = tmp_path / "calibration.json"
  assert cli.main(["calibrate", str(cached), *toy.CERTIFIES, f"--output={saved}"]) == 0
  calibration = Calibration.load(saved)
  assert calibration.certified and calibration.threshold == 0.99
  assert [row.mean for row in calibration.rows] == [0.0, 1.0]
  assert calibration.procedure == loaded.procedure
  out = tmp_path / "out.jsonl"
  infer = ["infer", f"--model={model}", f"--prompts={prompts}", f"--calibration={saved}"]
  capsys.readouterr()
  assert cli.main([*infer, f"--output={out}"]) == 0
  assert "With probability at least" in " ".join(capsys.readouterr().err.split())
  lines = [json.loads(line) for line in out.read_text().splitlines()]
  column = loaded.thresholds.tolist().index(calibration.threshold)
  expected = [record.prediction for record in loaded.records[column]]
  assert [line["prediction"] for line in lines] == expected
  refilled = tmp_path / "refilled.jsonl"
  options = ["--refill", "--batch_size=2", f"--output={refilled}"]
  assert cli.main([*infer, *options]) == 0
  of = lambda line: (line["id"], line["tokens"], line["exit_layers"])
  assert [of(json.loads(line)) for line in refilled.read_text().splitlines()] == [
    of(line) for line in lines
  ]


def test_infer_refuses_another_procedure(model, prompts, cached, tmp_path, capsys):
  saved = tmp_path / "calibration.json"
  assert cli.main(["calibrate", str(cached), *toy.CERTIFIES, f"--output={saved}"]) == 0
  infer = ["infer", f"--model={model}", f"--prompts={prompts}", f"--calibration={saved}"]
  assert "`measure`" in toy.failure(capsys, [*infer, "--measure=state"])
  assert cli.main([*infer, "--measure=state", "--void_guarantee"]) == 0
  assert "No guarantee" in capsys.readouterr().err


def test_infer_serves_the_configuration_that_was_chosen(model, tmp_path, capsys):
  """One of several folders: its measure and schedule come with the calibration."""
  prompts = tmp_path / "prompts.txt"
  prompts.write_text("".join(f"{text} {number}\n" for text in toy.TEXTS for number in range(6)))
  ways = {"softmax": (), "decaying": ("--temperature=4",), "state": ("--measure=state",)}
  for name, options in ways.items():
    assert toy.generate(model, prompts, tmp_path / name, *options) == 0
  saved, rates = tmp_path / "chosen.json", ["--tolerance=0.5", "--error_rate=0.05"]
  pairs = ["--configurations", *(f"{name}={tmp_path / name}" for name in ways)]
  assert cli.main(["calibrate", *pairs, *rates, f"--output={saved}"]) == 0
  found = Calibration.load(saved)
  assert found.certified
  place = found.promise.place(found.column("rejected"))
  family = found.promise.configurations[place].partition(" at ")[0]
  cached = generations.load(tmp_path / family)
  assert found.procedure == cached.procedure
  capsys.readouterr()
  out = tmp_path / "out.jsonl"
  infer = ["infer", f"--model={model}", f"--prompts={prompts}", f"--calibration={saved}"]
  assert cli.main([*infer, f"--output={out}"]) == 0
  assert f"({family} at {found.threshold}) expected" in " ".join(
    capsys.readouterr().err.split()
  )
  lines = [json.loads(line) for line in out.read_text().splitlines()]
  column = cached.records[cached.thresholds.tolist().index(found.threshold)]
  assert [(line["prediction"], line["exit_layers"]) for line in lines] == [
    (record.prediction, list(record.exit_layers)) for record in column
  ]
  other = {"softmax": "state"}.get(cached.procedure.measure, "softmax")
  assert "`measure`: expected" in toy.failure(capsys, [*infer, f"--measure={other}"])
  # Where nothing is certified it is the full model that is served.
  rates[0] = "--tolerance=0.0001"
  assert cli.main(["calibrate", *pairs, *rates, f"--output={saved}"]) == 0
  never = tmp_path / "never.jsonl"
  assert cli.main([*infer, f"--output={never}"]) == 0
  lines = [json.loads(line) for line in never.read_text().splitlines()]
  assert [line["prediction"] for line in lines] == [r.prediction for r in cached.full]


def test_killed_generate_goes_on(model, prompts, cached, tmp_path):
  cut = tmp_path / "cut"
  shutil.copytree(cached, cut)
  file = cut / generations.threshold_file(0.5)
  whole = file.read_bytes()
  file.write_bytes(whole[: len(whole) // 2])
  manifest = json.loads((cut / generations.MANIFEST).read_text())
  manifest["checksums"] = {}
  (cut / generations.MANIFEST).write_text(json.dumps(manifest))
  assert toy.generate(model, prompts, cut) == 0
  ours, theirs = generations.load(cut), generations.load(cached)
  by_id = lambda records: {record.id: record for record in records}
  assert [by_id(r) for r in ours.records] == [by_id(r) for r in theirs.records]


def test_reuse_and_plain_decoding_give_identical_caches(model, prompts, cached, tmp_path):
  plain = tmp_path / "plain"
  assert toy.generate(model, prompts, plain, "--no_reuse") == 0
  assert generations.load(plain).records == generations.load(cached).records


def test_engines_give_identical_caches(model, prompts, cached, tmp_path):
  """Up to the rounding of confidences: texts, tokens and exits."""
  of = lambda folder: [
    [(r.id, r.prediction, r.tokens, r.exit_layers) for r in records]
    for records in generations.load(folder).records
  ]
  for engine in ("eager", "compacted"):
    assert toy.generate(model, prompts, tmp_path / engine, f"--engine={engine}") == 0
    assert of(tmp_path / engine) == of(cached)


def test_one_prompt_and_standard_input(model, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"one prompt\n")))
  arguments = ["--prompts=-", "--threshold=never", "--colour", *toy.DECODE]
  assert cli.main(["infer", f"--model={model}", *arguments]) == 0
  captured = capsys.readouterr()
  assert len(captured.out.splitlines()) >= 1
  assert captured.out.startswith("[3]") and "[n]: the text that follows" in captured.err
  assert "1 prompt, threshold never, 3.00 of 3" in captured.err


def test_signed_losses_are_refused_below_their_floor_only(cached, tmp_path, capsys):
  arguments = ["calibrate", str(cached), "--kind=risk_signed", "--metric=token_f1"]
  output = f"--output={tmp_path / 'c.json'}"
  assert "at least 6 prompts" in toy.failure(capsys, [*arguments, "--error_rate=0.01", output])
  assert cli.main([*arguments, output]) == 0
  text = " ".join(capsys.readouterr().out.split())
  assert (
    "where nothing changes, 'auto' cannot with fewer than" in text and "20% changed" in text
  )
  assert not Calibration.load(tmp_path / "c.json").certified


def test_a_pilot_tells_the_power_before_the_work(cached, tmp_path, capsys):
  output = f"--output={tmp_path / 'c.json'}"
  pilot = [f"--pilot={cached}", "--tolerance=0.7"]
  assert cli.main(["calibrate", str(cached), *pilot, output]) == 0
  text = capsys.readouterr().out
  assert text.index("Power by prompts") < text.index("mean loss")
  assert "20 " in text and "prompts" in text


def test_demo_decodes_calibrates_and_compares(model, tmp_path, capsys, monkeypatch):
  short = tmp_path / "short"
  shutil.copytree(model, short)
  own = {"max_decode_length": 4, "max_input_length": 1024, "grid": [0.9, 0.6, 0.3]}
  (short / "inference.json").write_text(json.dumps(own))
  output = tmp_path / "demo"
  arguments = ["demo", f"--model={short}", f"--output={output}", "--limit=2", "--examples=1"]
  assert cli.main([*arguments, "--tolerance=0.9", "--error_rate=0.2"]) == 0
  text = capsys.readouterr().out
  steps = ("1. Decode", "2. Calibrate", "3. Decode", "speed-up", "Measured risk", "4. Outputs")
  assert [text.index(step) for step in steps] == sorted(text.index(step) for step in steps)
  for word in ("certified", "full depth", "early exit", "tolerance 0.9", "reference", "early "):
    assert word in text, word
  assert Calibration.load(output / "calibration.json").procedure is not None
  assert generations.load(output).thresholds.tolist() == own["grid"]
  (line,) = (output / ledger.LEDGER).read_text().splitlines()
  assert json.loads(line)["count"] == 2 and json.loads(line)["question"]["tolerance"] == 0.9
  # What it ends with is a command that works as it stands.
  said, piped = text.splitlines()[-1].split(" | ")
  monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a long text\n")))
  assert said == "echo 'a long text'" and piped.startswith("calm infer ")
  assert cli.main(shlex.split(piped)[1:]) == 0
  said = capsys.readouterr().err
  assert "1 prompt, threshold " in said
  assert "nothing that a guarantee" not in said, "the promise goes along"


def test_a_promise_is_watched_while_it_is_served(model, prompts, cached, tmp_path, capsys):
  saved, state = tmp_path / "calibration.json", tmp_path / "monitor.jsonl"
  assert cli.main(["calibrate", str(cached), *toy.CERTIFIES, f"--output={saved}"]) == 0
  infer = ["infer", f"--model={model}", f"--prompts={prompts}", f"--calibration={saved}"]
  watched = [*infer, f"--monitor={state}", "--monitor_share=1", "--fail_on_alarm"]
  assert cli.main(watched) == 0
  assert "Monitor: 5 of these prompts were decoded at full depth too" in (
    " ".join(capsys.readouterr().err.split())
  )
  for line in range(40):  # the promise has been broken since
    with open(state, "a") as file:
      file.write(f'{{"served": {5 + line}, "sampled": true}}\n')
      file.write(f'{{"number": {5 + line}, "loss": 1.0}}\n')
  assert cli.main(watched) == monitoring.ALARM_STATUS
  assert "ALARM" in capsys.readouterr().err
  assert cli.main([*infer, f"--monitor={state}", "--monitor_share=1"]) == 0


def test_calibrate_needs_no_jax(cached, tmp_path):
  script = (
    "import sys\n"
    "from calm.commands import cli\n"
    f"code = cli.main(['calibrate', {str(cached)!r}, '--tolerance=0.5',"
    f" '--output={tmp_path / 'c.json'}'])\n"
    "loaded = {'jax', 'flax', 'tensorflow', 'seqio'} & set(sys.modules)\n"
    "sys.exit(str(loaded) if loaded else code)\n"
  )
  made = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
  assert made.returncode == 0, made.stderr


def test_until_certified_stops_early_and_replays(model, prompts, tmp_path):
  output = tmp_path / "sequential"
  rates = [*toy.CERTIFIES]
  assert toy.generate(model, prompts, output, "--until-certified", *rates) == 0
  decided = Calibration.load(output / "calibration.json")
  cached = generations.load(output)
  assert cached.sequential
  assert decided.sequential
  # Five losses of 0 are needed for the first; two of 1 show that the second is hopeless.
  assert [len(records) for records in cached.records] == [5, 2]
  assert decided.threshold == 0.99
  again = tmp_path / "again.json"
  assert cli.main(["calibrate", str(output), *rates, f"--output={again}"]) == 0
  assert Calibration.load(again) == decided


def test_until_certified_asks_for_references_as_it_goes(model, prompts, tmp_path, capsys):
  bare = tmp_path / "bare.jsonl"
  rows = [json.loads(line) for line in prompts.read_text().splitlines()]
  lines = [json.dumps({"id": row["id"], "input": row["input"]}) for row in rows]
  bare.write_text("\n".join(lines) + "\n")
  output, answers = tmp_path / "sequential", tmp_path / "answers.jsonl"
  answers.write_text("")
  rates = ["--tolerance=0.9", "--error_rate=0.2", "--kind=risk_clipped"]
  arguments = [
    *("generate", f"--model={model}", f"--prompts={bare}", f"--output={output}"),
    *("--thresholds=0.9,0.5", *toy.DECODE, "--until_certified", *rates),
    f"--references={answers}",
  ]
  asked = 0
  while cli.main(arguments) != 0:
    assert "fill in `targets`" in " ".join(capsys.readouterr().err.split())
    wanted = [
      json.loads(line) for line in (output / "unlabelled.jsonl").read_text().splitlines()
    ]
    assert wanted and all(row["full"] not in row["early"] for row in wanted)
    with answers.open("a") as file:
      file.writelines(json.dumps({**row, "targets": ["a word"]}) + "\n" for row in wanted)
    asked += len(wanted)
    assert asked <= len(rows)
  decided = Calibration.load(output / "calibration.json")
  assert asked and decided.kind == "risk_clipped" and decided.sequential
  again = tmp_path / "again.json"
  replayed = ["calibrate", str(output), *rates, f"--output={again}", f"--references={answers}"]
  assert cli.main(replayed) == 0 and Calibration.load(again) == decided


def test_until_certified_counts_groups_and_replays_so(model, prompts, tmp_path, capsys):
  rows = [json.loads(line) for line in prompts.read_text().splitlines()]
  grouped = tmp_path / "grouped.jsonl"
  sources = ["one", "one", "two", "two", "three"]
  lines = [json.dumps(row | {"source": s}) for row, s in zip(rows, sources, strict=True)]
  grouped.write_text("\n".join(lines) + "\n")
  rates = ["--tolerance=0.9", "--error_rate=0.05"]
  early = ["--until-certified", *rates]
  output = tmp_path / "sequential"
  assert toy.generate(model, grouped, output, *early) == 0
  decided, cached = Calibration.load(output / "calibration.json"), generations.load(output)
  assert decided.sequential and decided.clusters and cached.by_group
  assert decided.certified and decided.num_examples == 3
  again = tmp_path / "again.json"
  replayed = ["calibrate", str(output), *rates, f"--output={again}"]
  assert "decided by cluster" in toy.failure(capsys, [*replayed, "--ungrouped"])
  assert cli.main(replayed) == 0
  assert Calibration.load(again) == decided
  # Prompts taken for independent all the same: the promise says so, and the replay as well.
  alone = tmp_path / "alone"
  assert toy.generate(model, grouped, alone, *early, "--ungrouped") == 0
  decided = Calibration.load(alone / "calibration.json")
  assert decided.groups_ignored and decided.num_examples == 5 and not decided.clusters
  replayed[1] = str(alone)
  assert "decided by prompt" in toy.failure(capsys, replayed)
  assert cli.main([*replayed, "--ungrouped"]) == 0
  assert Calibration.load(again) == decided


def test_gin_files_configure_decoding(model, prompts, tmp_path):
  file = tmp_path / "decode.gin"
  file.write_text(
    "from __gin__ import dynamic_registration\n"
    "from calm import inference\n"
    "from calm.exits import schedules\n"
    "inference.load:\n"
    "  measure = 'state'\n"
    "  schedule = @schedules.Decaying()\n"
    "schedules.Decaying:\n"
    "  temperature = 4.0\n"
    "  max_length = 6\n"
  )
  output = tmp_path / "out"
  binding = "--gin_bindings=schedules.Decaying.temperature = 2.0"
  assert toy.generate(model, prompts, output, f"--gin_file={file}", binding) == 0
  procedure = generations.load(output).procedure
  assert procedure is not None
  assert procedure.measure == "state"
  assert procedure.schedule == {"name": "decaying", "temperature": 2.0, "max_length": 6}
