"""Put the shards of `calm generate` or `calm infer` together, in order.

Refuses shards of unlike procedures, grids or prompts, and shards that are
missing, doubled or not finished; names the shard, the field or the id. Needs
no JAX.

  calm merge runs/cache  # -> runs/cache/merged, for `calm calibrate`
  calm merge runs/outputs --output=outputs.jsonl
"""

import argparse
import pathlib

from rich import console as rich_console

from calm.commands import flags, shards
from calm.commands import run as run_lib
from calm.console import print_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares the command's options."""
  text = "the folder with all shards in it, or each shard"
  parser.add_argument("shards", nargs="+", metavar="DIR", type=flags.filled, help=text)
  without = "merged, or outputs.jsonl of `calm infer`, beside the shards"
  flags.add(parser, "output", "PLACE", "where to write", without=without)


@run_lib.user_errors
def run(arguments: argparse.Namespace) -> int:
  """Merges."""
  found = shards.parts(arguments.shards)
  folder, mark = next(iter(found.items()))
  generated = mark["kind"] == "generate"
  name = "merged" if generated else shards.OUTPUTS
  output = pathlib.Path(arguments.output or folder.parent / name)
  count = shards.merge(arguments.shards, output)
  console = rich_console.Console(highlight=False)
  print_text(console, f"{count} prompts of {len(found)} shards: {output}")
  if generated:
    print_text(console, "Calibrate on them:")
    print(run_lib.command("calibrate", output), flush=True)
  return 0
