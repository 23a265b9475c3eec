"""Products of many rows with matrices in 8 bits, and feed-forward blocks of
them, a few rows at a time: what lies between two products stays near, and no
row depends on those beside it.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from llvmlite import ir

from calm.t5.kernels import llvm
from calm.t5.kernels.llvm import (
  FLOAT,
  FLOATS,
  INTS,
  LANES,
  Frame,
  Writer,
  constant,
  number,
)
from calm.t5.platforms import GROUP, WIDTH

# Rows that meet a tile of columns at once: registers hold 24 vectors of sums.
_ROWS = 6
_VECTORS = WIDTH // LANES
_MULTIPLY_ADD = "llvm.x86.avx512.vpdpbusd.512"
_BYTES = ir.VectorType(ir.IntType(8), LANES)
# Products of two codes that are worth a second thread.
_SHARED_PRODUCTS = 2**24
_SHIFT = 128  # added to codes of rows, which must have no sign
# x / (1 + e^(x (a + b x^2))), the tanh form of GELU.
_GELU = (
  -2.0 * math.sqrt(2.0 / math.pi),
  -2.0 * math.sqrt(2.0 / math.pi) * 0.044715,
)


def _gelu(w: Writer, x: Any) -> Any:
  exponent = w.fused(w.fmul(x, x), constant(_GELU[1]), constant(_GELU[0]))
  return w.fdiv(x, w.fadd(constant(1.0), w.exp(w.fmul(x, exponent))))


ACTIVATIONS: dict[str, Callable[[Writer, Any], Any]] = {
  "linear": lambda w, x: x,
  "relu": lambda w, x: w.select(
    w.fcmp_unordered("<", x, constant(0.0)), constant(0.0), x
  ),
  "gelu": _gelu,
}


def product(
  x, matrices: Sequence[Any], activations: Sequence[str], count: Any
) -> jax.Array:
  """See `kernels.coded_product`."""
  rows = len(x)
  width = matrices[-1].scales.size
  used = jnp.asarray(rows if count is None else count, jnp.int32)
  blocks = -(-rows // _ROWS)
  tiles = width // WIDTH

  def columns(begin: int, end: int) -> jax.Array:
    begins = np.zeros(1, np.int32)
    shape = (1, 1, rows, (end - begin) * WIDTH)
    return heads(x, matrices, (), begins, used[None], begin * WIDTH, shape)[
      0, 0
    ]

  def piece(begin: int, end: int) -> jax.Array:
    first = _ROWS * begin
    last = min(rows, _ROWS * end)
    counts = jnp.clip(used - first, 0, last - first)[None]
    begins = np.array([first], np.int32)
    shape = (1, 1, last - first, width)
    return heads(x, matrices, activations, begins, counts, 0, shape)[0, 0]

  shared = rows * sum(m.codes.size for m in matrices) >= _SHARED_PRODUCTS
  if tiles > blocks and not activations:
    # each is read once for all rows
    made = llvm.in_pieces(tiles, shared, columns, axis=1)
  else:
    made = llvm.in_pieces(blocks, shared, piece)
  return made[:, : matrices[-1].outputs]


def heads(
  x, matrices, activations, begins, counts, first, shape: Sequence[int]
) -> jax.Array:
  """See `kernels.coded_heads`; `first` is a number."""
  name = "_".join(["calm_coded_product", *activations])
  target = llvm.target(name, lambda w, frame: _write(w, frame, activations))
  given = [part for m in matrices for part in (m.codes, m.shifts, m.scales)]
  call = jax.ffi.ffi_call(target, jax.ShapeDtypeStruct(shape, "float32"))
  return call(np.asarray(first, np.int32), x, begins, counts, *given)


class _Matrix:
  """Addresses of a matrix, and its sizes."""

  def __init__(self, w: Writer, frame: Frame, first: int):
    codes, shifts, scales = (frame.argument(first + i) for i in range(3))
    self.stride = w.mul(frame.size(codes, 1), number(GROUP))
    self.columns = frame.size(scales, 0)
    self.codes, self.shifts, self.scales = map(
      frame.numbers, (codes, shifts, scales)
    )


def _write(w: Writer, frame: Frame, activations: Sequence[str]) -> None:
  matrices = [_Matrix(w, frame, 4 + 3 * i) for i in range(len(activations) + 1)]
  first, x, begins, counts = (
    frame.numbers(frame.argument(i)) for i in range(4)
  )
  rows = _Rows(w, x, frame.size(frame.argument(1), 1), matrices, activations)

  def index(array, i):
    return w.sext(w.read(w.item(array, i), llvm.INT), llvm.INDEX)

  out = frame.numbers(frame.result(0))
  zero = number(0)
  result = frame.result(0)
  heads = frame.size(result, 1)
  width = frame.size(result, 3)
  room = w.mul(frame.size(result, 2), width)  # numbers of a head of a prompt
  for i, _ in w.loop(zero, frame.size(result, 0), 1):
    here = w.at(out, w.mul(heads, room), i, zero)
    tokens = index(counts, i)

    def place(row: Any, column: Any, here=here) -> Any:
      head = w.udiv(column, width)
      within = w.sub(column, w.mul(head, width))
      return w.at(here, room, head, w.add(w.mul(row, width), within))

    columns = index(first, zero), w.mul(heads, width)
    rows.multiply(index(begins, i), tokens, *columns, place)
    for head, _ in w.loop(zero, heads, 1):
      for behind, _ in w.loop(w.mul(tokens, width), room, LANES):
        w.write(constant(0.0), w.at(here, room, head, behind))


class _Rows:
  """Rows of `x` on their way through the matrices."""

  def __init__(
    self, w: Writer, x: Any, inputs: Any, matrices: list[_Matrix], activations
  ):
    self._w = w
    self._x = x
    self._inputs = inputs
    self._names = activations
    (*self._inner, self._outer), self._first = matrices, matrices[0]
    # Codes, which may be written a vector too far, steps, and states of the
    # rows at hand.
    most = w.mul(w.most(self._first.stride, self._outer.stride), number(_ROWS))
    self._codes = w.scratch(w.add(most, number(LANES)))
    self._steps = w.scratch(number(LANES * 4))
    self._hidden = w.scratch(w.mul(self._first.columns, number(_ROWS * 4)))

  def multiply(
    self, begin, count, column, columns, place: Callable[[Any, Any], Any]
  ) -> None:
    """So many rows, from `begin`, by so many columns, from `column`; `place` of
    both says where a product is written.
    """
    w = self._w
    every = number(_ROWS)
    zero = number(0)
    last = self._w.sub(count, number(1))
    width = self._first.columns
    stride = self._outer.stride
    for block, _ in w.loop(zero, count, _ROWS):
      # The last row again where there are no more: a tail needs no code of its
      # own.
      def row(r, block=block):
        return w.least(w.add(block, r), last)

      for r, _ in w.loop(zero, every, 1):
        given = w.at(self._x, self._inputs, w.add(begin, row(r)), zero)
        self._round(r, given, self._inputs, self._first.stride)
      if self._inner:
        for tile, _ in w.loop(zero, width, WIDTH):
          for matrix, name in zip(self._inner, self._names, strict=True):
            for r, at, value in self._products(matrix, tile):
              value, at = (
                ACTIVATIONS[name](w, value),
                w.at(self._hidden, width, number(r), at),
              )
              w.write(
                value if matrix is self._first else w.fmul(value, w.read(at)),
                at,
              )
        for r, _ in w.loop(zero, every, 1):
          given = w.at(self._hidden, width, r, zero)
          self._round(r, given, stride, stride)
      for tile, _ in w.loop(zero, columns, WIDTH):
        for r, at, value in self._products(self._outer, w.add(column, tile)):
          w.write(value, place(row(number(r)), w.sub(at, column)))

  def _round(self, r: Any, x: Any, count: Any, stride: Any) -> None:
    """Codes of one of the rows, and what they are multiplied with."""
    w = self._w
    codes = self._w.add(self._codes, self._w.mul(r, stride))
    step = w.rounded(
      x, count, FLOAT(1 / 127), _BYTES, lambda i: w.add(codes, i), _SHIFT
    )
    w.write(step, w.item(self._steps, r))

  def _products(
    self, matrix: _Matrix, column: Any
  ) -> Iterator[tuple[int, Any, Any]]:
    """(row, column, vector) of the rows' products with a tile of columns."""
    w = self._w
    codes = self._codes
    places = [w.add(column, number(v * LANES)) for v in range(_VECTORS)]
    sums: list[Any] = [
      w.read(w.item(matrix.shifts, at), INTS) for at in places
    ] * _ROWS
    tile = w.add(matrix.codes, w.mul(column, matrix.stride))
    rows = [w.add(codes, w.mul(number(r), matrix.stride)) for r in range(_ROWS)]
    for i, values in w.loop(number(0), matrix.stride, GROUP, sums):
      line = w.add(tile, w.mul(i, number(WIDTH)))
      parts = [
        w.read(w.add(line, number(v * LANES * GROUP)), INTS)
        for v in range(_VECTORS)
      ]
      for r, row in enumerate(rows):
        four = w.spread(w.read(w.add(row, i), llvm.INT))
        for at, part in enumerate(parts, start=r * _VECTORS):
          values[at] = w.call_by_name(
            _MULTIPLY_ADD, INTS, [values[at], four, part]
          )
    for r in range(_ROWS):
      step = w.spread(w.read(w.item(self._steps, number(r)), FLOAT))
      for v, at in enumerate(places):
        scale = w.fmul(step, w.read(w.item(matrix.scales, at)))
        yield r, at, w.fmul(w.sitofp(sums[r * _VECTORS + v], FLOATS), scale)
