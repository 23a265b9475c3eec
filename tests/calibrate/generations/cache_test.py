"""Cached generations are read as they were written, on the disk or in memory, or refused."""

import dataclasses
import json

import numpy as np
import pytest

from calm import storage
from calm.calibrate import NEVER_EXIT, generations, losses
from calm.calibrate.generations import cache, order
from calm.calibrate.generations import writer as writer_lib
from calm.calibrate.generations.records import GenerationsError, Record
from calm.commands import run as run_lib
from tests.calibrate import laws
from tests.calibrate.generations import shards_test

GRID = [0.9, 0.5]


def in_test_order(prompts, procedure=None, by_group=False):
  ids = [prompt.id for prompt in prompts]
  groups = order.prompt_clusters(prompts) if by_group else None
  contents = order.prompts_digest(prompts)
  return [prompts[row] for row in order.decoding_order(ids, groups, procedure, contents)]


def write(directory, procedure=None, *, grid=GRID, count=3, sequential=False, short=()):
  """A finished run; `short` maps thresholds to how many records they get."""
  rows = in_test_order(laws.prompts(count), procedure) if sequential else laws.prompts(count)
  writer = writer_lib.open_writer(
    directory, prompts=rows, thresholds=grid, procedure=procedure, sequential=sequential
  )
  for threshold in (NEVER_EXIT, *grid):
    kept = rows[: dict(short).get(threshold, count)]
    if kept:
      writer.append(threshold, [laws.record(p.id, f"{p.id} at {threshold}") for p in kept])
  return writer


def edit(path, change):
  path.write_bytes(change(path.read_bytes()))


def test_what_is_written_is_read_in_the_recorded_order(tmp_path):
  procedure = laws.procedure()
  writer = writer_lib.open_writer(
    tmp_path, prompts=laws.prompts(3), thresholds=GRID, procedure=procedure
  )
  for threshold in (NEVER_EXIT, *GRID):
    for name in ("id-002", "id-000", "id-001"):
      writer.append(threshold, [Record(name, f"{name} {threshold}", exit_layers=[2, 1])])
  writer.finish()
  loaded = generations.load(tmp_path)
  assert loaded.ids == ("id-000", "id-001", "id-002")
  assert loaded.prompts == laws.prompts(3)
  assert loaded.references == (("word0 same",), ("word1 same",), ("word2 same",))
  assert loaded.groups == ("group-0", "group-0", "group-1")
  assert loaded.thresholds.tolist() == GRID and loaded.procedure == procedure
  assert [r.prediction for r in loaded.records[1]] == [f"{n} 0.5" for n in loaded.ids]
  assert [r.prediction for r in loaded.full] == [f"{n} inf" for n in loaded.ids]
  assert "3 prompts, 2 thresholds" in repr(loaded)


def test_layer_counts_leave_padding_out():
  made = laws.generations(2, grid=(0.9,), texts=[["x", "y"]])
  assert made.layer_counts() is None
  rows = (Record("a", "x", exit_layers=[2, 3, 0]), Record("b", "y", exit_layers=[4]))
  layers, tokens = generations.Generations(
    made.prompts, made.thresholds, (rows,), made.full
  ).layer_counts()
  np.testing.assert_array_equal(layers, [[5], [4]])
  np.testing.assert_array_equal(tokens, [[2], [1]])


