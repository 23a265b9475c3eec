"""What is read of a file, bounded: no small file fills the memory, packed or not."""

import gzip
from collections.abc import Iterator
from typing import BinaryIO

from calm import signals

GZIP_MAGIC = b"\x1f\x8b"
LONGEST_LINE = 2**26
# Texts pack to a third or a tenth; files up to so many bytes may do as they like.
UNPACKED, RATIO = 2**28, 200
# Bytes that every line and row counts for besides its own: each takes time, be it empty.
ROW = 512


def most(size: int) -> int:
  """Bytes that a file of `size` bytes may stand for."""
  return UNPACKED + RATIO * size


class Gzip(gzip.GzipFile):
  """A gzip file that unpacks to at most 256 MiB and 200 times its size, lines and rows counted.

  Args:
    file: its bytes.
    size: how many there are.
    name: for messages.
  """

  def __init__(self, file: BinaryIO, size: int, name: str):
    super().__init__(fileobj=file, mode="rb")
    self._most, self._called, self._rows = most(size), name, 0

  def count_row(self) -> None:
    """Counts a row that was read; ValueError beyond the bound."""
    self._rows += 1
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
        f"Expected {self._called!r} to unpack to at most {RATIO} times its size, with {ROW}"
        " bytes more for each line and row, got more; it is no file of texts, or made to fill"
        " the memory."
      )
    return content


def lines(file: BinaryIO, name: str) -> Iterator[bytes]:
  """Lines with their ends.

  Raises:
    ValueError: one has more than 64 MiB.
  """
  while line := file.readline(LONGEST_LINE + 1):
    signals.check()
    if len(line) > LONGEST_LINE:
      raise ValueError(
        f"Expected {name!r} to hold lines of at most {LONGEST_LINE} bytes, got a longer one; it"
        " is no file of texts, or made to fill the memory."
      )
    yield line
