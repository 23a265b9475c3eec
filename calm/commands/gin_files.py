"""Gin files and bindings of a command: read within bounds, and refused in one line.

They are programs that their user trusts; what is bounded here is a mistake, or a file that was
taken for another.
"""

import argparse
import contextlib
import functools
import io
import logging
import re
import tokenize
from collections.abc import Callable, Iterator, Mapping
from typing import Any

# Files that include others twice, or lists of lists of macros, grow as powers of two.
MOST_FILES, MOST_CHARACTERS, MOST_VALUES = 1000, 2**24, 10**6


def parse(arguments: argparse.Namespace) -> None:
  """Reads the gin files and bindings that were given, in place of all that was bound before.

  Raises:
    ValueError: in one line, where: the file and the line, or the binding.
  """
  import gin

  gin.clear_config()  # an earlier command of this process leaves its own, locked
  for path in [p for p in arguments.gin_search_paths.split(",") if p]:
    gin.add_config_file_search_path(path)
  # gin logs every place where a file is not; the error below names them all.
  tried = lambda record: not record.getMessage().startswith("Path not found")
  logging.getLogger().addFilter(tried)
  try:
    with _readers():
      gin.parse_config_files_and_bindings(arguments.gin_file, arguments.gin_bindings)
    _check_macros()
  except OSError as error:
    raise FileNotFoundError(
      f"Expected `--gin_file` to name a gin file, got {' '.join(arguments.gin_file)}:"
      f" {' '.join(str(error).split()).rstrip('.')}; `--gin_search_paths` adds folders to"
      " look in."
    ) from error
  except ModuleNotFoundError as error:
    if error.name and error.name.split(".")[0] in ("seqio", "tensorflow", "t5x", "optax"):
      raise
    raise ValueError(_gin_message(arguments, error)) from error
  except Exception as error:
    missing = _missing_macros() if "gin.REQUIRED" in str(error) else []
    if missing:
      raise ValueError(_missing_message(arguments, missing)) from error
    raise ValueError(_gin_message(arguments, error)) from error
  finally:
    logging.getLogger().removeFilter(tried)


@contextlib.contextmanager
def _readers() -> Iterator[None]:
  """Has gin read so many files and characters, and look on where a folder has a file's name.

  gin takes a file of `configs/` for one of the package `configs`, and ends with a TypeError at
  a folder without `__init__.py`, before it comes to the folders that it is to search.
  """
  from gin import config

  readers: list[Any] = config._FILE_READERS  # gin has no public list of them
  before, left = list(readers), {"files": MOST_FILES, "characters": MOST_CHARACTERS}

  def checked(is_there: Callable[[str], bool], path: str) -> bool:
    try:
      return is_there(path)
    except (TypeError, ImportError, ValueError):
      return False

  def opened(read: Callable[[str], Any], path: str) -> io.StringIO:
    with read(path) as file:
      content = file.read(left["characters"] + 1)
    left["files"] -= 1
    left["characters"] -= len(content)
    if min(left.values()) < 0:
      raise ValueError(
        f"Expected at most {MOST_FILES} gin files with {MOST_CHARACTERS} characters, got more;"
        " include each of them once"
      )
    made = io.StringIO(content)
    made.name = path  # pyright: ignore[reportAttributeAccessIssue] (gin says where)
    return made

  partial = functools.partial
  readers[:] = [(partial(opened, read), partial(checked, there)) for read, there in before]
  try:
    yield
  finally:
    readers[:] = before


def _check_macros() -> None:
  """ValueError where macros within one another stand for too many values."""
  from gin import config

  bound, known = config._CONFIG, dict[str, int]()  # gin has no public list of its bindings

  def size(value: Any) -> int:
    if isinstance(value, Mapping):
      return 1 + sum(map(size, value.keys())) + sum(map(size, value.values()))
    if isinstance(value, list | tuple):
      return 1 + sum(map(size, value))
    if isinstance(value, config.ConfigurableReference) and value.scopes:
      return macro("/".join(value.scopes))
    return 1

  def macro(name: str) -> int:
    if name not in known:
      known[name] = 0  # where it stands for itself, gin says so
      known[name] = size(bound.get((name, "gin.macro"), {}).get("value"))
    return known[name]

  for (scope, selector), parameters in bound.items():
    if size(parameters) > MOST_VALUES:
      raise ValueError(
        f"Expected bindings of at most {MOST_VALUES} values, got more in"
        f" {f'{scope}/{selector}'.removesuffix('/gin.macro').strip('/')};"
        " write them into a file of rows"
      )


def _missing_macros() -> list[str]:
  """Macros that a file says are to be set, and nothing has set."""
  from gin import config

  return sorted(
    scope
    for (scope, selector), parameters in config._CONFIG.items()
    if selector == "gin.macro" and repr(parameters.get("value")) == "%gin.REQUIRED"
  )


def _missing_message(arguments: argparse.Namespace, missing: list[str]) -> str:
  given = " ".join(f"--gin_bindings=\"{name} = '...'\"" for name in missing)
  return (
    f"Expected a value for {', '.join(missing)}, which {' '.join(arguments.gin_file)} leaves to"
    f" you, got none; give {given}. The head of the file says what each is."
  )


_GIN_PLACE = re.compile(r'In (?:file "(?P<file>[^"]*)"|bindings string), line (?P<line>[0-9]+)')


def _gin_message(arguments: argparse.Namespace, error: Exception) -> str:
  """One line: where, and what."""
  if isinstance(error, RecursionError):
    what, found = "files that include themselves, or values too deep in one another", None
  else:
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    if isinstance(error, tokenize.TokenError):  # (what, (line, column))
      text = str(error.args[0])
    found = _GIN_PLACE.search(str(error))
    what = " ".join(text.split("\n  In ")[0].split())[:300]
  if isinstance(error, SyntaxError) and error.lineno:
    place = f"{error.filename or '--gin_bindings'}:{error.lineno}"
  elif found:
    place = f"{found['file'] or '--gin_bindings'}:{found['line']}"
  elif isinstance(error, tokenize.TokenError) and len(error.args) > 1:
    place = f"{' '.join(arguments.gin_file) or '--gin_bindings'}:{error.args[1][0]}"
  else:
    place = " ".join([*arguments.gin_file, *arguments.gin_bindings])[:200]
  return (
    f"Expected `--gin_file` and `--gin_bindings` that gin can read, got, in {place}: {what};"
    " correct that line."
  )


def refuse_unread_macros() -> None:
  """Refuses macros of the gin files and bindings that nothing reads.

  `INITIAL = "model"` is a binding of nothing where no file says `%INITIAL`: a run would begin
  elsewhere than its user thinks.

  Raises:
    ValueError: names them, and the macros that are read.
  """
  from gin import config

  bound = config._CONFIG  # gin has no public list of its bindings
  macros = {scope for scope, selector in bound if selector == "gin.macro"}
  read = {
    reference.scopes[-1]
    for reference in config.iterate_references(bound)
    if reference.selector.rpartition(".")[2] == "macro" and reference.scopes
  }
  unread = sorted(macros - read)
  if unread:
    known = ", ".join(sorted(read)) or "none"
    raise ValueError(
      f"Expected macros that a binding reads, got {', '.join(unread)}, which nothing reads"
      f" (read are: {known}); name the parameter itself, as in run.train.initial = '...', or"
      " take the line out."
    )
