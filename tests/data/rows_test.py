"""Parquet files that stand for more than they hold, and honest ones of every kind."""

import resource

import pyarrow
import pytest
from pyarrow import parquet

from calm.data import prompt_files
from calm.data import rows as rows_of_files
from tests.spent import Spent

LONG = "x" * 10**6


def repeated(value, count: int):
  """A column of one value, as a dictionary of one."""
  return pyarrow.DictionaryArray.from_arrays([0] * count, pyarrow.array([value]))


def one_list(values):
  """All values in the list of one row."""
  offsets = pyarrow.array([0, len(values)], pyarrow.int32())
  return {"input": ["a"], "targets": pyarrow.ListArray.from_arrays(offsets, values)}


SHARED = {"use_dictionary": False, "column_encoding": {"input": "DELTA_BYTE_ARRAY"}}
# Name -> (makes the columns, how they are written).
BOMBS = {
  "a text, repeated": (lambda: {"input": repeated(LONG, 20_000)}, {}),
  "a list of one text": (lambda: one_list(repeated(LONG, 20_000)), {}),
  "a text of zeros": (lambda: {"input": [LONG * 500]}, {}),
  "texts that share": (lambda: {"input": [LONG] * 1000}, SHARED),
  "a list of zeros": (lambda: one_list(pyarrow.array([0] * 50_000_000, pyarrow.int8())), {}),
  "rows of nothing": (lambda: {"input": pyarrow.nulls(10_000_000, pyarrow.string())}, {}),
}


@pytest.mark.parametrize("name", BOMBS)
def test_what_is_packed_to_fill_the_memory_is_refused(tmp_path, name):
  made, written = BOMBS[name]
  path = tmp_path / "bomb.parquet"
  common = {"store_schema": False, "write_statistics": False, "compression": "zstd"}
  parquet.write_table(pyarrow.table(made()), path, **common, **written)
  assert path.stat().st_size < 500_000
  spent, before = Spent(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  with pytest.raises(ValueError, match=r"bomb\.parquet' to .*JSON Lines"):
    list(prompt_files.open_prompts(path))
  assert spent.seconds < 10
  assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 2**30


@pytest.mark.parametrize("column", ["input", "targets.list.element"])
def test_texts_without_a_dictionary_are_refused(tmp_path, column):
  """One row of these may hold any number of any length."""
  path = tmp_path / "rows.parquet"
  table = pyarrow.table({"input": ["a"], "targets": [["a", "ab"]]})
  parquet.write_table(table, path)
  assert [prompt.targets for prompt in prompt_files.open_prompts(path)] == [("a", "ab")]
  parquet.write_table(
    table, path, use_dictionary=False, column_encoding={column: "DELTA_BYTE_ARRAY"}
  )
  with pytest.raises(ValueError, match=r"to hold plain texts, got .*DELTA_.* as JSON Lines"):
    prompt_files.open_prompts(path)


def rows(count: int) -> dict:
  texts = [None if i % 7 == 3 else f"text {i % 5} {'y' * (i % 11)}" for i in range(count)]
  kinds = {"large": pyarrow.large_string(), "view": pyarrow.string_view()}
  return {
    "input": texts,
    **{name: pyarrow.array(texts, kind) for name, kind in kinds.items()},
    "category": pyarrow.array(texts).dictionary_encode(),
    "targets": [None if i % 5 == 2 else texts[i : i + i % 3] for i in range(count)],
    "numbers": [list(range(i % 4)) for i in range(count)],
    "score": [i / 3 for i in range(count)],
    "image": [b"\xff"] * count,
    "key": pyarrow.array([b"\xff" * 4] * count, pyarrow.binary(4)),
    "day": pyarrow.array([2**40] * count, pyarrow.timestamp("s", "Nowhere/Land")),
  }


@pytest.mark.parametrize(
  "written",
  [
    {},
    {"use_dictionary": False},
    {"dictionary_pagesize_limit": 32, "write_batch_size": 8, "data_page_size": 16},
  ],
)
def test_rows_are_those_that_were_written(tmp_path, written):
  columns = rows(2500)
  path = tmp_path / "rows.parquet"
  parquet.write_table(pyarrow.table(columns), path, **written)
  with path.open("rb") as file:
    found = [row.value for row in rows_of_files.read(file, "parquet", "rows", "rows")]
  plain = {
    name: column for name, column in columns.items() if name not in ("image", "key", "day")
  }
  assert found == pyarrow.table(plain).to_pylist()
