"""Files are written whole or not at all, one writer at a time; what is read is bounded."""

import ast
import errno
import json
import os
import pathlib
import re
import secrets
import subprocess
import sys
import threading
import time

import pytest

from calm import storage

PACKAGE = pathlib.Path(__file__).resolve().parents[1] / "calm"


def names(folder: pathlib.Path) -> set[str]:
  return {path.name for path in folder.iterdir()}


def test_a_file_is_replaced_whole_and_nothing_is_left(tmp_path):
  path = tmp_path / "a.txt"
  storage.write_atomically(path, "one")
  path.chmod(0o640)
  storage.write_atomically(path, b"\xfftwo")
  assert path.read_bytes() == b"\xfftwo" and path.stat().st_mode & 0o777 == 0o640
  storage.write_atomically(tmp_path / ("é" * 100), "long names too")
  assert names(tmp_path) == {"a.txt", "é" * 100}
  (tmp_path / "others").write_text("x")
  assert (tmp_path / ("é" * 100)).stat().st_mode == (tmp_path / "others").stat().st_mode


def test_pieces_take_their_place_at_the_end_only(tmp_path):
  path = tmp_path / "a.txt"
  path.write_text("before")
  with storage.replacing(path) as file:
    file.write(b"new")
    file.flush()
    assert path.read_text() == "before"
  assert path.read_text() == "new"
  with pytest.raises(KeyError), storage.replacing(path) as file:
    file.write(b"half")
    raise KeyError("something else went wrong")
  with (
    pytest.raises(OSError, match=r"^\[Errno 5000\] of another file"),
    storage.replacing(path),
  ):
    raise OSError(5000, "of another file")
  assert path.read_text() == "new" and names(tmp_path) == {"a.txt"}


def test_a_link_stays_and_its_file_is_replaced(tmp_path):
  (tmp_path / "sub").mkdir()
  link, there = tmp_path / "link", tmp_path / "sub" / "file"
  (tmp_path / "sub" / "step").symlink_to("file")
  link.symlink_to("sub/step")
  storage.write_atomically(link, "made through the link")
  storage.append(link, b", and appended to")
  assert there.read_text() == "made through the link, and appended to"
  storage.write_atomically(link, "and replaced")
  assert link.is_symlink() and there.read_text() == "and replaced" and not there.is_symlink()
  assert names(tmp_path) == {"sub", "link"} and names(tmp_path / "sub") == {"file", "step"}
  circle = tmp_path / "circle"
  circle.symlink_to("circle")
  with pytest.raises(OSError, match="circle' to be a file that can be written whole"):
    storage.write_atomically(circle, "x")
  assert circle.is_symlink()


def test_a_pipe_and_a_device_are_written_to(tmp_path):
  pipe = tmp_path / "pipe"
  os.mkfifo(pipe)
  got = []
  reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
  reader.start()
  storage.write_atomically(pipe, "through the pipe")
  reader.join(10)
  assert got == [b"through the pipe"] and pipe.is_fifo()
  storage.write_atomically("/dev/null", "x")
  assert pathlib.Path("/dev/null").is_char_device()


