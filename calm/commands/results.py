"""Where decoded lines go as they are made: a file that a stopped run goes on with, or a stream.

A regular file is replaced at the end only. Until then lines go to NAME.partial beside it, and
NAME.partial.json says what they are of, so that the same command goes on after a kill; another
command starts anew and keeps what was there as NAME.partial.old, or NAME.partial.old.2 and so
on where something has that name.
"""

import contextlib
import hashlib
import itertools
import json
import os
import pathlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, Protocol

from calm import storage
from calm.calibrate import Prompt

FORMAT = "calm infer 1"


class Results(Protocol):
  """What takes lines.

  Attributes:
    done: prompts whose lines are there already.
    report: what was found of an earlier run, for the user to know; '' for nothing.
    stopped: what a run that stops now leaves, in words.
  """

  done: int
  report: str

  @property
  def stopped(self) -> str: ...

  def pending(self, prompts: Iterable[Prompt]) -> Iterator[Prompt]:
    """The prompts whose lines are missing; they are the last ones."""
    ...

  def write(self, prompts: Sequence[Prompt], lines: Sequence[str]) -> None:
    """Writes the lines of the next prompts."""
    ...


class Stream:
  """Standard output, a device, a pipe or a socket."""

  report = ""
  stopped = "what was written is whole lines; the same command starts anew"

  def __init__(self, file: BinaryIO):
    self.done, self._file = 0, file

  def pending(self, prompts: Iterable[Prompt]) -> Iterator[Prompt]:
    return iter(prompts)

  def write(self, prompts: Sequence[Prompt], lines: Sequence[str]) -> None:
    self._file.write("".join(lines).encode("utf-8"))
    self._file.flush()
    self.done += len(prompts)


class Resumable:
  """A regular file, written under another name until it is whole."""

  def __init__(self, target: pathlib.Path, about: Mapping[str, Any]):
    self._about = json.loads(json.dumps(about))
    self._target = target
    self._partial = target.with_name(target.name + ".partial")
    self._state = target.with_name(target.name + ".partial.json")
    for path in (self._partial, self._state):
      if path.is_symlink():  # lines would go to whatever it names
        raise OSError(f"Expected {str(path)!r} to be no link, got one; take it away.")
    self.done, self.report = 0, ""
    self._digest = hashlib.sha256()

  @property
  def stopped(self) -> str:
    return f"the same command goes on from {self._partial}" if self.done else "nothing was made"

  def pending(self, prompts: Iterable[Prompt]) -> Iterator[Prompt]:
    stored, why = self._stored()
    rest = iter(prompts)
    for prompt in itertools.islice(rest, min(stored.get("done", 0), sys.maxsize)):
      self._add(prompt)
    if stored and self._digest.hexdigest() == stored["prompts"]:
      self.done = stored["done"]
      os.truncate(self._partial, stored["bytes"])
      self.report = f"{self._partial} has {self.done} prompts' outputs already; going on."
      return rest
    self._start_anew(why or "other prompts")
    return iter(prompts)

  def write(self, prompts: Sequence[Prompt], lines: Sequence[str]) -> None:
    storage.append(self._partial, "".join(lines).encode("utf-8"))
    for prompt in prompts:
      self._add(prompt)
    self.done += len(prompts)
    state = {
      "format": FORMAT,
      "about": self._about,
      "done": self.done,
      "prompts": self._digest.hexdigest(),
      "bytes": self._partial.stat().st_size,
    }
    storage.write_atomically(self._state, json.dumps(state, indent=2) + "\n")

  def finish(self) -> None:
    """The file takes its place."""
    storage.put(self._partial, self._target)
    self._state.unlink(missing_ok=True)

  def _add(self, prompt: Prompt) -> None:
    self._digest.update(json.dumps([prompt.id, prompt.input]).encode() + b"\n")

  def _stored(self) -> tuple[dict[str, Any], str]:
    """What an earlier run of the same says of itself; else nothing, and what it was of."""
    try:
      stored = storage.parse_json(storage.content(self._state))
      whole = all(type(stored[name]) is int and stored[name] >= 0 for name in ("done", "bytes"))
      if (
        stored["format"] != FORMAT
        or not whole
        or stored["bytes"] > self._partial.stat().st_size
        or not isinstance(stored["prompts"], str)
      ):
        return {}, "a run that cannot be gone on with"
      theirs = dict(stored["about"])
    except (OSError, ValueError, TypeError, KeyError):
      return {}, "a run that says nothing of itself"
    differs = sorted(
      name for name in {*theirs, *self._about} if theirs.get(name) != self._about.get(name)
    )
    return ({}, f"another {', '.join(differs)}") if differs else (stored, "")

  def _start_anew(self, why: str) -> None:
    self.done, self._digest = 0, hashlib.sha256()
    if self._partial.exists() and self._partial.stat().st_size:
      old = self._free()
      os.replace(self._partial, old)
      self.report = f"{self._partial} is of {why}: starting anew, and keeping it as {old.name}."
    self._state.unlink(missing_ok=True)

  def _free(self) -> pathlib.Path:
    """A name for earlier lines that nothing has, be it a link to nowhere."""
    old = first = self._partial.with_name(self._partial.name + ".old")
    numbers = itertools.count(2)
    while os.path.lexists(old):
      old = first.with_name(f"{first.name}.{next(numbers)}")
    return old


@contextlib.contextmanager
def open_results(path: str, about: Mapping[str, Any]) -> Iterator[Results]:
  """Opens `--output`; a file takes its place when the block ends well.

  Args:
    path: a file, a link to one, a device, a pipe, a socket, or '-' for standard output.
    about: what the lines depend on; a stopped run of the same is gone on with.

  Raises:
    OSError: it cannot be written, or another process is at it.
  """
  target = storage.destination(path)
  if target is None:
    with storage.replacing(path) as file:
      yield Stream(file)
    return
  lock = storage.lock(target)
  try:
    results = Resumable(target, about)
    yield results
    results.finish()
  finally:
    lock.release()
