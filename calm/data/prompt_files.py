"""Prompts from files of any format, from standard input, and from rows in memory.

The text of a row is in `input`, `inputs`, `prompt` or `text`, or in a named field; `id`,
`target` (or `targets`, `reference`, `references`) and `source` (or `group`) are optional.

A file is read twice, so that its texts do not fill the memory: once to check and count it, and
once for the work, which refuses a file that was written to meanwhile. A stream is kept on the
disk.
"""

import contextlib
import gzip
import itertools
import json
import os
import pathlib
import re
import select
import stat
import sys
import tempfile
import weakref
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

from calm import arguments, signals
from calm.calibrate import Prompt
from calm.data import row_formats

INPUT_KEYS = ("input", "inputs", "prompt", "text")
_TARGET_KEYS = ("target", "targets", "reference", "references")
_GROUP_KEYS = ("source", "group")
_SUFFIXES = {
  **{".jsonl": "jsonl", ".ndjson": "jsonl", ".txt": "text", ".csv": "csv"},
  **{".tsv": "tsv", ".tab": "tsv", ".parquet": "parquet", ".pq": "parquet"},
}

# Bytes read of a stream at once, and seconds between two looks at whether a signal came.
_PIECE, _WAIT_SECONDS = 2**16, 0.2


class PromptFile:
  """Prompts of a file or a stream, checked and counted; iterate over them any number of times.

  Attributes:
    name: the file, for messages; 'standard input' for that.
    format: a name of `row_formats.FORMATS`.
    input_key: the field with the text of a row; None where rows are texts.
  """

  def __init__(self, path: str | os.PathLike, format: str | None = None):
    self._path = pathlib.Path(path)
    self._kept: BinaryIO | None = None  # the content of a stream
    self.name, self._stem = str(path), self._path.name.split(".")[0]
    if str(path) == "-":
      self.name, self._stem = "standard input", "stdin"
      self._keep(sys.stdin.buffer)
    else:
      try:
        mode = os.stat(path).st_mode
      except OSError as error:
        raise type(error)(
          f"Expected `path` to name a file of prompts, got {str(path)!r}, which does not exist"
          f" or cannot be read ({error.strerror}); '-' reads standard input."
        ) from error
      if stat.S_ISDIR(mode):
        raise IsADirectoryError(
          f"Expected `path` to name a file of prompts, got {str(path)!r}, a folder; name a file"
          " in it."
        )
      if not stat.S_ISREG(mode):
        with open(path, "rb") as file:
          self._keep(file)
    self.format = format or self._detect_format()
    self.input_key: str | None = None
    self._limit: int | None = None
    self._count = 0

  @property
  def taken(self) -> str:
    """The detected format and field, like `prompts.csv: 12 prompts, CSV, column 'text'`."""
    count = "1 prompt" if len(self) == 1 else f"{len(self)} prompts"
    parts = [count, row_formats.FORMATS[self.format]]
    if self.input_key is not None:
      place = "column" if self.format in ("csv", "tsv", "parquet") else "key"
      parts.append(f"{place} {self.input_key!r}")
    return f"{self.name}: {', '.join(parts)}"

  def __len__(self) -> int:
    return self._count

  def __iter__(self) -> Iterator[Prompt]:
    self._check_unchanged()
    for row in itertools.islice(self._rows(), self._limit):
      self._check_unchanged()
      yield prompt_of(row, self.input_key)
    self._check_unchanged()

  def _written(self) -> tuple[int, ...] | None:
    """When the file was written to, and its size; None for a stream or where it is gone."""
    try:
      status = None if self._kept else os.stat(self._path)
    except OSError:
      status = None
    return status and (status.st_ino, status.st_size, status.st_mtime_ns)

  def _check_unchanged(self) -> None:
    if self._written() != self._first:
      raise ValueError(
        f"Expected {self.name} to stay as it was when its {len(self)} rows were counted, got"
        " another file: it was changed while it was in use; start again."
      )

  def check(self, input_key: str | None, limit: int | None = None) -> None:
    """The first pass: checks and counts the prompts; errors as of `open_prompts`."""
    self._limit = None if limit is None else min(limit, sys.maxsize)
    self._first = self._written()
    for row, _ in itertools.islice(self.read(input_key), self._limit):
      if not self._count:
        self.input_key = key_of(row, input_key)
      self._count += 1
    if not self._count:
      raise ValueError(
        f"Expected {self.name} to hold prompts, got no examples: no line with text, or no row,"
        f" read as {row_formats.FORMATS[self.format]}; write one, or name the format."
      )

  def read(self, input_key: str | None) -> Iterator[tuple[row_formats.Row, Prompt]]:
    """Rows with their prompts, whose ids do not repeat; errors as of `open_prompts`."""
    seen: set[int] = set()
    for number, row in enumerate(self._rows()):
      input_key = input_key if number else key_of(row, input_key)
      prompt = prompt_of(row, input_key)
      if isinstance(row.value, Mapping):  # a text is named by its number, which is no other's
        if hash(prompt.id) in seen:
          raise row.error(
            f"expected every `id` once, got {prompt.id!r} of an earlier row again (a row"
            " without an `id` is named by its number); give every row its own, or none"
          )
        seen.add(hash(prompt.id))
      yield row, prompt

  def _rows(self) -> Iterator[row_formats.Row]:
    with self._open() as file:
      for row in row_formats.READERS[self.format](file, self.name, self._stem):
        signals.check()
        if isinstance(file, row_formats.Gzip):
          file.count_rows()
        yield row

  @contextlib.contextmanager
  def _open(self) -> Iterator[BinaryIO]:
    """The bytes from the beginning on, unpacked."""
    try:
      with contextlib.ExitStack() as stack:
        file = self._kept or stack.enter_context(self._path.open("rb"))
        file.seek(0)
        packed = file.read(2) == row_formats.GZIP_MAGIC
        file.seek(0)
        yield stack.enter_context(row_formats.Gzip(file, self.name)) if packed else file  # pyright: ignore[reportReturnType]
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
      raise ValueError(
        f"{self.name}: expected whole gzip data, got some that are damaged or cut off"
        f" ({error}); copy the file again."
      ) from error
    except OSError as error:
      raise type(error)(
        f"Expected {self.name!r} to be a file that can be read, got:"
        f" {error.strerror or error}; copy it again, or give another."
      ) from error

  def _detect_format(self) -> str:
    """The format of a file, by its name or else by its beginning."""
    suffixes = [s for s in map(str.lower, self._path.suffixes) if s != ".gz"]
    named = _SUFFIXES.get(suffixes[-1]) if suffixes else None
    if named:
      return named
    with self._open() as file:
      head = file.read(2**16)
    if head.startswith(b"PAR1"):
      return "parquet"
    text = head.decode("utf-8-sig", "replace").lstrip()
    if re.match(r'\[\s*[{"\]]', text):
      return "json"
    line, ended, _ = text.partition("\n")
    if suffixes[-1:] == [".json"] or _is_object(line, whole=bool(ended) or len(head) < 2**16):
      return "jsonl"
    return "text"

  def _keep(self, stream: BinaryIO) -> None:
    if stream.isatty():
      print("Prompts, one a line; end with Ctrl-D:", file=sys.stderr)
    elif _is_device(stream):
      raise ValueError(
        f"Expected {self.name} to be a file or a pipe, got a device, which need not end; copy"
        " a part of it to a file."
      )
    kept = self._kept = tempfile.TemporaryFile()  # noqa: SIM115 (closed with its owner)
    weakref.finalize(self, kept.close)
    for piece in _pieces(stream):
      kept.write(piece)


