"""Rows of a file, one at a time: JSON Lines, a JSON array, plain text, CSV, TSV, Parquet."""

import codecs
import csv
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

from calm import storage
from calm.data import bounded

# What each is called in messages.
FORMATS = {
  "jsonl": "JSON Lines",
  "json": "a JSON array",
  "text": "plain text, a prompt a line",
  "csv": "CSV",
  "tsv": "TSV",
  "parquet": "Parquet",
}
_READ = 2**16


@dataclasses.dataclass(frozen=True)
class Row:
  """One row.

  Attributes:
    value: fields by name, or a bare text.
    name: an id for a row that has none of its own.
    where: file and line, for messages.
  """

  value: Mapping[str, Any] | str
  name: str
  where: str

  def error(self, message: str) -> ValueError:
    """An error that names file and line."""
    return ValueError(f"{self.where}: {message}.")


def _lines(file: BinaryIO, name: str) -> Iterator[tuple[int, str]]:
  """(1-based number, text with its end) of every line.

  Lines end at newlines only: `splitlines` would end a prompt at characters that are no ends.
  """
  for number, line in enumerate(bounded.lines(file, name), start=1):
    if b"\0" in line:
      raise ValueError(
        f"Expected prompts in UTF-8, got the byte 0x00 in line {number} of {name}; save the"
        " text as UTF-8 (a text in UTF-16 has such bytes)."
      )
    try:
      # Some editors put a byte order mark before the first line.
      yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
      raise ValueError(
        f"Expected prompts in UTF-8, got invalid UTF-8, the byte 0x{line[error.start]:02x} in"
        f" line {number} of {name}; save the text as UTF-8."
      ) from error


def json_lines(file: BinaryIO, name: str, stem: str) -> Iterator[Row]:
  """One JSON object, or text, a line."""
  for number, line in _lines(file, name):
    if not line.strip():
      continue
    where = f"{name}:{number}"
    try:
      value = storage.parse_json(line)
    except ValueError as error:
      where_in_line = isinstance(error, json.JSONDecodeError) and f" at column {error.colno}"
      raise ValueError(
        f"{where}: expected one JSON object a line, got invalid JSON{where_in_line or ''}"
        f" ({error}); where these are plain texts, name the file .txt, or say"
        " `--prompts_format=text`."
      ) from error
    yield _checked(Row(value, f"{stem}/{number}", where))


def json_array(file: BinaryIO, name: str, stem: str) -> Iterator[Row]:
  """A JSON array of objects or texts, read element by element."""
  pieces = _Pieces(file, name)
  if pieces.next_character() != "[":
    raise ValueError(
      f"{name}: expected a JSON array, got no `[` at its beginning; name the format that it"
      " has."
    )
  pieces.drop(1)
  number, first = 0, True
  while (character := pieces.next_character()) != "]":
    if not first:
      if character != ",":
        raise ValueError(
          f"{name}: expected `,` or `]` after element {number} of the JSON array, got"
          f" {character or 'the end of the file'!r}."
        )
      pieces.drop(1)
    number, first = number + 1, False
    where = f"{name}, element {number}"
    yield _checked(Row(pieces.take(where), f"{stem}/{number}", where))
  pieces.drop(1)
  if rest := pieces.next_character():
    raise ValueError(
      f"{name}: expected the JSON array to end the file, got {rest!r} after its `]`; write one"
      " array, or JSON Lines."
    )


