"""From a T5 and a file of rows to a folder that serves early exits.

Learns exits beside the frozen weights, chooses measure, layers and grid by
measured seconds, certifies a threshold on rows that nothing was chosen on, and
evaluates the last part once. Full-depth texts do not change. Where no
threshold is both certified and faster, the folder serves full depth. A stopped
run goes on with the same command.

  calm fit --model=flan-t5-small/ --train=rows.jsonl --output=mine
  calm fit --model=mt5-small/ --train=inputs.txt --output=mine  # no references
  calm fit --model=packed --train=rows.jsonl --stages=none --output=mine
  calm fit --model=flan-t5-small/ --train=rows.jsonl --train_all --budget=30m \\
      --output=mine
  calm infer --model=mine "a long text"
"""

import argparse
import dataclasses

from rich import console as rich_console

from calm.commands import flags
from calm.commands import run as run_lib
from calm.console import print_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
  add = flags.add
  more = flags.more(parser)
  flags.add_shared(parser, "model", default=None, required=True)
  text = "rows of {input, target, source}, or plain texts (.txt)"
  add(parser, "train", "FILE", text, required=True)
  flags.add_shared(parser, "input_key", "target_key")
  add(parser, "output", "DIR", "folder to write", required=True)
  flags.add_shared(parser, "tolerance", "error_rate")
  text = "textual: distance to the full model's text; risk: to the targets"
  add(parser, "consistency", "NAME", text, "textual")
  flags.add_shared(parser, "metric")
  add(
    parser, "train_all", None, "train all weights, not only exits beside them"
  )
  text = "all, or none: the model's exits as they are"
  add(parser, "stages", "NAME", text, "all")
  text = "time for --train_all, like 30m"
  add(parser, "budget", "TIME", text, without="the recipe's steps")
  add(
    more,
    "prefix",
    "TEXT",
    "put this before every input",
    without="the model's own",
  )
  add(more, "seed", "K", "of splits and training", 0)
  add(more, "batch_size", "N", "prompts decoded together", 8)


def run(arguments: argparse.Namespace) -> int:
  run_lib.use_compilation_cache()
  from calm import fitting

  console = rich_console.Console(highlight=False)
  names = [field.name for field in dataclasses.fields(fitting.FitOptions)]
  options = {name: getattr(arguments, name) for name in names}
  output = arguments.output
  served = fitting.fit(
    arguments.model, arguments.train, output=output, console=console, **options
  )
  if served.calibration is not None:
    print_text(console, served.calibration.guarantee, soft_wrap=True)
  print_text(console, f"Summary: {output}/summary.html", soft_wrap=True)
  run_lib.print_next(
    console, "Serve it:", "infer", f"--model={output}", "a long text"
  )
  return 0
