"""The direction of dependence: what importing loads, and which file may import what."""

import ast
import functools
import pathlib
import re
import subprocess
import sys
import tomllib

PACKAGE = pathlib.Path(__file__).resolve().parent.parent / "calm"
FRAMEWORKS = ("clu", "flax", "jax", "jaxlib", "optax", "orbax", "seqio", "t5x", "tensorflow")
# The floors of the house, from the top: a folder imports itself and what lies below its floor.
FLOORS = (
  {"commands"},
  {"fitting", "paper", "serve", "t5x"},
  {"inference", "training"},
  {"checkpoints", "decode"},
  {"t5"},
  {"data", "exits"},
  {"calibrate"},
  {"arguments", "console", "signals", "storage"},
)
FOLDERS = {name: floor for floor, names in enumerate(FLOORS) for name in names}
# Distributions that are imported by another name; else "-" is "_".
MODULES = {"gin-config": "gin", "orbax-checkpoint": "orbax", "pytest-xdist": "xdist"}
WITH_FLAX = {"optax", "orbax", "tensorstore"}  # what flax requires itself
DECODE = ("checkpoints", "decode", "exits", "inference", "t5")


@functools.cache
def loaded(statement: str) -> set[str]:
  """Top-level modules that a fresh interpreter has after `statement`."""
  code = f"{statement}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}})"
  words = [sys.executable, "-c", code]
  done = subprocess.run(words, capture_output=True, text=True, cwd=PACKAGE.parent, check=True)
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


def modules_of(*rooms: str) -> list[str]:
  return [
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    for room in rooms
    for path in sorted((PACKAGE / room).rglob("[a-z]*.py"))
  ]


def test_importing_loads_what_is_needed_alone():
  assert loaded("import calm") - loaded("pass") == {"calm"}
  got = loaded("import " + ", ".join(modules_of("calibrate")))
  assert {"calm", "numpy"} <= got and got.isdisjoint({*FRAMEWORKS, "sacrebleu"})
  got = loaded("import " + ", ".join(f"calm.{name}" for name in sorted(FLOORS[-1])))
  assert got.isdisjoint({*FRAMEWORKS, "numpy"})
  got = loaded("import calm.inference")
  assert {"jax", "flax"} <= got
  assert got.isdisjoint({"clu", "optax", "seqio", "t5x", "tensorflow"})


def brought_by(requirements: list[str], extras: dict[str, list[str]]) -> set[str]:
  """Top-level modules of some requirements, those of our own extras among them."""
  found = set()
  for requirement in requirements:
    name, inner = re.match(r"([\w-]+)(?:\[([\w,]+)\])?", requirement).groups()
    if name == "calm-t5x":
      found |= set().union(*(brought_by(extras[extra], extras) for extra in inner.split(",")))
    else:
      found.add(MODULES.get(name, name.replace("-", "_")))
  return found


def test_the_first_pages_installations_are_enough():
  root = PACKAGE.parent
  project = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]
  base, extras = project["dependencies"], project["optional-dependencies"]
  to_fit, to_serve, to_decode = re.findall(
    r"pip install '(\.\[[\w,]+\])'", (root / "README.md").read_text()
  )
  every = set().union(*(brought_by(extras[extra], extras) for extra in extras))
  command = lambda *names: [f"calm.commands.{name}" for name in names]

  def missing(said: str, modules: list[str]) -> set[str]:
    """What some modules load, and an installation does not bring."""
    brought = brought_by([*base, *([f"calm-t5x{said[1:]}"] if said else [])], extras)
    return (every - brought - WITH_FLAX) & loaded("import " + ", ".join(modules))

  assert not missing("", [*modules_of("calibrate"), *command("cli", "calibrate", "merge")])
  decoding = [*modules_of(*DECODE), *command("demo", "generate", "infer")]
  assert not missing(to_decode, decoding) and missing("", decoding)
  serving = [*modules_of("serve"), *command("serve"), "uvicorn"]
  assert not missing(to_serve, serving)
  fitting = [*modules_of("fitting", "training"), *command("fit", "report", "train")]
  assert not missing(to_fit, fitting)


def test_dependence_goes_one_way():
  files = {p.relative_to(PACKAGE): imported(p) for p in PACKAGE.rglob("*.py")}
  upward = set()  # (file, imported folder) wherever that is not below the file's own
  for file, names in files.items():
    room = file.parts[0].removesuffix(".py")
    for name in names if room in FOLDERS else ():
      there = name.split(".")[1] if name.startswith("calm.") else room
      beside = len(file.parts) == 1 and there in FLOORS[-1]  # of the lowest modules
      if there != room and not beside and FOLDERS.get(there, -1) <= FOLDERS[room]:
        upward.add((str(file), there))
  assert len(files) > 80 and not upward
  t5x = {
    str(file) for file, names in files.items() if {n.split(".")[0] for n in names} & {"t5x"}
  }
  assert t5x == {"t5x/models.py"}
