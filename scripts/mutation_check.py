"""Breaks `calm.calibrate` on purpose, one place at a time, and counts what the tests notice.

    python scripts/mutation_check.py                    # every module of `TESTS`
    python scripts/mutation_check.py --module betting --every 5

Each mutant swaps one operator, comparison, constant or call (min for max, ...). It is killed
when a test fails or runs out of time. Survivors are listed with their line; the exit status is
1 if there are any that `EQUIVALENT` does not explain. The score is killed over all that are not
equivalent.
"""

import argparse
import ast
import importlib.abc
import importlib.util
import itertools
import json
import os
import pathlib
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import mutation_trees
import pytest
from mutation_equivalent import EQUIVALENT

ROOT = pathlib.Path(__file__).resolve().parent.parent
TESTS = {
  "p_values": ("p_values_test", "betting_test", "pitfalls_test"),
  "testing": ("testing_test", "pitfalls_test", "risks_test", "configurations_test"),
  "betting": ("betting_test", "trials_test", "sequential_test"),
  "trials": ("trials_test", "edges_test"),
  "generations/order": ("generations/order_test", "order_edges_test"),
  "clusters": ("order_edges_test", "calibration_test", "edges_test"),
  "configurations": ("configurations_test",),
  "risks": ("risks_test", "configurations_test", "forgery_test"),
}
COLUMNS = ["module", "mutants", "killed", "equivalent", "survived", "score"]


class Substitute(importlib.abc.MetaPathFinder, importlib.abc.Loader):
  """Imports a changed tree in place of one module."""

  def __init__(self, name: str, tree: ast.Module, path: pathlib.Path):
    self._name, self._tree, self._path = name, tree, path

  def find_spec(self, fullname, path=None, target=None):
    """A spec for the substituted module alone."""
    del path, target
    if fullname != self._name:
      return None
    return importlib.util.spec_from_loader(fullname, self, origin=str(self._path))

  def exec_module(self, module):
    """Runs the changed tree."""
    module.__file__ = str(self._path)
    exec(compile(self._tree, str(self._path), "exec"), module.__dict__)


class Watch:
  """A plugin of pytest: seconds of each test, and which functions of a file it enters."""

  def __init__(self, path: pathlib.Path, notes: pathlib.Path):
    self._path, self._notes = str(path), notes
    self._seen: dict[str, tuple[float, list[int]]] = {}

  @pytest.hookimpl(wrapper=True)
  def pytest_runtest_call(self, item):
    """Watches a test; the trace ends with it."""
    entered: set[int] = set()

    def trace(frame, event, argument):
      del event, argument
      if frame.f_code.co_filename == self._path:
        entered.add(frame.f_code.co_firstlineno)

    started = time.perf_counter()
    sys.settrace(trace)
    try:
      return (yield)
    finally:
      sys.settrace(None)
      self._seen[item.nodeid] = (time.perf_counter() - started, sorted(entered))

  def pytest_sessionfinish(self):
    """Writes what was seen."""
    self._notes.write_text(json.dumps(self._seen), "utf-8")


class Order:
  """A plugin of pytest: tests that enter a function first, and of these the quick ones."""

  def __init__(self, seen: dict[str, tuple[float, list[int]]], function: int):
    self._seen, self._function = seen, function

  def pytest_collection_modifyitems(self, items):
    """Sorts; nothing is left out."""

    def key(item):
      seconds, entered = self._seen.get(item.nodeid, (0.0, []))
      return self._function not in entered and self._function > 0, seconds

    items.sort(key=key)


class Subject(NamedTuple):
  """A module, its tests, and the CPU seconds after which they count as failed."""

  name: str
  path: pathlib.Path
  tests: list[str]
  limit: float = 600.0

  def start(self, tree: ast.Module, plugin: object) -> int:
    """The process that tests a tree, with numpy and pytest loaded; its exit tells."""
    child = os.fork()
    if child:
      return child
    signal.setitimer(signal.ITIMER_PROF, self.limit)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    sys.meta_path.insert(0, Substitute(self.name, tree, self.path))
    flags = ["-x", "-q", "-W", "ignore::pytest.PytestAssertRewriteWarning", "--assert=plain"]
    status = pytest.main([*flags, "-p", "no:cacheprovider", *self.tests], plugins=[plugin])
    # The plain exit keeps a mutant's leftovers (threads, handlers) out of the verdict.
    os._exit(int(status))


