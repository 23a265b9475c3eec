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


def test_fields_come_back(tmp_path):
  data = b"\xef\xbb\xbf" + lines(ROWS[0]) + b"\r\n \n" + lines(ROWS[1]).rstrip()
  for content in (data, gzip.compress(data)):
    assert datasets.read_examples(write(tmp_path, content)) == EXAMPLES
  path = write(tmp_path, lines({"input": "x"}))
  assert datasets.read_examples(path, require_target=False) == [Prompt("rows/1", "x")]


@pytest.mark.parametrize(
  ("bad", "message"),
  [
    (b'{"input": "x", }', r"rows.jsonl:2: expected .*, got invalid JSON .*column 1[56]"),
    (b'{"input": "x"}', r"rows.jsonl:2: expected a field `target`, got none"),
    (b'{"input": "x", "target": []}', r"rows.jsonl:2: expected a field `target`, got none"),
    (b'{"input": "x", "target": ["y", null]}', r"rows.jsonl:2: expected `targets`"),
  ],
)
def test_bad_lines_are_named(tmp_path, bad, message):
  path = write(tmp_path, lines(ROWS[0]) + bad + b"\n" + lines(ROWS[1]))
  with pytest.raises(ValueError, match=message):
    datasets.read_examples(path)
  with pytest.raises(ValueError, match="got none"):
    datasets.read_examples(write(tmp_path, b"\n \n"))


def test_debian_sets_are_read_whole(data_dir):
  examples = datasets.read_examples(datasets.DEBIAN["debian_qa"].path(data_dir, "test"))
  assert len(examples) == 2389
  assert all(e.group and e.targets for e in examples)
  assert all(e.input.startswith("question: ") and " context: " in e.input for e in examples)
