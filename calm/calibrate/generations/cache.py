"""Cached generations: outputs of a model at every threshold, on disk and in memory.

A directory holds

    manifest.json            schema version, procedure, provenance, thresholds, checksums
    prompts.jsonl            one prompt a line
    threshold_never.jsonl    the full-depth reference
    threshold_0.9.jsonl ...  one file a threshold, one record a line, in any order

`open_writer` creates or resumes it, `load` reads it. A run that is killed loses at most the
record it was writing.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from calm import storage
from calm.calibrate import checks
from calm.calibrate import thresholds as thresholds_lib
from calm.calibrate.generations import records as records_lib
from calm.calibrate.generations.procedure import (
  Procedure,
  Provenance,
  describe_differences,
  unknown_platform,
)
from calm.calibrate.generations.records import GenerationsError, Prompt, Record

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
PROMPTS = "prompts.jsonl"
# Records of longer files, in bytes, are left there until they are asked for.
LONG_FILE = 2 * 2**20
_OTHER_FOLDER = "choose another folder (--output), or the options of the run that is there."


@dataclasses.dataclass(frozen=True, eq=False)
class Generations:
  """Cached generations in memory."""

  prompts: tuple[Prompt, ...]  # [num_examples], in the recorded order
  thresholds: np.ndarray  # [num_thresholds] float64, strictly descending
  # Per threshold the records in the order of `prompts`; those of long files stay on the disk.
  # Runs of earlier versions that stopped early have those of the first prompts only.
  records: tuple[Sequence[Record], ...]
  full: Sequence[Record]  # the full-depth reference, in the order of `prompts`
  procedure: Procedure | None = None  # how they were decoded; None for files from elsewhere
  provenance: Provenance = dataclasses.field(default_factory=Provenance)  # their story
  # Names of the settings, in the order of `thresholds`, where they were no thresholds.
  knobs: tuple[str, ...] = ()

  @property
  def ids(self) -> tuple[str, ...]:
    """[num_examples] ids in the recorded order."""
    return tuple(prompt.id for prompt in self.prompts)

  def layer_counts(self) -> tuple[np.ndarray, np.ndarray] | None:
    """(layers summed over real tokens, real tokens), each [num_examples, num_thresholds] int64.

    EOS counts, padding does not. None where a record is missing or has no `exit_layers`.
    """
    sums = list(map(layer_sums, self.records))
    if any(one is None or len(one[0]) != len(self.prompts) for one in sums):
      return None
    layers, tokens = np.stack(sums, axis=2)  # pyright: ignore
    return layers, tokens


class Column(Sequence[Record]):
  """Records that stay in their file: a million take gigabytes as objects, 24 bytes each here.

  `table` is [num_records, 3] int64: where each line begins, in bytes; decoder layers run,
  summed over tokens, -1 where a record says none; tokens without padding.
  """

  def __init__(self, path: pathlib.Path, table: np.ndarray):
    self.path, self.table = path, table

  def __len__(self) -> int:
    return len(self.table)

  def __getitem__(self, index: Any) -> Any:
    if isinstance(index, slice):
      return Column(self.path, self.table[index])
    return next(iter(Column(self.path, self.table[index][None])))

  def __iter__(self) -> Iterator[Record]:
    return map(Record.from_json, self.values())

  def values(self) -> Iterator[dict[str, Any]]:
    """The JSON objects of the lines."""
    with open(self.path, "rb") as file:
      for offset in self.table[:, 0].tolist():
        file.seek(offset)
        yield storage.parse_json(file.readline())


def texts(column: Sequence[Record]) -> Iterator[str]:
  """The predictions of a column, wherever it is."""
  if isinstance(column, Column):
    return (value["prediction"] for value in column.values())
  return (record.prediction for record in column)


def layer_sums(column: Sequence[Record]) -> tuple[np.ndarray, np.ndarray] | None:
  """(layers, tokens) of each record, [num_records] int64; None where one says no layers."""
  rows = column.table[:, 1:] if isinstance(column, Column) else [_sums(one) for one in column]
  table = np.array(rows, np.int64).reshape(-1, 2)
  return None if (table < 0).any() else (table[:, 0], table[:, 1])


def _sums(record: Record) -> tuple[int, int]:
  row = record.exit_layers
  return -1 if row is None else sum(row), sum(map(bool, row or ()))


def threshold_file(threshold: float) -> str:
  """Name of the file that holds the records of one threshold."""
  return f"threshold_{thresholds_lib.format_threshold(threshold)}.jsonl"


def file_names(grid: Iterable[float]) -> list[str]:
  """Names of the files of a run but its manifest: prompts, the reference, the thresholds."""
  return [PROMPTS, *map(threshold_file, [thresholds_lib.NEVER_EXIT, *grid])]


# ---- Manifests, and the marks of shards

# Field: (what it is, whether a value is that).
Fields = Mapping[str, tuple[str, Callable[[Any], bool]]]

_flag = ("true or false", lambda v: isinstance(v, bool))
_object = ("an object or null", lambda v: v is None or isinstance(v, dict))
_names = lambda v: all(isinstance(name, str) for name in v)
VERSION = ("1, that of this version of the package", lambda v: type(v) is int and v == 1)
CHECKSUMS = (
  "an object of texts",
  lambda v: isinstance(v, dict) and _names(v.values()) and not any("/" in name for name in v),
)
_FIELDS: Fields = {
  "schema_version": VERSION,
  "prompt_ids": (
    "a list of different texts",
    lambda v: isinstance(v, list) and _names(v) and len({*v}) == len(v),
  ),
  "thresholds": (
    "a list of numbers",
    lambda v: isinstance(v, list) and all(type(one) in (int, float) for one in v),
  ),
  "checksums": CHECKSUMS,
  "procedure": _object,
  "provenance": _object,
  "sequential": _flag,  # of earlier versions: the run could stop early
  "by_group": _flag,
}


def read_document(
  path: pathlib.Path, fields: Fields, way_out: str, optional: Collection[str] = ()
) -> dict[str, Any]:
  """A JSON object whose `fields` were checked; those in `optional` may be missing.

  Raises:
    FileNotFoundError: it is missing.
    GenerationsError: it is no JSON object, or a field is not what it should be.
  """
  try:
    value = storage.parse_json(storage.content(path))
    if not isinstance(value, dict):
      raise ValueError(f"{value!r:.80}")
  except FileNotFoundError:
    raise
  except (OSError, ValueError) as error:
    raise GenerationsError(
      f"{path}: expected a JSON object, got {error}; {way_out}."
    ) from error
  for name, (kind, holds) in fields.items():
    if (name in value or name not in optional) and not holds(value.get(name)):
      got = repr(value[name])[:80] if name in value else "none"
      raise GenerationsError(f"{path}: expected `{name}` to be {kind}, got {got}; {way_out}.")
  return value


def read_manifest(directory: str | pathlib.Path) -> dict[str, Any]:
  """Reads and checks manifest.json.

  Raises:
    GenerationsError: it is missing, damaged, or of another schema version.
  """
  path = pathlib.Path(directory) / MANIFEST
  way_out = "resume the run that wrote it, or generate again"
  optional = ("checksums", "procedure", "provenance", "sequential", "by_group")
  try:
    return read_document(path, _FIELDS, way_out, optional)
  except FileNotFoundError as error:
    raise GenerationsError(
      f"Expected `directory` to be a folder of cached generations, got {str(path.parent)!r},"
      f" which has no {MANIFEST}; give the folder that `calm generate` wrote."
    ) from error


def write_manifest(directory: pathlib.Path, manifest: Mapping[str, Any]) -> None:
  text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
  storage.write_atomically(directory / MANIFEST, text)


def manifest_procedure(manifest: Mapping[str, Any]) -> Procedure | None:
  """The procedure in a manifest, or None; GenerationsError where a field is none of it."""
  return _parsed(manifest, "procedure", Procedure)


def _parsed(manifest: Mapping[str, Any], name: str, kind: Any) -> Any:
  value = manifest.get(name)
  try:
    return None if value is None else kind.from_json(value)
  except (TypeError, ValueError, KeyError, AttributeError) as error:
    raise GenerationsError(
      f"{MANIFEST}: expected `{name}` to be that of a run, got a field that is none: {error}"
    ) from error


def check_checksums(
  directory: pathlib.Path, checksums: Mapping[str, str], manifest: str = MANIFEST
) -> None:
  """GenerationsError unless every file that `manifest` lists is as it was listed."""
  for name, expected in checksums.items():
    path = directory / name
    if not path.is_file():
      raise GenerationsError(
        f"{path}: expected a file, as {manifest} lists it, got none; restore it, or generate"
        " again."
      )
    if storage.checksum(path) != expected:
      for _ in storage.read_lines(path):  # says more of a damaged line
        pass
      raise GenerationsError(
        f"{path}: expected the SHA-256 {expected[:12]!r}... of {manifest}, got another: it"
        " was changed after the run finished; restore it, or generate again."
      )


# ---- Reading


def load(directory: str | pathlib.Path, *, in_memory: bool = False) -> Generations:
  """Reads cached generations.

  Args:
    directory: a folder written by `open_writer`.
    in_memory: read all records into memory. By default those of a file of more than
      `LONG_FILE` bytes are read when they are asked for, so that memory grows with the prompts
      alone; the folder must then stay as it is.

  Raises:
    GenerationsError: anything is missing, damaged, duplicated or mixed; names file and line.
  """
  directory = pathlib.Path(directory)
  manifest = read_manifest(directory)
  checksums = manifest.get("checksums", {})
  check_checksums(directory, checksums)
  by_id = {prompt.id: prompt for prompt in records_lib.read_prompts(directory / PROMPTS)}
  ids = manifest["prompt_ids"]
  procedure = manifest_procedure(manifest)
  provenance = _parsed(manifest, "provenance", Provenance) or Provenance()
  grid = thresholds_lib.validate_grid(manifest["thresholds"])
  for name, told, got in (
    ("prompt_ids", sorted(by_id), sorted(ids)),
    ("number of prompts", provenance.num_examples, len(ids)),
    ("thresholds", provenance.grid, tuple(grid)),
  ):
    if told not in (None, got):
      raise GenerationsError(
        f"{directory / MANIFEST}: expected `{name}` of the run that wrote it"
        f" ({told!r:.100}), got {got!r:.100}; restore the file, or generate again."
      )
  names, partial = file_names(grid), manifest.get("sequential", False)
  full, *records = (
    _read_column(directory / name, ids, procedure, partial, in_memory) for name in names[1:]
  )
  # Last, since a missing record says more about a run that was stopped.
  unlisted = [n for n in names if n not in checksums and (directory / n).exists()]
  if unlisted:
    raise GenerationsError(
      f"{directory / MANIFEST}: expected `checksums` to list every file of a run that finished,"
      f" got none for {unlisted[:3]}; resume the run that wrote it."
    )
  prompts = tuple(by_id[name] for name in ids)
  return Generations(prompts, grid, tuple(records), full, procedure, provenance)


def _read_column(
  path: pathlib.Path,
  ids: Sequence[str],
  procedure: Procedure | None,
  partial: bool,
  in_memory: bool,
) -> Sequence[Record]:
  """The records of one threshold, of the first `ids` where the run may be `partial`."""
  if partial and not path.exists():
    return ()
  long = not in_memory and path.is_file() and path.stat().st_size > LONG_FILE
  by_id: dict[str, Any] = {
    record.id: (line.offset, *_sums(record)) if long else record
    for line, record in read_records(path, procedure)
  }
  wanted = ids[: len(by_id)] if partial else ids
  if by_id.keys() != set(wanted):
    missing = [name for name in wanted if name not in by_id]
    unknown = sorted(by_id.keys() - set(wanted))
    raise GenerationsError(
      f"{path}: expected a record of each of the {len(wanted)} prompts, got {len(missing)}"
      f" without one, first {missing[:5]}, and records of others: {unknown[:5]}; resume the run"
      " that wrote it, or restore the file."
    )
  kept = [by_id[name] for name in wanted]
  return Column(path, np.array(kept, np.int64).reshape(-1, 3)) if long else tuple(kept)


def read_records(
  path: str | pathlib.Path, procedure: Procedure | None = None
) -> Iterator[tuple[storage.Line, Record]]:
  """Reads one file of records, each with its line.

  GenerationsError where a line is no record or belongs to another procedure or threshold, or an
  id occurs twice.
  """
  mark, seen, name = procedure_mark(procedure), set[str](), pathlib.Path(path).name
  for line in storage.read_lines(path):
    try:
      record = Record.from_json(line.value)
    except (TypeError, ValueError, OverflowError) as error:
      raise line.error(
        f"expected a record of an output, got none: {error}; restore the line, or generate"
        " again."
      ) from error
    if record.id in seen:
      raise line.error(
        f"expected every id once, got {record.id!r} twice; resume the run that wrote it, which"
        " takes it out."
      )
    if (theirs := line.value.get("procedure")) != mark:
      raise line.error(
        f"expected a record of the manifest's procedure {mark!r}, got one of procedure"
        f" {theirs!r}, so outputs of two procedures are mixed; generate again."
      )
    level = line.value.get("threshold")  # files of earlier versions do not have it
    if level is not None and name != f"threshold_{level}.jsonl":
      raise line.error(
        f"expected records of the threshold that the file is named by, got one of {level!r}:"
        " files were swapped; restore them, or generate again."
      )
    seen.add(record.id)
    yield line, record


def procedure_mark(procedure: Procedure | None) -> str | None:
  """The short digest that every record line carries, so that mixed files are found."""
  return None if procedure is None else procedure.digest()[:16]


# ---- Writing


class Writer:
  """Appends records to a directory of cached generations; returned by `open_writer`.

  `procedure` is how the records that are there were decoded, `reports` what resuming repaired.
  """

  def __init__(self, directory: pathlib.Path, manifest: dict[str, Any], lock: storage.Lock):
    self.directory = directory
    self._lock = lock  # held until `finish`, or as long as this object lives
    self._manifest = manifest
    self.procedure = manifest_procedure(manifest)
    self._ids = frozenset(manifest["prompt_ids"])
    self.reports: list[str] = []
    # Where each record begins in its file.
    self._done: dict[float, dict[str, int]] = {}
    for threshold in (thresholds_lib.NEVER_EXIT, *manifest["thresholds"]):
      path = directory / threshold_file(threshold)
      self._done[threshold] = self._resume(path) if path.exists() else {}

  def _resume(self, path: pathlib.Path) -> dict[str, int]:
    """Where each record begins, after what killed or concurrent writers left was mended."""
    self.reports += filter(None, [storage.drop_partial_line(path)])
    offsets = lambda: {
      record.id: line.offset for line, record in read_records(path, self.procedure)
    }
    try:
      return offsets()
    except GenerationsError:
      if (report := repair(path, self.procedure)) is None:
        raise
    self.reports.append(report)
    return offsets()

  def completed_ids(self, threshold: float) -> frozenset[str]:
    """Ids that already have a record at `threshold` (`NEVER_EXIT` for the reference)."""
    return frozenset(self._done[threshold])

  def completed_records(
    self, threshold: float, ids: Iterable[str] | None = None
  ) -> dict[str, Record]:
    """The records already written at `threshold`, by id; those of `ids`, or all.

    Only the lines that are asked for are read.
    """
    done = self._done[threshold]
    names = done if ids is None else ids
    offsets = np.array([done[name] for name in names if name in done], np.int64)
    if not len(offsets):
      return {}
    column = Column(self.directory / threshold_file(threshold), offsets[:, None])
    return {record.id: record for record in column}

  def append(self, threshold: float, records: Iterable[Record]) -> None:
    """Appends records as a whole; ValueError where an id is unknown or already written."""
    done = self._done[threshold]
    marks = {"threshold": thresholds_lib.threshold_to_json(threshold)}
    if (mark := procedure_mark(self.procedure)) is not None:
      marks["procedure"] = mark
    path = self.directory / threshold_file(threshold)
    begin = path.stat().st_size if path.exists() else 0
    lines, begins = [], {}
    for record in records:
      if record.id not in self._ids or record.id in done or record.id in begins:
        raise ValueError(
          f"Expected `records` to be of prompts that have none at {threshold} yet, got"
          f" {record.id!r}, which is unknown or already there."
        )
      lines.append(storage.dump_line({**record.to_json(), **marks}).encode("utf-8"))
      begins[record.id] = begin
      begin += len(lines[-1])
    storage.append(path, b"".join(lines))
    done.update(begins)

  def finish(self) -> None:
    """Writes the checksums of all files into the manifest; ValueError if a record lacks."""
    for threshold, done in self._done.items():
      if missing := len(self._ids - set(done)):
        raise ValueError(
          f"{self.directory}: expected a record of every prompt at threshold"
          f" {thresholds_lib.format_threshold(threshold)}, got {missing} without one;"
          " append them before `finish`."
        )
    names = file_names(self._manifest["thresholds"])
    sums = {name: storage.checksum(self.directory / name) for name in names}
    self._manifest["checksums"] = sums
    write_manifest(self.directory, self._manifest)
    self._lock.release()


def open_writer(
  directory: str | pathlib.Path,
  *,
  prompts: Sequence[Prompt],
  thresholds: Sequence[float] | np.ndarray,
  procedure: Procedure | None,
  provenance: Provenance | None = None,
) -> Writer:
  """Creates a directory of cached generations, or resumes it.

  Args:
    directory: where; made if missing.
    prompts: in the order that losses will be tested in.
    thresholds: the strictly descending grid, without `NEVER_EXIT` (the reference is always
      there).
    procedure: how the outputs are decoded, or None.
    provenance: the story of the run.

  Returns:
    A `Writer`; `reports` says what resuming repaired.

  Raises:
    GenerationsError: the directory holds another procedure, grid or prompts (the message names
      the field), or is damaged.
    ValueError: there is no prompt, or an id occurs twice.
    storage.LockedError: another process writes there.
    OSError: it cannot be written, or one of its files is a link to nothing.
  """
  directory = pathlib.Path(directory)
  twice = checks.repeated(prompt.id for prompt in prompts)
  if not prompts or twice:
    raise ValueError(
      f"Expected `prompts` to be at least one prompt with unique ids, got {len(prompts)}"
      f" prompts; ids that occur more than once: {twice[:5]}."
    )
  grid = thresholds_lib.validate_grid(thresholds).tolist()
  story = provenance or Provenance()
  story = dataclasses.replace(story, grid=story.grid or tuple(grid), num_examples=len(prompts))
  manifest = {
    "schema_version": SCHEMA_VERSION,
    "procedure": None if procedure is None else procedure.to_json(),
    "provenance": story.to_json(),
    "thresholds": grid,
    "prompt_ids": [prompt.id for prompt in prompts],
    "checksums": {},
  }
  lines = (storage.dump_line(prompt.to_json()).encode() for prompt in prompts)
  lock, there = claim(directory, manifest, lines)
  if there is not None:
    # Records that were edited must not be written into new checksums.
    check_checksums(directory, there.get("checksums") or {})
    # The story begins with the first run, and records are marked with its procedure.
    manifest |= {name: there[name] for name in ("provenance", "procedure")}
  # Resuming reopens a finished run: its checksums are written again by `finish`.
  write_manifest(directory, manifest)
  writer = Writer(directory, manifest, lock)
  old = unknown_platform(writer.procedure)
  if old and not unknown_platform(procedure):
    writer.reports.append(f"{directory}: {old}")
  return writer


def claim(
  directory: pathlib.Path, manifest: Mapping[str, Any], prompts: Iterable[bytes]
) -> tuple[storage.Lock, dict[str, Any] | None]:
  """Takes a folder for the run of a manifest, and writes its prompts (lines of prompts.jsonl).

  Returns the lock, and the manifest that is there: that of the same run, or None. Errors are
  those of `open_writer`.
  """
  try:
    directory.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise OSError(
      f"Expected {str(directory)!r} to be a folder that can be made, got: {error.strerror};"
      " choose a folder that can be written."
    ) from error
  names = (MANIFEST, *file_names(manifest["thresholds"]))
  storage.refuse_planted_links(directory / name for name in names)
  lock, path = storage.lock(directory), directory / PROMPTS
  there = read_manifest(directory) if (directory / MANIFEST).exists() else None
  if there is not None:
    differ = describe_differences(manifest_procedure(there), manifest_procedure(manifest))
    for name in ("thresholds", "prompt_ids", "sequential"):
      ours, theirs = (one.get(name, False) for one in (manifest, there))
      if ours != theirs:
        differ = differ or f"`{name}`: expected {theirs!r:.100}, got {ours!r:.100}"
    if differ:
      raise GenerationsError(
        f"{directory / MANIFEST}: expected the run that is there, got another: {differ};"
        f" {_OTHER_FOLDER}"
      )
  text = b"".join(prompts)
  if not path.exists():
    storage.write_atomically(path, text)
  elif path.stat().st_size != len(text) or storage.content(path, len(text)) != text:
    raise GenerationsError(
      f"{path}: expected the prompts of this run, got others, which would be replaced;"
      f" {_OTHER_FOLDER}"
    )
  return lock, there


def repair(path: pathlib.Path, procedure: Procedure | None) -> str | None:
  """Removes doubled and damaged lines of a file; says which, or None for nothing.

  Two writers at once left them, in earlier versions and on file systems without locks. Of equal
  lines the first is kept; where two of one id differ, none is: the prompt is decoded again. A
  file with a record of another procedure is left as it is.
  """
  mark = procedure_mark(procedure)
  kept: dict[str, bytes] = {}
  torn, twice, differ = 0, 0, set[str]()
  with storage.opened(path) as file:
    for line in storage.lines(file, path):
      value = storage.parse_line(line)[0] or {}
      try:
        name = Record.from_json(value).id
      except (TypeError, ValueError, OverflowError):
        torn += bool(line.strip())
        continue
      if value.get("procedure") != mark:
        return None
      if name not in kept:
        kept[name] = line
      elif kept[name] == line:
        twice += 1
      else:
        differ.add(name)
  if not (torn or twice or differ):
    return None
  storage.write_atomically(
    path, b"".join(line for name, line in kept.items() if name not in differ)
  )
  return (
    f"{path}: {torn} damaged lines and {twice} doubled ones were removed, and {len(differ)}"
    " prompts that had two outputs; what is missing is decoded again."
  )
