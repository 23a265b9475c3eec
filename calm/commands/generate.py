"""Decode prompts at full depth and at every threshold of a grid, into a
folder.

The folder is what `calm calibrate` reads. A stopped run goes on with the same
command. Each prompt is encoded once, and the grid compiles once.

  calm generate --prompts=prompts.jsonl --output=runs/cache
  calm generate --model=mine --prompts=dev.jsonl.gz --output=runs/cache
  calm generate --prompts=p.jsonl --output=runs/cache --until_certified
  calm generate --prompts=p.jsonl --output=runs/a --num_shards=4 --shard_id=0
"""

import argparse
import pathlib

from rich import console as rich_console

from calm.calibrate import (
  NEVER_EXIT,
  Provenance,
  generations,
  label_requests,
  losses,
  sequential,
  thresholds,
)
from calm.calibrate.generations import cache, records
from calm.commands import flags
from calm.commands import run as run_lib
from calm.console import Progress, print_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares the command's options."""
  flags.add_model(parser)
  add, more = flags.add, flags.more(parser)
  add(parser, "output", "DIR", "folder to write (resumed if it exists)", required=True)
  text = "descending, like 0.9,0.8"
  add(parser, "thresholds", "LIST", text, without="the model's own grid, or the measure's")
  add(parser, "until_certified", None, "stop when the calibration is decided, and write it")
  flags.add_shared(parser, "tolerance", "error_rate")
  flags.add_shared(parser, "num_shards", "shard_id")
  text = "with --measure=verified: ascending in [0, 1), like 0,0.1,0.3"
  add(more, "slacks", "LIST", text)
  add(more, "kind", "NAME", "with --until_certified: textual or risk_signed", "textual")
  add(more, "metric", "NAME", f"with --until_certified: {flags.METRICS}", "rouge_l")
  text = "with --until_certified and a risk: JSON Lines of {id, targets}"
  add(more, "references", "FILE", text)
  flags.add_shared(more, "ungrouped")
  flags.add_shared(more, *flags.GIN)


@run_lib.user_errors
def run(arguments: argparse.Namespace) -> int:
  """Generates the whole grid."""
  opened, part = flags.open_prompts(arguments), None
  if which := run_lib.shard(arguments):
    if arguments.until_certified:
      raise ValueError(
        "`--until_certified` needs all prompts, in one order; leave `--num_shards` out."
      )
    opened = part = run_lib.ShardRun(opened, which, arguments.output)
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
  elif arguments.until_certified:
    _until_certified(arguments, console, predictor, prompts, levels)
  else:
    writer = _open_writer(arguments, console, arguments.output, predictor, prompts, levels)
    _grid(arguments, console, predictor, prompts, levels, writer)
    print_text(console, f"Written to {arguments.output}. Calibrate on it:", soft_wrap=True)
    print(run_lib.command("calibrate", arguments.output), flush=True)
  return 0


def _open_writer(arguments, console, folder, predictor, prompts, levels, **options):
  writer = cache.open_writer(
    pathlib.Path(folder),
    prompts=prompts,
    thresholds=levels,
    procedure=predictor.procedure,
    provenance=Provenance(
      grid=tuple(levels), num_examples=len(prompts), notes={"model": str(arguments.model)}
    ),
    **options,
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
    advance = grid.as_shares(progress, levels)
    reused = grid.generate(predictor, prompts, levels, writer, progress=advance)
  writer.finish()
  told = records.describe_reuse(reused)
  console.print(f"{len(prompts)} prompts, {len(levels)} thresholds and full depth: {told}.")


def _until_certified(arguments, console, predictor, prompts, levels) -> None:
  """Decodes until the calibration is decided, and writes it."""
  from calm.inference import grid

  groups = run_lib.tested_clusters(arguments, prompts)
  run_lib.print_clusters(arguments, console, prompts)
  prompts = grid.sequential_order(predictor, prompts, ungrouped=groups is None)
  units = groups or [prompt.id for prompt in prompts]
  support = losses.kind_support(arguments.kind, arguments.metric)
  run_lib.refuse_few(arguments, units, support, sequential.METHOD)
  test = sequential.SequentialCalibration(
    levels,
    len(set(units)),
    tolerance=arguments.tolerance,
    error_rate=arguments.error_rate,
    support=support,
    clusters=len(set(units)) < len(units),
  )
  folder = pathlib.Path(arguments.output)
  options = {"sequential": True, "by_group": test.clusters}
  writer = _open_writer(arguments, console, folder, predictor, prompts, levels, **options)
  known = label_requests.read_references(arguments.references) if arguments.references else {}
  with Progress(console) as progress:

    def advance(threshold, done, planned):
      shown = thresholds.format_threshold(threshold)
      progress(done / planned, f"prompt {done} of {planned}, threshold {shown}")

    try:
      calibration = grid.generate_until_certified(
        predictor,
        prompts,
        writer,
        test,
        kind=arguments.kind,
        metric=arguments.metric,
        ask=lambda requests: known,
        progress=advance,
      )
    except label_requests.MissingReferences as error:
      wanted = folder / "unlabelled.jsonl"
      label_requests.write_requests(wanted, error.requests)
      writer.finish()
      raise ValueError(
        "Expected references of every prompt whose text differs from the full model's, got none"
        f" for {len(error.requests)} in {wanted}; fill in `targets` there and give it as"
        f" --references={wanted}: what was decoded, and what was answered, is kept."
      ) from error
  writer.finish()
  path = folder / "calibration.json"
  run_lib.save_calibration(
    console, calibration, path, prompts, folder=folder, model=arguments.model
  )


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
  values = [exits.speculative.threshold_of(slack) for slack in slacks]
  return [float(t) for t in thresholds.validate_grid(values)]
