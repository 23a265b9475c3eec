"""Functions for XLA, written in LLVM's own language and compiled in a tenth of a second.

A compiler of Python's loops (numba) keeps the sums of a product in memory, which takes eight
rows three times as long, and compiles for two seconds.
"""

import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import llvmlite.binding as llvm
from llvmlite import ir

# XLA:CPU runs up to nine operations that are ready one after another; more, side by side.
PIECES = 12
LANES = 16  # numbers of a vector
LEAST = -3.0e38  # of numbers that are worth a comparison
_BYTES, _WORD = 4, 8  # of a number, of a word of a frame
FLOAT, INT, INDEX = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_POINTER = ir.IntType(8).as_pointer()
_ALIGNED = ir.Constant(INT, _BYTES)
# Cephes' expf: e^x = 2^n e^r, |r| <= log(2) / 2, with a polynomial for e^r.
_LOG2_E, _LOG_2_HIGH, _LOG_2_LOW = 1.44269504, 0.693359375, -2.12194440e-4
_POLYNOMIAL = (
  1.98756915e-4, 1.39819995e-3, 8.3334519e-3, 4.16657959e-2, 0.166666655, 0.5,
)  # fmt: skip


# XLA calls a function with one `XLA_FFI_CallFrame` (xla/ffi/api/c_api.h, whose layout a major
# version keeps). All that is read of it lies in words of 64 bits: of what is asked besides a
# call, and of the arrays.
_EXTENSION, _ARGUMENTS, _RESULTS = 1, 9, 14
# Words of an array, `XLA_FFI_Buffer`.
_DATA, _SIZES = 3, 5
# Words of `XLA_FFI_Metadata_Extension` and of its `XLA_FFI_Metadata`; the version that this was
# written by, which XLA refuses where it can no longer serve it.
_METADATA, _VERSION, _TRAITS = 3, 3, 4
_MAJOR, _MINOR = 0, 3
# What XLA was given; it calls them for as long as the process lives.
_COMPILED: dict[str, Any] = {}
_lock = threading.Lock()


def target(name: str, write: Callable[["Writer", "Frame"], None]) -> str:
  """The name by which XLA calls a function, compiled when it is first asked for."""
  with _lock:
    if name not in _COMPILED:
      engine = _compile(write)
      kind = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)
      function = kind(engine.get_function_address("kernel"))
      jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(function), platform="cpu")
      _COMPILED[name] = engine, function
  return name