@pytest.mark.parametrize("name", ["-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
def test_standard_output_is_a_stream_even_where_it_is_a_file(tmp_path, name):
  code = (
    "from calm import storage\n"
    f"print('before'); storage.write_atomically({name!r}, 'text\\n'); print('after')"
  )
  with open(tmp_path / "out", "wb") as out:
    subprocess.run([sys.executable, "-c", code], stdout=out, check=True, cwd=PACKAGE.parent)
  assert (tmp_path / "out").read_text() == "before\ntext\nafter\n"
  assert names(tmp_path) == {"out"}


def test_a_folder_and_a_file_without_permission_are_refused(tmp_path, monkeypatch):
  with pytest.raises(IsADirectoryError, match="Is a directory"):
    storage.write_atomically(tmp_path, "x")
  path = tmp_path / "protected"
  path.write_text("kept")
  monkeypatch.setattr(os, "access", lambda path, mode: False)  # also for root
  with pytest.raises(PermissionError, match="the old content is kept"):
    storage.write_atomically(path, "x")
  assert path.read_text() == "kept" and names(tmp_path) == {"protected"}


def test_a_planted_link_is_never_followed(tmp_path, monkeypatch):
  victim = tmp_path / "victim"
  victim.write_text("precious")
  guess = "0123456789abcdef"
  planted = tmp_path / f".a.txt.{guess}.tmp"
  planted.symlink_to(victim)
  monkeypatch.setattr(secrets, "token_hex", lambda size: guess)  # as if it could be guessed
  with pytest.raises(FileExistsError):
    storage.write_atomically(tmp_path / "a.txt", "x")
  assert victim.read_text() == "precious" and not (tmp_path / "a.txt").exists()


@pytest.mark.parametrize("steps", [1, 2])
def test_nothing_is_appended_to_where_a_link_leads_to_nothing(tmp_path, steps):
  """It may be planted; a file that is there is appended to, as by any program."""
  nowhere, link = tmp_path / "nowhere", tmp_path / "link"
  (tmp_path / "step").symlink_to(nowhere)
  link.symlink_to(tmp_path / "step" if steps == 2 else nowhere)
  with pytest.raises(
    FileNotFoundError, match=r"link' to be a file, .* got a link to a file that"
  ):
    storage.append(link, b"x")
  assert not nowhere.exists() and names(tmp_path) == {"step", "link"}


def limited(code: str, folder: pathlib.Path, size: int = 4096) -> str:
  """What a process prints that may write no file beyond `size` bytes."""
  limit = f"import resource, sys\nresource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))"
  text = f"{limit}\nfrom calm import storage\n{code}"
  done = subprocess.run(
    [sys.executable, "-B", "-c", text, str(folder)],
    capture_output=True,
    text=True,
    cwd=PACKAGE.parent,
    check=False,
  )
  assert done.returncode == 1
  return done.stderr.splitlines()[-1]


@pytest.mark.parametrize("pieces", [1, 9000])
def test_a_full_disk_leaves_the_old_file(tmp_path, pieces):
  (tmp_path / "a.txt").write_text("whole")
  code = (
    f"with storage.replacing(sys.argv[1] + '/a.txt') as file:\n"
    f"  for _ in range({pieces}): file.write(b'x' * (9000 // {pieces}))"
  )
  message = limited(code, tmp_path)
  assert re.search(r"^OSError: Expected .*a.txt.*File too large; the old content is", message)
  assert (tmp_path / "a.txt").read_text() == "whole" and names(tmp_path) == {"a.txt"}


def test_a_full_disk_cuts_no_line_in_half(tmp_path):
  path = tmp_path / "lines"
  path.write_bytes(b"a line of 20 bytes..\n" * 190)
  code = "storage.append(sys.argv[1] + '/lines', b'x' * 500 + b'\\n')"
  assert "its 3990 bytes from before are kept" in limited(code, tmp_path)
  assert path.read_bytes() == b"a line of 20 bytes..\n" * 190
  storage.append(path, b"the next line\n")
  assert path.read_bytes().endswith(b"..\nthe next line\n")
  with pytest.raises(OSError, match="No space left on device"):
    storage.append("/dev/full", b"x")


def test_a_reader_that_has_gone_is_no_fault_of_the_place(tmp_path):
  read, write = os.pipe()
  os.close(read)
  with pytest.raises(BrokenPipeError) as caught:
    storage.write_atomically(f"/proc/self/fd/{write}", "nobody reads this")
  os.close(write)
  assert "Expected" not in str(caught.value)


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path):
  code = (
    "import os, sys, pathlib\n"
    "from calm import storage\n"
    "with storage.replacing(pathlib.Path(sys.argv[1]) / 'a.txt') as file:\n"
    "  file.write(b'half'); file.flush(); os.kill(os.getpid(), 9)"
  )
  done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=PACKAGE.parent)
  assert done.returncode == -9
  (left,) = names(tmp_path)
  assert re.fullmatch(r"\.a\.txt\.[0-9a-f]{16}\.tmp", left)
  (tmp_path / ".d.tmp").write_text("not ours")
  for name in (left, ".e.txt.00000000-17-99.0123456789abcdef.tmp", ".d.tmp"):  # of two versions
    (tmp_path / name).touch()
    os.utime(tmp_path / name, (time.time() - 90_000,) * 2)
  with storage.temporary(tmp_path / "b.txt") as living:
    storage.write_atomically(tmp_path / "a.txt", "whole")
    assert names(tmp_path) == {living.name, ".d.tmp", "a.txt"}


