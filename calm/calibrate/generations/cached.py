"""Cached generations: what a model said at every threshold, on disk and in memory.

A directory holds

    manifest.json            schema version, procedure, provenance, thresholds, checksums
    prompts.jsonl            one prompt a line
    threshold_never.jsonl    the full-depth reference
    threshold_0.9.jsonl ...  one file a threshold, one record a line, in any order

`writer.open_writer` creates or resumes it, `load` reads it. A run killed at any
moment loses at most the record it was writing.
"""

import dataclasses
import math
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from calm import storage
from calm.calibrate import thresholds as thresholds_lib
from calm.calibrate.generations import columns, order
from calm.calibrate.generations import records as records_lib
from calm.calibrate.generations.procedures import Procedure, Provenance
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
      disk (`columns.Column`).
    full: the full-depth reference, in the order of `prompts`.
    procedure: how they were decoded; None for files from elsewhere.
    provenance: their story.
    sequential: whether the run was allowed to stop early.
    by_group: whether a sequential run was tested on clusters, whose prompts stand together.
    knobs: what was turned, in the order of `thresholds`, where that was no threshold.
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
    sums = [columns.layer_sums(records) for records in self.records]
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


def threshold_file(threshold: float) -> str:
  """Name of the file that holds the records of one threshold."""
  return f"threshold_{thresholds_lib.format_threshold(threshold)}.jsonl"


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
  _check_fields(manifest, path)
  return manifest


def _check_fields(manifest: Mapping[str, Any], path: pathlib.Path) -> None:
  """Fields of the types that everything after this counts on."""
  text = lambda value: isinstance(value, str)
  number = lambda value: isinstance(value, int | float) and not isinstance(value, bool)
  listed = lambda value, kind: isinstance(value, list) and all(map(kind, value))
  checks = {
    "prompt_ids": (
      "a list of different texts",
      lambda v: listed(v, text) and len({*v}) == len(v),
    ),
    "thresholds": ("a list of numbers", lambda v: listed(v, number)),
    "checksums": (
      "an object of texts",
      lambda v: (
        isinstance(v, dict) and all(map(text, v.values())) and not any("/" in n for n in v)
      ),
    ),
    "procedure": ("an object or null", lambda v: v is None or isinstance(v, dict)),
    "provenance": ("an object or null", lambda v: v is None or isinstance(v, dict)),
    "sequential": ("true or false", lambda v: isinstance(v, bool)),
    "by_group": ("true or false", lambda v: isinstance(v, bool)),
  }
  for name, (kind, holds) in checks.items():
    if name not in manifest and name not in ("prompt_ids", "thresholds"):
      continue
    if name not in manifest or not holds(manifest[name]):
      got = repr(manifest[name])[:80] if name in manifest else "none"
      raise GenerationsError(f"{path}: expected `{name}` to be {kind}, got {got}.")


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
  procedure, provenance = manifest_procedure(manifest), _provenance(manifest)
  grid = thresholds_lib.validate_grid(manifest["thresholds"])
  _check_story(directory / MANIFEST, manifest, provenance)
  sequential = bool(manifest.get("sequential", False))
  if sequential:
    prompts = [by_id[name] for name in ids]
    _check_order(directory / MANIFEST, prompts, procedure, bool(manifest.get("by_group")))
  columns = [
    _read_threshold(directory, threshold, ids, procedure, sequential, in_memory)
    for threshold in [thresholds_lib.NEVER_EXIT, *grid]
  ]
  # Last, since a missing record says more about a run that was stopped.
  if not unverified:
    _check_listed(directory, checksums, grid)
  return Generations(
    prompts=tuple(by_id[name] for name in ids),
    thresholds=grid,
    records=tuple(columns[1:]),
    full=columns[0],
    procedure=procedure,
    provenance=provenance,
    sequential=sequential,
    by_group=bool(manifest.get("by_group", False)),
  )


def _check_story(path: pathlib.Path, manifest: Mapping[str, Any], told: Provenance) -> None:
  """What a manifest says of a run, against its provenance, as far as that tells.

  Raises:
    GenerationsError: they differ: a threshold or prompts were dropped after the run, or it was
      made one that stopped early.
  """
  notes, kept = told.notes or {}, ("sequential", "by_group")
  pairs = {
    "thresholds": (manifest["thresholds"], None if told.grid is None else list(told.grid)),
    "prompt_ids": (len(manifest["prompt_ids"]), told.num_examples),
  }
  pairs = {name: pair for name, pair in pairs.items() if pair[1] is not None}
  if any(name in notes for name in kept):  # those of earlier versions have neither
    pairs |= {name: (manifest.get(name, False), notes.get(name)) for name in kept}
  for name, (there, expected) in pairs.items():
    if there != expected or type(there) is not type(expected):
      raise GenerationsError(
        f"{path}: expected `{name}` as `provenance` tells of the run ({expected!r:.100}), got"
        f" {there!r:.100}; restore the file, or generate again."
      )


