"""A run is written so that it can be killed at any moment, resumed, and mixed with nothing."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from calm import storage
from calm.calibrate import (
  NEVER_EXIT,
  GenerationsError,
  Prompt,
  generations,
  open_writer,
)
from calm.calibrate.generations import cache, shards
from calm.calibrate.generations import writer as writer_lib
from calm.calibrate.generations.procedure import Provenance
from calm.calibrate.generations.records import Record
from tests.calibrate import laws
from tests.calibrate.generations import shards_test

GRID = [0.9, 0.5]


def start(directory, **changes):
  options = dict(prompts=laws.prompts(3), thresholds=GRID, procedure=laws.procedure())
  return writer_lib.open_writer(directory, **{**options, **changes})


def test_what_two_writers_left_is_taken_out_and_decoded_again(tmp_path):
  """Neither `load` nor a resumed run took such a folder, whatever one did."""
  writer = start(tmp_path)
  names = ["id-000", "id-001", "id-002"]
  for threshold in (NEVER_EXIT, 0.9, 0.5):
    writer.append(threshold, [laws.record(name, f"{name} at {threshold}") for name in names])
  writer.finish()
  del writer
  manifest = tmp_path / "manifest.json"
  manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "checksums": {}}))
  path = tmp_path / "threshold_0.9.jsonl"
  first, second, third = path.read_bytes().splitlines(keepends=True)
  other = second.replace(b"at 0.9", b"at 9.9")
  with pytest.raises(GenerationsError, match=r"got 'id-000' twice; resume"):
    path.write_bytes(first + second + first)
    cache.read_records(path, laws.procedure())
  path.write_bytes(first + second + first + third[:20] + b"\n" + other + third[:-9] + b"\n")
  again = start(tmp_path)
  assert again.completed_ids(0.9) == {"id-000"} and path.read_bytes() == first
  assert any("2 damaged lines and 1 doubled" in report for report in again.reports)
  again.append(0.9, [laws.record(name, f"{name} at 0.9") for name in names[1:]])
  again.finish()
  assert [r.prediction for r in generations.load(tmp_path).records[0]] == [
    f"{name} at 0.9" for name in names
  ]


def test_records_of_another_procedure_are_no_damage_to_mend(tmp_path):
  writer = start(tmp_path)
  writer.append(0.9, [Record("id-000", "x"), Record("id-001", "y")])
  path = tmp_path / "threshold_0.9.jsonl"
  before = path.read_bytes()
  assert writer_lib.repair(path, laws.procedure()) is None and path.read_bytes() == before
  mark = cache.procedure_mark(laws.procedure()).encode()
  first, second = before.splitlines(keepends=True)
  path.write_bytes(before := first + second.replace(mark, b"0123456789abcdef"))
  with pytest.raises(GenerationsError, match="outputs of two procedures are mixed"):
    start(tmp_path)
  assert path.read_bytes() == before


def test_a_line_that_is_no_record_is_taken_out(tmp_path):
  start(tmp_path).append(0.9, [Record("id-000", "x"), Record("id-001", "y")])
  path = tmp_path / "threshold_0.9.jsonl"
  first, second = path.read_bytes().splitlines(keepends=True)
  path.write_bytes(first.replace(b'"prediction"', b'"prophecy"') + b"\n" + second)
  again = start(tmp_path)
  assert again.completed_ids(0.9) == {"id-001"} and path.read_bytes() == second
  assert any("1 damaged lines and 0 doubled" in report for report in again.reports)


def test_a_run_that_does_not_say_where_it_was_decoded_is_told_of(tmp_path):
  start(tmp_path).append(0.9, [Record("id-000", "x")])
  known = laws.procedure(platform="cpu", matmul_precision="default")
  again = start(tmp_path, procedure=known)
  assert again.completed_ids(0.9) == {"id-000"} and again.procedure == laws.procedure()
  (report,) = again.reports
  assert "did not record `platform` and `matmul_precision`" in report


def test_resuming_keeps_what_is_there_and_drops_a_cut_off_line(tmp_path):
  writer = start(tmp_path, provenance=Provenance(metric="first"))
  writer.append(0.9, [Record("id-000", "x"), Record("id-001", "y", exit_layers=[1])])
  path = tmp_path / "threshold_0.9.jsonl"
  path.write_bytes(path.read_bytes()[:-7])
  again = start(tmp_path, provenance=Provenance(metric="second"))
  assert again.completed_ids(0.9) == {"id-000"}
  assert again.completed_ids(NEVER_EXIT) == frozenset() == again.completed_ids(0.5)
  assert again.completed_records(0.9) == {"id-000": Record("id-000", "x")}
  assert again.completed_records(0.5) == {}
  (report,) = again.reports
  assert "threshold_0.9.jsonl:2: the last line was cut off" in report
  again.append(0.9, [Record("id-001", "y")])
  assert start(tmp_path).reports == []
  assert generations.read_manifest(tmp_path)["provenance"]["metric"] == "first"


@pytest.mark.parametrize("name", ["threshold_0.9.jsonl", "prompts.jsonl"])
def test_resuming_launders_no_tampered_file(tmp_path, name):
  """New checksums would be those of the edited records."""
  writer = start(tmp_path)
  for threshold in (NEVER_EXIT, 0.9, 0.5):
    writer.append(threshold, [Record(f"id-00{row}", "x") for row in range(3)])
  writer.finish()
  start(tmp_path).finish()  # untouched, it is opened and closed again
  manifest = (tmp_path / "manifest.json").read_bytes()
  path = tmp_path / name
  before = path.read_bytes()
  path.write_bytes(before.replace(b'"x"', b'"y"') if name[0] == "t" else before + b"\n")
  with pytest.raises(GenerationsError):
    start(tmp_path)
  assert (tmp_path / "manifest.json").read_bytes() == manifest
  path.write_bytes(before)
  start(tmp_path)


def test_a_whole_line_that_only_lost_its_newline_is_kept(tmp_path):
  start(tmp_path).append(0.9, [Record("id-000", "x")])
  path = tmp_path / "threshold_0.9.jsonl"
  path.write_bytes(path.read_bytes()[:-1])
  again = start(tmp_path)
  assert again.completed_ids(0.9) == {"id-000"} and again.reports == []
  again.append(0.9, [Record("id-001", "y")])
  assert start(tmp_path).completed_ids(0.9) == {"id-000", "id-001"}


def test_records_are_read_once_however_many_batches_ask(tmp_path, monkeypatch):
  ids = [f"id-{i:03d}" for i in range(200)]
  writer = start(tmp_path, prompts=laws.prompts(200))
  writer.append(0.9, [Record(name, f"é {name}", tokens=(i,)) for i, name in enumerate(ids)])
  again = start(tmp_path, prompts=laws.prompts(200))
  read = []
  at = cache._value
  monkeypatch.setattr(cache, "_value", lambda file, o: read.append(o) or at(file, o))
  monkeypatch.setattr(storage, "read_lines", lambda path: pytest.fail("reads the whole file"))
  for first in range(0, 200, 8):
    got = again.completed_records(0.9, ids[first : first + 8])
    assert [r.prediction for r in got.values()] == [f"é {n}" for n in ids[first : first + 8]]
    assert again.completed_records(0.5, ids[first : first + 8]) == {}
  again.append(0.5, [Record("id-007", "later"), Record("id-003", "on")])
  again.append(0.5, [Record("id-001", "and on")])
  assert again.completed_records(0.5, ["id-003", "id-001", "id-009"]) == {
    "id-003": Record("id-003", "on"),
    "id-001": Record("id-001", "and on"),
  }
  assert sorted(read[:200]) == sorted(set(read[:200]))  # each line once


def test_a_second_writer_is_refused_until_the_first_ends(tmp_path):
  code = (
    "import sys\nfrom tests.calibrate.generations import writer_test\n"
    "held = writer_test.start(sys.argv[1]); print('held', flush=True); sys.stdin.read()"
  )
  first = subprocess.Popen(
    [sys.executable, "-c", code, str(tmp_path)],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
    cwd=pathlib.Path(__file__).parents[3],
  )
  try:
    assert first.stdout is not None and first.stdout.readline() == "held\n"
    with pytest.raises(
      storage.LockedError, match=f"one writer at a time, got process {first.pid}"
    ):
      start(tmp_path)
  finally:
    first.kill()
    first.communicate()
  writer = start(tmp_path)
  writer.append(0.9, [Record("id-000", "x")])


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (
      {"procedure": laws.procedure(measure="state")},
      "`measure`: expected 'softmax', got 'state'",
    ),
    ({"procedure": None}, r"has none \(null\)"),
    (
      {"thresholds": [0.9, 0.4]},
      r"expected `thresholds` to be \[0.9, 0.5\], got \[0.9, 0.4\]",
    ),
    ({"prompts": laws.prompts(2)}, "expected `prompt_ids` to be .*, got .*; choose"),
    ({"prompts": laws.prompts(60)}, r"expected `prompt_ids` to be.*\.\.\. \(60 entries\)"),
    ({"sequential": True}, "expected `sequential` to be False, got True"),
    ({"by_group": True}, "expected `by_group` to be False, got True"),
  ],
)
def test_another_run_is_refused_and_the_field_is_named(tmp_path, change, message):
  start(tmp_path)
  with pytest.raises(GenerationsError, match=message):
    start(tmp_path, **change)


def test_other_texts_under_the_same_ids_are_refused(tmp_path):
  start(tmp_path)
  changed = [Prompt(p.id, p.input + "!", p.targets, p.group) for p in laws.prompts(3)]
  with pytest.raises(
    GenerationsError, match="expected the texts of the run that is there, got others"
  ):
    start(tmp_path, prompts=changed)


def test_clusters_of_a_run_by_group_stand_together_and_are_recorded(tmp_path):
  writer = start(tmp_path, sequential=True, by_group=True)
  writer.append(NEVER_EXIT, [Record("id-000", "x")])
  writer.finish()
  assert generations.load(tmp_path).by_group
  rows = laws.prompts(3)  # of the groups 0, 0, 1
  with pytest.raises(ValueError, match="2 clusters in 3 places"):
    start(tmp_path / "other", prompts=(rows[0], rows[2], rows[1]), by_group=True)


def test_a_run_from_before_groups_goes_on(tmp_path):
  start(tmp_path)
  manifest = generations.read_manifest(tmp_path)
  del manifest["by_group"]
  storage.write_atomically(tmp_path / "manifest.json", json.dumps(manifest))
  start(tmp_path)
  assert not generations.read_manifest(tmp_path)["by_group"]


def test_append_takes_each_prompt_once(tmp_path):
  writer = start(tmp_path)
  writer.append(0.9, [Record("id-000", "x")])
  for records in (
    [Record("id-000", "x")],
    [Record("id-001", "x"), Record("id-001", "x")],
    [Record("id-009", "x")],
  ):
    with pytest.raises(ValueError, match=r"`records` to be of prompts that have none at 0.9"):
      writer.append(0.9, records)
  with pytest.raises(ValueError, match=r"`threshold` to be one of \['never', '0.9', '0.5'\]"):
    writer.append(0.7, [])
  assert writer.completed_ids(0.9) == {"id-000"}


def test_finish_needs_everything_and_reopening_clears_checksums(tmp_path):
  writer = start(tmp_path)
  with pytest.raises(
    ValueError, match="every prompt at threshold never, got 3 without one; append"
  ):
    writer.finish()
  for threshold in (NEVER_EXIT, *GRID):
    writer.append(threshold, [Record(p.id, "x") for p in laws.prompts(3)])
  writer.finish()
  assert len(generations.read_manifest(tmp_path)["checksums"]) == 4
  start(tmp_path)
  assert generations.read_manifest(tmp_path)["checksums"] == {}
  assert len(generations.load(tmp_path, unverified=True).full) == 3


def test_folders_that_cannot_be_written_are_named(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(OSError, match="choose a folder that can be written"):
    start(tmp_path / "file" / "below")
  with pytest.raises(OSError, match=r"x.json.*No such file.*choose a folder that can"):
    storage.write_atomically(tmp_path / "nowhere" / "x.json", "")
  assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_a_run_killed_at_any_moment_goes_on(tmp_path):
  code = """
