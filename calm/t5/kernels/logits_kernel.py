"""Rows of logits: what measures and greedy decoding ask of them; and, where
their error has a bound, those scored again in float32 that may be the largest
of a row, however many they are.
"""

from typing import Any

import jax
import jax.numpy as jnp
from llvmlite import ir

from calm.t5.kernels import llvm
from calm.t5.kernels.llvm import (
  FLOAT,
  INT,
  INTS,
  LANES,
  LEAST,
  Frame,
  Writer,
  constant,
  number,
)

# Logits that are worth a second thread.
_SHARED = 2**17
_FARTHEST = -1e4  # below the largest; an exponential of less is 0
_BITS = ir.IntType(LANES)  # one a lane


def peaks(logits: jax.Array) -> tuple[jax.Array, ...]:
  """See `kernels.peaks`."""
  logits = logits.astype(jnp.float32)

  def piece(begin: int, end: int) -> Any:
    kinds = "int32", *["float32"] * 5
    shapes = [jax.ShapeDtypeStruct((end - begin,), kind) for kind in kinds]
    call = jax.ffi.ffi_call(llvm.target("calm_peaks", _write_peaks), shapes)
    return call(jnp.full((), begin, jnp.int32), logits)

  return tuple(llvm.in_pieces(len(logits), logits.size >= _SHARED, piece))


def _write_peaks(w: Writer, frame: Frame) -> None:
  begin, logits = map(frame.numbers, map(frame.argument, range(2)))
  results = [frame.numbers(frame.result(i)) for i in range(6)]
  rows = frame.size(frame.result(0), 0)
  count = frame.size(frame.argument(1), 1)
  first = w.sext(w.read(begin, INT), llvm.INDEX)
  for i, _ in w.loop(number(0), rows, 1):
    row = w.at(logits, count, w.add(first, i), number(0))
    largest: list[Any] = [
      constant(LEAST),
      constant(LEAST),
      ir.Constant(INTS, None),
    ]
    for place, values, _ in w.parts(row, number(0), count, largest, LEAST):
      best, second, token = largest
      largest[2] = w.select(
        w.fcmp_ordered(">", values, best), w.lanes(place), token
      )
      largest[1] = w.larger(
        second, w.select(w.fcmp_ordered(">", values, best), best, values)
      )
      largest[0] = w.larger(values, best)
    best, second, token = largest
    top = w.folded(best, w.larger)
    is_top = w.fcmp_ordered("==", best, w.spread(top))

    def lesser(a, b):
      return w.select(w.icmp_signed("<", a, b), a, b)

    place = w.folded(w.select(is_top, token, constant(2**31 - 1, INT)), lesser)
    # Of the lane that has the largest its own second; of the others, what they
    # have.
    is_best = w.and_(is_top, w.icmp_signed("==", token, w.spread(place)))
    second = w.folded(w.select(is_best, second, best), w.larger)
    sums: list[Any] = [constant(0.0)] * 3
    for _, values, _ in w.parts(row, number(0), count, sums, LEAST):
      # NaN of NaN
      below = w.larger(constant(_FARTHEST), w.fsub(values, w.spread(top)))
      weight = w.exp(below)
      known = w.fcmp_ordered(">", values, constant(LEAST))
      sums[0] = w.fadd(sums[0], weight)
      sums[1] = w.fused(weight, below, sums[1])
      sums[2] = w.fadd(sums[2], w.select(known, constant(1.0), constant(0.0)))
    made = place, top, second, *(w.folded(values, w.fadd) for values in sums)
    for value, result in zip(made, results, strict=True):
      w.write(value, w.item(result, i))


def rescored(logits: jax.Array, *arrays: jax.Array) -> jax.Array:
  """See `kernels.rescored`."""

  def piece(begin: int, end: int) -> jax.Array:
    shape = jax.ShapeDtypeStruct((end - begin, logits.shape[1]), "float32")
    call = jax.ffi.ffi_call(
      llvm.target("calm_rescored", _write_rescored), shape
    )
    return call(jnp.full((), begin, jnp.int32), logits, *arrays)

  return llvm.in_pieces(len(logits), logits.size >= _SHARED, piece)


def _write_rescored(w: Writer, frame: Frame) -> None:
  arrays = [frame.argument(i) for i in range(6)]
  begin, logits, norms, slack, states, head = map(frame.numbers, arrays)
  made = frame.result(0)
  count = frame.size(arrays[1], 1)
  emb = frame.size(arrays[4], 1)
  first = w.sext(w.read(begin, INT), llvm.INDEX)
  out = frame.numbers(made)
  for i, _ in w.loop(number(0), frame.size(made, 0), 1):
    row = w.add(first, i)
    norm = w.spread(w.read(w.item(norms, row), FLOAT))
    given = w.at(logits, count, row, number(0))
    state = w.at(states, emb, row, number(0))
    result = w.at(out, count, i, number(0))

    def away(piece: Any, mask: Any, norm: Any = norm) -> Any:
      return w.fmul(norm, w.read_some(w.item(slack, piece), mask))

    floors: list[Any] = [constant(LEAST)]
    for piece, logit, mask in w.parts(given, number(0), count, floors, LEAST):
      floors[0] = w.larger(w.fsub(logit, away(piece, mask)), floors[0])
    floor = w.spread(w.folded(floors[0], w.larger))
    for piece, logit, mask in w.parts(given, number(0), count, [], LEAST):
      w.write(logit, w.item(result, piece), mask)
      asked = w.fcmp_ordered(">=", w.fadd(logit, away(piece, mask)), floor)
      bits: Any = w.bitcast(
        asked if mask is None else w.and_(asked, mask), _BITS
      )
      with w.if_then(
        w.icmp_unsigned("!=", bits, ir.Constant(_BITS, 0)), likely=False
      ):
        for lane, _ in w.loop(number(0), number(LANES), 1):
          with w.if_then(
            w.trunc(w.lshr(bits, w.trunc(lane, _BITS)), ir.IntType(1))
          ):
            at = w.add(piece, lane)
            w.write(
              _score(w, state, w.at(head, emb, at, number(0)), emb),
              w.item(result, at),
            )


def _score(w: Writer, state: Any, row: Any, emb: Any) -> Any:
  """The product of a state and a row of the head."""
  sums: list[Any] = [constant(0.0)]
  for i, part, mask in w.parts(state, number(0), emb, sums):
    sums[0] = w.fused(part, w.read_some(w.item(row, i), mask), sums[0])
  return w.folded(sums[0], w.fadd)
