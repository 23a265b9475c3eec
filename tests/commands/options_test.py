"""Values that no option means, for every option that takes a number or a list of them.

The options are read off the commands' own parsers: one that is new is asked too.
"""

import argparse
import importlib
import json

import pytest

from calm.calibrate import NEVER_EXIT, generations
from calm.calibrate.generations import writer
from calm.commands import cli
from tests.calibrate import laws

NONSENSE = ("x", "", "-1", "nan", "1e400", "1.5.5", "\x1b[2J")
# What an option may well mean. Bets with -1: `start` of a tail of signed losses.
FAIR = {"infer": {}, "calibrate": {"--start": {"-1"}}}
# Options of texts and lists of numbers; files and names have their own tests.
LISTS = {"--exit_layers", "--threshold", "--thresholds", "--depths", "--risks", "--dtype"}


def asked(command):
  """The options of a command that take a number or a list of them."""
  parser = argparse.ArgumentParser()
  importlib.import_module(f"calm.commands.{command}").add_arguments(parser)
  return [
    action.option_strings[0]
    for action in parser._actions
    if action.type in (int, float) or LISTS & set(action.option_strings)
  ]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
  folder = tmp_path_factory.mktemp("outputs")
  prompts = laws.prompts(40)
  made = writer.open_writer(folder, prompts=prompts, thresholds=[0.5], procedure=None)
  for threshold in (NEVER_EXIT, 0.5):
    made.append(threshold, [_record(prompt.id) for prompt in prompts])
  made.finish()
  assert len(generations.load(folder).full) == 40
  return folder


def _record(name):
  return generations.records.Record(name, "text", tokens=(5, 1), exit_layers=(1, 2))


# What makes an option be looked at, where others must be given with it.
BESIDE = {
  "--share": ["--promise=quantile"],
  "--beta": ["--promise=tail_mean"],
  "--start": ["--promise=tail_mean"],
  "--at_most": ["--promise=cost"],
  "--depths": ["--promise=early_exits"],
  "--temperature": ["--max_decode_length=2"],
}


def given(command, option, model, outputs, folder):
  if command == "calibrate":
    base = [str(outputs), "--tolerance=0.2", f"--output={folder / 'calibration.json'}"]
  else:
    prompts = folder / "prompts.jsonl"
    prompts.write_text(json.dumps({"id": "a", "input": "text"}))
    base = [f"--model={model}", f"--prompts={prompts}"]
    alone = ("--threshold", "--draft_layer")
    base += ["--exact"] if option == "--draft_layer" else []
    base += [] if option in alone else ["--threshold=never"]
  return [command, *base, *BESIDE.get(option, [])]


@pytest.mark.parametrize("command", ["calibrate", "infer"])
def test_no_number_is_nonsense(command, model, outputs, tmp_path, capsys):
  options = asked(command)
  assert len(options) > 4
  for option in options:
    for value in NONSENSE:
      if value in FAIR[command].get(option, ()):
        continue
      words = [*given(command, option, model, outputs, tmp_path), f"{option}={value}"]
      try:
        status = cli.main(words)
      except SystemExit as stopped:  # argparse's own refusal
        status = stopped.code
      told = capsys.readouterr().err
      assert status == 2, (words, told)
      name = option.strip("-")
      named = name in told or name.replace("_", " ") in told or "exit layers" in told
      assert named, (words, told)
      assert "Traceback" not in told and "\x1b[2J" not in told, words
    assert not (tmp_path / "calibration.json").exists()
