"""Cached generations: what a model said at every threshold, on disk and in memory.

A directory holds

    manifest.json            schema version, procedure, provenance, thresholds, checksums
    prompts.jsonl            one prompt a line
    threshold_never.jsonl    the full-depth reference
    threshold_0.9.jsonl ...  one file a threshold, one record a line, in any order

`writer.open_writer` creates or resumes it, `load` reads it.
"""

import dataclasses
import math
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, overload

import numpy as np

from calm import storage
from calm.calibrate import thresholds as thresholds_lib
from calm.calibrate.generations import order
from calm.calibrate.generations import records as records_lib
from calm.calibrate.generations.procedure import Procedure, Provenance
from calm.calibrate.generations.records import GenerationsError, Prompt, Record

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
PROMPTS = "prompts.jsonl"
# Records of longer files, in bytes, are left there until they are asked for.
LONG_FILE = 2 * 2**20


@dataclasses.dataclass(frozen=True, eq=False)
class Generations:
  """Cached generations in memory.

  Attributes:
    prompts: [num_examples], in the recorded order.
    thresholds: [num_thresholds] float64, strictly descending.
    records: per threshold (same order as `thresholds`) the records in the order of `prompts`;
      in a sequential run a threshold may have a prefix only. Those of long files stay on the
      disk (`Column`).
    full: the full-depth reference, in the order of `prompts`.
    procedure: how they were decoded; None for files from elsewhere.
    provenance: their story.
    sequential: whether the run was allowed to stop early.
    by_group: whether a sequential run was tested on clusters, whose prompts stand together.
    knobs: names of the settings, in the order of `thresholds`, where they were no thresholds.
  """

  prompts: tuple[Prompt, ...]
  thresholds: np.ndarray
  records: tuple[Sequence[Record], ...]
  full: Sequence[Record]
  procedure: Procedure | None = None
  provenance: Provenance = dataclasses.field(default_factory=Provenance)
  sequential: bool = False
  by_group: bool = False
  knobs: tuple[str, ...] = ()

  @property
  def ids(self) -> tuple[str, ...]:
    """[num_examples] ids in the recorded order."""
    return tuple(prompt.id for prompt in self.prompts)

  @property
  def references(self) -> tuple[tuple[str, ...], ...]:
    """[num_examples] accepted references of each prompt."""
    return tuple(prompt.targets for prompt in self.prompts)

  @property
  def groups(self) -> tuple[str, ...] | None:
    """[num_examples] cluster of each prompt, or None where any prompt has none."""
    groups = tuple(prompt.group for prompt in self.prompts)
    return None if None in groups else groups  # type: ignore[return-value]

  def layer_counts(self) -> tuple[np.ndarray, np.ndarray] | None:
    """Decoder layers and tokens per prompt and threshold.

    Returns:
      (layers, tokens): two [num_examples, num_thresholds] int64 arrays: layers summed over real
      tokens (EOS yes, padding no), and real tokens. None where a record has no `exit_layers` or
      a sequential run left some out.
    """
    if any(len(records) != len(self.prompts) for records in self.records):
      return None
    sums = [layer_sums(records) for records in self.records]
    if None in [one if one is None else 0 for one in sums]:
      return None
    layers, tokens = zip(*filter(None, sums), strict=True)
    return np.stack(layers, axis=1), np.stack(tokens, axis=1)

  def __repr__(self) -> str:
    return (
      f"Generations({len(self.prompts)} prompts, {len(self.thresholds)} thresholds"
      f" {self.thresholds.tolist()}, procedure="
      f"{None if self.procedure is None else self.procedure.digest()[:12]})"
    )


