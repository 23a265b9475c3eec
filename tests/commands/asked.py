"""Every command with what it needs, so that one option more can be asked about.

A command that begins to work has taken what it was given: `stop_at_work` ends
it there.
"""

import argparse
import importlib
import itertools
import json
import pathlib

from calm import inference
from calm.calibrate import Prompt
from calm.commands import cli, merge
from calm.data import prompt_files
from tests.calibrate import small_cache

# Where the work of each command begins: everything before is a check.
WORK = {
  "demo": "calm.inference.grid.generate",
  "fit": "calm.fitting.run.make",
  "train": "calm.training.loop.fit",
  "generate": "calm.inference.grid.generate",
  "infer": "calm.inference.predictor.Predictor.generate",
  "merge": "calm.commands.merge.merge",
  "report": "calm.paper.sections.sections",
  "serve": "calm.serve.Device",
}
# What makes an option be looked at, where others must be given with it.
BESIDE = {
  "--share": ["--promise=quantile"],
  "--labels": ["--promise=every_group"],
  "--beta": ["--promise=tail_mean"],
  "--start": ["--promise=tail_mean"],
  "--at_most": ["--promise=cost"],
  "--depths": ["--promise=early_exits"],
  "--temperature": ["--max_decode_length=2"],
  "--shard_id": ["--num_shards=2"],
  "--num_shards": ["--shard_id=0"],
  "--references": ["--kind=risk_signed"],
}
ONLINE = (
  "--tolerance",
  "--error_rate",
  "--metric",
  "--online_share",
  "--online",
)
# Options of `calm infer` that a threshold goes ill with.
SERVES = ("--threshold", "--calibration", "--expect_digest")


class AtWork(BaseException):
  """The command has taken what it was given."""


def stop_at_work(monkeypatch, command: str) -> None:
  def begun(*arguments, **options):
    raise AtWork

  if command in WORK:
    monkeypatch.setattr(WORK[command], begun)


def actions(command: str) -> list[argparse.Action]:
  """What a command takes that has a value."""
  parser = argparse.ArgumentParser()
  importlib.import_module(f"calm.commands.{command}").add_arguments(parser)
  return [each for each in parser._actions if each.nargs != 0]


class Asker:
  """Calls commands with one thing asked about, each with a new folder to write
  to.
  """

  def __init__(self, model, outputs, calibration, folder: pathlib.Path, capsys):
    self.model = model
    self.outputs = outputs
    self.calibration = calibration
    self.folder = folder
    self._capsys = capsys
    self._numbers = itertools.count()
    self.prompts = _write_rows(folder / "prompts.jsonl", 1)
    self.rows = _write_rows(folder / "rows.jsonl", 400)
    self.bindings = folder / "bindings"
    self.bindings.write_text(
      f"include 'configs/train/local_tiny.gin'\nTRAIN = '{self.rows}'\n"
      f"VOCABULARY_PATH = '{inference.PACKED / 'vocabulary.model'}'\n"
    )
    _write_shards(folder / "shards")

  def words(self, command: str, option: str) -> list[str]:
    """The command without the option that is asked about."""
    new = self.folder / f"new{next(self._numbers)}"
    decodes = [f"--model={self.model}", f"--prompts={self.prompts}"]
    rows = [
      f"--data={self.folder}" if "tasks" in option else f"--train={self.rows}"
    ]
    serves = (
      [f"--calibration={self.calibration}"] if option in SERVES[-1:] else []
    )
    if command in ("infer", "serve") and option in ONLINE:
      serves = [f"--online={new}.state"]
    base = {
      "demo": [f"--model={self.model}"],
      "fit": [f"--model={self.model}", f"--train={self.rows}", "--stages=none"],
      "train": [f"--gin_file={self.bindings}"],
      "generate": decodes,
      "calibrate": [str(self.outputs), "--tolerance=0.2"],
      "infer": [
        *decodes,
        *(serves if option in (*SERVES, *ONLINE) else ["--threshold=never"]),
      ],
      "serve": [f"--model={self.model}", "--port=0", *serves],
      "merge": [str(self.folder / "shards")],
      "report": [
        f"--model={self.model}",
        *([] if option == "--data" else rows),
      ],
    }[command]
    output = "--output_dir" if command == "train" else "--output"
    base += [] if command == "serve" else [f"{output}={new}"]
    base += BESIDE.get(option, []) if command != "fit" else []
    if not option.startswith("--"):  # what is asked about stands in its place
      base = [word for word in base if word.startswith("--")]
    return [
      command,
      *(word for word in base if not word.startswith(f"{option}=")),
    ]

  def ask(self, words: list[str]) -> tuple[int | str, str]:
    """(exit status, or 'taken' where it began to work; what was said)."""
    import gin

    self._capsys.readouterr()
    try:
      status = cli.main(words)
    except AtWork:
      status = "taken"
    except SystemExit as stopped:  # argparse's own refusal
      status = stopped.code if isinstance(stopped.code, int) else 1
    finally:
      gin.clear_config()
    return status, self._capsys.readouterr().err


def _write_rows(path: pathlib.Path, count: int) -> pathlib.Path:
  """Rows of as many groups."""
  rows = (
    {"id": f"r{i}", "source": f"s{i}", "input": f"text {i}", "target": "word"}
    for i in range(count)
  )
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


def _write_shards(folder: pathlib.Path) -> None:
  """One shard that is the whole."""
  prompts, mark = merge.take_shard(
    prompt_files.Prompts([Prompt("a", "text")]), 0, 1
  )
  small_cache.write(place := merge.shard_folder(str(folder), mark), prompts)
  merge.write_mark(place, mark)
