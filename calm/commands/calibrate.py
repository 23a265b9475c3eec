"""Choose the lowest threshold that is certified to stay within the tolerance.

Reads the folder that `calm generate` wrote (or JSON Lines files of anybody's) and writes
calibration.json. Needs no JAX.

  calm calibrate runs/cache --tolerance=0.1 --error_rate=0.05
  calm calibrate runs/cache --kind=risk_signed --metric=token_f1 --tolerance=0.02
  calm calibrate --full=full.jsonl --outputs 0.9=a.jsonl 0.8=b.jsonl --output=calibration.json
  calm calibrate runs/cache --risks textual:rouge_l:0.1 risk_signed:token_f1:0.02
  calm calibrate --configurations a=runs/a b=runs/b --output=calibration.json
  calm calibrate --full=xl.jsonl --outputs large=l.jsonl base=b.jsonl --metric=file.py:overlap

A line of such files is {"id", "prediction"}, and where they are there `input`, `targets` or
`references` and `group`; or a line as it is of an OpenAI batch's output, of `vllm run-batch`,
of vLLM's RequestOutput, or of T5X infer.
"""

import argparse
import json
import pathlib

from rich import console as rich_console

from calm import calibrate as calibrate_lib
from calm.calibrate import Support, generations, planning, sequential, thresholds
from calm.calibrate.evidence import methods, multiple_testing
from calm.calibrate.generations import foreign
from calm.calibrate.losses import sequence_losses
from calm.commands import (
  certificate,
  common,
  following,
  helping,
  promise_flags,
  references,
  several,
  verifying,
)
from calm.console import Progress, print_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares the command's options."""
  _add_outputs(parser)
  _add_test(parser)
  promise_flags.add_arguments(parser)
  several.add_arguments(parser)
  references.add_arguments(parser)
  parser.add_argument(
    "--verify",
    metavar="FILE",
    help="make this calibration.json again from the outputs and compare; writes nothing",
  )
  parser.add_argument(
    "--unverified",
    action="store_true",
    help="take a folder that lists no checksums, whose records may have been changed",
  )
  parser.add_argument(
    "--output", metavar="FILE", help="where to write (default DIRECTORY/calibration.json)"
  )


