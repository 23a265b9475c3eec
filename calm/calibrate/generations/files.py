"""The one writer of files: what is there is whole, before, while and after it is written.

Every file of the package is written here. A text goes to a temporary file beside its
destination, of a name that nobody can guess, which is then renamed: a kill or a full disk
leaves the old file as it was. Only a regular file is ever replaced, through a link the file
that the link names; devices, pipes and sockets are written to, and `-` is standard output.
"""

import contextlib
import errno
import hashlib
import io
import json
import math
import os
import pathlib
import re
import secrets
import socket
import stat
import sys
import time
from collections.abc import Collection, Iterable, Iterator
from typing import Any, BinaryIO

from calm.calibrate.generations import locks

# .NAME.HOST-PID-START.TOKEN.tmp; versions before wrote .NAME.PID.tmp and NAME.partial.
_TEMPORARY = re.compile(r"\..+\.([0-9a-f]{8})-(\d+)-(\d+)\.[0-9a-f]{16}\.tmp", re.DOTALL)
_EARLIER = re.compile(r"\..+\.\d+\.tmp", re.DOTALL)
# A temporary file of another machine that nobody has written to for so long is left over.
_ABANDONED_SECONDS = 3600
_LONGEST_NAME = 120
# What a full disk, quota or limit says in the middle of writing.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
# What a number must hold to be beyond float64.
_HUGE = re.compile(r"[0-9][eE]\+?[0-9]{3}|[0-9]{309}")
_BINARY, _NO_WAIT = getattr(os, "O_BINARY", 0), getattr(os, "O_NONBLOCK", 0)
# What is read at once may have so many bytes: the names of some millions of prompts.
MOST_BYTES = 2**28


def write_atomically(path: str | pathlib.Path, content: str | bytes) -> None:
  """Writes a file that is never seen half written.

  Args:
    path: the file, a link to one, a device or a pipe, or `-` for standard output.
    content: UTF-8 is written for a text.

  Raises:
    OSError: it cannot be written; what stood there is as it was.
  """
  with replacing(path) as file:
    file.write(content.encode("utf-8") if isinstance(content, str) else content)


@contextlib.contextmanager
def replacing(path: str | pathlib.Path) -> Iterator[BinaryIO]:
  """A binary file to write to, piece by piece; it takes its place when the block ends well.

  Args:
    path: as for `write_atomically`. Where it is no regular file, pieces go there at once.

  Raises:
    OSError: it cannot be written; what stood there is as it was.
  """
  with contextlib.ExitStack() as stack:
    with _explaining(path):
      target = destination(path)
      partial = None if target is None else stack.enter_context(temporary(target))
      file = stack.enter_context(_stream(path) if partial is None else _quiet(partial))
    with _explaining(path, _FULL):
      yield file
      file.flush()
    if partial is not None and target is not None:
      with _explaining(path):
        put(partial, target)


def append(path: str | pathlib.Path, content: bytes) -> None:
  """Appends whole lines, or nothing: what a full disk cut off is taken back.

  Raises:
    OSError: it cannot be written; the message says how much is kept.
  """
  flags = os.O_WRONLY | os.O_APPEND | _BINARY | _NO_WAIT  # no pipe is waited for
  with _explaining(path):
    try:
      descriptor = os.open(path, flags)
    except FileNotFoundError:
      refuse_planted_links([path])
      descriptor = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o666)
  try:
    before = os.fstat(descriptor)
    with _explaining(path, kept=f"its {before.st_size} bytes from before are kept"):
      try:
        rest = memoryview(content)
        while rest:
          rest = rest[os.write(descriptor, rest) :]
      except BaseException:
        if stat.S_ISREG(before.st_mode):
          os.ftruncate(descriptor, before.st_size)
        raise
  finally:
    os.close(descriptor)


