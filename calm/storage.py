"""Files that are read and written whole, locks, JSON lines, and results under
their digests.

New content goes to a temporary file of a name that nobody can guess, which is
renamed at the end: a kill or a full disk leaves the old file as it was. Only a
regular file is replaced (at the end of links); devices and pipes are written
to, and `-` is standard output.
"""

import collections
import contextlib
import dataclasses
import errno
import hashlib
import io
import json
import math
import os
import pathlib
import platform
import re
import secrets
import stat
import sys
import time
import types
import typing
import weakref
from collections.abc import (
  Callable,
  Collection,
  Iterable,
  Iterator,
  Mapping,
  Sequence,
)
from typing import Any, BinaryIO, TypeVar

try:
  import fcntl
except ImportError:  # Windows: nothing is locked there
  fcntl = None

LONGEST_LINE = 2**26
# of a file that is read at once: the names of some millions of prompts
MOST_BYTES = 2**28
# Texts pack to a third or a tenth; a file that unpacks to less than this is not
# judged.
UNPACKED = 2**28
UNPACKED_RATIO = 200
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)
_BINARY = getattr(os, "O_BINARY", 0)
# opening a pipe does not wait for its other end
_NO_WAIT = getattr(os, "O_NONBLOCK", 0)
_NO_FLOCK = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
# What a full disk, a quota or a limit answers in the middle of writing.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
# What reading a damaged file may lead to.
DAMAGE = (
  AttributeError,
  KeyError,
  OverflowError,
  RecursionError,
  TypeError,
  ValueError,
)
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{16}\.tmp", re.DOTALL)
# Nobody has written for so long to a temporary file that a killed process left.
_ABANDONED_SECONDS = 86_400
# Of results; raised whenever numbers change their meaning: older files are not
# read again.
_VERSION = 1

T = TypeVar("T")


# ---- Locks


class LockedError(OSError):
  """Another process writes there; the message names it."""


class Lock(contextlib.AbstractContextManager):
  """A held lock; let go of by `release`, at the end of a block, or with the
  last reference.
  """

  def __init__(self, path: pathlib.Path, target: pathlib.Path):
    self.path = path
    self.release = weakref.finalize(
      self, _release, path, _acquire(path, target)
    )

  def __exit__(self, *_: object) -> None:
    self.release()


# A process may take its own locks again: a notebook cell is run twice, an
# object lingers.
_locks = weakref.WeakValueDictionary[pathlib.Path, Lock]()


def lock(target: str | pathlib.Path) -> Lock:
  """Takes a folder (its `.lock`) or a file (`.NAME.lock` beside it) for this
  process.

  The lock is `flock`'s, which the system lets go of when its holder dies, on a
  file that names the holder; LockedError names it. Where a file system has
  none, nothing is locked.
  """
  target = pathlib.Path(os.path.realpath(target))
  path = (
    target / ".lock"
    if target.is_dir()
    else target.with_name(f".{target.name}.lock")
  )
  made = _locks.get(path)
  if made is None or not made.release.alive:
    with _explaining(target):
      made = _locks[path] = Lock(path, target)
  return made


def _acquire(path: pathlib.Path, target: pathlib.Path) -> int:
  """The descriptor of a locked file."""
  about = (
    f"process {os.getpid()} on {platform.node()}: {' '.join(sys.argv)[:200]}"
  )
  while True:
    # A planted link is not followed: the file at its end would be overwritten.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | _NO_LINK, 0o644)
    with contextlib.ExitStack() as stack:
      stack.callback(os.close, descriptor)
      try:
        if fcntl is not None:
          fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        holder = os.read(descriptor, 300).decode("utf-8", "replace")
        raise LockedError(
          f"Expected {str(target)!r} to have one writer at a time, got "
          f"{holder!r} at work on"
          " it; wait for it to end, stop it, or choose another place."
        ) from None
      except OSError as error:
        if error.errno not in _NO_FLOCK:
          raise
      # Its last holder may have removed the file between our opening and
      # locking it.
      if os.path.exists(path) and os.path.samestat(
        os.fstat(descriptor), os.lstat(path)
      ):
        stack.callback(os.unlink, path)  # where the disk is full
        os.ftruncate(descriptor, 0)
        os.write(descriptor, about.encode("utf-8", "replace"))
        stack.pop_all()
        return descriptor


