"""Rows of a file, one at a time: JSON Lines, a JSON array, plain text, CSV, TSV, Parquet.

What is read is bounded: no small file, packed or not, fills the memory.
"""

import csv
import dataclasses
import gzip
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np

from calm import signals, storage

# The names of the formats, and what messages call them.
FORMATS = {
  "jsonl": "JSON Lines",
  "json": "a JSON array",
  "text": "plain text, a prompt a line",
  "csv": "CSV",
  "tsv": "TSV",
  "parquet": "Parquet",
}
# Bytes that every line and row counts for besides its own: each takes time, even when empty.
_ROW = 512
# What the least of Parquet's rows and of their values takes; a file may say 10**9 of either.
_PARQUET_ROW, _PARQUET_VALUE = 64, 8
# Bytes of a stored batch of a Parquet file, and rows that are written out at once.
_BATCH_BYTES, _BATCH_ROWS = 2**26, 1024


class Gzip(gzip.GzipFile):
  """A gzip file that unpacks to at most `storage.most_unpacked`, lines and rows counted.

  Args:
    file: the packed file.
    name: for messages.
  """

  def __init__(self, file: BinaryIO, name: str):
    self._most, self._called, self._rows = storage.most_unpacked(file.seek(0, 2)), name, 0
    file.seek(0)
    super().__init__(fileobj=file, mode="rb")

  def count_rows(self, count: int = 1) -> None:
    """Counts rows; ValueError where they and the bytes so far are beyond the bound."""
    self._rows += count
    if self.tell() + _ROW * self._rows > self._most:
      raise ValueError(
        f"Expected {self._called!r} to unpack to at most {storage.UNPACKED_RATIO} times its"
        f" size, with {_ROW} bytes more for each line and row, got more; it is made to fill the"
        " memory."
      )

  def read(self, size: int | None = -1) -> bytes:
    left = self._most + 1 - self.tell()
    content = super().read(left if size is None or size < 0 else min(size, left))
    self.count_rows(0)
    return content

  def readline(self, size: int | None = -1) -> bytes:  # pyright: ignore[reportIncompatibleMethodOverride]
    line = super().readline(size)
    self.count_rows()
    return line


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


def read(file: BinaryIO, format: str, name: str, stem: str) -> Iterator[Row]:
  """Rows of an open file.

  Args:
    file: its bytes, or a `Gzip` of them.
    format: a name of `FORMATS`.
    name: the file, for messages.
    stem: what rows without an id are named after.

  Raises:
    ValueError: the file is damaged or beyond a bound; the message names it and the line.
  """
  for row in _READERS[format](file, name, stem):
    signals.check()
    if isinstance(file, Gzip):
      file.count_rows()
    if not isinstance(row.value, Mapping | str):
      raise row.error(
        f"expected a JSON object or a text, got {type(row.value).__name__}; write one a row"
      )
    yield row


def _not_utf8(byte: int, where: str) -> ValueError:
  return ValueError(
    f"Expected prompts in UTF-8, got the byte 0x{byte:02x} in {where}; save the text as UTF-8"
    " (a text in UTF-16 has bytes 0x00)."
  )


def _lines(file: BinaryIO, name: str) -> Iterator[tuple[int, str]]:
  """(1-based number, text with its end) of every line.

  Lines end at newlines only: `splitlines` would end a prompt at characters that are no ends.
  """
  for number, line in enumerate(storage.lines(file, name), start=1):
    if b"\0" in line:
      raise _not_utf8(0, f"line {number} of {name}")
    try:
      # Some editors put a byte order mark before the first line.
      yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
      raise _not_utf8(line[error.start], f"line {number} of {name}") from error


def _json_lines(file: BinaryIO, name: str, stem: str) -> Iterator[Row]:
  for number, line in _lines(file, name):
    if line.strip():
      try:
        value = storage.parse_json(line)
      except ValueError as error:
        raise ValueError(
          f"{name}:{number}: expected one JSON object a line, got invalid JSON ({error}); where"
          " these are plain texts, name the file .txt, or say `--prompts_format=text`."
        ) from error
      yield Row(value, f"{stem}/{number}", f"{name}:{number}")