class Column(Sequence[Record]):
  """Records of one threshold that stay on the disk, each read when it is asked for.

  A million records of some twenty tokens take gigabytes as objects; as places in their file,
  and the layers that each took, they take some ten bytes each.

  Attributes:
    path: the file; it must stay as it was when it was read first.
    table: [num_records, 3] int64: where each line begins, in bytes; decoder layers run, summed
      over tokens, -1 where a record says none; tokens without padding.
  """

  def __init__(self, path: pathlib.Path, table: np.ndarray):
    self.path, self.table = path, table

  def __len__(self) -> int:
    return len(self.table)

  @overload
  def __getitem__(self, index: int) -> Record: ...
  @overload
  def __getitem__(self, index: slice) -> "Column": ...
  def __getitem__(self, index: int | slice) -> "Record | Column":
    if isinstance(index, slice):
      return Column(self.path, self.table[index])
    with open(self.path, "rb") as file:
      return Record.from_json(_value(file, int(self.table[index, 0])))

  def __iter__(self) -> Iterator[Record]:
    return map(Record.from_json, self._values())

  def texts(self) -> Iterator[str]:
    """The predictions alone, which are read in half the time."""
    return (value["prediction"] for value in self._values())

  def __eq__(self, other: object) -> bool:
    if not isinstance(other, Sequence):
      return NotImplemented
    return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

  __hash__ = None  # pyright: ignore[reportAssignmentType]

  def __repr__(self) -> str:
    return f"Column({len(self)} records of {self.path})"

  def _values(self) -> Iterator[dict[str, Any]]:
    with open(self.path, "rb") as file:
      for offset in self.table[:, 0].tolist():
        yield _value(file, offset)


def _value(file: BinaryIO, offset: int) -> dict[str, Any]:
  if file.tell() != offset:  # a seek throws away what was read ahead
    file.seek(offset)
  return storage.parse_json(file.readline())


def texts(column: Sequence[Record]) -> Iterator[str]:
  """The predictions of a column, wherever it is."""
  if isinstance(column, Column):
    return column.texts()
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


_text = lambda value: isinstance(value, str)
_flag = lambda value: isinstance(value, bool)
_object = lambda value: value is None or isinstance(value, dict)
_number = lambda value: isinstance(value, int | float) and not isinstance(value, bool)
# Field: (what it is, whether a value is that).
_FIELDS = {
  "prompt_ids": (
    "a list of different texts",
    lambda v: isinstance(v, list) and all(map(_text, v)) and len({*v}) == len(v),
  ),
  "thresholds": (
    "a list of numbers",
    lambda v: isinstance(v, list) and all(map(_number, v)),
  ),
  "checksums": (
    "an object of texts",
    lambda v: (
      isinstance(v, dict) and all(map(_text, v.values())) and not any("/" in n for n in v)
    ),
  ),
  "procedure": ("an object or null", _object),
  "provenance": ("an object or null", _object),
  "sequential": ("true or false", _flag),
  "by_group": ("true or false", _flag),
}


def read_manifest(directory: str | pathlib.Path) -> dict[str, Any]:
  """Reads and checks manifest.json.

  Raises:
    GenerationsError: it is missing, damaged, or of another schema version.
  """
  path = pathlib.Path(directory) / MANIFEST
  try:
    manifest = storage.parse_json(storage.content(path))
  except FileNotFoundError as error:
    raise GenerationsError(
      f"Expected `directory` to be a folder of cached generations, got {str(path.parent)!r},"
      f" which has no {MANIFEST}; give the folder that `calm generate` wrote."
    ) from error
  except (OSError, ValueError) as error:
    raise GenerationsError(
      f"{path}: expected a JSON object, got {error}; resume the run that wrote it, or"
      " generate again."
    ) from error
  version = manifest.get("schema_version") if isinstance(manifest, dict) else None
  if version != SCHEMA_VERSION or isinstance(version, bool):
    raise GenerationsError(
      f"{path}: expected `schema_version` to be {SCHEMA_VERSION}, got {version!r}; use the"
      " version of this package that wrote it, or generate again."
    )
  for name, (kind, holds) in _FIELDS.items():
    required = name in ("prompt_ids", "thresholds")
    if (required or name in manifest) and not holds(manifest.get(name)):
      got = repr(manifest[name])[:80] if name in manifest else "none"
      raise GenerationsError(f"{path}: expected `{name}` to be {kind}, got {got}.")
  return manifest