def _release(path: pathlib.Path, descriptor: int) -> None:
  with contextlib.suppress(OSError):
    os.unlink(path)
  with contextlib.suppress(OSError):
    os.close(descriptor)


# ---- Writing


def write_atomically(path: str | pathlib.Path, content: str | bytes) -> None:
  """Writes a file (a text in UTF-8) that is never seen half written; see
  `replacing`.
  """
  with replacing(path) as file:
    file.write(content.encode("utf-8") if isinstance(content, str) else content)


@contextlib.contextmanager
def replacing(path: str | pathlib.Path) -> Iterator[BinaryIO]:
  """A binary file to write to, piece by piece; it takes its place when the
  block ends well.

  `path` may be a link to it. To a device, a pipe or `-` (standard output)
  pieces go at once. OSError where it cannot be written; the old content is
  kept.
  """
  with contextlib.ExitStack() as stack:
    with _explaining(path):
      target = destination(path)
      partial = (
        None if target is None else stack.enter_context(temporary(target))
      )
      sys.stdout.flush()
      if str(path) == "-":
        place: Any = contextlib.nullcontext(sys.stdout.buffer)
      else:
        place = open(partial or path, "ab")  # noqa: SIM115
    with _explaining(path, _FULL), place as file:
      yield file
      file.flush()
    if partial is not None and target is not None:
      with _explaining(path):
        put(partial, target)


def append(path: str | pathlib.Path, content: bytes) -> None:
  """Appends whole lines, or nothing: a write that fails half way is taken
  back.
  """
  refuse_planted_links([path])
  with _explaining(path), open(path, "ab", buffering=0) as file:
    before = file.tell()
    rest = memoryview(content)
    try:
      while rest:
        rest = rest[file.write(rest) :]
    except OSError:
      file.truncate(before)
      raise


@contextlib.contextmanager
def temporary(target: pathlib.Path) -> Iterator[pathlib.Path]:
  """A new empty file beside `target`, for `put`; removed at the end if it is
  still there.

  Temporary files that killed processes left in the folder a day ago are removed
  first.
  """
  with contextlib.suppress(OSError), os.scandir(target.parent) as entries:
    for entry in filter(
      lambda entry: _TEMPORARY.fullmatch(entry.name), entries
    ):
      with contextlib.suppress(OSError):  # another process may have removed it
        seconds = time.time() - entry.stat(follow_symlinks=False).st_mtime
        if seconds > _ABANDONED_SECONDS and entry.is_file(
          follow_symlinks=False
        ):
          os.unlink(entry.path)
  partial = target.with_name(f".{target.name[:40]}.{secrets.token_hex(8)}.tmp")
  # Fails where anything of that name is there, a link included.
  os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
  try:
    yield partial
  finally:
    with contextlib.suppress(OSError):
      partial.unlink()


def put(partial: pathlib.Path, target: pathlib.Path) -> None:
  """Renames a whole file to its place, once it is on the disk; OSError where it
  may not.
  """
  with contextlib.suppress(FileNotFoundError):
    old = os.stat(target)
    if not stat.S_ISREG(old.st_mode) or not os.access(target, os.W_OK):
      raise PermissionError(None, "it is no regular file that can be written")
    os.chmod(partial, stat.S_IMODE(old.st_mode))
  _sync(partial, os.O_RDWR)
  os.replace(partial, target)
  with contextlib.suppress(OSError):  # not every system can sync a folder
    _sync(target.parent, os.O_RDONLY)


