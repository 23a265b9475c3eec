"""The house is kept: no file and no function grows beyond what one can read at a sitting."""

import ast
import collections
import os
import pathlib
import re
from collections.abc import Mapping

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
FOLDERS = ("calm", "scripts", "tests")
MOST_LINES = 700
# Of a function's body: what a signature and a docstring tell is not counted.
MOST_OF_A_FUNCTION = 60


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


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_function_is_long(folder):
  found = {
    (str(path.relative_to(REPOSITORY)), name): lines
    for path in sources(folder)
    for name, lines in long_functions(path.read_text("utf-8")).items()
  }
  assert found == {}


# Lines and files of each room of calm, and of the other folders. A number goes up only with a
# line in the change log that says what left for it; a room that shrinks takes its number down.
BUDGETS = {
  "arguments.py": (178, 1),
  "calibrate": (5140, 22),
  "checkpoints": (1093, 5),
  "commands": (2651, 14),
  "console.py": (271, 1),
  "data": (1865, 8),
  "decode": (2230, 10),
  "exits": (1148, 8),
  "fitting": (2133, 7),
  "inference": (2447, 10),
  "paper": (1880, 11),
  "serve": (749, 4),
  "signals.py": (98, 1),
  "storage.py": (529, 1),
  "t5": (3280, 17),
  "t5x": (1291, 4),
  "training": (1516, 9),
}
WHOLE = {"calm": (28_610, 135), "tests": (27_587, 159), "scripts": (4_464, 25)}


def sizes(folder: pathlib.Path) -> dict[str, tuple[int, int]]:
  """{room: (lines, files)} of the Python files below a folder; a module is its own room."""
  found: dict[str, tuple[int, int]] = collections.defaultdict(lambda: (0, 0))
  for path in folder.rglob("*.py"):
    room = path.relative_to(folder).parts[0]
    lines, files = found[room]
    found[room] = (lines + num_lines(path), files + 1)
  return dict(found)


def test_rooms_keep_their_budgets():
  rooms = {name: size for name, size in sizes(REPOSITORY / "calm").items() if name[0] != "_"}
  assert set(rooms) == set(BUDGETS)
  over = {
    name: size
    for name, size in rooms.items()
    if size[0] > BUDGETS[name][0] or size[1] > BUDGETS[name][1]
  }
  assert over == {}


def test_the_whole_keeps_its_budget():
  for folder, (most_lines, most_files) in WHOLE.items():
    lines, files = map(sum, zip(*sizes(REPOSITORY / folder).values(), strict=True))
    assert lines <= most_lines and files <= most_files, (
      f"{folder}: {lines} lines, {files} files"
    )


def circles(imports: Mapping[str, set[str]]) -> set[str]:
  """Modules that import themselves through others: {module: modules that it imports}."""
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
  name_of = lambda path: ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
  modules = {name_of(path).removesuffix(".__init__"): path for path in sources("calm")}
  found = {}
  for module, path in modules.items():
    names, skipped = set(), set()
    tree = ast.parse(path.read_text("utf-8"))
    for node in ast.walk(tree):
      if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
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
  assert len(imports) > 100 and any(imports.values())
  assert circles(imports) == set()


def test_the_check_of_circles_can_fail():
  assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == {"b", "c"}


def test_the_count_of_a_function_can_fail():
  text = 'def f(\n  a,\n  b,\n):\n  """Says.\n\n  More.\n  """\n' + "  a += b\n" * 3
  nested = text + "  def g():\n" + "    a = 1\n" * 4
  assert long_functions(text, 2) == {"f": 3} and long_functions(text, 3) == {}
  assert long_functions(nested, 3) == {"f": 8, "g": 4}


# A path of folders, or the name of a Python, Markdown or gin file alone.
PATH = re.compile(
  r"(?<![\w/.:@${}<*-])((?:[\w.-]+/)+[\w.-]+\.(?:py|md|gin|json|sh|toml|j2|txt|yml)"
  r"|\w+\.(?:py|md|gin))\b"
)
# What commands and scripts write, and what is said of any file.
WRITTEN = (
  *("runs/", "run/", "cache/", "merged/", "fit/", "config.gin", "stage.gin"),
  *("folder/", "file.py"),
)
# DIR/calibration.json, scripts/results/NAME.json: a word in capitals stands for what one names.
STANDS_FOR = re.compile(
  r"(?<![A-Za-z])(?!README|CHANGELOG|CONTRIBUTING|SECURITY|NOTICE)[A-Z]{3,}"
)
# Other people's repositories, and files of theirs that are spoken of.
THEIRS = ("t5x/", "flaxformer/", "examples/t5/network.py", "scipy.py", "calm_metacls_")
DOTTED = re.compile(r"(?<!`)`([a-z_]\w*)\.(\w+)(?:\.\w+)*(?:\([^`]*\))?`(?!`)")