@pytest.mark.parametrize(
  ("name", "change", "message"),
  [
    ("manifest.json", lambda b: b"", r"manifest.json: expected a JSON object, got .*; resume"),
    (
      "manifest.json",
      lambda b: b.replace(b'"schema_version": 1', b'"schema_version": 7'),
      "got 7",
    ),
    ("manifest.json", lambda b: b"[]", "`schema_version` to be 1, got None"),
    ("threshold_0.9.jsonl", lambda b: b[:-9], r"threshold_0.9.jsonl:3: .*cut off"),
    (
      "threshold_0.9.jsonl",
      lambda b: b + b.splitlines(True)[0],
      r":4: expected every id once, got .* twice; resume",
    ),
    (
      "threshold_0.9.jsonl",
      lambda b: b"".join(b.splitlines(True)[1:]),
      r"each of the 3 prompts, got 1 without one, first \['id-000'\]",
    ),
    (
      "threshold_0.9.jsonl",
      lambda b: b.replace(b"id-001", b"id-777"),
      r"of the manifest's prompts, got .*id-777",
    ),
    (
      "threshold_0.9.jsonl",
      lambda b: b.replace(b'"prediction"', b'"other"', 1),
      r":1: expected a record of an output, got none",
    ),
    (
      "prompts.jsonl",
      lambda b: b.replace(b"id-001", b"id-777"),
      r"prompts.jsonl: expected the ids of manifest.json, got",
    ),
  ],
)
def test_damage_is_named_with_file_and_line(tmp_path, name, change, message):
  write(tmp_path)  # not finished: no checksum hides the line
  edit(tmp_path / name, change)
  with pytest.raises(GenerationsError, match=message):
    generations.load(tmp_path)


def test_missing_files_are_named(tmp_path):
  with pytest.raises(GenerationsError, match=r"which has no manifest.json; give"):
    generations.load(tmp_path)
  write(tmp_path).finish()
  (tmp_path / "threshold_0.5.jsonl").unlink()
  with pytest.raises(
    GenerationsError, match=r"threshold_0.5.jsonl: expected a file, .* got none"
  ):
    generations.load(tmp_path)


def test_checksums_find_a_whole_line_that_was_edited(tmp_path):
  write(tmp_path).finish()
  edit(tmp_path / "threshold_0.5.jsonl", lambda b: b.replace(b"at 0.5", b"at 0.6", 1))
  with pytest.raises(GenerationsError, match=r"threshold_0.5.jsonl: expected the SHA-256"):
    generations.load(tmp_path)
  edit(tmp_path / "threshold_0.5.jsonl", lambda b: b[:-5])
  with pytest.raises(GenerationsError, match=r"threshold_0.5.jsonl:3: .*cut off"):
    generations.load(tmp_path)


def test_outputs_of_two_procedures_do_not_mix(tmp_path):
  write(tmp_path / "one", laws.procedure())
  write(tmp_path / "two", laws.procedure(measure="state"))
  other = (tmp_path / "two" / "threshold_0.5.jsonl").read_bytes().splitlines(True)[1]
  edit(
    tmp_path / "one" / "threshold_0.5.jsonl",
    lambda b: b"".join([b.splitlines(True)[0], other, b.splitlines(True)[2]]),
  )
  with pytest.raises(
    GenerationsError, match=r"threshold_0.5.jsonl:2: .* two procedures are mixed"
  ):
    generations.load(tmp_path / "one")


def test_sequential_runs_may_lack_a_suffix_only(tmp_path):
  write(tmp_path / "a", sequential=True, short={0.9: 2, 0.5: 0}.items()).finish()
  loaded = generations.load(tmp_path / "a")
  assert [len(rows) for rows in loaded.records] == [2, 0]
  assert loaded.sequential and loaded.layer_counts() is None
  edit(tmp_path / "a" / "threshold_0.9.jsonl", lambda b: b.splitlines(True)[1])
  manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
  manifest["checksums"] = {}
  storage.write_atomically(tmp_path / "a" / "manifest.json", json.dumps(manifest))
  with pytest.raises(
    GenerationsError, match=r"only the last prompts .* missing before prompts"
  ):
    generations.load(tmp_path / "a")


