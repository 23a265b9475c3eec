"""What to run next, as a command that works as it stands, wherever `calm` was called from."""

import os
import pathlib
import shlex
import shutil
import sys

from rich import console as rich_console

from calm.calibrate import Calibration, generations
from calm.console import print_text, sanitize


def program() -> str:
  """How this process was called, for the shell: `calm` where the shell finds this one.

  From an environment that is not activated it is the whole path of its script.
  """
  called = pathlib.Path(sys.argv[0])
  if called.parts[-2:] == ("calm", "__main__.py"):
    found = shutil.which("python")
    python = "python" if found == sys.executable else shlex.quote(sys.executable)
    return f"{python} -m calm"
  if called.stem != "calm":  # a notebook or a test, which has imported the commands
    return "calm"
  found = shutil.which("calm")
  if found is not None and os.path.abspath(found) == os.path.abspath(called):
    return "calm"
  return shlex.quote(os.path.abspath(called))


def command(*words: object) -> str:
  """`calm` with these words, for the shell."""
  return " ".join([program(), *(shlex.quote(sanitize(word)) for word in words)])


def infer(*words: object, text: str = "a long text") -> str:
  """A text that is decoded by `calm infer` with these words."""
  return f"echo {shlex.quote(text)} | {command('infer', *words, '--prompts=-')}"


def model_of(cached: generations.Generations) -> object:
  """The model that outputs were decoded with, as it was given; None: unknown."""
  return (cached.provenance.notes or {}).get("model")


def say_serve(
  console: rich_console.Console, calibration: Calibration, saved: pathlib.Path, model: object
) -> None:
  """How a calibration is served, where it is for a model that is known.

  Args:
    console: where to.
    calibration: what was found; its options come with it.
    saved: its file.
    model: the folder that the outputs were decoded with, as it was given; None: unknown.
  """
  if calibration.procedure is None or not isinstance(model, str):
    return
  print_text(console, "Serve it:")
  named = [] if model == "packed" else [f"--model={model}"]
  print(infer(*named, f"--calibration={saved}"), flush=True)
