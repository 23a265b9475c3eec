import numpy as np
import pytest

from calm.calibrate.generations import records


def test_float32_confidences_keep_their_short_digits_and_their_value():
  row = records.Record("a", "x", confidences=np.array([0.9, 0.1], np.float32))
  assert row.to_json()["confidences"] == [0.9, 0.1]
  assert np.float32(row.confidences[0]) == np.float32(0.9)


def test_records_round_trip():
  full = records.Record("a", "x", [5, 1], [1, 8], [0.5, 0.0], [0.0, 0.25], -1.5)
  assert records.Record.from_json(full.to_json()) == full
  bare = records.Record("a", "x")
  assert bare.to_json() == {"id": "a", "prediction": "x"}
  assert records.Record.from_json({"id": "a", "prediction": "x", "other": 1}) == bare


def test_prompts_read_data_set_rows_too():
  row = {"id": "a", "source": "s", "kind": "k", "input": "i", "target": ["t", "u"]}
  prompt = records.Prompt.from_json(row)
  assert prompt == records.Prompt("a", "i", ("t", "u"), "s")
  assert records.Prompt.from_json(prompt.to_json()) == prompt
  assert records.Prompt.from_json({"id": "a", "input": "i", "target": "t"}).targets == ("t",)
  assert records.Prompt.from_json({"id": "a", "input": "i"}) == records.Prompt("a", "i")


@pytest.mark.parametrize(
  ("value", "message"),
  [
    ({"prediction": "x"}, "`id` to be a text"),
    ({"id": "a"}, "`prediction` to be a text"),
    ({"id": "a", "prediction": 3}, "`prediction` to be a text"),
    ({"id": "a", "prediction": "x", "tokens": [1], "exit_layers": [1, 2]}, "one length"),
    (
      {"id": "a", "prediction": "x", "tokens": "12"},
      "`tokens` to be a list of whole .* got '12'",
    ),
    ({"id": "a", "prediction": "x", "tokens": 3}, "`tokens` to be a list of whole .* got 3"),
    (
      {"id": "a", "prediction": "x", "tokens": [0.5]},
      r"`tokens` of 'a' to be a list of whole .* got 0\.5",
    ),
    ({"id": "a", "prediction": "x", "tokens": [True]}, "a list of whole .* got True"),
    ({"id": "a", "prediction": "x", "tokens": [-1]}, "a list of whole .* got -1"),
    (
      {"id": "a", "prediction": "x", "exit_layers": [1025]},
      r"numbers in 0 \.\.\. 1024, got 1025",
    ),
    (
      {"id": "a", "prediction": "x", "confidences": ["1"]},
      r"a list of numbers in \[0, 1\], got '1'",
    ),
    (
      {"id": "a", "prediction": "x", "confidences": [True]},
      r"a list of numbers in \[0, 1\], got True",
    ),
    ({"id": "a", "prediction": "x", "score": float("inf")}, "`score` to be a finite number"),
    ({"id": "a", "prediction": "x", "score": True}, "`score` to be a finite number"),
    (
      {"id": "a", "prediction": "x", "confidences": [float("nan")]},
      r"a list of numbers in \[0, 1\], got nan",
    ),
  ],
)
def test_bad_records_are_refused(value, message):
  with pytest.raises(ValueError, match=message):
    records.Record.from_json(value)


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (
      b'{"id": "a", "input": "i"}\n{"id": "a", "input": "j"}\n',
      r":2: expected every id once, got 'a' twice",
    ),
    (b'{"id": "a", "input": "i"}\n\n[1]\n', r":3: expected a JSON object, got list"),
    (b'{"id": "a", "input": "i"}\n{"id": "b", "inp', r":2: .* last line is cut off"),
    (b'{"id": "a", "inp\n{"id": "b", "input": "i"}\n', r":1: expected a JSON object, got"),
    (b'{"id": "a", "input": "\xff"}\n', r":1: .*invalid UTF-8 at byte 22"),
    (b'{"id": "a", "input": NaN}\n', r":1: .*expected JSON, got NaN"),
    (b'{"id": "a"}\n', r":1: expected a prompt, got none: Expected `input` to be a text"),
    (b'{"id": "a", "input": "i", "target": [1]}\n', r":1: .*`targets` to be a list of texts"),
    (b'{"id": "a", "input": "i", "target": 1}\n', r":1: expected a prompt, got none"),
    (b'{"id": "a", "input": "i", "group": 1.5}\n', r":1: .*`group` to be a text"),
    (b'{"id": "a", "input": "i", "group": true}\n', r":1: .*`group` to be a text"),
    (b'{"id": "a", "input": 1e999}\n', r":1: .*expected numbers within float64, got 1e999"),
    (b"\n", "got no prompt; write at least one"),
  ],
)
def test_errors_name_the_file_and_the_line(tmp_path, content, message):
  path = tmp_path / "prompts.jsonl"
  path.write_bytes(content)
  with pytest.raises(records.GenerationsError, match=f"prompts.jsonl.*{message}"):
    records.read_prompts(path)


def test_missing_file_is_named(tmp_path):
  with pytest.raises(
    records.GenerationsError, match=r"nothing.jsonl: expected a file that can be read"
  ):
    records.read_prompts(tmp_path / "nothing.jsonl")


def test_last_line_without_newline_is_read_when_it_is_whole(tmp_path):
  path = tmp_path / "prompts.jsonl"
  path.write_text('{"id": "a", "input": "\u2028é"}')
  assert records.read_prompts(path)[0].input == "\u2028é"


def test_prompts_need_unique_ids():
  one = records.Prompt("a", "i")
  records.check_unique([one])
  for bad in ([], [one, one]):
    with pytest.raises(ValueError, match="`prompts` to be at least one prompt with unique ids"):
      records.check_unique(bad)