def test_a_manifest_without_checksums_is_refused_unless_asked(tmp_path):
  """Without them an edited record looks like any other."""
  write(tmp_path).finish()
  manifest = json.loads((tmp_path / "manifest.json").read_text())
  edit(tmp_path / "threshold_0.5.jsonl", lambda b: b.replace(b"at 0.5", b"at 0.6", 1))
  for checksums in ({}, {"prompts.jsonl": manifest["checksums"]["prompts.jsonl"]}, None):
    changed = {**manifest, "checksums": checksums}
    if checksums is None:
      del changed["checksums"]
    storage.write_atomically(tmp_path / "manifest.json", json.dumps(changed))
    with pytest.raises(GenerationsError, match=r"`checksums` .* none for .*unverified=True"):
      generations.load(tmp_path)
    assert generations.load(tmp_path, unverified=True).records[1][0].prediction


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"prompt_ids": ["id-000"] * 3}, "`prompt_ids` to be a list of different texts"),
    ({"prompt_ids": None}, "`prompt_ids` to be a list of different texts, got None"),
    ({"thresholds": ["0.9"]}, "`thresholds` to be a list of numbers"),
    ({"thresholds": [True]}, "`thresholds` to be a list of numbers"),
    ({"checksums": {"../prompts.jsonl": "x"}}, "`checksums` to be an object of texts"),
    ({"procedure": "mine"}, "`procedure` to be an object or null"),
    ({"procedure": {"temperature": 1}}, "`procedure` to be that of a run, got"),
    ({"provenance": []}, "`provenance` to be an object or null"),
    ({"provenance": {"metric": 3}}, "`provenance` to be that of a run, got"),
    ({"sequential": 1}, "`sequential` to be true or false"),
    ({"by_group": None}, "`by_group` to be true or false"),
  ],
)
def test_a_manifest_of_other_types_is_refused_by_the_field(tmp_path, change, message):
  write(tmp_path, laws.procedure())
  manifest = json.loads((tmp_path / "manifest.json").read_text())
  storage.write_atomically(tmp_path / "manifest.json", json.dumps({**manifest, **change}))
  with pytest.raises(GenerationsError, match=rf"manifest\.json: expected {message}"):
    generations.load(tmp_path, unverified=True)
  (name,) = change
  if name in ("prompt_ids", "thresholds"):
    del manifest[name]
    storage.write_atomically(tmp_path / "manifest.json", json.dumps(manifest))
    with pytest.raises(GenerationsError, match=f"expected `{name}` to be .*, got none"):
      generations.load(tmp_path)


def sealed(directory):
  """New checksums for what stands there, as somebody who edits files would write them."""
  path = directory / cache.MANIFEST
  manifest = json.loads(path.read_text())
  names = manifest["checksums"]
  manifest["checksums"] = {name: storage.checksum(directory / name) for name in names}
  path.write_text(json.dumps(manifest))


def test_files_of_two_thresholds_that_were_swapped_are_refused(tmp_path):
  write(tmp_path).finish()
  names = [cache.threshold_file(threshold) for threshold in GRID[:2]]
  texts = [(tmp_path / name).read_text() for name in names]
  for name, text in zip(names, reversed(texts), strict=True):
    (tmp_path / name).write_text(text)
  sealed(tmp_path)
  with pytest.raises(GenerationsError, match=r"jsonl:1: expected records of the threshold"):
    cache.load(tmp_path)


@pytest.mark.parametrize("name", ["thresholds", "sequential", "by_group", "prompt_ids"])
def test_a_manifest_is_held_against_the_story_of_its_run(tmp_path, name):
  write(tmp_path).finish()
  path = tmp_path / cache.MANIFEST
  manifest = json.loads(path.read_text())
  if name == "prompt_ids":  # the last prompt is dropped, everywhere
    gone = manifest[name].pop()
    for file in tmp_path.glob("*.jsonl"):
      lines = file.read_text().splitlines(True)
      file.write_text("".join(one for one in lines if json.loads(one)["id"] != gone))
  else:
    manifest[name] = manifest[name][1:] if name == "thresholds" else True
  path.write_text(json.dumps(manifest))
  sealed(tmp_path)
  with pytest.raises(GenerationsError, match=f"expected `{name}` as `provenance` tells"):
    cache.load(tmp_path)


