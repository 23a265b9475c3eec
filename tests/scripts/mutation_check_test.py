"""Each small mistake is made once, and what explains a survivor is of a mutant there is."""

import ast
import os
import pathlib
import subprocess
import sys
import types

import pytest

SCRIPTS = pathlib.Path(__file__).parents[2] / "scripts"
PACKAGE = SCRIPTS.parent / "calm" / "calibrate"
SOURCE = '''
import numpy as np
LIMIT: int = 3
class Thing:
  """Seven."""
  @property
  def size(self) -> "1 + 1":
    return -max(1, 2) if not self.flag else 0 < LIMIT <= 9
def check(x=True):
  if x > 2:
    raise ValueError(1 + 1)
  x += np.any([x])
'''


@pytest.fixture
def scripts(monkeypatch):
  """The scripts as modules, as `python scripts/mutation_check.py` finds them."""
  monkeypatch.syspath_prepend(str(SCRIPTS))
  import mutation_check
  import mutation_equivalent
  import mutation_trees

  return types.SimpleNamespace(
    check=mutation_check, trees=mutation_trees, explained=mutation_equivalent.EQUIVALENT
  )


def test_each_mutant_is_one_change(scripts):
  mutants = list(scripts.trees.mutants(SOURCE))
  assert sorted((m.line, m.change, m.function) for m in mutants) == [
    (3, "3 -> 4", 0),
    (8, "0 -> 1", 6),
    (8, "1 -> 2", 6),
    (8, "2 -> 3", 6),
    (8, "9 -> 10", 6),
    (8, "Lt -> LtE", 6),
    (8, "LtE -> Lt", 6),
    (8, "Not dropped", 6),
    (8, "USub dropped", 6),
    (8, "max -> min", 6),
    (9, "True -> False", 9),
    (10, "2 -> 3", 9),
    (10, "Gt -> GtE", 9),
    (12, "Add -> Sub", 9),
    (12, "any -> all", 9),
  ]
  plain = ast.unparse(ast.parse(SOURCE)).splitlines()
  for mutant in mutants:
    changed = ast.unparse(mutant.tree).splitlines()
    assert sum(a != b for a, b in zip(plain, changed, strict=True)) == 1
    assert mutant.called == f"{SOURCE.splitlines()[mutant.line - 1].strip()} [{mutant.change}]"


def test_what_explains_a_survivor_is_of_a_mutant(scripts):
  """An entry whose line was edited since explains nothing and goes."""
  for module in {module for module, _ in scripts.explained}:
    source = (PACKAGE / f"{module}.py").read_text("utf-8")
    there = {mutant.called for mutant in scripts.trees.mutants(source)}
    assert {called for name, called in scripts.explained if name == module} <= there
  assert {module for module, _ in scripts.explained} <= set(scripts.check.TESTS)


def test_all_promises_and_their_tests_are_there(scripts):
  assert {"p_values", "betting", "testing", "risks"} <= set(scripts.check.TESTS)
  folder = SCRIPTS.parent / "tests" / "calibrate"
  for names in scripts.check.TESTS.values():
    assert all((folder / f"{name}.py").is_file() for name in names)


def test_tests_that_enter_the_function_come_first_and_the_quick_ones_of_them(scripts):
  seen = {"a": (0.1, []), "b": (2.0, [5]), "c": (1.0, [5, 9])}
  items = [types.SimpleNamespace(nodeid=name) for name in "abc"]
  scripts.check.Order(seen, 5).pytest_collection_modifyitems(items)
  assert [item.nodeid for item in items] == ["c", "b", "a"]
  scripts.check.Order(seen, 0).pytest_collection_modifyitems(items)
  assert [item.nodeid for item in items] == ["a", "c", "b"]


# Forks, which a process with JAX in it should not.
RUN = """
import pathlib, sys
import mutation_check as check, mutation_trees as trees
module = pathlib.Path("sums_of_two.py").resolve()
tests = [str(module.with_name("sums_of_two_test.py"))]
subject, seen = check.watched(check.Subject("sums_of_two", module, tests), module.read_text())
assert [entered for _, entered in seen.values()] == [[1]] and 5.0 < subject.limit < 600.0, seen
mutants = trees.mutants("def add(x, y):\\n  return x * y + 0\\n")
found = {mutant.change: lives for mutant, lives in check.survivors(subject, mutants, seen, 2)}
# 2 and 2 do not tell sums from products.
assert found == {"Add -> Sub": True, "Mult -> Div": False, "0 -> 1": False}, found
"""


def test_a_test_that_notices_kills(tmp_path):
  (tmp_path / "sums_of_two.py").write_text("def add(x, y):\n  return x + y\n")
  (tmp_path / "sums_of_two_test.py").write_text(
    "import sums_of_two\ndef test_add(): assert sums_of_two.add(2, 2) == 4\n"
  )
  done = subprocess.run(
    [sys.executable, "-c", RUN],
    cwd=tmp_path,
    env={**os.environ, "PYTHONPATH": f"{SCRIPTS}:{tmp_path}"},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
