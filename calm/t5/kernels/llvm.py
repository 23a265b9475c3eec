"""Functions for XLA, written in LLVM's own language and compiled in a tenth of
a second.

A compiler of Python's loops (numba) keeps the sums of a product in memory,
which takes eight rows three times as long, and compiles for two seconds.
"""

import ctypes
import itertools
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir

# XLA:CPU runs up to nine operations that are ready one after another; more,
# side by side.
_PIECES = 12
LANES = 16  # numbers of a vector
LEAST = -3.0e38  # of numbers that are worth a comparison
_LEAST_BITS = int(np.float32(1e-30).view(np.int32))  # of a row's largest number
# of a number, of a word of a frame
_BYTES = 4
_WORD = 8
FLOAT = ir.FloatType()
INT = ir.IntType(32)
INDEX = ir.IntType(64)
FLOATS = ir.VectorType(FLOAT, LANES)
INTS = ir.VectorType(INT, LANES)
_ALIGNED = ir.Constant(INT, _BYTES)
# Cephes' expf: e^x = 2^n e^r, |r| <= log(2) / 2, with a polynomial for e^r.
_LOG2_E = 1.44269504
_LOG_2_HIGH = 0.693359375
_LOG_2_LOW = -2.12194440e-4
_POLYNOMIAL = (
  1.98756915e-4,
  1.39819995e-3,
  8.3334519e-3,
  4.16657959e-2,
  0.166666655,
  0.5,
)

# XLA calls a function with one `XLA_FFI_CallFrame` (xla/ffi/api/c_api.h, whose
# layout a major version keeps). All that is read of it lies in words of 64
# bits: of what is asked besides a call, and of the arrays.
_EXTENSION = 1
_ARGUMENTS = 9
_RESULTS = 14
# Words of an array, `XLA_FFI_Buffer`.
_DATA = 3
_SIZES = 5
# Words of `XLA_FFI_Metadata_Extension` and of its `XLA_FFI_Metadata`; the
# version that this was written by, which XLA refuses where it can no longer
# serve it.
_METADATA = 3
_VERSION = 3
_TRAITS = 4
_MAJOR = 0
_MINOR = 3
# What XLA was given; it calls them for as long as the process lives.
_COMPILED: dict[str, Any] = {}
_lock = threading.Lock()


def target(name: str, write: Callable[["Writer", "Frame"], None]) -> str:
  """The name by which XLA calls a function, compiled when it is first asked
  for.
  """
  with _lock:
    if name not in _COMPILED:
      engine = _compile(write)
      kind = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)
      function = kind(engine.get_function_address("kernel"))
      jax.ffi.register_ffi_target(
        name, jax.ffi.pycapsule(function), platform="cpu"
      )
      _COMPILED[name] = engine, function
  return name


