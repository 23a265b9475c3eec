"""Products of a few rows and a small matrix in one thread, their sums in registers: to wake a
second takes longer than its work. The matrix is read in its own order, what comes next is
prefetched, and eight rows take little longer than to read it."""

import functools
from typing import Any

import jax

from calm.t5.kernels import llvm
from calm.t5.kernels.llvm import FLOAT, LANES, Frame, Writer, constant, number

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
    left = w.sub(inputs, i)
    count = w.least(number(_BLOCK), left)
    to_come = w.least(number(_BLOCK), w.sub(left, count))
    begin = number(0)
    for height, width in _TILES:
      end = w.below(rows, height)
      for row, _ in w.loop(begin, end, height):
        tile = functools.partial(
          _tile, w, height, inputs, columns, count,
          x=w.at(x, inputs, row, i),
          matrix=w.at(matrix, columns, i, number(0)),
          out=w.at(out, columns, row, number(0)),
          first=w.icmp_signed("==", i, number(0)),
          to_come=w.select(w.icmp_signed("==", row, number(0)), to_come, number(0)),
        )  # fmt: skip
        wide, whole = w.below(columns, LANES * width), w.below(columns, LANES)
        for column, _ in w.loop(number(0), wide, LANES * width):
          tile(column, width)
        for column, _ in w.loop(wide, whole, LANES):
          tile(column, 1)
        rest = w.sub(columns, whole)
        with w.if_then(w.icmp_signed(">", rest, number(0))):
          tile(whole, 1, w.first_lanes(rest))
      begin = end


def _tile(
  w: Writer, rows: int, inputs, columns, count, column, vectors: int, mask=None,
  *, x, matrix, out, first, to_come,
) -> None:  # fmt: skip
  """`rows` rows of x times `count` rows of the matrix, at some vectors of its columns, all from
  where `x`, `matrix` and `out` begin. Sums begin if `first`, or go on from `out`; the `to_come`
  rows behind are prefetched."""
  places = [w.add(column, number(LANES * vector)) for vector in range(vectors)]
  outs = [w.at(out, columns, number(r), place) for r in range(rows) for place in places]
  before, zero = w.block, constant(0.0)
  with w.if_then(w.not_(first)):
    old, read = [w.read_some(address, mask) for address in outs], w.block
  sums: list[Any] = []
  for part in old:
    sums.append(w.phi(part.type))
    sums[-1].add_incoming(zero, before)
    sums[-1].add_incoming(part, read)
  for i, values in w.loop(number(0), count, 1, sums):
    row = [w.read_some(w.at(matrix, columns, i, place), mask) for place in places]
    for r in range(rows):
      factor = w.spread(w.read(w.at(x, inputs, number(r), i), FLOAT))
      for v, vector in enumerate(row):
        values[r * vectors + v] = w.fused(factor, vector, values[r * vectors + v])
  for value, address in zip(sums, outs, strict=True):
    w.write(value, address, mask)
  if mask is None:
    for row, _ in w.loop(count, w.add(count, to_come), 1):
      for place in places:
        w.prefetch(w.at(matrix, columns, row, place))
