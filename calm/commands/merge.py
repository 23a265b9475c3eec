"""Put the shards of `calm generate` or `calm infer` together, in the order of the prompts.

Needs no JAX. Refused, with the shard, the field or the id named: shards of unlike procedures,
grids or lists of prompts, shards that are missing, doubled or not finished, and ids that are.

  calm merge runs/cache  # -> runs/cache/merged, for `calm calibrate`
  calm merge runs/outputs --output=outputs.jsonl
"""

import argparse
import pathlib

from rich import console as rich_console

from calm.calibrate.generations import merging
from calm.commands import common, following
from calm.console import print_text, sanitize


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares the command's options."""
  parser.add_argument(
    "shards", nargs="+", metavar="DIR", help="the folder with all shards in it, or each shard"
  )
  parser.add_argument(
    "--output",
    metavar="PLACE",
    help="folder of `calm generate` (default: merged, beside the shards), or file of `calm"
    " infer` (default: outputs.jsonl there)",
  )


@common.user_errors
def run(arguments: argparse.Namespace) -> int:
  """Merges."""
  found = merging.parts(arguments.shards)
  kind = found[0].mark.kind
  name = "merged" if kind == "generate" else merging.OUTPUTS
  output = pathlib.Path(arguments.output or found[0].folder.parent / name)
  count = merging.merge(arguments.shards, output)
  console = rich_console.Console(highlight=False)
  console.print(f"{count} prompts of {len(found)} shards: {sanitize(output)}", markup=False)
  if kind == "generate":
    print_text(console, "Calibrate on them:")
    print(following.command("calibrate", output), flush=True)
  return 0
