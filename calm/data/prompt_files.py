"""Prompts from files of any format, from standard input, and from rows in memory.

The text of a row is in the first of `INPUT_KEYS` or in a named field; `id`, references (in the
first of `TARGET_KEYS` or in a named field) and `source` (or `group`) are optional.
"""

import contextlib
import itertools
import os
import pathlib
import re
import select
import stat
import sys
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

from calm import arguments, signals, storage
from calm.calibrate import Prompt
from calm.data import rows

INPUT_KEYS = ("input", "inputs", "prompt", "text", "question")
TARGET_KEYS = ("target", "targets", "reference", "references", "output", "answer")
_GROUP_KEYS = ("source", "group")
_SUFFIXES = {
  **{".jsonl": "jsonl", ".ndjson": "jsonl", ".txt": "text", ".csv": "csv"},
  **{".tsv": "tsv", ".tab": "tsv", ".parquet": "parquet", ".pq": "parquet"},
}
# Bytes read of a stream at once, and seconds between two looks at whether a signal came.
_PIECE, _WAIT_SECONDS = 2**16, 0.2
_NULL = os.stat(os.devnull)


class Prompts(tuple[Prompt, ...]):
  """Prompts, and in `taken` where they are from: `a.csv: 12 prompts, CSV, column 'text'`."""

  taken = ""


def open_prompts(
  path: str | os.PathLike,
  *,
  limit: int | None = None,
  input_key: str | None = None,
  target_key: str | None = None,
  format: str | None = None,
) -> Prompts:
  """Reads the prompts of a file, all of which are checked before any is given out.

  Args:
    path: a file, a pipe, or '-' for standard input.
    limit: the number of prompts to take; None: all.
    input_key: the field with the text of a row; None: the first of `INPUT_KEYS` that the first
      row has.
    target_key: the field with the references; None: the first of `TARGET_KEYS` that a row has.
    format: a name of `rows.FORMATS`; None: detected by the name, then by the content.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: there is no prompt, or a row is damaged, lacks its text or repeats an id; the
      message names file and line.
  """
  if limit is not None and limit < 1:
    raise ValueError(f"Expected `limit` of at least 1, or None for all, got {limit}.")
  if format is not None and format not in rows.FORMATS:
    raise ValueError(
      f"Expected `format` to be one of {', '.join(rows.FORMATS)}, got {format!r}."
    )
  made, key, limit = [], None, None if limit is None else min(limit, sys.maxsize)
  with opened(path) as (file, name):
    format = format or _detect_format(name, file)
    pairs = read(file, format, name, input_key, target_key)
    for row, prompt in itertools.islice(pairs, limit):
      key = key or _key_of(row, input_key)
      made.append(prompt)
  if not made:
    raise ValueError(
      f"Expected {name} to hold prompts, got no examples: no line with text, or no row,"
      f" read as {rows.FORMATS[format]}; write one, or name the format."
    )
  prompts, blank = Prompts(made), sum(not prompt.input.strip() for prompt in made)
  parts = ["1 prompt" if len(made) == 1 else f"{len(made)} prompts", rows.FORMATS[format]]
  parts[0] += f" ({blank} without any text)" if blank else ""
  if key is not None:
    place = "column" if format in ("csv", "tsv", "parquet") else "key"
    parts.append(f"{place} {key!r}")
  prompts.taken = f"{name}: {', '.join(parts)}"
  return prompts


