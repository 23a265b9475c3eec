"""Files that are read and written whole, locks, and lines of JSON.

A text goes to a temporary file beside its destination, of a name that nobody can guess, which
is then renamed: a kill or a full disk leaves the old file as it was. Only a regular file is
ever replaced, through a link the file that the link names; devices, pipes and sockets are
written to, and `-` is standard output.

A lock is a file beside what it protects, held with `flock` and naming its holder. The system
lets go of it when the holder dies, however it dies; where the file system knows no `flock`, the
named process is looked for instead (its id and the time it was started).
"""

import contextlib
import dataclasses
import errno
import functools
import hashlib
import io
import json
import math
import os
import pathlib
import platform
import re
import secrets
import socket
import stat
import sys
import time
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple

from calm import signals

try:
  import fcntl
except ImportError:  # Windows: nothing is locked there
  fcntl = None


_PROCESSES = pathlib.Path("/proc")
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)


class LockedError(OSError):
  """Another process writes there; the message names it."""


class Process(NamedTuple):
  """A process of some machine.

  Attributes:
    host: eight hexadecimal digits for the machine's name.
    pid: its number there.
    start: when it started, in the system's ticks; 0 where the system does not tell.
  """

  host: str
  pid: int
  start: int

  def __str__(self) -> str:
    return f"{self.host}-{self.pid}-{self.start}"

  def is_dead(self) -> bool | None:
    """Whether it has ended; None for a process of another machine."""
    if self.host != _host():
      return None
    start = _start(self.pid)
    if fcntl is None:
      return None
    return start is None or (start != self.start and 0 not in (start, self.start))


def this_process() -> Process:
  """The process that asks."""
  return Process(_host(), os.getpid(), _start(os.getpid()) or 0)


@functools.cache
def _host() -> str:
  return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def _start(pid: int) -> int | None:
  """When a process of this machine started: None if there is none, 0 if that is not known."""
  try:
    # The second field is the program's name, in parentheses, and may hold anything.
    return int((_PROCESSES / str(pid) / "stat").read_bytes().rpartition(b")")[2].split()[19])
  except FileNotFoundError:
    if (_PROCESSES / "self" / "stat").exists():
      return None
  except (OSError, ValueError, IndexError):
    return 0
  if fcntl is None:
    return 0
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return None
  except OSError:
    pass
  return 0


class Lock:
  """A held lock; let go of by `release`, with the last reference to it, or with the process."""

  def __init__(self, path: pathlib.Path, descriptor: int):
    self.path = path
    self.release = weakref.finalize(self, _release, path, descriptor, os.getpid())


# A process may take its own locks again: a notebook cell is run twice, an object lingers.
_held: weakref.WeakValueDictionary[str, Lock] = weakref.WeakValueDictionary()


def lock(target: str | pathlib.Path) -> Lock:
  """Takes a folder (its `.lock`) or a file (`.NAME.lock` beside it) for this process.

  Args:
    target: a folder, or a file that need not exist yet.

  Raises:
    LockedError: a living process has it; the message names it.
    OSError: the lock cannot be written.
  """
  target = pathlib.Path(os.path.realpath(target))
  path = target / ".lock" if target.is_dir() else target.with_name(f".{target.name}.lock")
  mine = _held.get(f"{os.getpid()} {path}")
  if mine is not None and mine.release.alive:
    return mine
  about = {"process": str(this_process()), "command": _command(), "since": _now()}
  try:
    descriptor = _acquire(path, target)
    try:
      os.ftruncate(descriptor, 0)
      os.write(descriptor, json.dumps(about).encode())
    except OSError:  # a full disk
      _release(path, descriptor, os.getpid())
      raise
  except LockedError:
    raise
  except OSError as error:
    raise type(error)(
      f"Expected {str(target)!r} to be a place that can be written, got: {error.strerror} for"
      f" {path.name!r}; free some space, change its permissions, or choose another."
    ) from error
  made = Lock(path, descriptor)
  _held[f"{os.getpid()} {path}"] = made
  return made


@contextlib.contextmanager
def held(target: str | pathlib.Path) -> Iterator[None]:
  """Takes `target` for as long as a block runs; errors as of `lock`."""
  made = lock(target)
  try:
    yield
  finally:
    made.release()


def _acquire(path: pathlib.Path, target: pathlib.Path) -> int:
  while True:
    # No link is followed: the lock could be planted to have another file overwritten.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | _NO_LINK, 0o644)
    try:
      try:
        if fcntl is not None:
          fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        raise LockedError(_refusal(target, _holder(descriptor))) from None
      except OSError as error:
        holder = _holder(descriptor)
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
          raise
        if (process := _process(holder)) is not None and process.is_dead() is False:
          raise LockedError(_refusal(target, holder)) from None
      # Its last holder may have removed the file between our opening and locking it.
      if os.path.exists(path) and os.path.samestat(os.fstat(descriptor), os.lstat(path)):
        return descriptor
    except BaseException:
      os.close(descriptor)
      raise
    os.close(descriptor)


