"""The house is kept: no file and no function grows beyond what one can read at a sitting."""

import ast
import collections
import os
import pathlib
import re
from collections.abc import Iterator, Mapping

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


def test_the_count_of_a_function_can_fail():
  text = 'def f(\n  a,\n  b,\n):\n  """Says.\n\n  More.\n  """\n' + "  a += b\n" * 3
  nested = text + "  def g():\n" + "    a = 1\n" * 4
  assert long_functions(text, 2) == {"f": 3} and long_functions(text, 3) == {}
  assert long_functions(nested, 3) == {"f": 8, "g": 4}


def text_of(node: ast.expr) -> str | None:
  """A text as it is written, what is put in as {}; None where it is none."""
  if isinstance(node, ast.JoinedStr):
    parts = [v.value if isinstance(v, ast.Constant) else "{}" for v in node.values]
    return "".join(map(str, parts))
  if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
    sides = [text_of(side) for side in (node.left, node.right)]
    return None if sides == [None, None] else "".join(side or "{}" for side in sides)
  if isinstance(node, ast.Constant) and isinstance(node.value, str):
    return node.value
  return None


def texts(node: ast.expr, scope: ast.AST, functions: dict[str, list[ast.AST]]) -> Iterator[str]:
  """What an error's argument may say: a text, a name bound to one, a call that returns one."""
  if text := text_of(node):
    yield text
  elif isinstance(node, ast.Name):
    for found in ast.walk(scope):
      if isinstance(found, ast.Assign) and ast.unparse(found.targets[0]) == node.id:
        yield from texts(found.value, ast.Module([], []), functions)
  elif isinstance(node, ast.Call):
    called = ast.unparse(node.func).split(".")[-1]
    for function in functions.get(called, []):
      for found in ast.walk(function):
        if isinstance(found, ast.Return) and found.value and (text := text_of(found.value)):
          yield text


def raised(files: Mapping[str, str]) -> list[tuple[str, int, str]]:
  """(file, line, text) of what errors say, in {file: source}: where one is raised, or built.

  Where the text cannot be read from the source, it is the call itself.
  """
  trees = {name: ast.parse(text) for name, text in files.items()}
  functions = collections.defaultdict(list)
  for function in (node for tree in trees.values() for node in ast.walk(tree)):
    if isinstance(function, ast.FunctionDef):
      functions[function.name].append(function)
  found = set()
  for name, tree in trees.items():
    for scope, call in errors(tree):
      if not NO_REFUSAL.match(written := ast.unparse(call)):
        said = list(texts(call.args[0], scope, functions)) or [written]
        found |= {(name, call.lineno, text) for text in said}
  return sorted(found)


def errors(tree: ast.Module) -> Iterator[tuple[ast.AST, ast.Call]]:
  """Every call that makes an error of its arguments, and the function that it stands in."""
  inside = set()
  for scope in [*(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)), tree]:
    for node in ast.walk(scope):
      call = node.exc if isinstance(node, ast.Raise) and id(node) not in inside else None
      if isinstance(call, ast.Call) and call.args:
        yield scope, call
    inside |= {id(node) for node in ast.walk(scope)}
  for node in ast.walk(tree):
    if isinstance(node, ast.ClassDef) and any(
      b.endswith("Error") for b in map(ast.unparse, node.bases)
    ):
      for call in ast.walk(node):
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "super().__init__":
          yield node, call


# What is no refusal in itself: what the system would have said (an OSError without number) and
# a value of the wrong kind, where the caller says the rest; a class that builds its message; a
# person who stopped a command; an exit status.
NO_REFUSAL = re.compile(
  r"\w+Error\(None, |ValueError\(repr\(value\)\)|Unanswered\(|common\.StoppedError\("
  r"|SystemExit\(1 if |_Mismatch\("
)
FORM = re.compile(
  r"(?:\{\}:(?:\d+:)?)* ?[Ee]xpected (?P<what>.+?), got\b:?(?P<rest>.+)", re.DOTALL
)


def in_the_form(text: str) -> bool:
  """Whether an error reads "Expected ..., got ...; way out", after the place where it is so.

  The way out of a wrong argument, flag or field is to give the one expected, so that a message
  that names it may end with what was got. A text without a word passes another error on.
  """
  if not re.search("[a-z]", text):
    return True
  if not (match := FORM.fullmatch(text)):
    return False
  got, way_out = re.match(r"([^;]*)(; .+)?", match["rest"]).groups()  # pyright: ignore
  named = re.search(r"`|--\w", match["what"])
  return bool(way_out or named) and not re.search(r"(?<!\.)\. ", got)


@pytest.mark.parametrize("folder", ["calm", "scripts"])
def test_errors_have_one_form(folder):
  """Expected ..., got ...; way out."""
  files = {str(p.relative_to(REPOSITORY)): p.read_text("utf-8") for p in sources(folder)}
  found = raised(files)
  assert len(found) > {"calm": 480, "scripts": 15}[folder]
  assert [error for error in found if not in_the_form(error[2])] == []


def test_the_check_of_errors_can_fail():
  source = """
def f(path):
  raise ValueError(f"{path}: must be a, got {path!r}.")
def g(path):
  text = "Expected a, got b."
  raise ValueError(text)
def why():
  return "no good"
def h(line, odd):
  if odd:
    raise ValueError(odd)
  try:
    raise line.error(why()) from None
  except OSError:
    raise PermissionError(None, "it may not be written")
class Odd(ValueError):
  def __init__(self):
    super().__init__("odd")
if not f:
  raise ImportError("no f")
"""
  found = {text for _, _, text in raised({"a.py": source})}
  assert found == {"{}: must be a, got {}.", "Expected a, got b.", "no good", "odd", "no f"} | {
    "ValueError(odd)"
  }
  assert not any(map(in_the_form, found))


@pytest.mark.parametrize(
  ("text", "good"),
  [
    ("Expected `x` to be y, got {}.", True),
    ("Expected --x to be y, got none.", True),
    ("{}:{}: expected a whole line, got {} ({}); copy the file again.", True),
    ("{}:1: expected a, got: {}; do b. Or c.", True),
    ("{}: {}", True),
    ("Expected a, got {}: it was b.", False),
    ("Expected `x` to be y, got {}. Do z.", False),
    ("Expected `x` to be y. Got {}; do z.", False),
    ("Expected `x` to be y; got {}.", False),
    ("`x` must be y, got {}; do z.", False),
    ("a: expected `x` to be y, got {}.", False),
  ],
)
def test_what_the_form_of_errors_is(text, good):
  assert in_the_form(text) == good


# A path of folders, or the name of a Python, Markdown or gin file alone.
PATH = re.compile(
  r"(?<![\w/.:@${}<*-])((?:[\w.-]+/)+[\w.-]+\.(?:py|md|gin|json|sh|toml|j2|txt|yml)"
  r"|\w+\.(?:py|md|gin))\b"
)
# What commands and scripts write, and what is said of any file.
WRITTEN = (
  *("runs/", "run/", "cache/", "merged/", "fit/", "config.gin", "stage.gin", "summary.md"),
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
