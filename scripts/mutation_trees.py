"""One small mistake at a time in the tree of a Python module: what `mutation_check.py` runs."""

import ast
import copy
from collections.abc import Callable, Iterator
from typing import NamedTuple

_SWAPS = {
  ast.Add: ast.Sub,
  ast.Sub: ast.Add,
  ast.Mult: ast.Div,
  ast.Div: ast.Mult,
  ast.Pow: ast.Mult,
  ast.Lt: ast.LtE,
  ast.LtE: ast.Lt,
  ast.Gt: ast.GtE,
  ast.GtE: ast.Gt,
  ast.Eq: ast.NotEq,
  ast.NotEq: ast.Eq,
  ast.BitOr: ast.BitAnd,
  ast.BitAnd: ast.BitOr,
  ast.And: ast.Or,
  ast.Or: ast.And,
}
_NAMES = {
  "minimum": "maximum",
  "maximum": "minimum",
  "min": "max",
  "max": "min",
  "argmin": "argmax",
  "any": "all",
  "all": "any",
  "ceil": "floor",
  "floor": "ceil",
  "zeros": "ones",
  "ones": "zeros",
}


class Mutant(NamedTuple):
  """A module with one change.

  Attributes:
    line: number of the line.
    text: of the line, as it was.
    change: what was done to it.
    function: first line of the function (or method) that it is in; 0 outside of any.
    tree: the changed module.
  """

  line: int
  text: str
  change: str
  function: int
  tree: ast.Module

  @property
  def called(self) -> str:
    """The line and what was done to it: how `EQUIVALENT` names it."""
    return f"{self.text} [{self.change}]"


Change = Callable[[ast.AST], None]


def _replace(name: str, new) -> Change:
  def change(node: ast.AST) -> None:
    setattr(node, name, new)

  return change


def _replace_operator(place: int, new: ast.cmpop) -> Change:
  def change(node: ast.AST) -> None:
    node.ops[place] = new  # pyright: ignore[reportAttributeAccessIssue]

  return change


def changes(node: ast.AST) -> Iterator[tuple[str, Change]]:
  """(what is done, what does it to a copy of the node) for each mutation of a node."""
  if isinstance(node, ast.BinOp | ast.AugAssign | ast.BoolOp) and type(node.op) in _SWAPS:
    new = _SWAPS[type(node.op)]
    yield f"{type(node.op).__name__} -> {new.__name__}", _replace("op", new())
  elif isinstance(node, ast.Compare):
    for place, op in enumerate(node.ops):
      if type(op) in _SWAPS:
        new = _SWAPS[type(op)]
        yield f"{type(op).__name__} -> {new.__name__}", _replace_operator(place, new())
  elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Invert | ast.Not):
    # A plus leaves a number as it is, and a truth value too.
    yield f"{type(node.op).__name__} dropped", _replace("op", ast.UAdd())
  elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
    yield f"{node.value} -> {not node.value}", _replace("value", not node.value)
  elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
    yield f"{node.value} -> {node.value + 1}", _replace("value", node.value + 1)
  elif isinstance(node, ast.Attribute) and node.attr in _NAMES:
    yield f"{node.attr} -> {_NAMES[node.attr]}", _replace("attr", _NAMES[node.attr])
  elif isinstance(node, ast.Name) and node.id in _NAMES:
    yield f"{node.id} -> {_NAMES[node.id]}", _replace("id", _NAMES[node.id])


def _left_alone(tree: ast.Module) -> set[int]:
  """Nodes of annotations, of decorators and of what is raised."""
  parts: list[ast.AST] = []
  for node in ast.walk(tree):
    parts += [getattr(node, "annotation", None) or ast.Pass()]
    parts += [getattr(node, "returns", None) or ast.Pass()]
    parts += getattr(node, "decorator_list", [])
    parts += [node] if isinstance(node, ast.Raise) else []
  return {id(inner) for part in parts for inner in ast.walk(part)}


def functions(tree: ast.Module) -> dict[int, int]:
  """First line of the outermost function or method around each line that is in one."""
  found: dict[int, int] = {}
  bodies = [tree.body, *(n.body for n in tree.body if isinstance(n, ast.ClassDef))]
  for node in (node for body in bodies for node in body):
    if isinstance(node, ast.FunctionDef):
      first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
      found |= dict.fromkeys(range(first, (node.end_lineno or first) + 1), first)
  return found


def mutants(source: str) -> Iterator[Mutant]:
  """Every module that differs from `source` in one operator, comparison, constant or name."""
  tree, lines = ast.parse(source), source.splitlines()
  alone, function = _left_alone(tree), functions(tree)
  for index, node in enumerate(list(ast.walk(tree))):
    if id(node) in alone:
      continue
    for place, (done, _) in enumerate(list(changes(node))):
      changed = copy.deepcopy(tree)
      copied = list(ast.walk(changed))[index]
      list(changes(copied))[place][1](copied)
      line = getattr(node, "lineno", 0)
      text = lines[line - 1].strip()
      yield Mutant(line, text, done, function.get(line, 0), ast.fix_missing_locations(changed))