def _json_array(file: BinaryIO, name: str, stem: str) -> Iterator[Row]:
  """Objects or texts of a JSON array, which is read whole."""
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
    raise _not_utf8(content[error.start], name) from error
  except ValueError as error:
    raise ValueError(
      f"{name}: expected a whole JSON array, got JSON that is invalid or cut off ({error});"
      " copy the file again."
    ) from error
  if not isinstance(values, list):
    raise ValueError(f"{name}: expected a JSON array, got {type(values).__name__}.")
  for number, value in enumerate(values, start=1):
    yield Row(value, f"{stem}/{number}", f"{name}, element {number}")


def _plain_text(file: BinaryIO, name: str, stem: str) -> Iterator[Row]:
  """A prompt a line; blank lines are none."""
  called = stem if name == "standard input" else name.replace("\\", "/").rpartition("/")[2]
  filled = (item for item in _lines(file, name) if item[1].strip())
  for count, (number, line) in enumerate(filled, start=1):
    yield Row(line.rstrip("\n").strip("\r"), f"{called}/{count}", f"{name}:{number}")


def _check_columns(names: list[str], name: str) -> None:
  if len(set(names)) < len(names):
    raise ValueError(
      f"{name}: expected columns of different names, got {names}; rename those that repeat."
    )


def _table(delimiter: str) -> Callable[[BinaryIO, str, str], Iterator[Row]]:
  def read_table(file: BinaryIO, name: str, stem: str) -> Iterator[Row]:
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

    table = csv.reader(lines(), delimiter=delimiter, strict=True)
    try:
      header = next(table, [])
      _check_columns(header, name)
      for number, cells in enumerate(filter(None, table), start=1):
        size = 0
        row = dict(zip(header, cells, strict=False))
        row = Row(row, f"{stem}/{number}", f"{name}:{table.line_num}")
        if len(cells) != len(header):
          raise row.error(
            f"expected {len(header)} columns as in the header, got {len(cells)}; quote texts"
            f" that hold {delimiter!r}"
          )
        yield row
    except csv.Error as error:
      raise ValueError(
        f"{name}:{table.line_num}: expected cells that can be read, got: {error}; mend the"
        " line."
      ) from error

  return read_table


def _parquet(file: BinaryIO, name: str, stem: str) -> Iterator[Row]:
  """Rows by column, columns left out that hold no texts, numbers or lists of them.

  500 bytes, in which a text repeats, may stand for 200 GB. So the footer is checked before
  anything is read, texts are read as they are stored, each once (a dictionary), and are counted
  before they are written out.
  """
  try:
    import pyarrow
  except ImportError as error:
    raise ImportError(
      f"Expected the package pyarrow to read {name}, got none; `pip install pyarrow`, or save"
      " the rows as JSON Lines."
    ) from error
  try:
    number = 0
    for part in _parquet_parts(file, name):
      columns = [column.cast(_written_out(column.type)) for column in part.columns]
      table = pyarrow.RecordBatch.from_arrays(columns, names=part.schema.names)
      for value in table.to_pylist():
        number += 1
        yield Row(value, f"{stem}/{number}", f"{name}, row {number}")
  except (pyarrow.ArrowException, UnicodeDecodeError) as error:
    raise ValueError(
      f"{name}: expected a whole Parquet file, got a damaged one ({error}); copy it again."
    ) from error


