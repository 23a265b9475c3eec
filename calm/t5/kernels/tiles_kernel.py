"""Products of rows and a matrix in tiles, of float32 numbers, or of 8-bit codes
that meet rows of 16 bits. A tile is read from its beginning to its end, as
memory likes it, and sums stay in registers; a row's are made in one order,
whatever rows stand beside it.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from llvmlite import ir

from calm.t5 import kernels
from calm.t5.kernels import llvm
from calm.t5.kernels.llvm import (
  FLOAT,
  FLOATS,
  INT,
  LANES,
  Frame,
  Writer,
  constant,
  number,
)

# Rows of x, and vectors of columns that they meet: registers hold 16 sums. Of
# codes eight rows together took a third more time, as half a tile's line is
# read at once.
_SUMS = ((8, 2), (4, 4), (2, 4), (1, 4))
# Of two inputs and a vector of columns: codes, a row's numbers, and products.
_CODES, _SHORTS, _PRODUCTS = (
  ir.VectorType(ir.IntType(n), 2 * LANES) for n in (8, 16, 32)
)
_ROUNDED = ir.VectorType(ir.IntType(16), LANES)
MOST_ROUNDED = 64  # rows at once, since they lie on a thread's stack


def product(
  x: jax.Array, tiles: jax.Array, scales: jax.Array | None, shared: bool
) -> jax.Array:
  """See `kernels.tiled_product`; `shared`: whether a second thread pays."""
  width = tiles.shape[2]
  coded = scales is not None
  write = functools.partial(_write, width=width, coded=coded)
  target = llvm.target(f"calm_tiles_{tiles.dtype}", write)

  def piece(begin: int, end: int) -> jax.Array:
    shape = jax.ShapeDtypeStruct((len(x), (end - begin) * width), "float32")
    first = jnp.full((), begin, jnp.int32)
    part = np.float32(1 / kernels.row_steps(x.shape[1]))
    return jax.ffi.ffi_call(target, shape)(
      first, x, tiles, *([scales, part] if coded else [])
    )

  if coded and len(x) > MOST_ROUNDED:
    blocks = [x[i : i + MOST_ROUNDED] for i in range(0, len(x), MOST_ROUNDED)]
    return jnp.concatenate(
      [product(block, tiles, scales, shared) for block in blocks]
    )
  return llvm.in_pieces(len(tiles), shared, piece, axis=1)


def _write(w: Writer, frame: Frame, width: int, coded: bool) -> None:
  begin, x, tiles = map(frame.argument, range(3))
  rows = frame.size(x, 0)
  inputs = frame.size(x, 1)
  columns = frame.size(frame.result(0), 1)
  # inputs, or pairs of them, which are as long as a number
  depth = frame.size(tiles, 1)
  begin, x, tiles, out = map(frame.numbers, (begin, x, tiles, frame.result(0)))
  before = w.mul(w.sext(w.read(begin, INT), llvm.INDEX), number(width))
  item = (
    (lambda array, i: w.add(array, w.mul(i, number(2)))) if coded else w.item
  )
  tiles = item(tiles, w.mul(before, depth))
  scales = w.item(frame.numbers(frame.argument(3)), before) if coded else None
  if coded:
    part = w.read(frame.numbers(frame.argument(4)), FLOAT)
    x, steps = _in_steps(w, x, rows, inputs, depth, part)

  def vector(place: Any) -> Any:
    read = w.read(item(tiles, place), _CODES if coded else FLOATS)
    return w.sext(read, _PRODUCTS) if coded else read

  def factor(row: Any, i: Any) -> Any:
    read = w.spread(w.read(w.at(x, depth, row, i), INT if coded else FLOAT))
    return w.sext(w.bitcast(read, _SHORTS), _PRODUCTS) if coded else read

  for column, _ in w.loop(number(0), columns, width):
    first = number(0)
    for height, vectors in _SUMS[coded:]:
      vectors, end = min(vectors, width // LANES), w.below(rows, height)
      for row, _ in w.loop(first, end, height):
        every = [w.add(row, number(r)) for r in range(height)]
        for part in range(0, width, vectors * LANES):
          places = [number(part + LANES * v) for v in range(vectors)]
          sums = [constant(0, INT) if coded else constant(0.0)] * (
            height * vectors
          )
          for i, values in w.loop(number(0), depth, 1, sums):
            at = w.add(w.mul(column, depth), w.mul(i, number(width)))
            line = [vector(w.add(at, place)) for place in places]
            for r, one in enumerate(every):
              given = factor(one, i)
              for v, other in enumerate(line, start=r * vectors):
                add = _add_pairs if coded else Writer.fused
                values[v] = add(w, given, other, values[v])
          for v, made in enumerate(sums):
            one = every[v // vectors]
            place = w.add(column, places[v % vectors])
            if coded:
              step = w.read(w.item(steps, one), FLOAT)
              scale = w.read(w.item(scales, place))
              made = w.fmul(
                w.sitofp(made, FLOATS), w.fmul(w.spread(step), scale)
              )
            w.write(made, w.at(out, columns, one, place))
      first = end


def _in_steps(
  w: Writer, x: Any, rows: Any, inputs: Any, pairs: Any, part: Any
) -> Any:
  """Rows of 16-bit numbers, in steps of this part of their largest, and the
  steps.
  """
  # A vector more, since rows are rounded a vector at a time.
  room = w.add(w.mul(rows, pairs), number(LANES))
  rounded, steps = (w.scratch(w.mul(n, number(4))) for n in (room, rows))
  for row, _ in w.loop(number(0), rows, 1):

    def place(i, row=row):
      return w.add(w.at(rounded, pairs, row, number(0)), w.mul(i, number(2)))

    step = w.rounded(
      w.at(x, inputs, row, number(0)), inputs, part, _ROUNDED, place
    )
    w.write(step, w.item(steps, row))
  return rounded, steps


def _add_pairs(w: Writer, one: Any, other: Any, added: Any) -> Any:
  """Two products and a sum, which x86 has an instruction for; it is found by
  this form.
  """
  products = w.mul(one, other)
  for first in range(2):
    lanes = ir.Constant(llvm.INTS, list(range(first, 2 * LANES, 2)))
    added = w.add(added, w.shuffle_vector(products, products, lanes))
  return added
