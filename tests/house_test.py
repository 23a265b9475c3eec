"""Laws on size, density and imports of the source code."""

import ast
import json
from collections.abc import Mapping

import pytest

from tests import house
from tests.house import REPOSITORY, sources

# Tokens without comments and docstrings: a ceiling, which only falls.
MOST_TOKENS = {"calm": 179_800, "scripts": 35_900, "tests": 179_800}
MOST_DENSITY = 9.0  # tokens a code line of a file
MOST_MEAN_DENSITY = {"calm": 8.2, "scripts": 8.2, "tests": 9.0}
MOST_LINES = 800
# {law: {file: how often it is broken}}, from before the laws; only shrinks.
DEBTS = json.loads((REPOSITORY / "tests/house_debts.json").read_text("utf-8"))


def findings(name: str, text: str) -> dict[str, float]:
  """{law: how often, or by how much, a file breaks it}."""
  found: dict[str, float] = {}
  for law, places in house.broken(text).items():
    found[law] = len(places)
  # Tests keep the law on density in the mean.
  density = house.density(text)
  if density > MOST_DENSITY and not name.startswith("tests/"):
    found["density"] = density
  lines = len(text.splitlines())
  if lines > MOST_LINES:
    found["file_lines"] = lines
  return found


def beyond_debts(name: str, text: str) -> dict[str, float]:
  """What `findings` lists beyond the debts that the file had."""
  beyond = {}
  for law, amount in findings(name, text).items():
    if amount > DEBTS.get(law, {}).get(name, 0):
      beyond[law] = amount
  return beyond


def test_every_file_keeps_the_laws_or_stays_within_its_debts():
  broken = {}
  files = sources("calm", "scripts", "tests")
  assert len(files) > 200
  for path in files:
    name = path.relative_to(REPOSITORY).as_posix()
    if beyond := beyond_debts(name, path.read_text("utf-8")):
      broken[name] = beyond
  assert broken == {}


@pytest.mark.parametrize("folder", sorted(MOST_TOKENS))
def test_a_folder_keeps_its_ceiling_of_tokens_and_its_mean_density(folder: str):
  tokens, lines = 0, 0
  for path in sources(folder):
    more_tokens, more_lines = house.size(path.read_text("utf-8"))
    tokens += more_tokens
    lines += more_lines
  assert tokens <= MOST_TOKENS[folder]
  assert tokens / lines <= MOST_MEAN_DENSITY[folder]


@pytest.mark.parametrize(
  "law, text",
  [
    ("tuple_assignments", "a, b = 1, 2\n"),
    ("assigned_lambdas", "f = lambda: 1\n"),
    ("conditions_in_loops", "for x in a if b else c:\n  pass\n"),
    ("crowded_statements", "x = [a for a in b] + [c for c in d]\n"),
    ("long_functions", "def f():\n" + "  a = 1\n" * 81),
    (
      "wide_signatures",
      "def _f(a, b, c, d, e, f, g, h, i):\n  return a\n",
    ),
    ("density", "f(a, b, c, d, e)\n"),
    ("file_lines", "a = 1\n" * 801),
  ],
)
def test_each_law_can_fail(law: str, text: str):
  assert law in beyond_debts("calm/new.py", text)


@pytest.mark.parametrize(
  "text",
  [
    "a, b = b, a\n",
    "state, count = (\n  step(state),\n  count + 1,\n)\n",
    "def f(a, b):\n" + '  """' + "Says.\n" * 90 + '  """\n  return a\n',
    "x = [a for a in b]\n",
    "# a comment of many words, which is none of the code\nx = 1\n",
  ],
)
def test_swaps_loop_state_docstrings_and_comments_break_no_law(text: str):
  assert beyond_debts("calm/new.py", text) == {}


def circles(imports: Mapping[str, set[str]]) -> set[str]:
  """Modules that import themselves through others: {module: modules that it
  imports}.
  """
  found = set()
  for start in imports:
    reached = set()
    ahead = list(imports[start])
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

  def name_of(path):
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)

  modules = {
    name_of(path).removesuffix(".__init__"): path for path in sources("calm")
  }
  found = {}
  for module, path in modules.items():
    names = set()
    skipped = set()
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
