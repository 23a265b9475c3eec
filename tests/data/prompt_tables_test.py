"""Rows in memory as a notebook has them, and what only looks like a list of texts."""

import numpy as np
import pytest

from calm.calibrate import Prompt
from calm.data import prompt_tables

ROWS = {
  "id": ["a", "b", "c"],
  "input": ["one text", "two", "three"],
  "target": [["x", "y"], ["z"], None],
  "source": [7, 7, 8],
}
WANTED = (
  Prompt("a", "one text", ("x", "y"), "7"),
  Prompt("b", "two", ("z",), "7"),
  Prompt("c", "three", (), "8"),
)


class Frame(dict):
  """What pandas and polars have in common, with numpy's values, as Parquet files give them."""

  columns = property(lambda self: list(self))


def numpys():
  targets = [np.array(["x", "y"], object), np.array(["z"], object), float("nan")]
  return Frame(ROWS, target=targets, source=np.array([7, 7, 8]))


def made(library):
  return pytest.importorskip(library, reason=f"{library} is not installed").DataFrame(ROWS)


FRAMES = {"numpy": numpys, "pandas": lambda: made("pandas"), "polars": lambda: made("polars")}


@pytest.mark.parametrize("name", FRAMES)
def test_a_table_is_read_as_a_file_is(name):
  frame = FRAMES[name]()
  assert prompt_tables.is_table(frame)
  assert prompt_tables.prompts_of(frame) == WANTED


def test_lists_of_texts_mappings_and_prompts_are_read():
  rows = [dict(zip(ROWS, values, strict=True)) for values in zip(*ROWS.values(), strict=True)]
  assert prompt_tables.prompts_of(rows) == prompt_tables.prompts_of(WANTED) == WANTED
  texts = prompt_tables.prompts_of(np.array(["a", "b"]))
  assert texts == (Prompt("prompt/1", "a"), Prompt("prompt/2", "b"))
  (named,) = prompt_tables.prompts_of([{"description": "a"}], input_key="description")
  assert named.input == "a"


def test_what_is_no_prompt_is_named_with_its_number():
  with pytest.raises(TypeError, match="put it in a list"):
    prompt_tables.prompts_of("one text")
  with pytest.raises(TypeError, match=r"got nan as number 2; leave it out"):
    prompt_tables.prompts_of(["a", float("nan")])
  with pytest.raises(ValueError, match=r"prompt 1: expected a field `input` or .*\['words'\]"):
    prompt_tables.prompts_of(Frame(words=["a"]))
  with pytest.raises(ValueError, match="prompt 2: expected `input` to be a string"):
    prompt_tables.prompts_of(Frame(input=["a", float("nan")]))


@pytest.mark.parametrize("texts", ["one text", Frame(ROWS), [WANTED[0]], [{"input": "a"}]])
def test_what_is_no_list_of_texts_is_refused(texts):
  with pytest.raises(TypeError, match=r"Expected `texts` .*, got .*; .*list"):
    prompt_tables.check_texts(texts)
  prompt_tables.check_texts(np.array(["a", "b"]))