@contextlib.contextmanager
def temporary(target: pathlib.Path) -> Iterator[pathlib.Path]:
  """A new empty file beside `target`, for `put`; removed at the end if it is still there.

  What killed processes left in the folder is removed first.
  """
  sweep(target.parent)
  name = target.name
  if len(os.fsencode(name)) > _LONGEST_NAME:
    name = hashlib.sha256(os.fsencode(name)).hexdigest()[:32]
  owner = locks.this_process()
  partial = target.with_name(f".{name}.{owner}.{secrets.token_hex(8)}.tmp")
  # Fails where anything of that name is there, a link included.
  os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
  try:
    yield partial
  finally:
    with contextlib.suppress(OSError):
      partial.unlink()


def put(partial: pathlib.Path, target: pathlib.Path) -> None:
  """Renames a whole file to its place, once it is on the disk.

  Raises:
    OSError: `target` may not be written, or is no regular file.
  """
  with contextlib.suppress(FileNotFoundError):
    there = os.stat(target)
    if not stat.S_ISREG(there.st_mode) or not os.access(target, os.W_OK):
      raise PermissionError(None, "it is no regular file that can be written")
    os.chmod(partial, stat.S_IMODE(there.st_mode))
  _sync(partial, os.O_RDWR)
  os.replace(partial, target)
  with contextlib.suppress(OSError):  # not every system lets one sync a folder
    _sync(target.parent, os.O_RDONLY)


def destination(path: str | pathlib.Path) -> pathlib.Path | None:
  """The regular file, there or to be made, that a path names; None for anything else.

  Raises:
    OSError: it is a folder, or links lead in a circle.
  """
  if str(path) == "-":
    return None
  path = _followed(path)
  try:
    mode = os.stat(path).st_mode
  except FileNotFoundError:
    return path
  if stat.S_ISDIR(mode):
    raise IsADirectoryError(None, "Is a directory")
  return path if stat.S_ISREG(mode) and not _of_a_process(path) else None


def refuse_planted_links(paths: Iterable[str | pathlib.Path]) -> None:
  """Refuses links to files that do not exist, where nobody but an intruder has put any.

  Raises:
    OSError: names the link, which would have a file made where it leads.
  """
  for path in paths:
    if os.path.islink(path) and not os.path.exists(path):
      raise FileNotFoundError(
        f"Expected {str(path)!r} to be a file, or a name that is free, got a link to a file"
        " that does not exist; take it away."
      )


def sweep(directory: pathlib.Path) -> list[str]:
  """Removes temporary files whose writers are dead; returns their names."""
  removed = []
  with contextlib.suppress(OSError), os.scandir(directory) as entries:
    for entry in entries:
      with contextlib.suppress(OSError):  # another process may have removed it
        if entry.name.endswith(".tmp") and _left_over(entry):
          os.unlink(entry.path)
          removed.append(entry.name)
  return sorted(removed)


@contextlib.contextmanager
def opened(path: str | pathlib.Path) -> Iterator[io.BufferedReader]:
  """A regular file to read from: pipes may be waited for, and devices need not end.

  Raises:
    ValueError: it is of another kind.
    OSError: it cannot be read.
  """
  # A pipe that nobody writes to would be waited for here.
  with open(os.open(path, os.O_RDONLY | _BINARY | _NO_WAIT), "rb") as file:
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
      raise ValueError(
        f"Expected {str(path)!r} to be a regular file, got one of another kind; copy what it"
        " gives to a file."
      )
    yield file


def content(path: str | pathlib.Path, most: int = MOST_BYTES) -> bytes:
  """What a file holds, for files that are read at once.

  Raises:
    ValueError: it has more than `most` bytes, or is no file that ends.
    OSError: it cannot be read.
  """
  with opened(path) as file:
    size = os.fstat(file.fileno()).st_size
    # `read(most)` would make room for as much.
    found = file.read() if size <= most else b""
  if size > most or len(found) > most:
    raise ValueError(
      f"Expected {str(path)!r} to have at most {most} bytes, got more; it is a file of another"
      " kind, or made to fill the memory."
    )
  return found


