"""Choose the lowest threshold that is certified to stay within the tolerance.

Reads the folder that `calm generate` wrote (or JSON Lines files of anybody's) and writes
calibration.json. Needs numpy and scipy only: no JAX.

  calm calibrate runs/cache --tolerance=0.1 --error_rate=0.05
  calm calibrate runs/cache --kind=risk_signed --metric=token_f1 --tolerance=0.02
  calm calibrate --full=full.jsonl --outputs 0.9=a.jsonl 0.8=b.jsonl --output=calibration.json
"""

import argparse
import dataclasses
import json
import math
import pathlib

import numpy as np
from rich import console as rich_console
from rich import markup as rich_markup
from rich import progress as rich_progress
from rich import table as rich_table

from calm import calibrate as calibrate_lib
from calm.calibrate import Support, generations, planning, promises, sequential, thresholds
from calm.calibrate.evidence import methods, multiple_testing
from calm.calibrate.generations import files, foreign, order, records
from calm.calibrate.generations.shown import visible
from calm.calibrate.losses import sequence_losses
from calm.commands import common

# Promises that flags can describe; the others need tables, from Python.
PROMISES = ("mean", "quantile", "every_group", "early_exits", "tail_mean", "cost")


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares the command's options."""
  parser.add_argument("directory", nargs="?", help="folder written by `calm generate`")
  parser.add_argument(
    "--full", metavar="FILE", help="JSON Lines of the full model's outputs, made elsewhere"
  )
  parser.add_argument(
    "--outputs",
    nargs="+",
    metavar="THRESHOLD=FILE",
    help="JSON Lines of outputs at each threshold, made elsewhere",
  )
  rate = {"type": float, "metavar": "RATE"}
  parser.add_argument("--tolerance", default=0.1, help="delta (default 0.1)", **rate)
  parser.add_argument("--error_rate", default=0.05, help="epsilon (default 0.05)", **rate)
  parser.add_argument(
    "--kind",
    choices=["textual", "risk_signed", "risk_clipped"],
    default="textual",
    help="loss: distance to the full model's text (textual, the default), or increase of the"
    " risk against references",
  )
  parser.add_argument(
    "--metric",
    default="rouge_l",
    metavar="NAME",
    help="rouge_l (default), token_f1, exact_match, chrf, or import.path:function",
  )
  parser.add_argument(
    "--method",
    default="auto",
    metavar="NAME",
    help=f"p-values: {', '.join(methods.METHODS)} (default auto: betting, or binomial where"
    " losses are 0 or 1)",
  )
  parser.add_argument(
    "--testing",
    default="fixed_sequence",
    metavar="NAME",
    help=f"{', '.join(multiple_testing.PROCEDURES)} (default fixed_sequence)",
  )
  parser.add_argument(
    "--by_group", action="store_true", help="calibrate on means over each prompt's group"
  )
  parser.add_argument(
    "--pilot",
    metavar="DIR",
    help="folder of `calm generate` for other prompts, on the same grid (the validation"
    " split): prints first how likely so many prompts certify each threshold",
  )
  parser.add_argument(
    "--promise",
    choices=[name for name in promises.PROMISES if name in PROMISES],
    default="mean",
    help="what is bounded (default: the mean loss; README of calm/calibrate)",
  )
  numbers = {"type": float, "metavar": "X"}
  parser.add_argument(
    "--share", default=0.95, help="quantile: share of texts within the tolerance", **numbers
  )
  parser.add_argument(
    "--labels", metavar="FILE", help="every_group: JSON Lines of {id, label}, one a prompt"
  )
  parser.add_argument(
    "--depths", metavar="T,T", help="early_exits: mean layers a token, rising, as 3,5"
  )
  parser.add_argument(
    "--beta", default=0.9, help="tail_mean: share of texts that are not counted", **numbers
  )
  parser.add_argument(
    "--start",
    default=0.0,
    help="tail_mean: where the tail begins, from other prompts",
    **numbers,
  )
  parser.add_argument(
    "--at_most", default=2 / 3, help="cost: layers a token over all layers", **numbers
  )
  parser.add_argument(
    "--references",
    metavar="FILE",
    help="JSON Lines of {id, targets}: references of prompts that have none yet",
  )
  parser.add_argument(
    "--list_unlabelled",
    metavar="FILE",
    help="write the prompts that a risk needs references for, and stop: those whose text"
    " differs from the full model's at some threshold (equal texts lose 0 whatever they are)",
  )
  parser.add_argument(
    "--verify",
    metavar="FILE",
    help="make this calibration.json again from the outputs and compare; writes nothing",
  )
  parser.add_argument(
    "--output", metavar="FILE", help="where to write (default DIRECTORY/calibration.json)"
  )


