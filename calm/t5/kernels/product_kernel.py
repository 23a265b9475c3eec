"""Products of a few rows and a small matrix in one thread, their sums in registers.

XLA:CPU shares them between threads, the second of which takes longer to wake than to work. The
matrix is read in its own order, some of its rows at a time, and what comes next is asked for
while these are multiplied: a product of eight rows then takes little longer than it takes to
read the matrix.
"""

import dataclasses
from typing import Any

import jax

from calm.t5.kernels import llvm
from calm.t5.kernels.llvm import LANES, Frame, Writer, constant, number

# Rows of the matrix that are multiplied at a time.
_BLOCK = 16
# Rows of x, and vectors of the matrix that they meet: AVX-512 has registers for 16 sums.
_TILES = ((8, 2), (2, 8), (1, 8))


def product(x: jax.Array, matrix: jax.Array) -> jax.Array:
  """See `kernels.product`."""
  shape = jax.ShapeDtypeStruct((len(x), matrix.shape[1]), "float32")
  return jax.ffi.ffi_call(llvm.target("calm_product", _write), shape)(x, matrix)


def _write(w: Writer, frame: Frame) -> None:
  x, matrix, out = frame.argument(0), frame.argument(1), frame.result(0)
  rows, inputs, columns = frame.size(x, 0), frame.size(x, 1), frame.size(matrix, 1)
  x, matrix, out = map(frame.numbers, (x, matrix, out))
  for i, _ in w.loop(number(0), inputs, _BLOCK):
    left = w.b.sub(inputs, i)
    count = w.least(number(_BLOCK), left)
    to_come = w.least(number(_BLOCK), w.b.sub(left, count))
    begin = number(0)
    for height, width in _TILES:
      end = w.below(rows, height)
      for row, _ in w.loop(begin, end, height):
        strip = _Strip(
          w, height, inputs, columns, count,
          x=w.at(x, inputs, row, i),
          matrix=w.at(matrix, columns, i, number(0)),
          out=w.at(out, columns, row, number(0)),
          first=w.b.icmp_signed("==", i, number(0)),
          to_come=w.b.select(w.b.icmp_signed("==", row, number(0)), to_come, number(0)),
        )  # fmt: skip
        strip.write(width)
      begin = end


@dataclasses.dataclass(frozen=True)
class _Strip:
  """`rows` rows of x times `count` rows of the matrix, which begin at `x`, `matrix` and `out`.

  Sums begin here if `first`, or go on from what is in `out`; `to_come` rows of the matrix
  behind these are prefetched.
  """

  w: Writer
  rows: int
  inputs: Any
  columns: Any
  count: Any
  x: Any
  matrix: Any
  out: Any
  first: Any
  to_come: Any

  def write(self, vectors: int) -> None:
    w = self.w
    wide, whole = w.below(self.columns, LANES * vectors), w.below(self.columns, LANES)
    self._tiles(number(0), wide, vectors)
    self._tiles(wide, whole, 1)
    left = w.b.sub(self.columns, whole)
    with w.b.if_then(w.b.icmp_signed(">", left, number(0))):
      self._tile(whole, 1, w.first_lanes(left))

  def _tiles(self, begin: Any, end: Any, vectors: int) -> None:
    """Columns from `begin` to `end`."""
    w = self.w
    for column, _ in w.loop(begin, end, LANES * vectors):
      self._tile(column, vectors, None)
      for row, _ in w.loop(self.count, w.b.add(self.count, self.to_come), 1):
        for place in self._places(column, vectors):
          w.prefetch(w.at(self.matrix, self.columns, row, place))

  def _tile(self, column: Any, vectors: int, mask: Any) -> None:
    w, places = self.w, self._places(column, vectors)
    outs = [
      w.at(self.out, self.columns, number(r), p) for r in range(self.rows) for p in places
    ]
    before, zero = w.b.block, constant(0.0)
    with w.b.if_then(w.b.not_(self.first)):
      old, read = [w.load(address, mask) for address in outs], w.b.block
    sums = []
    for part in old:
      sums.append(w.b.phi(part.type))
      sums[-1].add_incoming(zero, before)
      sums[-1].add_incoming(part, read)
    for i, values in w.loop(number(0), self.count, 1, sums):
      row = [w.load(w.at(self.matrix, self.columns, i, place), mask) for place in places]
      for r in range(self.rows):
        factor = w.spread(w.load_one(w.at(self.x, self.inputs, number(r), i)))
        for v, vector in enumerate(row):
          values[r * vectors + v] = w.fused(factor, vector, values[r * vectors + v])
    for value, address in zip(sums, outs, strict=True):
      w.store(value, address, mask)

  def _places(self, column: Any, vectors: int) -> list[Any]:
    """Columns that the vectors begin at."""
    return [self.w.b.add(column, number(LANES * vector)) for vector in range(vectors)]
