"""Prompts and records are read or refused by name, and what a lower threshold keeps of one."""

import collections

import numpy as np
import pytest

from calm.calibrate import NEVER_EXIT
from calm.calibrate.generations import records
from calm.calibrate.generations.records import Record

LAYERS, LENGTH, ALLOWED = 5, 12, (1, 3, 4)


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
  ("change", "message"),
  [
    ({"id": None}, "`id` to be a text"),
    ({"prediction": 3}, "`prediction` to be a text"),
    ({"tokens": [1], "exit_layers": [1, 2]}, "one length"),
    ({"tokens": "12"}, "`tokens` to be a list of whole .* got '12'"),
    ({"tokens": 3}, "`tokens` to be a list of whole .* got 3"),
    ({"tokens": [0.5]}, r"a list of whole .* got 0\.5"),
    ({"tokens": [True]}, "a list of whole .* got True"),
    ({"tokens": [-1]}, "a list of whole .* got -1"),
    ({"exit_layers": [1025]}, r"whole numbers in 0 \.\.\. 1024, got 1025"),
    ({"confidences": ["1"]}, r"a list of numbers in \[0, 1\], got '1'"),
    ({"confidences": [True]}, r"a list of numbers in \[0, 1\], got True"),
    ({"confidences": [0.5, float("nan")]}, r"a list of numbers in \[0, 1\], got nan"),
    ({"score": float("inf")}, "`score` to be a finite number"),
    ({"score": True}, "`score` to be a finite number"),
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
    (b'{"id": "a", "input": "\\ud83d"}\n', r":1: .*`input` to be Unicode, got half of a surr"),
    (b'{"id": "a"}\n', r":1: expected a prompt, .*, got none: Expected `input` to be a text"),
    (b'{"id": "a", "input": "i", "target": [1]}\n', r":1: .*`targets` to be a list of texts"),
    (b'{"id": "a", "input": "i", "target": 1}\n', r":1: expected a prompt, .*, got none"),
    (b'{"id": "a", "input": "i", "group": 1.5}\n', r":1: .*`group` to be a text"),
    (b'{"id": "a", "input": "i", "group": true}\n', r":1: .*`group` to be a text"),
    (b"\n", "expected a prompt a line, got none; write at least one"),
  ],
)
def test_errors_name_the_file_and_the_line(tmp_path, content, message):
  path = tmp_path / "prompts.jsonl"
  path.write_bytes(content)
  with pytest.raises(records.GenerationsError, match=f"prompts.jsonl.*{message}"):
    records.read_prompts(path)


def schedule(threshold, decaying):
  """Constant, or Eq. 5 with `NEVER_EXIT` mapped to itself."""
  steps = np.arange(LENGTH)
  if not decaying or threshold == NEVER_EXIT:
    return np.full(LENGTH, threshold, np.float32)
  values = 0.9 * threshold + 0.1 * np.exp(-4.0 * steps / LENGTH)
  return np.clip(values, 0, 1).astype(np.float32)


def decode(prompt, thresholds, prefix=()):
  """(token, exit layer, confidence, refused) per step; `prefix` is taken over, not decoded."""
  steps = list(prefix)
  while len(steps) < LENGTH and not (steps and steps[-1][0] == 1):
    position, refused = len(steps), 0.0
    history = [token * 7 + layer for token, layer, _, _ in steps]
    for layer in range(1, LAYERS + 1):
      generator = np.random.default_rng([prompt, position, layer, *history])
      confidence = np.float32(generator.random())
      token = int(generator.integers(1, 12))
      if layer == LAYERS or (layer in ALLOWED and confidence >= thresholds[position]):
        steps.append((token, layer, 0.0 if layer == LAYERS else confidence, refused))
        break
      if layer in ALLOWED:
        refused = max(refused, confidence)
  return steps


def record(prompt, steps):
  tokens, layers, confidences, refused = zip(*steps, strict=True)
  return Record(str(prompt), "text", tokens, layers, confidences, refused)


@pytest.mark.parametrize("decaying", [False, True])
def test_reuse_down_a_grid_equals_plain_decoding(decaying):
  grid = [NEVER_EXIT, *np.linspace(0.99, 0.0, 12)]
  summary = collections.Counter()
  for prompt in range(40):
    previous = None
    for threshold in grid:
      values = schedule(threshold, decaying)
      plain = decode(prompt, values)
      if previous is not None:
        kept = records.reusable_tokens(record(prompt, previous), values)
        assert previous[:kept] == plain[:kept]
        # A refusal of 0 may mean none: at threshold 0 the rule keeps less than it could.
        if kept < len(previous) and threshold > 0.0:
          assert previous[kept] != plain[kept]  # exact: not one token more could be kept
        whole = kept == len(previous)
        assert whole == (previous == plain) or threshold == 0.0
        resumed = previous if whole else decode(prompt, values, previous[:kept])
        assert record(prompt, resumed) == record(prompt, plain)
        summary += collections.Counter(
          tokens=len(plain), reused=min(kept, len(plain)), sequences=1, whole=whole
        )
      previous = plain
  assert 0 < summary["reused"] < summary["tokens"]
  assert 0 < summary["whole"] < summary["sequences"]


def test_reuse_by_hand():
  row = Record("a", "x", [5, 6, 1], [2, 8, 8], [0.8, 0.0, 0.0], [0.1, 0.5, 0.2])
  for thresholds, kept in (
    ([0.6, 0.6, 0.6], 3),
    ([0.6, 0.6, 0.6, 0.0], 3),  # later values belong to no token
    ([0.5, 0.5, 0.5], 1),  # reaching it is exiting
    ([0.0, 0.0, 0.0], 0),
    ([0.6, 0.6, 0.2], 2),
  ):
    assert records.reusable_tokens(row, thresholds) == kept
  assert records.reusable_tokens(Record("a", "x", [1]), [1.0]) == 0
  # Comparisons are in float32, as in the decoder.
  confidence = float(np.float32(0.7))
  row = Record("a", "x", rejected_confidences=[confidence])
  assert confidence < 0.7 and records.reusable_tokens(row, [0.7]) == 0
