"""The house is kept: no file and no function grows beyond what one can read at a sitting."""

import ast
import pathlib
import statistics

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
FOLDERS = ("calm", "scripts", "tests")
MOST_LINES = 400
# Of a function's body: what a signature and a docstring tell is not counted.
MOST_OF_A_FUNCTION = 40
MEDIAN_LINES = 200


def sources(*folders: str) -> list[pathlib.Path]:
  """Every Python file of the repository's folders."""
  return sorted(path for folder in folders for path in (REPOSITORY / folder).rglob("*.py"))


def num_lines(path: pathlib.Path) -> int:
  return len(path.read_text("utf-8").splitlines())


def long_functions(text: str, most: int = MOST_OF_A_FUNCTION) -> dict[str, int]:
  """{name: lines of its body} of the functions whose body has more than `most` lines."""
  found = {}
  for node in ast.walk(ast.parse(text)):
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
      body = node.body[1:] if ast.get_docstring(node) is not None else node.body
      lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0  # pyright: ignore
      if lines > most:
        found[node.name] = lines
  return found


def test_no_file_is_long():
  lengths = {path.relative_to(REPOSITORY): num_lines(path) for path in sources(*FOLDERS)}
  assert len(lengths) > 200
  assert {path: count for path, count in lengths.items() if count > MOST_LINES} == {}


def test_files_are_short_as_a_rule():
  assert statistics.median(map(num_lines, sources("calm"))) <= MEDIAN_LINES


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_function_is_long(folder):
  found = {
    (str(path.relative_to(REPOSITORY)), name): lines
    for path in sources(folder)
    for name, lines in long_functions(path.read_text("utf-8")).items()
  }
  assert found == {}


def test_the_count_of_a_function_can_fail():
  text = 'def f(\n  a,\n  b,\n):\n  """Says.\n\n  More.\n  """\n' + "  a += b\n" * 3
  nested = text + "  def g():\n" + "    a = 1\n" * 4
  assert long_functions(text, 2) == {"f": 3} and long_functions(text, 3) == {}
  assert long_functions(nested, 3) == {"f": 8, "g": 4}
