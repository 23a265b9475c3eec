"""Results as files: the same back, found by what they depend on, and only by that."""

import dataclasses
import functools
import json
import math

import pytest

from calm.calibrate import Prompt, Record
from calm.inference import result_cache, timing


@dataclasses.dataclass(frozen=True)
class Inner:
  value: float
  names: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Outer:
  inner: Inner | None
  pair: tuple[int, float]
  table: dict[str, Inner]
  flag: bool = True


def outer(value: float = 0.5) -> Outer:
  inner = Inner(value, ("a", "ü"))
  return Outer(inner, (1, math.inf), {"x": inner})


RECORD = Record("p", "text", (5, 1), (2, 4), (0.5, 0.25), (0.0, 0.125), -1.5)
RESULTS = (
  (Outer, outer()),
  (Outer, Outer(None, (2, 1.0), {}, False)),
  (Outer, outer(math.nan)),
  (tuple[Record, ...], (RECORD, RECORD)),
  (timing.Seconds, timing.Seconds(timing.Pair(1, 2, 2.0, 1.0, 2.0, 1.5))),
)


def test_a_result_reads_back():
  for kind, value in RESULTS:
    stored = json.loads(json.dumps(result_cache.to_json(value), allow_nan=False))
    back = result_cache.from_json(kind, stored)
    assert type(back) is type(value) and result_cache.to_json(back) == stored
    assert repr(back) == repr(value)


def test_what_is_no_result_is_refused():
  with pytest.raises(TypeError, match="numbers, texts, tuples and dataclasses"):
    result_cache.to_json({"x": object()})
  for kind, stored in ((tuple[str, ...], [3]), (float, "much"), (int, True)):
    with pytest.raises(TypeError, match=r"Expected .* in a stored result, got"):
      result_cache.from_json(kind, stored)


def test_a_result_is_computed_once_per_key_and_a_damaged_file_is_named(tmp_path):
  folder, calls = tmp_path / "new" / "folder", []
  cached = functools.partial(result_cache.cached, folder, Outer)

  def make():
    calls.append(1)
    return outer(len(calls))

  first = cached("thing", {"n": 1}, make)
  (path,) = folder.glob("thing-*.json")
  assert cached("thing", {"n": 1}, make) == first and len(calls) == 1
  others = [("thing", {"n": 2}), ("other", {"n": 1})]
  assert [cached(name, key, make).inner.value for name, key in others] == [2, 3]
  path.write_text(path.read_text("utf-8")[:-40], "utf-8")
  with pytest.raises(ValueError, match=rf"stored result of thing in {path}.*delete"):
    cached("thing", {"n": 1}, make)


def test_prompts_differ_by_text_reference_and_order():
  one, two = Prompt("a", "x", ("r",)), Prompt("b", "y", ("r",))
  lists = ([one, two], [two, one], [one], [Prompt("a", "x", ("s",)), two])
  assert len(set(map(result_cache.prompts_digest, lists))) == 4