@common.user_errors
def run(arguments: argparse.Namespace) -> int:
  """Calibrates, prints the table and the promise, writes the file."""
  console = rich_console.Console()
  cached = _read(arguments)
  if arguments.references:
    cached = _with_references(cached, arguments.references)
  if arguments.list_unlabelled:
    return _list_unlabelled(arguments, console, cached)
  if arguments.verify:
    return _verify(arguments, console, cached)
  _plan(arguments, console, cached)
  result = (_replay if cached.sequential else _calibrate)(arguments, console, cached)
  output = pathlib.Path(
    arguments.output or pathlib.Path(arguments.directory or ".") / "calibration.json"
  )
  result.save(output)
  print_calibration(console, result, cached)
  console.print(f"Written to {visible(output)}, digest {result.digest}", markup=False)
  return 0


def _plan(arguments, console, cached: generations.Generations) -> None:
  """Refuses, before any work, where nothing could be certified; warns where little could."""
  support = sequence_losses.kind_support(arguments.kind, arguments.metric)
  units = order.prompt_groups(cached.prompts) if arguments.by_group else cached.ids
  count, name = len(set(units)), arguments.testing
  clusters = len(set(order.known_groups(cached.prompts) or cached.ids))
  if not arguments.by_group and clusters < len(cached.ids):
    console.print(
      f"[yellow]The {len(cached.ids)} prompts come in {clusters} groups and are taken for"
      " independent all the same; --by_group promises over groups.[/yellow]"
    )
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
    method="betting" if cached.sequential else arguments.method,
    share=share,
  )
  if refusal and arguments.promise == "mean":
    raise ValueError(refusal)
  if cached.sequential and arguments.promise != "mean":
    raise ValueError(
      "Expected --promise=mean for a run that stopped early: it was decided for the mean. Got"
      f" {arguments.promise!r}; generate without --until-certified."
    )
  if arguments.pilot:
    pilot = _losses(arguments, generations.load(arguments.pilot))
    curve = planning.power_curve(
      pilot,
      [count, 2 * count, 4 * count],
      tolerance=rates[0],
      error_rate=rates[1],
      method=arguments.method,
    )
    console.print(
      f"Power by prompts and threshold, judged by {visible(arguments.pilot)}:\n{curve}",
      markup=False,
    )
  elif support.lower < 0.0:
    forecast = planning.forecast(count, *rates, method=arguments.method)
    if forecast:
      console.print(f"[yellow]{forecast}[/yellow]")


def _calibrate(arguments, console, cached) -> calibrate_lib.Calibration:
  with rich_progress.Progress(console=console, transient=True) as bar:
    task = bar.add_task(f"{arguments.metric} losses", total=None)
    losses = _losses(
      arguments, cached, lambda done, total: bar.update(task, completed=done, total=total)
    )
  return calibrate_lib.calibrate(
    losses,
    tolerance=arguments.tolerance,
    error_rate=arguments.error_rate,
    method=arguments.method,
    testing_procedure=arguments.testing,
    promise=_promise(arguments, cached),
  )


def _promise(arguments, cached: generations.Generations) -> promises.Promise:
  """The promise that the flags name, with what it needs of the outputs.

  Raises:
    ValueError: a flag is missing, or the outputs do not say what it needs.
  """
  if arguments.promise == "quantile":
    return promises.Quantile(arguments.share)
  if arguments.promise == "tail_mean":
    return promises.TailMean(arguments.beta, arguments.start)
  if arguments.promise == "every_group":
    return promises.EveryGroup(labels=_labels(arguments, cached))
  if arguments.promise == "mean":
    return promises.Mean()
  counts = cached.layer_counts()
  deepest = max((max(record.exit_layers or (0,)) for record in cached.full), default=0)
  if counts is None or deepest < 1:
    raise ValueError(
      f"Expected outputs with `exit_layers` for --promise={arguments.promise}. Got none; use"
      " outputs of `calm generate`."
    )
  layers, tokens = counts
  depths = layers / np.maximum(tokens, 1)
  if arguments.promise == "cost":
    return promises.Cost(arguments.at_most, costs=depths / deepest)
  if not arguments.depths:
    raise ValueError("Expected `--depths` for --promise=early_exits. Got none, as in 3,5.")
  limits = tuple(float(text) for text in arguments.depths.split(","))
  return promises.EarlyExits(limits, depths=depths)


