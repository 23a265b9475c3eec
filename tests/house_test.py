"""The house is kept: no file and no function grows beyond what one can read at a sitting."""

import ast
import pathlib
import re
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


def messages(path: pathlib.Path) -> list[tuple[int, str]]:
  """(line, text) of every string of a file, what is put in as {}."""
  found = []
  inner = set()
  for node in ast.walk(ast.parse(path.read_text("utf-8"))):
    if isinstance(node, ast.JoinedStr):
      inner |= {id(value) for value in node.values}
      parts = [v.value if isinstance(v, ast.Constant) else "{}" for v in node.values]
      found.append((node.lineno, "".join(map(str, parts))))
    elif (
      isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inner
    ):
      found.append((node.lineno, node.value))
  return found


def in_the_old_form(text: str) -> bool:
  """Whether an error speaks as 'Expected ... . Got ...' or '... must be ..., got ...'."""
  return bool(re.search(r"\.\s+Got\b|^Got\b|\b(must|should) be\b.*, got\b", text, re.DOTALL))


@pytest.mark.parametrize("folder", ["calm", "scripts"])
def test_errors_have_one_form(folder):
  """Expected ..., got ...; way out."""
  found = {
    (str(path.relative_to(REPOSITORY)), line): text
    for path in sources(folder)
    for line, text in messages(path)
    if in_the_old_form(text)
  }
  assert found == {}
  assert any(", got" in text for path in sources(folder) for _, text in messages(path))


def test_the_check_of_errors_can_fail(tmp_path):
  file = tmp_path / "a.py"
  file.write_text(
    'raise ValueError(\n  f"Expected a. Got {b}; c."\n)\nx = "d must be e, got f"\n'
  )
  found = {text for _, text in messages(file) if in_the_old_form(text)}
  assert found == {"Expected a. Got {}; c.", "d must be e, got f"}
  assert not in_the_old_form("Expected `x` to be y, got {}; do z.")
