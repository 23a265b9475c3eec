"""One writer at a time: the second is refused by name, a dead one's lock is taken over."""

import errno
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

from calm import storage

ROOT = pathlib.Path(__file__).resolve().parents[1]
HOLDER = """
import sys
from calm import storage
held = storage.lock(sys.argv[1])
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
  with pytest.raises(
    storage.LockedError, match=rf"got process {first.pid} \('-c .*wait for it"
  ):
    storage.lock(target)
  link = tmp_path.parent / "link"
  link.unlink(missing_ok=True)
  link.symlink_to(tmp_path)
  with pytest.raises(storage.LockedError, match=f"process {first.pid}"):
    storage.lock(link / name)
  first.kill()
  first.wait()
  (path,) = tmp_path.iterdir()  # the dead one's lock is still there
  held = storage.lock(target)
  assert json.loads(path.read_text())["process"] == str(storage.this_process())
  held.release()
  assert not list(tmp_path.iterdir())


def test_a_process_may_lock_again_and_lets_go_with_the_last_reference(tmp_path, holder):
  first, second = storage.lock(tmp_path), storage.lock(tmp_path)
  assert first is second and (tmp_path / ".lock").exists()
  del first
  assert (tmp_path / ".lock").exists()
  del second
  assert not (tmp_path / ".lock").exists()
  holder(tmp_path)


def test_two_targets_of_one_folder_do_not_meet(tmp_path, holder):
  holder(tmp_path / "a.jsonl")
  holder(tmp_path / "b.jsonl")
  storage.lock(tmp_path).release()


def test_a_planted_link_is_not_followed(tmp_path):
  victim = tmp_path / "victim"
  victim.write_text("precious")
  (tmp_path / "folder").mkdir()
  (tmp_path / "folder" / ".lock").symlink_to(victim)
  with pytest.raises(OSError, match="symbolic links"):
    storage.lock(tmp_path / "folder")
  assert victim.read_text() == "precious"


def test_without_flock_the_named_process_is_looked_for(tmp_path, monkeypatch):
  def refuse(descriptor, flags):
    raise OSError(38, "Function not implemented")

  monkeypatch.setattr(storage.fcntl, "flock", refuse)
  me = storage.this_process()
  for process, free in [
    (me._replace(start=me.start + 1), True),  # the number was given to another process since
    (me._replace(pid=2**22 + 1), True),
    (me, False),
    (me._replace(host="00000000"), True),  # of another machine: nobody can tell
  ]:
    (tmp_path / ".lock").write_text(json.dumps({"process": str(process), "command": "calm"}))
    if free:
      storage.lock(tmp_path).release()
    else:
      with pytest.raises(storage.LockedError, match=rf"process {os.getpid()} \('calm'"):
        storage.lock(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"process": 3}', "\\xff"])
def test_a_damaged_lock_is_taken_over(tmp_path, content):
  (tmp_path / ".lock").write_text(content)
  storage.lock(tmp_path).release()


def test_a_lock_whose_holder_cannot_be_read_is_still_a_lock(tmp_path, holder):
  holder(tmp_path)
  (tmp_path / ".lock").write_text("{")
  with pytest.raises(storage.LockedError, match="got a process that gives no name"):
    storage.lock(tmp_path)


def test_a_block_holds_its_target_and_lets_go_of_it_whatever_happens(tmp_path):
  with pytest.raises(KeyError), storage.held(tmp_path / "a"):
    assert (tmp_path / ".a.lock").exists()
    raise KeyError("in the block")
  assert not list(tmp_path.iterdir())


def test_a_file_that_its_holder_removed_in_between_is_made_again(tmp_path, monkeypatch):
  flock, path = storage.fcntl.flock, tmp_path / ".lock"

  def once(descriptor, flags):
    monkeypatch.setattr(storage.fcntl, "flock", flock)
    path.unlink()
    flock(descriptor, flags)

  monkeypatch.setattr(storage.fcntl, "flock", once)
  held = storage.lock(tmp_path)
  assert json.loads(path.read_text())["process"] == str(storage.this_process())
  held.release()


def test_a_disk_that_fails_is_no_lock_of_another(tmp_path, monkeypatch):
  def fail(descriptor, flags):
    raise OSError(errno.EIO, "Input/output error")

  monkeypatch.setattr(storage.fcntl, "flock", fail)
  with pytest.raises(OSError, match="to be a place that can be written, got: Input/output"):
    storage.lock(tmp_path)


def test_a_full_disk_leaves_no_lock_without_a_name(tmp_path, monkeypatch):
  def fail(descriptor, data):
    raise OSError(errno.ENOSPC, "No space left on device")

  with monkeypatch.context() as full:
    full.setattr(storage.os, "write", fail)
    with pytest.raises(OSError, match="to be a place that can be written, got: No space left"):
      storage.lock(tmp_path)
  assert not list(tmp_path.iterdir())
  storage.lock(tmp_path).release()


def test_where_the_system_does_not_list_processes_they_are_asked(tmp_path, monkeypatch):
  monkeypatch.setattr(storage, "_PROCESSES", tmp_path)
  me = storage.this_process()
  assert me.start == 0 and me.is_dead() is False
  assert me._replace(pid=2**22 + 1).is_dead() is True

  def refuse(pid, signal):
    raise PermissionError(errno.EPERM, "not yours")  # of another user, and alive

  monkeypatch.setattr(storage.os, "kill", refuse)
  assert me._replace(pid=2**22 + 1).is_dead() is False
  (tmp_path / "7").mkdir()
  (tmp_path / "7" / "stat").write_text("7 (damaged)")
  assert me._replace(pid=7, start=9).is_dead() is False  # when it started is not known


def test_where_nothing_can_be_locked_nothing_is_refused(tmp_path, monkeypatch):
  """Windows has no `fcntl`: what another process does is not known, and no process is dead."""
  monkeypatch.setitem(sys.modules, "fcntl", None)
  spec = importlib.util.spec_from_file_location("locks_of_windows", storage.__file__)
  assert spec is not None and spec.loader is not None
  windows = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(windows)
  held = windows.lock(tmp_path)
  storage.lock(tmp_path / "other").release()
  assert windows.this_process().is_dead() is None
  held.release()
  monkeypatch.setattr(windows, "_PROCESSES", tmp_path)
  assert windows.this_process().start == 0
