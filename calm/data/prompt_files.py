"""Prompts from files of any format, from standard input, and from rows in memory.

The text of a row, without a task prefix, is in the first of `INPUT_KEYS` or in a named field;
`id` (unique), references (in the first of `TARGET_KEYS` or in a named field: a text, or a list
of accepted ones, best first) and `source` (or `group`: its cluster) are optional.
"""

import contextlib
import itertools
import os
import pathlib
import re
import shutil
import stat
import sys
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

from calm import arguments, storage
from calm.calibrate import Prompt
from calm.data import rows

INPUT_KEYS = ("input", "inputs", "prompt", "text", "question")
TARGET_KEYS = ("target", "targets", "reference", "references", "output", "answer")
_GROUP_KEYS = ("source", "group")
_SUFFIXES = {
  **{".jsonl": "jsonl", ".ndjson": "jsonl", ".txt": "text", ".csv": "csv"},
  **{".tsv": "tsv", ".tab": "tsv", ".parquet": "parquet", ".pq": "parquet", ".arrow": "arrow"},
}
# Bytes read of a stream at once, and seconds between two looks at whether a signal came.
# What lists the files, or the splits, of a folder of Hugging Face's datasets; bytes of that.
_STATE, _SPLITS, _MOST_STATE = "state.json", "dataset_dict.json", 2**24
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
  require_target: bool = False,
) -> Prompts:
  """Reads the prompts of a file, all of which are checked before any is given out.

  Args:
    path: a file, a pipe, '-' for standard input, or a folder that `Dataset.save_to_disk` of
      Hugging Face's datasets wrote.
    limit: the number of prompts to take; None: all.
    input_key: the field with the text of a row; None: the first of `INPUT_KEYS` that the first
      row has.
    target_key: the field with the references; None: the first of `TARGET_KEYS` that a row has.
    format: a name of `rows.FORMATS`; None: detected by the name, then by the content.
    require_target: whether every row needs a reference.

  Raises:
    FileNotFoundError: there is no such file.
    IsADirectoryError: the folder is no data set, or holds one for each split.
    ValueError: there is no prompt, or a row is damaged, lacks its text or repeats an id; the
      message names file and line.
  """
  if limit is not None and limit < 1:
    raise ValueError(f"Expected `limit` of at least 1, or None for all, got {limit}.")
  if format is not None and format not in rows.FORMATS:
    raise ValueError(
      f"Expected `format` to be one of {', '.join(rows.FORMATS)}, got {format!r}."
    )
  made, key, limit = {}, None, None if limit is None else min(limit, sys.maxsize)
  with _opened(path) as (file, name):
    format = "arrow" if isinstance(file, list) else format or _detect_format(name, file)
    stem = (
      "stdin" if name == "standard input" else pathlib.Path(name).absolute().name.split(".")[0]
    )
    for row in itertools.islice(rows.read(file, format, name, stem), limit):
      key = key if made else _key_of(row, input_key)
      prompt = _prompt_of(row, key, target_key)
      if prompt.id in made:
        raise row.error(
          f"expected every `id` once, got {prompt.id!r} of an earlier row again (a row without"
          " an `id` is named by its number)"
        )
      if require_target and not prompt.targets:
        raise row.error("expected a field `target`, got none; give every row a reference")
      made[prompt.id] = prompt
  called, _ = rows.FORMATS[format]
  if not made:
    raise ValueError(
      f"Expected {name} to hold prompts, got no examples: no line with text, or no row,"
      f" read as {called}; write one, or name the format."
    )
  prompts = Prompts(made.values())
  blank = sum(not prompt.input.strip() for prompt in prompts)
  parts = ["1 prompt" if len(made) == 1 else f"{len(made)} prompts", called]
  parts[0] += f" ({blank} without any text)" if blank else ""
  if key is not None:
    place = "key" if format in ("jsonl", "json") else "column"
    parts.append(f"{place} {key!r}")
  prompts.taken = f"{name}: {', '.join(parts)}"
  return prompts


@contextlib.contextmanager
def _opened(path: str | os.PathLike) -> Iterator[tuple[Any, str]]:
  """(its bytes, unpacked; its name) of a file, or of a stream, which is kept on the disk; of a
  folder the list of its Arrow files."""
  name = "standard input" if str(path) == "-" else str(path)
  with contextlib.ExitStack() as stack:
    try:
      mode = None if str(path) == "-" else os.stat(path).st_mode
    except OSError as error:
      message = f"Expected `path` to name a file of prompts, got {name!r}"
      raise type(error)(f"{message} ({error.strerror}).") from error
    if mode is None:
      file = _kept(sys.stdin.buffer, name, stack)
    elif stat.S_ISDIR(mode):
      file = _arrow_files(pathlib.Path(path))
    elif stat.S_ISREG(mode):
      file = stack.enter_context(storage.opened(path))
    else:
      file = _kept(stack.enter_context(open(path, "rb")), name, stack)
    try:
      if isinstance(file, list):
        file = [stack.enter_context(storage.opened(each)) for each in file]
      else:
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        file = stack.enter_context(rows.Gzip(file, name)) if packed else file
      yield file, name
    except (EOFError, OSError, zlib.error) as error:  # of gzip and Arrow those without a number
      kind = type(error) if getattr(error, "errno", None) else ValueError
      raise kind(f"Expected {name!r} to be a whole file, got: {error}.") from error


def _arrow_files(folder: pathlib.Path) -> list[pathlib.Path]:
  """The files of a folder of `Dataset.save_to_disk`, which its state.json names, in order."""
  listed = lambda name: storage.parse_json(storage.content(folder / name, _MOST_STATE))
  try:
    if (folder / _SPLITS).is_file():
      splits = ", ".join(map(repr, listed(_SPLITS)["splits"]))
      raise IsADirectoryError(
        f"Expected `path` to name one split, got {str(folder)!r} with the splits {splits:.300};"
        f" give the folder of one, '{folder}/SPLIT'."
      )
    if not (folder / _STATE).is_file():
      raise IsADirectoryError(
        f"Expected `path` to name a file of prompts, got {str(folder)!r}, a folder without the"
        f" {_STATE} of Hugging Face's `Dataset.save_to_disk`; give a file in it."
      )
    names = [file["filename"] for file in listed(_STATE)["_data_files"]]
    if odd := [name for name in names if re.search(r"[/\\:\0]|^\.*$", name)]:
      raise ValueError(f"{odd[0]!r:.60} is no file of this folder")
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(
      f"Expected {str(folder)!r} to be a folder of `Dataset.save_to_disk`, got one whose"
      f" {_STATE} or {_SPLITS} lists something else ({error!r:.200}); save it again."
    ) from error
  return [folder / name for name in names]


def _kept(stream: BinaryIO, name: str, stack: contextlib.ExitStack) -> BinaryIO:
  """A stream's content in a file of no name."""
  try:
    status = os.fstat(stream.fileno())
  except OSError:  # a stream in memory
    status = None
  if stream.isatty():
    print("Prompts, one a line; end with Ctrl-D:", file=sys.stderr)
  elif status and stat.S_ISCHR(status.st_mode) and not os.path.samestat(status, _NULL):
    raise ValueError(f"Expected {name} to be a file or a pipe, got a device.")
  kept: BinaryIO = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
  shutil.copyfileobj(stream, kept)
  kept.seek(0)
  return kept


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
