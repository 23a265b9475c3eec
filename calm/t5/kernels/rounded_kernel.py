"""Products of a few rows and a matrix of 8-bit codes, which a core reads four times as fast as
float32 numbers. Codes become float32 in registers, where the sums stay, too; a row's sums are
made in one order, whatever rows stand beside it."""

from typing import Any

import jax
import jax.numpy as jnp
from llvmlite import ir

from calm.t5.kernels import llvm
from calm.t5.kernels.llvm import FLOAT, FLOATS, LANES, Frame, Writer, constant, number
from calm.t5.platforms import WIDTH

# Rows of x, and vectors of columns that they meet: registers hold 16 sums.
_SUMS = ((8, 2), (4, 4), (2, 4), (1, 4))
_CODES = ir.VectorType(ir.IntType(8), LANES)


def product(x: jax.Array, codes: jax.Array, scales: jax.Array, shared: bool) -> jax.Array:
  """See `kernels.rounded_product`; `shared`: whether a second thread pays."""
  target = llvm.target("calm_rounded_product", _write)

  def piece(begin: int, end: int) -> jax.Array:
    shape = jax.ShapeDtypeStruct((len(x), (end - begin) * WIDTH), "float32")
    return jax.ffi.ffi_call(target, shape)(jnp.full((), begin, jnp.int32), x, codes, scales)

  return llvm.in_pieces(len(codes), shared, piece, axis=1)


def _write(w: Writer, frame: Frame) -> None:
  begin, x, codes, scales = map(frame.argument, range(4))
  rows, inputs, columns = frame.size(x, 0), frame.size(x, 1), frame.size(frame.result(0), 1)
  begin, x, codes, scales, out = map(frame.numbers, (begin, x, codes, scales, frame.result(0)))
  before = w.mul(w.sext(w.read(begin, llvm.INT), llvm.INDEX), number(WIDTH))
  codes = w.add(codes, w.mul(before, inputs))
  scales = w.item(scales, before)
  for column, _ in w.loop(number(0), columns, WIDTH):
    tile, first = w.add(codes, w.mul(column, inputs)), number(0)
    for height, width in _SUMS:
      end = w.below(rows, height)
      for row, _ in w.loop(first, end, height):
        for part in range(0, WIDTH, width * LANES):
          _sums(
            w, height, width, inputs, columns,
            x=w.at(x, inputs, row, number(0)),
            codes=w.add(tile, number(part)),
            scales=w.item(scales, w.add(column, number(part))),
            out=w.at(out, columns, row, w.add(column, number(part))),
          )  # fmt: skip
      first = end


def _sums(
  w: Writer, height: int, width: int, inputs, columns, *, x, codes, scales, out
) -> None:
  """`height` rows times `width` vectors of columns, all from where the arrays begin."""
  sums: list[Any] = [constant(0.0)] * (height * width)
  for i, values in w.loop(number(0), inputs, 1, sums):
    line = w.add(codes, w.mul(i, number(WIDTH)))
    read = [w.read(w.add(line, number(LANES * v)), _CODES) for v in range(width)]
    vectors = [w.sitofp(w.sext(part, llvm.INTS), FLOATS) for part in read]
    for r in range(height):
      factor = w.spread(w.read(w.at(x, inputs, number(r), i), FLOAT))
      for v, vector in enumerate(vectors):
        values[r * width + v] = w.fused(factor, vector, values[r * width + v])
  for r in range(height):
    for v in range(width):
      scaled = w.fmul(sums[r * width + v], w.read(w.item(scales, number(LANES * v))))
      w.write(scaled, w.at(out, columns, number(r), number(LANES * v)))