def watched(subject: Subject, source: str) -> tuple[Subject, dict]:
  """The module as it is: its time limit, and what `Watch` saw of each test."""
  with tempfile.TemporaryDirectory() as folder:
    notes = pathlib.Path(folder) / "seen.json"
    child = subject.start(ast.parse(source), Watch(subject.path, notes))
    _, status, used = os.wait4(child, 0)
    if status:
      raise SystemExit(
        f"Expected the tests of {subject.name} to pass without a mutation, got a failure; run"
        " them first."
      )
    seen = json.loads(notes.read_text("utf-8"))
  # Seconds of CPU, so that a busy machine does not decide.
  return subject._replace(limit=5.0 + 3.0 * (used.ru_utime + used.ru_stime)), seen


def survivors(
  subject: Subject, mutants: Iterable[mutation_trees.Mutant], seen: dict, jobs: int
) -> Iterator[tuple[mutation_trees.Mutant, bool]]:
  """(mutant, whether all tests pass on it), some at once, in the order in which they end."""
  left, running = iter(mutants), {}
  while True:
    for mutant in itertools.islice(left, jobs - len(running)):
      running[subject.start(mutant.tree, Order(seen, mutant.function))] = mutant
    if not running:
      return
    child, status = os.wait()
    yield running.pop(child), status == 0


def check(module: str, options: argparse.Namespace) -> list[object]:
  """Runs mutants of one module; prints those that live.

  Returns:
    A row of the table.
  """
  path = ROOT / "calm" / "calibrate" / f"{module}.py"
  source = path.read_text("utf-8")
  names = options.tests or TESTS[module]
  tests = [str(ROOT / "tests" / "calibrate" / f"{name}.py") for name in names]
  started = time.perf_counter()
  subject = Subject(f"calm.calibrate.{module.replace('/', '.')}", path, tests)
  subject, seen = watched(subject, source)
  chosen = itertools.islice(mutation_trees.mutants(source), 0, None, options.every)
  total = unexplained = explained = 0
  for mutant, lives in survivors(subject, chosen, seen, options.jobs):
    total += 1
    if not lives:
      continue
    why = EQUIVALENT.get((module, mutant.called))
    if why is None:
      unexplained += 1
    else:
      explained += 1
    reason = "" if why is None else f" ({why})"
    print(f"  survived {path.name}:{mutant.line}: {mutant.called}{reason}", flush=True)
  killed = total - unexplained - explained
  print(
    f"{module}: {killed} of {total} mutants killed, {explained} equivalent,"
    f" {unexplained} left ({time.perf_counter() - started:.0f} s)",
    flush=True,
  )
  score = f"{killed / max(1, total - explained):.3f}" if total else None
  return [module, total, killed, explained, unexplained, score]


def main() -> None:
  """Command line."""
  parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
  parser.add_argument(
    "--module", nargs="+", help="modules of calm.calibrate (default: all of `TESTS`)"
  )
  parser.add_argument("--tests", nargs="+", help="test modules in tests/calibrate")
  parser.add_argument("--output", type=pathlib.Path, help="JSON file to write")
  parser.add_argument("--every", type=int, default=1, help="take one mutant of so many")
  parser.add_argument("--jobs", type=int, default=1, help="mutants that are tested at once")
  options = parser.parse_args()
  os.chdir(ROOT)
  sys.path.insert(0, str(ROOT))
  # Loaded once, before any child is forked; nothing of the project is.
  import hypothesis.strategies  # noqa: F401
  import numpy  # noqa: F401
  import scipy.stats  # noqa: F401

  rows = [check(module, options) for module in options.module or TESTS]
  if options.output:
    import tables  # imports the project: only after the last mutant

    tables.write(options.output, COLUMNS, rows)
  raise SystemExit(1 if any(row[4] for row in rows) else 0)


if __name__ == "__main__":
  main()