def split(count: int, parts: int) -> list[int]:
  """Where so many parts of equal ones end, from 0 on: none is empty, so there may be fewer."""
  parts = min(parts, count)
  return [i * count // parts for i in range(parts + 1)]


def pieces(worth: bool = True) -> int:
  """Calls that a function is divided into: several where it is worth that XLA's threads share
  them, and XLA has more than one."""
  return PIECES if worth and num_cores() > 1 else 1


def num_cores() -> int:
  """Cores that this process may use, as XLA counts them."""
  allowed = getattr(os, "sched_getaffinity", None)  # Linux only
  return len(allowed(0)) if allowed else os.cpu_count() or 1


def _compile(write: Callable[["Writer", "Frame"], None]) -> Any:
  """Machine code of this process that has a C function `kernel`."""
  module = ir.Module()
  module.triple = llvm.get_process_triple()
  function = ir.Function(module, ir.FunctionType(INDEX, [INDEX]), "kernel")
  begin, asked, called, end = map(
    function.append_basic_block, ("begin", "asked", "called", "end")
  )
  w = Writer(ir.IRBuilder(begin), module)
  frame = Frame(w, function.args[0])
  asks = w.word(frame.address, _EXTENSION)
  w.b.cbranch(w.b.icmp_signed("!=", asks, number(0)), asked, called)
  w.b.position_at_end(asked)
  metadata = w.word(asks, _METADATA)
  w.set_word(metadata, _VERSION, number(_MAJOR | _MINOR << 32))
  w.set_word(metadata, _TRAITS, number(0))
  w.b.branch(end)
  w.b.position_at_end(called)
  write(w, frame)
  w.b.branch(end)
  w.b.position_at_end(end)
  w.b.ret(number(0))  # no error
  llvm.initialize_native_target()
  llvm.initialize_native_asmprinter()
  parsed = llvm.parse_assembly(str(module))
  parsed.verify()
  machine = llvm.Target.from_default_triple().create_target_machine(
    cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3
  )
  engine = llvm.create_mcjit_compiler(parsed, machine)
  engine.finalize_object()
  return engine


def number(value: int) -> ir.Constant:
  """An index, or an address."""
  return ir.Constant(INDEX, value)


def vector_of(kind: Any) -> Any:
  """`LANES` of a kind."""
  return ir.VectorType(kind, LANES)


def constant(value: float, kind: Any = FLOAT) -> Any:
  """A vector of one number."""
  return ir.Constant(vector_of(kind), [value] * LANES)


class Writer:
  """Writes instructions; `b` writes single ones."""

  def __init__(self, builder: ir.IRBuilder, module: ir.Module):
    self.b, self._module = builder, module

  def loop(
    self, begin: Any, end: Any, step: int, carried: list[Any] | None = None
  ) -> Iterator[tuple[Any, list[Any]]]:
    """What is written for (i, values) that it yields is done for begin, begin + step, ... below
    `end`. The list of values, `carried` at first, is to be set to the next ones; behind the
    loop it has the last."""
    b, before = self.b, self.b.block
    test, body, after = (b.append_basic_block() for _ in range(3))
    b.branch(test)
    b.position_at_end(test)
    values = [] if carried is None else carried
    phis = [b.phi(INDEX), *(b.phi(value.type) for value in values)]
    for phi, value in zip(phis, (begin, *values), strict=True):
      phi.add_incoming(value, before)
    b.cbranch(b.icmp_signed("<", phis[0], end), body, after)
    b.position_at_end(body)
    values[:] = phis[1:]
    yield phis[0], values
    for phi, value in zip(phis, (b.add(phis[0], number(step)), *values), strict=True):
      phi.add_incoming(value, b.block)
    b.branch(test)
    b.position_at_end(after)
    values[:] = phis[1:]

  def parts(
    self, row: Any, begin: Any, end: Any, carried: list[Any], instead: float = 0.0
  ) -> Iterator[tuple[Any, Any, Any]]:
    """(its place, a vector, its mask) of every vector of a row from `begin` to `end`.

    `carried` is to be set to the next values, as in `loop`. The last vector, the only one with
    a mask, has `instead` where that says no.
    """
    at = lambda place: self.item(row, place)
    whole = self.b.add(begin, self.below(self.b.sub(end, begin), LANES))
    for place, _ in self.loop(begin, whole, LANES, carried):
      yield place, self.load(at(place)), None
    mask = self.first_lanes(self.b.sub(end, whole))
    yield whole, self.load(at(whole), mask, instead), mask

  def word(self, address: Any, index: int) -> Any:
    """A word of an array of words."""
    return self.b.load(self._word(address, index))

  def set_word(self, address: Any, index: int, value: Any) -> None:
    """Writes one."""
    self.b.store(value, self._word(address, index))

  def _word(self, address: Any, index: int) -> Any:
    return self._typed(self.b.add(address, number(_WORD * index)), INDEX)

  def at(self, array: Any, row_size: Any, row: Any, column: Any) -> Any:
    """The address of a number of an array of rows."""
    return self.item(array, self.b.add(self.b.mul(row, row_size), column))

  def item(self, array: Any, place: Any) -> Any:
    """The address of a number of an array."""
    return self.b.add(array, self.b.mul(place, number(_BYTES)))

  def below(self, value: Any, power: int) -> Any:
    """The largest multiple of a power of two that is not above a value."""
    return self.b.and_(value, number(-power))

  def least(self, one: Any, other: Any) -> Any:
    """The smaller index."""
    return self.b.select(self.b.icmp_signed("<", one, other), one, other)

  def most(self, one: Any, other: Any) -> Any:
    """The larger index."""
    return self.b.select(self.b.icmp_signed(">", one, other), one, other)

  def first_lanes(self, count: Any) -> Any:
    """The mask of the first lanes of a vector."""
    return self.b.icmp_signed("<", self.lanes(number(0)), self.spread(self.b.trunc(count, INT)))

  def load(self, address: Any, mask: Any = None, instead: float = 0.0) -> Any:
    """A vector of float32; where a mask says no, nothing is read."""
    pointer = self._typed(address, vector_of(FLOAT))
    if mask is None:
      return self.b.load(pointer, align=_BYTES)
    given = [pointer.type, INT, mask.type, vector_of(FLOAT)]
    load = self.external("llvm.masked.load.v16f32.p0v16f32", vector_of(FLOAT), given)
    return self.b.call(load, [pointer, _ALIGNED, mask, constant(instead)])

  def load_one(self, address: Any) -> Any:
    """A float32."""
    return self.b.load(self._typed(address, FLOAT))

  def load_ints(self, address: Any) -> Any:
    """A vector of int32."""
    return self.b.load(self._typed(address, vector_of(INT)), align=_BYTES)

  def load_index(self, address: Any) -> Any:
    """An int32, as an index."""
    return self.index(self.b.load(self._typed(address, INT)))

  def index(self, value: Any) -> Any:
    """An int32 as an index."""
    return self.b.sext(value, INDEX)

  def float(self, value: float) -> Any:
    """A single number."""
    return ir.Constant(FLOAT, value)

  def room(self, count: Any) -> Any:
    """The address of room for so many numbers, until the function returns."""
    return self.b.ptrtoint(self.b.alloca(FLOAT, count), INDEX)

  def store(self, value: Any, address: Any, mask: Any = None) -> None:
    """Writes a vector, or a single number; where a mask says no, nothing is written."""
    pointer = self._typed(address, value.type)
    if mask is None:
      self.b.store(value, pointer, align=_BYTES)
      return
    given = [value.type, pointer.type, INT, mask.type]
    store = self.external("llvm.masked.store.v16f32.p0v16f32", ir.VoidType(), given)
    self.b.call(store, [value, pointer, _ALIGNED, mask])

  def prefetch(self, address: Any) -> None:
    """Has a line of memory read ahead; it may be none of this process's."""
    ask = self.external("llvm.prefetch.p0i8", ir.VoidType(), [_POINTER, INT, INT, INT])
    flags = [ir.Constant(INT, flag) for flag in (0, 3, 1)]  # to read, soon, data
    self.b.call(ask, [self.b.inttoptr(address, _POINTER), *flags])

  def fused(self, one: Any, other: Any, added: Any) -> Any:
    """one * other + added, of vectors, rounded once where the processor can."""
    return self._of_vectors("fmuladd", one, other, added)

  def nearest(self, x: Any) -> Any:
    """Whole numbers nearest to a vector's, the even one of two."""
    return self._of_vectors("nearbyint", x)

  def exp(self, x: Any) -> Any:
    """e^x to 3e-7 of itself, of x held between -87 and 87; NaN of NaN."""
    b, least, most = self.b, constant(-87.0), constant(87.0)
    x = b.select(b.fcmp_ordered("<", x, least), least, x)
    x = b.select(b.fcmp_ordered(">", x, most), most, x)
    nearest = self.nearest(b.fmul(x, constant(_LOG2_E)))
    r = self.fused(nearest, constant(-_LOG_2_HIGH), x)
    r = self.fused(nearest, constant(-_LOG_2_LOW), r)
    p = constant(_POLYNOMIAL[0])
    for factor in _POLYNOMIAL[1:]:
      p = self.fused(p, r, constant(factor))
    p = self.fused(b.fmul(p, r), r, b.fadd(r, constant(1.0)))
    known = b.select(b.fcmp_ordered("ord", x, x), nearest, constant(0.0))
    n = b.fptosi(known, vector_of(INT))
    power = b.shl(b.add(n, constant(127, INT)), constant(23, INT))
    return b.fmul(p, b.bitcast(power, x.type))

  def lanes(self, begin: Any) -> Any:
    """begin, begin + 1, ... as int32."""
    order = ir.Constant(vector_of(INT), list(range(LANES)))
    return self.b.add(self.spread(self.b.trunc(begin, INT)), order)

  def larger(self, one: Any, other: Any) -> Any:
    """The larger of two numbers, or of each lane's; the other one where one is NaN."""
    return self.b.select(self.b.fcmp_ordered(">", one, other), one, other)

  def spread(self, value: Any) -> Any:
    """A vector of one number."""
    undefined = ir.Constant(vector_of(value.type), ir.Undefined)
    one = self.b.insert_element(undefined, value, ir.Constant(INT, 0))
    return self.b.shuffle_vector(one, undefined, constant(0, INT))

  def folded(self, values: Any, combine: Callable[[Any, Any], Any]) -> Any:
    """A vector's lanes combined: its halves, their halves, and so on."""
    width = LANES
    while width > 1:
      width //= 2
      order = [lane % width + width for lane in range(LANES)]
      upper = self.b.shuffle_vector(values, values, ir.Constant(vector_of(INT), order))
      values = combine(values, upper)
    return self.b.extract_element(values, ir.Constant(INT, 0))

  def _typed(self, address: Any, kind: Any) -> Any:
    return self.b.inttoptr(address, kind.as_pointer())

  def _of_vectors(self, name: str, *given: Any) -> Any:
    """What one of LLVM's functions makes of vectors of float32."""
    kinds = [value.type for value in given]
    return self.b.call(
      self.external(f"llvm.{name}.v{LANES}f32", vector_of(FLOAT), kinds), given
    )

  def external(self, name: str, result: Any, given: list[Any]) -> Any:
    """A function of LLVM's or of this process."""
    known = self._module.globals.get(name)
    return known or ir.Function(self._module, ir.FunctionType(result, given), name)


class Frame:
  """What XLA hands to a call, at `address`."""

  def __init__(self, writer: Writer, address: Any):
    self._w, self.address = writer, address

  def argument(self, i: int) -> Any:
    """The address of what describes the `i`th array that a call is given."""
    return self._w.word(self._w.word(self.address, _ARGUMENTS), i)

  def result(self, i: int) -> Any:
    """The same of the `i`th array that it fills."""
    return self._w.word(self._w.word(self.address, _RESULTS), i)

  def numbers(self, array: Any) -> Any:
    """The address of an array's numbers."""
    return self._w.word(array, _DATA)

  def size(self, array: Any, axis: int) -> Any:
    """Numbers along an axis."""
    return self._w.word(self._w.word(array, _SIZES), axis)