def load(
  directory: str | pathlib.Path, *, unverified: bool = False, in_memory: bool = False
) -> Generations:
  """Reads cached generations.

  Args:
    directory: a folder written by `writer.open_writer`.
    unverified: take a folder whose manifest lists no checksums, of a run that never finished
      or of another program: nothing then shows whether a record was changed.
    in_memory: read all records into memory. By default those of a file of more than
      `LONG_FILE` bytes are read when they are asked for, so that memory grows with the prompts
      alone; the folder must then stay as it is.

  Raises:
    GenerationsError: anything is missing, damaged, duplicated or mixed; the message names the
      file and the line.
  """
  directory = pathlib.Path(directory)
  manifest = read_manifest(directory)
  checksums = manifest.get("checksums", {})
  check_checksums(directory, checksums)
  by_id = {prompt.id: prompt for prompt in records_lib.read_prompts(directory / PROMPTS)}
  ids = manifest["prompt_ids"]
  if set(ids) != set(by_id):
    odd = sorted(set(ids) ^ set(by_id))[:5]
    raise GenerationsError(
      f"{directory / PROMPTS}: expected the ids of {MANIFEST}, got some that are in one"
      f" only: {odd}; restore the file, or generate again."
    )
  prompts = tuple(by_id[name] for name in ids)
  procedure = manifest_procedure(manifest)
  provenance = _parsed(manifest, "provenance", Provenance) or Provenance()
  grid = thresholds_lib.validate_grid(manifest["thresholds"])
  sequential, by_group = (bool(manifest.get(name)) for name in ("sequential", "by_group"))
  _check_provenance(directory / MANIFEST, manifest, provenance)
  if sequential:
    _check_order(directory / MANIFEST, prompts, procedure, by_group)
  full, *records = (
    _read_threshold(directory / name, ids, procedure, sequential, in_memory)
    for name in file_names(grid)[1:]
  )
  # Last, since a missing record says more about a run that was stopped.
  unlisted = [n for n in file_names(grid) if n not in checksums and (directory / n).exists()]
  if unlisted and not unverified:
    raise GenerationsError(
      f"{directory / MANIFEST}: expected `checksums` to list every file of a run that finished,"
      f" got none for {unlisted[:3]}; resume the run that wrote it, or pass unverified=True"
      " (--unverified), which trusts records that may have been changed."
    )
  columns = tuple(records)
  return Generations(prompts, grid, columns, full, procedure, provenance, sequential, by_group)


def _check_provenance(
  path: pathlib.Path, manifest: Mapping[str, Any], story: Provenance
) -> None:
  """GenerationsError where a manifest was changed after the run that its provenance tells of.

  A threshold or prompts were dropped, or it was declared a run that stopped early.
  """
  notes, flags = story.notes or {}, ("sequential", "by_group")
  pairs = {
    "thresholds": (manifest["thresholds"], None if story.grid is None else list(story.grid)),
    "prompt_ids": (len(manifest["prompt_ids"]), story.num_examples),
  }
  pairs = {name: pair for name, pair in pairs.items() if pair[1] is not None}
  if any(name in notes for name in flags):  # those of earlier versions have neither
    pairs |= {name: (manifest.get(name, False), notes.get(name)) for name in flags}
  for name, (there, expected) in pairs.items():
    if there != expected or type(there) is not type(expected):
      raise GenerationsError(
        f"{path}: expected `{name}` as `provenance` tells of the run ({expected!r:.100}), got"
        f" {there!r:.100}; restore the file, or generate again."
      )


