"""Every table and figure of the paper from a model and data, on one page.

Decodes validation prompts (trade-offs) and test prompts (calibration, unseen
prompts), measures seconds, and writes into --output: index.html, figures/ (SVG
and PNG), tables/ (CSV), and cache/, from which the same command goes on.

--data names a folder of debian_synopsis, debian_qa and debian_enfr, each with
validation.jsonl.gz and test.jsonl.gz. --train names rows of your own, which
are split as by `calm fit`; the part that it trains on is left out.

  calm report --data=data --output=runs/report --tasks=synopsis --limit=50
  calm report --data=data --output=runs/report --measures softmax@2,4 classifier
  calm report --model=mine --train=rows.jsonl --output=runs/report

A measure softmax@2,4 may leave after these layers only; softmax@2,4/8 has a
decaying threshold with temperature 8.
"""

import argparse
import pathlib
import platform
import re
import shlex
import sys
import time
import warnings

from rich import console as rich_console

import calm
from calm import storage
from calm.commands import flags
from calm.commands import run as run_lib
from calm.console import Progress, print_text
from calm.data import prompt_batches

TASKS = ("debian_synopsis", "debian_qa", "debian_enfr")


def add_arguments(parser: argparse.ArgumentParser) -> None:
  add = flags.add
  more = flags.more(parser)
  flags.add_shared(parser, "model")
  source = parser.add_mutually_exclusive_group(required=True)
  add(source, "data", "FOLDER", "folder of the three tasks")
  add(source, "train", "FILE", "rows of your own, as of `calm fit`")
  add(
    parser,
    "output",
    "DIR",
    "folder to write (resumed if it exists)",
    required=True,
  )
  text = "of --data, like synopsis qa enfr"
  add(parser, "tasks", "TASK", text, list(TASKS), nargs="+", without="all")
  add(parser, "metric", "NAME", f"of --train: {flags.METRICS}", "rouge_l")
  add(
    parser, "limit", "N", "prompts of each split", without="one of every source"
  )
  measures = ["softmax", "shortlist", "classifier", "state"]
  options = {"nargs": "+", "without": "all of the model"}
  add(parser, "measures", "NAME", "confidence measures", measures, **options)
  add(
    more,
    "prefix",
    "TEXT",
    "of --train: put before every input",
    without="the model's own",
  )
  flags.add_shared(more, "error_rate")
  add(more, "step", "STEP", "between the thresholds of Fig. 2c", 0.02)
  add(more, "ablated", "N", "validation prompts of Fig. 2", 200)
  add(more, "batch_size", "N", "prompts decoded together", 8)
  add(more, "examples", "K", "outputs to show a task", 6)
  add(more, "timed", "N", "prompts decoded alone, one after another", 16)
  add(more, "rounds", "N", "times each; the median counts", 3)
  add(
    more,
    "geometric_model",
    "FOLDER",
    "classifier trained Elbayad's way, for App. D",
  )
  add(more, "last_layer_model", "FOLDER", "a model trained without Eq. 6")
  add(
    more,
    "all_layers_model",
    "FOLDER",
    "the same trained with Eq. 6",
    without="--model",
  )


def run(arguments: argparse.Namespace) -> int:
  run_lib.use_compilation_cache()
  import jax

  # A missing package is reported before an hour of decoding.
  from calm.paper import page
  from calm.paper import sections as sections_lib

  console = rich_console.Console()
  output = pathlib.Path(arguments.output)
  start = time.monotonic()
  # Table 1 has the share of the inputs that is cut.
  warnings.simplefilter("ignore", prompt_batches.CutPrompts)
  output.mkdir(parents=True, exist_ok=True)
  with storage.lock(output), Progress(console) as progress:
    tasks = _tasks(
      arguments, {"folder": output / "cache", "announce": progress.step}
    )
    sections = sections_lib.sections(tasks)
    headlines = tuple(map(sections_lib.headline, tasks))
  model = tasks[0].predictor
  seconds = time.monotonic() - start
  facts = (
    ("model", str(arguments.model)),
    ("parameters", model.procedure.parameters_digest[:16]),
    ("prompts of each split", str(arguments.limit or "one of every source")),
    ("command", shlex.join(["calm", *sys.argv[1:]])),
    (
      "machine",
      f"{jax.devices()[0].device_kind}, {platform.machine()}, JAX "
      f"{jax.__version__}, calm"
      f" {calm.__version__}",
    ),
    ("this run", f"{seconds:.0f} s; what was cached before is not in it"),
    ("written", time.strftime("%Y-%m-%d")),
  )
  about = (
    f"calm report: {arguments.model}",
    facts,
    sections,
    model.num_layers,
    headlines,
  )
  written = page.write(output, page.Page(*about))
  for _, sentence in headlines:
    print_text(console, f"\n{sentence}", "bold")
  print_text(
    console, f"\n{written}. Open {output / 'index.html'}", soft_wrap=True
  )
  return 0


def _tasks(arguments: argparse.Namespace, places):
  """The tasks with their models and prompts."""
  from calm import inference
  from calm.paper import bench, experiments

  known = [bench.task(name) for name in arguments.tasks]
  names = ("timed", "rounds", "examples", "ablated", "step", "error_rate")
  options = {name: getattr(arguments, name) for name in names}
  options = bench.Options(measures=tuple(arguments.measures), **options)
  compared = ("geometric", "last_layer", "all_layers")
  paths = {name: getattr(arguments, f"{name}_model") for name in compared}
  models = {}
  for name, path in {"predictor": arguments.model, **paths}.items():
    if path is not None:
      models[name] = inference.load(path, batch_size=arguments.batch_size)
  if arguments.train:
    given = [_own_task(arguments, models["predictor"])]
  else:

    def read(task, split):
      return bench.read_prompts(arguments.data, task, split)

    given = [
      (task, read(task, "validation"), read(task, "test")) for task in known
    ]
  made = []
  for settings, *splits in given:
    limits = {
      n: getattr(settings, n) for n in ("max_input_length", "max_decode_length")
    }
    own = {
      n: m.with_options(task_prefix=settings.prefix, **limits)
      for n, m in models.items()
    }
    validation, test = (prompts[: arguments.limit] for prompts in splits)
    places |= {
      "settings": settings,
      "options": options,
      "validation": validation,
      "test": test,
    }
    made.append(experiments.Task(**places, **own))
  return made


def _own_task(arguments: argparse.Namespace, predictor):
  """(settings, validation prompts, test prompts) of a user's own rows."""
  from calm.fitting import request
  from calm.paper import bench

  options = request.FitOptions(
    error_rate=arguments.error_rate,
    metric=arguments.metric,
    prefix=arguments.prefix,
  )
  rows = request.read_rows(arguments.train, options)
  limits, _ = request.length_limits(predictor, rows, options.prefix)
  splits = request.split(rows, options, trains=True)
  title = pathlib.Path(arguments.train).name.split(".")[0] or "rows"
  settings = bench.TaskSettings(
    name=re.sub(r"[^A-Za-z0-9_-]+", "_", title),
    title=title,
    prefix=limits.pop("task_prefix"),
    metric=str(options.metric),
    metric_title=str(options.metric),
    **limits,
  )
  # Calibrated on four fifths of the test prompts; the rest is evaluated only.
  return settings, splits.validation, splits.calibration + splits.last
