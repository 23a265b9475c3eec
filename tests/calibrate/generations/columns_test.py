"""Records that stay on the disk are those that are read into memory."""

import dataclasses

import numpy as np
import pytest

from calm.calibrate import generations
from calm.calibrate.generations import cached, columns
from calm.calibrate.losses import blocks, sequence_losses
from calm.commands import run as run_lib
from tests.calibrate.generations import merging_test

FIELDS = ("values", "thresholds", "ids")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  root = tmp_path_factory.mktemp("columns")
  return merging_test.write(root)


@pytest.fixture
def on_disk(folder, monkeypatch):
  """As a folder of long files is read, the prompts a few at a time."""
  monkeypatch.setattr(cached, "LONG_FILE", 0)
  monkeypatch.setattr(blocks, "PROMPTS", 7)
  return generations.load(folder)


def test_they_are_the_same_records(folder, on_disk):
  there = generations.load(folder, in_memory=True)
  assert isinstance(on_disk.full, columns.Column) and isinstance(there.full, tuple)
  assert on_disk.full == there.full and on_disk.records == there.records
  assert there.records[0] == on_disk.records[0]  # whichever side is asked
  assert on_disk.records[1] != there.records[0] and on_disk.full != 3
  column, records = on_disk.records[1], there.records[1]
  assert column[3] == records[3] and column[-1] == records[-1]
  assert tuple(column[5:8]) == records[5:8] and len(column) == len(records)
  assert list(columns.texts(column)) == list(columns.texts(records))
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
    sequence_losses.compute(
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
  monkeypatch.setattr(cached, "LONG_FILE", 0)
  merging_test.write(tmp_path)
  path = tmp_path / folder.name / "threshold_0.5.jsonl"
  lines = path.read_text().splitlines(keepends=True)
  path.write_text("".join([*lines[:4], lines[0]]))
  manifest = path.parent / generations.MANIFEST
  manifest.write_text(manifest.read_text().replace('"checksums"', '"unused"'))
  with pytest.raises(
    generations.cached.GenerationsError, match=r":5: expected every id once, got .* twice"
  ):
    generations.load(path.parent)