def _check_order(
  path: pathlib.Path, prompts: Sequence[Prompt], procedure: Procedure | None, by_group: bool
) -> None:
  """GenerationsError unless prompts stand in the order of a run that stops early.

  A whole run keeps the user's order: the manifest was changed to say that it stopped early.
  """
  ids = [prompt.id for prompt in prompts]
  groups = order.prompt_clusters(prompts) if by_group else None
  wanted = order.decoding_order(ids, groups, procedure, order.prompts_digest(prompts)).tolist()
  if wanted != list(range(len(ids))):
    place = next(place for place, row in enumerate(wanted) if place != row)
    raise GenerationsError(
      f"{path}: expected `prompt_ids` in the order of a test that stops early"
      f" (`sequential`{' and `by_group`' if by_group else ''}), which has"
      f" {ids[wanted[place]]!r:.60} at {place}, got {ids[place]!r:.60}: `sequential` or"
      " `by_group` was changed after the run, or an earlier version ordered the prompts;"
      " restore the file, or generate again."
    )


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


def procedure_mark(procedure: Procedure | None) -> str | None:
  """The short digest that every record line carries, so that mixed files are found."""
  return None if procedure is None else procedure.digest()[:16]


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
      for _ in storage.read_lines(path):  # says more where a line is damaged
        pass
      raise GenerationsError(
        f"{path}: expected the SHA-256 {expected[:12]!r}... of {manifest}, got another: it"
        " was changed after the run finished; restore it, or generate again."
      )


def read_records(
  path: str | pathlib.Path, procedure: Procedure | None = None
) -> dict[str, Record]:
  """Reads one file of records by id.

  Raises:
    GenerationsError: a line is no record, an id occurs twice, or a line belongs to another
      procedure or threshold.
  """
  return {record.id: record for _, record in _records(path, procedure)}


def record_offsets(
  path: str | pathlib.Path, procedure: Procedure | None = None
) -> dict[str, int]:
  """Where the line of each id begins, in bytes; checks what `read_records` checks."""
  return {record.id: line.offset for line, record in _records(path, procedure)}


def _records(
  path: str | pathlib.Path, procedure: Procedure | None
) -> Iterator[tuple[storage.Line, Record]]:
  mark = procedure_mark(procedure)
  seen: set[str] = set()
  path = pathlib.Path(path)
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
    if line.value.get("procedure") != mark:
      raise line.error(
        f"expected a record of the manifest's procedure {mark!r}, got one of procedure"
        f" {line.value.get('procedure')!r}, so outputs of two procedures are mixed; generate"
        " again."
      )
    level = line.value.get("threshold")  # files of earlier versions do not have it
    if level is not None and path.name != threshold_file(_level(level)):
      raise line.error(
        f"expected records of the threshold that the file is named by, got one of {level!r}:"
        " files were swapped; restore them, or generate again."
      )
    seen.add(record.id)
    yield line, record


def _level(value: Any) -> float:
  """A threshold as a record names it; NaN where it is none."""
  try:
    return thresholds_lib.parse_threshold(value)
  except (TypeError, ValueError):
    return math.nan


def _read_threshold(
  path: pathlib.Path,
  ids: Sequence[str],
  procedure: Procedure | None,
  sequential: bool,
  in_memory: bool,
) -> Sequence[Record]:
  if sequential and not path.exists() and path.name != file_names([])[1]:
    return ()
  long = not in_memory and path.is_file() and path.stat().st_size > LONG_FILE
  by_id: dict[str, Any] = {
    record.id: (line.offset, *_sums(record)) if long else record
    for line, record in _records(path, procedure)
  }
  unknown = sorted(set(by_id) - set(ids))
  if unknown:
    raise GenerationsError(
      f"{path}: expected ids of the manifest's prompts, got others: {unknown[:5]}; restore"
      " the file, or generate again."
    )
  missing = [name for name in ids if name not in by_id]
  if missing and not sequential:
    raise GenerationsError(
      f"{path}: expected a record of each of the {len(ids)} prompts, got {len(missing)}"
      f" without one, first {missing[:5]}; resume the run that wrote it."
    )
  if missing != list(ids[len(by_id) :]):
    raise GenerationsError(
      f"{path}: expected a sequential run to lack only the last prompts of the order, got"
      f" {missing[0]!r} missing before prompts that are there; restore the file, or generate"
      " again."
    )
  kept = [by_id[name] for name in ids[: len(by_id)]]
  return Column(path, np.array(kept, np.int64).reshape(-1, 3)) if long else tuple(kept)
