"""The `calm` command on a toy model: the pipeline, and every kind of bad input by name."""

import io
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from calm import checkpoints
from calm.calibrate import Calibration, generations
from calm.calibrate.losses import sequence_losses
from calm.commands import cli, monitoring
from calm.data import vocabulary
from calm.t5 import network
from tests import toys

SIZES = toys.Config(vocab_size=264, num_pieces=259, num_decoder_layers=3)
DECODE = ["--max_input_length=32", "--max_decode_length=6", "--batch_size=2"]
# Five prompts certify little: one loss of 1 among them has a p-value of 0.19 against 0.7.
CERTIFIES = ["--tolerance=0.7", "--error_rate=0.2"]
TEXTS = ["a few words", "another prompt", "b", "the fourth one", "the end"]


def save_model(directory, params=None):
  checkpoints.save(
    directory,
    toys.params(SIZES, 1) if params is None else params,
    network.T5Config(**toys.network_fields(SIZES)),
    vocabulary=vocabulary.ByteVocabulary(extra_ids=0),
  )
  return directory


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  return save_model(tmp_path_factory.mktemp("cli") / "model")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
  path = tmp_path_factory.mktemp("cli") / "prompts.jsonl"
  rows = [{"id": f"p{i}", "input": t, "target": [t]} for i, t in enumerate(TEXTS)]
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


@pytest.fixture(autouse=True)
def cache_in_tmp(monkeypatch, tmp_path):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)


def generate(model, prompts, output, *more):
  options = ["--thresholds=0.9,0.5", *DECODE, *more]
  return cli.main(
    ["generate", f"--model={model}", f"--prompts={prompts}", f"--output={output}", *options]
  )


@pytest.fixture(scope="module")
def cached(model, prompts, tmp_path_factory):
  output = tmp_path_factory.mktemp("cli") / "cache"
  assert generate(model, prompts, output) == 0
  return output


def failure(capsys, arguments) -> str:
  assert cli.main(arguments) == 2
  return capsys.readouterr().err


def test_generate_calibrate_infer(model, prompts, cached, tmp_path, capsys):
  loaded = generations.load(cached)
  assert loaded.ids == tuple(f"p{i}" for i in range(len(TEXTS)))
  assert [len(records) for records in loaded.records] == [len(TEXTS)] * 2
  saved = tmp_path / "calibration.json"
  assert cli.main(["calibrate", str(cached), *CERTIFIES, f"--output={saved}"]) == 0
  calibration = Calibration.load(saved)
  assert calibration.certified
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
  assert cli.main(["calibrate", str(cached), *CERTIFIES, f"--output={saved}"]) == 0
  infer = ["infer", f"--model={model}", f"--prompts={prompts}", f"--calibration={saved}"]
  assert "`measure`" in failure(capsys, [*infer, "--measure=state"])
  assert cli.main([*infer, "--measure=state", "--void_guarantee"]) == 0
  assert "No guarantee" in capsys.readouterr().err


def test_killed_generate_goes_on(model, prompts, cached, tmp_path):
  cut = tmp_path / "cut"
  shutil.copytree(cached, cut)
  file = cut / generations.threshold_file(0.5)
  whole = file.read_bytes()
  file.write_bytes(whole[: len(whole) // 2])
  manifest = json.loads((cut / generations.MANIFEST).read_text())
  manifest["checksums"] = {}
  (cut / generations.MANIFEST).write_text(json.dumps(manifest))
  assert generate(model, prompts, cut) == 0
  ours, theirs = generations.load(cut), generations.load(cached)
  by_id = lambda records: {record.id: record for record in records}
  assert [by_id(r) for r in ours.records] == [by_id(r) for r in theirs.records]


def test_reuse_and_plain_decoding_give_identical_caches(model, prompts, cached, tmp_path):
  plain = tmp_path / "plain"
  assert generate(model, prompts, plain, "--no_reuse") == 0
  assert generations.load(plain).records == generations.load(cached).records


def test_engines_give_identical_caches(model, prompts, cached, tmp_path):
  """Up to the rounding of confidences: texts, tokens and exits."""
  of = lambda folder: [
    [(r.id, r.prediction, r.tokens, r.exit_layers) for r in records]
    for records in generations.load(folder).records
  ]
  for engine in ("eager", "compacted"):
    assert generate(model, prompts, tmp_path / engine, f"--engine={engine}") == 0
    assert of(tmp_path / engine) == of(cached)


def test_one_prompt_and_standard_input(model, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"one prompt\n")))
  arguments = ["--prompts=-", "--threshold=never", "--colour", *DECODE]
  assert cli.main(["infer", f"--model={model}", *arguments]) == 0
  captured = capsys.readouterr()
  assert len(captured.out.splitlines()) >= 1
  assert captured.out.startswith("[3]") and "[n]: the text that follows" in captured.err
  assert "1 prompt, threshold never, 3.00 of 3" in captured.err


