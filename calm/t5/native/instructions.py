"""Instructions in LLVM's own language, as functions for XLA are written.

A compiler of Python's loops (numba) keeps the sums of a product in memory, which takes eight
rows three times as long, and two seconds to compile what LLVM alone does in a tenth of one.
"""

from collections.abc import Callable, Iterator
from typing import Any

from llvmlite import ir

LANES = 16  # numbers of a vector
LEAST = -3.0e38  # of numbers that are worth a comparison
_BYTES, _WORD = 4, 8  # of a number, of a word of a frame
FLOAT, INT, INDEX, _BIT = ir.FloatType(), ir.IntType(32), ir.IntType(64), ir.IntType(1)
_POINTER = ir.IntType(8).as_pointer()
_ALIGNED = ir.Constant(INT, _BYTES)
# Cephes' expf: e^x = 2^n e^r, |r| <= log(2) / 2, with a polynomial for e^r.
_LOG2_E, _LOG_2_HIGH, _LOG_2_LOW = 1.44269504, 0.693359375, -2.12194440e-4
_POLYNOMIAL = (
  1.98756915e-4, 1.39819995e-3, 8.3334519e-3, 4.16657959e-2, 0.166666655, 0.5,
)  # fmt: skip


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
  """Writes instructions.

  Attributes:
    b: of single ones.
  """

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
    at = self.b.add(address, number(_WORD * index))
    return self.b.load(self._typed(at, INDEX))

  def set_word(self, address: Any, index: int, value: int) -> None:
    """Writes one."""
    at = self.b.add(address, number(_WORD * index))
    self.b.store(number(value), self._typed(at, INDEX))

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
    load = self._known("llvm.masked.load.v16f32.p0v16f32", vector_of(FLOAT), given)
    return self.b.call(load, [pointer, _ALIGNED, mask, constant(instead)])

  def load_one(self, address: Any) -> Any:
    """A float32."""
    return self.b.load(self._typed(address, FLOAT))

  def load_ints(self, address: Any, mask: Any = None) -> Any:
    """A vector of int32; where a mask says no, nothing is read."""
    return self.b.bitcast(self.load(address, mask), vector_of(INT))

  def load_index(self, address: Any) -> Any:
    """An int32, as an index."""
    return self.index(self.b.load(self._typed(address, INT)))

  def index(self, value: Any) -> Any:
    """An int32 as an index."""
    return self.b.sext(value, INDEX)

  def int(self, value: int) -> Any:
    """A single int32."""
    return ir.Constant(INT, value)

  def any(self, mask: Any) -> Any:
    """Whether a mask says yes somewhere."""
    bits = ir.IntType(LANES)
    return self.b.icmp_unsigned("!=", self.b.bitcast(mask, bits), ir.Constant(bits, 0))

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
    store = self._known("llvm.masked.store.v16f32.p0v16f32", ir.VoidType(), given)
    self.b.call(store, [value, pointer, _ALIGNED, mask])

  def ask_for(self, address: Any) -> None:
    """Has a line of memory read ahead; it may be none of this process's."""
    ask = self._known("llvm.prefetch.p0i8", ir.VoidType(), [_POINTER, INT, INT, INT])
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
    return self.b.call(self._known(f"llvm.{name}.v{LANES}f32", vector_of(FLOAT), kinds), given)

  def _known(self, name: str, result: Any, given: list[Any]) -> Any:
    """One of LLVM's own functions."""
    known = self._module.globals.get(name)
    return known or ir.Function(self._module, ir.FunctionType(result, given), name)
