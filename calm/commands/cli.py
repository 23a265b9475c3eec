"""The `calm` command: train, generate, calibrate, infer, serve, merge, demo,
fit, report.
"""

import argparse
import functools
import importlib
import os
import re
import sys
from collections.abc import Sequence

import calm
from calm.console import sanitize

COMMANDS = {
  "demo": "run the whole pipeline on the packed model, in minutes",
  "fit": "make a folder that serves early exits from a T5 and rows",
  "train": "train an exit at every decoder layer",
  "generate": "decode prompts at every threshold of a grid",
  "calibrate": "choose the threshold, with a guarantee (no JAX)",
  "infer": "decode prompts under a calibrated threshold",
  "serve": "answer over HTTP, with a page: OpenAI's and TGI's requests",
  "merge": "put the shards of `generate` together",
  "report": "make the paper's tables and figures, on one page",
}
_LINES = "\n".join(
  f"  {name:<11}{summary}" for name, summary in COMMANDS.items()
)
HELP = f"""\
usage: calm COMMAND [options]

Confident Adaptive Language Modeling: a T5 whose tokens leave the decoder early
where it is confident, with a guarantee of what that may cost.

commands:
{_LINES}

Begin with `calm demo`. `calm COMMAND --help` has options and examples, `calm
--version` the version.

Gin files, gin bindings and `--metric module:function` run code, as your shell
does: use those that you would run. Everything else is data and never
executed."""


class Parser(argparse.ArgumentParser):
  """A parser whose errors show no control characters."""

  def error(self, message: str):
    super().error(sanitize(message))


def make_parser(
  command: str, *, every_option: bool = True
) -> argparse.ArgumentParser:
  """The parser of one command; only its module, and what that needs, is
  imported.

  Where not `every_option`, its help leaves out the group of more options.
  """
  from calm.commands import flags

  module = importlib.import_module(f"calm.commands.{command}")
  parser = Parser(
    f"calm {command}",
    "%(prog)s [options]",
    module.__doc__,
    formatter_class=functools.partial(
      argparse.RawDescriptionHelpFormatter, max_help_position=28
    ),
  )
  parser.add_argument(
    "--help_all", action="help", help="show every option and exit"
  )
  module.add_arguments(parser)
  for action in () if every_option else flags.more(parser)._group_actions:
    action.help = argparse.SUPPRESS
  parser.set_defaults(run=module.run, command=command)
  return parser


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one command; returns the process's exit code."""
  # Options are written with dashes or underscores; the names here have
  # underscores.
  words = [
    re.sub(
      r"^--[a-z][\w-]*", lambda name: f"--{name[0][2:].replace('-', '_')}", word
    )
    for word in (sys.argv[1:] if argv is None else argv)
  ]
  # Read when TensorFlow starts, which otherwise prints notes on its build.
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
  first = words[0] if words else ""
  if first in COMMANDS:
    from calm.commands import run as run_lib

    arguments = make_parser(
      first, every_option="--help_all" in words
    ).parse_args(words[1:])
    return run_lib.guarded(arguments.run, arguments)
  if first in ("-h", "--help", "--version"):
    print(f"calm {calm.__version__}" if first == "--version" else HELP)
    return 0
  got = f"got {sanitize(first)!r}; see `calm --help`."
  print(
    f"calm: Expected a command ({', '.join(COMMANDS)}), {got}", file=sys.stderr
  )
  return 2


if __name__ == "__main__":
  sys.exit(main())
