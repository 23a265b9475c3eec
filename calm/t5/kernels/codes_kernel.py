"""Products of many rows in 8 bits, by the instructions that CPUs have for them (AVX512-VNNI).

One multiplies 64 bytes without a sign by 64 with one and adds them by fours: rows are given as
code + 128, and 128 times the sum of a column's codes is taken away behind. A matrix is packed
once, 16 columns of four codes each beside one another: [columns / 16, inputs / 4, 16, 4]."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from llvmlite import ir

from calm.t5.kernels import llvm
from calm.t5.kernels.llvm import FLOAT, INDEX, INT, INTS, LANES, Frame, Writer, constant, number

# Rows, and vectors of columns, whose sums are in registers: 24 of 32.
_HEIGHTS, _WIDTH = (12, 4, 1), 2
# Rows that meet all columns before the next do: what they write stays in a core's cache.
_BLOCK = 96
# Codes with a sign become codes without one.
_SHIFT = 128
_QUAD = 4
_BYTES = ir.VectorType(ir.IntType(8), LANES)
# A thread takes as long to begin as so many products of numbers, or as reading so many numbers.
_LEAST_PRODUCTS, _LEAST_NUMBERS = 2**24, 2**19


def pack(codes: jax.Array) -> jax.Array:
  """See `kernels.pack`."""
  inputs = codes.shape[1]
  beside = codes.reshape(-1, LANES, inputs // _QUAD, _QUAD).swapaxes(1, 2)
  return beside.reshape(-1, inputs // _QUAD, LANES * _QUAD)


def product_in_8_bits(x, packed, sums, scales) -> jax.Array:
  """See `kernels.product_in_8_bits`."""
  rows, shape = x.reshape(-1, x.shape[-1]), jax.ShapeDtypeStruct
  given = shape(rows.shape, jnp.uint8), shape(rows.shape[:1], jnp.float32)
  coding = functools.partial(_share, body=_write_codes, least=_LEAST_NUMBERS, multiplies=False)
  codes, steps = jax.ffi.ffi_call(llvm.target("calm_codes_in_8_bits", coding), given)(rows)
  whole = functools.partial(_share, body=_write_product, least=_LEAST_PRODUCTS, multiplies=True)
  made = jax.ffi.ffi_call(
    llvm.target("calm_product_in_8_bits", whole), shape((len(rows), len(sums)), jnp.float32)
  )(codes, steps, packed, sums, scales)
  return made.reshape(*x.shape[:-1], -1)


def _share(w: Writer, frame: Frame, *, body, least: int, multiplies: bool) -> None:
  """Writes a call whose rows are shared by threads, one for every `least` of its work, this one
  being the first; `body` writes what is done with the rows from one to another."""
  rows, inputs = (frame.size(frame.argument(0), axis) for axis in (0, 1))
  amount = w.mul(rows, inputs)
  amount = w.mul(amount, frame.size(frame.result(0), 1)) if multiplies else amount
  worth, threads = w.udiv(amount, number(least)), llvm.num_cores()
  work = ir.Function(w.module, ir.FunctionType(INDEX, [INDEX]), "work")
  part = Writer(work.append_basic_block("begin"))
  (told,) = work.args
  of_call = Frame(part, part.word(told, 0))
  body(part, of_call, part.word(told, 1), part.word(told, 2))
  part.ret(number(0))
  parts = w.least(worth, number(threads))
  parts = w.select(w.icmp_signed(">", parts, number(1)), parts, number(1))
  # Of each part: the call, its first row and the one behind its last, its thread.
  parts_at = w.ptrtoint(w.alloca(INDEX, number(4 * threads)), INDEX)
  of_part = lambda i: w.add(parts_at, w.mul(i, number(4 * 8)))
  tall = number(_HEIGHTS[0])
  tiles = w.udiv(w.add(rows, number(_HEIGHTS[0] - 1)), tall)
  edge = lambda i: w.least(rows, w.mul(w.udiv(w.mul(i, tiles), parts), tall))
  for i, _ in w.loop(number(0), parts, 1):
    for field, value in enumerate((frame.address, edge(i), edge(w.add(i, number(1))))):
      w.set_word(of_part(i), field, value)
    w.set_word(of_part(i), 3, number(0))
  for i, _ in w.loop(number(1), parts, 1):
    thread = w.add(of_part(i), number(3 * 8))
    given = [thread, number(0), w.ptrtoint(work, INDEX), of_part(i)]
    failed = w.call_by_name("pthread_create", INT, given)
    with w.if_then(w.icmp_signed("!=", failed, ir.Constant(INT, 0))):
      w.set_word(of_part(i), 3, number(0))
      w.call(work, [of_part(i)])
  w.call(work, [of_part(number(0))])
  for i, _ in w.loop(number(1), parts, 1):
    thread = w.word(of_part(i), 3)
    with w.if_then(w.icmp_signed("!=", thread, number(0))):
      w.call_by_name("pthread_join", INT, [thread, number(0)])


def _write_codes(w: Writer, frame: Frame, begin: Any, end: Any) -> None:
  x = frame.argument(0)
  inputs = frame.size(x, 1)
  x, coded, steps = map(frame.numbers, (x, frame.result(0), frame.result(1)))
  magnitude = constant(0x7FFFFFFF, INT)
  for row, _ in w.loop(begin, end, 1):
    first = w.at(x, inputs, row, number(0))
    peaks = [constant(0.0), constant(0.0)]
    for i, values in w.loop(number(0), inputs, LANES, peaks):
      part = w.read(w.item(first, i))
      size = w.bitcast(w.and_(w.bitcast(part, INTS), magnitude), part.type)
      # What is no finite number makes the step, and so the row, none.
      values[:] = w.larger(size, values[0]), w.fused(part, constant(0.0), values[1])
    peak, odd = w.folded(peaks[0], w.larger), w.folded(peaks[1], w.fadd)
    peak = w.larger(peak, ir.Constant(FLOAT, 1e-30))
    # As `eight_bits.step`, in its rounding.
    step = w.fadd(w.fmul(peak, ir.Constant(FLOAT, float(np.float32(1 / 127)))), odd)
    w.write(step, w.item(steps, row))
    finer = w.spread(w.fdiv(ir.Constant(FLOAT, 1.0), step))
    out = w.add(coded, w.mul(row, inputs))
    for i, _ in w.loop(number(0), inputs, LANES):
      near = w.nearest(w.fmul(w.read(w.item(first, i)), finer))
      whole = w.add(w.fptosi(near, INTS), constant(_SHIFT, INT))
      address = w.inttoptr(w.add(out, i), _BYTES.as_pointer())
      w.store(w.trunc(whole, _BYTES), address, align=1)


def _write_product(w: Writer, frame: Frame, begin: Any, end: Any) -> None:
  rows, steps, matrix, sums, scales = (frame.numbers(frame.argument(i)) for i in range(5))
  inputs, columns = frame.size(frame.argument(0), 1), frame.size(frame.result(0), 1)
  out = frame.numbers(frame.result(0))

  def written(first: Any, last: Any, column: Any, width: int) -> None:
    """Rows from one to another, and so many vectors of columns."""
    for height in _HEIGHTS:
      whole = w.sub(last, w.urem(w.sub(last, first), number(height)))
      for row, _ in w.loop(first, whole, height):
        made = _sums(w, inputs, rows, row, height, matrix, column, width)
        scaled(made, row, height, column, width)
      first = whole

  def scaled(made: list[Any], row: Any, height: int, column: Any, width: int) -> None:
    for v in range(width):
      place = w.add(column, number(LANES * v))
      away = w.mul(w.read(w.item(sums, place), INTS), constant(_SHIFT, INT))
      scale = w.read(w.item(scales, place))
      for r in range(height):
        at = w.add(row, number(r))
        step = w.spread(w.read(w.item(steps, at), FLOAT))
        whole = w.sitofp(w.sub(made[r * width + v], away), scale.type)
        w.write(w.fmul(whole, w.fmul(step, scale)), w.at(out, columns, at, place))

  wide = w.below(columns, LANES * _WIDTH)
  for first, _ in w.loop(begin, end, _BLOCK):
    last = w.least(end, w.add(first, number(_BLOCK)))
    for column, _ in w.loop(number(0), wide, LANES * _WIDTH):
      written(first, last, column, _WIDTH)
    for column, _ in w.loop(wide, columns, LANES):
      written(first, last, column, 1)


def _sums(w: Writer, inputs, rows, row, height: int, matrix, column, width: int) -> list[Any]:
  """Sums of products of codes, by row and vector of columns, with `_SHIFT` in them."""
  panels = [
    w.add(matrix, w.mul(w.add(column, number(LANES * v)), inputs)) for v in range(width)
  ]
  given = [w.add(rows, w.mul(w.add(row, number(r)), inputs)) for r in range(height)]
  sums = [constant(0, INT) for _ in range(height * width)]
  for i, values in w.loop(number(0), inputs, _QUAD, sums):
    at = w.mul(i, number(LANES))
    codes = [w.read(w.add(panel, at), INTS) for panel in panels]
    for r, start in enumerate(given):
      quad = w.spread(w.load(w.inttoptr(w.add(start, i), INT.as_pointer()), align=1))
      for v, part in enumerate(codes):
        place = r * width + v
        multiplied = [values[place], quad, part]
        values[place] = w.call_by_name("llvm.x86.avx512.vpdpbusd.512", INTS, multiplied)
  return sums
