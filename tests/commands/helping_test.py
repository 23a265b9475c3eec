"""What `--help` says: defaults that are true, and lines that fit the terminal."""

import argparse
import dataclasses
import re

import pytest

pytest.importorskip("jax", reason="needs the extra 'decode'")

from calm import fitting, inference
from calm.commands import cli, demo, helping, monitoring
from calm.decode import engines
from calm.paper import bench

OPTIONS = inference.DecodeOptions()
# What holds where an option is not given, of options whose parser says None.
FALLBACKS = {
  "measure": OPTIONS.measure,
  "temperature": OPTIONS.schedule.name,
  "exit_layers": "all" if OPTIONS.exit_layers is None else OPTIONS.exit_layers,
  "propagation": OPTIONS.propagation,
  "task_prefix": OPTIONS.task_prefix or "none",
  "max_input_length": OPTIONS.max_input_length,
  "max_decode_length": OPTIONS.max_decode_length,
  "batch_size": OPTIONS.batch_size,
  "num_devices": OPTIONS.num_devices,
  "monitor_share": monitoring.SHARE,
  "monitor_level": monitoring.LEVEL,
}
# Said in words, where nothing is given: what happens is in the tests of the command.
WORDS = (
  *("the model's own", "the model's own, if it has one", "told by the name, or the content"),
  *("the first of input, inputs, prompt, text", "DIRECTORY/calibration.json"),
  *("the model's own grid, or the measure's", "texts to the screen", "the recipe's steps"),
  *("all that the model has", "one of every source", "all", "--model", "those of --tasks"),
  *("merged, beside the shards", "outputs.jsonl there", "a quarter of them"),
  "JOB_COMPLETION_INDEX, SLURM_ARRAY_TASK_ID less SLURM_ARRAY_TASK_MIN, or jax.process_index(",
)


VALUE = "<value>"


def options(command: str) -> list[argparse.Action]:
  (commands,) = [
    action
    for action in cli.make_parser(command)._actions
    if isinstance(action, argparse._SubParsersAction)
  ]
  return [a for a in commands.choices[command]._actions if a.help and a.dest != "help"]


def stated(action: argparse.Action) -> list[str]:
  """The defaults that the help of an option names; `VALUE` is the parser's own."""
  text = re.sub(r"%\(default\)[.0-9]*[sg]", VALUE, re.sub(r"\s+", " ", action.help or ""))
  assert "(default)" not in text, f"{action.dest}: say which, so that it can be compared"
  return re.findall(r"\(?default:? ([^);]+)", text)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_defaults_that_help_states_are_the_ones_that_hold(command):
  for action in options(command):
    for found in stated(action):
      if action.dest == "engine":
        continue  # below
      fallback = FALLBACKS.get(action.dest)
      if action.default is None and fallback is not None:
        assert found.removeprefix("the model's own, or ") in (str(fallback), *WORDS), action
      elif action.default is None or isinstance(action.default, list):
        assert found in WORDS, (action.dest, found)
      else:
        assert VALUE in found or found in WORDS, f"{action.dest}: {found} is typed"


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_default_that_is_a_value_is_stated(command):
  for action in options(command):
    if action.nargs == 0 or action.default in (None, [], "", argparse.SUPPRESS):
      continue
    assert stated(action), f"{command} --{action.dest} does not say {action.default!r}"


def test_the_engines_are_the_default_where_help_says_so():
  (action,) = [a for a in options("infer") if a.dest == "engine"]
  assert re.search(
    r"compacted \(default from 8 rows on\), deferred \(default below", action.help
  )
  rule = OPTIONS.rule
  assert isinstance(engines.default_engine(rule, 8, "cpu"), engines.Compacted)
  assert isinstance(engines.default_engine(rule, 7, "cpu"), engines.Deferred)


def defaults(command: str) -> dict[str, object]:
  return {action.dest: action.default for action in options(command)}


def test_python_and_the_command_line_have_the_same_defaults():
  fit = {f.name: f.default for f in dataclasses.fields(fitting.FitOptions)}
  assert {n: v for n, v in defaults("fit").items() if n in fit} == fit
  report = {f.name: f.default for f in dataclasses.fields(bench.Options)}
  shared = {name: value for name, value in defaults("report").items() if name in report}
  assert len(shared) > 6
  for name, value in shared.items():
    assert (tuple(value) if isinstance(value, list) else value) == report[name], name
  assert (fit["tolerance"], fit["error_rate"]) == (demo.TOLERANCE, demo.ERROR_RATE)


@pytest.mark.parametrize("columns", [60, 80, 200])
@pytest.mark.parametrize("command", [None, *cli.COMMANDS])
def test_help_fits_the_terminal(command, columns, monkeypatch):
  monkeypatch.setenv("COLUMNS", str(columns))
  parser = cli.make_parser(command)
  if command is not None:
    (commands,) = parser._subparsers._group_actions
    parser = commands.choices[command]
  text = parser.format_help()
  assert max(map(len, text.splitlines())) <= min(columns, helping.MOST_COLUMNS)
  assert parser._defaults.get("run") is not None or command is None


def test_the_first_help_is_short_and_says_each_command_once(monkeypatch):
  monkeypatch.setenv("COLUMNS", "80")
  text = cli.make_parser().format_help()
  assert len(text.splitlines()) <= 30
  for name, summary in cli.COMMANDS.items():
    assert len(re.findall(rf"^ +{name}\b", text, re.MULTILINE)) == 1, name
    assert re.search(rf"^ +{name} +{summary[:20]}", text, re.MULTILINE), f"{name}: on two lines"
    assert " ".join(summary.split()) in " ".join(text.split())


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_a_rate_is_said_in_words_and_not_as_a_greek_letter_alone(command):
  for action in options(command):
    if action.metavar == "RATE":
      assert re.search(r"\w+ \w+.* \((delta|epsilon)\)", action.help), action.help


def test_a_command_that_is_broken_can_still_be_copied(monkeypatch):
  monkeypatch.setenv("COLUMNS", "60")
  text = (
    "What it does,\nin words.\n\n"
    "  calm report --data=data --output=runs/report --tasks=qa --limit=50  # a first look\n"
    "  figures/         each figure as SVG and as PNG, for papers and slides\n"
  )
  made = helping.Formatter("calm")._fill_text(text, 58, "").split("\n")
  assert made == [
    "What it does, in words.",
    "",
    "  # a first look",
    "  calm report --data=data --output=runs/report \\",
    "      --tasks=qa --limit=50",
    "  figures/         each figure as SVG and as PNG, for",
    "                   papers and slides",
  ]
