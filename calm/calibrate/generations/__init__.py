"""Cached generations: outputs of a model at every threshold, on disk and in
memory.

A directory holds

    manifest.json            schema version, procedure, provenance, thresholds,
    checksums prompts.jsonl            one prompt a line threshold_never.jsonl
    the full-depth reference threshold_0.9.jsonl ...  one file a threshold, one
    record a line, in any order
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from calm import arguments, storage
from calm.calibrate import checks
from calm.calibrate import thresholds as thresholds_lib
from calm.calibrate.generations import records as records_lib
from calm.calibrate.generations.procedure import (
  Procedure,
  Provenance,
  describe_differences,
)
from calm.calibrate.generations.records import GenerationsError, Prompt, Record

__all__ = [
  "MANIFEST",
  "PROMPTS",
  "Generations",
  "load",
  "manifest_procedure",
  "open_writer",
  "read_manifest",
]

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
PROMPTS = "prompts.jsonl"
# Records of longer files, in bytes, are left there until they are asked for.
LONG_FILE = 2 * 2**20
_AGAIN = "resume the run that wrote it, or generate again."


@dataclasses.dataclass(frozen=True, eq=False)
class Generations:
  """Cached generations in memory."""

  prompts: tuple[Prompt, ...]  # [num_examples], in the recorded order
  thresholds: np.ndarray  # [num_thresholds] float64, strictly descending
  # Per threshold the records in the order of `prompts`; those of long files
  # stay on the disk. Runs of earlier versions that stopped early have those of
  # the first prompts only.
  records: tuple[Sequence[Record], ...]
  full: Sequence[Record]  # the full-depth reference, in the order of `prompts`
  # how they were decoded; None for files from elsewhere
  procedure: Procedure | None = None
  # their story
  provenance: Provenance = dataclasses.field(default_factory=Provenance)
  # Names of the settings, in the order of `thresholds`, where they were no
  # thresholds.
  knobs: tuple[str, ...] = ()

  @property
  def ids(self) -> tuple[str, ...]:
    """[num_examples] ids in the recorded order."""
    return tuple(prompt.id for prompt in self.prompts)

  def layer_counts(self) -> tuple[np.ndarray, np.ndarray] | None:
    """(layers summed over real tokens, real tokens), each [num_examples,
    num_thresholds] int64.

    EOS counts, padding does not. None where a record is missing or has no
    `exit_layers`.
    """
    if {len(column) for column in self.records} != {len(self.prompts)}:
      return None

    def sums(column):
      return [_sums(record) for record in column]

    counts = [
      c.table[:, 1:] if isinstance(c, Column) else sums(c) for c in self.records
    ]
    layers, tokens = np.array(counts, np.int64).transpose(2, 1, 0)
    return None if (layers < 0).any() else (layers, tokens)


class Column(Sequence[Record]):
  """Records that stay in their file: a million take gigabytes as objects, 24
  bytes each here.

  `table` is [num_records, 3] int64: where each line begins, in bytes; decoder
  layers run, summed over tokens, -1 where a record says none; tokens without
  padding.
  """

  def __init__(self, path: pathlib.Path, table: np.ndarray):
    self.path = path
    self.table = table

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


def predictions(column: Sequence[Record]) -> Iterator[str]:
  """The predictions of a column, wherever it is."""
  if isinstance(column, Column):
    return (value["prediction"] for value in column.values())
  return (record.prediction for record in column)


def _sums(record: Record) -> tuple[int, int]:
  row = record.exit_layers
  return -1 if row is None else sum(row), sum(map(bool, row or ()))


def threshold_file(threshold: float) -> str:
  """Name of the file that holds the records of one threshold."""
  return f"threshold_{thresholds_lib.format_threshold(threshold)}.jsonl"


def file_names(grid: Iterable[float]) -> list[str]:
  """Names of the files of a run but its manifest: prompts, the reference, the
  thresholds.
  """
  return [PROMPTS, *map(threshold_file, [thresholds_lib.NEVER_EXIT, *grid])]


# ---- Manifests, and the marks of shards


def read_document(
  path: pathlib.Path, check: Callable[..., None], way_out: str
) -> dict[str, Any] | None:
  """A JSON object whose fields are the arguments of `check`; None where there
  is no file.

  GenerationsError where it is no JSON object, or a field is not what it should
  be.
  """
  try:
    value = storage.parse_json(storage.content(path))
    if not isinstance(value, dict):
      raise ValueError(f"{value!r:.80}")
    check(**value)
  except FileNotFoundError:
    return None
  except (AttributeError, OSError, TypeError, ValueError) as error:
    text = str(error).rstrip(".")
    if not text.startswith("Expected"):
      text = f"expected a JSON object with the fields of a run, got: {text}"
    raise GenerationsError(f"{path}: {text}; {way_out}") from error
  return value


@arguments.checked()
def _check_manifest(
  schema_version: Literal[1],
  prompt_ids: list[str],
  thresholds: list[float],
  checksums: dict[str, str] = {},  # noqa: B006
  procedure: dict[str, Any] | None = None,
  provenance: dict[str, Any] | None = None,
  sequential: bool = False,  # of earlier versions: the run could stop early
  by_group: bool = False,
  **others: Any,
) -> None:
  names = file_names(thresholds_lib.validate_grid(thresholds).tolist())
  manifest_procedure({"procedure": procedure})
  Provenance(**provenance or {})
  if odd := set(checksums) - set(names):
    raise ValueError(
      f"Expected `checksums` of {names}, got one of {min(odd)!r:.100}"
    )
  if twice := checks.repeated(prompt_ids):
    raise ValueError(
      f"Expected `prompt_ids` to be different texts, got {twice[0]!r} twice"
    )


def read_manifest(directory: str | pathlib.Path) -> dict[str, Any]:
  """The content of manifest.json.

  Raises:
    GenerationsError: it is missing, damaged, or of another version.
  """
  path = pathlib.Path(directory) / MANIFEST
  if (found := read_document(path, _check_manifest, _AGAIN)) is None:
    raise GenerationsError(
      "Expected `directory` to be a folder that `calm generate` wrote, got "
      f"{path.parent},"
      f" which has no {MANIFEST}."
    )
  return found


def write_manifest(
  directory: pathlib.Path, manifest: Mapping[str, Any]
) -> None:
  text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
  storage.write_atomically(directory / MANIFEST, text)


def manifest_procedure(manifest: Mapping[str, Any]) -> Procedure | None:
  """The procedure in a manifest, or None."""
  value = manifest.get("procedure")
  return None if value is None else Procedure(**value)


def check_checksums(
  directory: pathlib.Path, checksums: Mapping[str, str]
) -> None:
  """GenerationsError for the first file that is not what the manifest says of
  it.
  """
  for name, expected in checksums.items():
    path = directory / name
    if not path.is_file():
      raise GenerationsError(
        f"{path}: expected a file, as {MANIFEST} lists it, got none."
      )
    if storage.checksum(path) != expected:
      for _ in storage.read_lines(path):  # says more of a damaged line
        pass
      raise GenerationsError(
        f"{path}: expected the SHA-256 {expected[:12]!r}... of {MANIFEST}, "
        "got another: it was"
        " changed after the run finished; restore it, or generate again."
      )


# ---- Reading


def load(
  directory: str | pathlib.Path, *, in_memory: bool = False
) -> Generations:
  """Reads cached generations.

  Args:
    directory: a folder written by `open_writer`.
    in_memory: read all records into memory. By default those of a file of more
      than `LONG_FILE` bytes are read when they are asked for, so that memory
      grows with the prompts alone; the folder must then stay as it is.

  Raises:
    GenerationsError: anything is missing, damaged, duplicated or mixed; names
      file and line.
  """
  directory = pathlib.Path(directory)
  manifest = read_manifest(directory)
  checksums = manifest.get("checksums", {})
  ids = manifest["prompt_ids"]
  check_checksums(directory, checksums)
  by_id = {
    prompt.id: prompt
    for prompt in records_lib.read_prompts(directory / PROMPTS)
  }
  provenance = Provenance(**manifest.get("provenance") or {})
  grid = thresholds_lib.validate_grid(manifest["thresholds"])
  for name, told, got in (
    ("prompt_ids", sorted(by_id), sorted(ids)),
    ("number of prompts", provenance.num_examples, len(ids)),
    ("thresholds", provenance.grid, tuple(grid)),
  ):
    if told not in (None, got):
      raise GenerationsError(
        f"{directory / MANIFEST}: expected `{name}` of the run that wrote it"
        f" ({told!r:.100}), got {got!r:.100}; {_AGAIN}"
      )
  names = file_names(grid)
  procedure = manifest_procedure(manifest)
  options = (ids, procedure, manifest.get("sequential", False), in_memory)
  full, *records = (
    _read_column(directory / name, *options) for name in names[1:]
  )
  if bare := [
    n for n in names if n not in checksums and (directory / n).exists()
  ]:
    raise GenerationsError(
      f"{directory / MANIFEST}: expected `checksums` of every file, as of a "
      "run that finished,"
      f" got none of {bare[:3]}; resume the run that wrote it."
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
  """The records of one threshold, of the first `ids` where the run may be
  `partial`.
  """
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
      f"{path}: expected a record of each of the {len(wanted)} prompts, got "
      f"{len(missing)}"
      f" without one, first {missing[:5]}, and records of others: "
      f"{unknown[:5]}; {_AGAIN}"
    )
  kept = [by_id[name] for name in wanted]
  return (
    Column(path, np.array(kept, np.int64).reshape(-1, 3))
    if long
    else tuple(kept)
  )


def read_records(
  path: str | pathlib.Path, procedure: Procedure | None = None
) -> Iterator[tuple[storage.Line, Record]]:
  """(line, record) of each line of a file; GenerationsError where one is not of
  the run.
  """
  parse = functools.partial(_parse, procedure_mark(procedure))
  return records_lib.read_each(path, parse, "a record of an output")


def _parse(mark: str | None, line: storage.Line) -> Record:
  """The record of a line; GenerationsError where it is of another procedure or
  threshold.
  """
  record = Record.from_json(line.value)
  if (theirs := line.value.get("procedure")) != mark:
    raise line.error(
      f"expected a record of the manifest's procedure {mark!r}, got one of "
      f"{theirs!r}: two"
      " procedures are mixed; generate again."
    )
  # files of earlier versions do not have it
  level = line.value.get("threshold")
  if level is not None and line.path.name != f"threshold_{level}.jsonl":
    raise line.error(
      "expected records of the threshold that the file is named by, got one "
      f"of {level!r};"
      f" {_AGAIN}"
    )
  return record


def procedure_mark(procedure: Procedure | None) -> str | None:
  """The short digest that every record line carries, so that mixed files are
  found.
  """
  return None if procedure is None else procedure.digest()[:16]


# ---- Writing


class Writer:
  """Appends records to a directory; `reports` says what resuming repaired
  (`open_writer`).
  """

  def __init__(
    self, directory: pathlib.Path, manifest: dict[str, Any], lock: storage.Lock
  ):
    self.directory = directory
    self._lock = lock  # held until `finish`, or as long as this object lives
    self._manifest = manifest
    # of the records that are there
    self.procedure = manifest_procedure(manifest)
    self._mark = procedure_mark(self.procedure)
    self._ids = frozenset(manifest["prompt_ids"])
    self.reports: list[str] = []
    # Where each record begins in its file.
    self._done: dict[float, dict[str, int]] = {}
    for threshold in (thresholds_lib.NEVER_EXIT, *manifest["thresholds"]):
      path = directory / threshold_file(threshold)
      self._done[threshold] = self._resume(path) if path.exists() else {}

  def _resume(self, path: pathlib.Path) -> dict[str, int]:
    """Where each record begins, after what killed or concurrent writers left
    was mended.

    Two writers at once double and tear lines, where file systems have no locks.
    Of equal lines the first is kept; where two of one id differ, none is: the
    prompt is decoded again.
    """
    self.reports += filter(None, [storage.drop_partial_line(path)])
    kept: dict[str, tuple[int, int]] = {}  # where a line begins, and its hash
    offset = 0
    torn = 0
    twice = 0
    differ = set[str]()
    with storage.opened(path) as file:
      for number, raw in enumerate(storage.lines(file, path), 1):
        value = storage.parse_line(raw)[0] or {}
        begin, offset = offset, offset + len(raw)
        try:
          name = _parse(
            self._mark, storage.Line(path, number, value, begin, raw)
          ).id
        except GenerationsError:  # another run's, which is no damage
          raise
        except (OverflowError, TypeError, ValueError):
          torn += bool(raw.strip())
          continue
        if name not in kept:
          kept[name] = begin, hash(raw)
        elif kept[name][1] == hash(raw):
          twice += 1
        else:
          differ.add(name)
      if not (torn or twice or differ):
        return {name: begin for name, (begin, _) in kept.items()}
      with storage.replacing(path) as mended:
        for begin in (
          begin for name, (begin, _) in kept.items() if name not in differ
        ):
          file.seek(begin)
          mended.write(file.readline())
    self.reports.append(
      f"{path}: {torn} damaged lines and {twice} doubled ones were removed, "
      f"and {len(differ)}"
      " prompts that had two outputs; what is missing is decoded again."
    )
    return self._resume(path)

  def completed_ids(self, threshold: float) -> frozenset[str]:
    """Ids that already have a record at `threshold` (`NEVER_EXIT` for the
    reference).
    """
    return frozenset(self._done[threshold])

  def completed_records(
    self, threshold: float, ids: Iterable[str]
  ) -> dict[str, Record]:
    """The records already written at `threshold`, of those `ids`, by id."""
    done = self._done[threshold]
    offsets = np.array([done[name] for name in ids if name in done], np.int64)
    path = self.directory / threshold_file(threshold)
    column = Column(path, offsets[:, None]) if len(offsets) else ()
    return {record.id: record for record in column}

  def append(self, threshold: float, records: Iterable[Record]) -> None:
    """Appends records as a whole; ValueError where an id is unknown or already
    written.
    """
    done = self._done[threshold]
    marks = {"threshold": thresholds_lib.threshold_to_json(threshold)}
    if self._mark is not None:
      marks["procedure"] = self._mark
    path = self.directory / threshold_file(threshold)
    begin = path.stat().st_size if path.exists() else 0
    lines = []
    begins = {}
    for record in records:
      if record.id not in self._ids or record.id in done or record.id in begins:
        raise ValueError(
          "Expected `records` to be of prompts that have none at "
          f"{threshold} yet, got one of"
          f" {record.id!r}."
        )
      lines.append(
        storage.dump_line({**record.to_json(), **marks}).encode("utf-8")
      )
      begins[record.id] = begin
      begin += len(lines[-1])
    storage.append(path, b"".join(lines))
    done.update(begins)

  def finish(self) -> None:
    """Writes the checksums of all files into the manifest; ValueError if a
    record lacks.
    """
    for threshold, done in self._done.items():
      if missing := len(self._ids - set(done)):
        raise ValueError(
          f"{threshold_file(threshold)}: expected a record of every prompt, "
          f"got {missing}"
          " without one; append them before `finish`."
        )
    names = file_names(self._manifest["thresholds"])
    self._manifest["checksums"] = checksums(self.directory, names)
    write_manifest(self.directory, self._manifest)
    self._lock.release()


def checksums(directory: pathlib.Path, names: Iterable[str]) -> dict[str, str]:
  """The field `checksums` of a manifest or a mark: {name: SHA-256 of the
  file}.
  """
  return {name: storage.checksum(directory / name) for name in names}


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
    thresholds: the strictly descending grid, without `NEVER_EXIT` (the
      reference is always there).
    procedure: how the outputs are decoded, or None.
    provenance: the story of the run.

  Raises:
    GenerationsError: the directory holds another procedure, grid or prompts
      (the message names the field), or is damaged.
    ValueError: there is no prompt, or an id occurs twice.
    storage.LockedError: another process writes there.
    OSError: it cannot be written, or one of its files is a link to nothing.
  """
  directory, ids = pathlib.Path(directory), [prompt.id for prompt in prompts]
  if not ids or (twice := checks.repeated(ids)):
    got = f"{twice[:5]} more than once" if ids else "none"
    raise ValueError(
      f"Expected `prompts` to be at least one, with unique ids, got {got}."
    )
  grid = thresholds_lib.validate_grid(thresholds).tolist()
  story = provenance or Provenance()
  story = dataclasses.replace(
    story, grid=story.grid or tuple(grid), num_examples=len(ids)
  )
  manifest = {
    "schema_version": SCHEMA_VERSION,
    "procedure": None if procedure is None else procedure.to_json(),
    "provenance": story.to_json(),
    "thresholds": grid,
    "prompt_ids": ids,
    "checksums": {},
  }
  try:
    directory.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    text = (
      f"Expected {str(directory)!r} to be a folder that can be made, got: "
      f"{error.strerror}"
    )
    raise OSError(f"{text}; choose a folder that can be written.") from error
  storage.refuse_planted_links(
    directory / name for name in (MANIFEST, *file_names(grid))
  )
  lock = storage.lock(directory)
  differ = ""
  if (directory / MANIFEST).exists():
    there = read_manifest(directory)
    differ = describe_differences(manifest_procedure(there), procedure)
    for name in ("thresholds", "prompt_ids", "sequential"):
      ours = manifest.get(name, False)
      theirs = there.get(name, False)
      if ours != theirs:
        differ = (
          differ or f"`{name}`: expected {theirs!r:.100}, got {ours!r:.100}"
        )
    # The story begins with the first run, and records are marked with its
    # procedure.
    manifest |= {
      name: there.get(name) for name in ("provenance", "procedure", "checksums")
    }
  path = directory / PROMPTS
  lines = b"".join(
    storage.dump_line(prompt.to_json()).encode() for prompt in prompts
  )
  fresh = not path.exists()
  if not fresh and (
    path.stat().st_size != len(lines)
    or storage.content(path, len(lines)) != lines
  ):
    differ = differ or f"other prompts in {PROMPTS}, which would be replaced"
  if differ:
    raise GenerationsError(
      f"{directory}: expected the run that is there, got another: {differ}; "
      "choose another"
      " folder (--output), or the options of the run that is there."
    )
  if fresh:
    storage.write_atomically(path, lines)
  # Records that were edited must not be written into new checksums.
  check_checksums(directory, manifest["checksums"] or {})
  # Resuming reopens a finished run: its checksums are written again by
  # `finish`.
  write_manifest(directory, manifest | {"checksums": {}})
  return Writer(directory, manifest, lock)
