"""From a T5 and a file of rows to a folder that serves early exits under a promise.

Learns exits beside the model's frozen weights, chooses measure, layers and grid by measured
seconds, certifies a threshold on rows that nothing was chosen on, and looks at the last part
once. No weight and no full-depth text changes. Where no threshold is both certified and faster,
the folder serves full depth. A run that was stopped goes on with the same command.

  calm fit --model=flan-t5-small/ --train=rows.jsonl --tolerance=0.1 --output=mine
  calm fit --model=mt5-small/ --train=inputs.txt --output=mine             # no references
  calm fit --model=packed --train=rows.jsonl --stages=none --output=mine   # exits as they are
  calm fit --model=flan-t5-small/ --train=rows.jsonl --consistency=risk --metric=token_f1 \\
      --output=mine
  calm fit --model=flan-t5-small/ --train=rows.jsonl --train_all --budget=30m --output=mine
  echo "a long text" | calm infer --model=mine --prompts=-
"""

import argparse

from rich import console as rich_console

from calm.commands import common, following, helping
from calm.console import print_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares the command's options."""
  parser.add_argument(
    "--model", required=True, metavar="FOLDER", help="checkpoint, or 'packed'"
  )
  parser.add_argument(
    "--train",
    required=True,
    metavar="FILE",
    help="rows of {input, target, source}: JSON Lines, a JSON array, CSV, TSV or Parquet;"
    " where nothing learns from references, plain texts too (.txt); rows that the model was not"
    " trained on, where --stages=none",
  )
  parser.add_argument(
    "--input_key",
    metavar="KEY",
    help="key or column of the text (default: the first of input, inputs, prompt, text)",
  )
  parser.add_argument("--output", required=True, metavar="DIR", help="folder to write")
  _add_promise(parser)
  _add_training(parser)


def _add_training(parser: argparse.ArgumentParser) -> None:
  """What is trained, for how long."""
  parser.add_argument(
    "--train_all",
    action="store_true",
    help="train all weights (the paper's way), not only exits beside them",
  )
  parser.add_argument(
    "--stages",
    default="all",
    metavar="NAME",
    help="with --train_all: all; both of the paper's (Eq. 6, then the classifier); one; two; or"
    " own (the model's own texts; without references with --accept_quality). none: take the"
    " model's exits as they are (default %(default)s)",
  )
  parser.add_argument(
    "--budget",
    metavar="TIME",
    help="time for --train_all, like 30m (default: the recipe's steps)",
  )
  parser.add_argument(
    "--prefix", metavar="TEXT", help="put before every input (default: the model's own)"
  )
  parser.add_argument(
    "--seed",
    type=int,
    default=0,
    metavar="N",
    help="of splits and training (default %(default)s)",
  )
  parser.add_argument(
    "--batch_size",
    type=int,
    default=8,
    metavar="N",
    help="prompts decoded together (default %(default)s)",
  )
  parser.add_argument(
    "--accept_quality",
    action="store_true",
    help="serve trained weights also where full depth writes worse than before, or unknown",
  )


def _add_promise(parser: argparse.ArgumentParser) -> None:
  """What is promised, and by which metric."""
  helping.add_rates(parser)
  parser.add_argument(
    "--consistency",
    default="textual",
    metavar="NAME",
    help="textual: distance to the full model's text; risk: loss of quality against the"
    " targets (default %(default)s)",
  )
  parser.add_argument(
    "--metric",
    default="rouge_l",
    metavar="NAME",
    help="rouge_l, token_f1, exact_match, chrf, file.py:function, or module:function (default"
    " %(default)s)",
  )


@common.user_errors
def run(arguments: argparse.Namespace) -> int:
  """Fits, and prints what was found and what to run next."""
  common.use_compilation_cache()
  from calm import fitting

  console = rich_console.Console(highlight=False)
  names = (
    "tolerance",
    "error_rate",
    "train_all",
    "stages",
    "consistency",
    "metric",
    "prefix",
    "input_key",
    "seed",
    "batch_size",
    "accept_quality",
  )
  options = {name: getattr(arguments, name) for name in names}
  if arguments.budget is not None:
    options["budget"] = fitting.parse_budget(arguments.budget)
  with fitting.on_screen(console) as listener:
    served = fitting.fit(
      arguments.model, arguments.train, output=arguments.output, listener=listener, **options
    )
  if served.calibration is not None:
    print_text(console, served.calibration.guarantee, soft_wrap=True)
  shown = arguments.output
  print_text(console, f"Summary: {shown}/summary.md and {shown}/summary.html", soft_wrap=True)
  print_text(console, "Serve it:")
  # A command that works as it stands.
  print(following.infer(f"--model={arguments.output}"), flush=True)
  return 0
