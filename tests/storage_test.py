"""Files are written whole or not at all, one writer at a time; what is read is
bounded.
"""

import errno
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


def python(
  code: str, *arguments: object, **options
) -> subprocess.CompletedProcess:
  run = [
    sys.executable,
    "-B",
    "-c",
    f"import os, sys\nfrom calm import storage\n{code}",
  ]
  options = {
    "capture_output": True,
    "text": True,
    "cwd": PACKAGE.parent,
    **options,
  }
  return subprocess.run([*run, *map(str, arguments)], check=False, **options)


def test_a_file_is_replaced_whole_and_nothing_is_left(tmp_path):
  path = tmp_path / "a.txt"
  storage.write_atomically(path, "one")
  path.chmod(0o640)
  storage.write_atomically(path, b"\xfftwo")
  assert (
    path.read_bytes() == b"\xfftwo" and path.stat().st_mode & 0o777 == 0o640
  )
  storage.write_atomically(tmp_path / ("é" * 100), "long names too")
  with storage.replacing(path) as file:
    file.write(b"new")
    file.flush()
    assert path.read_bytes() == b"\xfftwo"
  with pytest.raises(KeyError), storage.replacing(path) as file:
    file.write(b"half")
    raise KeyError("something else went wrong")
  with (
    pytest.raises(OSError, match=r"^\[Errno 5000\] of another file"),
    storage.replacing(path),
  ):
    raise OSError(5000, "of another file")
  assert path.read_text() == "new" and names(tmp_path) == {"a.txt", "é" * 100}


def test_a_link_stays_and_its_file_is_replaced(tmp_path):
  (tmp_path / "sub").mkdir()
  link = tmp_path / "link"
  there = tmp_path / "sub" / "file"
  (tmp_path / "sub" / "step").symlink_to("file")
  link.symlink_to("sub/step")
  storage.write_atomically(link, "made through the link")
  storage.append(link, b", and appended to")
  assert there.read_text() == "made through the link, and appended to"
  storage.write_atomically(link, "and replaced")
  assert (
    link.is_symlink()
    and there.read_text() == "and replaced"
    and not there.is_symlink()
  )
  assert names(tmp_path) == {"sub", "link"} and names(tmp_path / "sub") == {
    "file",
    "step",
  }
  (circle := tmp_path / "circle").symlink_to("circle")
  with pytest.raises(
    OSError, match="circle' to be a file that can be written whole"
  ):
    storage.write_atomically(circle, "x")


def test_a_pipe_is_written_to_and_not_read(tmp_path):
  os.mkfifo(pipe := tmp_path / "pipe")
  got = []
  reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
  reader.start()
  storage.write_atomically(pipe, "through the pipe")
  reader.join(10)
  assert got == [b"through the pipe"] and pipe.is_fifo()
  with pytest.raises(ValueError, match="regular file, got one of another kind"):
    storage.content(pipe)
  read, write = os.pipe()
  os.close(read)
  with pytest.raises(BrokenPipeError) as caught:  # no fault of the place
    storage.write_atomically(f"/proc/self/fd/{write}", "nobody reads this")
  os.close(write)
  assert "Expected" not in str(caught.value)


def test_standard_output_is_a_stream_even_where_it_is_a_file(tmp_path):
  code = (
    "print('before'); storage.write_atomically('-', 'text\\n'); print('after')"
  )
  with open(tmp_path / "out", "wb") as out:
    assert not python(code, capture_output=False, stdout=out).returncode
  assert (tmp_path / "out").read_text() == "before\ntext\nafter\n"
  assert names(tmp_path) == {"out"}


def test_a_folder_and_a_file_without_permission_are_refused(
  tmp_path, monkeypatch
):
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
  nowhere = tmp_path / "nowhere"
  victim.write_text("precious")
  guess = "0123456789abcdef"
  (tmp_path / f".a.txt.{guess}.tmp").symlink_to(victim)
  # as if it could be guessed
  monkeypatch.setattr(secrets, "token_hex", lambda size: guess)
  with pytest.raises(FileExistsError):
    storage.write_atomically(tmp_path / "a.txt", "x")
  (tmp_path / "step").symlink_to(nowhere)
  (tmp_path / "link").symlink_to(tmp_path / "step")
  with pytest.raises(
    FileNotFoundError, match=r"link' to be a file, .* got a link to a file"
  ):
    storage.append(tmp_path / "link", b"x")
  (tmp_path / "folder").mkdir()
  (tmp_path / "folder" / ".lock").symlink_to(victim)
  with pytest.raises(OSError, match="symbolic links"):
    storage.lock(tmp_path / "folder")
  assert victim.read_text() == "precious" and not nowhere.exists()
  assert not (tmp_path / "a.txt").exists()


# A process that may write no file beyond a size, as on a full disk.
LIMIT = (
  "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
)


def test_a_full_disk_leaves_the_old_file(tmp_path):
  (tmp_path / "a.txt").write_text("whole")
  code = (
    f"{LIMIT}with storage.replacing(sys.argv[1] + '/a.txt') as file:\n"
    "  for _ in range(9000): file.write(b'x')"
  )
  message = python(code, tmp_path).stderr.splitlines()[-1]
  assert re.search(
    r"^OSError: Expected .*a.txt.*File too large; the old content is", message
  )
  assert (tmp_path / "a.txt").read_text() == "whole" and names(tmp_path) == {
    "a.txt"
  }