def _add_outputs(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("directory", nargs="?", help="folder written by `calm generate`")
  parser.add_argument(
    "--full", metavar="FILE", help="JSON Lines of the full model's outputs, made elsewhere"
  )
  parser.add_argument(
    "--outputs",
    nargs="+",
    metavar="KNOB=FILE",
    help="JSON Lines of outputs at each threshold, made elsewhere; or at each setting of any"
    " other knob (layers, beams, a smaller model), the best first: 12=a.jsonl 6=b.jsonl",
  )


def _add_test(parser: argparse.ArgumentParser) -> None:
  helping.add_rates(parser)
  parser.add_argument(
    "--kind",
    choices=["textual", "risk_signed", "risk_clipped"],
    default="textual",
    metavar="NAME",
    help="loss: textual, distance to the full model's text; risk_signed or risk_clipped,"
    " increase of the risk against references (default %(default)s)",
  )
  parser.add_argument(
    "--metric",
    default=verifying.METRIC,
    metavar="NAME",
    help="rouge_l, token_f1, exact_match, chrf, file.py:function, or module:function"
    " (installed, or a file of the working directory) (default %(default)s)",
  )
  parser.add_argument(
    "--method",
    default="auto",
    metavar="NAME",
    help=f"p-values: {', '.join(methods.METHODS)} (default %(default)s: bets, or binomial"
    " where losses are 0 or 1)",
  )
  parser.add_argument(
    "--testing",
    default="fixed_sequence",
    metavar="NAME",
    help=f"{', '.join(multiple_testing.PROCEDURES)} (default %(default)s)",
  )
  promise_flags.add_ungrouped(parser)
  parser.add_argument(
    "--pilot",
    metavar="DIR",
    help="folder of `calm generate` for other prompts, on the same grid (the validation"
    " split): prints first how likely so many prompts certify each threshold",
  )


@common.user_errors
def run(arguments: argparse.Namespace) -> int:
  """Calibrates, prints the table and the promise, writes the file."""
  console = rich_console.Console()
  if arguments.output:
    named = (pair.rpartition("=")[2] for pair in arguments.outputs or ())
    common.check_output(arguments.output, read=(arguments.full, arguments.references, *named))
  if arguments.configurations:
    chosen, model, prompts = several.calibrate_configurations(arguments)
    return _save(arguments, console, chosen, prompts, model=model)
  cached = _read(arguments)
  if arguments.references:
    cached = references.with_references(cached, arguments.references)
  if arguments.list_unlabelled:
    return references.list_unlabelled(arguments, console, cached)
  if arguments.verify:
    return _verify(arguments, console, cached)
  if said := promise_flags.describe_clusters(arguments, cached.prompts):
    print_text(console, said, "yellow")
  if arguments.risks:
    return _save(
      arguments, console, several.calibrate_risks(arguments, cached), cached.prompts, cached
    )
  _plan(arguments, console, cached)
  return _save(arguments, console, _make(arguments, console, cached), cached.prompts, cached)


def _save(arguments, console, result, prompts, cached=None, model: object = None) -> int:
  output = pathlib.Path(
    arguments.output or pathlib.Path(arguments.directory or ".") / "calibration.json"
  )
  result.save(output)
  certificate.print_calibration(console, result, cached)
  print_text(console, f"Written to {output}, digest {result.digest}", soft_wrap=True)
  if arguments.directory or output.is_file():  # not beside a device
    certificate.record(console, arguments.directory or output.parent, result, prompts)
  known = model if cached is None else following.model_of(cached)
  following.say_serve(console, result, output, known)
  return 0


def _plan(arguments, console, cached: generations.Generations) -> None:
  """Refuses, before any work, where nothing could be certified; warns where little could."""
  support = sequence_losses.kind_support(arguments.kind, arguments.metric)
  units = promise_flags.clusters_of(arguments, cached.prompts) or cached.ids
  count, name = len(set(units)), arguments.testing
  share = (
    multiple_testing.first_share(name, len(cached.thresholds))
    if name in multiple_testing.PROCEDURES
    else 1
  )
  rates = (arguments.tolerance, arguments.error_rate * share)
  refusal = planning.refusal(
    count,
    arguments.tolerance,
    arguments.error_rate,
    support=support if count == len(cached.ids) else Support(support.lower, support.upper),
    method=sequential.METHOD if cached.sequential else arguments.method,
    share=share,
    unit="prompts" if count == len(cached.ids) else "clusters of prompts",
  )
  if refusal and arguments.promise == "mean":
    raise ValueError(refusal)
  if cached.sequential and arguments.promise != "mean":
    raise ValueError(
      "Expected --promise=mean for a run that stopped early: it was decided for the mean, got"
      f" {arguments.promise!r}; generate without --until_certified."
    )
  _tell_power(arguments, console, count, rates, support)


def _tell_power(
  arguments, console, count: int, rates: tuple[float, float], support: Support
) -> None:
  """How likely so many prompts certify: judged by a pilot, or forecast for signed losses."""
  if arguments.pilot:
    pilot = _losses(arguments, generations.load(arguments.pilot))
    curve = planning.power_curve(
      pilot,
      [count, 2 * count, 4 * count],
      tolerance=rates[0],
      error_rate=rates[1],
      method=arguments.method,
    )
    print_text(
      console, f"Power by prompts and threshold, judged by {arguments.pilot}:\n{curve}"
    )
  elif support.lower < 0.0:
    forecast = planning.forecast(count, *rates, method=arguments.method)
    if forecast:
      print_text(console, forecast, "yellow")


def _calibrate(arguments, console, cached, seed=None) -> calibrate_lib.Calibration:
  promise = promise_flags.promise_of(arguments, cached)  # refused before any text is compared
  with Progress(console) as progress:
    losses = _losses(arguments, cached, progress.count(f"{arguments.metric} losses"))
  return calibrate_lib.calibrate(
    losses,
    tolerance=arguments.tolerance,
    error_rate=arguments.error_rate,
    method=arguments.method,
    testing_procedure=arguments.testing,
    promise=promise,
    seed=seed,
  )


def _verify(arguments, console, cached: generations.Generations) -> int:
  """Makes a calibration again, by its own rates and method, and says what differs."""
  told = calibrate_lib.Calibration.load(arguments.verify)
  verifying.take_over(arguments, told)
  again = _make(arguments, console, cached)
  if drawn := again.seed != told.seed:
    again = _make(arguments, console, cached, told.seed)
  differ = verifying.differences(told, again)
  sentence = json.loads(pathlib.Path(arguments.verify).read_bytes())["guarantee"]
  if not differ and sentence != told.guarantee:
    raise ValueError(
      f"Expected `guarantee` of {arguments.verify} to be the sentence of its numbers,"
      f" {told.guarantee!r}, got {sentence!r}: it was worded by another version, or edited;"
      " calibrate again."
    )
  if differ:
    raise ValueError(
      f"Expected {arguments.verify} to be what these outputs give, got other fields"
      f" {differ}: it was made from other outputs or by another version, or was edited;"
      " calibrate again."
    )
  print_text(console, f"{arguments.verify} is what these outputs give (digest {told.digest}).")
  if drawn and told.order == "permuted":
    print_text(
      console,
      "Its order is not the one that these outputs give: earlier versions drew the order of"
      " outputs without the texts of prompts. It was checked in the order that it names.",
      "yellow",
    )
  print_text(console, told.guarantee)
  return 0


def _make(
  arguments, console, cached: generations.Generations, seed: str | None = None
) -> calibrate_lib.Calibration:
  """The calibration, tested as the outputs were decoded: whole, or prompt by prompt."""
  if cached.sequential:
    return _replay(arguments, console, cached)
  return _calibrate(arguments, console, cached, seed)


def _losses(arguments, cached, progress=None) -> sequence_losses.SequenceLosses:
  """Losses as the flags want them."""
  losses = sequence_losses.compute(
    cached, arguments.kind, metric=arguments.metric, progress=progress
  )
  return losses.ungrouped() if arguments.ungrouped else losses


def _replay(arguments, console, cached) -> calibrate_lib.Calibration:
  """A run that stopped early is tested prompt by prompt, as it was decoded."""
  del console
  grouped = promise_flags.clusters_of(arguments, cached.prompts) is not None
  if (cached.by_group and arguments.ungrouped) or (grouped and not cached.by_group):
    tested = "by cluster" if cached.by_group else "by prompt"
    raise ValueError(
      "Expected `--ungrouped` as the run that stopped early had it (decided"
      f" {tested}, in an order made for that), got ungrouped={arguments.ungrouped}; change the"
      " flag, or generate again."
    )
  return sequential.replay(
    cached,
    tolerance=arguments.tolerance,
    error_rate=arguments.error_rate,
    kind=arguments.kind,
    metric=arguments.metric,
  )


def _read(arguments: argparse.Namespace) -> generations.Generations:
  if arguments.directory and not (arguments.full or arguments.outputs):
    return generations.load(arguments.directory, unverified=arguments.unverified)
  if arguments.full and arguments.outputs and not arguments.directory:
    names, _, paths = zip(*(pair.rpartition("=") for pair in arguments.outputs), strict=True)
    knobs = thresholds.parse_knobs(names)
    return foreign.gather(arguments.full, dict(zip(knobs, paths, strict=True)))  # type: ignore
  raise ValueError(
    "Expected the folder of `calm generate`, or both --full and --outputs, got"
    f" directory={arguments.directory!r}, --full={arguments.full!r},"
    f" --outputs={arguments.outputs!r}."
  )
