"""Results as files: the same back, found by what they depend on, and only by
that.
"""

import functools
import json
import math

import pytest

from calm import storage
from calm.calibrate import Prompt, Record
from calm.inference import timing

RECORD = Record("p", "text", (5, 1), (2, 4), (0.5, 0.25), (0.0, 0.125), -1.5)
PAIR = timing.Pair(1, 2, 2.0, 1.0, 2.0, 1.5)
TIMED = timing.Timed("ü", math.inf, (0.5, 1.0), math.nan, 1.0, 2.0)
RESULTS = (
  (tuple[Record, ...], (RECORD, RECORD)),
  (timing.Timings, timing.Timings(2, (TIMED,))),
  (timing.Seconds, timing.Seconds(PAIR)),
  (timing.Seconds, timing.Seconds(PAIR, PAIR)),
)


def test_a_result_reads_back():
  for kind, value in RESULTS:
    stored = json.loads(json.dumps(storage.to_json(value), allow_nan=False))
    back = storage.from_json(kind, stored)
    assert type(back) is type(value) and storage.to_json(back) == stored
    assert repr(back) == repr(value)


def test_what_is_no_result_is_refused():
  with pytest.raises(TypeError, match="numbers, texts, tuples and dataclasses"):
    storage.to_json({"x": object()})
  for kind, stored in ((tuple[str, ...], [3]), (float, "much"), (int, True)):
    with pytest.raises(TypeError, match=r"Expected .* in a stored result, got"):
      storage.from_json(kind, stored)


def test_a_result_is_computed_once_per_key_and_a_damaged_file_is_named(
  tmp_path,
):
  folder = tmp_path / "new" / "folder"
  calls = []
  cached = functools.partial(storage.cached, folder, tuple[int, ...])

  def make():
    calls.append(1)
    return (len(calls),)

  first = cached("thing", {"n": 1}, make)
  (path,) = folder.glob("thing-*.json")
  assert cached("thing", {"n": 1}, make) == first and len(calls) == 1
  others = [("thing", {"n": 2}), ("other", {"n": 1})]
  assert [cached(name, key, make) for name, key in others] == [(2,), (3,)]
  path.write_text(path.read_text("utf-8")[:-40], "utf-8")
  with pytest.raises(
    ValueError, match=rf"{path}.*a stored result of thing.*delete"
  ):
    cached("thing", {"n": 1}, make)


def test_prompts_differ_by_text_reference_and_order():
  one = Prompt("a", "x", ("r",))
  two = Prompt("b", "y", ("r",))
  lists = ([one, two], [two, one], [one], [Prompt("a", "x", ("s",)), two])
  assert len(set(map(storage.prompts_digest, lists))) == 4
