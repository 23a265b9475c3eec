"""Rows of files, one at a time: JSON Lines, JSON, plain text, CSV, TSV, Parquet, Arrow.

What is read is bounded: no small file, packed or not, fills the memory.
"""

import csv
import dataclasses
import functools
import gzip
import itertools
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

from calm import storage

# Bytes that every line and row counts for besides its own: each takes time, even when empty.
_ROW = 512
# What the least of rows by column, and of Parquet's values, takes; files may say 10**9 of them.
_COLUMNAR_ROW, _PARQUET_VALUE = 64, 8
# Bytes of a stored batch of a Parquet file, and rows that are written out at once.
_BATCH_BYTES, _BATCH_ROWS = 2**26, 1024


class Gzip(gzip.GzipFile):
  """A gzip file whose lines and rows are counted, with its bytes; `name` is for messages."""

  def __init__(self, file: BinaryIO, name: str):
    self._most, self._called, self._rows = storage.most_unpacked(file.seek(0, 2)), name, 0
    file.seek(0)
    super().__init__(fileobj=file, mode="rb")

  def count(self, rows: int = 1) -> None:
    """Counts lines or rows; ValueError where they and the bytes are beyond the bound."""
    self._rows += rows
    if self.tell() + _ROW * self._rows > self._most:
      raise ValueError(
        f"Expected {self._called!r} to unpack to at most {storage.UNPACKED_RATIO} times its"
        f" size, with {_ROW} bytes more for each line and row, got more."
      )


@dataclasses.dataclass(frozen=True)
class Row:
  """One row."""

  value: Mapping[str, Any] | str  # fields by name, or a bare text
  name: str  # an id for a row that has none of its own
  where: str  # file and line, for messages

  def error(self, message: str) -> ValueError:
    """An error that names file and line."""
    return ValueError(f"{self.where}: {message}.")


def read(file: Any, format: str, name: str, stem: str) -> Iterator[Row]:
  """Rows of an open file, or a `Gzip` of it; ValueError names the file and the line.

  `format` is a name of `FORMATS`, of 'arrow' also a list of files; rows without an id are named
  after `stem`.
  """
  _, read_rows = FORMATS[format]
  for row in read_rows(file, name, stem):
    if isinstance(file, Gzip):
      file.count()
    if not isinstance(row.value, Mapping | str):
      raise row.error(f"expected a JSON object or a text, got {type(row.value).__name__}")
    yield row


def _decode(content: bytes, where: str) -> str:
  """A text in UTF-8, without the mark that some editors put before it."""
  at = content.find(b"\0")  # UTF-16 may well be UTF-8 too
  try:
    text = content.decode("utf-8-sig")
  except UnicodeDecodeError as error:
    at = error.start if at < 0 else at
  if at < 0:
    return text
  raise ValueError(f"Expected UTF-8, got the byte 0x{content[at]:02x} in {where}.")


def _lines(file: BinaryIO, name: str) -> Iterator[tuple[int, str]]:
  """(1-based number, text with its end) of every line.

  Lines end at newlines only: `splitlines` would end a prompt at characters that are no ends.
  """
  for number, line in enumerate(storage.lines(file, name), start=1):
    if isinstance(file, Gzip):
      file.count()
    yield number, _decode(line, f"line {number} of {name}")


def _json_lines(file: BinaryIO, name: str, stem: str) -> Iterator[Row]:
  for number, line in _lines(file, name):
    if line.strip():
      try:
        value = storage.parse_json(line)
      except ValueError as error:
        raise ValueError(
          f"{name}:{number}: expected one JSON object a line, got invalid JSON ({error}); of"
          " plain texts, say `--prompts_format=text`."
        ) from error
      yield Row(value, f"{stem}/{number}", f"{name}:{number}")


def _json_array(file: BinaryIO, name: str, stem: str) -> Iterator[Row]:
  """Objects or texts of a JSON array, which is read whole."""
  content = file.read(storage.LONGEST_LINE + 1)
  if len(content) > storage.LONGEST_LINE:
    most = f"at most {storage.LONGEST_LINE} bytes"
    raise ValueError(f"{name}: expected a JSON array of {most}, got more; save JSON Lines.")
  if isinstance(file, Gzip):  # parsed, empty lists and objects take much more than their bytes
    file.count(content.count(b"[") + content.count(b"{"))
  text = _decode(content, name)
  try:
    values = storage.parse_json(text)
  except ValueError as error:
    raise ValueError(f"{name}: expected a whole JSON array, got: {error}.") from error
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
    raise ValueError(f"{name}: expected columns of different names, got {names}.")


