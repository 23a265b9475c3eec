"""A monitor's file that holds something else is left alone."""

import pytest

from calm.calibrate import GenerationsError
from calm.calibrate import monitor as monitor_lib


@pytest.mark.parametrize(
  "raw",
  [
    b'[{"input": "x"}]',
    b"first\nsecond without an end",
    b'2026-01-01 INFO {"a": 1}\n2026-01-02 INFO {"a": 2}\n',
    b'{"schema_version": 2, "tolerance": 0.2}\n{"served',
    b"\xff\xfe\n\x00",
  ],
)
def test_a_monitor_mends_only_monitors(tmp_path, raw):
  path = tmp_path / "other.log"
  path.write_bytes(raw)
  watch = monitor_lib.Watch(tolerance=0.1, alarm_level=0.05, sampling_rate=0.5, seed="coin")
  with pytest.raises(GenerationsError, match=r"other\.log:1: expected the watch .* a new file"):
    monitor_lib.open_monitor(path, watch)
  assert path.read_bytes() == raw


def test_a_monitor_whose_first_line_was_cut_off_is_left_alone(tmp_path):
  path = tmp_path / "monitor.jsonl"
  watch = monitor_lib.Watch(tolerance=0.1, alarm_level=0.05, sampling_rate=0.5, seed="coin")
  monitor_lib.open_monitor(path, watch)  # and lets go of the file
  whole = path.read_bytes()
  for length in (1, len(whole) // 2, len(whole) - 2):
    path.write_bytes(whole[:length])
    with pytest.raises(GenerationsError, match="start a new file"):
      monitor_lib.open_monitor(path, watch)
    assert path.read_bytes() == whole[:length]
  path.write_bytes(whole[:-1])  # all but the end of the line
  monitor_lib.open_monitor(path, watch)
  assert path.read_bytes() == whole
