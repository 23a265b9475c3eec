"""Decode prompts at full depth and at every threshold of a grid, into a folder.

The folder is what `calm calibrate` reads. A run that was stopped goes on where it was; each
prompt is encoded once, and the grid compiles once.

  calm generate --prompts=prompts.jsonl --output=runs/cache
  calm generate --model=my_model --prompts=dev.jsonl.gz --measure=classifier --output=runs/cache
  calm generate --prompts=prompts.jsonl --output=runs/cache --until_certified --tolerance=0.1
  calm generate --prompts=prompts.jsonl --output=runs/cache --num_shards=4 --shard_id=0
"""

import argparse
import pathlib
from collections.abc import Sequence

from rich import console as rich_console

from calm.calibrate import NEVER_EXIT, Provenance, generations, planning, sequential, thresholds
from calm.calibrate.generations import writer as writer_lib
from calm.calibrate.losses import asking, sequence_losses
from calm.commands import (
  certificate,
  common,
  following,
  helping,
  model_flags,
  promise_flags,
  sharding,
)
from calm.console import Progress, print_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares the command's options."""
  model_flags.add_arguments(parser)
  parser.add_argument(
    "--output", required=True, metavar="DIR", help="folder to write (resumed if it exists)"
  )
  _add_grid(parser)
  parser.add_argument(
    "--no_reuse", action="store_true", help="decode every sequence, even where it cannot change"
  )
  parser.add_argument(
    "--until_certified",
    action="store_true",
    help="stop as soon as the calibration is decided, and write calibration.json",
  )
  # As it was spelled once.
  parser.add_argument("--until-certified", action="store_true", help=argparse.SUPPRESS)
  _add_test(parser)
  sharding.add_arguments(parser)
  common.add_gin_arguments(parser)


def _add_test(parser: argparse.ArgumentParser) -> None:
  calibration = parser.add_argument_group("with --until_certified, as for `calm calibrate`")
  helping.add_rates(calibration)
  calibration.add_argument(
    "--kind",
    default="textual",
    metavar="NAME",
    help="textual or risk_signed (default %(default)s)",
  )
  calibration.add_argument(
    "--metric", default="rouge_l", metavar="NAME", help="the text metric (default %(default)s)"
  )
  calibration.add_argument(
    "--references",
    metavar="FILE",
    help="JSON Lines of {id, targets}, for a risk: where it lacks some the run stops, writes"
    " OUTPUT/unlabelled.jsonl, and goes on when it is started again with them",
  )
  promise_flags.add_ungrouped(calibration)


def _add_grid(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    "--thresholds",
    metavar="LIST",
    help="descending, like 0.9,0.8,0.7; default: the model's own grid, or the measure's",
  )
  parser.add_argument(
    "--slacks",
    metavar="LIST",
    help="with --measure=verified, ascending in [0, 1), like 0,0.1,0.3: a draft is accepted if"
    " p_full(draft) >= (1 - slack) max p_full; the threshold of a slack is 1 - slack",
  )


@common.user_errors
def run(arguments: argparse.Namespace) -> int:
  """Generates the whole grid."""
  opened, part = model_flags.open_prompts(arguments), None
  if which := sharding.shard(arguments):
    if arguments.until_certified:
      raise ValueError(
        "Expected no `--num_shards` with `--until_certified`: when to stop is told by all"
        " prompts, in one order, got both; leave one out."
      )
    opened = part = sharding.Part(opened, which, arguments.output)
  prompts = list(opened)
  common.use_compilation_cache()
  from calm import inference
  from calm.inference import grid

  console = rich_console.Console()
  print_text(console, f"{opened.taken}.")
  load = common.configured(arguments, inference.load)
  with common.called("--model"):
    predictor = load(
      arguments.model, dtype=arguments.dtype, **model_flags.decode_options(arguments)
    )
  levels = parse_grid(arguments.thresholds, predictor.options)
  if arguments.slacks is not None:
    levels = parse_slacks(arguments.slacks, arguments.thresholds, predictor.options)
  if part is not None:
    return _part(arguments, console, predictor, prompts, levels, part)
  test = None
  if arguments.until_certified:
    groups = promise_flags.clusters_of(arguments, prompts)
    if said := promise_flags.describe_clusters(arguments, prompts):
      print_text(console, said, "yellow")
    prompts = grid.sequential_order(predictor, prompts, ungrouped=groups is None)
    test = _test(arguments, levels, groups or [prompt.id for prompt in prompts])
  writer = _open_writer(arguments, console, arguments.output, predictor, prompts, levels, test)
  if test is None:
    _grid(arguments, console, predictor, prompts, levels, writer)
  else:
    _until_certified(arguments, console, predictor, prompts, test, writer)
  return 0


def _open_writer(arguments, console, folder, predictor, prompts, levels, test=None):
  writer = writer_lib.open_writer(
    pathlib.Path(folder),
    prompts=prompts,
    thresholds=levels,
    procedure=predictor.procedure,
    provenance=Provenance(
      grid=tuple(levels), num_examples=len(prompts), notes={"model": str(arguments.model)}
    ),
    sequential=test is not None,
    by_group=test is not None and test.clusters,
  )
  for report in writer.reports:
    print_text(console, report, "yellow")
  return writer


