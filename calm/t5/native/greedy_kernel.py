"""The most likely token of logits: in two passes what XLA finds in three."""

from typing import Any

from calm.t5.native import frames
from calm.t5.native.instructions import INT, LEAST, Writer, constant, number


def greedy() -> frames.Compiled:
  """What XLA calls: of logits [rows, pieces], see `_row`, two results [rows]."""
  return frames.handler("greedy", _write)


def _write(w: Writer, frame: frames.Frame) -> None:
  logits, places, totals = frame.argument(0), frame.result(0), frame.result(1)
  rows, pieces = frame.size(logits, 0), frame.size(logits, 1)
  logits, places, totals = map(frame.numbers, (logits, places, totals))
  for row, _ in w.loop(number(0), rows, 1):
    place, total = _row(w, w.at(logits, pieces, row, number(0)), pieces)
    w.store(place, w.item(places, row))
    w.store(total, w.item(totals, row))


def _row(w: Writer, logits: Any, pieces: Any) -> tuple[Any, Any]:
  """The first place of the largest logit, and the sum of e^(logit - it) over all.

  NaN is no largest logit, and makes the sum NaN. The place is the last one where there is none.
  """
  b, tops = w.b, [constant(LEAST)]
  for _, part, _ in w.parts(logits, number(0), pieces, tops, LEAST):
    tops[0] = w.larger(part, tops[0])
  top = w.spread(w.folded(tops[0], w.larger))
  last = w.spread(b.trunc(b.sub(pieces, number(1)), INT))
  carried = [last, constant(0.0)]
  for begin, part, mask in w.parts(logits, number(0), pieces, carried, LEAST):
    here, share = w.lanes(begin), w.exp(b.fsub(part, top))
    found = b.and_(b.fcmp_ordered("==", part, top), b.icmp_signed("<", here, carried[0]))
    if mask is not None:
      share = b.select(mask, share, constant(0.0))
    carried[:] = b.select(found, here, carried[0]), b.fadd(carried[1], share)
  return w.folded(carried[0], w.least), w.folded(carried[1], b.fadd)
