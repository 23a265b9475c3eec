"""Whatever stops a command, it ends with one line that is true: signals, and a full disk."""

import json
import os
import resource
import signal
import time

import pytest

pytest.importorskip("matplotlib", reason="matplotlib (the `report` extra) is not installed")

from calm.calibrate import NEVER_EXIT, Record
from calm.calibrate.generations import writer
from calm.commands import cli
from tests.calibrate import laws
from tests.commands import asked

# What `calm calibrate` works at; the others are in `asked.WORK`.
WORK = asked.WORK | {"calibrate": "calm.calibrate.losses.sequence_losses.compute"}
# What each says is kept. Nothing was written yet where work has only begun.
KEPT = {
  "demo": "files that were there are as they were, and the same command starts anew",
  "fit": "what was finished is kept, and the same command goes on from there",
  "train": "the same command goes on from its last checkpoint, if there is one",
  "generate": "what was decoded is kept, and the same command goes on from there",
  "calibrate": "files that were there are as they were, and the same command starts anew",
  "infer": "stopped after 0 of 1 prompts",
  "merge": "files that were there are as they were, and the same command starts anew",
  "report": "what was decoded is kept, and the same command goes on from there",
}


@pytest.fixture
def asker(model, tmp_path, capsys, monkeypatch, cache_in_tmp):
  monkeypatch.chdir(tmp_path)
  folder = tmp_path / "outputs"
  made = writer.open_writer(folder, prompts=laws.prompts(40), thresholds=[0.5], procedure=None)
  for threshold in (NEVER_EXIT, 0.5):
    made.append(threshold, [Record(f"id-{i:03d}", "text") for i in range(40)])
  made.finish()
  return asked.Asker(model, folder, None, tmp_path, capsys)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_a_signal_ends_every_command_with_one_line(command, number, asker, monkeypatch):
  def stopped(*arguments, **options):
    os.kill(os.getpid(), number)
    time.sleep(5)
    pytest.fail("the signal did nothing")

  monkeypatch.setattr(WORK[command], stopped)
  # A shell starts what it puts into the background with SIGINT ignored.
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    status, told = asker.ask(asker.words(command, "--none"))
  finally:
    signal.signal(signal.SIGINT, before)
  assert status == {signal.SIGTERM: 143, signal.SIGINT: 130}[number], told
  lines = [line for line in told.splitlines() if line.startswith("calm: ")]
  assert len(lines) == 1 and lines[0].startswith("calm: stopped") and KEPT[command] in lines[0]
  assert "Traceback" not in told


# JAX says so where a compilation of half a second cannot be kept either, and goes on.
@pytest.mark.filterwarnings("ignore:Error writing persistent compilation cache entry")
@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_a_full_disk_ends_every_command_with_one_line(command, asker, tmp_path):
  words = asker.words(command, "--none")
  new = next(word.partition("=")[2] for word in words if word.startswith("--output"))
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))  # not one byte more
  try:
    status, told = asker.ask(words)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert status == 2, told
  lines = [line for line in told.splitlines() if line.startswith("calm: ")]
  assert len(lines) == 1 and "Expected" in lines[0] and "Traceback" not in told, told
  assert str(tmp_path) in lines[0], told
  left = [path for path in (tmp_path / new).rglob("*") if path.is_file()]
  assert not [path for path in left if path.suffix == ".tmp"]
  for path in left:
    if path.suffix == ".json":
      json.loads(path.read_text())