def parse_json(content: str | bytes) -> Any:
  """A JSON value, of UTF-8 where bytes are given.

  Raises:
    ValueError: no UTF-8, no JSON (NaN and infinities are none), a number beyond float64, or
      too deep to be read.
  """
  text = content.decode("utf-8") if isinstance(content, bytes) else content
  # Python reads 1e400 as infinity. To look at every number takes long: only where one may be.
  number = _finite if _HUGE.search(text) else None
  try:
    return json.loads(text, parse_constant=_refuse_constant, parse_float=number)
  except RecursionError:
    raise ValueError(
      "expected JSON that can be read, got lists or objects in one another, too deep;"
      " flatten it"
    ) from None


def _refuse_constant(name: str) -> float:
  raise ValueError(f"expected JSON, got {name}; write a number or null")


def _finite(digits: str) -> float:
  if not math.isfinite(value := float(digits)):
    raise ValueError(
      f"expected numbers within float64, got {digits[:40]}; write null or a smaller one"
    )
  return value


def checksum(path: str | pathlib.Path) -> str:
  """SHA-256 (hexadecimal) of a regular file."""
  with opened(path) as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _left_over(entry: os.DirEntry) -> bool:
  found = _TEMPORARY.fullmatch(entry.name)
  if not (found or _EARLIER.fullmatch(entry.name)) or not entry.is_file(follow_symlinks=False):
    return False
  dead = None
  if found:
    dead = locks.Process(found[1], int(found[2]), int(found[3])).is_dead()
  if dead is None:
    return time.time() - entry.stat(follow_symlinks=False).st_mtime > _ABANDONED_SECONDS
  return dead


def _followed(path: str | pathlib.Path) -> pathlib.Path:
  """Where links lead; an open file of a process, as /dev/stdout is one, is the end of it."""
  path = pathlib.Path(path)
  for _ in range(40):
    if not path.is_symlink() or _of_a_process(path):
      break
    path = path.parent / os.readlink(path)
  return path


def _of_a_process(path: pathlib.Path) -> bool:
  return os.path.realpath(path.parent).startswith("/proc/")


@contextlib.contextmanager
def _quiet(path: pathlib.Path | int) -> Iterator[BinaryIO]:
  """An opened file: `flush` has said what could not be written, `close` does not repeat it."""
  file = open(path, "wb")  # noqa: SIM115
  try:
    yield file
  finally:
    with contextlib.suppress(OSError):
      file.close()


@contextlib.contextmanager
def _stream(path: str | pathlib.Path) -> Iterator[BinaryIO]:
  """Standard output, a device, a pipe or a socket; nothing of it is cut off or replaced."""
  sys.stdout.flush()
  if str(path) == "-":
    yield sys.stdout.buffer
    return
  end = _followed(path)
  if end.name.isdigit() and os.path.realpath(end.parent) == f"/proc/{os.getpid()}/fd":
    # Its place in the file is shared with whoever else prints there.
    descriptor = os.dup(int(end.name))
  elif stat.S_ISSOCK(os.stat(end).st_mode):
    with socket.socket(socket.AF_UNIX) as connection:
      connection.connect(os.fspath(end))
      descriptor = connection.detach()
  else:
    descriptor = os.open(end, os.O_WRONLY | os.O_APPEND)
  with _quiet(descriptor) as file:
    yield file


def _sync(path: pathlib.Path, flags: int) -> None:
  descriptor = os.open(path, flags)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


@contextlib.contextmanager
def _explaining(
  path: str | pathlib.Path,
  codes: Collection[int] = (),
  kept: str = "what stood there is as it was",
) -> Iterator[None]:
  """Errors (those of `codes`, if given) say which file, what is kept, and what to do."""
  try:
    yield
  except BrokenPipeError:  # its reader has gone; nothing is wrong with the place
    raise
  except OSError as error:
    if codes and error.errno not in codes:
      raise
    raise type(error)(
      f"Expected {str(path)!r} to be a file that can be written whole, got:"
      f" {error.strerror or error}; {kept}. Free some space, or choose a folder that can be"
      " written."
    ) from error
