"""The one writer of files: whole or not at all, and only regular files are ever replaced."""

import ast
import errno
import os
import pathlib
import re
import secrets
import socket
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


def test_a_new_file_has_the_permissions_that_any_program_gives(tmp_path):
  storage.write_atomically(tmp_path / "ours", "x")
  (tmp_path / "others").write_text("x")
  assert (tmp_path / "ours").stat().st_mode == (tmp_path / "others").stat().st_mode


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


def test_a_pipe_and_a_socket_are_written_to(tmp_path):
  pipe = tmp_path / "pipe"
  os.mkfifo(pipe)
  got = []
  reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
  reader.start()
  storage.write_atomically(pipe, "through the pipe")
  reader.join(10)
  assert got == [b"through the pipe"] and pipe.is_fifo()
  with socket.socket(socket.AF_UNIX) as server:
    server.bind(str(tmp_path / "socket"))
    server.listen()
    storage.write_atomically(tmp_path / "socket", "through the socket")
    connection = server.accept()[0]
    assert connection.recv(100) == b"through the socket"
    connection.close()
  assert (tmp_path / "socket").is_socket()
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
  with pytest.raises(PermissionError, match="what stood there is as it was"):
    storage.write_atomically(path, "x")
  assert path.read_text() == "kept" and names(tmp_path) == {"protected"}


def test_a_planted_link_is_never_followed(tmp_path, monkeypatch):
  victim = tmp_path / "victim"
  victim.write_text("precious")
  guess = "0123456789abcdef"
  planted = tmp_path / f".a.txt.{storage.this_process()}.{guess}.tmp"
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
  assert re.search(r"^OSError: Expected .*a.txt.*File too large; what stood there is", message)
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


def test_a_write_that_fails_half_way_is_taken_back(tmp_path, monkeypatch):
  path, write = tmp_path / "lines", os.write
  path.write_bytes(b"before\n")

  def half(descriptor, data):
    monkeypatch.setattr(os, "write", fail)
    return write(descriptor, data[:3])

  def fail(descriptor, data):
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(os, "write", half)
  with pytest.raises(OSError, match="its 7 bytes from before are kept"):
    storage.append(path, b"the next line\n")
  assert path.read_bytes() == b"before\n"


@pytest.mark.parametrize("name", ["-", "/dev/stdout"])
def test_standard_output_of_this_process_is_written_to(capfdbinary, name):
  storage.write_atomically(name, "text\n")
  sys.stdout.flush()
  assert capfdbinary.readouterr().out == b"text\n"


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
  assert re.fullmatch(r"\.a\.txt\.[0-9a-f]{8}-\d+-\d+\.[0-9a-f]{16}\.tmp", left)
  with storage.temporary(tmp_path / "b.txt") as living:
    kept = {
      living.name: "of a living writer",
      ".c.txt.00000000-17-99.0123456789abcdef.tmp": "of another machine, just now",
      ".d.tmp": "not ours",
    }
    for name, text in kept.items():
      (tmp_path / name).write_text(text)
    for name in (".e.txt.00000000-17-99.0123456789abcdef.tmp", ".f.json.123.tmp"):
      (tmp_path / name).write_text("long ago")
      os.utime(tmp_path / name, (time.time() - 7200,) * 2)
    storage.write_atomically(tmp_path / "a.txt", "whole")
    assert names(tmp_path) == {*kept, "a.txt"}


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
    "stored_vocabulary.py: path.write_bytes(base.model)",
    # Keeps what another run has left under another name.
    "infer.py: os.replace(self._partial, old)",
  }
