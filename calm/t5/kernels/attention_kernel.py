"""Attention of one query a row, or of a few, in pieces that XLA's threads
share. Queries of one row meet its keys and values together, which are read
once, in order, from the first to the last that one of them may see; what
becomes of a query does not depend on those beside it.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from llvmlite import ir

from calm.t5.kernels import llvm
from calm.t5.kernels.llvm import (
  FLOAT,
  INT,
  LANES,
  LEAST,
  Frame,
  Writer,
  constant,
  number,
)

# Keys and values of so many numbers are worth a second thread: one that is
# awake, or one that has to be woken for them.
AWAKE_NUMBERS = 2**16
ASLEEP_NUMBERS = 2**18
_MASKED = -1e9  # biases of keys that nobody sees are lower
_SUMS = 16  # vectors of sums, which registers hold


def attend(
  rows, query, keys, values, bias, now, single_threaded: bool
) -> jax.Array:
  """See `kernels.attend`."""
  queries, heads, head_dim = query.shape
  # queries of one row, side by side
  together = queries // len(keys) if rows is None else 1
  enough = ASLEEP_NUMBERS if single_threaded else AWAKE_NUMBERS
  # Their numbers, written out, are one operation more of every layer of a step.
  rows = jnp.zeros((0,), jnp.int32) if rows is None else rows
  given = (
    rows,
    *(x.astype(jnp.float32) for x in (query, keys, values, bias, *(now or ()))),
  )
  has_now = now is not None
  target = llvm.target(
    f"calm_attention_{head_dim}_{together}{'_now' if has_now else ''}",
    lambda w, frame: _Piece(w, frame, head_dim, together, has_now).write(),
  )

  def piece(first: tuple[int, int], count: int, num_heads: int) -> jax.Array:
    shape = jax.ShapeDtypeStruct(
      (count * together, num_heads, head_dim), "float32"
    )
    return jax.ffi.ffi_call(target, shape)(np.array(first, np.int32), *given)

  groups = queries // together
  shared = keys[0].size * queries >= enough
  if heads < groups:
    made = llvm.in_pieces(
      groups, shared, lambda i, end: piece((i, 0), end - i, heads)
    )
  else:
    made = llvm.in_pieces(
      heads, shared, lambda i, end: piece((0, i), groups, end - i), axis=1
    )
  return made.reshape(queries, -1)


class _Piece:
  """One call, for heads of one size, whose numbers stay in registers. Its
  arrays: the first group of queries and the first head of the piece, then those
  of `attend`.
  """

  def __init__(
    self, w: Writer, frame: Frame, head_dim: int, together: int, has_now: bool
  ):
    self._w = w
    self._head_dim = number(head_dim)
    self._together = together
    arrays = [frame.argument(i) for i in range(9 if has_now else 6)]
    (
      begin,
      self._rows,
      self._queries,
      self._keys,
      self._values,
      self._biases,
      *now,
    ) = map(frame.numbers, arrays)
    self._first = begin
    self._now = now
    self._begin, self._head = (
      self._index(w.item(begin, number(i))) for i in range(2)
    )
    self._num_queries = frame.size(arrays[2], 0)
    self._in_order = w.icmp_signed("==", frame.size(arrays[1], 0), number(0))
    self._heads = frame.size(arrays[3], 1)
    self._length = frame.size(arrays[3], 2)
    self._bias_rows = frame.size(arrays[5], 0)
    self._bias_heads = frame.size(arrays[5], 1)
    self._groups = w.udiv(frame.size(frame.result(0), 0), number(together))
    self._count = frame.size(frame.result(0), 1)
    self._out = frame.numbers(frame.result(0))
    # A vector more, since scores are made a vector at a time.
    self._room = w.add(self._length, number(LANES))
    self._weights = w.scratch(w.mul(self._room, number(4 * together)))
    self._sums = w.scratch(number(LANES * LANES * 4 * together))
    self._parts = w.parts_of(head_dim)
    self._most = max(1, _SUMS // len(self._parts))
    self._at_once = 1 if together == 1 else 4  # keys that are scored

  def write(self) -> None:
    w = self._w
    zero = number(0)
    every = number(self._together)
    for group, _ in w.loop(zero, self._groups, 1):
      first = w.mul(group, every)
      row = self._row(w.add(self._begin, group))
      query = w.add(w.mul(self._begin, every), first)
      for i, _ in w.loop(zero, self._count, 1):
        head = w.add(self._head, i)
        beside = [w.add(first, number(q)) for q in range(self._together)]
        outs = [
          self._at(self._out, w.add(w.mul(each, self._count), i))
          for each in beside
        ]
        with w.if_else(w.icmp_signed("<", row, zero)) as (absent, present):
          with absent:
            for out in outs:
              for part, mask in self._parts:
                w.write(constant(0.0), w.item(out, part), mask)
          with present:
            for begin in range(0, self._together, self._most):
              some = outs[begin : begin + self._most]
              self._attend(w.add(query, number(begin)), head, row, some)

  def _index(self, address: Any) -> Any:
    return self._w.sext(self._w.read(address, INT), llvm.INDEX)

  def _row(self, group: Any) -> Any:
    """The row of the batch that a group of queries reads."""
    # Where no row is named, something else that may be read.
    named = self._w.select(
      self._in_order, self._first, self._w.item(self._rows, group)
    )
    return self._w.select(self._in_order, group, self._index(named))

  def _attend(self, query: Any, head: Any, row: Any, outs: list[Any]) -> None:
    """Queries of one row, side by side from `query` on."""
    w = self._w
    queries = [w.add(query, number(i)) for i in range(len(outs))]
    of_query = [w.add(w.mul(each, self._heads), head) for each in queries]
    cached = w.mul(w.add(w.mul(row, self._heads), head), self._length)
    keys = self._at(self._keys, cached)
    values = self._at(self._values, cached)
    biases = [self._bias(each, head, row) for each in queries]
    weights = [
      w.at(self._weights, self._room, number(i), number(0))
      for i in range(len(outs))
    ]
    first, last = self._seen(biases)
    self._score(of_query, keys, first, last, weights)
    scales = []
    mixed = []
    for each, bias, weight in zip(of_query, biases, weights, strict=True):
      scale, own = self._weigh(each, head, bias, weight, first, last)
      scales.append(scale)
      mixed += own
    for key, sums in w.loop(first, last, 1, mixed):
      parts = self._vectors(self._at(values, key))
      for i, weight in enumerate(weights):
        factor = w.spread(w.read(w.item(weight, key), FLOAT))
        for j, part in enumerate(parts, start=i * len(parts)):
          sums[j] = w.fused(factor, part, sums[j])
    for i, sum_ in enumerate(mixed):
      (part, mask), of = (
        self._parts[i % len(self._parts)],
        i // len(self._parts),
      )
      w.write(w.fmul(sum_, scales[of]), w.item(outs[of], part), mask)

  def _score(
    self, of_query: list[Any], keys: Any, first: Any, last: Any, weights
  ) -> None:
    """query . key, of all keys from the first to the last, added up a vector of
    keys at a time: key after key is read, as memory likes it.
    """
    w = self._w
    end = self._w.sub(last, number(1))
    asked = [self._vectors(self._at(self._queries, each)) for each in of_query]

    def sums(q, i):
      return w.at(
        self._sums, number(LANES * LANES), number(q), w.mul(i, number(LANES))
      )

    for place, _ in w.loop(first, last, LANES):
      for i, _ in w.loop(number(0), number(LANES // self._at_once), 1):
        # The last key again where there are no more: a tail needs no code of
        # its own.
        begin = w.add(place, w.mul(i, number(self._at_once)))
        at = [
          w.least(w.add(begin, number(key)), end)
          for key in range(self._at_once)
        ]
        some = [self._vectors(self._at(keys, key)) for key in at]
        for query, parts in enumerate(asked):
          made = [self._product(parts, key) for key in some]
          w.write(w.folded_together(made), sums(query, i))
      for query, weight in enumerate(weights):
        made = [
          w.read(sums(query, number(i))) for i in range(LANES // self._at_once)
        ]
        w.write(
          w.folded_together(made, LANES // self._at_once), w.item(weight, place)
        )

  def _weigh(
    self, of_query, head, bias, weights, first, last
  ) -> tuple[Any, list[Any]]:
    """e^(score - largest) of a query's keys; what sums of them are multiplied
    with, and the first such sum, of the key that it has besides.
    """
    w = self._w
    least = constant(LEAST)
    now, own_value = self._own(of_query, head)
    peaks = list[Any]([constant(LEAST)])
    totals = list[Any]([constant(0.0)])
    for place, part, mask in w.parts(weights, first, last, peaks):
      added = w.read_some(w.item(bias, place), mask, LEAST)
      seen = w.fcmp_ordered(">=", added, constant(_MASKED))
      score = w.select(seen, w.fadd(part, added), least)
      w.write(score, w.item(weights, place), mask)
      peaks[0] = w.larger(score, peaks[0])
    peak = w.spread(w.larger(w.folded(peaks[0], w.larger), now))

    def exp(score):
      return w.select(
        w.fcmp_unordered(">", score, least),
        w.exp(w.fsub(score, peak)),
        constant(0.0),
      )

    for place, part, mask in w.parts(weights, first, last, totals, LEAST):
      weight = exp(part)
      w.write(weight, w.item(weights, place), mask)
      totals[0] = w.fadd(totals[0], weight)
    own = exp(w.spread(now))
    total = w.fadd(w.spread(w.folded(totals[0], w.fadd)), own)
    # 0 where no key is seen; NaN stays.
    nothing = w.fcmp_ordered("==", total, constant(0.0))
    scale = w.select(nothing, constant(0.0), w.fdiv(constant(1.0), total))
    return scale, [w.fmul(own, part) for part in own_value]

  def _bias(self, query: Any, head: Any, row: Any) -> Any:
    """Where the biases of a query's keys begin: its own, its row's, or
    everybody's.
    """
    w = self._w
    one = number(1)
    by_query = w.icmp_signed("==", self._bias_rows, self._num_queries)
    own = w.select(by_query, query, w.least(row, w.sub(self._bias_rows, one)))
    head = w.least(head, w.sub(self._bias_heads, one))
    place = w.add(w.mul(own, self._bias_heads), head)
    return w.at(self._biases, self._length, place, number(0))

  def _seen(self, biases: list[Any]) -> tuple[Any, Any]:
    """The first key that one of the queries may see, and the one behind the
    last such; equal if none.
    """
    w = self._w
    ends = [w.spread(w.trunc(self._length, INT)), constant(0, INT)]
    # Once where all queries have the same.
    last = w.select(
      w.icmp_signed("==", biases[0], biases[-1]), number(1), number(len(biases))
    )
    stride = w.sub(biases[min(1, len(biases) - 1)], biases[0])
    for i, _ in w.loop(number(0), last, 1, ends):
      bias = w.add(biases[0], w.mul(i, stride))
      for place, part, _ in w.parts(bias, number(0), self._length, ends, LEAST):
        open_ = w.fcmp_ordered(">=", part, constant(_MASKED))
        here = w.lanes(place)
        behind = w.add(here, constant(1, INT))
        first = w.select(open_, w.least(here, ends[0]), ends[0])
        ends[:] = first, w.select(open_, w.most(behind, ends[1]), ends[1])
    first = w.folded(ends[0], w.least)
    last = w.folded(ends[1], w.most)
    return w.sext(w.least(first, last), llvm.INDEX), w.sext(last, llvm.INDEX)

  def _own(self, of_query: Any, head: Any) -> tuple[Any, list[Any]]:
    """The score of the key that a query has besides, `LEAST` if none, and its
    value.
    """
    w = self._w
    if not self._now:
      return ir.Constant(FLOAT, LEAST), [constant(0.0)] * len(self._parts)
    keys, values, bias = self._now
    asked = self._vectors(self._at(self._queries, of_query))
    score = w.folded(
      self._product(asked, self._vectors(self._at(keys, of_query))), w.fadd
    )
    score = w.fadd(score, w.read(w.item(bias, head), FLOAT))
    return score, self._vectors(self._at(values, of_query))

  def _product(self, asked: list[Any], key: list[Any]) -> Any:
    """query . key, as a vector whose sum it is."""
    sum_ = constant(0.0)
    for one, other in zip(asked, key, strict=True):
      sum_ = self._w.fused(one, other, sum_)
    return sum_

  def _vectors(self, begin: Any) -> list[Any]:
    """A head's numbers."""
    w = self._w
    return [
      w.read_some(w.item(begin, part), mask) for part, mask in self._parts
    ]

  def _at(self, array: Any, place: Any) -> Any:
    """Where the head of this number begins in an array of heads."""
    return self._w.at(array, self._head_dim, place, number(0))
