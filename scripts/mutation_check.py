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
import json
import os
import pathlib
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
TESTS = {
  "p_values": ("p_values_test", "betting_test", "pitfalls_test"),
  "testing": ("testing_test", "pitfalls_test", "risks_test", "configurations_test"),
  "betting": ("betting_test", "trials_test"),
  "online": ("online_test",),
  "trials": ("trials_test", "edges_test"),
  "generations/order": ("generations/order_test", "order_edges_test"),
  "clusters": ("order_edges_test", "calibration_test", "edges_test"),
  "risks": ("risks_test", "configurations_test", "forgery_test"),
}
COLUMNS = ["module", "mutants", "killed", "survived", "score"]
_SWAPS = {
  ast.Add: ast.Sub,
  ast.Sub: ast.Add,
  ast.Mult: ast.Div,
  ast.Div: ast.Mult,
  ast.Pow: ast.Mult,
  ast.Lt: ast.LtE,
  ast.LtE: ast.Lt,
  ast.Gt: ast.GtE,
  ast.GtE: ast.Gt,
  ast.Eq: ast.NotEq,
  ast.NotEq: ast.Eq,
  ast.BitOr: ast.BitAnd,
  ast.BitAnd: ast.BitOr,
  ast.And: ast.Or,
  ast.Or: ast.And,
}
_NAMES = {
  "minimum": "maximum",
  "maximum": "minimum",
  "min": "max",
  "max": "min",
  "argmin": "argmax",
  "any": "all",
  "all": "any",
  "ceil": "floor",
  "floor": "ceil",
  "zeros": "ones",
  "ones": "zeros",
}


class Mutant(NamedTuple):
  """A module with one change.

  Attributes:
    line: number of the line.
    text: of the line, as it was.
    change: what was done to it.
    function: first line of the function (or method) that it is in; 0 outside of any.
    tree: the changed module.
  """

  line: int
  text: str
  change: str
  function: int
  tree: ast.Module


Change = Callable[[ast.AST], None]


def _replace(name: str, new) -> Change:
  def change(node: ast.AST) -> None:
    setattr(node, name, new)

  return change


def _replace_operator(place: int, new: ast.cmpop) -> Change:
  def change(node: ast.AST) -> None:
    node.ops[place] = new  # pyright: ignore[reportAttributeAccessIssue]

  return change


def changes(node: ast.AST) -> Iterator[tuple[str, Change]]:
  """(what is done, what does it to a copy of the node) for each mutation of a node."""
  if isinstance(node, ast.BinOp | ast.AugAssign | ast.BoolOp) and type(node.op) in _SWAPS:
    new = _SWAPS[type(node.op)]
    yield f"{type(node.op).__name__} -> {new.__name__}", _replace("op", new())
  elif isinstance(node, ast.Compare):
    for place, op in enumerate(node.ops):
      if type(op) in _SWAPS:
        new = _SWAPS[type(op)]
        yield f"{type(op).__name__} -> {new.__name__}", _replace_operator(place, new())
  elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Invert | ast.Not):
    # A plus leaves a number as it is, and a truth value too.
    yield f"{type(node.op).__name__} dropped", _replace("op", ast.UAdd())
  elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
    yield f"{node.value} -> {not node.value}", _replace("value", not node.value)
  elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
    yield f"{node.value} -> {node.value + 1}", _replace("value", node.value + 1)
  elif isinstance(node, ast.Attribute) and node.attr in _NAMES:
    yield f"{node.attr} -> {_NAMES[node.attr]}", _replace("attr", _NAMES[node.attr])
  elif isinstance(node, ast.Name) and node.id in _NAMES:
    yield f"{node.id} -> {_NAMES[node.id]}", _replace("id", _NAMES[node.id])


def _left_alone(tree: ast.Module) -> set[int]:
  """Nodes of annotations, of decorators and of what is raised."""
  parts: list[ast.AST] = []
  for node in ast.walk(tree):
    parts += [getattr(node, "annotation", None) or ast.Pass()]
    parts += [getattr(node, "returns", None) or ast.Pass()]
    parts += getattr(node, "decorator_list", [])
    parts += [node] if isinstance(node, ast.Raise) else []
  return {id(inner) for part in parts for inner in ast.walk(part)}


def functions(tree: ast.Module) -> dict[int, int]:
  """First line of the outermost function or method around each line that is in one."""
  found: dict[int, int] = {}
  bodies = [tree.body, *(n.body for n in tree.body if isinstance(n, ast.ClassDef))]
  for node in (node for body in bodies for node in body):
    if isinstance(node, ast.FunctionDef):
      first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
      found |= dict.fromkeys(range(first, (node.end_lineno or first) + 1), first)
  return found


def mutants(source: str) -> Iterator[Mutant]:
  """Every module that differs from `source` in one operator, comparison, constant or name."""
  tree, lines = ast.parse(source), source.splitlines()
  alone, function = _left_alone(tree), functions(tree)
  for index, node in enumerate(list(ast.walk(tree))):
    if id(node) in alone:
      continue
    for place, (done, _) in enumerate(list(changes(node))):
      changed = copy.deepcopy(tree)
      copied = list(ast.walk(changed))[index]
      list(changes(copied))[place][1](copied)
      line = getattr(node, "lineno", 0)
      text = lines[line - 1].strip()
      yield Mutant(line, text, done, function.get(line, 0), ast.fix_missing_locations(changed))


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
  subject: Subject, mutants: Iterable[Mutant], seen: dict, jobs: int
) -> Iterator[tuple[Mutant, bool]]:
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
  chosen = itertools.islice(mutants(source), 0, None, options.every)
  total = survived = 0
  for mutant, lives in survivors(subject, chosen, seen, options.jobs):
    total += 1
    survived += lives
    if lives:
      print(
        f"  survived {path.name}:{mutant.line}: {mutant.text} [{mutant.change}]", flush=True
      )
  killed = total - survived
  seconds = time.perf_counter() - started
  print(f"{module}: {killed} of {total} mutants killed ({seconds:.0f} s)", flush=True)
  return [module, total, killed, survived, f"{killed / total:.3f}" if total else None]


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


if __name__ == "__main__":
  main()
