"""The `calm` command: its words and helps, and every kind of bad input by name."""

import io
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from calm.calibrate import generations
from calm.calibrate.losses import sequence_losses
from calm.commands import cli
from tests.commands import toy

pytestmark = pytest.mark.usefixtures("cache_in_tmp")


@pytest.mark.parametrize(
  ("option", "words"),
  [
    ("--thresholds=0.5,0.9", "descending"),
    ("--thresholds=1.5,0.9", "[0, 1]"),
    ("--measure=margin", "`measure`"),
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
  arguments = [
    "generate",
    f"--model={model}",
    f"--prompts={prompts}",
    *toy.DECODE,
    option,
  ]
  assert words in toy.failure(capsys, [*arguments, f"--output={tmp_path / 'out'}"])
  assert not (tmp_path / "out" / generations.MANIFEST).exists()


def test_a_missing_gin_file_is_one_message(tmp_path, capsys, caplog):
  arguments = ["train", "--gin_file=missing.gin", f"--output_dir={tmp_path}"]
  assert "got missing.gin" in toy.failure(capsys, arguments)
  assert caplog.text == ""


@pytest.mark.parametrize("option", ["--tolerance=0", "--tolerance=1.2", "--error_rate=0"])
def test_rates_outside_their_range(cached, capsys, option):
  name = option[2:].split("=")[0]
  assert f"`{name}`" in toy.failure(capsys, ["calibrate", str(cached), option])


def test_too_few_prompts_are_refused_before_the_work(cached, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(sequence_losses, "compute", None)  # any work would fail
  output = f"--output={tmp_path / 'c.json'}"
  text = toy.failure(capsys, ["calibrate", str(cached), "--tolerance=0.1", output])
  assert "got 5, which are too few" in text
  assert "at least 29 prompts" in text
  rates = ["--tolerance=0.5", "--testing=bonferroni", output]
  assert "at least 6 prompts" in toy.failure(capsys, ["calibrate", str(cached), *rates])
  assert not (tmp_path / "c.json").exists()


def test_rates_are_checked_before_anything_is_decoded(model, prompts, tmp_path, capsys):
  output = tmp_path / "out"
  for command, option, words in (
    ("demo", "--tolerance=2", "`tolerance`"),
    ("demo", "--error_rate=0", "`error_rate`"),
    ("demo", "--limit=3", "got 3, which are too few"),
    ("demo", "--limit=0", "`--limit`"),
    ("generate", "--error_rate=1", "`error_rate`"),
    ("generate", "--tolerance=0.1", "got 5, which are too few"),
  ):
    options = [f"--model={model}", f"--output={output}", option]
    if command == "generate":
      options += [f"--prompts={prompts}", "--until-certified", *toy.DECODE]
    assert words in toy.failure(capsys, [command, *options])
  assert not output.exists()


def test_bytes_that_are_no_text_are_no_prompts(model, tmp_path, capsys, monkeypatch):
  infer = ["infer", f"--model={model}", "--threshold=0.5"]
  content = b"fine\ncaf\xe9\n"
  (tmp_path / "latin.txt").write_bytes(content)
  monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
  for path, name in (("-", "standard input"), (tmp_path / "latin.txt", "latin.txt")):
    message = toy.failure(capsys, [*infer, f"--prompts={path}"])
    assert "0xe9 in line 2 of " in message and name in message
  (tmp_path / "half.jsonl").write_text('{"input": "half of \\ud83d"}\n')
  message = toy.failure(capsys, [*infer, f"--prompts={tmp_path / 'half.jsonl'}"])
  assert "half.jsonl:1" in message and "character 9" in message
  (tmp_path / "blank.txt").write_text("\n \n")
  assert "no line with text" in toy.failure(
    capsys, [*infer, f"--prompts={tmp_path / 'blank.txt'}"]
  )


def test_bad_prompt_files(model, tmp_path, capsys):
  infer = ["infer", f"--model={model}", "--threshold=0.5"]
  empty, latin = tmp_path / "empty.jsonl", tmp_path / "latin.jsonl"
  empty.write_text("")
  latin.write_bytes(b'{"id": "a", "input": "caf\xe9"}\n')
  assert "empty.jsonl" in toy.failure(capsys, [*infer, f"--prompts={empty}"])
  assert "UTF-8" in toy.failure(capsys, [*infer, f"--prompts={latin}"])
  assert "missing.jsonl" in toy.failure(
    capsys, [*infer, f"--prompts={tmp_path / 'missing.jsonl'}"]
  )


def test_bad_checkpoints(model, prompts, tmp_path, capsys):
  infer = ["infer", f"--prompts={prompts}", "--threshold=0.5"]
  message = toy.failure(capsys, [*infer, f"--model={tmp_path / 'nowhere'}"])
  assert "`--model`" in message and "missing" in message
  cut = tmp_path / "cut"
  shutil.copytree(model, cut)
  weights = (cut / "params.safetensors").read_bytes()
  (cut / "params.safetensors").write_bytes(weights[: len(weights) // 2])
  assert "params.safetensors" in toy.failure(capsys, [*infer, f"--model={cut}"])
  options = tmp_path / "options"
  shutil.copytree(model, options)
  for text, words in (('{"a', "JSON"), ('{"beams": 4}', "['beams']")):
    (options / "inference.json").write_text(text)
    message = toy.failure(capsys, [*infer, f"--model={options}"])
    assert "inference.json" in message and words in message
  big = tmp_path / "big"
  shutil.copytree(model, big)
  record = json.loads((big / "vocabulary.json").read_text())
  (big / "vocabulary.json").write_text(json.dumps(record | {"extra_ids": 125}))
  assert "264" in toy.failure(capsys, [*infer, f"--model={big}"])


def test_parameters_that_are_not_numbers(prompts, tmp_path, capsys):
  from safetensors import numpy as safetensors

  model = toy.save_model(tmp_path / "nan")
  tensors = safetensors.load_file(model / "params.safetensors")
  tensors["decoder/decoder_norm/scale"][0] = np.nan
  safetensors.save_file(tensors, model / "params.safetensors")
  message = toy.failure(
    capsys, ["infer", f"--model={model}", f"--prompts={prompts}", "--threshold=0.5"]
  )
  assert "decoder/decoder_norm/scale" in message


def test_unwritable_output(model, prompts, tmp_path, capsys):
  blocked = tmp_path / "file"
  blocked.write_text("")
  arguments = ["generate", f"--model={model}", f"--prompts={prompts}", *toy.DECODE]
  message = toy.failure(capsys, [*arguments, f"--output={blocked / 'below'}"])
  assert str(blocked) in message
  # Of one file, before it is decoded: the model is not even looked for.
  infer = ["infer", "--model=nowhere", f"--prompts={prompts}", "--threshold=0.5"]
  for output in (blocked / "out.jsonl", tmp_path / "none" / "out.jsonl", tmp_path):
    message = toy.failure(capsys, [*infer, f"--output={output}"])
    assert "`--output`" in message and str(output) in message


def test_neither_calibration_nor_threshold(prompts, capsys):
  assert "`--calibration`, `--threshold` or `--exact`" in toy.failure(
    capsys, ["infer", f"--prompts={prompts}"]
  )


def test_dashes_are_underscores_and_colour_is_color(model, prompts, capsys):
  named = [f"--model={model}", f"--prompts={prompts}", "--threshold=never", "--limit=1"]
  dashed = [
    option.replace("max_", "max-").replace("_length", "-length") for option in toy.DECODE
  ]
  assert cli.main(["infer", *named, *dashed, "--color"]) == 0
  # Values stay as they are.
  assert "got 'a-b'" in toy.failure(capsys, ["infer", *named, "--exit-layers=a-b"])


@pytest.mark.parametrize(
  ("arguments", "meant"),
  [
    (["calibrate", "runs", "--tolerence=0.2"], "did you mean --tolerance?"),
    (["infer", "--prompts=-", "--treshold", "never"], "did you mean --threshold?"),
    (["calbrate", "runs"], "did you mean calibrate?"),
    (["infer", "--promts=-"], "required: --prompts; got --promts, which is none; did you mean"),
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
