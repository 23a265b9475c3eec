"""The `calm` command: train, generate, calibrate, infer, merge, demo, report."""

import argparse
import difflib
import importlib
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence

import calm
from calm.commands import helping
from calm.console import quiet, sanitize

DESCRIPTION = """\
Confident Adaptive Language Modeling: a T5 whose tokens leave the decoder as soon as they are
sure, with a promise about what that may cost.
"""

EPILOG = """\
Begin with `calm demo`, which runs all of it on the model in the box; `calm COMMAND --help` has
options and examples.

Gin files, gin bindings and `--metric module:function` run code, as your shell does: use those
that you would run. Everything else is data, which is checked and never executed.
"""

# Metavars of options that may be empty: texts, bindings, and lists of folders.
BLANK = ("TEXT", "'A.b = 1'", "DIRS")

COMMANDS = {
  "demo": "all of it on the model in the box, in minutes",
  "fit": "from a T5 and rows to a folder that serves under a promise",
  "train": "train an exit at every decoder layer",
  "generate": "decode prompts at every threshold of a grid",
  "calibrate": "choose the threshold, with a guarantee (no JAX)",
  "infer": "decode prompts under a calibrated threshold",
  "merge": "put the shards of `generate` or `infer` together",
  "report": "the paper's tables and figures on one page",
}


class _Parser(argparse.ArgumentParser):
  """Names what was probably meant where a word is not known."""

  def parse_args(self, args=None, namespace=None):  # pyright: ignore[reportIncompatibleMethodOverride]
    arguments, unknown = self.parse_known_args(args, namespace)
    if unknown:
      known = [option for action in self._taken() for option in action.option_strings]
      self.error(f"unrecognized arguments: {' '.join(unknown)}{_meant(unknown[0], known)}")
    for action in self._taken():
      value = getattr(arguments, action.dest, None)
      if action.metavar not in BLANK and "" in (value if isinstance(value, list) else [value]):
        # A path of no letters would be the folder in which the command is run.
        self.error(
          f"Expected `{'/'.join(action.option_strings) or action.metavar}` to be a text, got"
          " none; leave it out, or set the variable that it comes from"
        )
    return arguments

  def parse_known_args(self, args=None, namespace=None):  # pyright: ignore
    self._words = list(args or ())
    return super().parse_known_args(args, namespace)

  def error(self, message: str):
    if message.startswith("the following arguments are required"):
      message += self._misspelt()
    found = re.search(r"argument COMMAND: invalid choice: '([^']*)'", message)
    super().error(sanitize(message) + (_meant(found[1], COMMANDS) if found else ""))

  def _misspelt(self) -> str:
    """The first option that this parser does not know: it may be the one that is missed."""
    known = [option for action in self._actions for option in action.option_strings]
    for word in self._words:
      name = word.partition("=")[0]
      if re.match("--[a-z]", name) and not any(option.startswith(name) for option in known):
        return f"; got {name}, which is none{_meant(name, known)}"
    return ""

  def _taken(self) -> Iterator[argparse.Action]:
    """What the command that was chosen takes: the others have none but --help."""
    for action in self._actions:
      if isinstance(action, argparse._SubParsersAction):
        for command in action.choices.values():
          yield from command._actions


def _meant(word: str, known: Iterable[str]) -> str:
  close = difflib.get_close_matches(word.partition("=")[0], list(known), 1)
  return f"; did you mean {close[0]}?" if close else ""


def _underscored(word: str) -> str:
  """`--input-key=x` as `--input_key=x`: both are written, the names here have underscores."""
  if not re.match(r"--[a-z][\w-]*(=|$)", word):
    return word
  name, equals, value = word.partition("=")
  return "--" + name[2:].replace("-", "_") + equals + value


def make_parser(chosen: str | None = None) -> argparse.ArgumentParser:
  """The command's parser; only the chosen command's module, and what it needs, is imported."""
  parser = _Parser(
    prog="calm",
    description=DESCRIPTION,
    epilog=EPILOG,
    formatter_class=helping.Formatter,
  )
  parser.add_argument("--version", action="version", version=f"calm {calm.__version__}")
  commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
  for name, summary in COMMANDS.items():
    command = commands.add_parser(name, help=summary, formatter_class=helping.Formatter)
    if name == chosen:
      module = importlib.import_module(f"calm.commands.{name}")
      command.description = module.__doc__
      module.add_arguments(command)
      command.set_defaults(run=module.run)
  return parser


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one command; returns the process's exit code."""
  argv = list(sys.argv[1:] if argv is None else argv)
  # Read when TensorFlow starts: its notes on its build are no news of ours.
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
  chosen = next((word for word in argv if word in COMMANDS), None)
  parser = make_parser(chosen)
  arguments = parser.parse_args([_underscored(word) for word in argv])
  with quiet():  # each shows its own progress
    return arguments.run(arguments)


if __name__ == "__main__":
  sys.exit(main())
