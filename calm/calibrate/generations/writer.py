"""Writes cached generations so that a run can be killed at any moment and go on later.

A run that is killed loses at most the record it was writing.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from calm import storage
from calm.calibrate import thresholds as thresholds_lib
from calm.calibrate.generations import cache, order
from calm.calibrate.generations import records as records_lib
from calm.calibrate.generations.procedure import (
  Procedure,
  Provenance,
  describe_differences,
  unknown_platform,
)
from calm.calibrate.generations.records import GenerationsError, Prompt, Record


class Writer:
  """Appends records to a directory of cached generations; returned by `open_writer`.

  Attributes:
    directory: where.
    procedure: how the records that are there were decoded.
    reports: what resuming repaired, one sentence each.
  """

  def __init__(self, directory: pathlib.Path, manifest: dict[str, Any], lock: storage.Lock):
    self.directory = directory
    self._lock = lock  # held until `finish`, or as long as this object lives
    self.reports: list[str] = []
    self._manifest = manifest
    self.procedure = cache.manifest_procedure(manifest)
    self._ids = frozenset(manifest["prompt_ids"])
    # Where each record begins in its file.
    self._done: dict[float, dict[str, int]] = {}
    for threshold in (thresholds_lib.NEVER_EXIT, *manifest["thresholds"]):
      path = directory / cache.threshold_file(threshold)
      report = storage.drop_partial_line(path) if path.exists() else None
      self.reports += [report] if report else []
      self._done[threshold] = self._offsets(path) if path.exists() else {}

  def _offsets(self, path: pathlib.Path) -> dict[str, int]:
    """Where each record begins, after lines that two writers left were removed."""
    try:
      return cache.record_offsets(path, self.procedure)
    except GenerationsError:
      report = repair(path, self.procedure)
      if report is None:
        raise
    self.reports.append(report)
    return cache.record_offsets(path, self.procedure)

  def completed_ids(self, threshold: float) -> frozenset[str]:
    """Ids that already have a record at `threshold` (`NEVER_EXIT` for the reference)."""
    return frozenset(self._known(threshold))

  def completed_records(
    self, threshold: float, ids: Iterable[str] | None = None
  ) -> dict[str, Record]:
    """The records already written at `threshold`, by id; those of `ids`, or all.

    Only the lines that are asked for are read: as many calls as there are batches read the
    file once.
    """
    done = self._known(threshold)
    offsets = [done[name] for name in (done if ids is None else ids) if name in done]
    table = np.array([(offset, -1, 0) for offset in offsets], np.int64).reshape(-1, 3)
    column = (
      cache.Column(self.directory / cache.threshold_file(threshold), table) if offsets else ()
    )
    return {record.id: record for record in column}

  def append(self, threshold: float, records: Iterable[Record]) -> None:
    """Appends whole records and hands them to the operating system before it returns.

    Raises:
      ValueError: `threshold` is not in the grid, an id is unknown or already written.
    """
    done = self._known(threshold)
    records = tuple(records)
    names = [record.id for record in records]
    odd = sorted(set(names) - self._ids)
    twice = sorted({name for name in names if name in done or names.count(name) > 1})
    if odd or twice:
      raise ValueError(
        f"Expected `records` to be of prompts that have none at {threshold} yet, got unknown"
        f" ids {odd[:5]}, ids already there {twice[:5]}."
      )
    mark = cache.procedure_mark(self.procedure)
    marks = {"threshold": thresholds_lib.threshold_to_json(threshold)}
    marks |= {} if mark is None else {"procedure": mark}
    lines = [storage.dump_line({**r.to_json(), **marks}).encode("utf-8") for r in records]
    path = self.directory / cache.threshold_file(threshold)
    begin = path.stat().st_size if path.exists() else 0
    storage.append(path, b"".join(lines))
    for name, line in zip(names, lines, strict=True):
      done[name] = begin
      begin += len(line)

  def finish(self) -> None:
    """Writes the checksums of all files into the manifest; call it when nothing is missing.

    Raises:
      ValueError: a prompt has no record at some threshold (sequential runs excepted).
    """
    for threshold, done in self._done.items():
      missing = len(self._ids - set(done))
      if missing and not self._manifest["sequential"]:
        raise ValueError(
          f"{self.directory}: expected a record of every prompt at threshold"
          f" {thresholds_lib.format_threshold(threshold)}, got {missing} without one;"
          " append them before `finish`."
        )
    names = cache.file_names(self._manifest["thresholds"])
    there = [name for name in names if (self.directory / name).exists()]
    sums = {name: storage.checksum(self.directory / name) for name in there}
    self._manifest["checksums"] = sums
    write_manifest(self.directory, self._manifest)
    self._lock.release()

  def _known(self, threshold: float) -> dict[str, int]:
    if threshold not in self._done:
      grid = [thresholds_lib.format_threshold(value) for value in self._done]
      raise ValueError(f"Expected `threshold` to be one of {grid}, got {threshold!r}.")
    return self._done[threshold]


def write_manifest(directory: pathlib.Path, manifest: Mapping[str, Any]) -> None:
  """Writes a manifest whole."""
  text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
  storage.write_atomically(directory / cache.MANIFEST, text)


def open_writer(
  directory: str | pathlib.Path,
  *,
  prompts: Sequence[Prompt],
  thresholds: Sequence[float] | np.ndarray,
  procedure: Procedure | None,
  provenance: Provenance | None = None,
  sequential: bool = False,
  by_group: bool = False,
) -> Writer:
  """Creates a directory of cached generations, or resumes it.

  Args:
    directory: where; made if missing.
    prompts: in the order that losses will be tested in.
    thresholds: the strictly descending grid, without `NEVER_EXIT` (the reference is always
      there).
    procedure: how the outputs are decoded, or None.
    provenance: the story of the run.
    sequential: whether the run may stop early, leaving a suffix of prompts out.
    by_group: whether such a run is tested on clusters; the prompts of one stand together then.

  Returns:
    A `Writer`; `reports` says what resuming repaired.

  Raises:
    GenerationsError: the directory holds another procedure, grid or prompts (the message names
      the field), or is damaged.
    ValueError: ids occur twice, or `by_group` and a cluster's prompts do not stand together.
    storage.LockedError: another process writes there.
    OSError: it cannot be written, or one of its files is a link to nothing.
  """
  directory = pathlib.Path(directory)
  records_lib.check_unique(prompts)
  if by_group:
    order.consecutive_units(len(prompts), order.prompt_clusters(prompts))
  grid = thresholds_lib.validate_grid(thresholds).tolist()
  flags = {"sequential": sequential, "by_group": by_group}  # held against the manifest's
  story = provenance or Provenance()
  changes = {"grid": story.grid or tuple(grid), "num_examples": len(prompts)}
  story = dataclasses.replace(story, **changes, notes={**(story.notes or {}), **flags})
  manifest = {
    "schema_version": cache.SCHEMA_VERSION,
    "procedure": None if procedure is None else procedure.to_json(),
    "provenance": story.to_json(),
    "thresholds": grid,
    "prompt_ids": [prompt.id for prompt in prompts],
    **flags,
    "checksums": {},
  }
  prompt_text = "".join(storage.dump_line(prompt.to_json()) for prompt in prompts)
  lock = lock_folder(directory, grid)
  if (directory / cache.MANIFEST).exists():
    there = cache.read_manifest(directory)
    _check_same_run(directory, there, manifest, prompt_text)
    # Records that were edited must not be written into new checksums.
    cache.check_checksums(directory, there.get("checksums") or {})
    # The story begins with the first run, and records are marked with its procedure.
    manifest |= {name: there[name] for name in ("provenance", "procedure")}
  else:
    path = directory / cache.PROMPTS
    if path.exists() and not _holds(path, prompt_text):  # a stopped start has left the same
      raise GenerationsError(
        f"{path}: expected a folder without a file of that name, or that of this run, got"
        " another one, which would be replaced; choose another folder."
      )
    storage.write_atomically(path, prompt_text)
  # Resuming reopens a finished run: its checksums are written again by `finish`.
  write_manifest(directory, manifest)
  writer = Writer(directory, manifest, lock)
  old = unknown_platform(writer.procedure)
  if old and not unknown_platform(procedure):
    writer.reports.append(f"{directory}: {old}")
  return writer


def lock_folder(directory: pathlib.Path, grid: Iterable[float]) -> storage.Lock:
  """Makes a folder for a run and takes it for this process; errors as of `open_writer`."""
  try:
    directory.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise OSError(
      f"Expected {str(directory)!r} to be a folder that can be made, got: {error.strerror};"
      " choose a folder that can be written."
    ) from error
  storage.refuse_planted_links(
    directory / name for name in (cache.MANIFEST, *cache.file_names(grid))
  )
  return storage.lock(directory)


def _check_same_run(
  directory: pathlib.Path, there: dict[str, Any], manifest: dict[str, Any], prompts: str
) -> None:
  path = directory / cache.MANIFEST
  way_out = "choose another folder, or the options of the run that is there."
  difference = describe_differences(
    cache.manifest_procedure(there), cache.manifest_procedure(manifest)
  )
  if difference:
    raise GenerationsError(
      f"{path}: expected the procedure of the run that is there, got another: {difference};"
      f" {way_out}"
    )
  there = {"by_group": False, **there}  # older manifests do not say it
  for name in ("thresholds", "prompt_ids", "sequential", "by_group"):
    if there.get(name) != manifest[name]:
      raise GenerationsError(
        f"{path}: expected `{name}` to be {_short(there.get(name))}, got"
        f" {_short(manifest[name])}; {way_out}"
      )
  if not _holds(directory / cache.PROMPTS, prompts):
    raise GenerationsError(
      f"{directory / cache.PROMPTS}: expected the texts of the run that is there, got others;"
      f" {way_out}"
    )


def _holds(path: pathlib.Path, text: str) -> bool:
  """Whether a file holds this text, whatever else it may be."""
  content = text.encode("utf-8")
  return path.stat().st_size == len(content) and storage.content(path, len(content)) == content


def _short(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 120 else f"{text[:100]}... ({len(value)} entries)"


def repair(path: pathlib.Path, procedure: Procedure | None) -> str | None:
  """Removes doubled and damaged lines of a file; says which, or None for nothing.

  Two writers at once left them, in earlier versions and on file systems without locks. Of equal
  lines the first is kept; where two of one id differ, none is: the prompt is decoded again. A
  file with a record of another procedure is left as it is.
  """
  mark = cache.procedure_mark(procedure)
  seen: dict[str, bytes] = {}
  torn, twice, differ = 0, 0, set[str]()
  for raw, record, marked in _lines(path):
    if record is None:
      torn += 1
      continue
    if marked != mark:
      return None
    digest = hashlib.sha256(raw).digest()
    if record.id in seen and seen[record.id] == digest:
      twice += 1
    elif seen.setdefault(record.id, digest) != digest:
      differ.add(record.id)
  if not (torn or twice or differ):
    return None
  done = set(differ)
  with storage.replacing(path) as file:
    for raw, record, _ in _lines(path):
      if record is not None and record.id not in done:
        done.add(record.id)
        file.write(raw + b"\n")
  return (
    f"{path}: {torn} damaged lines and {twice} doubled ones were removed, and {len(differ)}"
    " prompts that had two outputs; what is missing is decoded again."
  )


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
