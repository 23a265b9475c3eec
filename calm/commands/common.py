"""What every command does alike: gin files, the compilation cache, errors as messages."""

import argparse
import contextlib
import functools
import logging
import os
import pathlib
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from calm.calibrate.generations import files

# A mistake of the user's: one clear message, no traceback. Anything else is a bug of ours.
USER_ERRORS = (ValueError, OSError, TypeError, ImportError, FloatingPointError)


class StoppedError(Exception):
  """The user stopped the command; the message says what is kept."""


def user_errors(
  run: Callable[[argparse.Namespace], int],
) -> Callable[[argparse.Namespace], int]:
  """Prints a user's error as one message and returns 2; CALM_DEBUG=1 shows the traceback."""

  @functools.wraps(run)
  def guarded(arguments: argparse.Namespace) -> int:
    warnings.showwarning = _show_warning
    try:
      return run(arguments)
    except BrokenPipeError:  # its reader has what it wanted, like `head`
      os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
      return 0
    except ModuleNotFoundError as error:
      print(f"calm: {missing_package(error)}", file=sys.stderr)
    except USER_ERRORS as error:
      if os.environ.get("CALM_DEBUG"):
        raise
      print(f"calm: {error}", file=sys.stderr)
    except StoppedError as error:
      print(f"calm: {error}.", file=sys.stderr)
      return 130
    except KeyboardInterrupt:
      print("calm: stopped; run the same command again to go on.", file=sys.stderr)
      return 130
    return 2

  return guarded


@contextlib.contextmanager
def called(flag: str) -> Iterator[None]:
  """Errors about a function's `path` speak of the flag that it was given by."""
  try:
    yield
  except (ValueError, OSError) as error:
    text = str(error)
    if "`path`" not in text:
      raise
    raise type(error)(text.replace("`path`", f"`{flag}`")) from error


def check_output(path: str | pathlib.Path) -> None:
  """Refuses a file that cannot be written, before the work that would be lost with it.

  Raises:
    OSError: says which file, and what to do.
  """
  try:
    if (target := files.destination(path)) is not None:
      with files.temporary(target):
        if target.exists() and not os.access(target, os.W_OK):
          raise PermissionError(None, "it may not be written")
  except OSError as error:
    raise type(error)(
      f"Expected `--output` to be a file that can be written. Got {str(path)!r}"
      f" ({error.strerror}); choose another, or make its folder."
    ) from error


def missing_package(error: ModuleNotFoundError) -> str:
  """What to install for a package that is not there."""
  extras = {
    "decode": {"jax", "flax", "gin", "sentencepiece", "safetensors", "jaxtyping", "tokenizers"},
    "train": {"optax", "orbax", "clu", "seqio", "tensorboard", "tensorflow"},
    "report": {"matplotlib", "jinja2"},
  }
  name = (error.name or "").split(".")[0]
  extra = next((extra for extra, names in extras.items() if name in names), None)
  hint = f"pip install 'calm-t5x[{extra}]'" if extra else f"install {name!r}"
  return f"this command needs the package {name!r}, which is not installed: {hint}."


def _show_warning(message, category, filename, lineno, file=None, line=None):
  del category, filename, lineno, line
  print(f"calm: warning: {message}", file=file or sys.stderr)


def use_compilation_cache() -> None:
  """Keeps compiled programs on disk: the second run of a command starts at once."""
  import jax

  if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache"))
    jax.config.update("jax_compilation_cache_dir", str(cache / "calm" / "xla"))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def add_gin_arguments(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
  """Declares T5X's gin flags."""
  parser.add_argument(
    "--gin_file",
    action="append",
    default=[],
    required=required,
    metavar="FILE",
    help="gin file; repeatable",
  )
  parser.add_argument(
    "--gin_bindings",
    action="append",
    default=[],
    metavar="'A.b = 1'",
    help="gin binding that overrides the files; repeatable",
  )
  parser.add_argument(
    "--gin_search_paths",
    default="",
    metavar="DIRS",
    help="folders to look for gin files in, comma-separated",
  )


def parse_gin(arguments: argparse.Namespace) -> None:
  """Reads the gin files and bindings that were given."""
  import gin

  for path in [p for p in arguments.gin_search_paths.split(",") if p]:
    gin.add_config_file_search_path(path)
  # gin logs every place where a file is not; the error below names them all.
  tried = lambda record: not record.getMessage().startswith("Path not found")
  logging.getLogger().addFilter(tried)
  try:
    gin.parse_config_files_and_bindings(arguments.gin_file, arguments.gin_bindings)
  except OSError as error:
    raise FileNotFoundError(
      f"Expected `--gin_file` to name a gin file. Got {' '.join(arguments.gin_file)}: {error}"
      " `--gin_search_paths` adds folders to look in."
    ) from error
  finally:
    logging.getLogger().removeFilter(tried)


def configured(
  arguments: argparse.Namespace, function: Callable[..., Any]
) -> Callable[..., Any]:
  """The function with gin's bindings, where the files bind it; options given win."""
  if not (arguments.gin_file or arguments.gin_bindings):
    return function
  import gin

  parse_gin(arguments)
  try:
    return gin.get_configurable(function)
  except ValueError:  # the files bind other things only
    return function
