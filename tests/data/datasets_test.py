"""Reading JSON Lines: what comes back, and what each kind of bad file is told."""

import gzip
import json
import pathlib
import subprocess
import sys

import pytest

from calm.data import bounded, datasets

ROWS = [
  {"id": "a", "source": "s", "kind": "k", "input": "un café", "target": ["coffee", "a café"]},
  {"id": "b", "input": "", "target": "thé"},
]


def lines(*rows) -> bytes:
  return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def write(folder: pathlib.Path, data: bytes, name="rows.jsonl") -> pathlib.Path:
  path = folder / name
  path.write_bytes(data)
  return path


def test_fields_come_back(tmp_path):
  assert datasets.read_examples(write(tmp_path, lines(*ROWS))) == [
    datasets.Example("a", "un café", ("coffee", "a café"), "s"),
    datasets.Example("b", "", ("thé",), None),
  ]


def test_references_may_be_called_targets_as_in_files_of_prompts(tmp_path):
  rows = {"input": "a", "targets": ["b", "c"]}, {"input": "d", "targets": "e"}
  examples = datasets.read_examples(write(tmp_path, lines(*rows)))
  assert [example.targets for example in examples] == [("b", "c"), ("e",)]


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.jsonl"])
def test_gzip_is_told_by_its_bytes(tmp_path, name):
  packed = write(tmp_path, gzip.compress(lines(*ROWS)), name)
  plain = write(tmp_path, lines(*ROWS), "plain.gz")
  assert datasets.read_examples(packed) == datasets.read_examples(plain)


def test_blank_lines_marks_and_missing_ends_do_not_matter(tmp_path):
  data = b"\xef\xbb\xbf" + lines(ROWS[0]) + b"\r\n  \n" + lines(ROWS[1]).rstrip()
  assert len(datasets.read_examples(write(tmp_path, data))) == 2


def test_missing_ids_are_line_numbers(tmp_path):
  data = lines({"input": "x", "target": "y"}) + b"\n" + lines({"input": "x", "target": "y"})
  examples = datasets.read_examples(write(tmp_path, data, "my.jsonl"))
  assert [example.id for example in examples] == ["my/1", "my/3"]


def test_limit_stops_before_what_follows(tmp_path):
  path = write(tmp_path, lines(*ROWS) + b"not JSON\n")
  assert len(datasets.read_examples(path, limit=2)) == 2
  with pytest.raises(ValueError, match="`limit`"):
    datasets.read_examples(path, limit=0)


def test_prompts_need_no_target(tmp_path):
  path = write(tmp_path, lines({"input": "x"}, {"input": "y", "target": None}))
  examples = datasets.read_examples(path, require_target=False)
  assert [example.targets for example in examples] == [(), ()]


@pytest.mark.parametrize(
  ("bad", "message"),
  [
    (
      b'{"input": "caf\xe9", "target": "x"}',
      r"rows.jsonl:2: .*invalid UTF-8 at byte 15 .*0xe9",
    ),
    (b'{"input": "x", }', r"rows.jsonl:2: expected .*, got invalid JSON at column 1[56]"),
    (b'["x", "y"]', r"rows.jsonl:2: expected a JSON object .* got list"),
    (b'{"text": "x", "target": "y"}', r"rows.jsonl:2: expected a field `input`, got.*'text'"),
    (b'{"input": "x"}', r"rows.jsonl:2: expected a field `target`, .*, got none"),
    (b'{"input": "x", "target": []}', r"rows.jsonl:2: expected a field `target`, .*, got none"),
    (
      b'{"input": 3, "target": "y"}',
      r"rows.jsonl:2: expected `input` to be a string, got int 3",
    ),
    (b'{"input": "x", "target": ["y", null]}', r"rows.jsonl:2: expected `target\[1\]`"),
    (b'{"input": "x", "target": "y", "id": 7}', r"rows.jsonl:2: expected `id`"),
    (b'{"input": "x", "target": "y", "source": []}', r"rows.jsonl:2: expected `source`"),
    (
      b'{"input": "x", "target": "y", "id": "a"}',
      r"rows.jsonl:2: expected every `id` once, got 'a' of line 1",
    ),
  ],
)
def test_bad_lines_are_named(tmp_path, bad, message):
  path = write(tmp_path, lines(ROWS[0]) + bad + b"\n" + lines(ROWS[1]))
  with pytest.raises(ValueError, match=message):
    datasets.read_examples(path)