def _sync(path: pathlib.Path, flags: int) -> None:
  descriptor = os.open(path, flags)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def destination(path: str | pathlib.Path) -> pathlib.Path | None:
  """The regular file, present or new, that a path names; None for a device,
  pipe or stream.
  """
  if str(path) == "-":
    return None
  end = pathlib.Path(os.path.realpath(path) if os.path.islink(path) else path)
  try:
    mode = os.stat(path).st_mode
  except FileNotFoundError:
    return end
  if stat.S_ISDIR(mode):
    raise IsADirectoryError(None, "Is a directory")
  return end if stat.S_ISREG(mode) else None


@contextlib.contextmanager
def _explaining(
  path: str | pathlib.Path, codes: Collection[int] = ()
) -> Iterator[None]:
  """Within the block, errors (of `codes`, if any) name the file and a way
  out.
  """
  try:
    yield
  except (BrokenPipeError, LockedError):  # nothing is wrong with the place
    raise
  except OSError as error:
    if codes and error.errno not in codes:
      raise
    raise type(error)(
      f"Expected {str(path)!r} to be a file that can be written whole, got:"
      f" {error.strerror or error}; the old content is kept. Free some "
      "space, or choose a"
      " folder that can be written."
    ) from error


def refuse_planted_links(paths: Iterable[str | pathlib.Path]) -> None:
  """OSError for links to files that do not exist: writing would make one where
  they lead.
  """
  for path in paths:
    if os.path.islink(path) and not os.path.exists(path):
      raise FileNotFoundError(
        f"Expected {str(path)!r} to be a file, or a name that is free, got a "
        "link to a file"
        " that does not exist; take it away."
      )


# ---- Reading


@contextlib.contextmanager
def opened(path: str | os.PathLike) -> Iterator[io.BufferedReader]:
  """A regular file to read from; ValueError for pipes and devices, which may
  never end.
  """
  with open(os.open(path, os.O_RDONLY | _BINARY | _NO_WAIT), "rb") as file:
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
      raise ValueError(
        f"Expected {str(path)!r} to be a regular file, got one of another "
        "kind; copy what it"
        " gives to a file."
      )
    yield file


def is_named_pipe(path: str | os.PathLike) -> bool:
  """Whether a path leads to a FIFO of a folder, which may wait for its other
  end for ever. `/dev/stdout` and what a shell names for `<(...)` have theirs.
  """
  try:
    return stat.S_ISFIFO(os.stat(os.path.realpath(path)).st_mode)
  except OSError:
    return False


def content(path: str | pathlib.Path, most: int = MOST_BYTES) -> bytes:
  """The bytes of a regular file; ValueError where it has more than `most`."""
  with opened(path) as file:
    size = os.fstat(file.fileno()).st_size
    # `read(most)` would allocate as much
    read = file.read() if size <= most else b""
  if size > most or len(read) > most:
    raise ValueError(
      f"Expected {str(path)!r} to have at most {most} bytes, got more; it is "
      "a file of another"
      " kind, or made to fill the memory."
    )
  return read


@contextlib.contextmanager
def reading(
  path: str | pathlib.Path, kind: str, way_out: str
) -> Iterator[None]:
  """Within the block, what a damaged file leads to is a ValueError that names
  it, what it should be, and a way out.
  """
  try:
    yield
  except (OSError, *DAMAGE) as error:
    raise ValueError(
      f"Expected {str(path)!r} to be {kind}, got something else ({error}); "
      f"{way_out}."
    ) from error


def checksum(path: str | pathlib.Path) -> str:
  """SHA-256 (hexadecimal) of a regular file."""
  with opened(path) as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def parse_json(content: str | bytes) -> Any:
  """A JSON value; ValueError: no UTF-8, NaN, a number beyond float64, nested
  too deep, a key twice in one object.
  """
  text = content.decode("utf-8") if isinstance(content, bytes) else content
  try:
    return _DECODER.decode(text)
  except RecursionError:
    raise ValueError(
      "expected JSON that can be read, got lists or objects in one another, "
      "too deep;"
      " flatten it"
    ) from None


def _refuse_constant(name: str) -> float:
  raise ValueError(f"expected JSON, got {name}; write a number or null")