def _table(file: BinaryIO, name: str, stem: str, delimiter: str = ",") -> Iterator[Row]:
  # By default a field has at most 128 KiB, and documents are longer.
  csv.field_size_limit(storage.LONGEST_LINE)
  table = csv.reader((line for _, line in _lines(file, name)), delimiter=delimiter, strict=True)
  try:
    header = next(table, [])
    _check_columns(header, name)
    for number, cells in enumerate(filter(None, table), start=1):
      row = dict(zip(header, cells, strict=False))
      row = Row(row, f"{stem}/{number}", f"{name}:{table.line_num}")
      if len(cells) != len(header):
        raise row.error(f"expected {len(header)} columns as in the header, got {len(cells)}")
      yield row
  except csv.Error as error:
    where = f"{name}:{table.line_num}"
    raise ValueError(f"{where}: expected cells that can be read, got: {error}.") from error


def _columnar(
  file: Any, name: str, stem: str, read_values: Callable[..., Iterator[dict[str, Any]]]
) -> Iterator[Row]:
  """Rows by column, columns left out that hold no texts, numbers or lists of them."""
  try:
    import pyarrow
  except ImportError as error:
    message = f"Expected the package pyarrow to read {name}, got none; `pip install pyarrow`."
    raise ImportError(message) from error
  files = file if isinstance(file, list) else [file]
  left = storage.most_unpacked(sum(each.seek(0, 2) for each in files))
  values = (value for each in files for value in read_values(each, name, left))
  try:
    for number, value in enumerate(values, start=1):
      size = sum(map(_size, value.values()))
      left -= size + _COLUMNAR_ROW
      if size > storage.LONGEST_LINE or left < 0:
        raise _too_much(name)
      yield Row(value, f"{stem}/{number}", f"{name}, row {number}")
  except (pyarrow.ArrowException, MemoryError, UnicodeDecodeError) as error:
    raise ValueError(f"{name}: expected whole files of columns, got: {error}.") from error


def _size(value: Any) -> int:
  """Characters of a text, or of a list of texts."""
  if isinstance(value, list):
    return sum(map(_size, value))
  return len(value) if isinstance(value, str) else 0


def _too_much(name: str) -> ValueError:
  return ValueError(
    f"Expected {name!r} to unpack to at most {storage.UNPACKED >> 20} MiB and"
    f" {storage.UNPACKED_RATIO} times its size, in rows of at most {storage.LONGEST_LINE}"
    " bytes, got more; save as JSON Lines."
  )


