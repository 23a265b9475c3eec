"""One writer at a time: the second is refused by name, a dead one's lock is taken over."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from calm.calibrate.generations import locks

ROOT = pathlib.Path(__file__).resolve().parents[3]
HOLDER = """
import sys
from calm.calibrate.generations import locks
held = locks.lock(sys.argv[1])
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder():
  """Starts a process that holds the lock of a target until it is killed."""
  started = []

  def start(target: pathlib.Path) -> subprocess.Popen:
    process = subprocess.Popen(
      [sys.executable, "-c", HOLDER, str(target)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
      cwd=ROOT,
    )
    started.append(process)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process

  yield start
  for process in started:
    process.kill()
    process.communicate()


@pytest.mark.parametrize("name", ["", "monitor.jsonl"])
def test_the_second_writer_is_refused_and_told_of_the_first(tmp_path, holder, name):
  target = tmp_path / name
  first = holder(target)
  with pytest.raises(locks.LockedError, match=rf"got process {first.pid} \('-c .*wait for it"):
    locks.lock(target)
  link = tmp_path.parent / "link"
  link.unlink(missing_ok=True)
  link.symlink_to(tmp_path)
  with pytest.raises(locks.LockedError, match=f"process {first.pid}"):
    locks.lock(link / name)
  first.kill()
  first.wait()
  (path,) = tmp_path.iterdir()  # the dead one's lock is still there
  held = locks.lock(target)
  assert json.loads(path.read_text())["process"] == str(locks.this_process())
  held.release()
  assert not list(tmp_path.iterdir())


def test_a_process_may_lock_again_and_lets_go_with_the_last_reference(tmp_path, holder):
  first, second = locks.lock(tmp_path), locks.lock(tmp_path)
  assert first is second and (tmp_path / ".lock").exists()
  del first
  assert (tmp_path / ".lock").exists()
  del second
  assert not (tmp_path / ".lock").exists()
  holder(tmp_path)


def test_two_targets_of_one_folder_do_not_meet(tmp_path, holder):
  holder(tmp_path / "a.jsonl")
  holder(tmp_path / "b.jsonl")
  locks.lock(tmp_path).release()


def test_a_planted_link_is_not_followed(tmp_path):
  victim = tmp_path / "victim"
  victim.write_text("precious")
  (tmp_path / "folder").mkdir()
  (tmp_path / "folder" / ".lock").symlink_to(victim)
  with pytest.raises(OSError, match="symbolic links"):
    locks.lock(tmp_path / "folder")
  assert victim.read_text() == "precious"


def test_without_flock_the_named_process_is_looked_for(tmp_path, monkeypatch):
  def refuse(descriptor, flags):
    raise OSError(38, "Function not implemented")

  monkeypatch.setattr(locks.fcntl, "flock", refuse)
  me = locks.this_process()
  for process, free in [
    (me._replace(start=me.start + 1), True),  # the number was given to another process since
    (me._replace(pid=2**22 + 1), True),
    (me, False),
    (me._replace(host="00000000"), True),  # of another machine: nobody can tell
  ]:
    (tmp_path / ".lock").write_text(json.dumps({"process": str(process), "command": "calm"}))
    if free:
      locks.lock(tmp_path).release()
    else:
      with pytest.raises(locks.LockedError, match=rf"process {os.getpid()} \('calm'"):
        locks.lock(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"process": 3}', "\\xff"])
def test_a_damaged_lock_is_taken_over(tmp_path, content):
  (tmp_path / ".lock").write_text(content)
  locks.lock(tmp_path).release()