@pytest.mark.parametrize("data", [b"", b"\n \n", gzip.compress(b"", mtime=0)])
def test_empty_files_are_errors(tmp_path, data):
  with pytest.raises(ValueError, match="got none; write at least one"):
    datasets.read_examples(write(tmp_path, data))


def test_damaged_gzip_is_an_error(tmp_path):
  # Incompressible text, so that much of it stands before the cut.
  rows = [{"input": f"{i * 7919 % 10007:x}", "target": "y"} for i in range(3000)]
  packed = gzip.compress(lines(*rows))
  wrong_sum = packed[:-8] + bytes(8)
  no_block = packed[:10] + b"\xff" * 50
  for broken in (packed[: len(packed) // 2], wrong_sum, no_block):
    with pytest.raises(ValueError, match="damaged or cut off"):
      datasets.read_examples(write(tmp_path, broken))


def test_missing_files_and_folders_are_told_apart(tmp_path):
  with pytest.raises(FileNotFoundError, match="does not exist"):
    datasets.read_examples(tmp_path / "none.jsonl")
  with pytest.raises(FileNotFoundError, match="is a folder"):
    datasets.read_examples(tmp_path)


def test_a_task_finds_its_split_packed_or_plain(tmp_path):
  task = datasets.TextTask("mine", "", ("rouge_l",))
  assert task.path(tmp_path, "test") == tmp_path / "mine" / "test.jsonl.gz"
  (tmp_path / "mine").mkdir()
  write(tmp_path / "mine", lines(*ROWS), "test.jsonl")
  assert len(datasets.read_examples(task.path(str(tmp_path), "test"))) == 2


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
  assert all(example.source and example.input and example.targets for example in examples)
  if name == "debian_qa":
    assert all(
      example.input.startswith("question: ") and " context: " in example.input
      for example in examples
    )


def test_reading_loads_neither_tensorflow_nor_jax():
  code = (
    "import sys, calm.data.datasets;"
    "bad = {'tensorflow', 'jax', 'seqio'} & set(sys.modules); assert not bad, bad"
  )
  subprocess.run(
    [sys.executable, "-c", code], check=True, cwd=pathlib.Path(__file__).parents[2]
  )


def test_a_gzip_bomb_and_an_endless_line_are_refused_in_little_memory(tmp_path, monkeypatch):
  monkeypatch.setattr(bounded, "UNPACKED", 2**20)
  monkeypatch.setattr(bounded, "LONGEST_LINE", 2**16)
  row = b'{"input": "the same again"}\n'
  for name, content, told in [
    ("many", row * 2**17, "to unpack to at most 200 times"),
    ("long", b"x" * 2**17, "to hold lines of at most 65536"),
  ]:
    path = tmp_path / f"{name}.jsonl.gz"
    path.write_bytes(gzip.compress(content))
    with pytest.raises(ValueError, match=rf"{name}.jsonl.gz' {told}"):
      datasets.read_examples(path, require_target=False)
  assert datasets.read_examples(tmp_path / "many.jsonl.gz", limit=3, require_target=False)


@pytest.mark.parametrize(
  ("line", "message"),
  [("[" * 50_000, "too deep"), ('{"input": "a", "score": 1e999}', "within float64, got 1e999")],
)
def test_json_that_python_reads_too_gladly(tmp_path, line, message):
  (tmp_path / "a.jsonl").write_text(f'{{"input": "fine"}}\n{line}\n')
  with pytest.raises(ValueError, match=rf"a.jsonl:2: .*{message}"):
    datasets.read_examples(tmp_path / "a.jsonl", require_target=False)