@pytest.mark.parametrize(
  ("option", "words"),
  [
    ("--thresholds=0.5,0.9", "descending"),
    ("--thresholds=1.5,0.9", "[0, 1]"),
    ("--measure=entropy", "`measure`"),
    ("--propagation=none", "`propagation`"),
    ("--exit_layers=9", "`allowed` exit layers"),
    ("--exit_layers=two", "`--exit_layers`"),
    ("--dtype=float17", "`dtype`"),
    ("--limit=0", "`--limit`"),
    ("--thresholds=never,0.9", "[0, 1]"),
    ("--gin_file=missing.gin", "`--gin_file`"),
    ("--batch_size=0", "`batch_size`"),
    ("--temperature=-1", "`temperature`"),
    ("--engine=steam", "['compacted', 'deferred', 'eager']"),
  ],
)
def test_bad_options_are_named(model, prompts, tmp_path, capsys, option, words):
  arguments = ["generate", f"--model={model}", f"--prompts={prompts}", *DECODE, option]
  assert words in failure(capsys, [*arguments, f"--output={tmp_path / 'out'}"])
  assert not (tmp_path / "out" / generations.MANIFEST).exists()


def test_a_missing_gin_file_is_one_message(tmp_path, capsys, caplog):
  arguments = ["train", "--gin_file=missing.gin", f"--output_dir={tmp_path}"]
  assert "Got missing.gin" in failure(capsys, arguments)
  assert caplog.text == ""


@pytest.mark.parametrize("option", ["--tolerance=0", "--tolerance=1.2", "--error_rate=0"])
def test_rates_outside_their_range(cached, capsys, option):
  name = option[2:].split("=")[0]
  assert f"`{name}`" in failure(capsys, ["calibrate", str(cached), option])


