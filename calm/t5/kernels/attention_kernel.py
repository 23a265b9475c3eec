"""Attention of one query a row, in pieces that XLA's threads share. A query reads its keys and
values once, in order, and only those from the first to the last that it may see."""

from typing import Any

import jax
import jax.numpy as jnp
from llvmlite import ir

from calm.t5.kernels import llvm
from calm.t5.kernels.llvm import FLOAT, INT, LEAST, Frame, Writer, constant, number

# Keys and values of so many numbers are worth a second thread: one that is awake, or one that
# has to be woken for them.
AWAKE_NUMBERS, ASLEEP_NUMBERS = 2**16, 2**18
_MASKED = -1e9  # biases of keys that nobody sees are lower


def attend(rows, query, keys, values, bias, now, single_threaded: bool) -> jax.Array:
  """See `kernels.attend`."""
  queries, heads, head_dim = query.shape
  enough = ASLEEP_NUMBERS if single_threaded else AWAKE_NUMBERS
  # Their numbers, written out, are one operation more of every layer of a step.
  rows = jnp.zeros((0,), jnp.int32) if rows is None else rows
  given = rows, *(x.astype(jnp.float32) for x in (query, keys, values, bias, *(now or ())))
  has_now = now is not None
  target = llvm.target(
    f"calm_attention_{head_dim}{'_now' if has_now else ''}",
    lambda w, frame: _Piece(w, frame, head_dim, has_now).write(),
  )

  def piece(begin: int, end: int) -> jax.Array:
    call = jax.ffi.ffi_call(target, jax.ShapeDtypeStruct((end - begin, head_dim), "float32"))
    return call(jnp.full((), begin, jnp.int32), *given)

  shared = keys[0].size * queries >= enough
  return llvm.in_pieces(queries * heads, shared, piece).reshape(queries, -1)


