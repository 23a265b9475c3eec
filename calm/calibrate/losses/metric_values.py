"""A metric over many (prediction, references) pairs: equal pairs once, all cores when it pays.

Workers are plain child processes that speak JSON lines: nothing is pickled and the caller's own
`__main__` is not run again, so that a script needs no guard and a notebook works. What a metric
prints there goes to the child's errors: its standard output is for answers alone.
"""

import concurrent.futures
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TextIO

import numpy as np

from calm import signals
from calm.calibrate.losses import metrics

Pair = tuple[str, tuple[str, ...]]
Progress = Callable[[int, int], None]

# Below this many seconds of work, starting processes costs more than it gives.
_WORTH_SECONDS = 4.0
_PROBE_PAIRS = 200


def compute(
  metric: metrics.Metric,
  pairs: Sequence[Pair],
  *,
  workers: int | None = None,
  progress: Progress | None = None,
) -> np.ndarray:
  """Similarity of every pair.

  Args:
    metric: a metric.
    pairs: [num_pairs] (prediction, references).
    workers: processes; 1 stays in this one; None starts one a core when what is left after the
      first pairs would take more than a few seconds here.
    progress: called with (different pairs done, different pairs in all).

  Returns:
    [num_pairs] float64 in [0, 1].

  Raises:
    ValueError: the metric refuses a pair.
  """
  unique = list(dict.fromkeys(pairs))
  progress = progress or (lambda done, total: None)
  found: list[float] = []
  started = time.perf_counter()
  while len(found) < len(unique):
    signals.check()
    chunk = unique[len(found) : len(found) + _PROBE_PAIRS]
    found += [metric(*pair) for pair in chunk]
    progress(len(found), len(unique))
    rate = (time.perf_counter() - started) / len(found)
    left = len(unique) - len(found)
    wanted = workers or (os.cpu_count() or 1)
    if left and wanted > 1 and (workers or rate * left > _WORTH_SECONDS) and _reachable(metric):
      here = len(found)

      def report(done: int, here: int = here) -> None:
        progress(here + done, len(unique))

      found += _in_processes(metric, unique[here:], wanted, report)
  values = dict(zip(unique, found, strict=True))
  return np.array([values[pair] for pair in pairs], dtype=np.float64)


def _reachable(metric: metrics.Metric) -> bool:
  """Whether a child process finds this metric by its name, and nothing else is run there."""
  if metric.name in metrics.METRICS:
    return metrics.METRICS[metric.name] == metric
  module, _, attribute = metric.name.partition(":")
  found = getattr(metrics.imported(module), attribute or "", None)
  return found in (metric, metric.function) and module != "__main__"


def _in_processes(
  metric: metrics.Metric, pairs: Sequence[Pair], workers: int, progress: Callable[[int], None]
) -> list[float]:
  size = max(1, min(1000, -(-len(pairs) // workers)))
  chunks = [pairs[start : start + size] for start in range(0, len(pairs), size)]
  found: list[list[float]] = [[] for _ in chunks]
  lock, done = threading.Lock(), 0

  def work(first: int) -> None:
    nonlocal done
    with _Child(metric) as child:
      for index in range(first, len(chunks), workers):
        signals.check()
        found[index] = child.ask(chunks[index])
        with lock:
          done += len(chunks[index])
          progress(done)

  # Each thread only waits for its child, so that threads are no bottleneck.
  with concurrent.futures.ThreadPoolExecutor(workers) as threads:
    for future in [threads.submit(work, first) for first in range(min(workers, len(chunks)))]:
      future.result()
  return [value for values in found for value in values]


# Loads this package, and the user's own metric, from where the parent has them. What the metric
# prints, when it is imported too, must not pass for an answer.
_CHILD = f"""
import importlib.util, json, os, sys, types
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
sys.stdout = sys.stderr
for name, origin, folders in json.loads(sys.argv[2]):
  if origin is None:
    module = types.ModuleType(name)
    module.__path__ = folders
  else:
    spec = importlib.util.spec_from_file_location(
      name, origin, submodule_search_locations=folders
    )
    module = importlib.util.module_from_spec(spec)
  sys.modules[name] = module
  if origin is not None:
    spec.loader.exec_module(module)
from {__name__} import serve
serve(answers)
"""


def _place(name: str) -> tuple[str, str | None, list[str] | None]:
  """(name, file, folders) of the package or module that a metric's import path begins with."""
  top = name.partition(":")[0].partition(".")[0]
  module = sys.modules[top]
  folders = getattr(module, "__path__", None)
  origin = getattr(module, "__file__", None)
  return top, origin, None if folders is None else [os.path.abspath(f) for f in folders]


class _Child:
  """One child process that answers a line of pairs with a line of values."""

  def __init__(self, metric: metrics.Metric):
    self._name = metric.name
    # The folder that one happens to be in is no place to import from: a scipy.py lies there.
    here = os.path.realpath(os.getcwd())
    path = os.pathsep.join(e for e in sys.path if e and os.path.realpath(e) != here)
    named = ":" in metric.name and ".py:" not in metric.name
    known = [_place("calm"), *([_place(metric.name)] if named else [])]
    self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed by __exit__)
    self._process = subprocess.Popen(
      [sys.executable, "-P", "-c", _CHILD, metric.name, json.dumps(known)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=self._errors,
      env={**os.environ, "PYTHONPATH": path},
    )

  def __enter__(self) -> "_Child":
    return self

  def __exit__(self, *unused) -> None:
    for stream in (self._process.stdin, self._process.stdout):
      with contextlib.suppress(OSError):
        stream.close()  # type: ignore[union-attr]
    self._process.wait()
    self._errors.close()

  def ask(self, pairs: Sequence[Pair]) -> list[float]:
    """The metric of each pair; ValueError if it gave none, with a dead child's last words."""
    answer = b""
    with contextlib.suppress(OSError):
      self._process.stdin.write(json.dumps(pairs).encode() + b"\n")  # type: ignore[union-attr]
      self._process.stdin.flush()  # type: ignore[union-attr]
      answer = self._process.stdout.readline()  # type: ignore[union-attr]
    if not answer:
      self._process.wait()
      self._errors.seek(0)
      last = self._errors.read().decode("utf-8", "replace").strip().splitlines()[-1:]
      raise ValueError(
        f"Expected `metric` {self._name!r} to answer, got a child process that failed:"
        f" {' '.join(last).rstrip('.')}; mend the function."
      )
    values: Any = None
    with contextlib.suppress(ValueError):
      values = json.loads(answer)
    numbers = isinstance(values, list) and all(type(v) in (int, float) for v in values)
    if not numbers or len(values) != len(pairs):
      shown = answer.decode("utf-8", "replace").strip()[:80]
      raise ValueError(
        f"Expected `metric` {self._name!r} to answer {len(pairs)} numbers, got {shown!r}; mend"
        " the function."
      )
    return values


def serve(answers: TextIO) -> None:
  """The child's side: answers lines of pairs with lines of values until its input ends."""
  metric = metrics.get_metric(sys.argv[1])
  for line in sys.stdin.buffer:
    values = [metric(text, tuple(references)) for text, references in json.loads(line)]
    answers.write(json.dumps(values) + "\n")
    answers.flush()