def test_too_few_prompts_are_refused_before_the_work(cached, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(sequence_losses, "compute", None)  # any work would fail
  output = f"--output={tmp_path / 'c.json'}"
  text = failure(capsys, ["calibrate", str(cached), "--tolerance=0.1", output])
  assert "5 prompts are too few" in text
  assert "at least 29 are needed" in text
  rates = ["--tolerance=0.5", "--testing=bonferroni", output]
  assert "at least 6 are needed" in failure(capsys, ["calibrate", str(cached), *rates])
  assert not (tmp_path / "c.json").exists()


def test_signed_losses_are_refused_below_their_floor_only(cached, tmp_path, capsys):
  arguments = ["calibrate", str(cached), "--kind=risk_signed", "--metric=token_f1"]
  output = f"--output={tmp_path / 'c.json'}"
  assert "at least 6 are needed" in failure(capsys, [*arguments, "--error_rate=0.01", output])
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


def test_rates_are_checked_before_anything_is_decoded(model, prompts, tmp_path, capsys):
  output = tmp_path / "out"
  for command, option, words in (
    ("demo", "--tolerance=2", "`tolerance`"),
    ("demo", "--error_rate=0", "`error_rate`"),
    ("demo", "--limit=3", "3 prompts are too few"),
    ("demo", "--limit=0", "`--limit`"),
    ("generate", "--error_rate=1", "`error_rate`"),
    ("generate", "--tolerance=0.1", "5 prompts are too few"),
  ):
    options = [f"--model={model}", f"--output={output}", option]
    if command == "generate":
      options += [f"--prompts={prompts}", "--until-certified", *DECODE]
    assert words in failure(capsys, [command, *options])
  assert not output.exists()


def test_demo_decodes_calibrates_and_compares(model, tmp_path, capsys):
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


def test_bytes_that_are_no_text_are_no_prompts(model, tmp_path, capsys, monkeypatch):
  infer = ["infer", f"--model={model}", "--threshold=0.5"]
  content = b"fine\ncaf\xe9\n"
  (tmp_path / "latin.txt").write_bytes(content)
  monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
  for path, name in (("-", "standard input"), (tmp_path / "latin.txt", "latin.txt")):
    message = failure(capsys, [*infer, f"--prompts={path}"])
    assert "0xe9 in line 2 of " in message and name in message
  (tmp_path / "half.jsonl").write_text('{"input": "half of \\ud83d"}\n')
  message = failure(capsys, [*infer, f"--prompts={tmp_path / 'half.jsonl'}"])
  assert "half.jsonl:1" in message and "character 9" in message
  (tmp_path / "blank.txt").write_text("\n \n")
  assert "no line with text" in failure(capsys, [*infer, f"--prompts={tmp_path / 'blank.txt'}"])


def test_bad_prompt_files(model, tmp_path, capsys):
  infer = ["infer", f"--model={model}", "--threshold=0.5"]
  empty, latin = tmp_path / "empty.jsonl", tmp_path / "latin.jsonl"
  empty.write_text("")
  latin.write_bytes(b'{"id": "a", "input": "caf\xe9"}\n')
  assert "empty.jsonl" in failure(capsys, [*infer, f"--prompts={empty}"])
  assert "UTF-8" in failure(capsys, [*infer, f"--prompts={latin}"])
  assert "missing.jsonl" in failure(capsys, [*infer, f"--prompts={tmp_path / 'missing.jsonl'}"])


def test_bad_checkpoints(model, prompts, tmp_path, capsys):
  infer = ["infer", f"--prompts={prompts}", "--threshold=0.5"]
  message = failure(capsys, [*infer, f"--model={tmp_path / 'nowhere'}"])
  assert "`--model`" in message and "missing" in message
  cut = tmp_path / "cut"
  shutil.copytree(model, cut)
  weights = (cut / "params.safetensors").read_bytes()
  (cut / "params.safetensors").write_bytes(weights[: len(weights) // 2])
  assert "params.safetensors" in failure(capsys, [*infer, f"--model={cut}"])
  options = tmp_path / "options"
  shutil.copytree(model, options)
  for text, words in (('{"a', "JSON"), ('{"beams": 4}', "['beams']")):
    (options / "inference.json").write_text(text)
    message = failure(capsys, [*infer, f"--model={options}"])
    assert "inference.json" in message and words in message
  big = tmp_path / "big"
  shutil.copytree(model, big)
  record = json.loads((big / "vocabulary.json").read_text())
  (big / "vocabulary.json").write_text(json.dumps(record | {"extra_ids": 125}))
  assert "264" in failure(capsys, [*infer, f"--model={big}"])


def test_parameters_that_are_not_numbers(prompts, tmp_path, capsys):
  from safetensors import numpy as safetensors

  model = save_model(tmp_path / "nan")
  tensors = safetensors.load_file(model / "params.safetensors")
  tensors["decoder/decoder_norm/scale"][0] = np.nan
  safetensors.save_file(tensors, model / "params.safetensors")
  message = failure(
    capsys, ["infer", f"--model={model}", f"--prompts={prompts}", "--threshold=0.5"]
  )
  assert "decoder/decoder_norm/scale" in message


def test_unwritable_output(model, prompts, tmp_path, capsys):
  blocked = tmp_path / "file"
  blocked.write_text("")
  arguments = ["generate", f"--model={model}", f"--prompts={prompts}", *DECODE]
  message = failure(capsys, [*arguments, f"--output={blocked / 'below'}"])
  assert str(blocked) in message
  # Of one file, before it is decoded: the model is not even looked for.
  infer = ["infer", "--model=nowhere", f"--prompts={prompts}", "--threshold=0.5"]
  for output in (blocked / "out.jsonl", tmp_path / "none" / "out.jsonl", tmp_path):
    message = failure(capsys, [*infer, f"--output={output}"])
    assert "`--output`" in message and str(output) in message


def test_a_promise_is_watched_while_it_is_served(model, prompts, cached, tmp_path, capsys):
  saved, state = tmp_path / "calibration.json", tmp_path / "monitor.jsonl"
  assert cli.main(["calibrate", str(cached), *CERTIFIES, f"--output={saved}"]) == 0
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


def test_neither_calibration_nor_threshold(prompts, capsys):
  assert "`--calibration` or `--threshold`" in failure(
    capsys, ["infer", f"--prompts={prompts}"]
  )


def test_dashes_are_underscores_and_colour_is_color(model, prompts, capsys):
  named = [f"--model={model}", f"--prompts={prompts}", "--threshold=never", "--limit=1"]
  dashed = [option.replace("max_", "max-").replace("_length", "-length") for option in DECODE]
  assert cli.main(["infer", *named, *dashed, "--color"]) == 0
  # Values stay as they are.
  assert "Got 'a-b'" in failure(capsys, ["infer", *named, "--exit-layers=a-b"])


@pytest.mark.parametrize(
  ("arguments", "meant"),
  [
    (["calibrate", "runs", "--tolerence=0.2"], "did you mean --tolerance?"),
    (["infer", "--prompts=-", "--treshold", "never"], "did you mean --threshold?"),
    (["calbrate", "runs"], "did you mean calibrate?"),
    (["calibrate", "runs", "--zzz"], "unrecognized arguments: --zzz\n"),
  ],
)
def test_what_was_probably_meant_is_named(capsys, arguments, meant):
  with pytest.raises(SystemExit, match="2"):
    cli.main(arguments)
  assert meant in capsys.readouterr().err


def test_help_of_every_command_teaches():
  for command in cli.COMMANDS:
    made = subprocess.run(
      [sys.executable, "-m", "calm", command, "--help"], capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    assert f"calm {command}" in made.stdout.split("usage:")[1]


def test_calibrate_needs_no_jax(cached, tmp_path):
  script = (
    "import sys\n"
    "from calm.commands import cli\n"
    f"code = cli.main(['calibrate', {str(cached)!r}, '--tolerance=0.7',"
    f" '--output={tmp_path / 'c.json'}'])\n"
    "loaded = {'jax', 'flax', 'tensorflow', 'seqio'} & set(sys.modules)\n"
    "sys.exit(str(loaded) if loaded else code)\n"
  )
  made = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
  assert made.returncode == 0, made.stderr


def test_until_certified_stops_early_and_replays(model, prompts, tmp_path):
  output = tmp_path / "sequential"
  rates = ["--tolerance=0.7", "--error_rate=0.2"]
  assert generate(model, prompts, output, "--until-certified", *rates) == 0
  decided = Calibration.load(output / "calibration.json")
  cached = generations.load(output)
  assert cached.sequential
  assert decided.sequential
  assert sum(map(len, cached.records)) < 2 * len(TEXTS)
  again = tmp_path / "again.json"
  assert cli.main(["calibrate", str(output), *rates, f"--output={again}"]) == 0
  assert Calibration.load(again) == decided


def test_until_certified_by_group_replays_by_group(model, prompts, tmp_path, capsys):
  rows = [json.loads(line) for line in prompts.read_text().splitlines()]
  grouped = tmp_path / "grouped.jsonl"
  sources = ["one", "one", "two", "two", "three"]
  lines = [json.dumps(row | {"source": s}) for row, s in zip(rows, sources, strict=True)]
  grouped.write_text("\n".join(lines) + "\n")
  rates = ["--tolerance=0.9", "--error_rate=0.2"]
  early = ["--until-certified", "--by_group", *rates]
  output = tmp_path / "sequential"
  assert generate(model, grouped, output, *early) == 0
  decided, cached = Calibration.load(output / "calibration.json"), generations.load(output)
  assert decided.sequential and decided.clusters and cached.by_group
  assert decided.certified and decided.num_examples == 3
  again = tmp_path / "again.json"
  replayed = ["calibrate", str(output), *rates, f"--output={again}"]
  assert "--by_group" in failure(capsys, replayed)
  assert cli.main([*replayed, "--by_group"]) == 0
  assert Calibration.load(again) == decided
  bare = ["generate", f"--model={model}", f"--prompts={prompts}", "--output", str(again)]
  assert "group" in failure(capsys, [*bare, "--thresholds=0.9,0.5", *DECODE, *early])


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
  assert generate(model, prompts, output, f"--gin_file={file}", binding) == 0
  procedure = generations.load(output).procedure
  assert procedure is not None
  assert procedure.measure == "state"
  assert procedure.schedule == {"name": "decaying", "temperature": 2.0, "max_length": 6}
