"""What every command does alike: gin files, the compilation cache, errors as messages."""

import argparse
import contextlib
import functools
import os
import pathlib
import stat
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from calm import signals, storage
from calm.commands import gin_files
from calm.console import sanitize

# A mistake of the user's: one clear message, no traceback. Anything else is a bug of ours.
USER_ERRORS = (ValueError, OSError, TypeError, ImportError, FloatingPointError)

# How JAX begins where JAX_PLATFORMS names what it does not have.
_NO_PLATFORM = "Unable to initialize backend"


class StoppedError(Exception):
  """The user stopped the command; the message says what is kept."""


# What holds of a command that was stopped, where it says nothing more exact itself.
_STOPPED = {
  "generate": "stopped; what was decoded is kept, and the same command goes on from there",
  "report": "stopped; what was decoded is kept, and the same command goes on from there",
  "fit": "stopped; what was finished is kept, and the same command goes on from there",
  "train": "stopped; the same command goes on from its last checkpoint, if there is one",
}
_NOTHING = "stopped; files that were there are as they were, and the same command starts anew"


def user_errors(
  run: Callable[[argparse.Namespace], int],
) -> Callable[[argparse.Namespace], int]:
  """Prints a user's error as one message and returns 2; CALM_DEBUG=1 shows the traceback.

  SIGINT and SIGTERM end the command between two steps of its loops (`signals.check`), with one
  line that says what is kept and exit status 130 or 143.
  """

  @functools.wraps(run)
  def guarded(arguments: argparse.Namespace) -> int:
    warnings.showwarning = _show_warning
    stopped = 130
    try:
      with signals.deferred():
        return run(arguments)
    except BrokenPipeError:  # its reader has what it wanted, like `head`
      os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
      return 0
    except ModuleNotFoundError as error:
      _say(missing_package(error))
    except (*USER_ERRORS, RuntimeError, MemoryError) as error:
      if os.environ.get("CALM_DEBUG") or not _is_the_users(error):
        raise
      _say(_message(error))
    except StoppedError as error:
      _say(f"{error}.")
      return 143 if isinstance(error.__context__, signals.Terminated) else stopped
    except KeyboardInterrupt as error:
      _say(f"{_STOPPED.get(getattr(arguments, 'command', ''), _NOTHING)}.")
      return 143 if isinstance(error, signals.Terminated) else stopped
    return 2

  return guarded


def _say(text: str) -> None:
  print(f"calm: {sanitize(text)}", file=sys.stderr)


def _is_the_users(error: Exception) -> bool:
  return isinstance(error, (*USER_ERRORS, MemoryError, RecursionError)) or any(
    text in str(error)[:200] for text in ("RESOURCE_EXHAUSTED", _NO_PLATFORM)
  )


def _message(error: Exception) -> str:
  if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)[:200]:
    return (
      "Expected a model and options that fit the memory, got more; lower --batch_size or"
      " --max_decode_length, or take a smaller model."
    )
  if _NO_PLATFORM in str(error)[:200]:
    named = os.environ.get("JAX_PLATFORMS", "")
    return (
      f"Expected JAX_PLATFORMS to name platforms that JAX finds here, got {named!r} ({error});"
      " unset it, or take JAX_PLATFORMS=cpu."
    )
  if isinstance(error, RecursionError):
    return "Expected files and bindings of a few levels, got too many in one another."
  return " ".join([str(error), *getattr(error, "__notes__", ())])


@contextlib.contextmanager
def called(flag: str) -> Iterator[None]:
  """Notes on errors about a function's `path` by which flag it was given."""
  try:
    yield
  except (ValueError, OSError) as error:
    if "`path`" in str(error):
      error.add_note(f"(`path` is `{flag}` here.)")
    raise