def _parquet_values(file: BinaryIO, name: str, most: int) -> Iterator[dict[str, Any]]:
  """Values by column of every row.

  500 bytes, in which a text repeats, may stand for 200 GB. So the footer is checked before
  anything is read, and texts are read as they are stored, each once: equal texts of a batch
  are one object.
  """
  from pyarrow import parquet

  opened = parquet.ParquetFile(file)
  metadata, columns = opened.metadata, _plain_columns(opened.schema_arrow, name)
  chunks = [_chunks(metadata.row_group(i), columns) for i in range(metadata.num_row_groups)]
  sizes = [sum(map(_stored_size, group)) for group in chunks]
  if sum(sizes) + _COLUMNAR_ROW * metadata.num_rows > most:
    raise _too_much(name)
  texts = [chunk for group in chunks for chunk in group if chunk.physical_type == "BYTE_ARRAY"]
  encodings = {encoding for chunk in texts for encoding in chunk.encodings}
  # pyarrow makes no dictionary of these, whatever the footer says; one of them shares texts.
  if odd := [encoding for encoding in encodings if encoding.startswith("DELTA_")]:
    raise ValueError(
      f"Expected {name!r} to hold plain texts, got the encoding {odd[0]}; save as JSON Lines."
    )
  paths = {chunk.path_in_schema for chunk in texts}
  opened = parquet.ParquetFile(file, read_dictionary=sorted(paths))
  for group, size in enumerate(sizes):
    # A batch brings the whole dictionary along: as few of them as can be.
    rows = max(1, metadata.row_group(group).num_rows // (1 + size // _BATCH_BYTES))
    for batch in opened.iter_batches(rows, row_groups=[group], columns=columns):
      batch.validate(full=True)  # what points beyond a dictionary would be read
      dictionaries = list(map(_dictionary, batch.columns))
      for begin in range(0, len(batch), _BATCH_ROWS):
        part = batch.slice(begin, _BATCH_ROWS)
        values = map(_python_values, part.columns, dictionaries)
        yield from (dict(zip(columns, row, strict=True)) for row in zip(*values, strict=True))


def _arrow_values(file: BinaryIO, name: str, most: int) -> Iterator[dict[str, Any]]:
  """Values by column of every row of an Arrow stream, which holds texts as long as they are:
  neither packed, nor as numbers of a dictionary, nor one text in several columns."""
  from pyarrow import ipc, types

  file.seek(0)
  schema = ipc.read_schema(file)
  columns = _plain_columns(schema, name, types.is_string_view)
  for message in ipc.MessageReader.open_stream(file):
    packed = message.type != "record batch" or _is_packed(message.metadata.to_pybytes())
    if not packed:
      batch = ipc.read_record_batch(message, schema).select(columns)
      if _COLUMNAR_ROW * len(batch) > most:
        raise _too_much(name)
      batch.validate(full=True)  # before anything, its size too, is read through its offsets
      packed = batch.nbytes > message.body.size
    if packed:
      raise ValueError(
        f"Expected {name!r} to hold plain texts, got packed ones; save as JSON Lines."
      )
    yield from batch.to_pylist()


def _is_packed(metadata: bytes) -> bool:
  """Whether the table of a record batch, in a flatbuffer of Arrow's, has a `compression`."""
  at = lambda kind, place: struct.unpack_from(kind, metadata, place)[0]

  def field(table: int, number: int) -> int:  # its place, or 0
    vtable, entry = table - at("<i", table), 4 + 2 * number
    place = at("<H", vtable + entry) if entry < at("<H", vtable) else 0
    return place and table + place

  header = field(at("<I", 0), 2)
  return field(header + at("<I", header), 3) > 0


def _plain_columns(schema: Any, name: str, *odd: Callable[[Any], bool]) -> list[str]:
  """Columns that may hold texts, numbers or lists of them: images and the like are left."""
  from pyarrow import types

  binary = (types.is_binary, types.is_large_binary, types.is_binary_view)
  odd += (types.is_nested, types.is_null, types.is_fixed_size_binary, *binary)
  odd += (types.is_temporal, types.is_decimal)  # not every one has a value in Python
  inner = lambda kind: kind.value_type if _is_list(kind) else kind
  _check_columns(schema.names, name)
  return [field.name for field in schema if not any(is_(inner(field.type)) for is_ in odd)]


def _is_list(kind: Any) -> bool:
  return str(kind).startswith(("list<", "large_list<"))


def _chunks(group: Any, names: list[str]) -> list[Any]:
  """The column chunks of a row group that belong to these columns."""
  chunks = map(group.column, range(group.num_columns))
  starts = tuple(f"{name}." for name in names)
  return [chunk for chunk in chunks if f"{chunk.path_in_schema}.".startswith(starts)]


def _stored_size(chunk: Any) -> int:
  return max(chunk.total_uncompressed_size, 0) + _PARQUET_VALUE * max(chunk.num_values, 0)


def _dictionary(array: Any) -> list[Any]:
  """The texts that a column's entries, or those of its lists, point to."""
  array = array.values if _is_list(array.type) else array
  return array.dictionary.to_pylist() if hasattr(array, "dictionary") else []


def _python_values(array: Any, dictionary: list[Any]) -> list[Any]:
  """Entries as Python's own values."""
  if _is_list(array.type):
    values = iter(_python_values(array.flatten(), dictionary))
    lengths = array.value_lengths().to_pylist()
    return [None if n is None else list(itertools.islice(values, n)) for n in lengths]
  if not hasattr(array, "dictionary"):
    return array.to_pylist()
  return [None if i is None else dictionary[i] for i in array.indices.to_pylist()]


# The names of the formats, what messages call them, and (file, name, stem) -> rows.
FORMATS: Mapping[str, tuple[str, Callable[[Any, str, str], Iterator[Row]]]] = {
  "jsonl": ("JSON Lines", _json_lines),
  "json": ("a JSON array", _json_array),
  "text": ("plain text, a prompt a line", _plain_text),
  "csv": ("CSV", _table),
  "tsv": ("TSV", functools.partial(_table, delimiter="\t")),
  "parquet": ("Parquet", functools.partial(_columnar, read_values=_parquet_values)),
  "arrow": ("Arrow", functools.partial(_columnar, read_values=_arrow_values)),
}
