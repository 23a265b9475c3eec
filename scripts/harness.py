"""Timing: calls that take turns, and medians of the repeats."""

import dataclasses
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax


@dataclasses.dataclass
class Timed:
  """One call: seconds and result of its first run, which compiles, and of every
  repeat.
  """

  first: float
  result: Any
  seconds: list[float] = dataclasses.field(default_factory=list)
  results: list[Any] = dataclasses.field(default_factory=list)

  @property
  def median(self) -> float:
    return statistics.median(self.seconds)


def in_turn(
  runs: Mapping[str, Callable[[], Any]], repeats: int
) -> dict[str, Timed]:
  """Runs every call once and then `repeats` times; every second repeat goes the
  other way.
  """

  def clock(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = jax.block_until_ready(run())
    return time.perf_counter() - start, result

  timed = {name: Timed(*clock(run)) for name, run in runs.items()}
  for repeat in range(repeats):
    for name in list(runs)[:: -1 if repeat % 2 else 1]:
      seconds, result = clock(runs[name])
      timed[name].seconds.append(seconds)
      timed[name].results.append(jax.device_get(result))
  return timed


def machine() -> str:
  """The processor and the cores that this process may use."""
  name = platform.processor() or platform.machine()
  cpu = pathlib.Path("/proc/cpuinfo")
  if cpu.exists():
    lines = (
      line
      for line in cpu.read_text().splitlines()
      if line.startswith("model name")
    )
    name = next(lines, f": {name}").partition(":")[2].strip()
  return f"{name}, {len(os.sched_getaffinity(0))} cores"
