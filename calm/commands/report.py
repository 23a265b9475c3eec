"""Every table and figure of the paper from a model and data: one page, figures, tables.

Decodes validation prompts (trade-offs, grids) and test prompts (calibration, unseen prompts),
measures seconds, and writes into --output:

  index.html       everything on one page that needs no network; open it in any browser
  figures/         each figure as SVG and PNG
  tables/          each table as CSV and Markdown
  cache/           generations and results: the same command goes on, or draws again, from here

The data folder has one folder a task (debian_synopsis, debian_qa, debian_enfr) with
validation.jsonl.gz and test.jsonl.gz in it.

  calm report --data=data --output=runs/report --tasks=synopsis --limit=50    a first look
  calm report --data=data --output=runs/report                                all tasks, whole
  calm report --model=my_model --data=data --tasks synopsis qa enfr --output=runs/report
  calm report --data=data --output=runs/report --measures classifier --timed=40 --rounds=5
  calm report --data=data --output=runs/report --geometric_model=runs/elbayad/model
  calm report --data=data --output=runs/report --measures softmax softmax@2,4 classifier

Seconds are worth what the machine was free of while they were measured; --retime measures
them again.
"""

import argparse
import contextlib
import pathlib
import platform
import shlex
import sys
import time
from collections.abc import Iterator

from rich import console as rich_console
from rich import progress as rich_progress

import calm
from calm.calibrate.generations.shown import visible
from calm.commands import common

TASKS = ("debian_synopsis", "debian_qa", "debian_enfr")


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares the command's options."""
  parser.add_argument("--model", default="packed", help="checkpoint folder, or 'packed'")
  parser.add_argument("--data", required=True, help="folder of the data sets")
  parser.add_argument("--output", required=True, help="folder to write (resumed if it exists)")
  parser.add_argument(
    "--tasks", nargs="+", default=list(TASKS), help="tasks, like synopsis qa enfr (default all)"
  )
  parser.add_argument(
    "--limit", type=int, help="prompts of each split (default: one of every source)"
  )
  parser.add_argument(
    "--measures",
    nargs="+",
    default=["softmax", "shortlist", "classifier", "state"],
    help="confidence measures (default: all that the model has); softmax@2,4 may leave after"
    " those layers only",
  )
  parser.add_argument(
    "--step", type=float, default=0.02, help="between the thresholds of Fig. 2c (0.02)"
  )
  parser.add_argument(
    "--ablated", type=int, default=200, help="validation prompts of Fig. 2 (200)"
  )
  parser.add_argument("--batch_size", type=int, default=8, help="prompts decoded together (8)")
  parser.add_argument("--error_rate", type=float, default=0.05, help="epsilon (0.05)")
  parser.add_argument("--examples", type=int, default=6, help="outputs to show a task (6)")
  _add_compared(parser)
  _add_seconds(parser)


def _add_compared(parser: argparse.ArgumentParser) -> None:
  """Other models, trained otherwise."""
  parser.add_argument("--geometric_model", help="classifier trained Elbayad's way, for App. D")
  parser.add_argument("--last_layer_model", help="a model trained without Eq. 6")
  parser.add_argument(
    "--all_layers_model", help="the same trained with Eq. 6, beside it (default --model)"
  )
  parser.add_argument(
    "--objective_tasks",
    nargs="+",
    help="tasks that these two were trained on (default: those of --tasks)",
  )


def _add_seconds(parser: argparse.ArgumentParser) -> None:
  timing = parser.add_argument_group("seconds")
  timing.add_argument(
    "--timed", type=int, default=16, help="prompts decoded alone, one after another (16)"
  )
  timing.add_argument("--rounds", type=int, default=3, help="times each; the median counts (3)")
  timing.add_argument(
    "--retime", action="store_true", help="forget the seconds measured before"
  )


@common.user_errors
def run(arguments: argparse.Namespace) -> int:
  """Runs the experiments of every task and writes the report."""
  common.use_compilation_cache()
  # What is missing should be said before an hour of decoding, not after it.
  from calm.paper.report import document, page, terminal, write

  console = rich_console.Console()
  output = pathlib.Path(arguments.output)
  start = time.monotonic()
  with _steps(console) as announce:
    reports, predictor = _experiments(arguments, output / "cache", announce)
  facts = _facts(arguments, predictor, time.monotonic() - start)
  sections = document.sections(reports)
  made = page.Page(f"calm report: {arguments.model}", facts, sections, predictor.num_layers)
  written = write.write(output, made)
  terminal.print_report(console, reports)
  done = visible(f"\n{written}. Open {output / 'index.html'}")
  console.print(done, markup=False, highlight=False)
  return 0


