"""Records of one threshold that stay on the disk: what is kept is where each line begins.

A million records of some twenty tokens take gigabytes as objects; as places in their file, and
the layers that each took, they take some ten bytes each.
"""

import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, BinaryIO, overload

import numpy as np

from calm import storage
from calm.calibrate.generations.records import Record


class Column(Sequence[Record]):
  """Records in the order of prompts, each read from the file when it is asked for.

  Attributes:
    path: the file; it must stay as it was when it was read first.
    offsets: [num_records] where each line begins, in bytes.
    layers: [num_records] decoder layers run, summed over tokens; -1 where a record says none.
    tokens: [num_records] tokens, padding left out.
  """

  def __init__(
    self, path: pathlib.Path, offsets: np.ndarray, layers: np.ndarray, tokens: np.ndarray
  ):
    self.path = path
    self.offsets, self.layers, self.tokens = offsets, layers, tokens

  def __len__(self) -> int:
    return len(self.offsets)

  @overload
  def __getitem__(self, index: int) -> Record: ...
  @overload
  def __getitem__(self, index: slice) -> "Column": ...
  def __getitem__(self, index: int | slice) -> "Record | Column":
    if isinstance(index, slice):
      parts = (self.offsets[index], self.layers[index], self.tokens[index])
      return Column(self.path, *parts)
    with open(self.path, "rb") as file:
      return Record.from_json(_value(file, int(self.offsets[index])))

  def __iter__(self) -> Iterator[Record]:
    return map(Record.from_json, self._values())

  def texts(self) -> Iterator[str]:
    """The predictions alone, which are read in half the time."""
    return (value["prediction"] for value in self._values())

  def __eq__(self, other: object) -> bool:
    if not isinstance(other, Sequence):
      return NotImplemented
    return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

  __hash__ = None  # pyright: ignore[reportAssignmentType]

  def __repr__(self) -> str:
    return f"Column({len(self)} records of {self.path})"

  def _values(self) -> Iterator[dict[str, Any]]:
    with open(self.path, "rb") as file:
      for offset in self.offsets.tolist():
        yield _value(file, offset)


def _value(file: BinaryIO, offset: int) -> dict[str, Any]:
  if file.tell() != offset:  # a seek throws away what was read ahead
    file.seek(offset)
  return storage.parse_json(file.readline())


def texts(column: Sequence[Record]) -> Iterator[str]:
  """The predictions of a column, wherever it is."""
  if isinstance(column, Column):
    return column.texts()
  return (record.prediction for record in column)


def layer_sums(column: Sequence[Record]) -> tuple[np.ndarray, np.ndarray] | None:
  """(layers, tokens) of each record, [num_records] int64; None where one says no layers."""
  if isinstance(column, Column):
    missing = (column.layers < 0).any()
    return None if missing else (column.layers.astype(np.int64), column.tokens.astype(np.int64))
  return _sums(record.exit_layers for record in column)


def _sums(rows: Iterable[Sequence[int] | None]) -> tuple[np.ndarray, np.ndarray] | None:
  layers, tokens = [], []
  for row in rows:
    if row is None:
      return None
    layers.append(sum(row))
    tokens.append(sum(map(bool, row)))
  return np.array(layers, np.int64), np.array(tokens, np.int64)
