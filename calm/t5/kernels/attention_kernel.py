"""Attention of one query a row, in pieces that XLA's threads share.

XLA:CPU makes the small products of a query with its keys in one thread. Here one query reads
the keys and values of its row and head once, in order, and only those from the first to the
last that it may see: a core then waits for memory only.
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp

from calm.t5.kernels import llvm
from calm.t5.kernels.llvm import INT, LANES, LEAST, Frame, Writer, constant, number

# Keys and values of so many numbers are worth a second thread: one that is awake, or one that
# has to be woken for them.
AWAKE_NUMBERS, ASLEEP_NUMBERS = 2**16, 2**18
_MASKED = -1e9  # biases of keys that nobody sees are lower


def attend(rows, query, keys, values, bias, now, single_threaded: bool) -> jax.Array:
  """See `kernels.attend`."""
  _, heads, head_dim = query.shape
  enough = ASLEEP_NUMBERS if single_threaded else AWAKE_NUMBERS
  pieces = llvm.pieces(keys[0].size * len(query) >= enough)
  # Their numbers, written out, are one operation more of every layer of a step.
  rows = jnp.zeros((0,), jnp.int32) if rows is None else rows
  given = rows, *(x.astype(jnp.float32) for x in (query, keys, values, bias, *(now or ())))
  has_now = now is not None
  target = llvm.target(
    f"calm_attention_{head_dim}{'_now' if has_now else ''}",
    lambda w, frame: _Piece(w, frame, head_dim, has_now).write(),
  )
  made = [
    jax.ffi.ffi_call(target, jax.ShapeDtypeStruct((end - begin, head_dim), "float32"))(
      jnp.full((), begin, jnp.int32), *given
    )
    for begin, end in itertools.pairwise(llvm.split(len(query) * heads, pieces))
  ]
  return jnp.concatenate(made).reshape(len(query), -1)


class _Piece:
  """One call, for heads of one size, whose numbers stay in registers.

  Its arrays: the first query and head of the piece, then those of `attend`. `rows` is empty
  where as many queries read each row, in order. The result is [heads of the piece, head_dim].
  """

  def __init__(self, w: Writer, frame: Frame, head_dim: int, has_now: bool):
    self._w, self._head_dim = w, number(head_dim)
    arrays = [frame.argument(i) for i in range(9 if has_now else 6)]
    begin, self._rows, self._queries, self._keys, self._values, self._biases, *now = map(
      frame.numbers, arrays
    )
    self._first, self._begin, self._now = begin, w.load_index(begin), now
    self._num_queries = frame.size(arrays[2], 0)
    self._in_order = w.b.icmp_signed("==", frame.size(arrays[1], 0), number(0))
    self._batch = frame.size(arrays[3], 0)
    self._heads, self._length = frame.size(arrays[3], 1), frame.size(arrays[3], 2)
    self._bias_rows, self._bias_heads = frame.size(arrays[5], 0), frame.size(arrays[5], 1)
    self._count, self._out = frame.size(frame.result(0), 0), frame.numbers(frame.result(0))
    self._weights = w.room(self._length)
    full, left = divmod(head_dim, LANES)
    masks = [None] * full + ([w.first_lanes(number(left))] if left else [])
    self._parts = [(number(LANES * i), mask) for i, mask in enumerate(masks)]

  def write(self) -> None:
    w, zero = self._w, number(0)
    for i, _ in w.loop(zero, self._count, 1):
      place = w.b.add(self._begin, i)
      query, head = w.b.udiv(place, self._heads), w.b.urem(place, self._heads)
      row = self._row(query)
      out = self._at(self._out, i)
      with w.b.if_else(w.b.icmp_signed("<", row, zero)) as (absent, present):
        with absent:
          for part, mask in self._parts:
            w.store(constant(0.0), w.item(out, part), mask)
        with present:
          self._attend(query, head, row, out)

  def _row(self, query: Any) -> Any:
    """The row of the batch that a query reads."""
    w, b = self._w, self._w.b
    # Where no row is named, something else that may be read.
    named = b.select(self._in_order, self._first, w.item(self._rows, query))
    own = b.udiv(b.mul(query, self._batch), self._num_queries)
    return b.select(self._in_order, own, w.load_index(named))

  def _attend(self, query: Any, head: Any, row: Any, out: Any) -> None:
    w, b = self._w, self._w.b
    of_query = b.add(b.mul(query, self._heads), head)
    cached = b.mul(b.add(b.mul(row, self._heads), head), self._length)
    keys, values = self._at(self._keys, cached), self._at(self._values, cached)
    bias = self._bias(query, head, row)
    asked = self._vectors(self._at(self._queries, of_query))
    seen = first, last = self._seen(bias)
    now, own_value = self._own(asked, of_query, head)
    peak = self._scores(asked, keys, bias, seen, now)
    totals = [constant(0.0)]
    for place, part, mask in w.parts(self._weights, first, last, totals):
      weight = w.exp(b.fsub(part, w.spread(peak)))
      if mask is not None:
        weight = b.select(mask, weight, constant(0.0))
      w.store(weight, w.item(self._weights, place), mask)
      totals[0] = b.fadd(totals[0], weight)
    own = w.exp(b.fsub(w.spread(now), w.spread(peak)))
    own = b.select(w.spread(b.fcmp_ordered(">", now, w.float(LEAST))), own, constant(0.0))
    total = b.fadd(w.spread(w.folded(totals[0], b.fadd)), own)
    mixed = [b.fmul(own, part) for part in own_value]
    for key, sums in w.loop(first, last, 1, mixed):
      weight = w.spread(w.load_one(w.item(self._weights, key)))
      parts = self._vectors(self._at(values, key))
      sums[:] = [w.fused(weight, part, sum_) for part, sum_ in zip(parts, sums, strict=True)]
    # 0 where no key is seen; NaN stays.
    nothing = b.fcmp_ordered("==", total, constant(0.0))
    scale = b.select(nothing, constant(0.0), b.fdiv(constant(1.0), total))
    for (part, mask), sum_ in zip(self._parts, mixed, strict=True):
      w.store(b.fmul(sum_, scale), w.item(out, part), mask)

  def _bias(self, query: Any, head: Any, row: Any) -> Any:
    """Where the biases of a query's keys begin: its own, its row's, or everybody's."""
    b, one = self._w.b, number(1)
    by_query = b.icmp_signed("==", self._bias_rows, self._num_queries)
    own = b.select(by_query, query, self._w.least(row, b.sub(self._bias_rows, one)))
    head = self._w.least(head, b.sub(self._bias_heads, one))
    return self._w.at(
      self._biases, self._length, b.add(b.mul(own, self._bias_heads), head), number(0)
    )

  def _seen(self, bias: Any) -> tuple[Any, Any]:
    """The first key that is not masked, and the one behind the last such; equal if none."""
    w, b = self._w, self._w.b
    count = w.spread(b.trunc(self._length, INT))
    ends = [count, constant(0, INT)]
    for place, part, _ in w.parts(bias, number(0), self._length, ends, LEAST):
      open_, here = b.fcmp_ordered(">=", part, constant(_MASKED)), w.lanes(place)
      behind = b.add(here, constant(1, INT))
      first = b.select(open_, w.least(here, ends[0]), ends[0])
      ends[:] = first, b.select(open_, w.most(behind, ends[1]), ends[1])
    first, last = w.folded(ends[0], w.least), w.folded(ends[1], w.most)
    return w.index(w.least(first, last)), w.index(last)

  def _own(self, asked: list[Any], of_query: Any, head: Any) -> tuple[Any, list[Any]]:
    """The score of the key that a query has besides, `LEAST` if none, and its value."""
    w = self._w
    if not self._now:
      return w.float(LEAST), [constant(0.0)] * len(self._parts)
    keys, values, bias = self._now
    score = self._product(asked, self._at(keys, of_query))
    score = w.b.fadd(score, w.load_one(w.item(bias, head)))
    return score, self._vectors(self._at(values, of_query))

  def _scores(self, asked: list[Any], keys: Any, bias: Any, seen: tuple[Any, Any], now) -> Any:
    """The largest score; scores are written to the weights."""
    w, peak = self._w, [now]
    for key, values in w.loop(*seen, 1, peak):
      score = self._product(asked, self._at(keys, key))
      score = w.b.fadd(score, w.load_one(w.item(bias, key)))
      w.store(score, w.item(self._weights, key))
      values[0] = w.larger(score, values[0])
    return peak[0]

  def _product(self, asked: list[Any], key: Any) -> Any:
    """query . key"""
    sum_ = constant(0.0)
    for one, other in zip(asked, self._vectors(key), strict=True):
      sum_ = self._w.fused(one, other, sum_)
    return self._w.folded(sum_, self._w.b.fadd)

  def _vectors(self, begin: Any) -> list[Any]:
    """A head's numbers."""
    w = self._w
    return [w.load(w.item(begin, part), mask) for part, mask in self._parts]

  def _at(self, array: Any, place: Any) -> Any:
    """Where the head of this number begins in an array of heads."""
    return self._w.at(array, self._head_dim, place, number(0))
