"""The options of `calm report`: of what, how much, and how often it is timed."""

import argparse

from calm.commands import helping

TASKS = ("debian_synopsis", "debian_qa", "debian_enfr")
_NUMBER = {"type": int, "metavar": "N"}
# (name, default, help) of whole numbers.
_AMOUNTS = (
  ("ablated", 200, "validation prompts of Fig. 2"),
  ("batch_size", 8, "prompts decoded together"),
  ("examples", 6, "outputs to show a task"),
)
_SECONDS = (
  ("timed", 16, "prompts decoded alone, one after another"),
  ("rounds", 3, "times each; the median counts"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares the command's options."""
  parser.add_argument(
    "--model",
    default="packed",
    metavar="FOLDER",
    help="checkpoint folder, or 'packed' (default %(default)s)",
  )
  source = parser.add_mutually_exclusive_group(required=True)
  source.add_argument("--data", metavar="FOLDER", help="folder of the three tasks")
  source.add_argument("--train", metavar="FILE", help="rows of your own, as of `calm fit`")
  parser.add_argument(
    "--output", required=True, metavar="DIR", help="folder to write (resumed if it exists)"
  )
  _add_rows(parser)
  _add_amounts(parser)
  _add_compared(parser)
  seconds = parser.add_argument_group("seconds")
  _add_numbers(seconds, _SECONDS)
  seconds.add_argument(
    "--retime", action="store_true", help="forget the seconds measured before"
  )


def _add_numbers(parser, numbers) -> None:
  for name, default, text in numbers:
    told = f"{text} (default %(default)s)"
    parser.add_argument(f"--{name}", default=default, help=told, **_NUMBER)


def _add_rows(parser: argparse.ArgumentParser) -> None:
  """Which tasks, or how a user's own rows are read."""
  parser.add_argument(
    "--tasks",
    nargs="+",
    default=list(TASKS),
    metavar="TASK",
    help="of --data, like synopsis qa enfr (default: all)",
  )
  parser.add_argument(
    "--metric",
    default="rouge_l",
    metavar="NAME",
    help="of --train: rouge_l, token_f1, exact_match, chrf, file.py:function, or"
    " module:function (default %(default)s)",
  )
  parser.add_argument(
    "--prefix",
    metavar="TEXT",
    help="of --train: put before every input (default: the model's own)",
  )


def _add_amounts(parser: argparse.ArgumentParser) -> None:
  """How much is done."""
  parser.add_argument(
    "--limit", help="prompts of each split (default: one of every source)", **_NUMBER
  )
  parser.add_argument(
    "--measures",
    nargs="+",
    default=["softmax", "shortlist", "classifier", "state"],
    metavar="NAME",
    help="confidence measures (default: all that the model has); softmax@2,4 may leave after"
    " those layers only, softmax@2,4/8 under a threshold that falls along the text as well (the"
    " paper's, with temperature 8)",
  )
  parser.add_argument(
    "--step",
    type=float,
    default=0.02,
    metavar="STEP",
    help="between the thresholds of Fig. 2c (default %(default)s)",
  )
  helping.add_rates(parser, "error_rate")
  _add_numbers(parser, _AMOUNTS)


def _add_compared(parser: argparse.ArgumentParser) -> None:
  """Other models, trained otherwise."""
  for name, text in (
    ("geometric_model", "classifier trained Elbayad's way, for App. D"),
    ("last_layer_model", "a model trained without Eq. 6"),
    ("all_layers_model", "the same trained with Eq. 6, beside it (default: --model)"),
  ):
    parser.add_argument(f"--{name}", metavar="FOLDER", help=text)
  parser.add_argument(
    "--objective_tasks",
    nargs="+",
    metavar="TASK",
    help="tasks that these two were trained on (default: those of --tasks)",
  )