def writes(path: pathlib.Path) -> set[str]:
  """Calls by which a file opens, renames or writes files by itself."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text("utf-8"))):
    if not isinstance(node, ast.Call):
      continue
    name = ast.unparse(node.func).rpartition(".")[2]
    modes = [
      a.value
      for a in (*node.args, *(k.value for k in node.keywords))
      if isinstance(a, ast.Constant)
    ]
    if name in ("open", "fdopen") and any(
      isinstance(m, str) and re.fullmatch("[rbt]*[wax+][wax+bt]*", m) for m in modes
    ):
      found.add(f"{path.name}: {ast.unparse(node)}")
    if (
      name in ("write_text", "write_bytes", "rename", "mkstemp")
      or ast.unparse(node.func) == "os.replace"
    ):
      found.add(f"{path.name}: {ast.unparse(node)}")
  return found


def test_every_file_of_the_package_is_written_by_this_writer():
  here = PACKAGE / "storage.py"
  assert writes(here)  # the check can fail
  found = set().union(*(writes(path) for path in PACKAGE.rglob("*.py") if path != here))
  assert found == {
    # Into a temporary file that `write_together` has made.
    "files.py: path.write_text(text, encoding='utf-8')",
    "checkpoint.py: path.write_bytes(base.model)",
  }


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
      cwd=PACKAGE.parent,
    )
    started.append(process)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process

  yield start
  for process in started:
    process.kill()
    process.communicate()


@pytest.mark.parametrize("name", ["", "monitor.jsonl"])
def test_the_second_writer_is_refused_and_the_first_named(tmp_path, holder, name):
  target = tmp_path / name
  if name:
    holder(tmp_path / "other.jsonl").kill()  # does not meet it
  first = holder(target)
  with pytest.raises(
    storage.LockedError, match=rf"got process {first.pid} on .* \('-c .*wait for it"
  ):
    storage.lock(target)
  link = tmp_path.parent / "link"
  link.unlink(missing_ok=True)
  link.symlink_to(tmp_path)
  with pytest.raises(storage.LockedError, match=f"process {first.pid}"):
    storage.lock(link / name)
  path = tmp_path / (f".{name}.lock" if name else ".lock")
  path.write_text("{")
  with pytest.raises(storage.LockedError, match="got a process that gives no name"):
    storage.lock(target)
  first.kill()
  first.wait()
  assert path.exists()  # the dead process's lock
  with storage.lock(target):
    assert json.loads(path.read_text())["process"] == os.getpid()
  assert not path.exists()


def test_a_process_may_lock_again_and_lets_go_with_the_last_reference(tmp_path, holder):
  first, second = storage.lock(tmp_path), storage.lock(tmp_path)
  assert first is second and (tmp_path / ".lock").exists()
  del first
  assert (tmp_path / ".lock").exists()
  del second
  assert not (tmp_path / ".lock").exists()
  holder(tmp_path)
  with pytest.raises(KeyError), storage.lock(tmp_path / "a"):
    assert (tmp_path / ".a.lock").exists()
    raise KeyError("in the block")
  assert names(tmp_path) == {".lock"}


FORK = """
import os, sys
from calm import storage
held = storage.lock(sys.argv[1])
child = os.fork()
if not child:
  held.release()
  os._exit(0)
os.waitpid(child, 0)
print(os.path.exists(held.path))
"""


def test_a_forked_child_does_not_end_the_lock(tmp_path):
  run = [sys.executable, "-c", FORK, str(tmp_path)]
  done = subprocess.run(run, capture_output=True, text=True, cwd=PACKAGE.parent, check=True)
  assert done.stdout == "True\n" and not list(tmp_path.iterdir())


def test_a_planted_lock_is_not_followed(tmp_path):
  victim = tmp_path / "victim"
  victim.write_text("precious")
  (tmp_path / "folder").mkdir()
  (tmp_path / "folder" / ".lock").symlink_to(victim)
  with pytest.raises(OSError, match="symbolic links"):
    storage.lock(tmp_path / "folder")
  assert victim.read_text() == "precious"


def test_without_flock_nothing_is_locked(tmp_path, monkeypatch):
  def refuse(descriptor, flags):
    raise OSError(38, "Function not implemented")

  (tmp_path / ".lock").write_text('{"process": 1}')
  monkeypatch.setattr(storage.fcntl, "flock", refuse)
  storage.lock(tmp_path).release()


@pytest.mark.parametrize(
  ("module", "name", "code"), [("fcntl", "flock", errno.EIO), ("os", "write", errno.ENOSPC)]
)
def test_a_disk_that_fails_is_no_lock_of_another(tmp_path, monkeypatch, module, name, code):
  def fail(descriptor, argument):
    raise OSError(code, os.strerror(code))

  with monkeypatch.context() as failing:
    failing.setattr(getattr(storage, module), name, fail)
    with pytest.raises(OSError, match=r"to be a place that can be written, got: [IN]"):
      storage.lock(tmp_path)
  storage.lock(tmp_path).release()
  assert not list(tmp_path.iterdir())


def test_a_pipe_is_not_waited_for_and_a_size_is_kept(tmp_path, monkeypatch):
  os.mkfifo(tmp_path / "pipe")
  with pytest.raises(ValueError, match="regular file, got one of another kind"):
    storage.content(tmp_path / "pipe")
  (tmp_path / "file").write_bytes(b'{"a": "longer than eight"}\n')
  assert len(storage.content(tmp_path / "file", most=27)) == 27
  with pytest.raises(ValueError, match="at most 26 bytes, got more"):
    storage.content(tmp_path / "file", most=26)
  monkeypatch.setattr(storage, "LONGEST_LINE", 8)
  with pytest.raises(storage.FormatError, match=r"file:1: expected lines of at most 8"):
    list(storage.read_lines(tmp_path / "file"))
