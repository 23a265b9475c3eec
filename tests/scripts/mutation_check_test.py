"""Each small mistake is made once, and a test that notices it kills it."""

import ast
import os
import pathlib
import subprocess
import sys
import types

import pytest

SCRIPTS = pathlib.Path(__file__).parents[2] / "scripts"
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
def script(monkeypatch):
  """The script as a module, as `python scripts/mutation_check.py` finds them."""
  monkeypatch.syspath_prepend(str(SCRIPTS))
  import mutation_check

  return mutation_check


def test_each_mutant_is_one_change(script):
  mutants = list(script.mutants(SOURCE))
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
    assert mutant.text == SOURCE.splitlines()[mutant.line - 1].strip()


def test_all_promises_and_their_tests_are_there(script):
  assert {"p_values", "betting", "testing", "risks"} <= set(script.TESTS)
  folder = SCRIPTS.parent / "tests" / "calibrate"
  for names in script.TESTS.values():
    assert all((folder / f"{name}.py").is_file() for name in names)


def test_tests_that_enter_the_function_come_first_and_the_quick_ones_of_them(script):
  seen = {"a": (0.1, []), "b": (2.0, [5]), "c": (1.0, [5, 9])}
  items = [types.SimpleNamespace(nodeid=name) for name in "abc"]
  script.Order(seen, 5).pytest_collection_modifyitems(items)
  assert [item.nodeid for item in items] == ["c", "b", "a"]
  script.Order(seen, 0).pytest_collection_modifyitems(items)
  assert [item.nodeid for item in items] == ["a", "c", "b"]


# Forks, which a process with JAX in it should not.
RUN = """
import pathlib, sys
import mutation_check as check
module = pathlib.Path("sums_of_two.py").resolve()
tests = [str(module.with_name("sums_of_two_test.py"))]
subject, seen = check.watched(check.Subject("sums_of_two", module, tests), module.read_text())
assert [entered for _, entered in seen.values()] == [[1]] and 5.0 < subject.limit < 600.0, seen
mutants = check.mutants("def add(x, y):\\n  return x * y + 0\\n")
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
