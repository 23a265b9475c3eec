"""Files and lines that have no end, where they are read."""

import os

import pytest

from calm import storage
from calm.calibrate import audit, generations
from calm.calibrate.generations import mending, records
from tests.calibrate import small_cache


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_not_waited_for(tmp_path):
  os.mkfifo(tmp_path / "pipe")
  with pytest.raises(ValueError, match="regular file, got one of another kind"):
    storage.content(tmp_path / "pipe")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("kind", ["pipe", "null", "zero"])
def test_a_folder_of_generations_holds_regular_files(tmp_path, kind):
  folder = small_cache.write(tmp_path / "cache")
  watch = tmp_path / "monitor.jsonl"
  for path, read in (
    (folder / "threshold_0.5.jsonl", lambda: generations.load(folder)),
    (
      folder / "threshold_0.5.jsonl",
      lambda: mending.mend(folder / "threshold_0.5.jsonl", None),
    ),
    (folder / "prompts.jsonl", lambda: generations.load(folder)),
    (folder / "prompts.jsonl", lambda: storage.checksum(folder / "prompts.jsonl")),
    (watch, lambda: audit.open_monitor(watch, audit.Watch(**small_cache.WATCH))),
  ):
    kept = path.read_bytes() if path.exists() else b""
    path.unlink(missing_ok=True)
    os.mkfifo(path) if kind == "pipe" else path.symlink_to(f"/dev/{kind}")
    with pytest.raises(ValueError, match=rf"{path.name}.* (regular|expected a) file"):
      read()
    path.unlink()
    path.write_bytes(kept)
  generations.load(folder)


def test_a_file_is_read_up_to_a_size(tmp_path):
  (tmp_path / "file").write_bytes(b"12345")
  assert storage.content(tmp_path / "file", most=5) == b"12345"
  with pytest.raises(ValueError, match="at most 4 bytes, got more"):
    storage.content(tmp_path / "file", most=4)


def test_a_long_line_is_left_to_its_reader(tmp_path, monkeypatch):
  monkeypatch.setattr(storage, "LONGEST_LINE", 8)
  (tmp_path / "file").write_bytes(b'{"a": "longer than eight"}\n')
  audit._unglue(tmp_path / "file")
  assert (tmp_path / "file").read_bytes() == b'{"a": "longer than eight"}\n'
  with pytest.raises(records.GenerationsError, match=r"file:1: expected lines of at most 8"):
    list(storage.read_lines(tmp_path / "file"))
