"""Writes windows of positions to caches, each row's at its own place."""

from typing import Any

from calm.t5.native import frames
from calm.t5.native.instructions import LANES, Writer, number


def writes(count: int, window: int) -> frames.Compiled:
  """What XLA calls for so many caches, and windows of so many positions.

  Its arrays: positions, [batch] or [1] int32; the windows of each cache, [batch, heads, window,
  head_dim] or, of one position, without that axis; and the caches, [batch, heads, length,
  head_dim], which are the results as well.
  """
  write = lambda w, frame: _Writes(w, frame).write(count, number(window))
  return frames.handler("writes", write)


class _Writes:
  """One call."""

  def __init__(self, w: Writer, frame: frames.Frame):
    self._w, self._frame = w, frame

  def write(self, count: int, window: Any) -> None:
    w, frame = self._w, self._frame
    batch, heads = (frame.size(frame.result(0), axis) for axis in (0, 1))
    length, head_dim = (frame.size(frame.result(0), axis) for axis in (2, 3))
    numbers = w.b.mul(window, head_dim)
    for row, _ in w.loop(number(0), batch, 1):
      own = w.least(row, w.b.sub(frame.size(frame.argument(0), 0), number(1)))
      place = w.load_index(w.item(frame.numbers(frame.argument(0)), own))
      # As XLA updates slices: what does not fit begins where it does.
      place = w.most(w.least(place, w.b.sub(length, window)), number(0))
      for head, _ in w.loop(number(0), heads, 1):
        at = w.b.add(w.b.mul(row, heads), head)
        there = w.b.mul(w.b.add(w.b.mul(at, length), place), head_dim)
        for i in range(count):
          new, cache = frame.argument(1 + i), frame.result(i)
          self._copy(
            w.at(frame.numbers(new), numbers, at, number(0)),
            w.item(frame.numbers(cache), there),
            numbers,
          )

  def _copy(self, begin: Any, to: Any, count: Any) -> None:
    w = self._w
    whole = w.below(count, LANES)
    for place, _ in w.loop(number(0), whole, LANES):
      w.store(w.load(w.item(begin, place)), w.item(to, place))
    mask = w.first_lanes(w.b.sub(count, whole))
    w.store(w.load(w.item(begin, whole), mask), w.item(to, whole), mask)
