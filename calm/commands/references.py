"""References that `calm calibrate` lacks: which prompts need some, and from a file."""

import argparse
import dataclasses

from rich import console as rich_console

from calm.calibrate import generations
from calm.calibrate.losses import asking
from calm.console import print_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares the options of references."""
  parser.add_argument(
    "--references",
    metavar="FILE",
    help="JSON Lines of {id, targets}: references of prompts that have none yet",
  )
  parser.add_argument(
    "--list_unlabelled",
    metavar="FILE",
    help="write the prompts that a risk needs references for, and stop: those whose text"
    " differs from the full model's at some threshold (equal texts lose 0 whatever they are)",
  )


def list_unlabelled(
  arguments: argparse.Namespace, console: rich_console.Console, cached: generations.Generations
) -> int:
  """Writes what a person, or a judge, has to look at: prompts and their different texts."""
  wanted = asking.questions(cached)
  asking.write_questions(arguments.list_unlabelled, wanted)
  print_text(
    console,
    f"{len(wanted)} of {len(cached.prompts)} prompts need references and have none; written to"
    f" {arguments.list_unlabelled}. Fill in `targets`, then: --references=FILE.",
  )
  return 0


def with_references(cached: generations.Generations, path: str) -> generations.Generations:
  """The prompts with the references of a file, where they had none.

  Raises:
    ValueError: a line is no {id, targets}, or names no prompt.
  """
  found = asking.read_references(path)
  unknown = sorted(set(found) - set(cached.ids))
  if unknown:
    raise ValueError(
      f"Expected {path} to name prompts of these outputs, got {len(unknown)} others, first"
      f" {unknown[:5]}; leave them out."
    )
  prompts = tuple(
    prompt if prompt.targets else dataclasses.replace(prompt, targets=found.get(prompt.id, ()))
    for prompt in cached.prompts
  )
  return dataclasses.replace(cached, prompts=prompts)