class _Pieces:
  """A text of which only a part is in memory."""

  def __init__(self, file: BinaryIO, name: str):
    self._file, self._name = file, name
    self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
    self._text, self._ended = "", False

  def next_character(self) -> str:
    """The next that is no space; '' at the end."""
    while True:
      self._text = self._text.lstrip()
      if self._text or not self._more(_READ):
        return self._text[:1]

  def drop(self, count: int) -> None:
    self._text = self._text[count:]

  def take(self, where: str) -> Any:
    """The next value."""
    self.next_character()
    size = _READ
    while True:
      try:
        value, end = json.JSONDecoder().raw_decode(self._text)
        storage.parse_json(self._text[:end])  # numbers that are none
      except json.JSONDecodeError as error:
        if len(self._text) <= bounded.LONGEST_LINE and self._more(size):
          size *= 2
          continue
        raise ValueError(
          f"{where}: expected whole JSON, got some that is invalid or cut off ({error.msg});"
          " copy the file again."
        ) from error
      except (ValueError, RecursionError) as error:
        what = error if isinstance(error, ValueError) else "too deep to be read"
        raise ValueError(
          f"{where}: expected JSON, got some that is none ({what}); write it again."
        ) from error
      self.drop(end)
      return value

  def _more(self, size: int) -> bool:
    """Whether there was more to read."""
    if self._ended:
      return False
    content = self._file.read(size)
    self._ended = not content
    try:
      self._text += self._decoder.decode(content, final=self._ended)
    except UnicodeDecodeError as error:
      raise ValueError(
        f"Expected prompts in UTF-8, got the byte 0x{error.object[error.start]:02x} in"
        f" {self._name}; save the text as UTF-8."
      ) from error
    return not self._ended


def _checked(row: Row) -> Row:
  if not isinstance(row.value, Mapping | str):
    raise row.error(
      f"expected a JSON object or a text, got {type(row.value).__name__}; write one a row"
    )
  return row


def plain_text(file: BinaryIO, name: str, stem: str) -> Iterator[Row]:
  """A prompt a line; blank lines are none."""
  called = stem if name == "standard input" else name.replace("\\", "/").rpartition("/")[2]
  count = 0
  for number, line in _lines(file, name):
    if line.strip():
      count += 1
      yield Row(line.rstrip("\n").strip("\r"), f"{called}/{count}", f"{name}:{number}")


def _table(delimiter: str) -> Callable[[BinaryIO, str, str], Iterator[Row]]:
  def read(file: BinaryIO, name: str, stem: str) -> Iterator[Row]:
    # The default limit of a field, 128 KiB, is shorter than documents are.
    csv.field_size_limit(2**31 - 1)
    size = 0  # of the lines of a row

    def lines() -> Iterator[str]:
      nonlocal size
      for _, line in _lines(file, name):
        size += len(line)
        if size > bounded.LONGEST_LINE:
          raise ValueError(
            f"Expected {name!r} to hold rows of at most {bounded.LONGEST_LINE} bytes, got a"
            " longer one; close the quote that it opens."
          )
        yield line

    rows = csv.reader(lines(), delimiter=delimiter, strict=True)
    try:
      header = next(rows, None)
      if header is None:
        return
      if len(set(header)) < len(header):
        raise ValueError(
          f"{name}: expected columns of different names, got {header}; rename those"
          " that repeat."
        )
      for number, cells in enumerate((row for row in rows if row), start=1):
        size = 0
        row = Row({}, f"{stem}/{number}", f"{name}:{rows.line_num}")
        if len(cells) != len(header):
          raise row.error(
            f"expected {len(header)} columns as in the header, got {len(cells)}; quote texts"
            f" that hold {delimiter!r}"
          )
        yield dataclasses.replace(row, value=dict(zip(header, cells, strict=True)))
    except csv.Error as error:
      raise ValueError(
        f"{name}:{rows.line_num}: expected cells that can be read, got: {error}; mend the line."
      ) from error

  return read


def parquet(file: BinaryIO, name: str, stem: str) -> Iterator[Row]:
  """Rows of a Parquet file, a batch of them in memory (needs pyarrow)."""
  try:
    from calm.data import parquet_rows
  except ImportError as error:
    raise ImportError(
      f"Expected the package pyarrow to read {name}, got none; `pip install pyarrow`, or save"
      " the rows as JSON Lines."
    ) from error
  for number, value in enumerate(parquet_rows.rows(file, name), start=1):
    yield Row(value, f"{stem}/{number}", f"{name}, row {number}")


READERS: Mapping[str, Callable[[BinaryIO, str, str], Iterator[Row]]] = {
  "jsonl": json_lines,
  "json": json_array,
  "text": plain_text,
  "csv": _table(","),
  "tsv": _table("\t"),
  "parquet": parquet,
}
