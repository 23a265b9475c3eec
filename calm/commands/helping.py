"""`--help` on a terminal of any width: paragraphs are filled, examples stay commands."""

import argparse
import re
import shutil
import textwrap

# Lines that are longer than this are hard to read, however wide the terminal is.
MOST_COLUMNS = 100


def add_rates(parser: argparse._ActionsContainer, *names: str) -> None:
  """Declares --tolerance and --error_rate, or those of them that are named."""
  for name, default, text in (
    ("tolerance", 0.1, "mean loss that is allowed, between 0 and 1 (delta)"),
    ("error_rate", 0.05, "probability that the promise does not hold (epsilon)"),
  ):
    if name in (names or (name,)):
      told = f"{text} (default %(default)s)"
      parser.add_argument(f"--{name}", type=float, default=default, metavar="RATE", help=told)


class Formatter(argparse.HelpFormatter):
  """Fills paragraphs, and breaks an indented line only where it does not fit.

  A command that is broken goes on after a backslash, so that it can still be copied; a comment
  after it goes before it.
  """

  def __init__(self, prog: str):
    columns = min(MOST_COLUMNS, shutil.get_terminal_size().columns)
    super().__init__(prog, max_help_position=max(16, min(30, columns // 3)), width=columns - 2)

  def add_argument(self, action: argparse.Action) -> None:
    """Leaves room for the names of commands, which argparse indents after measuring them."""
    super().add_argument(action)
    names = [self._format_action_invocation(each) for each in _subactions(action)]
    room = self._current_indent + self._indent_increment + max(map(len, names), default=0)
    self._action_max_length = max(self._action_max_length, room)

  def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
    """`A=B ...` for a list, where argparse says everything twice: `A=B [A=B ...]`."""
    if action.nargs == argparse.ONE_OR_MORE:
      return f"{self._metavar_formatter(action, default_metavar)(1)[0]} ..."
    return super()._format_args(action, default_metavar)

  def _fill_text(self, text: str, width: int, indent: str) -> str:
    blocks = re.split(r"\n\s*\n", text.strip("\n"))
    return "\n\n".join(_block(block, width, indent) for block in blocks)


def _subactions(action: argparse.Action) -> list[argparse.Action]:
  return getattr(action, "_get_subactions", list)()


def _block(block: str, width: int, indent: str) -> str:
  if not block.startswith("  "):
    words = " ".join(block.split())
    return textwrap.fill(
      words, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
    )
  lines = re.sub(r" *\\\n +", " ", block).split("\n")
  return "\n".join(folded for line in lines for folded in _example(line, width))


def _example(line: str, width: int) -> list[str]:
  """A command, or a word and what it means, on as many lines as it takes."""
  if len(line) <= width:
    return [line]
  if not re.match(r"\s+(calm|echo) ", line):
    means = re.match(r"(\s+\S.*?\s{2,})\S", line)
    hanging = " " * min(len(means[1]) if means else 4, width // 2)
    return textwrap.wrap(line, width, subsequent_indent=hanging, break_on_hyphens=False)
  command, mark, comment = line.partition("  # ")
  parts = _wrapped_command(command.rstrip(), width)
  return [f"  # {comment}", *parts] if mark else parts


def _wrapped_command(command: str, width: int) -> list[str]:
  """Broken before an option, or a pipe, as a shell reads it."""
  lines: list[str] = []
  line = "  "
  for word in re.split(r" (?=--|\|)", command.strip()):
    if len(line) + len(word) + 2 > width and line.strip():
      lines.append(f"{line.rstrip()} \\")
      line = "      "
    line += f"{word} "
  return [*lines, line.rstrip()]
