"""Rows of a Parquet file, bounded: 500 bytes, in which a text repeats, may stand for 200 GB.

The footer is checked before anything is read. No text is longer than its unpacked column,
which bounds the rows that are read at once. One row may hold all values of lists: their texts
are read as they are stored, each once (a dictionary), and counted before they are written out.
"""

from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
import pyarrow
from pyarrow import compute, parquet, types

from calm import storage

# What the least of rows, and of values in them, takes; a file may say 10**9 of either.
_ROW, _VALUE = 64, 8
# Rows at once, and bytes that they may take.
_ROWS, _BYTES = 1024, 2**26
# Encodings without a dictionary; texts of the first share their beginnings.
_PREFIXES, _LENGTHS = "DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY"


def rows(file: BinaryIO, name: str) -> Iterator[dict[str, Any]]:
  """Rows by column, those columns left out that hold no texts, numbers or lists of them.

  Args:
    file: the bytes, which can be sought in.
    name: for messages.

  Raises:
    ValueError: it is damaged, unpacks to more than `storage.most_unpacked`, or has two columns
      of one name.
  """
  most = storage.most_unpacked(file.seek(0, 2))
  file.seek(0)
  try:
    schema = parquet.ParquetFile(file).schema_arrow
    if len(set(schema.names)) < len(schema.names):
      raise ValueError(
        f"{name}: expected columns of different names, got {schema.names}; rename those that"
        " repeat."
      )
    fields = [field for field in schema if _is_plain(field.type)]
    flat = [field.name for field in fields if not _is_list(field.type)]
    lists = [field.name for field in fields if _is_list(field.type)]
    file.seek(0)
    opened = _opened(file, flat, lists, most, name)
    readers = [_Reader(opened, names, most, name) for names in (flat, lists) if names]
    for group in range(opened.num_row_groups):
      parts = zip(*(reader.rows(group) for reader in readers), strict=False)
      yield from ({key: part[key] for part in row for key in part} for row in parts)
  except (pyarrow.ArrowException, UnicodeDecodeError) as error:
    raise ValueError(
      f"{name}: expected a whole Parquet file, got a damaged one ({error}); copy it again."
    ) from error


def _is_list(kind: Any) -> bool:
  return types.is_list(kind) or types.is_large_list(kind)


def _is_plain(kind: Any) -> bool:
  """Whether a column may hold texts, numbers or lists of them: images and the like are left."""
  kind = kind.value_type if _is_list(kind) else kind
  binary = (types.is_binary, types.is_large_binary, types.is_binary_view)
  odd = (types.is_nested, types.is_fixed_size_binary, *binary)
  return not any(is_odd(kind) for is_odd in odd)


def _opened(file: BinaryIO, flat: list[str], lists: list[str], most: int, name: str) -> Any:
  """The file, texts of its lists as dictionaries.

  Raises:
    ValueError: by its footer it has more than `most` bytes, or lists that share texts.
  """
  metadata = parquet.read_metadata(file)
  chunks = list(_chunks(metadata, range(metadata.num_row_groups), [*flat, *lists]))
  if sum(map(_size, chunks)) + _ROW * metadata.num_rows > most:
    raise ValueError(_too_much(name))
  texts = [c for c in _chunks(metadata, range(metadata.num_row_groups), lists) if _is_text(c)]
  if any(_PREFIXES in chunk.encodings for chunk in texts):
    raise ValueError(
      f"Expected {name!r} to hold lists in an encoding that gives their size, got {_PREFIXES};"
      " save it in another, or as JSON Lines."
    )
  paths = {chunk.path_in_schema for chunk in texts if _LENGTHS not in chunk.encodings}
  file.seek(0)
  return parquet.ParquetFile(file, read_dictionary=sorted(paths))


def _chunks(metadata: Any, groups: range, names: list[str]) -> Iterator[Any]:
  """Of these columns."""
  for group in groups:
    for number in range(metadata.num_columns):
      chunk = metadata.row_group(group).column(number)
      if any(f"{chunk.path_in_schema}.".startswith(f"{name}.") for name in names):
        yield chunk


def _is_text(chunk: Any) -> bool:
  return chunk.physical_type == "BYTE_ARRAY"


