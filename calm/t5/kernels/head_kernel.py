"""The argmax of a head in 8 bits, in parts that XLA's threads share.

A row's logits are made of its 8-bit sums once. Those of pieces that may be the most likely are
made again in float32, however many they are: nothing is sorted, and no row needs another way.
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp

from calm.exits.layers import Greedy
from calm.t5.kernels import llvm
from calm.t5.kernels.llvm import INT, LANES, LEAST, Frame, Writer, constant, number

# Of a part: its logits lie on a thread's stack.
MOST_PIECES = 2**14


def greedy(sums, offset: int, of_head, scales, left, norms, rows, states, pieces) -> Greedy:
  """See `kernels.greedy`; the arrays are those of `_Parts`."""
  num_codes, batch, count = sums.shape
  parts = max(-(-llvm.pieces() // batch), -(-count // MOST_PIECES))
  size = -(-count // parts)
  given = sums, of_head, scales, left, norms, rows, states, pieces
  target = llvm.target(
    f"calm_head_{num_codes}", lambda w, frame: _Parts(w, frame, num_codes).write()
  )
  shape = lambda *sizes, dtype="float32": jax.ShapeDtypeStruct(sizes, dtype)
  made = [
    jax.ffi.ffi_call(target, (shape(end - begin, dtype="int32"), shape(end - begin, 3)))(
      jnp.array([begin, size, offset], jnp.int32), *given
    )
    for begin, end in itertools.pairwise(llvm.split(batch * -(-count // size), llvm.pieces()))
  ]
  places, numbers = (jnp.concatenate(each) for each in zip(*made, strict=True))
  best, peak, total = jnp.moveaxis(numbers.reshape(batch, -1, 3), 2, 0)
  places = places.reshape(best.shape)
  most = jnp.max(best, axis=1, keepdims=True)
  token = jnp.min(jnp.where(best == most, places, count - 1), axis=1)
  return Greedy(token, -jnp.log(jnp.sum(total * jnp.exp(peak - most), axis=1)))


class _Parts:
  """One call: some parts of some rows.

  Its arrays: (the first part, pieces of a part, `offset`), `sums` [codes, rows, pieces] of
  products of a row's codes, with `offset` times the pieces' codes in them (see
  `EightBits.raw_sums`), the head's `sums`, `scales`, `left`, `norms`, `rows` (what `left` and
  what `norms` is multiplied with, then the codes' steps), `states`, the head in float32. The
  results are [parts] places in the head and [parts, 3]: the largest float32 logit, the largest
  rounded one, the sum of e^(logit - that) over all, float32 ones where these were made.
  """

  def __init__(self, w: Writer, frame: Frame, num_codes: int):
    self._w, self._num_codes = w, num_codes
    arrays = [frame.argument(i) for i in range(9)]
    words, self._sums, self._of_head, *others = map(frame.numbers, arrays)
    self._scales, self._left, self._norms, self._rows, self._states, self._pieces = others
    index = lambda i: w.load_index(w.item(words, number(i)))
    self._begin, self._size, offset = map(index, range(3))
    self._offset = w.spread(w.b.trunc(offset, INT))
    self._count, self._batch = frame.size(arrays[1], 2), frame.size(arrays[1], 1)
    self._emb = frame.size(arrays[7], 1)
    self._num_parts = frame.size(frame.result(0), 0)
    self._places, self._told = (frame.numbers(frame.result(i)) for i in range(2))
    self._logits, self._upper = w.room(self._size), w.room(self._size)
    # Of pieces that are scored again, which are few: kept in memory.
    self._place, self._best, self._better = (w.room(number(1)) for _ in range(3))

  def write(self) -> None:
    w, b, zero = self._w, self._w.b, number(0)
    size, count = self._size, self._count
    parts = b.udiv(b.add(count, b.sub(size, number(1))), size)
    for i, _ in w.loop(zero, self._num_parts, 1):
      part = b.add(self._begin, i)
      row, low = b.udiv(part, parts), b.mul(b.urem(part, parts), size)
      high = w.least(b.add(low, size), count)
      peak, floor = self._bounds(row, low, b.sub(high, low))
      total = self._scored(row, low, b.sub(high, low), peak, floor)
      place = b.add(low, w.load_index(self._place))
      w.store(b.trunc(place, INT), w.item(self._places, i))
      total = b.fadd(total, w.load_one(self._better))
      for j, value in enumerate((w.load_one(self._best), peak, total)):
        w.store(value, w.at(self._told, number(3), i, number(j)))

  def _bounds(self, row: Any, low: Any, count: Any) -> tuple[Any, Any]:
    """Writes the logits of the pieces, and the most that they may be.

    Returns:
      (the largest logit, the largest that one surely is); NaN counts as nothing.
    """
    w, b, zero = self._w, self._w.b, number(0)
    words = number(2 + self._num_codes)
    of_row = lambda i: w.spread(w.load_one(w.at(self._rows, words, row, number(i))))
    of_left, of_norms, *steps = map(of_row, range(2 + self._num_codes))
    sums = [
      w.at(self._sums, self._count, b.add(b.mul(number(i), self._batch), row), low)
      for i in range(self._num_codes)
    ]
    carried = [constant(LEAST), constant(LEAST)]
    at = lambda array, place: w.item(array, b.add(low, place))
    for place, scales, mask in w.parts(at(self._scales, zero), zero, count, carried):
      load = lambda array, place=place, mask=mask: w.load(at(array, place), mask)
      away = b.mul(self._offset, w.load_ints(at(self._of_head, place), mask))
      logits = constant(0.0)
      for codes, step in zip(sums, steps, strict=True):
        whole = b.sub(w.load_ints(w.item(codes, place), mask), away)
        logits = w.fused(b.sitofp(whole, logits.type), step, logits)
      logits = b.fmul(logits, scales)
      slack = w.fused(of_left, load(self._left), b.fmul(of_norms, load(self._norms)))
      upper, least = b.fadd(logits, slack), b.fsub(logits, slack)
      w.store(logits, w.item(self._logits, place), mask)
      w.store(upper, w.item(self._upper, place), mask)
      if mask is not None:
        logits, least = (b.select(mask, x, constant(LEAST)) for x in (logits, least))
      carried[:] = w.larger(logits, carried[0]), w.larger(least, carried[1])
    peak, floor = (w.folded(values, w.larger) for values in carried)
    return peak, floor

  def _scored(self, row: Any, low: Any, count: Any, peak: Any, floor: Any) -> Any:
    """The sum of e^(logit - peak), of rounded logits.

    The best of those that may be the most likely, its place and what float32 adds to the sum
    are kept: the first of equals; place 0 where every logit is NaN.
    """
    w, b, zero = self._w, self._w.b, number(0)
    w.store(w.int(0), self._place)
    w.store(w.float(LEAST), self._best)
    w.store(w.float(0.0), self._better)
    totals = [constant(0.0)]
    for place, logits, mask in w.parts(self._logits, zero, count, totals):
      shares = w.exp(b.fsub(logits, w.spread(peak)))
      upper = w.load(w.item(self._upper, place), mask, LEAST)
      asked = b.fcmp_ordered(">=", upper, w.spread(floor))
      if mask is not None:
        shares, asked = b.select(mask, shares, constant(0.0)), b.and_(asked, mask)
      totals[0] = b.fadd(totals[0], shares)
      with b.if_then(w.any(asked)):
        end = w.least(b.add(place, number(LANES)), count)
        for j, _ in w.loop(place, end, 1):
          upper = w.load_one(w.item(self._upper, j))
          with b.if_then(b.fcmp_ordered(">=", upper, floor)):
            self._score(row, low, j, peak)
    return w.folded(totals[0], b.fadd)

  def _score(self, row: Any, low: Any, j: Any, peak: Any) -> None:
    """Looks at one piece in float32."""
    w, b, zero = self._w, self._w.b, number(0)
    state = w.at(self._states, self._emb, row, zero)
    piece = w.at(self._pieces, self._emb, b.add(low, j), zero)
    sums = [constant(0.0)]
    for place, part, mask in w.parts(state, zero, self._emb, sums):
      sums[0] = w.fused(part, w.load(w.item(piece, place), mask), sums[0])
    logit = w.folded(sums[0], b.fadd)
    share = lambda logit: w.exp(b.fsub(w.spread(logit), w.spread(peak)))
    rounded = w.load_one(w.item(self._logits, j))
    more = w.folded(b.fsub(share(logit), share(rounded)), lambda one, other: one)
    w.store(b.fadd(w.load_one(self._better), more), self._better)
    with b.if_then(b.fcmp_ordered(">", logit, w.load_one(self._best))):
      w.store(logit, self._best)
      w.store(b.trunc(j, INT), self._place)
