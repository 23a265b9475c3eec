"""What two writers at once leave in one file, taken out so that a run can go on.

Folders are locked against that (`locks`); caches of earlier versions, and of file systems
without locks, hold lines twice and lines glued into one another.
"""

import hashlib
import pathlib
from collections.abc import Iterator

from calm import storage
from calm.calibrate.generations import cached
from calm.calibrate.generations.procedures import Procedure
from calm.calibrate.generations.records import Record


def mend(path: pathlib.Path, procedure: Procedure | None) -> str | None:
  """Keeps one whole line of every record; says what was taken out, or None for nothing.

  Of lines that are equal the first is kept. Where two of one id differ, none is: the prompt is
  decoded again. A file with a record of another procedure is left as it is.
  """
  mark = cached.procedure_mark(procedure)
  seen: dict[str, bytes] = {}
  torn, twice, differ = 0, 0, set[str]()
  for raw, record, marked in _lines(path):
    if record is None:
      torn += 1
      continue
    if marked != mark:
      return None
    digest = hashlib.sha256(raw).digest()
    if seen.setdefault(record.id, digest) != digest:
      differ.add(record.id)
    else:
      twice += 1
  twice -= len(seen)
  if not (torn or twice or differ):
    return None
  _write(path, differ)
  return (
    f"{path}: {torn} damaged lines and {twice} doubled ones were taken out, and"
    f" {len(differ)} prompts that were there with two outputs; what is missing is decoded"
    " again."
  )


def _write(path: pathlib.Path, without: set[str]) -> None:
  done: set[str] = set()
  with storage.replacing(path) as file:
    for raw, record, _ in _lines(path):
      if record is not None and record.id not in without and record.id not in done:
        done.add(record.id)
        file.write(raw + b"\n")


def _lines(path: pathlib.Path) -> Iterator[tuple[bytes, Record | None, object]]:
  """(line, its record if it is one, its mark)."""
  with storage.opened(path) as file:
    for line in iter(lambda: file.readline(storage.LONGEST_LINE + 1), b""):
      raw = line.removesuffix(b"\n")
      value, _ = storage.parse_line(raw) if raw.strip() else (None, "")
      try:
        record = None if value is None else Record.from_json(value)
      except (TypeError, ValueError, OverflowError):
        record = None
      if raw.strip():
        yield raw, record, (value or {}).get("procedure")