def check_output(path: str | pathlib.Path, *, read: Iterable[str | None] = ()) -> None:
  """Refuses a file that cannot be written, before the work that would be lost with it.

  Args:
    path: the file.
    read: files that the command reads, which it must not replace.

  Raises:
    ValueError: it is one of those that are read.
    OSError: says which file, and what to do.
  """
  for name in read:
    if name and os.path.isfile(name) and os.path.exists(path) and os.path.samefile(name, path):
      raise ValueError(
        f"Expected `--output` to be another file than those that are read, got {str(path)!r},"
        " which would be replaced; choose another name."
      )
  try:
    if (target := storage.destination(path)) is not None:
      with storage.temporary(target):
        if target.exists() and not os.access(target, os.W_OK):
          raise PermissionError(None, "it may not be written")
  except OSError as error:
    raise type(error)(
      f"Expected `--output` to be a file that can be written, got {str(path)!r}"
      f" ({error.strerror}); choose another, or make its folder."
    ) from error


def check_folder(path: str | pathlib.Path) -> pathlib.Path:
  """Makes the folder `--output`, or refuses it before the work that would be lost with it.

  Raises:
    OSError: says which folder, and what to do.
  """
  try:
    (folder := pathlib.Path(path)).mkdir(parents=True, exist_ok=True)
    with storage.temporary(folder / "output"):
      return folder
  except OSError as error:
    raise type(error)(
      f"Expected `--output` to be a folder that can be written, got {str(path)!r}"
      f" ({error.strerror}); choose another."
    ) from error


def check_count(flag: str, count: int) -> None:
  """ValueError where a number of things to show is below 0."""
  if count < 0:
    raise ValueError(f"Expected `{flag}` of at least 0, got {count}.")


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
  return f"Expected the package {name!r} for this command, got none that is installed; {hint}."


def _show_warning(message, category, filename, lineno, file=None, line=None):
  del category, filename, lineno, line
  print(f"calm: warning: {sanitize(message)}", file=file or sys.stderr)


def use_compilation_cache() -> None:
  """Keeps compiled programs on disk: the second run of a command starts at once.

  Raises:
    ValueError: others may write the folder, whose files are read back as machine code.
  """
  import jax

  signals.check()
  if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    given = os.environ.get("XDG_CACHE_HOME", "")
    # As the XDG specification has it, what is empty or relative is not set.
    base = pathlib.Path(given) if os.path.isabs(given) else pathlib.Path.home() / ".cache"
    cache = base / "calm" / "xla"
    with contextlib.suppress(OSError):  # JAX warns of a folder that it cannot write
      for folder in (base, cache.parent, cache):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
      _check_private(cache)
    jax.config.update("jax_compilation_cache_dir", str(cache))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _check_private(cache: pathlib.Path) -> None:
  """ValueError where another user may write the cache, or put another in its place."""
  if not hasattr(os, "geteuid"):  # Windows, where modes say nothing
    return
  for folder in (cache, *cache.parents, *cache.resolve().parents):
    status = os.stat(folder)
    mode, ours = stat.S_IMODE(status.st_mode), folder in (cache, cache.parent)
    # Who may write to a folder may rename what is in it, but where it is sticky.
    shared = not ours and mode & stat.S_IWOTH and not mode & stat.S_ISVTX
    if shared or (ours and (status.st_uid != os.geteuid() or mode & 0o022)):
      raise ValueError(
        f"Expected {str(folder)!r} to be a folder that can be written by you alone, got mode"
        f" {mode:o} of user {status.st_uid}: compiled programs are run as they are read from"
        f" {str(cache)!r}; remove it and take the rights of others away (chmod go-w), or"
        " set XDG_CACHE_HOME to another folder."
      )


def add_gin_arguments(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
  """Declares T5X's gin flags."""
  parser.add_argument(
    "--gin_file",
    action="append",
    default=[],
    required=required,
    metavar="FILE",
    help="gin file; repeatable. Gin files and bindings are programs: they import and call what"
    " they name, so use only those that you would run",
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


def configured(
  arguments: argparse.Namespace, function: Callable[..., Any]
) -> Callable[..., Any]:
  """The function with gin's bindings, where the files bind it; options given win."""
  if not (arguments.gin_file or arguments.gin_bindings):
    return function
  import gin

  gin_files.parse(arguments)
  try:
    return gin.get_configurable(function)
  except ValueError:  # the files bind other things only
    return function
