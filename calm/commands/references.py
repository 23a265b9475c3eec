"""References that `calm calibrate` lacks: which prompts need some, and from a file."""

import argparse
import dataclasses
import json

from rich import console as rich_console

from calm.calibrate import generations
from calm.calibrate.generations import files, records
from calm.calibrate.losses import sequence_losses


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
  wanted = set(sequence_losses.unlabelled(cached))
  lines = []
  for row, prompt in enumerate(cached.prompts):
    if prompt.id in wanted:
      texts = [column[row].prediction for column in cached.records if row < len(column)]
      value = {
        "id": prompt.id,
        "input": prompt.input,
        "full": cached.full[row].prediction,
        "early": list(dict.fromkeys(texts)),
        "targets": [],
      }
      lines.append(json.dumps(value, ensure_ascii=False) + "\n")
  files.write_atomically(arguments.list_unlabelled, "".join(lines))
  console.print(
    f"{len(lines)} of {len(cached.prompts)} prompts need references and have none; written to"
    f" {arguments.list_unlabelled}. Fill in `targets`, then: --references=FILE."
  )
  return 0


def with_references(cached: generations.Generations, path: str) -> generations.Generations:
  """The prompts with the references of a file, where they had none.

  Raises:
    ValueError: a line is no {id, targets}, or names no prompt.
  """
  found = {}
  for line in records.read_lines(path):
    name, targets = line.value.get("id"), line.value.get("targets")
    texts = [targets] if isinstance(targets, str) else targets
    if name not in cached.ids or not isinstance(texts, list):
      raise line.error(f"expected `id` of a prompt and `targets`, got {line.value!r:.100}")
    if not all(isinstance(text, str) for text in texts):
      raise line.error(f"expected `targets` to be texts, got {texts!r:.100}")
    found[name] = tuple(texts)
  prompts = tuple(
    prompt if prompt.targets else dataclasses.replace(prompt, targets=found.get(prompt.id, ()))
    for prompt in cached.prompts
  )
  return dataclasses.replace(cached, prompts=prompts)
