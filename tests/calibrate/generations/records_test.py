"""Prompts and records are read or refused by name."""

import numpy as np
import pytest

from calm.calibrate.generations import records


def test_records_round_trip():
  full = records.Record("a", "x", [5, 1], [1, 8], [0.5, 0.0], [0.0, 0.25], -1.5)
  assert records.Record.from_json(full.to_json()) == full
  bare = records.Record("a", "x")
  assert bare.to_json() == {"id": "a", "prediction": "x"}
  assert records.Record.from_json({"id": "a", "prediction": "x", "other": 1}) == bare
  row = records.Record("a", "x", confidences=np.array([0.9, 0.1], np.float32))
  assert row.to_json()["confidences"] == [0.9, 0.1]  # short digits are kept, and the value
  assert np.float32(row.confidences[0]) == np.float32(0.9)


def test_prompts_read_data_set_rows_too():
  row = {"id": "a", "source": "s", "kind": "k", "input": "i", "target": ["t", "u"]}
  prompt = records.Prompt.from_json(row)
  assert prompt == records.Prompt("a", "i", ("t", "u"), "s")
  assert records.Prompt.from_json(prompt.to_json()) == prompt
  assert records.Prompt.from_json({"id": "a", "input": "i", "target": "t"}).targets == ("t",)
  assert records.Prompt.from_json({"id": "a", "input": "i"}) == records.Prompt("a", "i")


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"id": None}, "`id` to be a text"),
    ({"tokens": [1], "exit_layers": [1, 2]}, "one length"),
    ({"tokens": "12"}, "`tokens` to be a list of whole .* got '12'"),
    ({"tokens": [np.bool_(True)]}, "a list of whole .* got "),
    ({"exit_layers": [1025]}, r"whole numbers in 0 \.\.\. 1024, got 1025"),
    ({"confidences": [0.5, float("nan")]}, r"a list of numbers in \[0, 1\], got nan"),
    ({"score": float("inf")}, "`score` to be a finite number"),
    ({"prediction": "half \ud83d"}, "`prediction` to be Unicode, got half of a surrogate pair"),
  ],
)
def test_bad_records_are_refused(change, message):
  with pytest.raises(ValueError, match=message):
    records.Record.from_json({"id": "a", "prediction": "x"} | change)


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (
      b'{"id": "a", "input": "i"}\n{"id": "a", "input": "j"}\n',
      r":2: expected every id once, got 'a' twice",
    ),
    (b'{"id": "a", "input": "i"}\n\n[1]\n', r":3: expected a JSON object, got list"),
    (b'{"id": "a"}\n', r":1: expected a prompt, .*, got none: Expected `input` to be a text"),
    (b'{"id": "a", "input": "i", "target": [1]}\n', r":1: .*`targets` to be a list of texts"),
    (b'{"id": "a", "input": "i", "group": true}\n', r":1: .*`group` to be a text"),
    (b"\n", "expected a prompt a line, got none; write at least one"),
  ],
)
def test_errors_name_the_file_and_the_line(tmp_path, content, message):
  path = tmp_path / "prompts.jsonl"
  path.write_bytes(content)
  with pytest.raises(records.GenerationsError, match=f"prompts.jsonl.*{message}"):
    records.read_prompts(path)
