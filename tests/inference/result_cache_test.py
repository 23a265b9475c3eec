"""Results as files: the same back, found by what they depend on, and only by that."""

import dataclasses
import json
import math

import pytest

pytest.importorskip("jax", reason="needs the extra 'decode'")

from calm.calibrate import Prompt, Record
from calm.inference import result_cache
from calm.paper import experiments
from tests.paper import samples


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


def test_a_result_reads_back():
  stored = json.loads(json.dumps(result_cache.to_json(outer()), allow_nan=False))
  assert stored["pair"] == [1, "never"]
  assert result_cache.from_json(Outer, stored) == outer()
  assert (
    result_cache.from_json(Outer, result_cache.to_json(Outer(None, (2, 1.0), {}, False))).inner
    is None
  )


def test_nan_reads_back():
  back = result_cache.from_json(Outer, result_cache.to_json(outer(math.nan)))
  assert math.isnan(back.inner.value)


def test_every_result_of_a_report_reads_back():
  report = samples.report()
  for field in dataclasses.fields(experiments.TaskReport):
    value = getattr(report, field.name)
    if dataclasses.is_dataclass(value):
      stored = json.loads(json.dumps(result_cache.to_json(value), allow_nan=False))
      assert result_cache.to_json(result_cache.from_json(type(value), stored)) == stored


def test_records_read_back():
  record = Record("p", "text", (5, 1), (2, 4), (0.5, 0.25), (0.0, 0.125), -1.5)
  kind = tuple[Record, ...]
  assert result_cache.from_json(kind, result_cache.to_json((record, record))) == (
    record,
    record,
  )


def test_what_is_no_result_is_refused():
  with pytest.raises(TypeError, match="numbers, texts, tuples and dataclasses"):
    result_cache.to_json({"x": object()})
  with pytest.raises(TypeError, match=r"Expected str in a stored result, got 3"):
    result_cache.from_json(tuple[str, ...], [3])


def test_a_result_is_computed_once_per_key(tmp_path):
  cache = result_cache.ResultCache(tmp_path / "new" / "folder")
  calls = []

  def make():
    calls.append(1)
    return outer(len(calls))

  first = cache.get(Outer, "thing", {"n": 1}, make)
  assert cache.get(Outer, "thing", {"n": 1}, make) == first and len(calls) == 1
  others = [("thing", {"n": 2}), ("other", {"n": 1})]
  assert [cache.get(Outer, name, key, make).inner.value for name, key in others] == [2, 3]
  assert len(list((tmp_path / "new" / "folder").iterdir())) == 3


def test_a_new_version_of_the_numbers_is_computed_anew(tmp_path, monkeypatch):
  cache = result_cache.ResultCache(tmp_path)
  cache.get(Outer, "thing", {}, outer)
  monkeypatch.setattr(result_cache, "VERSION", result_cache.VERSION + 1)
  assert cache.get(Outer, "thing", {}, lambda: outer(9.0)).inner.value == 9.0


def test_a_damaged_file_is_named(tmp_path):
  cache = result_cache.ResultCache(tmp_path)
  cache.get(Outer, "thing", {}, outer)
  path = cache.path("thing", {})
  path.write_text(path.read_text("utf-8")[:-40], "utf-8")
  with pytest.raises(ValueError, match=rf"stored result of thing in {path}.*delete"):
    cache.get(Outer, "thing", {}, outer)


def test_prompts_differ_by_text_reference_and_order():
  one, two = Prompt("a", "x", ("r",)), Prompt("b", "y", ("r",))
  digests = {
    result_cache.prompts_digest(prompts)
    for prompts in ([one, two], [two, one], [one], [Prompt("a", "x", ("s",)), two])
  }
  assert len(digests) == 4
