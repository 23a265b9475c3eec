"""Writes cached generations so that a run can be killed at any moment and go on later."""

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from calm import storage
from calm.calibrate import thresholds as thresholds_lib
from calm.calibrate.generations import cached, mending, order, procedures
from calm.calibrate.generations import records as records_lib
from calm.calibrate.generations.procedures import Procedure, Provenance, describe_differences
from calm.calibrate.generations.records import GenerationsError, Prompt, Record


class Writer:
  """Appends records to a directory of cached generations; made by `open_writer`.

  Attributes:
    directory: where.
    reports: what resuming found and repaired, one sentence each.
  """

  def __init__(self, directory: pathlib.Path, manifest: dict[str, Any], lock: storage.Lock):
    self.directory = directory
    self._lock = lock  # held until `finish`, or as long as this object lives
    self.reports: list[str] = []
    self._manifest = manifest
    self._procedure = cached.manifest_procedure(manifest)
    self._ids = frozenset(manifest["prompt_ids"])
    self._thresholds = (thresholds_lib.NEVER_EXIT, *manifest["thresholds"])
    # Where each record begins in its file.
    self._done: dict[float, dict[str, int]] = {}
    for threshold in self._thresholds:
      path = directory / cached.threshold_file(threshold)
      self._done[threshold] = {}
      if path.exists():
        report = storage.drop_partial_line(path)
        self.reports += [report] if report else []
        self._done[threshold] = self._offsets(path)

  def _offsets(self, path: pathlib.Path) -> dict[str, int]:
    """Where each record begins, what two writers left having been taken out."""
    try:
      return cached.record_offsets(path, self._procedure)
    except GenerationsError:
      report = mending.mend(path, self._procedure)
      if report is None:
        raise
    self.reports.append(report)
    return cached.record_offsets(path, self._procedure)

  @property
  def procedure(self) -> Procedure | None:
    """How the records that are there were decoded."""
    return self._procedure

  def completed_ids(self, threshold: float) -> frozenset[str]:
    """Ids that already have a record at `threshold` (`NEVER_EXIT` for the reference)."""
    return frozenset(self._done[self._known(threshold)])

  def completed_records(
    self, threshold: float, ids: Iterable[str] | None = None
  ) -> dict[str, Record]:
    """The records already written at `threshold`, by id; those of `ids`, or all.

    Only the lines that are asked for are read: as many calls as there are batches read the
    file once.
    """
    done = self._done[self._known(threshold)]
    offsets = [done[name] for name in (done if ids is None else ids) if name in done]
    path = self.directory / cached.threshold_file(threshold)
    return cached.read_records_at(path, offsets) if offsets else {}

  def append(self, threshold: float, records: Iterable[Record]) -> None:
    """Appends whole records and hands them to the operating system before it returns.

    Raises:
      ValueError: `threshold` is not in the grid, an id is unknown or already written.
    """
    done = self._done[self._known(threshold)]
    records = tuple(records)
    names = [record.id for record in records]
    odd = sorted(set(names) - self._ids)
    twice = sorted({name for name in names if name in done or names.count(name) > 1})
    if odd or twice:
      raise ValueError(
        f"Expected `records` to be of prompts that have none at {threshold} yet, got unknown"
        f" ids {odd[:5]}, ids already there {twice[:5]}."
      )
    mark = cached.procedure_mark(self._procedure)
    marks = {"threshold": thresholds_lib.threshold_to_json(threshold)}
    marks |= {} if mark is None else {"procedure": mark}
    lines = [storage.dump_line({**record.to_json(), **marks}) for record in records]
    path = self.directory / cached.threshold_file(threshold)
    begin = path.stat().st_size if path.exists() else 0
    storage.append(path, b"".join(encoded := [line.encode("utf-8") for line in lines]))
    for name, line in zip(names, encoded, strict=True):
      done[name] = begin
      begin += len(line)

  def finish(self) -> None:
    """Writes the checksums of all files into the manifest; call it when nothing is missing.

    Raises:
      ValueError: a prompt has no record at some threshold (sequential runs excepted).
    """
    for threshold in self._thresholds:
      missing = len(self._ids - set(self._done[threshold]))
      if missing and not self._manifest["sequential"]:
        raise ValueError(
          f"{self.directory}: expected a record of every prompt at threshold"
          f" {thresholds_lib.format_threshold(threshold)}, got {missing} without one;"
          " append them before `finish`."
        )
    names = [
      cached.PROMPTS,
      *(cached.threshold_file(threshold) for threshold in self._thresholds),
    ]
    self._manifest["checksums"] = {
      name: storage.checksum(self.directory / name)
      for name in names
      if (self.directory / name).exists()
    }
    _write_manifest(self.directory, self._manifest)
    self._lock.release()

  def _known(self, threshold: float) -> float:
    if threshold not in self._done:
      grid = [thresholds_lib.format_threshold(value) for value in self._thresholds]
      raise ValueError(f"Expected `threshold` to be one of {grid}, got {threshold!r}.")
    return threshold


