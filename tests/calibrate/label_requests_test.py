"""References are requested where texts differ, and nowhere else."""

import json

import pytest

from calm.calibrate import GenerationsError, Prompt, Record, generations, label_requests

REQUESTS = [
  {"id": f"p{row}", "input": "in", "full": "full", "early": ["early"]} for row in range(4)
]


def test_prompts_whose_texts_differ_are_listed():
  prompts = tuple(Prompt(f"p{row}", "in", ("a",) if row == 2 else ()) for row in range(3))
  columns = [[Record(f"p{row}", text) for row in range(3)] for text in ("early", "full")]
  columns[0][1] = Record("p1", "full")
  full = [Record(f"p{row}", "full") for row in range(3)]
  made = generations.Generations(prompts, [0.9, 0.5], tuple(map(tuple, columns)), tuple(full))
  assert label_requests.find_requests(made) == REQUESTS[:1]


def test_requests_are_written_and_answers_read(tmp_path):
  path = tmp_path / "unlabelled.jsonl"
  label_requests.write_requests(path, REQUESTS[:1])
  assert label_requests.read_references(path) == {"p0": ()}
  path.write_text('{"id": "a", "targets": "x"}\n{"id": "b", "references": ["y", "z"]}\n')
  assert label_requests.read_references(path) == {"a": ("x",), "b": ("y", "z")}
  for line in (
    '{"targets": []}',
    '{"id": "a"}',
    '{"id": 1, "targets": []}',
    '{"id": "a", "targets": [1]}',
  ):
    path.write_text(line + "\n")
    with pytest.raises(GenerationsError, match=r"unlabelled.jsonl:1: expected"):
      label_requests.read_references(path)
  path.write_text('{"id": "a", "targets": []}\n' * 2)
  with pytest.raises(GenerationsError, match=r":2: expected an `id` that is new"):
    label_requests.read_references(path)


def test_answers_stay_where_more_is_asked(tmp_path):
  path = tmp_path / "unlabelled.jsonl"
  label_requests.write_requests(path, REQUESTS[:2])
  rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
  rows[0]["targets"] = ["an answer"]
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  label_requests.write_requests(path, REQUESTS[1:4])
  answered = {"p0": ("an answer",), "p1": (), "p2": (), "p3": ()}
  assert label_requests.read_references(path) == answered
  label_requests.write_requests(path, [])
  assert label_requests.read_references(path) == {"p0": ("an answer",)}


@pytest.mark.parametrize(
  "text",
  [
    '{"id": "p0", "prediction": "a text", "targets": ["x"]}\n',
    '{"id": "p0", "targets": ["x"]}\n{"id": "p0", "targets": ["y"]}\n',
    "no list\n",
  ],
)
def test_requests_replace_nothing_else(tmp_path, text):
  path = tmp_path / "outputs.jsonl"
  path.write_text(text)
  with pytest.raises(GenerationsError, match=r"outputs\.jsonl to be new.*choose another"):
    label_requests.write_requests(path, REQUESTS)
  assert path.read_text("utf-8") == text