def _finite(digits: str) -> float:
  if not math.isfinite(value := float(digits)):
    raise ValueError(
      f"expected numbers within float64, got {digits[:40]}; write null or a "
      "smaller one"
    )
  return value


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """The object of these pairs, as `object_pairs_hook`; ValueError where a key
  comes twice: readers differ in which of its values they take.
  """
  made = dict(pairs)
  if len(made) < len(pairs):
    counts = collections.Counter(key for key, _ in pairs)
    twice = counts.most_common(1)[0][0]
    raise ValueError(
      f"expected every key of an object once, got {twice!r:.60} twice; keep one"
    )
  return made


# Python by itself reads NaN, 1e400 as infinity, and the last value of a key
# that comes twice.
_DECODER = json.JSONDecoder(
  object_pairs_hook=unique_keys,
  parse_constant=_refuse_constant,
  parse_float=_finite,
)


class FormatError(ValueError):
  """A file whose content cannot be used; the message names the file and the
  line.
  """


@dataclasses.dataclass(frozen=True)
class Line:
  """One line of a file that holds a JSON object; it begins `offset` bytes from
  the start.
  """

  path: pathlib.Path
  number: int
  value: dict[str, Any]
  offset: int
  raw: bytes

  def error(self, message: str) -> FormatError:
    """An error that names this line."""
    return FormatError(f"{self.path}:{self.number}: {message}")


def lines(file: BinaryIO, name: str | pathlib.Path) -> Iterator[bytes]:
  """Lines of a binary file, with their ends; FormatError beyond `LONGEST_LINE`
  bytes.
  """
  for number, line in enumerate(
    iter(lambda: file.readline(LONGEST_LINE + 1), b""), 1
  ):
    if len(line) > LONGEST_LINE:
      raise FormatError(
        f"{name}:{number}: expected lines of at most {LONGEST_LINE} bytes, "
        "got a longer one; it"
        " is no file of texts, or made to fill the memory."
      )
    yield line


def read_lines(
  path: str | pathlib.Path, *, pipes: bool = False
) -> Iterator[Line]:
  """Reads a JSON Lines file of objects; blank lines are skipped.

  FormatError where the file is unreadable, a line is too long or no JSON
  object, or the last one is cut off. Lines of a pipe that has no name, or of a
  device, are waited for only with `pipes`; named pipes are refused.
  """
  path = pathlib.Path(path)
  if is_named_pipe(path):
    raise FormatError(
      f"{path}: expected a file, got a named pipe, which may never end; copy "
      "what it gives to a file."
    )
  offset = following = 0
  try:
    with open(path, "rb") if pipes else opened(path) as file:
      for number, line in enumerate(lines(file, path), 1):
        offset, following = following, following + len(line)
        if not line.strip():
          continue
        value, problem = parse_line(line.removesuffix(b"\n"))
        if value is None:
          way_out = "write the line again"
          if not line.endswith(b"\n"):
            way_out = "the last line is cut off: resume the run that wrote it"
          raise FormatError(
            f"{path}:{number}: expected a JSON object, got {problem}; "
            f"{way_out}."
          )
        yield Line(path, number, value, offset, line)
  except OSError as error:
    raise FormatError(
      f"{path}: expected a file that can be read, got: {error.strerror}; "
      "check its path and"
      " rights."
    ) from error


def parse_line(raw: bytes) -> tuple[dict[str, Any] | None, str]:
  """(JSON object, '') of one line, or (None, a description of the line)."""
  try:
    value = parse_json(raw)
  except UnicodeDecodeError as error:
    return None, f"invalid UTF-8 at byte {error.start}"
  except ValueError as error:
    return None, f"{raw[:60].decode('utf-8', 'replace')!r} ({error})"
  return (
    (value, "") if isinstance(value, dict) else (None, type(value).__name__)
  )


def dump_line(value: Mapping[str, Any]) -> str:
  """One JSON Lines line, its newline included."""
  return json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n"