def open_prompts(
  path: str | os.PathLike,
  *,
  limit: int | None = None,
  input_key: str | None = None,
  format: str | None = None,
) -> PromptFile:
  """Checks and counts the prompts of a file.

  Args:
    path: a file, a pipe, or '-' for standard input.
    limit: the number of prompts to take; None: all.
    input_key: the field with the text of a row; None: the first of `INPUT_KEYS` that the first
      row has.
    format: a name of `row_formats.FORMATS`; None: detected by the name, then by the content.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: there is no prompt, or a row is damaged, lacks its text or repeats an id; the
      message names file and line.
  """
  if limit is not None and limit < 1:
    raise ValueError(f"Expected `limit` of at least 1, or None for all, got {limit}.")
  if format is not None and format not in row_formats.FORMATS:
    raise ValueError(
      f"Expected `format` to be one of {', '.join(row_formats.FORMATS)}, got {format!r}."
    )
  prompts = PromptFile(path, format)
  prompts.check(input_key, limit)
  return prompts


def _pieces(stream: BinaryIO) -> Iterator[bytes]:
  """The bytes of a stream; a signal ends the waiting for them."""
  try:
    number = stream.fileno()
  except OSError:  # no file of the system's
    yield from iter(lambda: stream.read(_PIECE), b"")
    return
  while True:
    while os.name == "posix" and not select.select([number], (), (), _WAIT_SECONDS)[0]:
      signals.check()
    signals.check()
    if not (piece := os.read(number, _PIECE)):
      return
    yield piece