from tests.calibrate import laws
from tests.calibrate.generations import writer_test as t
from calm.calibrate import Record
import sys
writer = t.start(sys.argv[1], prompts=laws.prompts(400))
print('ready', flush=True)
for p in laws.prompts(400):
  if p.id not in writer.completed_ids(0.9):
    writer.append(0.9, [Record(p.id, 'text ' * 200)])
"""
  command = [sys.executable, "-c", code, str(tmp_path)]
  for delay in (0.002, 0.005):
    child = subprocess.Popen(
      command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": "."}
    )
    child.stdout.readline()
    time.sleep(delay)
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
  subprocess.run(
    command, check=True, capture_output=True, env={**os.environ, "PYTHONPATH": "."}
  )
  found = generations.read_records(tmp_path / "threshold_0.9.jsonl", laws.procedure())
  assert set(found) == {p.id for p in laws.prompts(400)}


PROMPTS = [Prompt(f"p{row}", f"prompt {row}") for row in range(5)]

RUN = dict(thresholds=(0.5,), procedure=None)


def test_a_run_does_not_begin_on_prompts_of_another(tmp_path):
  mine = tmp_path / "prompts.jsonl"
  rows = [{"id": prompt.id, "input": "x", "note": 1} for prompt in PROMPTS]
  mine.write_text("".join(json.dumps(row) + "\n" for row in rows))
  before = mine.read_bytes()
  with pytest.raises(GenerationsError, match=r"prompts\.jsonl: expected a folder without"):
    open_writer(tmp_path, prompts=PROMPTS[:2], **RUN)
  assert mine.read_bytes() == before and not (tmp_path / "manifest.json").exists()


@pytest.mark.parametrize("name", ["manifest.json", "prompts.jsonl", "threshold_0.5.jsonl"])
def test_a_run_makes_no_file_where_a_planted_link_leads(tmp_path, name):
  (folder := tmp_path / "run").mkdir()
  (folder / name).symlink_to(tmp_path / "elsewhere")
  with pytest.raises(OSError, match=rf"{name}' .* got a link to a file that does not exist"):
    open_writer(folder, prompts=PROMPTS[:1], **RUN)
  shards_test.write(tmp_path / "shards")
  with pytest.raises(OSError, match=rf"{name}' .* got a link to a file that does not exist"):
    shards.merge([tmp_path / "shards"], folder)
  assert not (tmp_path / "elsewhere").exists()


def test_a_start_that_was_stopped_goes_on(tmp_path):
  open_writer(tmp_path, prompts=PROMPTS, **RUN)
  (tmp_path / generations.MANIFEST).unlink()
  open_writer(tmp_path, prompts=PROMPTS, **RUN)
  assert (tmp_path / generations.MANIFEST).exists()
