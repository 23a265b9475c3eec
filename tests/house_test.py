"""The house is kept: no file and no function grows beyond what one can read at
a sitting.
"""

import ast
import collections
import operator
import pathlib
from collections.abc import Mapping

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
FOLDERS = ("calm", "scripts", "tests")
MOST_LINES = 700
# Of a function's body: what a signature and a docstring tell is not counted.
MOST_OF_A_FUNCTION = 60


def sources(*folders: str) -> list[pathlib.Path]:
  """Every Python file of the repository's folders."""
  return sorted(
    path for folder in folders for path in (REPOSITORY / folder).rglob("*.py")
  )


def num_lines(path: pathlib.Path) -> int:
  return len(path.read_text("utf-8").splitlines())


def long_functions(text: str, most: int = MOST_OF_A_FUNCTION) -> dict[str, int]:
  """{name: lines of its body} of the functions whose body has more than `most`
  lines.
  """
  found = {}
  for node in ast.walk(ast.parse(text)):
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
      body = node.body[1:] if ast.get_docstring(node) is not None else node.body
      lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0  # pyright: ignore
      if lines > most:
        found[node.name] = lines
  return found


def test_no_file_and_no_function_is_long():
  paths = {
    path.relative_to(REPOSITORY).as_posix(): path for path in sources(*FOLDERS)
  }
  assert len(paths) > 200
  assert {
    name: n
    for name, path in paths.items()
    if (n := num_lines(path)) > MOST_LINES
  } == {}
  found = {
    name: long_functions(path.read_text("utf-8"))
    for name, path in paths.items()
  }
  assert {
    name: functions for name, functions in found.items() if functions
  } == {}
  text = (
    'def f(\n  a,\n  b,\n):\n  """Says.\n\n  More.\n  """\n' + "  a += b\n" * 3
  )
  nested = text + "  def g():\n" + "    a = 1\n" * 4
  assert long_functions(text, 2) == {"f": 3} and long_functions(text, 3) == {}
  assert long_functions(nested, 3) == {"f": 8, "g": 4}


# Lines and files of each room of calm, and of the other folders. A number goes
# up only with a line in the change log that says what left for it; a room that
# shrinks takes its number down.
BUDGETS = {
  "arguments.py": (193, 1),
  "calibrate": (4591, 20),
  "checkpoints": (969, 5),
  "commands": (2016, 13),
  "console.py": (150, 1),
  "data": (1420, 6),
  "decode": (1780, 7),
  "exits": (1051, 7),
  "fitting": (1866, 7),
  "inference": (1944, 7),
  "paper": (1527, 5),
  "serve": (742, 4),
  "signals.py": (73, 1),
  "storage.py": (491, 1),
  "t5": (3533, 20),
  "t5x": (1114, 4),
  "training": (1337, 8),
}
WHOLE = {"calm": (24_900, 119), "tests": (19_978, 133), "scripts": (4_425, 25)}


def sizes(folder: pathlib.Path) -> dict[str, tuple[int, int]]:
  """{room: (lines, files)} of the Python files below a folder; a module is its
  own room.
  """
  found: dict[str, tuple[int, int]] = collections.defaultdict(lambda: (0, 0))
  for path in folder.rglob("*.py"):
    room = path.relative_to(folder).parts[0]
    lines, files = found[room]
    found[room] = (lines + num_lines(path), files + 1)
  return dict(found)


def test_rooms_keep_their_budgets():
  rooms = {
    name: size
    for name, size in sizes(REPOSITORY / "calm").items()
    if name[0] != "_"
  }
  assert set(rooms) == set(BUDGETS)
  over = {
    n: size
    for n, size in rooms.items()
    if any(map(operator.gt, size, BUDGETS[n]))
  }
  assert over == {}


def test_the_whole_keeps_its_budget():
  for folder, (most_lines, most_files) in WHOLE.items():
    lines, files = map(
      sum, zip(*sizes(REPOSITORY / folder).values(), strict=True)
    )
    assert lines <= most_lines and files <= most_files, (
      f"{folder}: {lines}, {files}"
    )


def circles(imports: Mapping[str, set[str]]) -> set[str]:
  """Modules that import themselves through others: {module: modules that it
  imports}.
  """
  found = set()
  for start in imports:
    reached, ahead = set(), list(imports[start])
    while ahead:
      module = ahead.pop()
      if module not in reached:
        reached.add(module)
        ahead += imports.get(module, ())
    if start in reached:
      found.add(start)
  return found


def module_imports() -> dict[str, set[str]]:
  """The modules of calm that each imports anywhere but for its annotations."""
  name_of = lambda path: ".".join(
    path.relative_to(REPOSITORY).with_suffix("").parts
  )
  modules = {
    name_of(path).removesuffix(".__init__"): path for path in sources("calm")
  }
  found = {}
  for module, path in modules.items():
    names, skipped = set(), set()
    tree = ast.parse(path.read_text("utf-8"))
    for node in ast.walk(tree):
      if isinstance(node, ast.If) and ast.unparse(node.test).endswith(
        "TYPE_CHECKING"
      ):
        skipped |= set(map(id, ast.walk(node)))
      elif isinstance(node, ast.ImportFrom) and id(node) not in skipped:
        for alias in node.names:
          whole = f"{node.module}.{alias.name}"
          names.add(whole if whole in modules else str(node.module))
      elif isinstance(node, ast.Import):
        names |= {alias.name for alias in node.names}
    found[module] = names & set(modules)
  return found


def test_no_files_import_one_another_in_a_circle():
  imports = module_imports()
  assert len(imports) > 80 and any(imports.values())
  assert circles(imports) == set()
  assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == {"b", "c"}
