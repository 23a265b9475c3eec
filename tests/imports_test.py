"""The direction of dependence: what importing loads, and which file may import what."""

import ast
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parent.parent / "calm"
FRAMEWORKS = ("clu", "flax", "jax", "jaxlib", "optax", "orbax", "seqio", "t5x", "tensorflow")
# The floors of the house, from the top: a folder imports itself and what lies below its floor.
FLOORS = (
  {"commands"},
  {"fitting", "paper", "t5x"},
  {"inference", "training"},
  {"checkpoints", "decode"},
  {"t5"},
  {"data", "exits"},
  {"calibrate"},
  {"arguments", "console", "signals", "storage"},
)
FOLDERS = {name: floor for floor, names in enumerate(FLOORS) for name in names}


def loaded(statement: str) -> set[str]:
  """Top-level modules that a fresh interpreter has after `statement`."""
  code = f"{statement}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}})"
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=True
  )
  return set(done.stdout.split())


def imported(path: pathlib.Path) -> set[str]:
  """Dotted names that a file imports anywhere, `from a import b` as both a and a.b."""
  names = set()
  for node in ast.walk(ast.parse(path.read_text("utf-8"))):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f"{path}: relative import"
      names |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
  return names


def importers(package: pathlib.Path, module: str) -> set[str]:
  """Files of a package that import a module or anything under it."""
  return {
    path.relative_to(package).as_posix()
    for path in package.rglob("*.py")
    if any(name == module or name.startswith(module + ".") for name in imported(path))
  }


def test_importing_calm_loads_nothing():
  assert loaded("import calm") - loaded("pass") == {"calm"}


def test_calibrating_needs_no_framework():
  assert loaded("import calm.calibrate").isdisjoint(FRAMEWORKS)
  every = [
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    for path in (PACKAGE / "calibrate").rglob("[a-z]*.py")
  ]
  got = loaded("import " + ", ".join(every))
  assert {"calm", "numpy"} <= got and got.isdisjoint(FRAMEWORKS)


def test_inference_needs_no_tensorflow_seqio_or_t5x():
  got = loaded("import calm.inference")
  assert {"jax", "flax"} <= got
  assert got.isdisjoint({"clu", "optax", "seqio", "t5x", "tensorflow"})


# Distributions that are imported by another name; else "-" is "_".
MODULES = {"gin-config": "gin", "orbax-checkpoint": "orbax", "pytest-xdist": "xdist"}
# What flax requires itself.
WITH_FLAX = {"optax", "orbax"}
DECODE = ("checkpoints", "decode", "exits", "inference", "t5")
COMMANDS = ("calibrate", "demo", "generate", "infer", "merge")


def brought_by(requirements: list[str], extras: dict[str, list[str]]) -> set[str]:
  """Top-level modules of some requirements, those of our own extras among them."""
  found = set()
  for requirement in requirements:
    name, inner = re.match(r"([\w-]+)(?:\[([\w,]+)\])?", requirement).groups()
    if name == "calm-t5x":
      for extra in inner.split(","):
        found |= brought_by(extras[extra], extras)
    else:
      found.add(MODULES.get(name, name.replace("-", "_")))
  return found


def missing_from(
  requirements: list[str], extras: dict[str, list[str]], modules: list[str]
) -> str:
  """The package that one of the modules asks for where no more than this is installed."""
  every = set().union(*(brought_by(extras[extra], extras) for extra in extras))
  hidden = every - brought_by(requirements, extras) - WITH_FLAX
  code = (
    "import importlib, sys\n"
    "class Hide:\n"
    "  def find_spec(self, name, path=None, target=None):\n"
    f"    if name.split('.')[0] in {hidden!r}: raise ModuleNotFoundError(name, name=name)\n"
    "sys.meta_path.insert(0, Hide())\n"
    "try:\n"
    f"  for name in {modules!r}: importlib.import_module(name)\n"
    "except ModuleNotFoundError as error: print(error.name)\n"
  )
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=True
  )
  return done.stdout.strip()


