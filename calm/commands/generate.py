"""Decode prompts at full depth and at every threshold of a grid, into a
folder.

The folder is what `calm calibrate` reads. A stopped run goes on with the same
command. Each prompt is encoded once, and the grid compiles once.

  calm generate --prompts=prompts.jsonl --output=runs/cache
  calm generate --model=mine --prompts=dev.jsonl.gz --output=runs/cache
  calm generate --prompts=p.jsonl --output=runs/a --num_shards=4 --shard_id=0
"""

import argparse

from rich import console as rich_console

from calm.calibrate import Provenance, generations, thresholds
from calm.commands import flags, merge
from calm.commands import run as run_lib
from calm.console import Progress, print_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
  flags.add_model(parser)
  text = "folder to write (resumed if it exists)"
  flags.add(parser, "output", "DIR", text, required=True)
  text = "descending, like 0.9,0.8"
  flags.add(
    parser,
    "thresholds",
    "LIST",
    text,
    without="the model's own grid, or the measure's",
  )
  flags.add_shared(parser, "num_shards", "shard_id")


def run(arguments: argparse.Namespace) -> int:
  prompts, mark = merge.take_shard(
    flags.open_prompts(arguments), arguments.shard_id, arguments.num_shards
  )
  folder = (
    arguments.output
    if mark is None
    else merge.shard_folder(arguments.output, mark)
  )
  run_lib.use_compilation_cache()
  from calm import inference

  console = rich_console.Console()
  print_text(console, f"{prompts.taken}.")
  predictor = inference.load(arguments.model, **flags.decode_options(arguments))
  if prompts or mark is None:  # few prompts leave shards empty
    levels = inference.grid.default_grid(predictor.options)
    if arguments.thresholds is not None:
      levels = [
        thresholds.parse_threshold(part)
        for part in arguments.thresholds.split(",")
      ]
    writer = generations.open_writer(
      folder,
      prompts=prompts,
      thresholds=levels,
      procedure=predictor.procedure,
      provenance=Provenance(notes={"model": str(arguments.model)}),
    )
    for report in writer.reports:
      print_text(console, report, "yellow")
    with Progress(console) as progress:
      inference.grid.generate(
        predictor, prompts, levels, writer, progress=progress
      )
    writer.finish()
    console.print(
      f"{len(prompts)} prompts, {len(levels)} thresholds and full depth."
    )
  words = (f"Written to {folder}. Calibrate on it:", "calibrate", folder)
  if mark is not None:
    merge.write_mark(folder, mark)
    words = (f"{folder} is finished; when all are:", "merge", arguments.output)
  run_lib.print_next(console, *words)
  return 0