def _part(arguments, console, predictor, prompts, levels, part: sharding.Part) -> int:
  """One shard: decoded, and marked as done in the end; done again, it is left as it is."""
  about = {"procedure": predictor.procedure.to_json(), "thresholds": levels}
  merge = f"when all are: {following.command('merge', arguments.output)}"
  if part.begin("generate", about, console):
    return 0
  names = []
  if prompts:
    writer = _open_writer(arguments, console, part.folder, predictor, prompts, levels)
    if writer.procedure is not None:  # as an earlier version wrote it, where that goes on
      about["procedure"] = writer.procedure.to_json()
    _grid(arguments, console, predictor, prompts, levels, writer)
    names = [generations.PROMPTS, *map(generations.threshold_file, (NEVER_EXIT, *levels))]
  part.finish("generate", about, names)
  print_text(console, f"{part.folder} is finished; {merge}", soft_wrap=True)
  return 0


def _grid(arguments, console, predictor, prompts, levels, writer) -> None:
  from calm.inference import grid

  with Progress(console) as progress:
    advance = grid.as_shares(progress, levels)
    reuse = not arguments.no_reuse
    summary = grid.generate(
      predictor, prompts, levels, writer, reuse_records=reuse, progress=advance
    )
  writer.finish()
  console.print(f"{len(prompts)} prompts, {len(levels)} thresholds and full depth: {summary}.")
  if arguments.num_shards is None:
    print_text(console, f"Written to {arguments.output}. Calibrate on it:", soft_wrap=True)
    print(following.command("calibrate", arguments.output), flush=True)


def _test(arguments, levels, units: Sequence[str]) -> sequential.SequentialCalibration:
  """What `--until_certified` asks, refused before any work where it cannot be answered."""
  support = sequence_losses.kind_support(arguments.kind, arguments.metric)
  rates = (arguments.tolerance, arguments.error_rate)
  num_units = len(set(units))
  refusal = planning.refusal(
    num_units,
    *rates,
    support=support,
    method=sequential.METHOD,
    unit="prompts" if num_units == len(units) else "clusters of prompts",
  )
  if refusal:
    raise ValueError(refusal)
  return sequential.SequentialCalibration(
    levels,
    num_units,
    tolerance=rates[0],
    error_rate=rates[1],
    support=support,
    clusters=num_units < len(units),
  )


def _until_certified(arguments, console, predictor, prompts, test, writer) -> None:
  from calm.inference import grid

  known = asking.read_references(arguments.references) if arguments.references else {}
  with Progress(console) as progress:

    def advance(threshold, done, planned):
      text = f"prompt {done} of {planned}, threshold {thresholds.format_threshold(threshold)}"
      progress(done / planned, text)

    try:
      calibration = grid.generate_until_certified(
        predictor,
        prompts,
        writer,
        test,
        kind=arguments.kind,
        metric=arguments.metric,
        ask=lambda questions: known,
        progress=advance,
      )
    except asking.Unanswered as error:
      wanted = pathlib.Path(arguments.output) / "unlabelled.jsonl"
      asking.write_questions(wanted, error.questions)
      writer.finish()
      raise ValueError(
        "Expected references of every prompt whose text differs from the full model's, got none"
        f" for {len(error.questions)} in {wanted}; fill in `targets` there and give it as"
        f" --references={wanted}: what was decoded, and what was answered, is kept."
      ) from error
  writer.finish()
  path = pathlib.Path(arguments.output) / "calibration.json"
  calibration.save(path)
  certificate.print_calibration(console, calibration)
  certificate.record(console, arguments.output, calibration, prompts)
  print_text(console, f"Written to {path}")
  following.say_serve(console, calibration, path, arguments.model)


def parse_grid(text: str | None, options) -> list[float]:
  """A grid given as text, or that of a model's options, or their measure's default."""
  if text is None:
    return list(options.grid or thresholds.default_grid(options.measure).tolist())
  values = [thresholds.parse_threshold(part) for part in text.split(",")]
  return [float(t) for t in thresholds.validate_grid(values)]


def parse_slacks(text: str, given: str | None, options) -> list[float]:
  """A grid of slacks as the thresholds that stand for them, descending."""
  from calm.exits import verified

  if given is not None or options.measure != "verified":
    raise ValueError(
      "Expected `--slacks` with --measure=verified and without `--thresholds`, got"
      f" --measure={options.measure}"
      f"{'' if given is None else ' and --thresholds'}; leave one out."
    )
  try:
    slacks = [float(part) for part in text.split(",")]
  except ValueError as error:
    raise ValueError(
      f"Expected `--slacks` to be numbers like 0,0.1,0.3, got {text!r}."
    ) from error
  return [float(t) for t in thresholds.validate_grid(list(map(verified.threshold_of, slacks)))]
