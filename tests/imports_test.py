"""The direction of dependence: what importing loads, and which file may import
what.
"""

import ast
import pathlib
import re
import subprocess
import sys
import tomllib

PACKAGE = pathlib.Path(__file__).resolve().parent.parent / "calm"
FRAMEWORKS = (
  "clu",
  "flax",
  "jax",
  "jaxlib",
  "optax",
  "orbax",
  "seqio",
  "t5x",
  "tensorflow",
)
# The floors of the house, from the top: a folder imports itself and what lies
# below its floor.
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
MODULES = {
  "gin-config": "gin",
  "orbax-checkpoint": "orbax",
  "pytest-xdist": "xdist",
}
WITH_FLAX = {"optax", "orbax", "tensorstore"}  # what flax requires itself


def imported(path: pathlib.Path) -> set[str]:
  """Dotted names that a file imports anywhere, `from a import b` as both a and
  a.b.
  """
  names = set()
  for node in ast.walk(ast.parse(path.read_text("utf-8"))):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f"{path}: relative import"
      names |= {str(node.module)} | {
        f"{node.module}.{alias.name}" for alias in node.names
      }
  return names


def modules_of(*rooms: str) -> list[str]:
  return [
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    for room in rooms
    for path in sorted((PACKAGE / room).rglob("[a-z]*.py"))
  ]


def loaded(*imports: list[str]) -> list[set[str]]:
  """Top-level modules that a fresh interpreter has before it imports anything,
  after the first of these lists of modules, after the second, ...
  """
  names = "print(*{name.split('.')[0] for name in sys.modules})"
  lines = ["import sys", names]
  for modules in imports:
    lines += [f"import {', '.join(modules)}", names]
  words = [sys.executable, "-c", "\n".join(lines)]
  done = subprocess.run(
    words, capture_output=True, text=True, cwd=PACKAGE.parent, check=True
  )
  return [set(line.split()) for line in done.stdout.splitlines()]


def brought_by(
  requirements: list[str], extras: dict[str, list[str]]
) -> set[str]:
  """Top-level modules of some requirements, those of our own extras among
  them.
  """
  found = set()
  for requirement in requirements:
    name, inner = re.match(r"([\w-]+)(?:\[([\w,]+)\])?", requirement).groups()
    if name == "calm-t5x":
      found |= set().union(
        *(brought_by(extras[extra], extras) for extra in inner.split(","))
      )
    else:
      found.add(MODULES.get(name, name.replace("-", "_")))
  return found


def test_importing_loads_what_is_needed_alone_and_what_installations_bring():
  lowest = [f"calm.{name}" for name in sorted(FLOORS[-1])]

  def command(*names):
    return [f"calm.commands.{name}" for name in names]

  to_calibrate = [
    *modules_of("calibrate"),
    *command("cli", "calibrate", "merge"),
  ]
  decode = "checkpoints", "decode", "exits", "inference", "t5"
  to_decode = [*modules_of(*decode), *command("demo", "generate", "infer")]
  to_fit = [
    *modules_of("fitting", "training"),
    *command("fit", "report", "train"),
  ]
  to_serve = [*modules_of("serve"), *command("serve"), "uvicorn"]
  python, calm, low, calibrating, inference, decoding, fitting = loaded(
    ["calm"], lowest, to_calibrate, ["calm.inference"], to_decode, to_fit
  )
  assert calm - python == {"calm"} and low.isdisjoint({*FRAMEWORKS, "numpy"})
  assert "numpy" in calibrating and calibrating.isdisjoint(
    {*FRAMEWORKS, "sacrebleu"}
  )
  assert {"jax", "flax"} <= inference
  assert inference.isdisjoint({"clu", "optax", "seqio", "t5x", "tensorflow"})

  # What the first page says to install.
  root = PACKAGE.parent
  project = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))[
    "project"
  ]
  base = project["dependencies"]
  extras = project["optional-dependencies"]
  words = re.findall(
    r"pip install '(\.\[[\w,]+\])'", (root / "README.md").read_text()
  )
  every = set().union(*(brought_by(extras[extra], extras) for extra in extras))

  def missing(said: str, loaded: set[str]) -> set[str]:
    """What is loaded, and an installation does not bring."""
    brought = brought_by(
      [*base, *([f"calm-t5x{said[1:]}"] if said else [])], extras
    )
    return (every - brought - WITH_FLAX) & loaded

  assert not missing("", calibrating)
  assert not missing(words[2], decoding) and missing("", decoding)
  assert not missing(words[0], fitting) and len(words) == 3
  assert not missing(words[1], loaded(to_serve)[-1])


def test_dependence_goes_one_way():
  files = {p.relative_to(PACKAGE): imported(p) for p in PACKAGE.rglob("*.py")}
  # (file, imported folder) wherever that is not below the file's own
  upward = set()
  for file, names in files.items():
    room = file.parts[0].removesuffix(".py")
    for name in names if room in FOLDERS else ():
      there = name.split(".")[1] if name.startswith("calm.") else room
      # of the lowest modules
      beside = len(file.parts) == 1 and there in FLOORS[-1]
      if (
        there != room and not beside and FOLDERS.get(there, -1) <= FOLDERS[room]
      ):
        upward.add((str(file), there))
  assert len(files) > 80 and not upward
  t5x = {
    str(file)
    for file, names in files.items()
    if {n.split(".")[0] for n in names} & {"t5x"}
  }
  assert t5x == {"t5x/models.py"}