def in_pieces(
  count: int, shared: bool, call: Callable[[int, int], Any], axis: int = 0
) -> Any:
  """Arrays that `call` makes of begin and end of pieces of `count` rows, heads
  or tiles, one behind the other: of as many pieces as threads share, or of one.
  """
  pieces = min(_PIECES, count) if shared and num_cores() > 1 else 1
  ends = itertools.pairwise(i * count // pieces for i in range(pieces + 1))

  def together(*parts):
    return jnp.concatenate(parts, axis)

  return jax.tree.map(together, *(call(begin, end) for begin, end in ends))


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
  w = Writer(begin)
  frame = Frame(w, function.args[0])
  asks = w.word(frame.address, _EXTENSION)
  w.cbranch(w.icmp_signed("!=", asks, number(0)), asked, called)
  w.position_at_end(asked)
  metadata = w.word(asks, _METADATA)
  w.set_word(metadata, _VERSION, number(_MAJOR | _MINOR << 32))
  w.set_word(metadata, _TRAITS, number(0))
  w.branch(end)
  w.position_at_end(called)
  write(w, frame)
  w.branch(end)
  w.position_at_end(end)
  w.ret(number(0))  # no error
  llvm.initialize_native_target()
  llvm.initialize_native_asmprinter()
  parsed = llvm.parse_assembly(str(module))
  parsed.verify()
  machine = llvm.Target.from_default_triple().create_target_machine(
    cpu=llvm.get_host_cpu_name(),
    features=llvm.get_host_cpu_features().flatten(),
    opt=3,
  )
  engine = llvm.create_mcjit_compiler(parsed, machine)
  engine.finalize_object()
  return engine


def number(value: int) -> ir.Constant:
  """An index, or an address."""
  return ir.Constant(INDEX, value)


def constant(value: float, kind: Any = FLOAT) -> ir.Constant:
  """A vector of one number."""
  return ir.Constant(ir.VectorType(kind, LANES), [value] * LANES)


class Writer(ir.IRBuilder):
  """Writes instructions; addresses, sizes and places are indices."""

  def loop(
    self, begin: Any, end: Any, step: int, carried: list[Any] | None = None
  ) -> Iterator[tuple[Any, list[Any]]]:
    """What is written for (i, values) that it yields is done for begin, begin +
    step, ... below `end`. The list of values, `carried` at first, is to be set
    to the next ones; behind the loop it has the last.
    """
    before = self.block
    test, body, after = (self.append_basic_block() for _ in range(3))
    self.branch(test)
    self.position_at_end(test)
    values = [] if carried is None else carried
    phis = [self.phi(INDEX), *(self.phi(value.type) for value in values)]
    for phi, value in zip(phis, (begin, *values), strict=True):
      phi.add_incoming(value, before)
    self.cbranch(self.icmp_signed("<", phis[0], end), body, after)
    self.position_at_end(body)
    values[:] = phis[1:]
    yield phis[0], values
    for phi, value in zip(
      phis, (self.add(phis[0], number(step)), *values), strict=True
    ):
      phi.add_incoming(value, self.block)
    self.branch(test)
    self.position_at_end(after)
    values[:] = phis[1:]

  def parts(
    self,
    row: Any,
    begin: Any,
    end: Any,
    carried: list[Any],
    instead: float = 0.0,
  ) -> Iterator[tuple[Any, Any, Any]]:
    """(its place, a vector, its mask) of every vector of a row from `begin` to
    `end`; `carried` is as in `loop`. Only the last has a mask, and has
    `instead` where that says no.
    """
    whole = self.add(begin, self.below(self.sub(end, begin), LANES))
    for place, _ in self.loop(begin, whole, LANES, carried):
      yield place, self.read(self.item(row, place)), None
    mask = self.first_lanes(self.sub(end, whole))
    yield whole, self.read_some(self.item(row, whole), mask, instead), mask

  def parts_of(self, size: int) -> list[tuple[Any, Any]]:
    """(place, mask) of every vector of a row of so many numbers; only the last
    may have one.
    """
    left = size % LANES
    masks = [None] * (size // LANES) + (
      [self.first_lanes(number(left))] if left else []
    )
    return [(number(LANES * i), mask) for i, mask in enumerate(masks)]

  def scratch(self, count: Any) -> Any:
    """The address of so many bytes, or a vector more, of this call's own."""
    vectors = self.add(self.udiv(count, number(_BYTES * LANES)), number(1))
    return self.ptrtoint(self.alloca(FLOATS, vectors), INDEX)

  def word(self, address: Any, index: int) -> Any:
    return self.read(self.add(address, number(_WORD * index)), INDEX)

  def set_word(self, address: Any, index: int, value: Any) -> None:
    place = self.add(address, number(_WORD * index))
    self.store(value, self.inttoptr(place, INDEX.as_pointer()))

  def at(self, array: Any, row_size: Any, row: Any, column: Any) -> Any:
    """The address of a number of an array of rows."""
    return self.item(array, self.add(self.mul(row, row_size), column))

  def item(self, array: Any, place: Any) -> Any:
    """The address of a number of an array."""
    return self.add(array, self.mul(place, number(_BYTES)))

  def below(self, value: Any, power: int) -> Any:
    """The largest multiple of a power of two that is not above a value."""
    return self.and_(value, number(-power))

  def least(self, one: Any, other: Any) -> Any:
    return self.select(self.icmp_signed("<", one, other), one, other)

  def most(self, one: Any, other: Any) -> Any:
    return self.select(self.icmp_signed(">", one, other), one, other)

  def first_lanes(self, count: Any) -> Any:
    """The mask of the first lanes of a vector."""
    return self.icmp_signed(
      "<", self.lanes(number(0)), self.spread(self.trunc(count, INT))
    )

  def read(self, address: Any, kind: Any = FLOATS) -> Any:
    """A vector, or a single number."""
    align = _BYTES if isinstance(kind, ir.VectorType) else None
    return self.load(self.inttoptr(address, kind.as_pointer()), align=align)

  def read_some(self, address: Any, mask: Any, instead: float = 0.0) -> Any:
    """A vector of float32 of which nothing is read where its mask, if it has
    one, says no.
    """
    if mask is None:
      return self.read(address)
    pointer = self.inttoptr(address, FLOATS.as_pointer())
    given = [pointer, _ALIGNED, mask, constant(instead)]
    return self.call_by_name("llvm.masked.load.v16f32.p0v16f32", FLOATS, given)

  def write(self, value: Any, address: Any, mask: Any = None) -> None:
    """Writes a vector, or a single number; where a mask says no, nothing is
    written.
    """
    pointer = self.inttoptr(address, value.type.as_pointer())
    if mask is None:
      self.store(value, pointer, align=_BYTES)
    else:
      name = "llvm.masked.store.v16f32.p0v16f32"
      self.call_by_name(name, ir.VoidType(), [value, pointer, _ALIGNED, mask])

  def fused(self, one: Any, other: Any, added: Any) -> Any:
    """one * other + added, of vectors, rounded once where the processor can."""
    return self.call_by_name(
      f"llvm.fmuladd.v{LANES}f32", FLOATS, [one, other, added]
    )

  def exp(self, x: Any) -> Any:
    """e^x to 3e-7 of itself, of x held between -87 and 87; NaN of NaN."""
    least = constant(-87.0)
    most = constant(87.0)
    x = self.select(self.fcmp_ordered("<", x, least), least, x)
    x = self.select(self.fcmp_ordered(">", x, most), most, x)
    scaled = self.fmul(x, constant(_LOG2_E))
    nearest = self.call_by_name(f"llvm.nearbyint.v{LANES}f32", FLOATS, [scaled])
    r = self.fused(nearest, constant(-_LOG_2_HIGH), x)
    r = self.fused(nearest, constant(-_LOG_2_LOW), r)
    p = constant(_POLYNOMIAL[0])
    for factor in _POLYNOMIAL[1:]:
      p = self.fused(p, r, constant(factor))
    p = self.fused(self.fmul(p, r), r, self.fadd(r, constant(1.0)))
    known = self.select(self.fcmp_ordered("ord", x, x), nearest, constant(0.0))
    n = self.fptosi(known, INTS)
    power = self.shl(self.add(n, constant(127, INT)), constant(23, INT))
    return self.fmul(p, self.bitcast(power, x.type))

  def rounded(
    self,
    x: Any,
    count: Any,
    part: Any,
    kind: Any,
    place: Callable[[Any], Any],
    shift: int = 0,
  ) -> Any:
    """The step of a row, this part of its largest number without its sign.
    Every number's steps and `shift` are written, as vectors of a kind, at the
    `place` of each vector's first.
    """

    # As bits, whose order is that of the numbers without a sign: NaN is the
    # largest.
    def largest(one, other):
      return self.select(self.icmp_signed(">", one, other), one, other)

    bits = list[Any]([constant(_LEAST_BITS, INT)])
    for _, numbers, _ in self.parts(x, number(0), count, bits):
      unsigned = self.and_(
        self.bitcast(numbers, INTS), constant(2**31 - 1, INT)
      )
      bits[0] = largest(unsigned, bits[0])
    step = self.fmul(self.bitcast(self.folded(bits[0], largest), FLOAT), part)
    factor = self.spread(self.fdiv(FLOAT(1.0), step))
    for i, numbers, _ in self.parts(x, number(0), count, []):
      name = f"llvm.nearbyint.v{LANES}f32"
      steps = self.call_by_name(name, FLOATS, [self.fmul(numbers, factor)])
      code = self.fptosi(steps, INTS)
      self.write(
        self.trunc(self.add(code, constant(shift, INT)), kind), place(i)
      )
    return step

  def lanes(self, begin: Any) -> Any:
    """begin, begin + 1, ... as int32."""
    order = ir.Constant(INTS, list(range(LANES)))
    return self.add(self.spread(self.trunc(begin, INT)), order)

  def larger(self, one: Any, other: Any) -> Any:
    """The larger of two numbers, or of each lane's; the other one where one is
    NaN.
    """
    return self.select(self.fcmp_ordered(">", one, other), one, other)

  def spread(self, value: Any) -> Any:
    """A vector of one number."""
    undefined = ir.Constant(ir.VectorType(value.type, LANES), ir.Undefined)
    one = self.insert_element(undefined, value, ir.Constant(INT, 0))
    return self.shuffle_vector(one, undefined, constant(0, INT))

  def folded(self, values: Any, combine: Callable[[Any, Any], Any]) -> Any:
    """A vector's lanes combined: its halves, their halves, and so on."""
    width = LANES
    while width > 1:
      width //= 2
      order = [lane % width + width for lane in range(LANES)]
      upper = self.shuffle_vector(values, values, ir.Constant(INTS, order))
      values = combine(values, upper)
    return self.extract_element(values, ir.Constant(INT, 0))

  def folded_together(self, vectors: list[Any], width: int = LANES) -> Any:
    """Vectors whose blocks of so many lanes are added up, as `folded` does,
    until they lie in one: each block's sum behind the one before.
    """
    while len(vectors) > 1:
      width //= 2
      order = [i % width + i // width * 2 * width for i in range(LANES)]
      lower, upper = (
        ir.Constant(INTS, [i + add for i in order]) for add in (0, width)
      )
      pairs = list(zip(vectors[::2], vectors[1::2], strict=True))
      halves = (
        [self.shuffle_vector(*pair, lanes) for pair in pairs]
        for lanes in (lower, upper)
      )
      vectors = list(map(self.fadd, *halves))
    return vectors[0]

  def call_by_name(self, name: str, result: Any, given: list[Any]) -> Any:
    """Calls a function of LLVM's or of this process."""
    kind = ir.FunctionType(result, [value.type for value in given])
    known = self.module.globals.get(name)
    return self.call(known or ir.Function(self.module, kind, name), given)


class Frame:
  """What XLA hands to a call, at `address`; an array is the address of what
  describes it.
  """

  def __init__(self, writer: Writer, address: Any):
    self._w = writer
    self.address = address

  def argument(self, i: int) -> Any:
    return self._w.word(self._w.word(self.address, _ARGUMENTS), i)

  def result(self, i: int) -> Any:
    return self._w.word(self._w.word(self.address, _RESULTS), i)

  def numbers(self, array: Any) -> Any:
    """The address of an array's numbers."""
    return self._w.word(array, _DATA)

  def size(self, array: Any, axis: int) -> Any:
    """Numbers along an axis."""
    return self._w.word(self._w.word(array, _SIZES), axis)
