"""The most likely piece of every row, of logits whose error has a bound. They are read twice,
and pieces that may be the most likely are scored again in float32, however many they are:
nothing is sorted, and no row needs another way."""

from typing import Any

import jax
import jax.numpy as jnp
from llvmlite import ir

from calm.t5.kernels import llvm
from calm.t5.kernels.llvm import FLOAT, INT, LANES, LEAST, Frame, Writer, constant, number

_BITS = ir.IntType(LANES)  # one a lane


def likeliest(*arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
  """See `kernels.likeliest`."""

  def piece(begin: int, end: int) -> Any:
    shapes = [jax.ShapeDtypeStruct((end - begin,), kind) for kind in ("int32", "float32")]
    call = jax.ffi.ffi_call(llvm.target("calm_likeliest", _write), shapes)
    return call(jnp.full((), begin, jnp.int32), *arrays)

  return tuple(llvm.in_pieces(len(arrays[0]), True, piece))


def _write(w: Writer, frame: Frame) -> None:
  arrays = [frame.argument(i) for i in range(7)]
  begin, logits, factors, left, norms, states, head = map(frame.numbers, arrays)
  count, emb = frame.size(arrays[1], 1), frame.size(arrays[5], 1)
  tokens, totals = (frame.numbers(frame.result(i)) for i in range(2))
  # The best piece that was scored again, its logit, and what float32 adds to the sum.
  place, best, better = (w.ptrtoint(w.alloca(kind), llvm.INDEX) for kind in (INT, FLOAT, FLOAT))
  first = w.sext(w.read(begin, INT), llvm.INDEX)
  for i, _ in w.loop(number(0), frame.size(frame.result(0), 0), 1):
    row = w.add(first, i)
    of_left, of_norms = (
      w.spread(w.read(w.at(factors, number(2), row, number(j)), FLOAT)) for j in range(2)
    )
    mine, state = w.at(logits, count, row, number(0)), w.at(states, emb, row, number(0))

    def slack(piece: Any, of_left: Any = of_left, of_norms: Any = of_norms) -> Any:
      of_codes = w.fmul(of_norms, w.read(w.item(norms, piece)))
      return w.fused(of_left, w.read(w.item(left, piece)), of_codes)

    ends = [constant(LEAST), constant(LEAST)]
    for piece, carried in w.loop(number(0), count, LANES, ends):
      logit = w.read(w.item(mine, piece))
      carried[0] = w.larger(logit, carried[0])
      carried[1] = w.larger(w.fsub(logit, slack(piece)), carried[1])
    peak, floor = (w.folded(values, w.larger) for values in ends)
    for value, kept in ((ir.Constant(INT, 0), place), (LEAST, best), (0.0, better)):
      w.write(value if kept is place else ir.Constant(FLOAT, value), kept)
    sums = [constant(0.0)]
    for piece, carried in w.loop(number(0), count, LANES, sums):
      logit = w.read(w.item(mine, piece))
      carried[0] = w.fadd(carried[0], w.exp(w.fsub(logit, w.spread(peak))))
      asked = w.fcmp_ordered(">=", w.fadd(logit, slack(piece)), w.spread(floor))
      bits: Any = w.bitcast(asked, _BITS)
      with w.if_then(w.icmp_unsigned("!=", bits, ir.Constant(_BITS, 0)), likely=False):
        for lane, _ in w.loop(number(0), number(LANES), 1):
          with w.if_then(w.trunc(w.lshr(bits, w.trunc(lane, _BITS)), ir.IntType(1))):
            at = w.add(piece, lane)
            row_of_head = w.at(head, emb, at, number(0))
            _score(w, state, row_of_head, emb, w.item(mine, at), at, peak, place, best, better)
    total = w.fadd(w.folded(sums[0], w.fadd), w.read(better, FLOAT))
    away = w.exp(w.fsub(w.spread(peak), w.spread(w.read(best, FLOAT))))
    total = w.fmul(total, w.extract_element(away, ir.Constant(INT, 0)))
    w.write(w.read(place, INT), w.item(tokens, i))
    w.write(total, w.item(totals, i))


def _score(w: Writer, state, of_head, emb, rounded, at, peak, place, best, better) -> None:
  """Looks at one piece in float32; the first of equals stays."""
  sums = [constant(0.0)]
  for i, part, mask in w.parts(state, number(0), emb, sums):
    sums[0] = w.fused(part, w.read_some(w.item(of_head, i), mask), sums[0])
  logit = w.folded(sums[0], w.fadd)
  share = lambda logit: w.exp(w.fsub(w.spread(logit), w.spread(peak)))
  more = w.fsub(share(logit), share(w.read(rounded, FLOAT)))
  more = w.extract_element(more, ir.Constant(INT, 0))
  w.write(w.fadd(w.read(better, FLOAT), more), better)
  with w.if_then(w.fcmp_ordered(">", logit, w.read(best, FLOAT))):
    w.write(logit, best)
    w.write(w.trunc(at, INT), place)