@pytest.mark.parametrize("by_group", [False, True])
def test_sequential_is_not_turned_on_in_a_manifest_of_an_earlier_version(tmp_path, by_group):
  """Its provenance tells nothing of it, but a run that stops early has an order of its own."""
  write(tmp_path, count=8).finish()
  path = tmp_path / cache.MANIFEST
  manifest = {**json.loads(path.read_text()), "provenance": {"notes": {"model": "m"}}}
  path.write_text(json.dumps({**manifest, "sequential": True, "by_group": by_group}))
  with pytest.raises(GenerationsError, match="expected `prompt_ids` in the order of a test"):
    cache.load(tmp_path)
  # An honest run of an earlier version, cut off where it was decided, is read; the unit of its
  # test is not changed either.
  honest = [prompt.id for prompt in in_test_order(laws.prompts(8), None, by_group)]
  manifest |= {"prompt_ids": honest, "sequential": True, "by_group": by_group}
  early = tmp_path / cache.threshold_file(0.5)
  lines = early.read_text().splitlines(True)
  early.write_text("".join(line for line in lines if json.loads(line)["id"] in honest[:2]))
  path.write_text(json.dumps(manifest))
  sealed(tmp_path)
  assert [len(rows) for rows in cache.load(tmp_path).records] == [8, 2]
  path.write_text(json.dumps({**json.loads(path.read_text()), "by_group": not by_group}))
  with pytest.raises(GenerationsError, match="expected `prompt_ids` in the order of a test"):
    cache.load(tmp_path)


FIELDS = ("values", "thresholds", "ids")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  root = tmp_path_factory.mktemp("columns")
  return shards_test.write(root)


@pytest.fixture
def on_disk(folder, monkeypatch):
  """As a folder of long files is read, the prompts a few at a time."""
  monkeypatch.setattr(cache, "LONG_FILE", 0)
  monkeypatch.setattr(losses, "PROMPTS", 7)
  return generations.load(folder)


def test_they_are_the_same_records(folder, on_disk):
  there = generations.load(folder, in_memory=True)
  assert isinstance(on_disk.full, cache.Column) and isinstance(there.full, tuple)
  assert on_disk.full == there.full and on_disk.records == there.records
  assert there.records[0] == on_disk.records[0]  # whichever side is asked
  assert on_disk.records[1] != there.records[0] and on_disk.full != 3
  column, records = on_disk.records[1], there.records[1]
  assert column[3] == records[3] and column[-1] == records[-1]
  assert tuple(column[5:8]) == records[5:8] and len(column) == len(records)
  assert list(cache.texts(column)) == list(cache.texts(records))
  assert "60 records of" in repr(column)
  with pytest.raises(IndexError):
    column[60]


def test_layers_are_counted_without_reading_again(folder, on_disk):
  there = generations.load(folder, in_memory=True)
  on_disk.records[0].path.rename(on_disk.records[0].path.with_suffix(".away"))
  try:
    for ours, theirs in zip(on_disk.layer_counts(), there.layer_counts(), strict=True):
      np.testing.assert_array_equal(ours, theirs)
    means = run_lib.mean_layers(on_disk)
    assert means == run_lib.mean_layers(there) == {0.9: 2.5, 0.5: 2.5}
  finally:
    on_disk.records[0].path.with_suffix(".away").rename(on_disk.records[0].path)


@pytest.mark.parametrize("kind", ["textual", "risk_signed", "risk_clipped"])
def test_losses_do_not_depend_on_how_many_prompts_are_read_at_a_time(folder, on_disk, kind):
  labelled = lambda prompts: tuple(
    dataclasses.replace(prompt, targets=(f"{prompt.input} at inf",)) for prompt in prompts
  )
  there = generations.load(folder, in_memory=True)
  told: list[tuple[int, int]] = []
  ours, theirs = (
    losses.compute(
      dataclasses.replace(one, prompts=labelled(one.prompts)),
      kind,
      workers=1,
      progress=lambda *counts: told.append(counts),
    )
    for one in (on_disk, there)
  )
  np.testing.assert_array_equal(ours.values, theirs.values)
  assert theirs.values.any()
  assert all(done <= total for done, total in told)


def test_what_is_damaged_is_named_as_ever(folder, on_disk, tmp_path, monkeypatch):
  monkeypatch.setattr(cache, "LONG_FILE", 0)
  shards_test.write(tmp_path)
  path = tmp_path / folder.name / "threshold_0.5.jsonl"
  lines = path.read_text().splitlines(keepends=True)
  path.write_text("".join([*lines[:4], lines[0]]))
  manifest = path.parent / generations.MANIFEST
  manifest.write_text(manifest.read_text().replace('"checksums"', '"unused"'))
  with pytest.raises(
    generations.cache.GenerationsError, match=r":5: expected every id once, got .* twice"
  ):
    generations.load(path.parent)
