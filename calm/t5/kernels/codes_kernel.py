"""Products of many rows in 8 bits, by the instructions that CPUs have for them (AVX512-VNNI).

One instruction multiplies 64 bytes without a sign by 64 with one and adds them by fours. So
rows are given as code + 128, and what that adds is taken away behind: 128 times the sum of a
column's codes. Sums are whole numbers in 32 bits: neither the order of a sum nor the rows
beside a row change a bit of it, and the products are those of `EightBits`, bit for bit.

A matrix is packed once, 16 columns of four codes each beside one another: [columns / 16,
inputs / 4, 16, 4]. Sums of 12 rows and 32 columns stay in registers while all inputs pass. The
rows are shared by threads that live as long as a call: XLA runs a few operations one by one.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from llvmlite import ir

from calm.t5.kernels import llvm
from calm.t5.kernels.llvm import INDEX, INT, LANES, Frame, Writer, constant, number

# Rows, and vectors of columns, whose sums are in registers: 24 of 32.
_HEIGHTS, _WIDTH = (12, 4, 1), 2
# Rows that meet all columns before the next do: what they write stays in a core's cache.
_BLOCK = 96
# Codes with a sign become codes without one.
_SHIFT = 128
_QUAD = 4
_BYTE, _BYTES = ir.IntType(8), ir.VectorType(ir.IntType(8), LANES)
# A thread takes as long to begin as so many products of numbers, or as reading so many numbers.
_LEAST_PRODUCTS, _LEAST_NUMBERS = 2**24, 2**19

# Writes what is done with the rows of a call from one to another.
_Body = Callable[[Writer, Frame, Any, Any], None]


def pack(codes: jax.Array) -> jax.Array:
  """See `kernels.pack`."""
  inputs = codes.shape[1]
  beside = codes.reshape(-1, LANES, inputs // _QUAD, _QUAD).swapaxes(1, 2)
  return beside.reshape(-1, inputs // _QUAD, LANES * _QUAD)


def product_in_8_bits(x, packed, sums, scales) -> jax.Array:
  """See `kernels.product_in_8_bits`."""
  rows, shape = x.reshape(-1, x.shape[-1]), jax.ShapeDtypeStruct
  given = shape(rows.shape, jnp.uint8), shape(rows.shape[:1], jnp.float32)
  coded = llvm.target("calm_codes_in_8_bits", _sharing(_write_codes, _LEAST_NUMBERS, False))
  codes, steps = jax.ffi.ffi_call(coded, given)(rows)
  multiplied = llvm.target(
    "calm_product_in_8_bits", _sharing(_write_product, _LEAST_PRODUCTS, True)
  )
  made = jax.ffi.ffi_call(multiplied, shape((len(rows), len(sums)), jnp.float32))(
    codes, steps, packed, sums, scales
  )
  return made.reshape(*x.shape[:-1], -1)


def _sharing(body: _Body, least: int, multiplies: bool) -> Callable[[Writer, Frame], None]:
  """Writes a call whose rows are shared by threads, one for every `least` of its work."""

  def write(w: Writer, frame: Frame) -> None:
    rows, inputs = (frame.size(frame.argument(0), axis) for axis in (0, 1))
    work = w.b.mul(rows, inputs)
    work = w.b.mul(work, frame.size(frame.result(0), 1)) if multiplies else work
    _share(w, frame, rows, w.b.udiv(work, number(least)), body)

  return write


def _share(w: Writer, frame: Frame, rows: Any, worth: Any, body: _Body) -> None:
  """Divides rows among as many threads as the work is worth, this one being the first."""
  b, word, threads = w.b, number(8), llvm.num_cores()
  work = ir.Function(b.module, ir.FunctionType(INDEX, [INDEX]), "work")
  part = Writer(ir.IRBuilder(work.append_basic_block("begin")), b.module)
  (told,) = work.args
  of_call = Frame(part, part.word(told, 0))
  body(part, of_call, part.word(told, 1), part.word(told, 2))
  part.b.ret(number(0))
  parts = w.most(number(1), w.least(worth, number(threads)))
  # Of each part: the call, its first row and the one behind its last, its thread.
  told = b.ptrtoint(b.alloca(INDEX, number(4 * threads)), INDEX)
  of_part = lambda i, field: b.add(told, b.mul(b.add(b.mul(i, number(4)), number(field)), word))
  put = lambda value, at: b.store(value, b.inttoptr(at, INDEX.as_pointer()))
  tall = number(_HEIGHTS[0])
  tiles = b.udiv(b.add(rows, number(_HEIGHTS[0] - 1)), tall)
  edge = lambda i: w.least(rows, b.mul(b.udiv(b.mul(i, tiles), parts), tall))
  begin = w.external("pthread_create", INT, [INDEX] * 4)
  end = w.external("pthread_join", INT, [INDEX] * 2)
  for i, _ in w.loop(number(0), parts, 1):
    for field, value in enumerate((frame.address, edge(i), edge(b.add(i, number(1))))):
      put(value, of_part(i, field))
    put(number(0), of_part(i, 3))
  for i, _ in w.loop(number(1), parts, 1):
    start = b.ptrtoint(work, INDEX)
    failed = b.call(begin, [of_part(i, 3), number(0), start, of_part(i, 0)])
    with b.if_then(b.icmp_signed("!=", failed, ir.Constant(INT, 0))):
      put(number(0), of_part(i, 3))
      b.call(work, [of_part(i, 0)])
  b.call(work, [of_part(number(0), 0)])
  for i, _ in w.loop(number(1), parts, 1):
    thread = w.word(of_part(i, 3), 0)
    with b.if_then(b.icmp_signed("!=", thread, number(0))):
      b.call(end, [thread, number(0)])


def _write_codes(w: Writer, frame: Frame, begin: Any, end: Any) -> None:
  b, x = w.b, frame.argument(0)
  inputs = frame.size(x, 1)
  x, coded, steps = map(frame.numbers, (x, frame.result(0), frame.result(1)))
  magnitude = constant(0x7FFFFFFF, INT)
  for row, _ in w.loop(begin, end, 1):
    first = w.at(x, inputs, row, number(0))
    peaks = [constant(0.0), constant(0.0)]
    for i, values in w.loop(number(0), inputs, LANES, peaks):
      part = w.load(w.item(first, i))
      size = b.bitcast(b.and_(b.bitcast(part, magnitude.type), magnitude), part.type)
      # What is no finite number makes the step, and so the row, none.
      values[:] = w.larger(size, values[0]), w.fused(part, constant(0.0), values[1])
    peak, odd = w.folded(peaks[0], w.larger), w.folded(peaks[1], b.fadd)
    peak = w.larger(peak, w.float(1e-30))
    # As `eight_bits.step`, in its rounding.
    step = b.fadd(b.fmul(peak, w.float(float(np.float32(1 / 127)))), odd)
    w.store(step, w.item(steps, row))
    finer = w.spread(b.fdiv(w.float(1.0), step))
    out = b.add(coded, b.mul(row, inputs))
    for i, _ in w.loop(number(0), inputs, LANES):
      near = w.nearest(b.fmul(w.load(w.item(first, i)), finer))
      whole = b.add(b.fptosi(near, magnitude.type), constant(_SHIFT, INT))
      address = b.inttoptr(b.add(out, i), _BYTES.as_pointer())
      b.store(b.trunc(whole, _BYTES), address, align=1)


def _write_product(w: Writer, frame: Frame, begin: Any, end: Any) -> None:
  arrays = [frame.argument(i) for i in range(5)]
  rows, steps, matrix, sums, scales = map(frame.numbers, arrays)
  columns = frame.size(frame.result(0), 1)
  task = _Task(
    w, frame.size(arrays[0], 1), columns, rows, steps, matrix, sums, scales,
    frame.numbers(frame.result(0)),
  )  # fmt: skip
  wide = w.below(columns, LANES * _WIDTH)
  for first, _ in w.loop(begin, end, _BLOCK):
    last = w.least(end, w.b.add(first, number(_BLOCK)))
    for column, _ in w.loop(number(0), wide, LANES * _WIDTH):
      task.write(first, last, column, _WIDTH)
    for column, _ in w.loop(wide, columns, LANES):
      task.write(first, last, column, 1)


@dataclasses.dataclass(frozen=True)
class _Task:
  """A product: numbers of a row of either side, and where its arrays begin."""

  w: Writer
  inputs: Any
  columns: Any
  rows: Any
  steps: Any
  matrix: Any
  sums: Any
  scales: Any
  out: Any

  def write(self, begin: Any, end: Any, column: Any, width: int) -> None:
    """Rows from one to another, and so many vectors of columns."""
    w, b = self.w, self.w.b
    for height in _HEIGHTS:
      whole = b.sub(end, b.urem(b.sub(end, begin), number(height)))
      for row, _ in w.loop(begin, whole, height):
        self._tile(row, height, column, width)
      begin = whole

  def _tile(self, row: Any, height: int, column: Any, width: int) -> None:
    w, b = self.w, self.w.b
    vector, word = llvm.vector_of(INT), INT.as_pointer()
    panels = [
      b.add(self.matrix, b.mul(b.add(column, number(LANES * v)), self.inputs))
      for v in range(width)
    ]
    given = [b.add(self.rows, b.mul(b.add(row, number(r)), self.inputs)) for r in range(height)]
    multiply = w.external("llvm.x86.avx512.vpdpbusd.512", vector, [vector] * 3)
    sums = [constant(0, INT) for _ in range(height * width)]
    for i, values in w.loop(number(0), self.inputs, _QUAD, sums):
      at = b.mul(i, number(LANES))
      codes = [w.load_ints(b.add(panel, at)) for panel in panels]
      for r, start in enumerate(given):
        quad = w.spread(b.load(b.inttoptr(b.add(start, i), word), align=1))
        for v, part in enumerate(codes):
          place = r * width + v
          values[place] = b.call(multiply, [values[place], quad, part])
    for v in range(width):
      place = b.add(column, number(LANES * v))
      away = b.mul(w.load_ints(w.item(self.sums, place)), constant(_SHIFT, INT))
      scale = w.load(w.item(self.scales, place))
      for r in range(height):
        at = b.add(row, number(r))
        step = w.spread(w.load_one(w.item(self.steps, at)))
        whole = b.sitofp(b.sub(sums[r * width + v], away), scale.type)
        made = b.fmul(whole, b.fmul(step, scale))
        w.store(made, w.at(self.out, self.columns, at, place))
