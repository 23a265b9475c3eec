"""The `calm` command: its words and helps, and every kind of bad input by
name.
"""

import argparse
import dataclasses
import re
import subprocess
import sys

import pytest

pytest.importorskip(
  "matplotlib", reason="matplotlib (the `report` extra) is not installed"
)

from calm import fitting, inference
from calm.commands import cli, flags
from calm.paper import bench
from tests.commands import toy

MOST_HELP_LINES = 50
MOST_INFER_OPTIONS = 16


def listed(command: str, option: str, capsys) -> str:
  with pytest.raises(SystemExit, match="0"):
    cli.main([command, option])
  return capsys.readouterr().out


def options(command: str) -> dict[str, argparse.Action]:
  actions = cli.make_parser(command)._actions
  return {
    a.dest: a
    for a in actions
    if a.option_strings and "help" not in a.option_strings[-1]
  }


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_is_one_screen_and_help_all_lists_every_option(
  command, capsys, monkeypatch
):
  monkeypatch.setenv("COLUMNS", "80")
  short, whole = (
    listed(command, option, capsys) for option in ("--help", "--help_all")
  )
  assert len(short.splitlines()) <= MOST_HELP_LINES
  assert max(map(len, short.splitlines())) <= 80
  names = {f"--{name}" for name in options(command) if name != "colour"}
  assert (
    names <= set(re.findall(r"--\w+", whole)) and f"calm {command} " in short
  )
  own = [
    name for name in names if re.search(rf"^ +{name}\b", short, re.MULTILINE)
  ]
  # --color is not among them
  assert command != "infer" or len(own) < MOST_INFER_OPTIONS
  for action in options(command).values():
    if action.metavar == "RATE":
      assert re.search(r"\w+ \w+.* \((delta|epsilon)\)", action.help)
    if (
      action.nargs != 0
      and action.default not in (None, [], "")
      and not action.required
    ):
      assert "(default: " in action.help, (
        f"{action.dest} does not say {action.default!r}"
      )


def test_the_first_help_says_each_command_once(capsys):
  assert cli.main(["--help"]) == 0
  text = capsys.readouterr().out
  assert len(text.splitlines()) <= 30
  for name, summary in cli.COMMANDS.items():
    assert text.count(f"  {name:<11}{summary}\n") == 1
  for words in (["calbrate", "runs"], []):
    assert cli.main(words) == 2
  assert "got 'calbrate'; see `calm --help`" in capsys.readouterr().err
  made = subprocess.run(
    [sys.executable, "-m", "calm", "--version"],
    capture_output=True,
    text=True,
    check=True,
  )
  assert made.stdout.startswith("calm ")


def test_python_and_the_command_line_have_the_same_defaults():
  def values(kind):
    return {field.name: field.default for field in dataclasses.fields(kind)}

  for command, kind in (("fit", fitting.FitOptions), ("report", bench.Options)):
    theirs = values(kind)
    shared = {
      name: a.default for name, a in options(command).items() if name in theirs
    }
    assert len(shared) > 6
    for name, value in shared.items():
      assert (tuple(value) if isinstance(value, list) else value) == theirs[
        name
      ], name
  decoding = values(inference.DecodeOptions)
  decoding |= {"temperature": decoding["schedule"].name, "exit_layers": "all"}
  for name, _, _, fallback in flags._DECODING:
    assert fallback in (0, decoding.get(name) or "none"), name


@pytest.mark.parametrize(
  ("words", "message"),
  [
    (
      "calibrate runs --tolerence=0.2",
      "unrecognized arguments: --tolerence=0.2",
    ),
    (
      "infer --prompts=",
      "argument --prompts: is empty; leave it out, or check the shell",
    ),
    (
      "infer --prompts=- --batch_size=0",
      "--batch_size: expected a whole number from 1 on",
    ),
    (
      "infer --exit_layers=two",
      "--exit_layers: expected numbers like 2,4,6, got",
    ),
  ],
)
def test_bad_words_are_refused_before_any_work(words, message, capsys):
  with pytest.raises(SystemExit, match="2"):
    cli.main(words.split())
  assert message in capsys.readouterr().err


def test_dashes_are_underscores_and_colour_is_color(model, prompts, calm):
  named = [
    f"--model={model}",
    f"--prompts={prompts}",
    "--threshold=never",
    "--limit=1",
  ]
  dashed = [
    o.replace("max_", "max-").replace("_length", "-length") for o in toy.DECODE
  ]
  for colour in ("--color", "--colour"):
    calm("infer", *named, *dashed, colour)
  # Values stay as they are.
  assert "a-b" in calm(
    "infer", *named, "--task-prefix=a-b", "--threshold=a-b", code=2
  )
