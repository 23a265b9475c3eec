"""Measures of source code that the laws of `house_test.py` bound."""

import ast
import io
import pathlib
import tokenize
from collections.abc import Callable, Iterator

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
LAYOUT = {
  tokenize.COMMENT,
  tokenize.DEDENT,
  tokenize.ENCODING,
  tokenize.ENDMARKER,
  tokenize.INDENT,
  tokenize.NEWLINE,
  tokenize.NL,
}
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
MOST_COMPREHENSIONS = 1
MOST_LINES_OF_A_FUNCTION = 80
MOST_ARGUMENTS = 8


def sources(*folders: str) -> list[pathlib.Path]:
  """Every Python file of the repository's folders."""
  files = []
  for folder in folders:
    files += sorted((REPOSITORY / folder).rglob("*.py"))
  return files


def docstring_places(tree: ast.AST) -> set[tuple[int, int]]:
  """(line, column) of every docstring."""
  places = set()
  for node in ast.walk(tree):
    if isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS)):
      first = node.body[0] if node.body else None
      if ast.get_docstring(node, clean=False) is not None:
        places.add((first.lineno, first.col_offset))  # pyright: ignore
  return places


def size(text: str) -> tuple[int, int]:
  """(tokens, code lines): comments and docstrings are not counted."""
  docstrings = docstring_places(ast.parse(text))
  count = 0
  lines = set()
  for token in tokenize.generate_tokens(io.StringIO(text).readline):
    if token.type in LAYOUT or token.start in docstrings:
      continue
    count += 1
    lines.add(token.start[0])
  return count, len(lines)


def density(text: str) -> float:
  """Tokens a code line; 0 where there is no code."""
  tokens, lines = size(text)
  return tokens / lines if lines else 0.0


def _is_names(node: ast.AST) -> bool:
  return isinstance(node, ast.Tuple) and all(
    isinstance(item, ast.Name | ast.Attribute) for item in node.elts
  )


def tuple_assignments(tree: ast.AST) -> Iterator[int]:
  """Lines with `a, b = x, y`, save where the right side reads a name of the
  left (a swap, or the state of a loop).
  """
  for node in ast.walk(tree):
    if not isinstance(node, ast.Assign) or not isinstance(
      node.value, ast.Tuple
    ):
      continue
    for target in node.targets:
      if not _is_names(target):
        continue
      written = {ast.unparse(item) for item in target.elts}  # pyright: ignore
      read = {
        ast.unparse(item)
        for item in ast.walk(node.value)
        if isinstance(item, ast.Name | ast.Attribute)
      }
      if not written & read:
        yield node.lineno


def assigned_lambdas(tree: ast.AST) -> Iterator[int]:
  """Lines with `name = lambda ...` (ruff's E731)."""
  for node in ast.walk(tree):
    is_assignment = isinstance(node, ast.Assign | ast.AnnAssign)
    if is_assignment and isinstance(node.value, ast.Lambda):
      yield node.lineno


def conditions_in_loops(tree: ast.AST) -> Iterator[int]:
  """Lines of `for` headers, comprehensions' too, with a conditional
  expression.
  """
  for node in ast.walk(tree):
    if isinstance(node, ast.For | ast.AsyncFor | ast.comprehension):
      for part in ast.walk(node.iter):
        if isinstance(part, ast.IfExp):
          yield part.lineno


def _own_expressions(statement: ast.stmt) -> Iterator[ast.AST]:
  """The nodes of a statement that belong to no statement inside it."""
  ahead = list(ast.iter_child_nodes(statement))
  while ahead:
    node = ahead.pop()
    if isinstance(node, ast.stmt | ast.excepthandler | ast.match_case):
      continue
    yield node
    ahead += ast.iter_child_nodes(node)


def crowded_statements(tree: ast.AST) -> Iterator[int]:
  """Lines of statements with more than one comprehension."""
  for statement in ast.walk(tree):
    if isinstance(statement, ast.stmt):
      parts = _own_expressions(statement)
      count = sum(isinstance(part, COMPREHENSIONS) for part in parts)
      if count > MOST_COMPREHENSIONS:
        yield statement.lineno


def long_functions(tree: ast.AST) -> Iterator[int]:
  """Lines of functions whose body, without the docstring, is too long."""
  for node in ast.walk(tree):
    if isinstance(node, FUNCTIONS):
      has_docstring = ast.get_docstring(node) is not None
      body = node.body[1:] if has_docstring else node.body
      if not body:
        continue
      lines = body[-1].end_lineno - body[0].lineno + 1  # pyright: ignore
      if lines > MOST_LINES_OF_A_FUNCTION:
        yield node.lineno


def wide_signatures(tree: ast.AST) -> Iterator[int]:
  """Lines of private functions with more arguments than one remembers."""
  for node in ast.walk(tree):
    if isinstance(node, FUNCTIONS) and node.name.startswith("_"):
      if node.name.startswith("__"):
        continue
      arguments = node.args
      named = arguments.posonlyargs + arguments.args + arguments.kwonlyargs
      count = sum(item.arg not in ("self", "cls") for item in named)
      if count > MOST_ARGUMENTS:
        yield node.lineno


LAWS: dict[str, Callable[[ast.AST], Iterator[int]]] = {
  "tuple_assignments": tuple_assignments,
  "assigned_lambdas": assigned_lambdas,
  "conditions_in_loops": conditions_in_loops,
  "crowded_statements": crowded_statements,
  "long_functions": long_functions,
  "wide_signatures": wide_signatures,
}


def broken(text: str) -> dict[str, list[int]]:
  """{law: lines of a source that break it}; laws that hold are left out."""
  tree = ast.parse(text)
  lines = {law: sorted(find(tree)) for law, find in LAWS.items()}
  return {law: places for law, places in lines.items() if places}