def modules_of(*rooms: str) -> list[str]:
  return [
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    for room in rooms
    for path in sorted((PACKAGE / room).rglob("[a-z]*.py"))
  ]


def test_the_first_pages_installations_are_enough():
  root = PACKAGE.parent
  project = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]
  base, extras = project["dependencies"], project["optional-dependencies"]
  to_fit, to_decode = re.findall(
    r"pip install '(\.\[[\w,]+\])'", (root / "README.md").read_text()
  )
  brought = lambda said: [*base, f"calm-t5x{said.removeprefix('.')}"]
  decoding = [*modules_of(*DECODE), *(f"calm.commands.{name}" for name in COMMANDS)]
  fitting = [*modules_of("fitting", "training"), "calm.commands.fit", "calm.commands.report"]
  assert not missing_from(base, extras, [*modules_of("calibrate"), "calm.commands.calibrate"])
  assert not missing_from(brought(to_decode), extras, decoding)
  assert not missing_from(brought(to_fit), extras, decoding + fitting)
  # The check can fail.
  assert missing_from(base, extras, decoding) and missing_from(
    brought(to_decode), extras, fitting
  )


@pytest.mark.parametrize(
  ("statement", "name"), [("import jax", "jax"), ("import calm.t5.network", "flax")]
)
def test_the_check_of_loaded_modules_can_fail(statement, name):
  assert name in loaded(statement)


def test_only_the_adapter_imports_t5x():
  assert importers(PACKAGE, "t5x") == {"t5x/models.py"}


def test_the_check_of_importers_can_fail(tmp_path):
  (tmp_path / "sub").mkdir()
  (tmp_path / "a.py").write_text("import t5xyz\n")
  (tmp_path / "sub" / "b.py").write_text("def f():\n  from t5x import models\n")
  assert importers(tmp_path, "t5x") == {"sub/b.py"}


def test_calibrate_knows_nothing_of_ours_outside_itself():
  outside = {
    (path.name, name)
    for path in (PACKAGE / "calibrate").rglob("*.py")
    for name in imported(path)
    if name.startswith("calm.") and name.split(".")[1] not in ("calibrate", *FLOORS[-1])
  }
  assert not outside


def test_the_lowest_modules_need_no_numpy_and_no_room():
  got = loaded("import " + ", ".join(f"calm.{name}" for name in sorted(FLOORS[-1])))
  assert got.isdisjoint({*FRAMEWORKS, "numpy"})
  for name in FLOORS[-1]:
    ours = {n for n in imported(PACKAGE / f"{name}.py") if n.startswith("calm.")}
    assert {n.split(".")[1] for n in ours} <= FLOORS[-1]


def upward(package: pathlib.Path) -> set[tuple[str, str]]:
  """(file, imported folder) wherever a file imports a folder that is not below its own."""
  found = set()
  for path in package.rglob("*/*.py"):
    here = path.relative_to(package)
    for name in imported(path):
      if not name.startswith("calm."):
        continue
      there = name.split(".")[1]
      if there == here.parts[0]:
        continue
      if FOLDERS.get(there, -1) <= FOLDERS[here.parts[0]]:
        found.add((here.as_posix(), there))
  return found


def test_dependence_goes_one_way():
  assert not upward(PACKAGE)


def test_the_check_of_directions_can_fail(tmp_path):
  for name, text in {
    "exits/a.py": "from calm.exits import b\nfrom calm import calibrate\n",
    "exits/b.py": "from calm.data import vocabulary\n",
    "t5/c.py": "def f():\n  import calm.decode.loop\n",
    "decode/d.py": "from calm import other\n",
  }.items():
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(text)
  found = {("exits/b.py", "data"), ("t5/c.py", "decode"), ("decode/d.py", "other")}
  assert upward(tmp_path) == found
