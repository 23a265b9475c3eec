"""Cached generations: written, killed, resumed, mixed with nothing, read or
refused.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from calm import storage
from calm.calibrate import (
  NEVER_EXIT,
  GenerationsError,
  Prompt,
  Provenance,
  Record,
  generations,
  losses,
)
from tests.calibrate import laws

GRID = [0.9, 0.5]
MANIFEST = generations.MANIFEST
PROMPTS = generations.PROMPTS
EARLY, LATE, FULL = (
  generations.threshold_file(level) for level in (0.5, 0.9, NEVER_EXIT)
)
IDS = ("id-000", "id-001", "id-002")


def start(directory, **changes):
  options = dict(
    prompts=laws.prompts(3), thresholds=GRID, procedure=laws.procedure()
  )
  return generations.open_writer(directory, **{**options, **changes})


def write(directory, *, short=(), **changes):
  """A run that is whole but not finished; `short` maps thresholds to how many
  records.
  """
  writer = start(directory, **changes)
  rows = changes.get("prompts", laws.prompts(3))
  for threshold in (NEVER_EXIT, *GRID):
    kept = rows[: dict(short).get(threshold, len(rows))]
    writer.append(
      threshold, [laws.record(p.id, f"{p.id} at {threshold}") for p in kept]
    )
  return writer


def edit(path, change):
  path.write_bytes(change(path.read_bytes()))


def edit_manifest(directory, change, seal=True):
  """Changes fields; with `seal`, new checksums of what stands there, as a
  forger has them.
  """
  manifest = json.loads((directory / MANIFEST).read_text()) | change
  if seal:
    sums = {
      name: storage.checksum(directory / name) for name in manifest["checksums"]
    }
    manifest["checksums"] = sums
  (directory / MANIFEST).write_text(json.dumps(manifest))


# ---- Reading


@pytest.mark.parametrize(
  ("name", "change", "message"),
  [
    (
      MANIFEST,
      lambda b: b"[]",
      r"manifest.json: expected a JSON object .*, got: \[\]; resume",
    ),
    (LATE, lambda b: b[:-9], r"threshold_0.9.jsonl:3: .*cut off"),
    (
      LATE,
      lambda b: b + b.splitlines(True)[0],
      r":4: expected every id once, got .* twice; g",
    ),
    (
      LATE,
      lambda b: b"".join(b.splitlines(True)[1:]),
      r"1 without one, first \['id-000'\]",
    ),
    (
      LATE,
      lambda b: b.replace(b"id-001", b"id-777"),
      r"records of others: \['id-777'\]",
    ),
    (
      PROMPTS,
      lambda b: b.replace(b"id-001", b"id-777"),
      "`prompt_ids` of the run that",
    ),
  ],
)
def test_damage_is_named_with_file_and_line(tmp_path, name, change, message):
  write(tmp_path)  # not finished: no checksum hides the line
  edit(tmp_path / name, change)
  with pytest.raises(GenerationsError, match=message):
    generations.load(tmp_path)


def test_missing_and_edited_files_are_named(tmp_path):
  def refused(message):
    with pytest.raises(GenerationsError, match=message):
      generations.load(tmp_path)

  refused(r"which has no manifest.json\.")
  write(tmp_path).finish()
  edit(tmp_path / EARLY, lambda b: b.replace(b"at 0.5", b"at 0.6", 1))
  refused(r"threshold_0.5.jsonl: expected the SHA-256")
  manifest = json.loads((tmp_path / MANIFEST).read_text())
  # Without them an edited record looks like any other.
  edit_manifest(tmp_path, {"checksums": {}}, seal=False)
  refused(r"`checksums` .* none of .*resume the run")
  (tmp_path / MANIFEST).write_text(json.dumps(manifest))
  edit(tmp_path / EARLY, lambda b: b[:-5])
  refused(r"threshold_0.5.jsonl:3: .*cut off")
  (tmp_path / EARLY).unlink()
  refused(r"0.5.jsonl: expected a file, .* got none")


def drop_the_last_prompt(folder):
  for file in folder.glob("*.jsonl"):
    rows = file.read_text().splitlines(True)
    file.write_text(
      "".join(row for row in rows if json.loads(row)["id"] != IDS[2])
    )


def swap_two_files(folder):
  texts = [(folder / name).read_bytes() for name in (EARLY, LATE)]
  for name, text in zip((LATE, EARLY), texts, strict=True):
    (folder / name).write_bytes(text)


def test_a_run_that_stopped_early_may_lack_its_last_thresholds(tmp_path):
  write(tmp_path).finish()
  (tmp_path / EARLY).unlink()
  there = dict.fromkeys((PROMPTS, LATE, FULL), "")
  # of earlier versions
  edit_manifest(tmp_path, {"sequential": True, "checksums": there})
  made = generations.load(tmp_path)
  assert [len(column) for column in made.records] == [
    3,
    0,
  ] and made.layer_counts() is None


@pytest.mark.parametrize(
  ("change", "forge", "message"),
  [
    ({"schema_version": 7}, None, "`schema_version` to be one of 1, got 7"),
    (
      {"prompt_ids": ["id-000"] * 3},
      None,
      "`prompt_ids` to be different texts",
    ),
    (
      {"thresholds": [0.5]},
      None,
      "`checksums` of .*, got one of 'threshold_0.9.jsonl'",
    ),
    (
      {"thresholds": [0.9, 0.5, 0.4]},
      None,
      "`thresholds` of the run that wrote it",
    ),
    (
      {"checksums": {"../prompts.jsonl": ""}},
      None,
      r"`checksums` of .*, got one of '\.\./pro",
    ),
    ({"procedure": {"temperature": 1}}, None, ".* a run, got: .*'temperature'"),
    (
      {"prompt_ids": list(IDS[:2])},
      drop_the_last_prompt,
      "`number of prompts` of the run",
    ),
    ({}, swap_two_files, "records of the threshold that the file is named by"),
  ],
)
def test_a_forged_run_is_refused_by_the_field(tmp_path, change, forge, message):
  write(tmp_path).finish()
  if forge is not None:
    forge(tmp_path)
  edit_manifest(tmp_path, change, seal="checksums" not in change)
  with pytest.raises(GenerationsError, match=f"xpected {message}"):
    generations.load(tmp_path)


# ---- Long files stay on the disk


def test_they_are_the_same_records_and_losses(tmp_path, monkeypatch):
  rows = laws.prompts(60)
  writer = start(tmp_path, prompts=rows)
  for threshold in (NEVER_EXIT, *GRID):
    made = [
      laws.record(p.id, f"{p.id} at {threshold}", exit_layers=(2, 3, 0))
      for p in rows
    ]
    writer.append(threshold, made[::-1])
  writer.finish()
  there = generations.load(tmp_path, in_memory=True)
  assert there.prompts == rows and there.procedure == laws.procedure()
  assert there.records[1] == tuple(made)  # in the recorded order
  expected = losses.compute(there, "textual").values
  monkeypatch.setattr(generations, "LONG_FILE", 0)
  monkeypatch.setattr(losses, "PROMPTS", 7)
  on_disk = generations.load(tmp_path)
  assert isinstance(on_disk.full, generations.Column) and isinstance(
    there.full, tuple
  )
  for column, kept in zip(
    (on_disk.full, *on_disk.records), (there.full, *there.records), strict=True
  ):
    assert tuple(column) == kept and tuple(column[5:8]) == kept[5:8]
    assert (
      column[3] == kept[3]
      and column[-1] == kept[-1]
      and len(column) == len(kept)
    )
    assert list(generations.predictions(column)) == list(
      generations.predictions(kept)
    )
  with pytest.raises(IndexError):
    on_disk.full[60]
  for ours, theirs in zip(
    on_disk.layer_counts(), there.layer_counts(), strict=True
  ):
    np.testing.assert_array_equal(ours, theirs)
  layers, tokens = on_disk.layer_counts()
  assert np.all(layers == 5) and np.all(tokens == 2)  # padding does not count
  told: list[tuple[int, int]] = []
  found = losses.compute(
    on_disk, "textual", progress=lambda *counts: told.append(counts)
  )
  np.testing.assert_array_equal(found.values, expected)
  assert expected.any() and told[-1] == (60, 60)


# ---- Writing and resuming


def test_what_two_writers_left_is_taken_out_and_decoded_again(tmp_path):
  write(tmp_path).finish()
  edit_manifest(tmp_path, {"checksums": {}})
  path = tmp_path / LATE
  first, second, third = path.read_bytes().splitlines(keepends=True)
  other = second.replace(b"at 0.9", b"at 9.9")
  no_record = third.replace(b'"prediction"', b'"prophecy"')
  path.write_bytes(
    first + second + first + third[:20] + b"\n" + other + no_record
  )
  again = start(tmp_path)
  assert again.completed_ids(0.9) == {"id-000"} and path.read_bytes() == first
  assert any(
    "2 damaged lines and 1 doubled" in report for report in again.reports
  )
  again.append(0.9, [laws.record(name, f"{name} at 0.9") for name in IDS[1:]])
  again.finish()
  texts = generations.predictions(generations.load(tmp_path).records[0])
  assert list(texts) == [f"{name} at 0.9" for name in IDS]


def test_records_of_another_procedure_are_no_damage_to_mend(tmp_path):
  write(tmp_path)
  mark = generations.procedure_mark(laws.procedure()).encode()
  edit(
    tmp_path / LATE,
    lambda b: b[:-1].replace(mark, b"0123456789abcdef", 1) + b"\n",
  )
  before = (tmp_path / LATE).read_bytes()
  for read in (start, generations.load):
    with pytest.raises(
      GenerationsError, match=r"9.jsonl:1: .* two procedures are mixed"
    ):
      read(tmp_path)
  assert (tmp_path / LATE).read_bytes() == before


def test_resuming_keeps_what_is_there_and_drops_a_cut_off_line(tmp_path):
  writer = start(tmp_path, provenance=Provenance(metric="first"))
  writer.append(
    0.9, [Record("id-000", "x"), Record("id-001", "y", exit_layers=[1])]
  )
  edit(tmp_path / LATE, lambda b: b[:-7])
  again = start(tmp_path, provenance=Provenance(metric="second"))
  assert (
    again.completed_ids(NEVER_EXIT) == frozenset() == again.completed_ids(0.5)
  )
  assert again.completed_records(0.9, IDS) == {"id-000": Record("id-000", "x")}
  assert again.completed_records(0.5, IDS) == {}
  (report,) = again.reports
  assert "threshold_0.9.jsonl: the last line was cut off" in report
  again.append(0.9, [Record("id-001", "y")])
  # a whole line that lost its newline is kept
  edit(tmp_path / LATE, lambda b: b[:-1])
  again = start(tmp_path)
  assert again.reports == [] and again.completed_ids(0.9) == {
    "id-000",
    "id-001",
  }
  assert generations.read_manifest(tmp_path)["provenance"]["metric"] == "first"


def test_resuming_launders_no_tampered_file(tmp_path):
  """New checksums would be those of the edited records."""
  write(tmp_path).finish()
  start(tmp_path).finish()  # untouched, it is opened and closed again
  manifest = (tmp_path / MANIFEST).read_bytes()
  edit(tmp_path / LATE, lambda b: b.replace(b"at 0.9", b"at 0.8"))
  with pytest.raises(GenerationsError):
    start(tmp_path)
  assert (tmp_path / MANIFEST).read_bytes() == manifest


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (
      {"procedure": laws.procedure(measure="state")},
      "`measure`: expected 'softmax', got 'sta",
    ),
    ({"procedure": None}, r"has none \(null\)"),
    (
      {"thresholds": [0.9, 0.4]},
      r"`thresholds`: expected \[0.9, 0.5\], got \[0.9, 0.4\]; ",
    ),
    (
      {"prompts": [dataclasses.replace(p, input="!") for p in laws.prompts(3)]},
      "other prompts in prompts.jsonl",
    ),
  ],
)
def test_another_run_is_refused_and_the_field_is_named(
  tmp_path, change, message
):
  start(tmp_path)
  with pytest.raises(GenerationsError, match=message):
    start(tmp_path, **change)
  start(tmp_path)
  # of earlier versions
  edit_manifest(tmp_path, {"sequential": True}, seal=False)
  with pytest.raises(
    GenerationsError, match="`sequential`: expected True, got False"
  ):
    start(tmp_path)


def test_append_takes_each_prompt_once_and_finish_needs_everything(tmp_path):
  with pytest.raises(
    ValueError, match="`prompts` to be at least one, with unique ids, got"
  ):
    start(tmp_path, prompts=[Prompt("a", "i")] * 2)
  writer = start(tmp_path)
  writer.append(0.9, [Record("id-000", "x")])
  for names in (["id-000"], ["id-001", "id-001"], ["id-009"]):
    with pytest.raises(
      ValueError, match=r"of prompts that have none at 0.9 yet"
    ):
      writer.append(0.9, [Record(name, "x") for name in names])
  assert writer.completed_ids(0.9) == {"id-000"}
  with pytest.raises(
    ValueError, match=r"never\.jsonl: .*, got 3 without one; append"
  ):
    writer.finish()


def test_places_that_cannot_be_written_are_left_as_they_are(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(OSError, match="choose a folder that can be written"):
    start(tmp_path / "file" / "below")
  mine = tmp_path / "prompts.jsonl"
  mine.write_text('{"id": "p0", "input": "x", "note": 1}\n')
  with pytest.raises(
    GenerationsError, match=r"other prompts in prompts\.jsonl, which would"
  ):
    start(tmp_path)
  assert (
    "note" in mine.read_text() and not (tmp_path / "manifest.json").exists()
  )


def test_a_run_makes_no_file_where_a_planted_link_leads(tmp_path):
  (folder := tmp_path / "run").mkdir()
  (folder / EARLY).symlink_to(tmp_path / "elsewhere")
  with pytest.raises(
    OSError, match=rf"{EARLY}' .* got a link to a file that does not exist"
  ):
    start(folder)
  assert not (tmp_path / "elsewhere").exists()


def test_a_run_killed_at_any_moment_goes_on(tmp_path):
  code = """
from tests.calibrate import laws
from tests.calibrate.generations import cache_test as t
from calm.calibrate import Record
import sys
writer = t.start(sys.argv[1], prompts=laws.prompts(400))
print('ready', flush=True)
for p in laws.prompts(400):
  if p.id not in writer.completed_ids(0.9):
    writer.append(0.9, [Record(p.id, 'text ' * 200)])
"""
  command = [sys.executable, "-c", code, str(tmp_path)]
  environment = {**os.environ, "PYTHONPATH": "."}
  for delay in (0.002, 0.005):
    with subprocess.Popen(
      command, stdout=subprocess.PIPE, env=environment
    ) as child:
      child.stdout.readline()
      time.sleep(delay)
      child.send_signal(signal.SIGKILL)
  subprocess.run(command, check=True, capture_output=True, env=environment)
  found = generations.read_records(tmp_path / LATE, laws.procedure())
  assert {record.id for _, record in found} == {p.id for p in laws.prompts(400)}
