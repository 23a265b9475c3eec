"""Writes zeros to arrays, one after the other."""

from calm.t5.native import frames
from calm.t5.native.instructions import LANES, Writer, constant, number


def zeros(count: int) -> frames.Compiled:
  """What XLA calls for so many arrays of one axis, of 4 bytes a number; it is given none."""

  def write(w: Writer, frame: frames.Frame) -> None:
    for i in range(count):
      size, out = frame.size(frame.result(i), 0), frame.numbers(frame.result(i))
      whole = w.below(size, LANES)
      for place, _ in w.loop(number(0), whole, LANES):
        w.store(constant(0.0), w.item(out, place))
      w.store(constant(0.0), w.item(out, whole), w.first_lanes(w.b.sub(size, whole)))

  return frames.handler("zeros", write)