def _labels(arguments, cached: generations.Generations) -> list[str]:
  if not arguments.labels:
    raise ValueError(
      "Expected `--labels` for --promise=every_group. Got none; give a file of {id, label}."
    )
  found = {}
  for line in records.read_lines(arguments.labels):
    name, label = line.value.get("id"), line.value.get("label")
    if not isinstance(name, str) or not isinstance(label, str) or name in found:
      raise line.error(f"expected an `id` that is new and a `label`, got {line.value!r:.100}")
    found[name] = label
  missing = [name for name in cached.ids if name not in found]
  if missing:
    raise ValueError(
      f"Expected `--labels` to name every prompt. Got none for {len(missing)}, first"
      f" {missing[:5]}."
    )
  return [found[name] for name in cached.ids]


def _list_unlabelled(arguments, console, cached: generations.Generations) -> int:
  """Writes what a person, or a judge, has to look at: prompts and their different texts."""
  wanted = set(sequence_losses.unlabelled(cached))
  lines = []
  for row, prompt in enumerate(cached.prompts):
    if prompt.id in wanted:
      texts = [column[row].prediction for column in cached.records if row < len(column)]
      value = {
        "id": prompt.id,
        "input": prompt.input,
        "full": cached.full[row].prediction,
        "early": list(dict.fromkeys(texts)),
        "targets": [],
      }
      lines.append(json.dumps(value, ensure_ascii=False) + "\n")
  files.write_atomically(arguments.list_unlabelled, "".join(lines))
  console.print(
    f"{len(lines)} of {len(cached.prompts)} prompts need references and have none; written to"
    f" {arguments.list_unlabelled}. Fill in `targets`, then: --references=FILE."
  )
  return 0


def _with_references(cached: generations.Generations, path: str) -> generations.Generations:
  """The prompts with the references of a file, where they had none.

  Raises:
    ValueError: a line is no {id, targets}, or names no prompt.
  """
  found = {}
  for line in records.read_lines(path):
    name, targets = line.value.get("id"), line.value.get("targets")
    texts = [targets] if isinstance(targets, str) else targets
    if name not in cached.ids or not isinstance(texts, list):
      raise line.error(f"expected `id` of a prompt and `targets`, got {line.value!r:.100}")
    if not all(isinstance(text, str) for text in texts):
      raise line.error(f"expected `targets` to be texts, got {texts!r:.100}")
    found[name] = tuple(texts)
  prompts = tuple(
    prompt if prompt.targets else dataclasses.replace(prompt, targets=found.get(prompt.id, ()))
    for prompt in cached.prompts
  )
  return dataclasses.replace(cached, prompts=prompts)


def _verify(arguments, console, cached: generations.Generations) -> int:
  """Makes a calibration again, by its own rates and method, and says what differs."""
  told = calibrate_lib.Calibration.load(arguments.verify)
  arguments.tolerance, arguments.error_rate = told.tolerance, told.error_rate
  arguments.kind, arguments.metric = told.kind, told.metric
  arguments.method, arguments.testing = told.method, told.testing
  arguments.by_group = told.clusters
  arguments.promise = told.promise.name
  for name, value in told.promise.to_json().items():
    if name == "limits_of_depth":
      arguments.depths = ",".join(map(repr, value))
    elif name in ("share", "beta", "start", "at_most"):
      setattr(arguments, name, value)
  again = (_replay if cached.sequential else _calibrate)(arguments, console, cached)
  ours, theirs = again.to_json(), told.to_json()
  ignored = {"digest", "provenance", "guarantee", "reason"}
  differ = [
    name for name in ours if name not in ignored and not _same(ours[name], theirs[name])
  ]
  if differ:
    raise ValueError(
      f"Expected {arguments.verify} to be what these outputs give. Got other fields {differ}:"
      " it was made from other outputs or by another version, or was edited."
    )
  console.print(f"{arguments.verify} is what these outputs give (digest {told.digest}).")
  console.print(told.guarantee)
  return 0