class _Piece:
  """One call, for heads of one size, whose numbers stay in registers. Its arrays: the first
  query and head of the piece, then those of `attend`."""

  def __init__(self, w: Writer, frame: Frame, head_dim: int, has_now: bool):
    self._w, self._head_dim = w, number(head_dim)
    arrays = [frame.argument(i) for i in range(9 if has_now else 6)]
    begin, self._rows, self._queries, self._keys, self._values, self._biases, *now = map(
      frame.numbers, arrays
    )
    self._first, self._begin, self._now = begin, w.sext(w.read(begin, INT), llvm.INDEX), now
    self._num_queries = frame.size(arrays[2], 0)
    self._in_order = w.icmp_signed("==", frame.size(arrays[1], 0), number(0))
    self._batch = frame.size(arrays[3], 0)
    self._heads, self._length = frame.size(arrays[3], 1), frame.size(arrays[3], 2)
    self._bias_rows, self._bias_heads = frame.size(arrays[5], 0), frame.size(arrays[5], 1)
    self._count, self._out = frame.size(frame.result(0), 0), frame.numbers(frame.result(0))
    self._weights = w.ptrtoint(w.alloca(FLOAT, self._length), llvm.INDEX)
    self._parts = w.parts_of(head_dim)

  def write(self) -> None:
    w, zero = self._w, number(0)
    for i, _ in w.loop(zero, self._count, 1):
      place = w.add(self._begin, i)
      query, head = w.udiv(place, self._heads), w.urem(place, self._heads)
      row = self._row(query)
      out = self._at(self._out, i)
      with w.if_else(w.icmp_signed("<", row, zero)) as (absent, present):
        with absent:
          for part, mask in self._parts:
            w.write(constant(0.0), w.item(out, part), mask)
        with present:
          self._attend(query, head, row, out)

  def _row(self, query: Any) -> Any:
    """The row of the batch that a query reads."""
    w = self._w
    # Where no row is named, something else that may be read.
    named = w.select(self._in_order, self._first, w.item(self._rows, query))
    own = w.udiv(w.mul(query, self._batch), self._num_queries)
    return w.select(self._in_order, own, w.sext(w.read(named, INT), llvm.INDEX))

  def _attend(self, query: Any, head: Any, row: Any, out: Any) -> None:
    w = self._w
    of_query = w.add(w.mul(query, self._heads), head)
    cached = w.mul(w.add(w.mul(row, self._heads), head), self._length)
    keys, values = self._at(self._keys, cached), self._at(self._values, cached)
    bias = self._bias(query, head, row)
    asked = self._vectors(self._at(self._queries, of_query))
    first, last = self._seen(bias)
    now, own_value = self._own(asked, of_query, head)
    peaks = [now]
    for key, carried in w.loop(first, last, 1, peaks):
      score = w.fadd(
        self._product(asked, self._at(keys, key)), w.read(w.item(bias, key), FLOAT)
      )
      w.write(score, w.item(self._weights, key))
      carried[0] = w.larger(score, carried[0])
    (peak,), totals = peaks, list[Any]([constant(0.0)])
    for place, part, mask in w.parts(self._weights, first, last, totals):
      weight = w.exp(w.fsub(part, w.spread(peak)))
      if mask is not None:
        weight = w.select(mask, weight, constant(0.0))
      w.write(weight, w.item(self._weights, place), mask)
      totals[0] = w.fadd(totals[0], weight)
    own = w.exp(w.fsub(w.spread(now), w.spread(peak)))
    least = ir.Constant(FLOAT, LEAST)
    own = w.select(w.spread(w.fcmp_ordered(">", now, least)), own, constant(0.0))
    total = w.fadd(w.spread(w.folded(totals[0], w.fadd)), own)
    mixed = [w.fmul(own, part) for part in own_value]
    for key, sums in w.loop(first, last, 1, mixed):
      weight = w.spread(w.read(w.item(self._weights, key), FLOAT))
      parts = self._vectors(self._at(values, key))
      sums[:] = [w.fused(weight, part, sum_) for part, sum_ in zip(parts, sums, strict=True)]
    # 0 where no key is seen; NaN stays.
    nothing = w.fcmp_ordered("==", total, constant(0.0))
    scale = w.select(nothing, constant(0.0), w.fdiv(constant(1.0), total))
    for (part, mask), sum_ in zip(self._parts, mixed, strict=True):
      w.write(w.fmul(sum_, scale), w.item(out, part), mask)

  def _bias(self, query: Any, head: Any, row: Any) -> Any:
    """Where the biases of a query's keys begin: its own, its row's, or everybody's."""
    w, one = self._w, number(1)
    by_query = w.icmp_signed("==", self._bias_rows, self._num_queries)
    own = w.select(by_query, query, w.least(row, w.sub(self._bias_rows, one)))
    head = w.least(head, w.sub(self._bias_heads, one))
    place = w.add(w.mul(own, self._bias_heads), head)
    return w.at(self._biases, self._length, place, number(0))

  def _seen(self, bias: Any) -> tuple[Any, Any]:
    """The first key that is not masked, and the one behind the last such; equal if none."""
    w = self._w
    ends = [w.spread(w.trunc(self._length, INT)), constant(0, INT)]
    for place, part, _ in w.parts(bias, number(0), self._length, ends, LEAST):
      open_, here = w.fcmp_ordered(">=", part, constant(_MASKED)), w.lanes(place)
      behind = w.add(here, constant(1, INT))
      first = w.select(open_, w.least(here, ends[0]), ends[0])
      ends[:] = first, w.select(open_, w.most(behind, ends[1]), ends[1])
    first, last = w.folded(ends[0], w.least), w.folded(ends[1], w.most)
    return w.sext(w.least(first, last), llvm.INDEX), w.sext(last, llvm.INDEX)

  def _own(self, asked: list[Any], of_query: Any, head: Any) -> tuple[Any, list[Any]]:
    """The score of the key that a query has besides, `LEAST` if none, and its value."""
    w = self._w
    if not self._now:
      return ir.Constant(FLOAT, LEAST), [constant(0.0)] * len(self._parts)
    keys, values, bias = self._now
    score = self._product(asked, self._at(keys, of_query))
    score = w.fadd(score, w.read(w.item(bias, head), FLOAT))
    return score, self._vectors(self._at(values, of_query))

  def _product(self, asked: list[Any], key: Any) -> Any:
    """query . key"""
    sum_ = constant(0.0)
    for one, other in zip(asked, self._vectors(key), strict=True):
      sum_ = self._w.fused(one, other, sum_)
    return self._w.folded(sum_, self._w.fadd)

  def _vectors(self, begin: Any) -> list[Any]:
    """A head's numbers."""
    w = self._w
    return [w.read_some(w.item(begin, part), mask) for part, mask in self._parts]

  def _at(self, array: Any, place: Any) -> Any:
    """Where the head of this number begins in an array of heads."""
    return self._w.at(array, self._head_dim, place, number(0))
