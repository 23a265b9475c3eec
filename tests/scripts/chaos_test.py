"""What `scripts/chaos.py` counts, of a command that writes well and one that begins anew."""

import json
import pathlib
import random
import sys

import pytest

SCRIPTS = pathlib.Path(__file__).parents[2] / "scripts"

WELL = """
import pathlib, sys, time
from calm import storage
at = pathlib.Path(sys.argv[1])
done = at.read_text().count("\\n") if at.exists() else 0
for number in range(done, 8):
  storage.append(at, b'{"id": "%d"}\\n' % number)
  time.sleep(0.02)
"""
# Begins anew after a kill, and keeps what was there: lines come twice, whole and torn.
ILL = WELL.replace("range(done, 8)", "range(1, 9)").replace("storage.append(at, ", "append(")
ILL = ILL.replace("for number", "append = lambda line: at.open('ab').write(line)\nfor number")


@pytest.fixture
def chaos(monkeypatch):
  monkeypatch.syspath_prepend(str(SCRIPTS))
  import chaos

  return chaos


def row(chaos, code, folder):
  trial = chaos.Trial(
    lambda at: [sys.executable, "-W", "ignore", "-c", code, str(at / "out.jsonl")],
    ("out.jsonl",),
    ("out.jsonl",),
  )
  made = chaos.chaos("x", trial, folder, 4, random.Random(0))
  return dict(zip(chaos.COLUMNS, made, strict=True))


def test_a_command_that_goes_on_where_it_was_loses_nothing(chaos, tmp_path):
  made = row(chaos, WELL, tmp_path)
  assert made["kills"] == 4 and made["runs that ended"] >= 1 and made["while writing"] >= 2
  assert not any(made[name] for name in ("lost", "doubled", "different", "torn", "left"))


def test_a_command_that_begins_anew_is_seen(chaos, tmp_path):
  assert row(chaos, ILL, tmp_path)["doubled"] > 0


@pytest.mark.parametrize(
  ("line", "found"),
  [
    ({"id": "a", "text": "x", "score": [0.5000001, 1]}, {"last digits": 1}),
    ({"id": "a", "text": "x", "score": [0.51, 1]}, {"lost": 1, "different": 1}),
    ({"id": "a", "text": "y", "score": [0.5, 1]}, {"lost": 1, "different": 1}),
    ({"id": "a", "text": "x", "score": [0.5, 2]}, {"lost": 1, "different": 1}),
    (None, {"lost": 1}),
  ],
)
def test_what_differs_is_told_from_what_is_rounded(chaos, tmp_path, line, found):
  theirs = {"id": "a", "text": "x", "score": [0.5, 1]}
  for name, value in (("ours", line), ("theirs", theirs)):
    (tmp_path / name).mkdir()
    text = "" if value is None else json.dumps(value) + "\n"
    (tmp_path / name / "out.jsonl").write_text(text)
  made = chaos.chaos_compare.compare(["*.jsonl"], tmp_path / "ours", tmp_path / "theirs")
  assert {name: count for name, count in made.items() if count} == found


def test_half_a_file_is_torn(chaos, tmp_path):
  (tmp_path / "a.json").write_text('{"half')
  (tmp_path / "b.jsonl").write_text('{"whole": 1}\n{"half')
  (tmp_path / "c.json").write_text("{}")
  names = ["a.json", "b.jsonl", "c.json", "missing.json"]
  assert chaos.chaos_compare.torn(names, tmp_path) == 2
