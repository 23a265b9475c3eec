"""Decode prompts at full depth and at every threshold of a grid, into a folder.

The folder is what `calm calibrate` reads. A run that was stopped goes on where it was; each
prompt is encoded once, and the grid compiles once.

  calm generate --prompts=prompts.jsonl --output=runs/cache
  calm generate --model=my_model --prompts=dev.jsonl.gz --measure=classifier --output=runs/cache
"""

import argparse
import pathlib

from rich import console as rich_console
from rich import progress as rich_progress

from calm.calibrate import Provenance, generation_writer, thresholds
from calm.commands import common, model_flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares the command's options."""
  model_flags.add_arguments(parser)
  parser.add_argument("--output", required=True, help="folder to write (resumed if it exists)")
  parser.add_argument(
    "--thresholds",
    help="descending, like 0.9,0.8,0.7; default: the measure's own grid",
  )
  parser.add_argument(
    "--no_reuse", action="store_true", help="decode every sequence, even where it cannot change"
  )
  common.add_gin_arguments(parser)


@common.user_errors
def run(arguments: argparse.Namespace) -> int:
  """Generates the whole grid."""
  common.use_compilation_cache()
  from calm import grid, inference

  console = rich_console.Console()
  load = common.configured(arguments, inference.load)
  predictor = load(
    arguments.model, dtype=arguments.dtype, **model_flags.decode_options(arguments)
  )
  prompts = model_flags.read_prompts(arguments.prompts, arguments.limit)
  levels = parse_grid(arguments.thresholds, predictor.options.measure)
  writer = generation_writer.open_writer(
    pathlib.Path(arguments.output),
    prompts=prompts,
    thresholds=levels,
    procedure=predictor.procedure,
    provenance=Provenance(
      grid=tuple(levels), num_examples=len(prompts), notes={"model": str(arguments.model)}
    ),
  )
  for report in writer.reports:
    console.print(f"[yellow]{report}[/yellow]")
  with rich_progress.Progress(
    *rich_progress.Progress.get_default_columns(),
    rich_progress.TimeElapsedColumn(),
    console=console,
  ) as bar:
    task = bar.add_task(f"{len(prompts)} prompts x {len(levels) + 1} thresholds")

    def advance(threshold, number, count):
      text = thresholds.format_threshold(threshold)
      done = bar.tasks[0].completed + 1
      bar.update(
        task, completed=done, total=count * (len(levels) + 1), description=f"threshold {text}"
      )

    summary = grid.generate(
      predictor,
      prompts,
      levels,
      writer,
      reuse_records=not arguments.no_reuse,
      progress=advance,
    )
  writer.finish()
  console.print(f"{len(prompts)} prompts, {len(levels)} thresholds and full depth: {summary}.")
  console.print(f"Written to {arguments.output}; next: calm calibrate {arguments.output}")
  return 0


def parse_grid(text: str | None, measure: str) -> list[float]:
  """A grid given as text, or the measure's default."""
  if text is None:
    return [float(t) for t in thresholds.default_grid(measure)]
  values = [thresholds.parse_threshold(part) for part in text.split(",")]
  return [float(t) for t in thresholds.validate_grid(values)]
