"""Seconds that something takes, whatever else the machine does meanwhile."""

import time

# Waiting computes nothing, and others' work makes everything wait: it counts
# for so much less.
WAITING = 6.0


class Spent:
  """Seconds since it was made, of this process: computed, or waited for a
  multiple of them.
  """

  def __init__(self):
    self._computed = time.process_time()
    self._passed = time.monotonic()

  @property
  def seconds(self) -> float:
    waited = (time.monotonic() - self._passed) / WAITING
    return max(time.process_time() - self._computed, waited)