@contextlib.contextmanager
def opened(path: str | os.PathLike, *, streams: bool = True) -> Iterator[tuple[BinaryIO, str]]:
  """(its bytes, unpacked; its name) of a file, or of a stream, which is kept on the disk."""
  name = "standard input" if str(path) == "-" else str(path)
  with contextlib.ExitStack() as stack:
    if str(path) == "-":
      file = _kept(sys.stdin.buffer, name, stack)
    else:
      try:
        mode = os.stat(path).st_mode
      except OSError as error:
        message = f"Expected `path` to name a file of prompts, got {str(path)!r}"
        raise type(error)(f"{message} ({error.strerror}).") from error
      if stat.S_ISDIR(mode):
        raise IsADirectoryError(
          f"Expected `path` to name a file of prompts, got {str(path)!r}, a folder (of Hugging"
          " Face: `datasets.load_from_disk(FOLDER)['train'].to_json('FILE')` makes a file)."
        )
      if streams and not stat.S_ISREG(mode):
        file = _kept(stack.enter_context(open(path, "rb")), name, stack)
      else:
        file = stack.enter_context(storage.opened(path))
    try:
      packed = file.read(2) == b"\x1f\x8b"
      file.seek(0)
      if packed:
        file = stack.enter_context(rows.Gzip(file, name))
      yield file, name  # pyright: ignore[reportReturnType]
    except (EOFError, OSError, zlib.error) as error:  # of gzip those without a number
      kind = type(error) if getattr(error, "errno", None) else ValueError
      raise kind(f"Expected {name!r} to be a whole file, got: {error}.") from error


def _kept(stream: BinaryIO, name: str, stack: contextlib.ExitStack) -> BinaryIO:
  """A stream's content in a file of no name; a signal ends the waiting for it."""
  try:
    number, status = stream.fileno(), os.fstat(stream.fileno())
  except OSError:  # a stream in memory
    number, status = None, None
  if stream.isatty():
    print("Prompts, one a line; end with Ctrl-D:", file=sys.stderr)
  elif status and stat.S_ISCHR(status.st_mode) and not os.path.samestat(status, _NULL):
    raise ValueError(f"Expected {name} to be a file or a pipe, got a device.")
  kept: BinaryIO = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
  kept.writelines(iter(lambda: stream.read(_PIECE), b"") if number is None else _pieces(number))
  kept.seek(0)
  return kept


def _pieces(number: int) -> Iterator[bytes]:
  """The bytes of a descriptor."""
  while True:
    while os.name == "posix" and not select.select([number], (), (), _WAIT_SECONDS)[0]:
      signals.check()
    signals.check()
    if not (piece := os.read(number, _PIECE)):
      return
    yield piece


def _detect_format(name: str, file: BinaryIO) -> str:
  """The format of a file, by its name or else by its beginning."""
  suffixes = [s for s in map(str.lower, pathlib.Path(name).suffixes) if s != ".gz"]
  if suffixes and suffixes[-1] in _SUFFIXES:
    return _SUFFIXES[suffixes[-1]]
  head = file.read(2**16)
  file.seek(0)
  if head.startswith(b"PAR1"):
    return "parquet"
  text = head.decode("utf-8-sig", "replace").lstrip()
  if re.match(r'\[\s*[{"\]]', text):
    return "json"
  return "jsonl" if suffixes[-1:] == [".json"] or re.match(r'\{\s*["}]', text) else "text"


def read(
  file: BinaryIO, format: str, name: str, input_key: str | None, target_key: str | None = None
) -> Iterator[tuple[rows.Row, Prompt]]:
  """Rows with their prompts, whose ids do not repeat; errors as of `open_prompts`."""
  seen: set[str] = set()
  key, stem = None, pathlib.Path(name).name.split(".")[0]
  stem = "stdin" if name == "standard input" else stem
  for number, row in enumerate(rows.read(file, format, name, stem)):
    key = _key_of(row, input_key) if number == 0 else key
    prompt = _prompt_of(row, key, target_key)
    if prompt.id in seen:
      raise row.error(
        f"expected every `id` once, got {prompt.id!r} of an earlier row again (a row without an"
        " `id` is named by its number)"
      )
    seen.add(prompt.id)
    yield row, prompt


