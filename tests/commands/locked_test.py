"""Two processes at work on one folder: the second is refused, and told of the first."""

import subprocess
import sys

import pytest

pytest.importorskip("matplotlib", reason="matplotlib (the `report` extra) is not installed")

from calm.commands import cli

HOLD = """
import sys
from calm import storage
held = storage.lock(sys.argv[1])
print("held", flush=True)
sys.stdin.read()
"""
COMMANDS = {
  "report": ["--data=nowhere", "--output={}"],
  "generate": ["--output={}", "--thresholds=0.5"],
}


@pytest.fixture
def held(tmp_path):
  """(a folder that another process has, that process's id)"""
  folder = tmp_path / "held"
  folder.mkdir()
  words = [sys.executable, "-c", HOLD, str(folder)]
  with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    yield folder, holder.pid
    holder.communicate()


@pytest.mark.parametrize("command", ["generate", "report"])
def test_a_second_writer_is_refused_by_name(
  command, held, model, prompts, capsys, cache_in_tmp
):
  folder, process = held
  words = [command, *(word.format(folder) for word in COMMANDS[command])]
  words += [f"--model={model}", f"--prompts={prompts}"] if command == "generate" else []
  assert cli.main(words) == 2
  told = capsys.readouterr().err
  assert "to have one writer at a time" in told and f"process {process}" in told
  assert [path.name for path in folder.iterdir()] == [".lock"]