def written_files() -> set[str]:
  """The repository's files; environments, what is hidden and what commands write left out."""
  found = set()
  for folder, inner, names in os.walk(REPOSITORY):
    here = pathlib.Path(folder).relative_to(REPOSITORY)
    left_out = {"__pycache__"} if here.parts else {"build", "dist", "runs", "checkpoints"}
    kept = (name for name in inner if name[0] != "." or name in (".github", ".ci"))
    inner[:] = [name for name in kept if name not in left_out]
    found |= {(here / name).as_posix() for name in names}
  return found


def dangling(name: str, text: str, files: set[str]) -> list[str]:
  """Paths that a file speaks of and that are nowhere in the repository."""
  found = []
  ends = {f[at:] for f in files for at in range(len(f)) if at == 0 or f[at - 1] == "/"}
  for word in (match[0] for match in PATH.finditer(text)):
    beside = os.path.normpath(f"{pathlib.PurePosixPath(name).parent}/{word}")
    there = word in ends or beside in files or STANDS_FOR.search(word)
    if not there and not word.startswith((*WRITTEN, *THEIRS)):
      found.append(word)
  return found


def test_no_sentence_refers_to_a_file_that_is_not_there():
  files = written_files()
  spoken = [f for f in files if f.endswith((".md", ".gin", ".sh", ".toml", ".yml"))]
  spoken += [f for f in files if f.endswith(".py") and not f.endswith("_test.py")]
  assert len(spoken) > 200
  found = {}
  for name in spoken:
    if odd := dangling(name, (REPOSITORY / name).read_text("utf-8"), files):
      found[name] = odd
  assert found == {}


def test_the_check_of_files_can_fail():
  files = {"calm/a.py", "configs/runs/b.gin", "README.md"}
  text = "see `a.py`, configs/runs/b.gin, runs/out/c.json, ../README.md; not calm/d.py nor e.md"
  text += ", DIR/f.json, GONE.md; docs/README.md"
  assert dangling("scripts/x.py", text, files) == ["calm/d.py", "e.md", "docs/README.md"]


def unknown_modules(text: str, modules: set[str]) -> list[str]:
  """`module.name` in what a file says, where neither the house nor the file has the module."""
  known = set(modules)
  for node in ast.walk(ast.parse(text)):
    known |= {getattr(node, key, None) or "" for key in ("id", "arg", "attr", "asname")}
    if isinstance(node, ast.alias):
      known.add(node.name.split(".")[-1])
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
      known.add(node.value)
  words = (match for match in DOTTED.finditer(text))
  return [m[0] for m in words if m[1] not in known and not m[0].endswith(FILES_END)]


FILES_END = tuple(f".{end}`" for end in ("json", "jsonl", "model", "safetensors", "zip", "npz"))


def test_no_docstring_names_a_module_that_is_not_there():
  paths = sources("calm")
  modules = {path.stem for path in paths} | {path.parent.name for path in paths}
  modules |= {"jax", "flax", "np", "decoding", "t5x", "seqio"}  # of which docstrings speak
  found = {}
  for path in paths:
    if odd := unknown_modules(path.read_text("utf-8"), modules):
      found[path.relative_to(REPOSITORY).as_posix()] = odd
  assert found == {}


def test_the_check_of_modules_can_fail():
  text = '"""See `old.Thing` and `loop.decode`, `jax.jit`."""\nimport jax\n'
  assert unknown_modules(text, {"loop"}) == ["`old.Thing`"]


def too_wide(text: str, most: int = 100) -> list[str]:
  """Lines of Markdown beyond some columns, outside of tables, code and what a script writes."""
  inside, found = False, []
  for line in text.splitlines():
    inside ^= line.lstrip().startswith("```")
    if len(line) > most and not inside and not line.startswith(("|", "<")):
      found.append(line)
  return found


def test_prose_is_a_hundred_columns_wide():
  pages = [name for name in written_files() if name.endswith(".md")]
  assert len(pages) > 8
  texts = {name: (REPOSITORY / name).read_text("utf-8") for name in pages}
  assert {name: wide for name, text in texts.items() if (wide := too_wide(text))} == {}
  assert too_wide("a" * 101 + "\n```\n" + "b" * 101 + "\n```\n| " + "c" * 101) == ["a" * 101]