def _experiments(arguments: argparse.Namespace, cache: pathlib.Path, announce):
  """(one report a task, the predictor of the last)."""
  from calm.paper.bench import tasks as tasks_lib
  from calm.paper.experiments import suite

  tasks = [tasks_lib.task(name) for name in arguments.tasks]
  compared = [tasks_lib.task(name) for name in arguments.objective_tasks or ()] or tasks
  options, models = _options(arguments), _models(arguments)
  reports = []
  for settings in tasks:
    chosen = {
      name: model.with_options(
        task_prefix=settings.prefix,
        max_input_length=settings.max_input_length,
        max_decode_length=settings.max_decode_length,
      )
      for name, model in models.items()
      if settings in compared or name not in ("last_layer", "all_layers")
    }
    if arguments.retime:
      for old in (cache / "results" / settings.name).glob("seconds-*.json"):
        old.unlink()
    made = suite.Suite(
      settings=settings,
      data=pathlib.Path(arguments.data),
      folder=cache,
      options=options,
      announce=announce,
      **chosen,
    )
    reports.append(made.run())
  return reports, models["predictor"]


def _options(arguments: argparse.Namespace):
  """How much is run of every experiment."""
  from calm.paper.bench import bench

  return bench.Options(
    limit=arguments.limit,
    timed=arguments.timed,
    rounds=arguments.rounds,
    examples=arguments.examples,
    ablated=arguments.ablated,
    step=arguments.step,
    error_rate=arguments.error_rate,
    measures=tuple(arguments.measures),
  )


def _models(arguments: argparse.Namespace):
  """The models that were named, by what they are for."""
  from calm import inference

  return {
    name: inference.load(path, batch_size=arguments.batch_size)
    for name, path in (
      ("predictor", arguments.model),
      ("geometric", arguments.geometric_model),
      ("last_layer", arguments.last_layer_model),
      ("all_layers", arguments.all_layers_model),
    )
    if path
  }


@contextlib.contextmanager
def _steps(console: rich_console.Console) -> Iterator:
  """One bar for the step at work, or a line where there is no terminal."""
  columns = rich_progress.Progress.get_default_columns()
  with rich_progress.Progress(
    *columns, rich_progress.TimeElapsedColumn(), console=console, transient=True
  ) as bar:
    task = bar.add_task("", total=1.0, visible=False)

    def announce(text: str):
      told = console.is_terminal

      def progress(share: float, what: str) -> None:
        nonlocal told
        if not told:
          console.print(text, markup=False, highlight=False)
          told = True
        bar.update(task, completed=share, description=f"{text} · {what}", visible=True)

      bar.reset(task, total=1.0, description=text, visible=False)
      return progress

    yield announce


def _facts(arguments: argparse.Namespace, predictor, seconds: float):
  """What the page says about its making."""
  import jax

  config = predictor.config
  sizes = (
    f"{config.num_encoder_layers} encoder and {config.num_decoder_layers} decoder layers,"
    f" emb_dim {config.emb_dim}, mlp_dim {config.mlp_dim}, {config.num_heads} heads,"
    f" {config.vocab_size} rows of vocabulary, {config.dtype}"
  )
  limit = "one of every source" if arguments.limit is None else str(arguments.limit)
  command = ["calm", *sys.argv[1:]] if sys.argv[1:2] == ["report"] else ["calm", "report"]
  return (
    ("model", str(arguments.model)),
    ("sizes", sizes),
    ("parameters", predictor.procedure.parameters_digest[:16]),
    ("prompts of each split", limit),
    ("command", shlex.join(command)),
    ("machine", f"{jax.devices()[0].device_kind}, {platform.machine()}, JAX {jax.__version__}"),
    ("calm", calm.__version__),
    ("this run", f"{seconds:.0f} s; what was cached before is not in it"),
    ("written", time.strftime("%Y-%m-%d")),
  )
