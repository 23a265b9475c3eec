"""Files of others stay as they are: what a command would replace is looked at first."""

import json

import pytest

from calm.calibrate import GenerationsError, Prompt, generations, open_writer
from calm.calibrate import monitor as monitor_lib
from calm.calibrate.generations import merging
from calm.calibrate.losses import asking
from tests.calibrate.generations import merging_test

PROMPTS = [Prompt(f"p{row}", f"prompt {row}") for row in range(5)]
QUESTIONS = [asking.Question(p.id, p.input, "full", ("early",)) for p in PROMPTS]
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
  merging_test.write(tmp_path / "shards")
  with pytest.raises(OSError, match=rf"{name}' .* got a link to a file that does not exist"):
    merging.merge([tmp_path / "shards"], folder)
  assert not (tmp_path / "elsewhere").exists()


def test_a_start_that_was_stopped_goes_on(tmp_path):
  open_writer(tmp_path, prompts=PROMPTS, **RUN)
  (tmp_path / generations.MANIFEST).unlink()
  open_writer(tmp_path, prompts=PROMPTS, **RUN)
  assert (tmp_path / generations.MANIFEST).exists()


def test_shards_are_not_merged_over_another_list(tmp_path):
  for number in range(4):
    merging_test.write(tmp_path / "shards", number, 4)
  others = [Prompt(f"other-{row}", "text") for row in range(3)]
  merging_test.write(tmp_path / "other", prompts=others)
  merging.merge([tmp_path / "other"], tmp_path / "out")
  before = merging_test.contents(tmp_path / "out")
  with pytest.raises(GenerationsError, match="prompts of these shards, or none, got others"):
    merging.merge([tmp_path / "shards"], tmp_path / "out")
  assert merging_test.contents(tmp_path / "out") == before
  (tmp_path / "out" / generations.MANIFEST).unlink()  # prompts of nobody knows which run
  before = merging_test.contents(tmp_path / "out")
  with pytest.raises(GenerationsError, match="choose another --output"):
    merging.merge([tmp_path / "shards"], tmp_path / "out")
  assert merging_test.contents(tmp_path / "out") == before


def test_a_merging_that_was_stopped_is_made_again(tmp_path):
  merging_test.write(tmp_path)
  merging.merge([tmp_path], tmp_path / "out")
  before = merging_test.contents(tmp_path / "out")
  (tmp_path / "out" / generations.MANIFEST).unlink()
  merging.merge([tmp_path], tmp_path / "out")
  assert merging_test.contents(tmp_path / "out") == before
  merging.merge([tmp_path], tmp_path / "out")
  assert merging_test.contents(tmp_path / "out") == before


def test_answers_stay_where_more_is_asked(tmp_path):
  path = tmp_path / "unlabelled.jsonl"
  asking.write_questions(path, QUESTIONS[:2])
  rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
  rows[0]["targets"] = ["an answer"]
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  asking.write_questions(path, QUESTIONS[1:4])
  assert asking.read_references(path) == {"p0": ("an answer",), "p1": (), "p2": (), "p3": ()}
  asking.write_questions(path, [])
  assert asking.read_references(path) == {"p0": ("an answer",)}


@pytest.mark.parametrize(
  "text",
  [
    '{"id": "p0", "prediction": "a text", "targets": ["x"]}\n',
    '{"id": "p0", "targets": ["x"]}\n{"id": "p0", "targets": ["y"]}\n',
    "no list\n",
  ],
)
def test_questions_replace_nothing_else(tmp_path, text):
  path = tmp_path / "outputs.jsonl"
  path.write_text(text)
  with pytest.raises(GenerationsError, match=r"outputs\.jsonl to be new.*choose another"):
    asking.write_questions(path, QUESTIONS)
  assert path.read_text("utf-8") == text


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