def _key_of(row: rows.Row, wanted: str | None) -> str | None:
  """The field that has the text of every row, by the first row; None where rows are texts."""
  if isinstance(row.value, str):
    if wanted is not None:
      raise row.error(f"expected rows with a key {wanted!r}, got a text; leave the key out")
    return None
  keys = INPUT_KEYS if wanted is None else (wanted,)
  if found := [key for key in keys if key in row.value]:
    return found[0]
  raise row.error(
    f"expected a field {' or '.join(f'`{key}`' for key in keys)}, got"
    f" {list(row.value)[:12]}; call the one with the text `input`, or name it: `--input_key`"
  )


def _prompt_of(row: rows.Row, input_key: str | None, target_key: str | None) -> Prompt:
  if isinstance(row.value, str) != (input_key is None):
    raise row.error("expected all rows to be objects, or all to be texts, got both")
  fields = {"": row.value} if isinstance(row.value, str) else row.value
  for key in (input_key, target_key):
    if key is not None and key not in fields:
      raise row.error(f"expected a field `{key}`, got {list(fields)[:12]}")
  first = lambda keys: next((fields[key] for key in keys if fields.get(key) is not None), None)
  targets, name = first((target_key,) if target_key else TARGET_KEYS), fields.get("id")
  targets = [] if targets is None else targets if isinstance(targets, list) else [targets]
  name = str(name) if type(name) is int else name  # its digits are a name
  try:
    name = row.name if name in (None, "") else name
    return Prompt(name, fields[input_key or ""], targets, first(_GROUP_KEYS))  # pyright: ignore
  except ValueError as error:
    raise row.error(str(error).replace("Expected", "expected", 1)) from error


def check_texts(texts: Any) -> tuple[str, ...]:
  """Texts of any ordered iterable; TypeError where it is something else that iterates."""
  listed = not isinstance(texts, str) and arguments.is_listing(texts)
  made = tuple(texts) if listed else (texts,)
  if not listed or not all(isinstance(text, str) for text in made):
    odd = texts if not listed else next(text for text in made if not isinstance(text, str))
    got = "a table" if arguments.is_table(texts) else f"{odd!r:.60}"
    raise TypeError(
      f"Expected `texts` to be a list of texts, got {got}; put it in a list, or give"
      " `table['input']`, or `[prompt.input, ...]`."
    )
  return made


def prompts_of(
  values: Any, *, input_key: str | None = None, target_key: str | None = None
) -> tuple[Prompt, ...]:
  """Prompts of rows in memory, by the same names as in files.

  Args:
    values: a DataFrame of pandas or polars, or texts, mappings or `Prompt`s; those without an
      id are named by their number.
    input_key, target_key: where a row has its text and its references; None: as in files.

  Raises:
    TypeError: one text instead of a list, or something that is no prompt.
    ValueError: a row lacks its text, or has one that is no text (names the row).
  """
  if arguments.is_table(values):
    columns = {str(name): map(_plain, values[name]) for name in values.columns}
    cells = zip(*columns.values(), strict=True)
    values = [dict(zip(columns, row, strict=True)) for row in cells]
  elif isinstance(values, str) or not arguments.is_listing(values):
    raise TypeError(
      f"Expected `prompts` to be a list, got {values!r:.60}; put it in a list, or give"
      " texts, `Prompt`s or a table."
    )
  found: list[Prompt] = []
  keys: list[str | None] = []  # that of the first row
  for number, value in enumerate(values, start=1):
    if isinstance(value, Prompt):
      found.append(value)
    elif isinstance(value, str | Mapping):
      row = rows.Row(value, f"prompt/{number}", f"prompt {number}")
      keys = keys or [_key_of(row, input_key)]
      found.append(_prompt_of(row, keys[0], target_key))
    else:
      raise TypeError(
        "Expected prompts to be texts, mappings with a text at `input`, or `Prompt`s, got"
        f" {value!r:.60} as number {number}; leave it out, or give its text."
      )
  return tuple(found)


def _plain(value: Any) -> Any:
  """Numpy's and polars' values as Python's own, a missing one as None."""
  made = next((getattr(value, n)() for n in ("tolist", "to_list") if hasattr(value, n)), value)
  return None if isinstance(made, float) and made != made else made
