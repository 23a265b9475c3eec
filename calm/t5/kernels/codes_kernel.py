"""Products of many rows in 8 bits, by the instructions that CPUs have for them (AVX512-VNNI).

One instruction multiplies 64 bytes without a sign by 64 with one and adds them by fours. So
rows are given as code + 128, and what that adds is taken away behind: 128 times the sum of a
column's codes. Sums are whole numbers in 32 bits: neither the order of a sum nor the rows
beside a row change a bit of it, and the products are those of `EightBits`, bit for bit.

A matrix is packed once, 16 columns of four codes each beside one another: [columns / 16,
inputs / 4, 16, 4]. Sums of 12 rows and 32 columns stay in registers while all inputs pass. The
rows are shared by threads that live as long as a call: XLA runs a few operations one by one.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from llvmlite import ir

from calm.t5.kernels import llvm
from calm.t5.kernels.llvm import FLOAT, INDEX, INT, LANES, Frame, Writer, constant, number

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
  b, threads = w.b, llvm.num_cores()
  work = ir.Function(b.module, ir.FunctionType(INDEX, [INDEX]), "work")
  part = Writer(ir.IRBuilder(work.append_basic_block("begin")), b.module)
  (told,) = work.args
  of_call = Frame(part, part.word(told, 0))
  body(part, of_call, part.word(told, 1), part.word(told, 2))
  part.b.ret(number(0))
  parts = w.least(worth, number(threads))
  parts = b.select(b.icmp_signed(">", parts, number(1)), parts, number(1))
  # Of each part: the call, its first row and the one behind its last, its thread.
  parts_at = b.ptrtoint(b.alloca(INDEX, number(4 * threads)), INDEX)
  of_part = lambda i: b.add(parts_at, b.mul(i, number(4 * 8)))
  tall = number(_HEIGHTS[0])
  tiles = b.udiv(b.add(rows, number(_HEIGHTS[0] - 1)), tall)
  edge = lambda i: w.least(rows, b.mul(b.udiv(b.mul(i, tiles), parts), tall))
  begin = w.external("pthread_create", INT, [INDEX] * 4)
  end = w.external("pthread_join", INT, [INDEX] * 2)
  for i, _ in w.loop(number(0), parts, 1):
    for field, value in enumerate((frame.address, edge(i), edge(b.add(i, number(1))))):
      w.set_word(of_part(i), field, value)
    w.set_word(of_part(i), 3, number(0))
  for i, _ in w.loop(number(1), parts, 1):
    given = b.add(of_part(i), number(3 * 8)), number(0), b.ptrtoint(work, INDEX), of_part(i)
    failed = b.call(begin, given)
    with b.if_then(b.icmp_signed("!=", failed, ir.Constant(INT, 0))):
      w.set_word(of_part(i), 3, number(0))
      b.call(work, [of_part(i)])
  b.call(work, [of_part(number(0))])
  for i, _ in w.loop(number(1), parts, 1):
    thread = w.word(of_part(i), 3)
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
    peak = w.larger(peak, ir.Constant(FLOAT, 1e-30))
    # As `eight_bits.step`, in its rounding.
    step = b.fadd(b.fmul(peak, ir.Constant(FLOAT, float(np.float32(1 / 127)))), odd)
    w.store(step, w.item(steps, row))
    finer = w.spread(b.fdiv(ir.Constant(FLOAT, 1.0), step))
    out = b.add(coded, b.mul(row, inputs))
    for i, _ in w.loop(number(0), inputs, LANES):
      near = w.nearest(b.fmul(w.load(w.item(first, i)), finer))
      whole = b.add(b.fptosi(near, magnitude.type), constant(_SHIFT, INT))
      address = b.inttoptr(b.add(out, i), _BYTES.as_pointer())
      b.store(b.trunc(whole, _BYTES), address, align=1)


def _write_product(w: Writer, frame: Frame, begin: Any, end: Any) -> None:
  rows, steps, matrix, sums, scales = (frame.numbers(frame.argument(i)) for i in range(5))
  inputs, columns = frame.size(frame.argument(0), 1), frame.size(frame.result(0), 1)
  out = frame.numbers(frame.result(0))

  def written(first: Any, last: Any, column: Any, width: int) -> None:
    """Rows from one to another, and so many vectors of columns."""
    for height in _HEIGHTS:
      whole = w.b.sub(last, w.b.urem(w.b.sub(last, first), number(height)))
      for row, _ in w.loop(first, whole, height):
        made = _sums(w, inputs, rows, row, height, matrix, column, width)
        scaled(made, row, height, column, width)
      first = whole

  def scaled(made: list[Any], row: Any, height: int, column: Any, width: int) -> None:
    b = w.b
    for v in range(width):
      place = b.add(column, number(LANES * v))
      away = b.mul(w.load_ints(w.item(sums, place)), constant(_SHIFT, INT))
      scale = w.load(w.item(scales, place))
      for r in range(height):
        at = b.add(row, number(r))
        step = w.spread(w.load_one(w.item(steps, at)))
        whole = b.sitofp(b.sub(made[r * width + v], away), scale.type)
        w.store(b.fmul(whole, b.fmul(step, scale)), w.at(out, columns, at, place))

  wide = w.below(columns, LANES * _WIDTH)
  for first, _ in w.loop(begin, end, _BLOCK):
    last = w.least(end, w.b.add(first, number(_BLOCK)))
    for column, _ in w.loop(number(0), wide, LANES * _WIDTH):
      written(first, last, column, _WIDTH)
    for column, _ in w.loop(wide, columns, LANES):
      written(first, last, column, 1)


def _sums(w: Writer, inputs, rows, row, height: int, matrix, column, width: int) -> list[Any]:
  """Sums of products of codes, by row and vector of columns, with `_SHIFT` in them."""
  b, vector, word = w.b, llvm.vector_of(INT), INT.as_pointer()
  panels = [
    b.add(matrix, b.mul(b.add(column, number(LANES * v)), inputs)) for v in range(width)
  ]
  given = [b.add(rows, b.mul(b.add(row, number(r)), inputs)) for r in range(height)]
  multiply = w.external("llvm.x86.avx512.vpdpbusd.512", vector, [vector] * 3)
  sums = [constant(0, INT) for _ in range(height * width)]
  for i, values in w.loop(number(0), inputs, _QUAD, sums):
    at = b.mul(i, number(LANES))
    codes = [w.load_ints(b.add(panel, at)) for panel in panels]
    for r, start in enumerate(given):
      quad = w.spread(b.load(b.inttoptr(b.add(start, i), word), align=1))
      for v, part in enumerate(codes):
        place = r * width + v
        values[place] = b.call(multiply, [values[place], quad, part])
  return sums
