"""What commands share while they run: errors, signals, gin, what is printed."""

import argparse
import contextlib
import functools
import itertools
import logging
import os
import pathlib
import shlex
import shutil
import stat
import sys
import warnings
from collections.abc import Callable, Iterable
from typing import Any

from rich import console as rich_console

from calm import signals, storage
from calm.calibrate import Calibration, display, generations, thresholds
from calm.console import print_text, sanitize

# Mistakes of a user, shown as one message. Any other error is a bug, with its
# traceback.
USER_ERRORS = (ValueError, OSError, TypeError, ImportError, FloatingPointError)
# What a stopped command leaves, all others nothing.
_RESUMED = (
  "stopped; what was finished is kept, and the same command goes on from there"
)
_KEPT = {
  **dict.fromkeys(("fit", "generate", "report", "train"), _RESUMED),
  "infer": "stopped; what was written to --output=FILE is kept, and the same"
  " command goes on",
}
_NOTHING = (
  "stopped; files that were there are as they were, and the same command "
  "starts anew"
)
_EXTRAS = {
  "decode": {
    "jax",
    "flax",
    "gin",
    "sentencepiece",
    "safetensors",
    "jaxtyping",
    "tokenizers",
  },
  "train": {"optax", "orbax", "tensorstore"},
  "seqio": {"clu", "seqio", "tensorflow"},
  "report": {"matplotlib", "jinja2"},
  "serve": {"prometheus_client", "starlette", "uvicorn"},
}


def guarded(
  run: Callable[[argparse.Namespace], int], arguments: argparse.Namespace
) -> int:
  """Runs a command; prints a user's error as one message and returns 2
  (CALM_DEBUG=1 shows the traceback).

  SIGINT and SIGTERM end the process with one line that says what is kept
  (`signals.ending`).
  """
  warnings.showwarning = _show_warning
  try:
    with signals.ending(_KEPT.get(getattr(arguments, "command", ""), _NOTHING)):
      return run(arguments)
  except BrokenPipeError:  # its reader has what it wanted, like `head`
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
  except (*USER_ERRORS, RuntimeError, MemoryError) as error:
    if (message := _message(error)) is None or os.environ.get("CALM_DEBUG"):
      raise
    _print_error(message)
    return 2


def _print_error(text: str) -> None:
  print(f"calm: {sanitize(text)}", file=sys.stderr)


def _show_warning(message, category, filename, lineno, file=None, line=None):
  print(f"calm: warning: {sanitize(message)}", file=file or sys.stderr)


def _message(error: Exception) -> str | None:
  """What a user is told of an error; None of a bug."""
  text = str(error)
  if isinstance(error, ModuleNotFoundError):
    name = (error.name or "").split(".")[0]
    found = [
      f"pip install 'calm-t5x[{extra}]'"
      for extra, ns in _EXTRAS.items()
      if name in ns
    ]
    hint = found[0] if found else f"install {name!r}"
    return (
      f"This command needs the package {name!r}, which is not installed; "
      f"{hint}."
    )
  if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text[:200]:
    return (
      "The model does not fit the memory; lower --batch_size or "
      "--max_decode_length."
    )
  if text.startswith("Unable to initialize backend"):
    return (
      f"JAX does not find what JAX_PLATFORMS names ({error}); unset it, or "
      "set it to cpu."
    )
  if isinstance(error, RecursionError):
    return "Files or bindings lie too deep in one another; use fewer levels."
  if not isinstance(error, USER_ERRORS):
    return None
  return text


def check_output(path: str, read: Iterable[str | None]) -> None:
  """Refuses, before the work, a file that cannot be written or that the command
  reads.
  """
  if storage.is_named_pipe(path):
    raise ValueError(
      f"Expected `--output` to be a file, got the named pipe {path!r}, which "
      "may wait for a reader for ever; write to `-` and pipe that."
    )
  try:
    if (target := storage.destination(path)) is None:
      return
    if os.path.realpath(path) in (
      os.path.realpath(name) for name in read if name
    ):
      raise ValueError(
        f"Expected `--output` not to be a file that is read, got {path!r}."
      )
    storage.lock(target).release()
    if target.exists() and not os.access(target, os.W_OK):
      raise PermissionError("it may not be written")
  except OSError as error:
    message = (
      f"Expected `--output` to be a file that can be written, got {path!r} "
      f"({error})."
    )
    raise OSError(message) from error


def use_compilation_cache() -> None:
  """Keeps compiled programs on disk, in a folder that no others may write."""
  import jax

  if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    named = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification ignores an empty or relative path.
    base = (
      pathlib.Path(named)
      if os.path.isabs(named)
      else pathlib.Path.home() / ".cache"
    )
    cache = base / "calm" / "xla"
    # JAX warns of a folder that it cannot write
    with contextlib.suppress(OSError):
      for folder in (base, cache.parent, cache):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
      if hasattr(os, "geteuid"):  # on Windows modes say nothing
        _check_private(cache)
    jax.config.update("jax_compilation_cache_dir", str(cache))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)


