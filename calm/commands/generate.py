"""Decode prompts at full depth and at every threshold of a grid, into a
folder.

The folder is what `calm calibrate` reads. A stopped run goes on with the same
command. Each prompt is encoded once, and the grid compiles once.

  calm generate --prompts=prompts.jsonl --output=runs/cache
  calm generate --model=mine --prompts=dev.jsonl.gz --output=runs/cache
  calm generate --prompts=p.jsonl --output=runs/a --num_shards=4 --shard_id=0
"""

import argparse
import pathlib

from rich import console as rich_console

from calm.calibrate import NEVER_EXIT, Provenance, generations, thresholds
from calm.commands import flags, shards
from calm.commands import run as run_lib
from calm.console import Progress, print_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares the command's options."""
  flags.add_model(parser)
  add, more = flags.add, flags.more(parser)
  add(parser, "output", "DIR", "folder to write (resumed if it exists)", required=True)
  text = "descending, like 0.9,0.8"
  add(parser, "thresholds", "LIST", text, without="the model's own grid, or the measure's")
  flags.add_shared(parser, "num_shards", "shard_id")
  text = "with --measure=verified: ascending in [0, 1), like 0,0.1,0.3"
  add(more, "slacks", "LIST", text)
  flags.add_shared(more, *flags.GIN)


@run_lib.user_errors
def run(arguments: argparse.Namespace) -> int:
  """Generates the whole grid."""
  opened, part = flags.open_prompts(arguments), None
  if which := shards.parse_shard(arguments):
    opened = part = shards.ShardRun(opened, which, arguments.output)
  prompts = list(opened)
  run_lib.use_compilation_cache()
  from calm import inference

  console = rich_console.Console()
  print_text(console, f"{opened.taken}.")
  load = run_lib.configured(arguments, inference.load)
  with run_lib.naming_flag("--model"):
    predictor = load(arguments.model, dtype=arguments.dtype, **flags.decode_options(arguments))
  levels = parse_grid(arguments.thresholds, predictor.options)
  if arguments.slacks is not None:
    levels = _parse_slacks(arguments.slacks, arguments.thresholds, predictor.options)
  if part is not None:
    _decode_shard(arguments, console, predictor, prompts, levels, part)
  else:
    writer = _open_writer(arguments, console, arguments.output, predictor, prompts, levels)
    _grid(arguments, console, predictor, prompts, levels, writer)
    print_text(console, f"Written to {arguments.output}. Calibrate on it:", soft_wrap=True)
    print(run_lib.command("calibrate", arguments.output), flush=True)
  return 0


def _open_writer(arguments, console, folder, predictor, prompts, levels):
  writer = generations.open_writer(
    pathlib.Path(folder),
    prompts=prompts,
    thresholds=levels,
    procedure=predictor.procedure,
    provenance=Provenance(
      grid=tuple(levels), num_examples=len(prompts), notes={"model": str(arguments.model)}
    ),
  )
  for report in writer.reports:
    print_text(console, report, "yellow")
  return writer


def _decode_shard(arguments, console, predictor, prompts, levels, part) -> None:
  """Decodes a shard and marks it as done; a finished one is left as it is."""
  about = {"procedure": predictor.procedure.to_json(), "thresholds": levels}
  if not part.begin("generate", about, console):
    return
  names = []
  if prompts:
    writer = _open_writer(arguments, console, part.folder, predictor, prompts, levels)
    if writer.procedure is not None:  # as an earlier version wrote it, where that goes on
      about["procedure"] = writer.procedure.to_json()
    _grid(arguments, console, predictor, prompts, levels, writer)
    names = [generations.PROMPTS, *map(generations.threshold_file, (NEVER_EXIT, *levels))]
  part.finish("generate", about, names)
  merge = run_lib.command("merge", arguments.output)
  print_text(console, f"{part.folder} is finished; when all are: {merge}", soft_wrap=True)


def _grid(arguments, console, predictor, prompts, levels, writer) -> None:
  from calm.inference import grid

  with Progress(console) as progress:
    reused = grid.generate(predictor, prompts, levels, writer, progress=progress)
  writer.finish()
  share = reused["reused_tokens"] / max(1, reused["tokens"])
  levels = f"{len(prompts)} prompts, {len(levels)} thresholds and full depth"
  console.print(f"{levels}: {share:.1%} of {reused['tokens']} tokens were not decoded again.")


def parse_grid(text: str | None, options) -> list[float]:
  """A grid as a text, or that of a model's options, or their measure's default."""
  if text is None:
    return list(options.grid or thresholds.default_grid(options.measure).tolist())
  values = [thresholds.parse_threshold(part) for part in text.split(",")]
  return [float(t) for t in thresholds.validate_grid(values)]


def _parse_slacks(text: str, levels: str | None, options) -> list[float]:
  """Slacks as the thresholds that stand for them, descending."""
  from calm import exits

  if levels is not None or options.measure != "verified":
    raise ValueError(
      "`--slacks` needs --measure=verified, and no `--thresholds`; got"
      f" --measure={options.measure}."
    )
  try:
    slacks = [float(part) for part in text.split(",")]
  except ValueError as error:
    raise ValueError(
      f"Expected `--slacks` to be numbers like 0,0.1,0.3, got {text!r}."
    ) from error
  values = [exits.threshold_of(slack) for slack in slacks]
  return [float(t) for t in thresholds.validate_grid(values)]