def _is_device(stream: BinaryIO) -> bool:
  try:
    status = os.fstat(stream.fileno())
  except OSError:  # a stream in memory
    return False
  null = os.path.exists(os.devnull) and os.path.samestat(status, os.stat(os.devnull))
  return stat.S_ISCHR(status.st_mode) and not null


def _is_object(line: str, *, whole: bool) -> bool:
  if not whole:  # a line that is longer than the beginning
    return re.match(r'\{\s*"', line) is not None
  try:
    return isinstance(json.loads(line), dict)
  except (ValueError, RecursionError):
    return False


def key_of(row: row_formats.Row, wanted: str | None) -> str | None:
  """The field that has the text of every row, by the first row; None where rows are texts."""
  if isinstance(row.value, str):
    if wanted is not None:
      raise row.error(f"expected rows with a key {wanted!r}, got a text; leave the key out")
    return None
  keys = INPUT_KEYS if wanted is None else (wanted,)
  found = next((key for key in keys if key in row.value), None)
  if found is None:
    raise row.error(
      f"expected a field {' or '.join(f'`{key}`' for key in keys)}, got"
      f" {list(row.value)[:12]}; call the one with the text `input`, or name it: `--input_key`"
    )
  return found


def prompt_of(row: row_formats.Row, input_key: str | None) -> Prompt:
  if isinstance(row.value, str) != (input_key is None):
    raise row.error(
      "expected all rows to be objects, or all to be texts, got both; give them as two files"
    )
  if isinstance(row.value, str):
    return Prompt(row.name, _text(row, None, row.value))
  assert input_key is not None
  if input_key not in row.value:
    raise row.error(f"expected a field `{input_key}`, got {list(row.value)[:12]}")
  name = row.value.get("id")
  group = _first(row.value, _GROUP_KEYS)
  return Prompt(
    row.name if name in (None, "") else _text(row, "id", _named(name)),
    _text(row, input_key, row.value[input_key]),
    _targets(row),
    None if group is None else _text(row, "source", _named(group)),
  )


def _targets(row: row_formats.Row) -> tuple[str, ...]:
  found = _first(row.value, _TARGET_KEYS)  # pyright: ignore[reportArgumentType]
  texts = [] if found is None else found if isinstance(found, list) else [found]
  return tuple(_text(row, "target", text) for text in texts)


def _first(value: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
  return next((value[key] for key in keys if value.get(key) is not None), None)


def _named(value: Any) -> Any:
  """The digits of a whole number, which is a name."""
  return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _text(row: row_formats.Row, key: str | None, value: Any) -> str:
  called = "the text" if key is None else f"`{key}`"
  if not isinstance(value, str):
    raise row.error(
      f"expected {called} to be a string, got {type(value).__name__} {value!r:.60}; write it"
      " as one"
    )
  try:
    value.encode("utf-8")
  except UnicodeEncodeError as error:
    raise row.error(
      f"expected {called} to be Unicode, got half of a surrogate pair,"
      f" {value[error.start]!r}, at character {error.start + 1}; write the whole character"
    ) from error
  return value


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
  """Prompts of rows in memory, by the same names as in files.

  Args:
    rows: a DataFrame of pandas or polars, or texts, mappings or `Prompt`s; those without an
      id are named by their number.
    input_key: where a row has its text; None: the first of `INPUT_KEYS` that the
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
  found, key, is_first = [], input_key, True
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
    key = key_of(row, input_key) if is_first else key
    found.append(prompt_of(row, key))
    is_first = False
  return tuple(found)


def _records(frame: Any) -> list[dict[str, Any]]:
  """Rows of a DataFrame with plain values; a missing one is None."""
  columns = {str(name): [_plain(value) for value in frame[name]] for name in frame.columns}
  return [
    dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
  ]


def _plain(value: Any) -> Any:
  """Numpy's and polars' values as Python's own."""
  made = next((getattr(value, n)() for n in ("tolist", "to_list") if hasattr(value, n)), value)
  return None if isinstance(made, float) and made != made else made
