"""Breaks `calm.calibrate` on purpose, one place at a time, and counts what the tests notice.

    python scripts/mutation_check.py                    # every module of `TESTS`
    python scripts/mutation_check.py --module evidence/betting --every 5

Each mutant swaps one operator, comparison, constant or call (min for max, ...). It is killed
when a test fails or runs out of time. Survivors are listed with their line; the exit status is
1 if there are any that `EQUIVALENT` does not explain. The score is killed over all that are not
equivalent.
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
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
_PROMISES = ("promises_test", "configurations_test", "forgery_test")
TESTS = {
  "evidence/p_values": ("evidence/p_values_test", "pitfalls_test", "evidence/bounds_test"),
  "evidence/multiple_testing": ("evidence/multiple_testing_test", "pitfalls_test"),
  "evidence/betting": ("evidence/betting_test", "evidence/bounds_test", "evidence/draws_test"),
  "evidence/strategies": ("evidence/betting_test", "evidence/bounds_test", "sequential_test"),
  "evidence/draws": ("evidence/draws_test", "trials_test"),
  "evidence/pareto": ("evidence/pareto_test", "configurations_test", "pitfalls_test"),
  "generations/order": ("generations/order_test", "order_edges_test"),
  "losses/clusters": ("order_edges_test", "calibration_test", "edges_test"),
  "losses/labelling": ("losses/labelling_test",),
  "decision": ("promises_test", "calibration_test", "configurations_test"),
  "configurations": ("configurations_test",),
  "promises/configurations": ("configurations_test",),
  "promises/promise": _PROMISES,
  "promises/quantile": _PROMISES,
  "promises/every_group": _PROMISES,
  "promises/early": _PROMISES,
  "promises/tail": _PROMISES,
  "promises/mixture": _PROMISES,
  "promises/risks": _PROMISES,
  "promises/cost": _PROMISES,
}
# Seconds of CPU, so that a busy machine does not decide.
TIME_LIMIT = 60

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

# Mutants that change no result, by module and the text of the line: why no test can see them.
EQUIVALENT: dict[tuple[str, str], str] = {
  ("p_values", "_TINY = 1e-280 [1e-280 -> 1.0]"): "the table gives the same number",
  ("p_values", "tiny = ~(cdf > _TINY) [Gt -> GtE]"): "as above, at one value",
  (
    "p_values",
    "log_cdf = np.array(np.log(np.where(tiny, 1.0, cdf))) [1.0 -> 2.0]",
  ): "the table replaces these entries",
  (
    "p_values",
    "if np.any(sizes < 1) or np.any(sizes != np.floor(sizes)): [floor -> ceil]",
  ): "whole numbers are those that either leaves alone",
  (
    "p_values",
    "if not np.all((sums >= -slack) & (sums <= sizes + slack)): [GtE -> Gt]",
  ): "another sum only where it is off by the whole slack",
  (
    "p_values",
    "if not np.all((sums >= -slack) & (sums <= sizes + slack)): [LtE -> Lt]",
  ): "another sum only where it is off by the whole slack",
  (
    "p_values",
    "snapped = np.abs(sums - nearest) <= _SNAP * np.maximum(1.0, nearest) [1.0 -> 2.0]",
  ): "other sums next to 0 and 1 only, where Bentkus's term is above Hoeffding's: at 1 that is"
  " n d (1 - d)^(n - 1) / (1 - 1 / n)^(n - 1), at most e times P(B = 1)",
  (
    "p_values",
    "for row in dict.fromkeys(zip(*(array.ravel().tolist() for array in arrays), strict=True)):"
    " [True -> False]",
  ): "the arrays have one shape",
  (
    "p_values",
    "yield row, np.logical_and.reduce([array == v for array, v in zip(arrays, row,"
    " strict=True)]) [True -> False]",
  ): "a row has a value of each array",
  (
    "p_values",
    "z = (losses.mean(axis=0) - tolerance) * np.sqrt(size) / np.where(has_spread, spread, 1.0)"
    " [1.0 -> 2.0]",
  ): "z is not read where there is no spread",
  (
    "p_values",
    "return _finish(np.where(has_spread, special.log_ndtr(z), 0.0), log) [0.0 -> 1.0]",
  ): "log p is cut at 0 afterwards",
  (
    "p_values",
    "snapped = np.abs(sums - nearest) <= _SNAP * np.maximum(1.0, nearest) [LtE -> Lt]",
  ): "another sum only where it is off by the whole slack",
  (
    "p_values",
    "if np.any(np.abs(sums - counts) > _SNAP * np.maximum(1.0, counts)): [Gt -> GtE]",
  ): "another sum only where it is off by the whole slack",
  (
    "multiple_testing",
    "return np.where(np.isnan(p_values), 1.0, p_values) [1.0 -> 2.0]",
  ): "every p / weight is cut at 1 afterwards",
  (
    "multiple_testing",
    "adjusted = np.ones(len(p_values)) [ones -> zeros]",
  ): "all entries are set",
  (
    "multiple_testing",
    "weights = np.where(open_, weights + weights[chosen] * edges[chosen], 0.0) [0.0 -> 1.0]",
  ): "weights of closed hypotheses are not read",
  ("multiple_testing", "np.fill_diagonal(edges, 0.0) [0.0 -> 1.0]"): "the diagonal is not read",
  (
    "multiple_testing",
    "if weights.shape != (count,) or not np.all(weights >= 0.0) or weights.sum() > 1.0 + 1e-12:"
    " [Gt -> GtE]",
  ): "another sum only where it is off by the whole slack",
  (
    "multiple_testing",
    "joined, loops[:, None], out=np.zeros_like(edges), where=loops[:, None] > 1e-12"
    " [Gt -> GtE]",
  ): "another edge only where a loop is short of 1 by the whole slack",
  (
    "multiple_testing",
    "if np.any(edges.sum(axis=1) > 1.0 + 1e-12): [Gt -> GtE]",
  ): "another sum only where it is off by the whole slack",
}


def mutate(node: ast.AST) -> str:
  """Changes `node` in place; returns what was done, or '' if this node has no mutation."""
  if isinstance(node, ast.BinOp | ast.AugAssign | ast.BoolOp) and type(node.op) in _SWAPS:
    old, node.op = type(node.op).__name__, _SWAPS[type(node.op)]()
    return f"{old} -> {type(node.op).__name__}"
  if isinstance(node, ast.Compare) and type(node.ops[0]) in _SWAPS:
    old, node.ops[0] = type(node.ops[0]).__name__, _SWAPS[type(node.ops[0])]()
    return f"{old} -> {type(node.ops[0]).__name__}"
  if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Invert | ast.Not):
    old, node.op = type(node.op).__name__, ast.UAdd()
    return f"{old} dropped"
  if isinstance(node, ast.Constant) and isinstance(node.value, bool):
    node.value = not node.value
    return f"{not node.value} -> {node.value}"
  if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
    old, node.value = node.value, node.value + 1
    return f"{old} -> {node.value}"
  if isinstance(node, ast.Attribute) and node.attr in _NAMES:
    old, node.attr = node.attr, _NAMES[node.attr]
    return f"{old} -> {node.attr}"
  return ""


def mutants(source: str):
  """Every (line number, what was done, changed tree) of a module.

  Annotations, decorators and the texts of errors stay.
  """
  tree = ast.parse(source)
  count = len(list(ast.walk(tree)))
  skipped = {
    id(inner)
    for node in ast.walk(tree)
    for part in [
      getattr(node, "annotation", None),
      getattr(node, "returns", None),
      *getattr(node, "decorator_list", []),
    ]
    if part is not None
    for inner in ast.walk(part)
  }
  raised = {
    id(inner)
    for node in ast.walk(tree)
    if isinstance(node, ast.Raise)
    for inner in ast.walk(node)
  }
  originals = list(ast.walk(tree))
  for index in range(count):
    if id(originals[index]) in skipped | raised:
      continue
    changed = copy.deepcopy(tree)
    node = list(ast.walk(changed))[index]
    done = mutate(node)
    if done:
      yield getattr(node, "lineno", 0), done, ast.fix_missing_locations(changed)


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


def survives(name: str, tree: ast.Module, path: pathlib.Path, tests: list[str]) -> bool:
  """Whether all tests pass on a mutant; in a forked child, with numpy and pytest loaded."""
  import pytest

  child = os.fork()
  if child == 0:
    signal.setitimer(signal.ITIMER_PROF, TIME_LIMIT)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    sys.meta_path.insert(0, Substitute(name, tree, path))
    # The plain exit keeps a mutant's leftovers (threads, handlers) out of the verdict.
    os._exit(
      int(
        pytest.main(
          [
            "-x",
            "-q",
            "-W",
            "ignore::pytest.PytestAssertRewriteWarning",
            "-p",
            "no:cacheprovider",
            "--assert=plain",
            *tests,
          ]
        )
      )
    )
  return os.waitpid(child, 0)[1] == 0


def check(module: str, names: tuple[str, ...], every: int = 1) -> list[object]:
  """Runs mutants of one module; prints them, and returns a line of the table."""
  path = ROOT / "calm" / "calibrate" / f"{module}.py"
  source = path.read_text("utf-8")
  tests = [str(ROOT / "tests" / "calibrate" / f"{name}.py") for name in names]
  full_name = f"calm.calibrate.{module.replace('/', '.')}"
  if not survives(full_name, ast.parse(source), path, tests):
    raise SystemExit(f"{module}: the tests fail without any mutation.")
  total, killed, explained, unexplained = 0, 0, 0, 0
  started = time.perf_counter()
  for line, done, tree in itertools.islice(mutants(source), 0, None, every):
    total += 1
    if not survives(full_name, tree, path, tests):
      killed += 1
      continue
    text = source.splitlines()[line - 1].strip()
    why = EQUIVALENT.get((path.stem, f"{text} [{done}]"))
    explained += why is not None
    unexplained += why is None
    print(
      f"  survived {path.name}:{line}: {done}: {text}{f' ({why})' if why else ''}", flush=True
    )
  print(
    f"{module}: {killed} of {total} mutants killed, {explained} equivalent, {unexplained} left"
    f" ({time.perf_counter() - started:.0f} s)",
    flush=True,
  )
  score = killed / max(1, total - explained)
  return [module, str(total), str(killed), str(explained), str(unexplained), f"{score:.3f}"]


def main() -> None:
  """Command line."""
  parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
  parser.add_argument(
    "--module", nargs="+", help="modules of calm.calibrate (default: all of `TESTS`)"
  )
  parser.add_argument("--tests", nargs="+", help="test modules in tests/calibrate")
  parser.add_argument("--output", help="JSON file of the table")
  parser.add_argument("--every", type=int, default=1, help="take one mutant of so many")
  options = parser.parse_args()
  os.chdir(ROOT)
  sys.path.insert(0, str(ROOT))
  # Loaded once, before any child is forked; nothing of the project is.
  import hypothesis.strategies  # noqa: F401
  import numpy
  import pytest  # noqa: F401
  import scipy.stats

  chosen = options.module or list(TESTS)
  rows = [check(m, tuple(options.tests or TESTS[m]), options.every) for m in chosen]
  if options.output:
    value = {
      "command": " ".join(["python", "scripts/mutation_check.py", *sys.argv[1:]]),
      "columns": ["module", "mutants", "killed", "equivalent", "survived", "score"],
      "rows": rows,
      "versions": {"numpy": numpy.__version__, "scipy": scipy.__version__},
    }
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    pathlib.Path(options.output).write_text(text, "utf-8")
  raise SystemExit(1 if any(row[4] != "0" for row in rows) else 0)


if __name__ == "__main__":
  main()