def _parquet_parts(file: BinaryIO, name: str) -> Iterator[Any]:
  """Record batches, texts as dictionaries, each of at most `LONGEST_LINE` bytes of text."""
  from pyarrow import parquet

  most = left = storage.most_unpacked(file.seek(0, 2))
  too_much = ValueError(
    f"Expected {name!r} to unpack to at most {storage.UNPACKED >> 20} MiB and"
    f" {storage.UNPACKED_RATIO} times its size, got more; it is no file of texts, or made to"
    " fill the memory: save the rows as JSON Lines, or as several files."
  )
  opened = parquet.ParquetFile(file)
  metadata, schema = opened.metadata, opened.schema_arrow
  _check_columns(schema.names, name)
  columns = [field.name for field in schema if _is_plain(field.type)]
  chunks = [_chunks(metadata.row_group(i), columns) for i in range(metadata.num_row_groups)]
  sizes = [sum(map(_stored_size, group)) for group in chunks]
  if sum(sizes) + _PARQUET_ROW * metadata.num_rows > most:
    raise too_much
  texts = [chunk for group in chunks for chunk in group if chunk.physical_type == "BYTE_ARRAY"]
  encodings = {encoding for chunk in texts for encoding in chunk.encodings}
  # pyarrow makes no dictionary of these, whatever the footer says; one of them shares texts.
  if odd := [encoding for encoding in encodings if encoding.startswith("DELTA_")]:
    raise ValueError(
      f"Expected {name!r} to hold plain texts or a dictionary of them, got the encoding"
      f" {odd[0]}; save it without, or as JSON Lines."
    )
  paths = {chunk.path_in_schema for chunk in texts}
  opened = parquet.ParquetFile(file, read_dictionary=sorted(paths))
  for group, size in enumerate(sizes):
    # A batch brings the whole dictionary along: as few of them as can be.
    rows = max(1, metadata.row_group(group).num_rows // (1 + size // _BATCH_BYTES))
    for batch in opened.iter_batches(rows, row_groups=[group], columns=columns):
      batch.validate(full=True)  # what points beyond a dictionary would be read
      lengths = sum(map(_lengths, batch.columns), np.zeros(len(batch), np.int64))
      left -= int(lengths.sum())
      if left < 0:
        raise too_much
      yield from _slices(batch, np.cumsum(lengths), name)


def _slices(batch: Any, ends: np.ndarray, name: str) -> Iterator[Any]:
  begin = 0
  while begin < len(ends):
    before = ends[begin - 1] if begin else 0
    end = int(np.searchsorted(ends, before + storage.LONGEST_LINE, side="right"))
    if end == begin:
      raise ValueError(
        f"Expected {name!r} to hold rows of at most {storage.LONGEST_LINE} bytes, got a longer"
        " one; it is no file of texts, or made to fill the memory."
      )
    end = min(end, begin + _BATCH_ROWS)
    yield batch.slice(begin, end - begin)
    begin = end


def _is_list(kind: Any) -> bool:
  return str(kind).startswith(("list<", "large_list<"))


def _is_plain(kind: Any) -> bool:
  """Whether a column may hold texts, numbers or lists of them: images and the like are left."""
  from pyarrow import types

  kind = kind.value_type if _is_list(kind) else kind
  binary = (types.is_binary, types.is_large_binary, types.is_binary_view)
  odd = (types.is_nested, types.is_fixed_size_binary, *binary)
  return not any(is_odd(kind) for is_odd in odd)


def _chunks(group: Any, names: list[str]) -> list[Any]:
  """The column chunks of a row group that belong to these columns."""
  chunks = map(group.column, range(group.num_columns))
  starts = tuple(f"{name}." for name in names)
  return [chunk for chunk in chunks if f"{chunk.path_in_schema}.".startswith(starts)]


def _stored_size(chunk: Any) -> int:
  return max(chunk.total_uncompressed_size, 0) + _PARQUET_VALUE * max(chunk.num_values, 0)


def _lengths(array: Any) -> np.ndarray:
  """Bytes of the texts of each entry, written out, [entries] int64."""
  import pyarrow
  from pyarrow import compute, types

  kind = array.type
  if _is_list(kind):
    offsets = array.offsets.to_numpy()
    totals = np.concatenate([[0], np.cumsum(_lengths(array.values))])
    return totals[offsets[1:]] - totals[offsets[:-1]]
  if types.is_dictionary(kind):
    lengths = np.append(_lengths(array.dictionary), 0)
    return lengths[array.indices.fill_null(len(lengths) - 1).to_numpy(zero_copy_only=False)]
  if "string" not in str(kind):
    return np.zeros(len(array), np.int64)
  found = compute.binary_length(array.cast(pyarrow.large_string())).fill_null(0)  # pyright: ignore[reportAttributeAccessIssue]
  return found.to_numpy(zero_copy_only=False).astype(np.int64)


def _written_out(kind: Any) -> Any:
  """A type without dictionaries: lists of texts are faster to read than what points to them."""
  import pyarrow

  if _is_list(kind):
    made = pyarrow.large_list if str(kind).startswith("large") else pyarrow.list_
    return made(_written_out(kind.value_type))
  return kind.value_type if pyarrow.types.is_dictionary(kind) else kind


_READERS: Mapping[str, Callable[[BinaryIO, str, str], Iterator[Row]]] = {
  "jsonl": _json_lines,
  "json": _json_array,
  "text": _plain_text,
  "csv": _table(","),
  "tsv": _table("\t"),
  "parquet": _parquet,
}