def _size(chunk: Any) -> int:
  """Bytes of a column that is read as it is stored."""
  return max(chunk.total_uncompressed_size, 0) + _VALUE * max(chunk.num_values, 0)


def _too_much(name: str) -> str:
  return (
    f"Expected {name!r} to unpack to at most {storage.UNPACKED >> 20} MiB and"
    f" {storage.UNPACKED_RATIO} times its size, got more; it is no file of texts, or made to"
    " fill the memory: save the rows as JSON Lines, or as several files."
  )


class _Reader:
  """Rows of some columns, all flat or all lists, whose texts are counted."""

  def __init__(self, opened: Any, columns: list[str], most: int, name: str):
    self._opened, self._columns, self._left, self._name = opened, columns, most, name

  def rows(self, group: int) -> Iterator[dict[str, Any]]:
    """Those of a row group."""
    at_once = self._at_once(group)
    for batch in self._opened.iter_batches(at_once, row_groups=[group], columns=self._columns):
      batch.validate(full=True)  # what points beyond a dictionary would be read
      for part in self._parts(batch):
        yield from _written_out(part).to_pylist()

  def _at_once(self, group: int) -> int:
    """The number of rows whose batch is bounded."""
    metadata = self._opened.metadata
    chunks = list(_chunks(metadata, range(group, group + 1), self._columns))
    if all("." not in chunk.path_in_schema for chunk in chunks):
      longest = sum(chunk.total_uncompressed_size for chunk in chunks if _is_text(chunk))
      return max(1, min(_ROWS, _BYTES // max(longest, 1)))
    # A batch brings the whole dictionary along: as few of them as can be.
    batches = 1 + sum(map(_size, chunks)) // _BYTES
    return max(1, metadata.row_group(group).num_rows // batches)

  def _parts(self, batch: Any) -> Iterator[Any]:
    """Slices of a batch whose texts, written out, are no longer than a line may be."""
    ends = np.cumsum(sum(map(_lengths, batch.columns), np.zeros(len(batch), np.int64)))
    self._left -= int(ends[-1]) if len(ends) else 0
    if self._left < 0:
      raise ValueError(_too_much(self._name))
    begin = 0
    while begin < len(ends):
      before = ends[begin - 1] if begin else 0
      end = int(np.searchsorted(ends, before + storage.LONGEST_LINE, side="right"))
      if end == begin:
        raise ValueError(
          f"Expected {self._name!r} to hold rows of at most {storage.LONGEST_LINE} bytes, got a"
          " longer one; it is no file of texts, or made to fill the memory."
        )
      end = min(end, begin + _ROWS)
      yield batch.slice(begin, end - begin)
      begin = end


def _lengths(array: Any) -> np.ndarray:
  """Bytes of the texts of each entry, written out, [entries] int64."""
  kind = array.type
  if _is_list(kind):
    offsets = array.offsets.to_numpy()
    totals = np.concatenate([[0], np.cumsum(_lengths(array.values))])
    return totals[offsets[1:]] - totals[offsets[:-1]]
  if types.is_dictionary(kind):
    lengths = np.append(_lengths(array.dictionary), 0)
    return lengths[array.indices.fill_null(len(lengths) - 1).to_numpy(zero_copy_only=False)]
  if types.is_string_view(kind):
    array = array.cast(pyarrow.large_string())
  elif not (types.is_string(kind) or types.is_large_string(kind)):
    return np.zeros(len(array), np.int64)
  found = compute.binary_length(array).fill_null(0)  # pyright: ignore[reportAttributeAccessIssue]
  return found.to_numpy(zero_copy_only=False).astype(np.int64)


def _written_out(batch: Any) -> Any:
  """The batch with its texts in place of what points to them, which is the faster to read."""
  columns = [column.cast(_written(column.type)) for column in batch.columns]
  return pyarrow.RecordBatch.from_arrays(columns, names=batch.schema.names)


def _written(kind: Any) -> Any:
  """A type without dictionaries."""
  if _is_list(kind):
    made = pyarrow.large_list if types.is_large_list(kind) else pyarrow.list_
    return made(_written(kind.value_type))
  return kind.value_type if types.is_dictionary(kind) else kind