def _same(ours, theirs) -> bool:
  """Equal JSON, numbers to nine digits (libraries differ in the last ones)."""
  if isinstance(ours, dict) and isinstance(theirs, dict):
    return set(ours) == set(theirs) and all(_same(ours[key], theirs[key]) for key in ours)
  if isinstance(ours, list) and isinstance(theirs, list):
    pairs = zip(ours, theirs, strict=False)
    return len(ours) == len(theirs) and all(_same(a, b) for a, b in pairs)
  if isinstance(ours, float) and isinstance(theirs, float):
    return math.isclose(ours, theirs, rel_tol=1e-9, abs_tol=1e-12)
  return ours == theirs


def _losses(arguments, cached, progress=None) -> sequence_losses.SequenceLosses:
  """Losses as the flags want them; `--by_group` refuses prompts that have no group."""
  losses = sequence_losses.compute(
    cached, arguments.kind, metric=arguments.metric, progress=progress
  )
  groups = order.prompt_groups(cached.prompts) if arguments.by_group else None
  return dataclasses.replace(losses, groups=groups)


def _replay(arguments, console, cached) -> calibrate_lib.Calibration:
  """A run that stopped early is tested prompt by prompt, as it was decoded."""
  del console
  if arguments.by_group != cached.by_group:
    tested = "by group" if cached.by_group else "by prompt"
    raise ValueError(
      f"Expected `--by_group` as the run that stopped early had it: it was decided {tested}, in"
      f" an order made for that. Got by_group={arguments.by_group}; change the flag, or"
      " generate again."
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
    return generations.load(arguments.directory)
  if arguments.full and arguments.outputs and not arguments.directory:
    files = {}
    for pair in arguments.outputs:
      threshold, _, path = pair.partition("=")
      files[thresholds.parse_threshold(threshold)] = path
    return foreign.gather(arguments.full, files)
  raise ValueError(
    "Expected the folder of `calm generate`, or both --full and --outputs. Got"
    f" directory={arguments.directory!r}, --full={arguments.full!r},"
    f" --outputs={arguments.outputs!r}."
  )


def print_calibration(
  console: rich_console.Console,
  result: calibrate_lib.Calibration,
  cached: generations.Generations | None = None,
) -> None:
  """The table of the tested thresholds and the promise in words."""
  layers = mean_layers(cached)
  table = rich_table.Table(
    title=rich_markup.escape(
      visible(f"{result.kind} loss, {result.metric}; p-values: {result.method}")
    )
  )
  for name in ("threshold", "mean loss", "upper bound", "p-value", "certified"):
    table.add_column(name, justify="right")
  if layers:
    table.add_column("layers / token", justify="right")
  for row in result.rows:
    cells = [
      thresholds.format_threshold(row.threshold),
      f"{row.mean:.4f}",
      f"{row.upper_bound:.4f}",
      f"{row.p_value:.3g}",
      "yes" if row.rejected else "no",
    ]
    if layers:
      cells.append(f"{layers[row.threshold]:.2f}")
    style = "bold" if row.threshold == result.threshold else None
    table.add_row(*cells, style=style)
  console.print(table)
  console.print(
    f"Calibrated threshold: [bold]{thresholds.format_threshold(result.threshold)}[/bold]"
    f" ({rich_markup.escape(visible(result.reason))})"
  )
  console.print(visible(result.guarantee), markup=False)


def mean_layers(cached: generations.Generations | None) -> dict[float, float]:
  """Mean decoder layers a token at every threshold, where the outputs record exits."""
  if cached is None:
    return {}
  counts = {}
  for threshold, column in zip(cached.thresholds.tolist(), cached.records, strict=True):
    layers = [layer for record in column for layer in record.exit_layers or ()]
    if not layers:
      return {}
    counts[threshold] = sum(layers) / len(layers)
  return counts
