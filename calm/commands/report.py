"""Every table and figure of the paper from a model and data: one page, figures, tables.

Decodes validation prompts (trade-offs, grids) and test prompts (calibration, unseen prompts),
measures seconds, and writes into --output:

  index.html       everything on one page that needs no network; open it in any browser
  figures/         each figure as SVG and PNG
  tables/          each table as CSV and Markdown
  cache/           generations and results: the same command goes on, or draws again, from here

--data names a folder with one folder a task (debian_synopsis, debian_qa, debian_enfr) with
validation.jsonl.gz and test.jsonl.gz in it. --train names rows of your own, as `calm fit` reads
them: they are split as it splits them, and the part that it trains on is left out.

  calm report --data=data --output=runs/report --tasks=synopsis --limit=50  # a first look
  calm report --data=data --output=runs/report
  calm report --model=mine --train=rows.jsonl --metric=token_f1 --output=runs/report
  calm report --data=data --output=runs/report --measures classifier --timed=40 --rounds=5
  calm report --data=data --output=runs/report --geometric_model=runs/elbayad/model
  calm report --data=data --output=runs/report --measures softmax softmax@2,4 classifier

Seconds are worth what the machine was free of while they were measured; --retime measures
them again.
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
from calm.commands import common, report_flags
from calm.console import Progress, print_text
from calm.data import prompt_batches

add_arguments = report_flags.add_arguments


@common.user_errors
def run(arguments: argparse.Namespace) -> int:
  """Runs the experiments of every task and writes the report."""
  common.use_compilation_cache()
  # What is missing should be said before an hour of decoding, not after it.
  from calm.paper import findings, page, sections

  console = rich_console.Console()
  output = pathlib.Path(arguments.output)
  start = time.monotonic()
  # Table 1 says which share of the inputs is cut, once.
  warnings.simplefilter("ignore", prompt_batches.CutPrompts)
  common.check_count("--examples", arguments.examples)
  common.check_folder(output)
  with storage.lock(output), Progress(console) as progress:
    reports, predictor = _experiments(arguments, output / "cache", progress)
  facts = _facts(arguments, predictor, time.monotonic() - start)
  made = page.Page(
    f"calm report: {arguments.model}",
    facts,
    sections.sections(reports),
    predictor.num_layers,
    tuple(findings.headline(report) for report in reports),
  )
  written = page.write(output, made)
  page.print_report(console, reports)
  print_text(console, f"\n{written}. Open {output / 'index.html'}", soft_wrap=True)
  return 0


def _experiments(arguments: argparse.Namespace, cache: pathlib.Path, progress: Progress):
  """(one report a task, the predictor of the last)."""
  from calm.paper import bench, experiments
  from calm.paper import tasks as tasks_lib

  named = [tasks_lib.task(name) for name in arguments.tasks] if arguments.data else []
  compared = [tasks_lib.task(name) for name in arguments.objective_tasks or ()]
  options, models = _options(arguments), _models(arguments)
  tasks = [(settings, pathlib.Path(arguments.data)) for settings in named]
  if arguments.train:
    tasks = [_own_task(arguments, models["predictor"])]
  benches = []
  for settings, source in tasks:
    chosen = {
      name: model.with_options(
        task_prefix=settings.prefix,
        max_input_length=settings.max_input_length,
        max_decode_length=settings.max_decode_length,
      )
      for name, model in models.items()
      if not compared or settings in compared or name not in ("last_layer", "all_layers")
    }
    if arguments.retime:
      for old in (cache / "results" / settings.name).glob("seconds-*.json"):
        old.unlink()
    made = bench.Bench(
      settings=settings,
      data=source,
      folder=cache,
      options=options,
      announce=progress.step,
      **chosen,
    )
    benches.append(made)
  progress.expect(sum(map(experiments.num_steps, benches)))
  return [experiments.run(each) for each in benches], models["predictor"]


def _options(arguments: argparse.Namespace):
  """How much is run of every experiment."""
  from calm.paper import bench

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

  models = {}
  for name, flag in (
    ("predictor", "model"),
    ("geometric", "geometric_model"),
    ("last_layer", "last_layer_model"),
    ("all_layers", "all_layers_model"),
  ):
    if (path := getattr(arguments, flag)) is not None:
      with common.called(f"--{flag}"):
        models[name] = inference.load(path, batch_size=arguments.batch_size)
  return models


def _own_task(arguments: argparse.Namespace, predictor):
  """(settings, prompts) of a user's own rows."""
  from calm import fitting
  from calm.paper import tasks as tasks_lib

  options = fitting.FitOptions(
    error_rate=arguments.error_rate, metric=arguments.metric, prefix=arguments.prefix
  )
  with common.called("--train"):
    found = fitting.held_out(predictor, arguments.train, options)
  title = pathlib.Path(arguments.train).name.split(".")[0]
  settings = tasks_lib.TaskSettings(
    name=re.sub(r"[^A-Za-z0-9_-]+", "_", title) or "rows",
    title=title or "rows",
    prefix=found.decoding["task_prefix"],
    max_input_length=found.decoding["max_input_length"],
    max_decode_length=found.decoding["max_decode_length"],
    metric=options.request["metric"],
    metric_title=options.request["metric"],
  )
  # Calibrated on four fifths of the test prompts; what comes last is only looked at.
  return settings, tasks_lib.OwnPrompts(found.validation, found.test)


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
