"""The package's faces: lazy names that are documented, with examples that
run.
"""

import ast
import doctest
import importlib
import importlib.util
import inspect
import math
import pathlib
import pkgutil
import re
import textwrap

import pytest

jax = pytest.importorskip("jax", reason="the faces of decoding need JAX")

import calm

PACKAGE = pathlib.Path(calm.__file__).parent
# Rooms whose face needs what may be missing (T5X, matplotlib) or is the command
# line.
CLOSED = ("calm.t5x", "calm.paper", "calm.commands", "calm.__main__")
FACES = sorted(
  module.name
  for module in pkgutil.walk_packages(calm.__path__, "calm.")
  if module.ispkg and not module.name.startswith(CLOSED)
)


def documented():
  """(where, value) of every public function and class that a face names
  itself.
  """
  found = {}
  for face in ["calm", *FACES]:
    module = importlib.import_module(face)
    for name in module.__all__:
      value = getattr(module, name, None) or importlib.import_module(
        f"{face}.{name}"
      )
      if inspect.isfunction(value) or inspect.isclass(value):
        found[value.__module__, value.__qualname__] = (f"{face}.{name}", value)
  return list(found.values())


def lacks(value):
  """What the docstring of a public function or class should tell and does
  not.
  """
  text = inspect.getdoc(value) or ""
  faults = []
  if not text or text.startswith(f"{getattr(value, '__name__', '')}("):
    return ["docstring"]
  if inspect.isclass(value):
    fields = [
      name for name in getattr(value, "__annotations__", {}) if name[0] != "_"
    ]
    # A comment above a field, or beside it, documents it as well.
    for line in re.findall(
      r"# .*\n +\w+:|\n +\w+: .*  #", inspect.getsource(value)
    ):
      text += line
    faults += [
      f for f in fields if len(fields) > 1 and not re.search(rf"\b{f}\b", text)
    ]
  else:
    raised = ast.walk(ast.parse(textwrap.dedent(inspect.getsource(value))))
    if (
      any(isinstance(node, ast.Raise) for node in raised)
      and "Raises:" not in text
    ):
      faults.append("Raises:")
    parameters = [
      p for p in inspect.signature(value).parameters if p not in ("self", "cls")
    ]
    if len(parameters) > 2 and "Args:" not in text:
      faults.append("Args:")
  return faults


def test_calm_lists_and_loads_its_names():
  assert set(calm.__all__) <= set(dir(calm))
  assert calm.load is calm.inference.load and math.isinf(calm.NEVER_EXIT)
  assert calm.calibrate.calibrate.__module__ == "calm.calibrate.certify"
  with pytest.raises(AttributeError, match=r"got 'nothing'; it has .*load"):
    calm.nothing  # noqa: B018


def test_help_shows_what_can_be_loaded(monkeypatch):
  find = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util, "find_spec", lambda n: n != "jinja2" and find(n)
  )
  names = set(dir(calm))
  assert {"calibrate", "load", "training"} <= names and names.isdisjoint(
    {"fit", "fitting"}
  )
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  assert {"calibrate", "Calibration"} <= set(dir(calm)) and "load" not in dir(
    calm
  )


def test_type_checkers_see_every_lazy_name():
  source = (PACKAGE / "__init__.py").read_text("utf-8")
  (block,) = (n for n in ast.parse(source).body if isinstance(n, ast.If))
  seen = {alias.asname for node in block.body for alias in node.names}
  assert seen == set(calm.__all__)
  assert (PACKAGE / "py.typed").exists()


def test_the_path_of_a_token_names_what_is_there():
  path = [
    line for line in calm.__doc__.splitlines() if re.match(r"  \d\. ", line)
  ]
  assert len(path) == 6
  names = re.findall(r"`(calm\.[\w.]+)`", "\n".join(path))
  assert len(names) >= 8
  for name in names:
    module, _, attribute = name.rpartition(".")
    assert hasattr(importlib.import_module(module), attribute), name


def test_public_names_are_documented():
  def fails(one, two, three):
    """Adds."""
    raise ValueError

  assert lacks(fails) == ["Raises:", "Args:"]  # the check can fail
  names = documented()
  assert len(names) > 60
  assert {
    where: faults for where, value in names if (faults := lacks(value))
  } == {}


def test_every_example_runs():
  count = 0
  for module in pkgutil.walk_packages(calm.__path__, "calm."):
    if module.name.startswith(CLOSED) or module.name.endswith("seqio_tasks"):
      continue
    result = doctest.testmod(importlib.import_module(module.name))
    assert not result.failed, module.name
    count += result.attempted
  assert count >= 3
