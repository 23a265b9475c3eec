"""Each small mistake is made once, and a test that notices it kills it."""

import ast
import os
import pathlib
import subprocess
import sys

from scripts import mutation_check

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


def test_each_mutant_is_one_change():
  mutants = list(mutation_check.mutants(SOURCE))
  of_8 = (
    "0 -> 1",
    "1 -> 2",
    "2 -> 3",
    "9 -> 10",
    "Lt -> LtE",
    "LtE -> Lt",
    "Not dropped",
  )
  assert sorted((m.line, m.change) for m in mutants) == [
    *(
      (3, "3 -> 4"),
      *((8, change) for change in (*of_8, "USub dropped", "max -> min")),
    ),
    *((9, "True -> False"), (10, "2 -> 3"), (10, "Gt -> GtE")),
    *((12, "Add -> Sub"), (12, "any -> all")),
  ]
  plain = ast.unparse(ast.parse(SOURCE)).splitlines()
  for mutant in mutants:
    changed = ast.unparse(mutant.tree).splitlines()
    assert sum(a != b for a, b in zip(plain, changed, strict=True)) == 1
    assert mutant.text == SOURCE.splitlines()[mutant.line - 1].strip()


def test_all_modules_and_their_tests_are_there():
  assert {"p_values", "betting", "testing", "risks"} <= set(
    mutation_check.TESTS
  )
  root = SCRIPTS.parent
  for module, names in mutation_check.TESTS.items():
    assert (root / "calm" / "calibrate" / f"{module}.py").is_file()
    assert all(
      (root / "tests" / "calibrate" / f"{name}.py").is_file() for name in names
    )


# Forks, which a process with JAX in it should not.
RUN = """
import mutation_check as check
source = "def add(x, y):\\n  return x * y + 0\\n"
found = check.survivors("sums_of_two", source, ["sums_of_two_test.py"])
# 2 and 2 do not tell sums from products.
found = {mutant.change: lives for mutant, lives in found}
expected = {"Add -> Sub": True, "Mult -> Div": False, "0 -> 1": False}
assert found == expected, found
"""


def test_a_test_that_notices_kills(tmp_path):
  (tmp_path / "sums_of_two.py").write_text("def add(x, y):\n  return x + y\n")
  (tmp_path / "sums_of_two_test.py").write_text(
    "import sums_of_two\ndef test_add(): assert sums_of_two.add(2, 2) == 4\n"
  )
  env = {**os.environ, "PYTHONPATH": f"{SCRIPTS}:{tmp_path}"}
  run = [sys.executable, "-c", RUN]
  done = subprocess.run(
    run, cwd=tmp_path, env=env, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