def _write_manifest(directory: pathlib.Path, manifest: Mapping[str, Any]) -> None:
  storage.write_atomically(
    directory / cached.MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
  )


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
  story = provenance or Provenance()
  kept = {"sequential": sequential, "by_group": by_group}  # held against the manifest's
  story = dataclasses.replace(
    story,
    grid=story.grid or tuple(grid),
    num_examples=len(prompts),
    notes={**(story.notes or {}), **kept},
  )
  manifest = {
    "schema_version": cached.SCHEMA_VERSION,
    "procedure": None if procedure is None else procedure.to_json(),
    "provenance": story.to_json(),
    "thresholds": grid,
    "prompt_ids": [prompt.id for prompt in prompts],
    "sequential": sequential,
    "by_group": by_group,
    "checksums": {},
  }
  prompt_text = "".join(storage.dump_line(prompt.to_json()) for prompt in prompts)
  try:
    directory.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise OSError(
      f"Expected {str(directory)!r} to be a folder that can be made, got: {error.strerror};"
      " choose a folder that can be written."
    ) from error
  names = map(cached.threshold_file, (thresholds_lib.NEVER_EXIT, *manifest["thresholds"]))
  storage.refuse_planted_links(directory / n for n in (cached.MANIFEST, cached.PROMPTS, *names))
  lock = storage.lock(directory)
  if (directory / cached.MANIFEST).exists():
    _check_same_run(directory, manifest, prompt_text)
    there = cached.read_manifest(directory)
    # Records that were edited must not be written into new checksums.
    cached.check_checksums(directory, there.get("checksums") or {})
    manifest["provenance"] = there["provenance"]
    # Its records are marked with the procedure as it was written then.
    manifest["procedure"] = there["procedure"]
  else:
    _write_prompts(directory / cached.PROMPTS, prompt_text)
  # Resuming reopens a finished run: its checksums are written again by `finish`.
  _write_manifest(directory, manifest)
  writer = Writer(directory, manifest, lock)
  old = procedures.unknown_platform(writer.procedure)
  if old and not procedures.unknown_platform(procedure):
    writer.reports.append(f"{directory}: {old}")
  return writer


def _write_prompts(path: pathlib.Path, text: str) -> None:
  """Writes the prompts of a new run; what a stopped start has left is the same."""
  if path.exists() and not _holds(path, text):
    raise GenerationsError(
      f"{path}: expected a folder without a file of that name, or that of this run, got another"
      " one, which would be replaced; choose another folder."
    )
  storage.write_atomically(path, text)


def _check_same_run(directory: pathlib.Path, manifest: dict[str, Any], prompts: str) -> None:
  there = cached.read_manifest(directory)
  path = directory / cached.MANIFEST
  way_out = "choose another folder, or the options of the run that is there."
  difference = describe_differences(
    cached.manifest_procedure(there), cached.manifest_procedure(manifest)
  )
  if difference:
    raise GenerationsError(
      f"{path}: expected the procedure of the run that is there, got another: {difference};"
      f" {way_out}"
    )
  # Older manifests do not say `by_group`.
  there = {"by_group": False, **there}
  for name in ("thresholds", "prompt_ids", "sequential", "by_group"):
    if there.get(name) != manifest[name]:
      raise GenerationsError(
        f"{path}: expected `{name}` to be {_short(there.get(name))}, got"
        f" {_short(manifest[name])}; {way_out}"
      )
  if not _holds(directory / cached.PROMPTS, prompts):
    raise GenerationsError(
      f"{directory / cached.PROMPTS}: expected the texts of the run that is there, got"
      f" others; {way_out}"
    )


def _holds(path: pathlib.Path, text: str) -> bool:
  """Whether a file holds this text, whatever else it may be."""
  content = text.encode("utf-8")
  return path.stat().st_size == len(content) and storage.content(path, len(content)) == content


def _short(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 120 else f"{text[:100]}... ({len(value)} entries)"
