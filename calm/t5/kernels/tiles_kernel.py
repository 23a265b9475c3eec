"""Products of rows and a matrix in tiles, of float32 numbers or of 8-bit codes, which become
float32 in registers. A tile is read from its beginning to its end, as memory likes it, and sums
stay in registers; a row's are made in one order, whatever rows stand beside it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from llvmlite import ir

from calm.t5.kernels import llvm
from calm.t5.kernels.llvm import FLOAT, FLOATS, LANES, Frame, Writer, constant, number

# Rows of x, and vectors of columns that they meet: registers hold 16 sums.
_SUMS = ((8, 2), (4, 4), (2, 4), (1, 4))
_CODES = ir.VectorType(ir.IntType(8), LANES)


def product(
  x: jax.Array, tiles: jax.Array, scales: jax.Array | None, shared: bool
) -> jax.Array:
  """See `kernels.tiled_product`; `shared`: whether a second thread pays."""
  width, coded = tiles.shape[2], scales is not None
  write = functools.partial(_write, width=width, coded=coded)
  target = llvm.target(f"calm_tiles_{tiles.dtype}", write)

  def piece(begin: int, end: int) -> jax.Array:
    shape = jax.ShapeDtypeStruct((len(x), (end - begin) * width), "float32")
    first = jnp.full((), begin, jnp.int32)
    return jax.ffi.ffi_call(target, shape)(first, x, tiles, *([scales] if coded else []))

  return llvm.in_pieces(len(tiles), shared, piece, axis=1)


def _write(w: Writer, frame: Frame, width: int, coded: bool) -> None:
  begin, x, tiles = map(frame.argument, range(3))
  rows, inputs, columns = frame.size(x, 0), frame.size(x, 1), frame.size(frame.result(0), 1)
  begin, x, tiles, out = map(frame.numbers, (begin, x, tiles, frame.result(0)))
  item = w.add if coded else w.item  # a code is a byte
  before = w.mul(w.sext(w.read(begin, llvm.INT), llvm.INDEX), number(width))
  tiles = item(tiles, w.mul(before, inputs))
  scales = w.item(frame.numbers(frame.argument(3)), before) if coded else None

  def read(place: Any) -> Any:
    codes = w.read(item(tiles, place), _CODES if coded else FLOATS)
    return w.sitofp(w.sext(codes, llvm.INTS), FLOATS) if coded else codes

  for column, _ in w.loop(number(0), columns, width):
    first = number(0)
    for height, vectors in _SUMS:
      vectors, end = min(vectors, width // LANES), w.below(rows, height)
      for row, _ in w.loop(first, end, height):
        for part in range(0, width, vectors * LANES):
          at = w.add(w.mul(column, inputs), number(part))
          given = w.at(x, inputs, row, number(0))
          line = lambda i, v, at=at: read(w.add(at, w.add(w.mul(i, number(width)), number(v))))
          sums = _sums(w, height, vectors, inputs, given, line)
          for r in range(height):
            for v in range(vectors):
              place = w.add(column, number(part + LANES * v))
              made = sums[r * vectors + v]
              scaled = w.fmul(made, w.read(w.item(scales, place))) if coded else made
              w.write(scaled, w.at(out, columns, w.add(row, number(r)), place))
      first = end


def _sums(w: Writer, height: int, vectors: int, inputs: Any, x: Any, line: Any) -> list[Any]:
  """`height` rows from `x` on times `vectors` vectors of columns; `line` of an input and a
  column of these is the matrix's vector there."""
  sums: list[Any] = [constant(0.0)] * (height * vectors)
  for i, values in w.loop(number(0), inputs, 1, sums):
    read = [line(i, LANES * v) for v in range(vectors)]
    for r in range(height):
      factor = w.spread(w.read(w.at(x, inputs, number(r), i), FLOAT))
      for v, vector in enumerate(read):
        values[r * vectors + v] = w.fused(factor, vector, values[r * vectors + v])
  return sums
