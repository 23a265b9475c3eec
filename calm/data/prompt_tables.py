"""Prompts from what a notebook has: a DataFrame, or a list of texts, mappings or prompts."""

from collections.abc import Mapping
from typing import Any

from calm import arguments
from calm.calibrate import Prompt
from calm.data import prompt_files, row_formats

_UNKNOWN = object()


def is_table(value: Any) -> bool:
  """Whether a value is a DataFrame; pandas and polars are not imported for it."""
  return hasattr(value, "columns") and hasattr(value, "__getitem__")


def check_texts(texts: Any) -> tuple[str, ...]:
  """Texts of any ordered iterable; TypeError where it is something else that iterates."""
  way_out = "give a list of texts, like `table['input']`, or `[prompt.input, ...]`."
  if isinstance(texts, str):
    raise TypeError("Expected `texts` to be a list of prompts, got one text; put it in a list.")
  if is_table(texts):
    raise TypeError(f"Expected `texts` to be a list of prompts, got a table; {way_out}")
  if not arguments.is_listing(texts):
    raise TypeError(f"Expected `texts` to be a list of texts, got {texts!r:.60}; {way_out}")
  texts = tuple(texts)
  odd = [text for text in texts if not isinstance(text, str)]
  if odd:
    raise TypeError(f"Expected `texts` to be a list of texts, got {odd[0]!r:.60}; {way_out}")
  return texts


def prompts_of(rows: Any, *, input_key: str | None = None) -> tuple[Prompt, ...]:
  """Prompts of rows in memory, by the same names as in files; see `prompt_files`.

  Args:
    rows: a DataFrame of pandas or polars, or texts, mappings or `Prompt`s; those without an
      id are named by their number.
    input_key: where a row has its text; None: the first of `prompt_files.INPUT_KEYS` that the
      first row has.

  Raises:
    TypeError: one text instead of a list, or something that is no prompt.
    ValueError: a row lacks its text, or has one that is no text (names the row).
  """
  if isinstance(rows, str):
    raise TypeError("Expected `prompts` to be a list, got one text; put it in a list.")
  if not arguments.is_listing(rows) and not is_table(rows):
    raise TypeError(
      f"Expected `prompts` to be a list, got {rows!r:.60}; give texts, `Prompt`s or a table."
    )
  found, key = [], _UNKNOWN
  for number, value in enumerate(_records(rows) if is_table(rows) else rows, start=1):
    if isinstance(value, Prompt):
      found.append(value)
      continue
    if not isinstance(value, str | Mapping):
      raise TypeError(
        "Expected prompts to be texts, mappings with a text at `input`, or `Prompt`s, got"
        f" {value!r:.60} as number {number}; leave it out, or give its text."
      )
    row = row_formats.Row(value, f"prompt/{number}", f"prompt {number}")
    key = prompt_files.key_of(row, input_key) if key is _UNKNOWN else key
    found.append(prompt_files.prompt_of(row, key))  # pyright: ignore[reportArgumentType]
  return tuple(found)


def _records(frame: Any) -> list[dict[str, Any]]:
  """Rows of a DataFrame with plain values; what is missing is None."""
  columns = {str(name): [_plain(value) for value in frame[name]] for name in frame.columns}
  return [
    dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
  ]


def _plain(value: Any) -> Any:
  """Numpy's and polars' values as Python's own."""
  made = next((getattr(value, n)() for n in ("tolist", "to_list") if hasattr(value, n)), value)
  return None if isinstance(made, float) and made != made else made