def test_a_full_disk_cuts_no_line_in_half(tmp_path):
  path = tmp_path / "lines"
  path.write_bytes(b"a line of 20 bytes..\n" * 190)
  done = python(f"{LIMIT}storage.append(sys.argv[1], b'x' * 500)", path)
  assert "the old content is kept" in done.stderr
  storage.append(path, b"the next line\n")
  assert (
    path.read_bytes() == b"a line of 20 bytes..\n" * 190 + b"the next line\n"
  )


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path):
  code = (
    "with storage.replacing(sys.argv[1]) as file:\n"
    "  file.write(b'half'); file.flush(); os.kill(os.getpid(), 9)"
  )
  assert python(code, tmp_path / "a.txt").returncode == -9
  (left,) = names(tmp_path)
  assert re.fullmatch(r"\.a\.txt\.[0-9a-f]{16}\.tmp", left)
  (tmp_path / ".d.tmp").write_text("not ours")
  for name in (left, ".d.tmp"):
    os.utime(tmp_path / name, (time.time() - 90_000,) * 2)
  with storage.temporary(tmp_path / "b.txt") as living:
    storage.write_atomically(tmp_path / "a.txt", "whole")
    assert names(tmp_path) == {living.name, ".d.tmp", "a.txt"}


def test_every_file_of_the_package_is_written_by_this_writer():
  writes = re.compile(
    r"\.write_(?:text|bytes)\(|os\.replace\(|\.rename\(|open\([^\n]*\"[rbt]*[wax+]"
  )
  found = [
    path.name
    for path in sorted(PACKAGE.rglob("*.py"))
    for _ in writes.findall(path.read_text("utf-8"))
  ]
  # The two others write into a temporary file that `write_together` has made.
  assert set(found) == {"storage.py", "files.py", "checkpoint.py"}
  assert found.count("files.py") == found.count("checkpoint.py") == 1


HOLDER = """
from calm import storage
import sys
held = storage.lock(sys.argv[1])
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("name", ["", "monitor.jsonl"])
def test_the_second_writer_is_refused_and_the_first_named(tmp_path, name):
  target = tmp_path / name
  (link := tmp_path / "link").symlink_to(tmp_path)
  run = [sys.executable, "-c", HOLDER, str(target)]
  with subprocess.Popen(
    run, stdin=-1, stdout=-1, text=True, cwd=PACKAGE.parent
  ) as first:
    assert first.stdout is not None and first.stdout.readline() == "held\n"
    refused = f"got 'process {first.pid} on .*wait for it"
    for way in (target, link / name):
      with pytest.raises(storage.LockedError, match=refused):
        storage.lock(way)
    storage.lock(tmp_path / "other.jsonl").release()  # does not meet it
    first.kill()
  path = tmp_path / (f".{name}.lock" if name else ".lock")
  assert path.exists()  # the dead process's lock
  with storage.lock(target):
    assert path.read_text().startswith(f"process {os.getpid()} ")
  assert not path.exists()


def test_a_process_may_lock_again_and_lets_go_with_the_last_reference(tmp_path):
  first = storage.lock(tmp_path)
  second = storage.lock(tmp_path)
  assert first is second and (tmp_path / ".lock").exists()
  del first
  assert (tmp_path / ".lock").exists()
  del second
  assert not (tmp_path / ".lock").exists()


@pytest.mark.parametrize(
  ("module", "name", "code"),
  [
    ("fcntl", "flock", errno.EIO),
    ("os", "write", errno.ENOSPC),
    ("fcntl", "flock", 38),
  ],
)
def test_a_disk_that_fails_is_no_lock_of_another(
  tmp_path, monkeypatch, module, name, code
):
  def fail(descriptor, argument):
    raise OSError(code, os.strerror(code))

  with monkeypatch.context() as failing:
    failing.setattr(getattr(storage, module), name, fail)
    if code == 38:  # a file system without locks: nothing is locked
      storage.lock(tmp_path).release()
      return
    with pytest.raises(OSError, match=r"to be a file that .*, got: [IN]"):
      storage.lock(tmp_path)
  storage.lock(tmp_path).release()
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  "text", ['{"a": 1, "a": 1}', '[{"b": {"a": 0, "c": 1, "a": 2}}]']
)
def test_a_key_that_comes_twice_in_an_object_is_refused(text):
  with pytest.raises(ValueError, match="once, got 'a' twice; keep one"):
    storage.parse_json(text)


def test_lines_are_read_from_an_unnamed_pipe_and_from_no_named_one(tmp_path):
  os.mkfifo(named := tmp_path / "pipe")
  with pytest.raises(storage.FormatError, match="got a named pipe"):
    list(storage.read_lines(named, pipes=True))
  read, write = os.pipe()
  os.write(write, b'{"a": 1}\n')
  os.close(write)
  (line,) = storage.read_lines(f"/dev/fd/{read}", pipes=True)
  os.close(read)
  assert line.value == {"a": 1}
