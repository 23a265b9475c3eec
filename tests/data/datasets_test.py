"""Examples of JSON Lines files; the formats themselves are tested in prompt_files_test.py."""

import gzip
import json
import pathlib

import pytest

from calm.calibrate import Prompt
from calm.data import datasets

ROWS = [
  {"id": "a", "source": "s", "kind": "k", "input": "un café", "target": ["coffee", "a café"]},
  {"id": "b", "input": "", "targets": "thé"},
]
EXAMPLES = [
  Prompt("a", "un café", ("coffee", "a café"), "s"),
  Prompt("b", "", ("thé",), None),
]


def lines(*rows) -> bytes:
  return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def write(folder: pathlib.Path, data: bytes, name="rows.jsonl") -> pathlib.Path:
  path = folder / name
  path.write_bytes(data)
  return path


@pytest.mark.parametrize(
  ("name", "data"),
  [
    ("rows.jsonl", lines(*ROWS)),
    ("rows.jsonl.gz", gzip.compress(lines(*ROWS))),
    ("packed.jsonl", gzip.compress(lines(*ROWS))),
    ("plain.gz", lines(*ROWS)),
    ("mark.jsonl", b"\xef\xbb\xbf" + lines(ROWS[0]) + b"\r\n \n" + lines(ROWS[1]).rstrip()),
  ],
)
def test_fields_come_back(tmp_path, name, data):
  assert datasets.read_examples(write(tmp_path, data, name)) == EXAMPLES


def test_missing_ids_are_line_numbers_and_prompts_need_no_target(tmp_path):
  path = write(tmp_path, lines({"input": "x"}) + b"\n" + lines({"input": "y", "target": None}))
  examples = datasets.read_examples(path, require_target=False)
  assert [(e.id, e.targets) for e in examples] == [("rows/1", ()), ("rows/3", ())]


@pytest.mark.parametrize(
  ("bad", "message"),
  [
    (b'{"input": "x", }', r"rows.jsonl:2: expected .*, got invalid JSON .*column 1[56]"),
    (b'{"input": "x"}', r"rows.jsonl:2: expected a field `target`, .*, got none"),
    (b'{"input": "x", "target": []}', r"rows.jsonl:2: expected a field `target`, .*, got none"),
    (b'{"input": "x", "target": ["y", null]}', r"rows.jsonl:2: expected `targets`"),
    (b'{"input": "x", "target": "y", "id": [7]}', r"rows.jsonl:2: expected `id`"),
    (b'{"input": "x", "target": "y", "source": []}', r"rows.jsonl:2: expected `group`"),
  ],
)
def test_bad_lines_are_named(tmp_path, bad, message):
  path = write(tmp_path, lines(ROWS[0]) + bad + b"\n" + lines(ROWS[1]))
  with pytest.raises(ValueError, match=message):
    datasets.read_examples(path)
  with pytest.raises(ValueError, match="got none; write at least one"):
    datasets.read_examples(write(tmp_path, b"\n \n"))


def test_a_task_finds_its_split_packed_or_plain(tmp_path):
  task = datasets.TextTask("mine", "", ("rouge_l",))
  assert task.path(tmp_path, "test") == tmp_path / "mine" / "test.jsonl.gz"
  (tmp_path / "mine").mkdir()
  write(tmp_path / "mine", lines(*ROWS), "test.jsonl")
  assert datasets.read_examples(task.path(str(tmp_path), "test")) == EXAMPLES


@pytest.mark.parametrize(
  ("name", "split", "count"),
  [
    ("debian_synopsis", "test", 2259),
    ("debian_enfr", "validation", 3000),
    ("debian_qa", "test", 2389),
  ],
)
def test_debian_sets_are_read_whole(data_dir, name, split, count):
  examples = datasets.read_examples(datasets.DEBIAN[name].path(data_dir, split))
  assert len(examples) == count
  assert all(example.group and example.input and example.targets for example in examples)
  if name == "debian_qa":
    assert all(e.input.startswith("question: ") and " context: " in e.input for e in examples)


def test_corpus_scores_stand_beside():
  scores = datasets.corpus_scores(
    ["the cat sat on the mat"] * 2, [["the cat sat on the mat"]] * 2
  )
  assert scores == {"bleu": pytest.approx(100.0), "chrf": pytest.approx(100.0)}
  uneven = [["the cat sat on the mat", "other"], ["another thing here"]]
  scores = datasets.corpus_scores(["the cat sat on the mat", "x"], uneven)
  assert 0.0 < scores["bleu"] < 100.0