def _check_order(
  path: pathlib.Path, prompts: Sequence[Prompt], procedure: Procedure | None, by_group: bool
) -> None:
  """Whether prompts stand in the order of a run that stops early; a whole run keeps the user's.

  Raises:
    GenerationsError: they do not: the manifest was changed to say that the run stopped early.
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


def _check_listed(
  directory: pathlib.Path, checksums: Mapping[str, str], grid: np.ndarray
) -> None:
  """Raises GenerationsError unless every file that is read has a checksum."""
  names = [PROMPTS, *map(threshold_file, [thresholds_lib.NEVER_EXIT, *grid])]
  lacking = [name for name in names if name not in checksums and (directory / name).exists()]
  if lacking:
    raise GenerationsError(
      f"{directory / MANIFEST}: expected `checksums` to list every file of a run that finished,"
      f" got none for {lacking[:3]}; resume the run that wrote it, or pass unverified=True"
      " (--unverified), which trusts records that may have been changed."
    )


def manifest_procedure(manifest: Mapping[str, Any]) -> Procedure | None:
  """The procedure in a manifest, or None.

  Raises:
    GenerationsError: it has a field that is none of a procedure's.
  """
  value = manifest.get("procedure")
  try:
    return None if value is None else Procedure.from_json(value)
  except (TypeError, ValueError, KeyError, AttributeError) as error:
    raise GenerationsError(
      f"{MANIFEST}: expected `procedure` to be that of a run, got one with a field that is not:"
      f" {error}"
    ) from error


def _provenance(manifest: Mapping[str, Any]) -> Provenance:
  try:
    return Provenance.from_json(manifest.get("provenance") or {})
  except (TypeError, ValueError, KeyError, AttributeError) as error:
    raise GenerationsError(
      f"{MANIFEST}: expected `provenance` to be the story of a run, got a field that is none:"
      f" {error}"
    ) from error


def procedure_mark(procedure: Procedure | None) -> str | None:
  """The short digest that every record line carries, so that mixed files are found."""
  return None if procedure is None else procedure.digest()[:16]


def check_checksums(
  directory: pathlib.Path, checksums: Mapping[str, str], manifest: str = MANIFEST
) -> None:
  """Raises GenerationsError unless every file that `manifest` lists is as it was listed."""
  for name, expected in checksums.items():
    path = directory / name
    if not path.is_file():
      raise GenerationsError(
        f"{path}: expected a file, as {manifest} lists it, got none; restore it, or generate"
        " again."
      )
    if storage.checksum(path) != expected:
      # The line-by-line check below says more when a line is damaged; a whole line edited by
      # hand is found by the checksum alone.
      for _ in storage.read_lines(path):
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
      procedure.
  """
  return {record.id: record for _, record in _records(path, procedure)}


def record_offsets(
  path: str | pathlib.Path, procedure: Procedure | None = None
) -> dict[str, int]:
  """Where the line of each id begins, in bytes; checks what `read_records` checks."""
  return {record.id: line.offset for line, record in _records(path, procedure)}


def read_records_at(path: str | pathlib.Path, offsets: Iterable[int]) -> dict[str, Record]:
  """The records of some lines, without reading the others."""
  found = {}
  with open(path, "rb") as file:
    for offset in offsets:
      file.seek(offset)
      record = Record.from_json(storage.parse_json(file.readline()))
      found[record.id] = record
  return found


def _records(
  path: str | pathlib.Path, procedure: Procedure | None
) -> Iterator[tuple[storage.Line, Record]]:
  mark = procedure_mark(procedure)
  found: set[str] = set()
  path = pathlib.Path(path)
  for line in storage.read_lines(path):
    try:
      record = Record.from_json(line.value)
    except (TypeError, ValueError, OverflowError) as error:
      raise line.error(
        f"expected a record of an output, got none: {error}; restore the line, or generate"
        " again."
      ) from error
    if record.id in found:
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
    found.add(record.id)
    yield line, record


def _level(value: Any) -> float:
  """A threshold as a record names it; NaN where it is none."""
  try:
    return thresholds_lib.parse_threshold(value)
  except (TypeError, ValueError):
    return math.nan


def _read_threshold(
  directory: pathlib.Path,
  threshold: float,
  ids: Sequence[str],
  procedure: Procedure | None,
  sequential: bool,
  in_memory: bool,
) -> Sequence[Record]:
  path = directory / threshold_file(threshold)
  if sequential and not path.exists() and threshold != thresholds_lib.NEVER_EXIT:
    return ()
  long = not in_memory and path.is_file() and path.stat().st_size > LONG_FILE
  found: dict[str, Any]
  if long:
    found = {record.id: _brief(line, record) for line, record in _records(path, procedure)}
  else:
    found = read_records(path, procedure)
  unknown = sorted(set(found) - set(ids))
  if unknown:
    raise GenerationsError(
      f"{path}: expected ids of the manifest's prompts, got others: {unknown[:5]}; restore"
      " the file, or generate again."
    )
  missing = [name for name in ids if name not in found]
  if missing and not sequential:
    raise GenerationsError(
      f"{path}: expected a record of each of the {len(ids)} prompts, got {len(missing)}"
      f" without one, first {missing[:5]}; resume the run that wrote it."
    )
  if missing != list(ids[len(found) :]):
    raise GenerationsError(
      f"{path}: expected a sequential run to lack only the last prompts of the order, got"
      f" {missing[0]!r} missing before prompts that are there; restore the file, or generate"
      " again."
    )
  kept = [found[name] for name in ids[: len(found)]]
  if not long:
    return tuple(kept)
  table = np.array(kept, np.int64).reshape(-1, 3)
  return columns.Column(path, table[:, 0], *table[:, 1:].T.astype(np.int32))


def _brief(line: storage.Line, record: Record) -> tuple[int, int, int]:
  """What a `Column` keeps of a record."""
  row = record.exit_layers
  return line.offset, -1 if row is None else sum(row), sum(map(bool, row or ()))
