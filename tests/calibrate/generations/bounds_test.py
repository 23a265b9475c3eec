"""Files and lines that have no end, where they are read."""

import os

import pytest

from calm.calibrate import audit
from calm.calibrate.generations import files, records


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_not_waited_for(tmp_path):
  os.mkfifo(tmp_path / "pipe")
  with pytest.raises(ValueError, match="regular file, got one of another kind"):
    files.content(tmp_path / "pipe")


def test_a_file_is_read_up_to_a_size(tmp_path):
  (tmp_path / "file").write_bytes(b"12345")
  assert files.content(tmp_path / "file", most=5) == b"12345"
  with pytest.raises(ValueError, match="at most 4 bytes, got more"):
    files.content(tmp_path / "file", most=4)


def test_a_long_line_is_left_to_its_reader(tmp_path, monkeypatch):
  monkeypatch.setattr(records, "LONGEST_LINE", 8)
  (tmp_path / "file").write_bytes(b'{"a": "longer than eight"}\n')
  audit._unglue(tmp_path / "file")
  assert (tmp_path / "file").read_bytes() == b'{"a": "longer than eight"}\n'
  with pytest.raises(records.GenerationsError, match=r"file:1: expected lines of at most 8"):
    list(records.read_lines(tmp_path / "file"))