def _release(path: pathlib.Path, descriptor: int, pid: int) -> None:
  # A forked child has a copy of the lock, which is not the child's to end.
  if os.getpid() == pid:
    with contextlib.suppress(OSError):
      os.unlink(path)
  with contextlib.suppress(OSError):
    os.close(descriptor)


def _holder(descriptor: int) -> dict[str, str]:
  try:
    value = json.loads(os.read(descriptor, 4096).decode("utf-8", "replace") or "{}")
  except ValueError:
    return {}
  return value if isinstance(value, dict) else {}


def _process(holder: dict[str, str]) -> Process | None:
  host, _, rest = str(holder.get("process", "")).partition("-")
  pid, _, start = rest.partition("-")
  return Process(host, int(pid), int(start)) if pid.isdigit() and start.isdigit() else None


def _refusal(target: pathlib.Path, holder: dict[str, str]) -> str:
  process = _process(holder)
  where = "" if process is None or process.host == _host() else " of another machine"
  who = "a process that gives no name" if process is None else f"process {process.pid}{where}"
  command, since = (str(holder.get(name, "?")) for name in ("command", "since"))
  return (
    f"Expected {str(target)!r} to have one writer at a time, got {who} ({command!r}, since"
    f" {since}) at work on it; wait for it to end, stop it, or choose another place."
  )


def _command() -> str:
  return " ".join(sys.argv)[:200]


def _now() -> str:
  return time.strftime("%Y-%m-%d %H:%M:%S")


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
  owner = this_process()
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
    dead = Process(found[1], int(found[2]), int(found[3])).is_dead()
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


LONGEST_LINE = 2**26
_RESUME = "the last line is cut off: resume the run that wrote it"


class FormatError(ValueError):
  """A file whose content cannot be used; the message names the file and the line."""


@dataclasses.dataclass(frozen=True)
class Line:
  """One line of a file that holds a JSON object; `offset` is where it begins, in bytes."""

  path: pathlib.Path
  number: int
  value: dict[str, Any]
  offset: int = 0

  def error(self, message: str) -> FormatError:
    """An error that names this line."""
    return FormatError(f"{self.path}:{self.number}: {message}")


def read_lines(path: str | pathlib.Path, *, pipes: bool = False) -> Iterator[Line]:
  """Reads a JSON Lines file of objects; blank lines are skipped.

  Args:
    path: the file.
    pipes: whether it may be a pipe or a device, whose lines are waited for.

  Raises:
    FormatError: the file is missing or unreadable, a line is no UTF-8 or no JSON object,
      or the last line is cut off.
  """
  path = pathlib.Path(path)
  offset = following = 0
  try:
    with open(path, "rb") if pipes else opened(path) as file:
      for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE + 1), b""), 1):
        signals.check()
        if len(line) > LONGEST_LINE:
          raise FormatError(
            f"{path}:{number}: expected lines of at most {LONGEST_LINE} bytes, got a longer"
            " one; restore the file, or generate again."
          )
        offset, following = following, following + len(line)
        raw = line.removesuffix(b"\n")
        if not raw.strip():
          continue
        value, problem = parse_line(raw)
        if value is None:
          cut_off = not line.endswith(b"\n")
          way_out = _RESUME if cut_off else "write the line again"
          raise FormatError(
            f"{path}:{number}: expected a JSON object, got {problem}; {way_out}."
          )
        yield Line(path, number, value, offset)
  except OSError as error:
    raise FormatError(
      f"{path}: expected a file that can be read, got: {error.strerror}; check its path and"
      " rights."
    ) from error


def parse_line(raw: bytes) -> tuple[dict[str, Any] | None, str]:
  """One line as (JSON object, ''), or (None, what it is instead)."""
  try:
    value = parse_json(raw)
  except UnicodeDecodeError as error:
    return None, f"invalid UTF-8 at byte {error.start}"
  except ValueError as error:
    return None, f"{raw[:60].decode('utf-8', 'replace')!r} ({error})"
  return (value, "") if isinstance(value, dict) else (None, type(value).__name__)


def dump_line(value: Mapping[str, Any]) -> str:
  """One JSON Lines line, its newline included."""
  return json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n"


def drop_partial_line(path: pathlib.Path) -> str | None:
  """Repairs the end of a file whose writer was killed; returns what was done, if anything."""
  with open(path, "rb") as file:
    size = file.seek(0, 2)
    file.seek(max(0, size - LONGEST_LINE - 1))
    last = file.read()
    last = last[last.rfind(b"\n") + 1 :]
    if not last or len(last) > LONGEST_LINE:  # none, or no line, which `read_lines` names
      return None
    start = size - len(last)
    file.seek(0)
    pieces = iter(lambda: file.read(2**20), b"")
    number = 1 + sum(piece.count(b"\n") for piece in pieces)
  if parse_line(last)[0] is not None:
    append(path, b"\n")
    return None
  with open(path, "r+b") as file:
    file.truncate(start)
  return f"{path}:{number}: the last line was cut off and has been dropped ({len(last)} bytes)."
