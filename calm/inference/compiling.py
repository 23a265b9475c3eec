"""Seconds of the phases of decoding, without what compiling took in them."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax import monitoring

from calm.decode import compiled

_PREFIX = "/jax/core/compile/"
# XLA:CPU prepares some kernels when they are first run (`ynn` fusions): 0.08 s for a decoder of
# eight small layers, whose batch takes 0.03 s. Up to so long a program that is new runs twice.
FIRST_SECONDS = 0.25
_lock = threading.Lock()
_spans: list[tuple[float, float]] = []
_seconds = 0.0


def seconds() -> float:
  """Seconds that JAX has spent on tracing, lowering and compiling in this process so far.

  What was read from the cache on the disk counts with the time that this took.
  """
  return _seconds


def _listen(event: str, duration_secs: float, **_) -> None:
  global _seconds
  if not event.startswith(_PREFIX):
    return
  end = time.perf_counter()
  start = end - duration_secs
  with _lock:
    # A span is told when it ends, after those within it, which it replaces.
    while _spans and _spans[-1][0] >= start:
      first, last = _spans.pop()
      _seconds -= last - first
    if _spans:
      start = max(start, _spans[-1][1])
    _spans.append((start, end))
    _seconds += end - start
    del _spans[:-64]


monitoring.register_event_duration_secs_listener(_listen)


class Clock:
  """Exclusive seconds by phase: what a phase within another took is not the outer's."""

  def __init__(self):
    self.seconds = {"encode": 0.0, "decode": 0.0}
    self._compiled, self._first = seconds(), 0.0

  @property
  def compile_seconds(self) -> float:
    """Compiling since the clock was made, with first runs that were made again."""
    return seconds() - self._compiled + self._first

  def run(self, name: str, work: Callable[[], Any]) -> Any:
    """What `work` returns, made in a phase; of a new program it is the second run that counts.

    Args:
      name: the phase.
      work: runs a compiled program, and would return the same again.
    """
    made, before = compiled.num_made(), self.seconds[name]
    with self.phase(name):
      result = jax.block_until_ready(work())
    first = self.seconds[name] - before
    if compiled.num_made() == made or first > FIRST_SECONDS:
      return result
    self.seconds[name] = before
    self._first += first
    with self.phase(name):
      return jax.block_until_ready(work())

  @contextlib.contextmanager
  def phase(self, name: str) -> Iterator[None]:
    """Counts the block, less its inner phases and compiling."""
    start, compiled = time.perf_counter(), seconds()
    inner = sum(self.seconds.values())
    yield
    spent = time.perf_counter() - start - (seconds() - compiled)
    self.seconds[name] += max(0.0, spent - (sum(self.seconds.values()) - inner))
