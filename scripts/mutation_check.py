"""Breaks `calm.calibrate` on purpose, one place at a time, and counts what the tests notice.

    python scripts/mutation_check.py                    # every module of `TESTS`
    python scripts/mutation_check.py --module betting --every 5

Each mutant swaps one operator, comparison, constant or call (min for max, ...). It is killed
when a test fails or runs out of time. Survivors are listed with their line; some of them change
nothing that a test could see (the size of a block, a branch that is never taken).
"""

import argparse
import ast
import copy
import importlib.abc
import importlib.util
import itertools
import os
import pathlib
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
TESTS = {
  "p_values": ("p_values_test", "betting_test"),
  "testing": ("testing_test", "risks_test", "configurations_test"),
  "betting": ("betting_test", "clusters_test"),
  "online": ("online_test",),
  "clusters": ("clusters_test", "calibration_test", "risks_test"),
  "risks": ("risks_test", "configurations_test", "forgery_test"),
}
_OPERATORS = {
  **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult},
  **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt},
  **{ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.And: ast.Or, ast.Or: ast.And},
  **{ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr, ast.Pow: ast.Mult},
}
_PAIRS = (
  *(("minimum", "maximum"), ("min", "max"), ("any", "all"), ("ceil", "floor")),
  *(("zeros", "ones"), ("argmin", "argmax")),
)
_NAMES = dict(_PAIRS) | {b: a for a, b in _PAIRS if b != "argmax"}


class Mutant(NamedTuple):
  """A module with one change: number and text of the line, what was done, the changed tree."""

  line: int
  text: str
  change: str
  tree: ast.Module


Change = Callable[[ast.AST], None]


def _replace(name: str, new) -> Change:
  return lambda node: setattr(node, name, new)


def _replace_operator(place: int, new: ast.cmpop) -> Change:
  return lambda node: node.ops.__setitem__(place, new)  # pyright: ignore


def changes(node: ast.AST) -> Iterator[tuple[str, Change]]:
  """(what is done, what does it to a copy of the node) for each mutation of a node."""
  if isinstance(node, ast.BinOp | ast.AugAssign | ast.BoolOp) and type(node.op) in _OPERATORS:
    new = _OPERATORS[type(node.op)]
    yield f"{type(node.op).__name__} -> {new.__name__}", _replace("op", new())
  elif isinstance(node, ast.Compare):
    for place, op in enumerate(node.ops):
      if type(op) in _OPERATORS:
        new = _OPERATORS[type(op)]
        yield f"{type(op).__name__} -> {new.__name__}", _replace_operator(place, new())
  elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Invert | ast.Not):
    # A plus leaves a number as it is, and a truth value too.
    yield f"{type(node.op).__name__} dropped", _replace("op", ast.UAdd())
  elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
    new = not node.value if isinstance(node.value, bool) else node.value + 1
    yield f"{node.value} -> {new}", _replace("value", new)
  elif isinstance(node, ast.Attribute | ast.Name):
    key = "attr" if isinstance(node, ast.Attribute) else "id"
    if (name := getattr(node, key)) in _NAMES:
      yield f"{name} -> {_NAMES[name]}", _replace(key, _NAMES[name])


def _left_alone(tree: ast.Module) -> set[int]:
  """Nodes of annotations, of decorators and of what is raised."""
  parts: list[ast.AST] = []
  for node in ast.walk(tree):
    parts += [part for key in ("annotation", "returns") if (part := getattr(node, key, None))]
    parts += getattr(node, "decorator_list", [])
    parts += [node] if isinstance(node, ast.Raise) else []
  return {id(inner) for part in parts for inner in ast.walk(part)}


def mutants(source: str) -> Iterator[Mutant]:
  """Every module that differs from `source` in one operator, comparison, constant or name."""
  tree, lines = ast.parse(source), source.splitlines()
  alone = _left_alone(tree)
  for index, node in enumerate(list(ast.walk(tree))):
    if id(node) in alone:
      continue
    for place, (done, _) in enumerate(list(changes(node))):
      changed = copy.deepcopy(tree)
      copied = list(ast.walk(changed))[index]
      list(changes(copied))[place][1](copied)
      line = getattr(node, "lineno", 0)
      yield Mutant(line, lines[line - 1].strip(), done, ast.fix_missing_locations(changed))


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


class Subject(NamedTuple):
  """A module, its tests, and the CPU seconds after which they count as failed."""

  name: str
  path: pathlib.Path
  tests: list[str]
  limit: float = 600.0

  def start(self, tree: ast.Module) -> int:
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
    status = pytest.main([*flags, "-p", "no:cacheprovider", *self.tests])
    # The plain exit keeps a mutant's leftovers (threads, handlers) out of the verdict.
    os._exit(int(status))

  def limited(self) -> "Subject":
    """With thrice the CPU seconds that the tests take as it is: a busy machine decides nothing.

    Raises:
      SystemExit: the tests fail without a mutation.
    """
    _, status, used = os.wait4(self.start(ast.parse(self.path.read_text("utf-8"))), 0)
    if status:
      raise SystemExit(
        f"Expected the tests of {self.name} to pass without a mutation, got a failure; run"
        " them first."
      )
    return self._replace(limit=5.0 + 3.0 * (used.ru_utime + used.ru_stime))


def survivors(
  subject: Subject, mutants: Iterable[Mutant], jobs: int
) -> Iterator[tuple[Mutant, bool]]:
  """(mutant, whether all tests pass on it), some at once, in the order in which they end."""
  left, running = iter(mutants), {}
  while True:
    for mutant in itertools.islice(left, jobs - len(running)):
      running[subject.start(mutant.tree)] = mutant
    if not running:
      return
    child, status = os.wait()
    yield running.pop(child), status == 0


def check(module: str, every: int, jobs: int) -> None:
  """Runs mutants of one module; prints those that live, and how many do not."""
  path = ROOT / "calm" / "calibrate" / f"{module}.py"
  tests = [str(ROOT / "tests" / "calibrate" / f"{name}.py") for name in TESTS[module]]
  started = time.perf_counter()
  subject = Subject(f"calm.calibrate.{module.replace('/', '.')}", path, tests).limited()
  chosen = itertools.islice(mutants(path.read_text("utf-8")), 0, None, every)
  total = survived = 0
  for mutant, lives in survivors(subject, chosen, jobs):
    total += 1
    survived += lives
    if lives:
      print(f"  survived {path.name}:{mutant.line}: {mutant.text} [{mutant.change}]")
  seconds = time.perf_counter() - started
  print(f"{module}: {total - survived} of {total} mutants killed ({seconds:.0f} s)", flush=True)


def main() -> None:
  """Command line."""
  parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
  parser.add_argument(
    "--module", nargs="+", default=list(TESTS), choices=TESTS, help="of calm.calibrate"
  )
  parser.add_argument("--every", type=int, default=1, help="take one mutant of so many")
  parser.add_argument("--jobs", type=int, default=1, help="mutants that are tested at once")
  options = parser.parse_args()
  os.chdir(ROOT)
  sys.path.insert(0, str(ROOT))
  # Loaded once, before any child is forked; nothing of the project is.
  import hypothesis.strategies  # noqa: F401
  import numpy  # noqa: F401
  import scipy.stats  # noqa: F401

  for module in options.module:
    check(module, options.every, options.jobs)


if __name__ == "__main__":
  main()
