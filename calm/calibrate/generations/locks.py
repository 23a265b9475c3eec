"""Who writes: processes by name, and folders and files that one process writes at a time.

A lock is a file beside what it protects, held with `flock` and naming its holder. The system
lets go of it when the holder dies, however it dies; where the file system knows no `flock`, the
named process is looked for instead (its id and the time it was started).
"""

import contextlib
import errno
import functools
import hashlib
import json
import os
import pathlib
import platform
import sys
import time
import weakref
from collections.abc import Iterator
from typing import NamedTuple

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
