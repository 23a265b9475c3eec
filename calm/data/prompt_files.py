"""Prompts from files of any format, from standard input, and from rows in memory.

The text of a row is in the first of `INPUT_KEYS` or in a named field; `id`, references (in the
first of `TARGET_KEYS` or in a named field) and `source` (or `group`) are optional.

A file is read twice, so that its texts do not fill the memory: once to check and count it, and
once for the work, which refuses a file that was written to meanwhile. A stream is kept on the
disk.
"""

import contextlib
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


class PromptFile:
  """Prompts of a file or a stream, checked and counted; iterate over them any number of times.

  Attributes:
    name: the file, for messages; 'standard input' for that.
    format: a name of `rows.FORMATS`.
    input_key: the field with the text of a row; None where rows are texts.
  """

  def __init__(
    self, path: str | os.PathLike, format: str | None = None, *, streams: bool = True
  ):
    self._path = pathlib.Path(path)
    self._kept: BinaryIO | None = None  # the content of a stream
    self.name, self._stem = str(path), self._path.name.split(".")[0]
    if self.name == "-":
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
          " in it (Hugging Face: `datasets.load_from_disk(FOLDER)['train'].to_json('FILE')`)."
        )
      if not stat.S_ISREG(mode):
        with open(path, "rb") if streams else storage.opened(self._path) as file:
          self._keep(file)
    self.format = format or self._detect_format()
    self.input_key: str | None = None
    self._target_key: str | None = None
    self._limit: int | None = None
    self._count = self._blank = 0

  @property
  def taken(self) -> str:
    """The detected format and field, like `prompts.csv: 12 prompts, CSV, column 'text'`."""
    count = "1 prompt" if len(self) == 1 else f"{len(self)} prompts"
    count += f" ({self._blank} without any text)" if self._blank else ""
    parts = [count, rows.FORMATS[self.format]]
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
      yield _prompt_of(row, self.input_key, self._target_key)
    self._check_unchanged()

  def _written(self) -> tuple[int, ...] | None:
    """When the file was written to, and its size; None for a stream or where it is gone."""
    if self._kept or not self._path.exists():
      return None
    status = self._path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns

  def _check_unchanged(self) -> None:
    if self._written() != self._first:
      raise ValueError(
        f"Expected {self.name} to stay as it was when its {len(self)} rows were counted, got"
        " another file: it was changed while it was in use; start again."
      )

  def check(
    self, input_key: str | None, target_key: str | None = None, limit: int | None = None
  ) -> None:
    """The first pass: checks and counts the prompts; errors as of `open_prompts`."""
    self._limit = None if limit is None else min(limit, sys.maxsize)
    self._first = self._written()
    self._target_key = target_key
    for _, prompt in itertools.islice(self.read(input_key), self._limit):
      self._count += 1
      self._blank += not prompt.input.strip()
    if not self._count:
      raise ValueError(
        f"Expected {self.name} to hold prompts, got no examples: no line with text, or no row,"
        f" read as {rows.FORMATS[self.format]}; write one, or name the format."
      )

  def read(self, input_key: str | None) -> Iterator[tuple[rows.Row, Prompt]]:
    """Rows with their prompts, whose ids do not repeat; errors as of `open_prompts`."""
    seen: set[int] = set()
    for number, row in enumerate(self._rows()):
      if number == 0:
        self.input_key = _key_of(row, input_key)
      prompt = _prompt_of(row, self.input_key, self._target_key)
      if isinstance(row.value, Mapping):  # a text is named by its number, which is no other's
        if hash(prompt.id) in seen:
          raise row.error(
            f"expected every `id` once, got {prompt.id!r} of an earlier row again (a row"
            " without an `id` is named by its number); give every row its own, or none"
          )
        seen.add(hash(prompt.id))
      yield row, prompt

  def _rows(self) -> Iterator[rows.Row]:
    with self._open() as file:
      yield from rows.read(file, self.format, self.name, self._stem)

  @contextlib.contextmanager
  def _open(self) -> Iterator[BinaryIO]:
    """The bytes from the beginning on, unpacked."""
    try:
      with contextlib.ExitStack() as stack:
        file = self._kept or stack.enter_context(self._path.open("rb"))
        file.seek(0)
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        yield stack.enter_context(rows.Gzip(file, self.name)) if packed else file  # pyright: ignore[reportReturnType]
    except (EOFError, OSError, zlib.error) as error:  # of gzip those without a number
      kind = type(error) if getattr(error, "errno", None) else ValueError
      raise kind(
        f"Expected {self.name!r} to be a whole file that can be read, got: {error}; copy it"
        " again, or give another."
      ) from error

  def _detect_format(self) -> str:
    """The format of a file, by its name or else by its beginning."""
    suffixes = [s for s in map(str.lower, self._path.suffixes) if s != ".gz"]
    if suffixes and suffixes[-1] in _SUFFIXES:
      return _SUFFIXES[suffixes[-1]]
    with self._open() as file:
      head = file.read(2**16)
    if head.startswith(b"PAR1"):
      return "parquet"
    text = head.decode("utf-8-sig", "replace").lstrip()
    if re.match(r'\[\s*[{"\]]', text):
      return "json"
    line, ended, _ = text.partition("\n")
    if ended or len(head) < 2**16:
      try:
        is_object = isinstance(json.loads(line), dict)
      except (ValueError, RecursionError):
        is_object = False
    else:  # a line that is longer than the beginning
      is_object = re.match(r'\{\s*"', line) is not None
    return "jsonl" if suffixes[-1:] == [".json"] or is_object else "text"

  def _keep(self, stream: BinaryIO) -> None:
    """Keeps a stream's content in a file of no name."""
    if stream.isatty():
      print("Prompts, one a line; end with Ctrl-D:", file=sys.stderr)
    elif _is_device(stream):
      raise ValueError(
        f"Expected {self.name} to be a file or a pipe, got a device, which need not end; copy"
        " a part of it to a file."
      )
    self._kept = tempfile.TemporaryFile()  # noqa: SIM115 (closed with its owner)
    weakref.finalize(self, self._kept.close)
    self._kept.writelines(_pieces(stream))


def open_prompts(
  path: str | os.PathLike,
  *,
  limit: int | None = None,
  input_key: str | None = None,
  target_key: str | None = None,
  format: str | None = None,
) -> PromptFile:
  """Checks and counts the prompts of a file.

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
  prompts = PromptFile(path, format)
  prompts.check(input_key, target_key, limit)
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
    raise row.error(
      "expected all rows to be objects, or all to be texts, got both; give them as two files"
    )
  fields = {"": row.value} if isinstance(row.value, str) else row.value
  for key in (input_key, target_key):
    if key is not None and key not in fields:
      raise row.error(
        f"expected a field `{key}`, got {list(fields)[:12]}; name another, or none"
      )
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
  made: tuple[str, ...] = ()
  if isinstance(texts, str) or arguments.is_table(texts) or not arguments.is_listing(texts):
    got = "a table" if arguments.is_table(texts) else repr(texts)[:60]
  else:
    made = tuple(texts)
    got = next((repr(text)[:60] for text in made if not isinstance(text, str)), None)
  if got is not None:
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
    values = _records(values)
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
