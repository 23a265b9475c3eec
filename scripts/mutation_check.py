"""Breaks `calm.calibrate` on purpose, one place at a time, and counts what the
tests notice.

    python scripts/mutation_check.py                    # every module of
    `TESTS` python scripts/mutation_check.py --module betting --every 5

Each mutant swaps one operator, comparison, constant or call (min for max, ...).
It is killed when a test fails or runs out of time. Survivors are listed with
their line; some of them change nothing that a test could see (the size of a
block, a branch that is never taken).
"""

import argparse
import ast
import copy
import importlib.machinery
import itertools
import os
import pathlib
import signal
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
TESTS = {
  "p_values": ("p_values_test",),
  "testing": ("testing_test", "risks_test"),
  "betting": ("p_values_test", "clusters_test"),
  "online": ("online_test",),
  "clusters": ("clusters_test", "calibration_test", "risks_test"),
  "risks": ("risks_test", "forgery_test"),
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
  """A module with one change: number and text of the line, what was done, the
  changed tree.
  """

  line: int
  text: str
  change: str
  tree: ast.Module


def changes(node: ast.AST) -> Iterator[tuple[str, str, object]]:
  """(what is done, attribute, its new value) of each mutation of a node."""
  if (
    isinstance(node, ast.BinOp | ast.AugAssign | ast.BoolOp)
    and type(node.op) in _OPERATORS
  ):
    new = _OPERATORS[type(node.op)]
    yield f"{type(node.op).__name__} -> {new.__name__}", "op", new()
  elif isinstance(node, ast.Compare):
    for place, op in enumerate(node.ops):
      if new := _OPERATORS.get(type(op)):
        operators = [*node.ops[:place], new(), *node.ops[place + 1 :]]
        yield f"{type(op).__name__} -> {new.__name__}", "ops", operators
  elif isinstance(node, ast.UnaryOp) and isinstance(
    node.op, ast.USub | ast.Invert | ast.Not
  ):
    # A plus leaves a number as it is, and a truth value too.
    yield f"{type(node.op).__name__} dropped", "op", ast.UAdd()
  elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
    new = not node.value if isinstance(node.value, bool) else node.value + 1
    yield f"{node.value} -> {new}", "value", new
  elif isinstance(node, ast.Attribute | ast.Name):
    key = "attr" if isinstance(node, ast.Attribute) else "id"
    if (name := getattr(node, key)) in _NAMES:
      yield f"{name} -> {_NAMES[name]}", key, _NAMES[name]


def _left_alone(tree: ast.Module) -> set[int]:
  """Nodes of annotations, of decorators and of what is raised."""
  parts: list[ast.AST] = []
  for node in ast.walk(tree):
    parts += [
      part
      for key in ("annotation", "returns")
      if (part := getattr(node, key, None))
    ]
    parts += getattr(node, "decorator_list", [])
    parts += [node] if isinstance(node, ast.Raise) else []
  return {id(inner) for part in parts for inner in ast.walk(part)}


def mutants(source: str) -> Iterator[Mutant]:
  """Every module that differs from `source` in one operator, comparison,
  constant or name.
  """
  tree = ast.parse(source)
  lines = source.splitlines()
  alone = _left_alone(tree)
  for index, node in enumerate(list(ast.walk(tree))):
    for done, attribute, value in (
      changes(node) if id(node) not in alone else ()
    ):
      changed = copy.deepcopy(tree)
      setattr(list(ast.walk(changed))[index], attribute, value)
      line = getattr(node, "lineno", 0)
      yield Mutant(
        line, lines[line - 1].strip(), done, ast.fix_missing_locations(changed)
      )


def run(
  name: str, tree: ast.Module, tests: list[str], limit: float
) -> tuple[bool, float]:
  """(whether the tests of a changed module pass, their CPU seconds), in a child
  process.

  They fail after `limit` CPU seconds: a busy machine decides nothing.
  """
  child = os.fork()
  if child:
    _, status, used = os.wait4(child, 0)
    return status == 0, used.ru_utime + used.ru_stime
  signal.setitimer(signal.ITIMER_PROF, limit)
  quiet = os.open(os.devnull, os.O_WRONLY)
  os.dup2(quiet, 1)
  os.dup2(quiet, 2)
  loader = importlib.machinery.SourceFileLoader
  read = loader.get_code

  def changed(self, module):
    return (
      compile(tree, self.path, "exec") if module == name else read(self, module)
    )

  loader.get_code = changed  # pyright: ignore[reportAttributeAccessIssue]
  flags = [
    "-x",
    "-q",
    "-W",
    "ignore::pytest.PytestAssertRewriteWarning",
    "--assert=plain",
  ]
  status = pytest.main([*flags, "-p", "no:cacheprovider", *tests])
  # The plain exit keeps a mutant's leftovers (threads, handlers) out of the
  # verdict.
  os._exit(int(status))


def survivors(
  name: str, source: str, tests: list[str], every: int = 1
) -> Iterator[tuple]:
  """(mutant, whether all tests pass on it) of one mutant of so many.

  A mutant has thrice the CPU seconds that the tests take as it is. SystemExit
  where they fail without a mutation.
  """
  passes, seconds = run(name, ast.parse(source), tests, 600.0)
  if not passes:
    raise SystemExit(
      f"Expected the tests of {name} to pass without a mutation, got a "
      "failure; run them first."
    )
  for mutant in itertools.islice(mutants(source), 0, None, every):
    yield mutant, run(name, mutant.tree, tests, 5.0 + 3.0 * seconds)[0]


def check(module: str, every: int) -> None:
  """Runs mutants of one module; prints those that live, and how many do not."""
  source = (ROOT / "calm" / "calibrate" / f"{module}.py").read_text("utf-8")
  tests = [
    str(ROOT / "tests" / "calibrate" / f"{name}.py") for name in TESTS[module]
  ]
  started = time.perf_counter()
  total = 0
  survived = 0
  for mutant, lives in survivors(
    f"calm.calibrate.{module}", source, tests, every
  ):
    total, survived = total + 1, survived + lives
    if lives:
      print(
        f"  survived {module}.py:{mutant.line}: {mutant.text} [{mutant.change}]"
      )
  seconds = time.perf_counter() - started
  print(
    f"{module}: {total - survived} of {total} mutants killed ({seconds:.0f} s)",
    flush=True,
  )


def main() -> None:
  """Command line."""
  parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
  parser.add_argument(
    "--module",
    nargs="+",
    default=list(TESTS),
    choices=TESTS,
    help="of calm.calibrate",
  )
  parser.add_argument(
    "--every", type=int, default=1, help="take one mutant of so many"
  )
  options = parser.parse_args()
  os.chdir(ROOT)
  sys.path.insert(0, str(ROOT))
  # Loaded once, before any child is forked; nothing of the project is.
  import hypothesis.strategies  # noqa: F401
  import numpy  # noqa: F401
  import scipy.stats  # noqa: F401

  for module in options.module:
    check(module, options.every)


if __name__ == "__main__":
  main()