def _check_private(cache: pathlib.Path) -> None:
  """ValueError where another user may write the cache, or put another in its
  place.
  """
  for folder in (cache, *cache.parents, *cache.resolve().parents):
    status = os.stat(folder)
    mode = stat.S_IMODE(status.st_mode)
    owners = {os.geteuid()}
    shared = mode & (stat.S_IWGRP | stat.S_IWOTH)
    if folder not in (cache, cache.parent):
      # Who owns a folder above, or may write to it, may rename what is in it:
      # of a sticky one its owner alone.
      owners.add(0)
      shared = shared and not mode & stat.S_ISVTX
    if shared or status.st_uid not in owners:
      raise ValueError(
        f"Expected {str(folder)!r} to be written by you alone, as programs "
        "in it are run, got"
        f" mode {mode:o} of user {status.st_uid}; remove it, or set "
        "XDG_CACHE_HOME to another."
      )


def parse_gin(arguments: argparse.Namespace) -> None:
  """Reads the gin files and bindings, in place of all that was bound before."""
  import gin
  from gin import config

  # an earlier command of this process leaves its own, locked
  gin.clear_config()
  for path in filter(None, arguments.gin_search_paths.split(",")):
    gin.add_config_file_search_path(path)

  # gin logs every place where a file is not; the error below names them all.
  def keep(record):
    return not record.getMessage().startswith("Path not found")

  logging.getLogger().addFilter(keep)
  readers: list[Any] = config._FILE_READERS  # gin has no public list of them
  before = list(readers)
  # gin's own readers take the folder `configs` for a package.
  readers[:] = [(functools.partial(open, encoding="utf-8"), os.path.isfile)]
  try:
    gin.parse_config_files_and_bindings(
      arguments.gin_file, arguments.gin_bindings
    )
  except OSError as error:
    got = (
      f"got {' '.join(arguments.gin_file)}: "
      f"{' '.join(str(error).split()).rstrip('.')}"
    )
    message = (
      f"Expected `--gin_file` to name a gin file, {got}; see "
      "`--gin_search_paths`."
    )
    raise FileNotFoundError(message) from error
  except Exception as error:
    known = ("t5x", *itertools.chain(*_EXTRAS.values()))
    if (
      isinstance(error, ModuleNotFoundError)
      and str(error.name).split(".")[0] in known
    ):
      raise
    read = " ".join([*arguments.gin_file, *arguments.gin_bindings])[:200]
    text = str(error)
    # gin says in which line
    what = f"got, in {read}: {' '.join(text.split())[:300]}."
    message = (
      f"Expected `--gin_file` and `--gin_bindings` that gin reads, {what}"
    )
    missing = sorted(
      name for name, value in _macros().items() if value == "%gin.REQUIRED"
    )
    if "gin.REQUIRED" in text and missing:
      bindings = " ".join(
        f"--gin_bindings=\"{name} = '...'\"" for name in missing
      )
      message = (
        f"{read} needs a value for {', '.join(missing)}; give {bindings}."
      )
    raise ValueError(message) from error
  finally:
    readers[:] = before
    logging.getLogger().removeFilter(keep)


def _macros() -> dict[str, str]:
  """The macros that are bound, and what to."""
  from gin import config

  bound = config._CONFIG.items()  # gin has no public list of its bindings
  return {
    scope: repr(v.get("value"))
    for (scope, name), v in bound
    if name == "gin.macro"
  }


def refuse_unread_macros() -> None:
  """Refuses macros that nothing reads: a run would not begin where its user
  thinks.
  """
  from gin import config

  read = {
    reference.scopes[-1]
    for reference in config.iterate_references(config._CONFIG)
    if reference.selector.rpartition(".")[2] == "macro" and reference.scopes
  }
  if unread := sorted(_macros().keys() - read):
    raise ValueError(
      f"Expected macros that a binding reads, got {', '.join(unread)}, which "
      "nothing reads;"
      f" read are {', '.join(sorted(read)) or 'none'}."
    )


def print_next(
  console: rich_console.Console, sentence: str, *words: object
) -> None:
  """Prints a sentence, and the command to run next as a line that a shell
  takes.
  """
  called = pathlib.Path(sys.argv[0]).parts[-2:]
  ours = called == ("calm", "__main__.py") or called[-1:] == ("calm",)
  found = not ours or shutil.which("calm")
  program = "calm" if found else f"{shlex.quote(sys.executable)} -m calm"
  print_text(console, sentence, soft_wrap=True)
  print(program, *(shlex.quote(sanitize(word)) for word in words), flush=True)


def print_calibration(
  console: rich_console.Console,
  result: Calibration,
  cached: generations.Generations | None = None,
) -> None:
  """Prints the tested thresholds, with layers where `cached` has them, and the
  guarantee.
  """
  print_text(console, display.table(result, cached), soft_wrap=True)
  chosen = display.place(result)
  found = (
    thresholds.NEVER_EXIT_TEXT
    if chosen is None
    else display.names(result)[chosen]
  )
  text = f"Calibrated {display.unit(result)}: {found} ({result.reason})"
  print_text(console, f"P-values: {result.method}. {text}", "bold")
  print_text(console, result.guarantee)
