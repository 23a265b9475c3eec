"""Several risks at once, and the cheapest of several folders of outputs."""

import argparse
from collections.abc import Sequence

import numpy as np

from calm import calibrate as calibrate_lib
from calm.calibrate import generations, promises
from calm.calibrate.losses import metrics, sequence_losses
from calm.commands import following

# What --risks and --configurations decide themselves.
_REPLACED = ("labels", "depths", "list_unlabelled", "verify", "pilot")


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares the options."""
  parser.add_argument(
    "--risks",
    nargs="+",
    metavar="KIND:METRIC:DELTA",
    help="several risks at once, each within its own tolerance, instead of --kind, --metric and"
    " --tolerance: textual:rouge_l:0.1 risk_signed:token_f1:0.02",
  )
  parser.add_argument(
    "--configurations",
    nargs="+",
    metavar="NAME=DIR",
    help="folders of `calm generate` for the same prompts under other measures, schedules or"
    " exits: certifies the cheapest (layers a token) of all thresholds of all of them, on the"
    " half of the prompts that did not put them in order (Pareto testing)",
  )


def parse_risk(text: str) -> tuple[str, str, float]:
  """(kind, metric, tolerance) of KIND:METRIC:DELTA; metrics may have colons of their own.

  Raises:
    ValueError: it is no such text.
  """
  kind, _, rest = text.partition(":")
  metric, _, number = rest.rpartition(":")
  try:
    tolerance = float(number)
  except ValueError:
    tolerance = -1.0
  if not metric or not 0.0 < tolerance < 1.0:
    raise ValueError(
      f"Expected `--risks` as KIND:METRIC:DELTA with DELTA in (0, 1), got {text!r}; write"
      " textual:rouge_l:0.1."
    )
  sequence_losses.kind_support(kind, metric)
  return kind, metrics.get_metric(metric).name, tolerance


def risks_of(arguments, cached: generations.Generations) -> list[promises.Risk]:
  """The risks of some outputs: of --risks, or the one of --kind, --metric and --tolerance."""
  told = arguments.risks or [f"{arguments.kind}:{arguments.metric}:{arguments.tolerance}"]
  found = []
  for kind, metric, tolerance in map(parse_risk, told):
    losses = sequence_losses.compute(cached, kind, metric=metric)
    if arguments.ungrouped:
      losses = losses.ungrouped()
    found.append(promises.Risk(losses, tolerance))
  return found


def calibrate_risks(arguments, cached: generations.Generations) -> calibrate_lib.Calibration:
  """The lowest threshold that keeps all of --risks.

  Raises:
    ValueError: an option that --risks replaces is there too, or a run stopped early.
  """
  _refuse_others(arguments, "--risks")
  if cached.sequential:
    raise ValueError(
      "Expected a complete run for --risks, got one that stopped early; give one that was"
      " decoded whole."
    )
  return calibrate_lib.calibrate(
    risks=risks_of(arguments, cached),
    error_rate=arguments.error_rate,
    method=arguments.method,
    testing_procedure=arguments.testing,
  )


def calibrate_configurations(arguments):
  """The cheapest certified threshold of all folders of --configurations.

  Returns:
    The `Calibration`; the model that its folder was decoded with, as it was given, or None
    where that is unknown; and the prompts.

  Raises:
    ValueError: a folder is none, has no `exit_layers`, or other prompts than the first.
  """
  _refuse_others(arguments, "--configurations")
  if arguments.directory or arguments.full or arguments.outputs or not arguments.output:
    raise ValueError(
      "Expected `--configurations` with --output and without a folder, --full or --outputs,"
      f" got directory={arguments.directory!r}, --full={arguments.full!r},"
      f" --outputs={arguments.outputs!r}, --output={arguments.output!r}."
    )
  risks, costs, models, prompts = {}, {}, [], ()
  for name, folder in _folders(arguments.configurations):
    cached = generations.load(folder)
    counts = cached.layer_counts()
    if counts is None or cached.sequential:
      raise ValueError(f"Expected a complete run with `exit_layers` in {folder}, got none.")
    layers, tokens = counts
    risks[name] = risks_of(arguments, cached)
    costs[name] = layers / np.maximum(tokens, 1)
    prompts = cached.prompts
    models.append((cached.procedure, following.model_of(cached)))
  found = calibrate_lib.calibrate_configurations(
    risks, costs, error_rate=arguments.error_rate, method=arguments.method
  )
  chosen = (model for procedure, model in models if procedure == found.procedure)
  return found, next(chosen, None), prompts


def _folders(pairs: Sequence[str]) -> list[tuple[str, str]]:
  found = {}
  for pair in pairs:
    name, _, folder = pair.partition("=")
    if not name or not folder or name in found:
      raise ValueError(f"Expected `--configurations` as NAME=DIR, names unique, got {pair!r}.")
    found[name] = folder
  return list(found.items())


def _refuse_others(arguments, option: str) -> None:
  there = [f"--{name}" for name in _REPLACED if getattr(arguments, name)]
  if arguments.promise != "mean":
    there.append(f"--promise={arguments.promise}")
  if there:
    raise ValueError(
      f"Expected {option} alone, as it bounds means, got {' and '.join(there)} beside; leave"
      " that out."
    )