def drop_partial_line(path: pathlib.Path) -> str | None:
  """Repairs the end of a file whose writer was killed; returns what was done,
  if anything.
  """
  with open(path, "rb") as file:
    size = file.seek(0, 2)
    file.seek(max(0, size - LONGEST_LINE - 1))
    last = file.read().rpartition(b"\n")[2]
    # `read_lines` names a line that is too long
    if not last or len(last) > LONGEST_LINE:
      return None
  if parse_line(last)[0] is not None:
    append(path, b"\n")
    return None
  os.truncate(path, size - len(last))
  return (
    f"{path}: the last line was cut off and has been dropped ({len(last)} "
    "bytes)."
  )


# ---- Results: dataclasses of numbers, texts, tuples and other such dataclasses


def to_json(value: Any) -> Any:
  """A result as JSON values; NaN is null and infinity (never exit) is
  "never".
  """
  if hasattr(value, "to_json"):
    return value.to_json()
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    return {
      f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)
    }
  if isinstance(value, Mapping):
    return {str(key): to_json(entry) for key, entry in value.items()}
  if isinstance(value, list | tuple):
    return [to_json(entry) for entry in value]
  if isinstance(value, float):
    return (
      None if math.isnan(value) else "never" if value == math.inf else value
    )
  if value is None or isinstance(value, bool | int | str):
    return value
  raise TypeError(
    f"Expected numbers, texts, tuples and dataclasses, got {value!r}."
  )


def from_json(kind: Any, value: Any) -> Any:
  """The inverse of `to_json` for a result of the annotated type `kind`;
  TypeError for a field that is missing or of another type. Fields of an earlier
  version are passed over.
  """
  origin = typing.get_origin(kind)
  inner = typing.get_args(kind)
  if origin in (typing.Union, types.UnionType):
    some = next(each for each in inner if each is not type(None))
    return (
      None if value is None and type(None) in inner else from_json(some, value)
    )
  if origin is tuple and type(value) in (list, tuple):
    kinds = inner[:1] * len(value) if inner[1:] == (...,) else inner
    return tuple(
      from_json(each, entry) for each, entry in zip(kinds, value, strict=True)
    )
  if dataclasses.is_dataclass(kind):
    hints = typing.get_type_hints(kind.__init__)
    make = typing.cast(Callable[..., Any], kind)
    return make(
      **{
        n: from_json(hints[n], entry)
        for n, entry in value.items()
        if n in hints
      }
    )
  if kind is float and (value is None or value == "never"):
    return math.nan if value is None else math.inf
  if type(value) is kind or (kind is float and type(value) is int):
    return kind(value)
  raise TypeError(
    f"Expected {kind} in a stored result, got {value!r}; measure again."
  )


def digest(value: Any) -> str:
  """SHA-256 (hexadecimal, 16 digits) of JSON values; the same anywhere."""
  text = json.dumps(
    to_json(value), sort_keys=True, ensure_ascii=False, separators=(",", ":")
  )
  return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


def prompts_digest(prompts: Sequence[Any]) -> str:
  """Digest of prompts with their references, in order."""
  return digest([prompt.to_json() for prompt in prompts])


def cached(
  folder: pathlib.Path,
  kind: type[T],
  name: str,
  key: Mapping[str, Any],
  make: Callable[[], T],
) -> T:
  """The result `name`, of type `kind`, that `folder` has, or what `make`
  computes, stored; `key` holds all JSON values that it depends on. ValueError:
  a damaged file.
  """
  path = (
    folder
    / f"{name}-{digest({'experiment': name, 'version': _VERSION, **key})}.json"
  )
  if path.exists():
    with reading(
      path, f"a stored result of {name}", "delete it to have it computed again"
    ):
      return from_json(kind, parse_json(content(path))["result"])
  result = to_json(make())
  folder.mkdir(parents=True, exist_ok=True)
  stored = {"experiment": name, "key": to_json(dict(key)), "result": result}
  write_atomically(
    path, json.dumps(stored, indent=1, ensure_ascii=False) + "\n"
  )
  # As it will be read again, so that the first run and the second one draw the
  # same.
  return from_json(kind, result)
