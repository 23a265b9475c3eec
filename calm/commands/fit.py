"""From a T5 and a file of rows to a folder that serves early exits under a promise.

Splits the rows by group, trains the exits, chooses measure, layers and grid by measured
seconds, certifies a threshold on rows that nothing was chosen on, and looks at the last part
once. Where no threshold is both certified and faster, the folder serves full depth. A run that
was stopped goes on with the same command.

  calm fit --model=flan-t5-small/ --train=rows.jsonl --tolerance=0.1 --output=mine
  calm fit --model=packed --train=rows.jsonl --stages=none --output=mine
  calm fit --model=mt5-small/ --train=inputs.txt --stages=own --output=mine   # no references
  calm fit --model=flan-t5-small/ --train=rows.jsonl --consistency=risk --metric=token_f1 \\
      --budget=30m --output=mine
  echo "a long text" | calm infer --model=mine --prompts=-
"""

import argparse
import contextlib
import time
from collections.abc import Iterator

from rich import console as rich_console
from rich import progress as rich_progress

from calm.calibrate import screen
from calm.calibrate.generations.shown import visible
from calm.commands import common, following, helping, showing


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares the command's options."""
  parser.add_argument(
    "--model", required=True, metavar="FOLDER", help="checkpoint, or 'packed'"
  )
  parser.add_argument(
    "--train",
    required=True,
    metavar="FILE",
    help="rows of {input, target, source}: JSON Lines, a JSON array, CSV, TSV or Parquet; rows"
    " that the model was not trained on, where --stages=none",
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
    "--stages",
    default="all",
    metavar="NAME",
    help="what is trained: all; both of the paper's: one (Eq. 6, on references) and two (the"
    " exit classifier); own (every layer learns what the model itself writes: no references"
    " needed); none (the model's exits are trained) (default %(default)s)",
  )
  parser.add_argument(
    "--budget", metavar="TIME", help="time for training, like 30m (default: the recipe's steps)"
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
    help="rouge_l, token_f1, exact_match, chrf, or import.path:function (default %(default)s)",
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
    "stages",
    "consistency",
    "metric",
    "prefix",
    "input_key",
    "seed",
    "batch_size",
  )
  options = {name: getattr(arguments, name) for name in names}
  if arguments.budget is not None:
    options["budget"] = fitting.parse_budget(arguments.budget)
  with _listener(console) as listener:
    served = fitting.fit(
      arguments.model, arguments.train, output=arguments.output, listener=listener, **options
    )
  if served.calibration is not None:
    screen.say(console, served.calibration.guarantee, soft_wrap=True)
  shown = arguments.output
  screen.say(console, f"Summary: {shown}/summary.md and {shown}/summary.html", soft_wrap=True)
  screen.say(console, "Serve it:")
  # A command that works as it stands.
  print(following.infer(f"--model={arguments.output}"), flush=True)
  return 0


@contextlib.contextmanager
def _listener(console: rich_console.Console) -> Iterator:
  """A bar for the step at work, or a line now and then, with the time that is left."""
  from calm import fitting

  columns = (
    rich_progress.TextColumn("{task.description}", markup=False),
    rich_progress.BarColumn(bar_width=20),
    rich_progress.TextColumn("{task.fields[text]}", markup=False),
  )
  with showing.bar(console, *columns) as bar:
    task = bar.add_task("", total=1.0, visible=False, text="")
    show = lambda text: screen.say(console, text, soft_wrap=True)

    def step(title: str):
      told = time.monotonic()
      begun: tuple[float, float] | None = None
      # The line above has the title; on it there is room for the time that is left.
      number = visible(title.partition(" ")[0])
      bar.update(task, completed=0.0, description=number, visible=True, text="")
      show(f"{title} ...")

      def progress(share: float, text: str) -> None:
        nonlocal told, begun
        now = time.monotonic()
        if begun is None and share > 0.0:  # before that it compiled, or an earlier run did it
          begun = (share, now)
        left = "" if begun is None else left_of(share - begun[0], 1.0 - share, now - begun[1])
        first = f"{left.removeprefix(', ')}, " if left else ""
        bar.update(task, completed=share, text=visible(f"{first}{text}"))
        if not console.is_terminal and now - told >= showing.LINE_SECONDS:
          told = now
          show(f"  {100 * share:.0f} %, {text}{left}")

      return progress

    yield fitting.Listener(say=show, step=step)


def left_of(done: float, rest: float, seconds: float) -> str:
  """How long a step will take yet, judged by what was done; '' where that is too little.

  Args:
    done: share of the step that took `seconds`.
    rest: share that is left.
    seconds: of what was done.
  """
  if done < 0.03 or seconds < 2.0:
    return ""
  return f", about {showing.clock(seconds * rest / done)} left"
