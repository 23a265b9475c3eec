"""Rows of a file, one at a time: JSON Lines, a JSON array, plain text, CSV, TSV, Parquet.

What is read is bounded: no small file, packed or not, fills the memory.
"""

import csv
import dataclasses
import gzip
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

from calm import storage

# The names of the formats, and what messages call them.
FORMATS = {
  "jsonl": "JSON Lines",
  "json": "a JSON array",
  "text": "plain text, a prompt a line",
  "csv": "CSV",
  "tsv": "TSV",
  "parquet": "Parquet",
}
GZIP_MAGIC = b"\x1f\x8b"
# Bytes that every line and row counts for besides its own: each takes time, even when empty.
ROW = 512


class Gzip(gzip.GzipFile):
  """A gzip file that unpacks to at most 256 MiB and 200 times its size, lines and rows counted.

  Args:
    file: the packed file.
    name: for messages.
  """

  def __init__(self, file: BinaryIO, name: str):
    self._most, self._called, self._rows = storage.most_unpacked(file.seek(0, 2)), name, 0
    file.seek(0)
    super().__init__(fileobj=file, mode="rb")

  def count_rows(self, count: int = 1) -> None:
    """Counts rows; ValueError beyond the bound."""
    self._rows += count
    self._checked(b"")

  def read(self, size: int | None = -1) -> bytes:
    """As of any file; ValueError beyond the bound."""
    left = self._most + 1 - self.tell()
    return self._checked(super().read(left if size is None or size < 0 else min(size, left)))

  def readline(self, size: int | None = -1) -> bytes:  # pyright: ignore[reportIncompatibleMethodOverride]
    """As of any file; ValueError beyond the bound."""
    left = self._most + 1 - self.tell()
    self._rows += 1
    return self._checked(super().readline(left if size is None or size < 0 else size))

  def _checked(self, content: bytes) -> bytes:
    if self.tell() + ROW * self._rows > self._most:
      raise ValueError(
        f"Expected {self._called!r} to unpack to at most {storage.UNPACKED_RATIO} times its"
        f" size, with {ROW} bytes more for each line and row, got more; it is made to fill the"
        " memory."
      )
    return content


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
  for number, line in enumerate(storage.lines(file, name), start=1):
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
      raise ValueError(
        f"{where}: expected one JSON object a line, got invalid JSON ({error}); where these are"
        " plain texts, name the file .txt, or say `--prompts_format=text`."
      ) from error
    yield _checked(Row(value, f"{stem}/{number}", where))


def json_array(file: BinaryIO, name: str, stem: str) -> Iterator[Row]:
  """A JSON array of objects or texts, which is read whole."""
  content = file.read(storage.LONGEST_LINE + 1)
  if len(content) > storage.LONGEST_LINE:
    raise ValueError(
      f"{name}: expected a JSON array of at most {storage.LONGEST_LINE} bytes, got more; save"
      ' the rows as JSON Lines: python -c "import json, sys; [print(json.dumps(row)) for row in'
      f' json.load(sys.stdin)]" < {name} > {stem}.jsonl'
    )
  if isinstance(file, Gzip):  # parsed, empty lists and objects take much more than their bytes
    file.count_rows(content.count(b"[") + content.count(b"{"))
  try:
    values = storage.parse_json(content.decode("utf-8-sig"))
  except UnicodeDecodeError as error:
    raise ValueError(
      f"Expected prompts in UTF-8, got the byte 0x{content[error.start]:02x} in {name}; save"
      " the text as UTF-8."
    ) from error
  except ValueError as error:
    raise ValueError(
      f"{name}: expected a whole JSON array, got JSON that is invalid or cut off ({error});"
      " copy the file again."
    ) from error
  if not isinstance(values, list):
    raise ValueError(f"{name}: expected a JSON array, got {type(values).__name__}.")
  for number, value in enumerate(values, start=1):
    yield _checked(Row(value, f"{stem}/{number}", f"{name}, element {number}"))


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
        if size > storage.LONGEST_LINE:
          raise ValueError(
            f"Expected {name!r} to hold rows of at most {storage.LONGEST_LINE} bytes, got a"
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
