"""Choose the lowest threshold that is certified to stay within the tolerance.

Reads the folder of `calm generate`, or JSON Lines of any other system, and
writes calibration.json. Needs no JAX.

  calm calibrate runs/cache --tolerance=0.1 --error_rate=0.05
  calm calibrate runs/cache --kind=risk_signed --metric=token_f1
  calm calibrate --full=full.jsonl --outputs 0.9=a.jsonl 0.8=b.jsonl
  calm calibrate --full=xl.jsonl --outputs large=l.jsonl base=b.jsonl
  calm calibrate runs/cache --risks textual:rouge_l:0.1 risk_signed:chrf:0.02
  calm calibrate --configurations a=runs/a b=runs/b --output=calibration.json

A line of such files is {"id", "prediction"} with `input`, `targets` and
`group` where known, or a line of OpenAI batches, `vllm run-batch`, vLLM or T5X
infer.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich import console as rich_console

from calm import calibrate as calibrate_lib
from calm import storage
from calm.calibrate import Support, generations, ledger, methods, metrics, planning, testing
from calm.calibrate import losses as sequence_losses
from calm.calibrate import risks as risks_lib
from calm.calibrate import thresholds as thresholds_lib
from calm.calibrate.generations import foreign, order
from calm.commands import flags
from calm.commands import run as run_lib
from calm.console import Progress, print_text

METRIC = "rouge_l"  # the default of --metric
# Promises that flags can describe; the others need tables, from Python.
PROMISES = ("mean", "quantile", "every_group", "early_exits", "tail_mean", "cost")


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares the command's options."""
  add, more = flags.add, flags.more(parser)
  text = "folder written by `calm generate`"
  parser.add_argument("directory", nargs="?", type=flags.filled, help=text)
  add(parser, "full", "FILE", "JSON Lines of the full model's outputs")
  text = "outputs at thresholds, or at any other knob, the best first"
  add(parser, "outputs", "KNOB=FILE", text, nargs="+")
  flags.add_shared(parser, "tolerance", "error_rate")
  kinds = ("textual", "risk_signed", "risk_clipped")
  add(parser, "kind", "NAME", f"loss: {', '.join(kinds)}", "textual", choices=kinds)
  flags.add_shared(parser, "metric")
  add(parser, "references", "FILE", "JSON Lines of {id, targets} of prompts without references")
  text = f"bound: {', '.join(PROMISES)}"
  way = parser.add_mutually_exclusive_group()
  add(way, "promise", "NAME", text, "mean", choices=PROMISES)
  text = "several losses, each with its own tolerance"
  add(way, "risks", "KIND:METRIC:DELTA", text, nargs="+")
  text = "folders of the same prompts; certifies the cheapest of all thresholds"
  add(parser, "configurations", "NAME=DIR", text, nargs="+")
  add(way, "verify", "FILE", "compare a calibration.json with these outputs")
  add(parser, "output", "FILE", "where to write", without="DIRECTORY/calibration.json")
  add(more, "method", "NAME", f"p-values: {', '.join(methods.NAMES)}", "auto")
  choices = {"choices": tuple(testing.PROCEDURES)}
  add(more, "testing", "NAME", ", ".join(choices["choices"]), "fixed_sequence", **choices)
  flags.add_shared(more, "ungrouped")
  text = "most prompts of a cluster, ever: the guarantee is then about prompts"
  add(more, "largest_cluster", "N", text)
  add(more, "share", "X", "quantile: share of texts within the tolerance", 0.95)
  add(more, "labels", "FILE", "every_group: JSON Lines of {id, label}, one a prompt")
  add(more, "depths", "T,T", "early_exits: mean layers a token, rising, as 3,5")
  add(more, "beta", "X", "tail_mean: share of texts that are not counted", 0.9)
  add(more, "start", "X", "tail_mean: where the tail begins, from other prompts", 0.0)
  text = "cost: layers a token over all layers"
  add(more, "at_most", "X", text, 2 / 3, without="%(default).3g")


@run_lib.user_errors
def run(arguments: argparse.Namespace) -> int:
  """Calibrates, prints the table and the guarantee, writes the file."""
  console = rich_console.Console()
  if arguments.output:
    named = (pair.rpartition("=")[2] for pair in arguments.outputs or ())
    read = (arguments.full, arguments.references, *named)
    run_lib.check_output(arguments.output, read=read)
  if arguments.configurations:
    found, cached = _cheapest_configuration(arguments)
    _save(arguments, console, found, cached)
    return 0
  cached = _read(arguments)
  if arguments.verify:
    return _verify(arguments, console, cached)
  _look_at_prompts(arguments, console, cached)
  rates = {
    "error_rate": arguments.error_rate,
    "method": arguments.method,
    "testing_procedure": arguments.testing,
    "largest_cluster": arguments.largest_cluster or 0,
  }
  if arguments.risks:
    found = calibrate_lib.calibrate(risks=_risks(arguments, cached), **rates)
  else:
    promise = _promise(arguments, cached)  # refused before any text is compared
    with Progress(console) as progress:
      losses = _losses(arguments, cached, progress.count(f"{arguments.metric} losses"))
    rates["tolerance"] = arguments.tolerance
    found = calibrate_lib.calibrate(losses, promise=promise, **rates)
  _save(arguments, console, found, cached, shown=cached)
  return 0


def _save(arguments, console, result, cached, *, shown=None) -> None:
  """Writes a calibration, prints it and how it is served, and keeps its ledger."""
  path = pathlib.Path(arguments.output or f"{arguments.directory or '.'}/calibration.json")
  folder = pathlib.Path(arguments.directory or path.parent)
  result.save(path)
  run_lib.print_calibration(console, result, shown)
  print_text(console, f"Written to {path}, digest {result.digest}", soft_wrap=True)
  if path.is_file() and (report := ledger.keep(folder, result, cached.prompts)):  # no device
    print_text(console, report, "yellow")
  model = (cached.provenance.notes or {}).get("model")  # as the user named it
  if result.procedure is not None and isinstance(model, str):
    print_text(console, "Serve it:")
    named = [] if model == "packed" else [f"--model={model}"]
    print(run_lib.infer_command(*named, f"--calibration={path}"), flush=True)


def _read(arguments: argparse.Namespace) -> generations.Generations:
  """The outputs, with the references of --references."""
  elsewhere = arguments.full, arguments.outputs
  if arguments.directory and not any(elsewhere):
    cached = generations.load(arguments.directory)
  elif all(elsewhere) and not arguments.directory:
    names, _, paths = zip(*(pair.rpartition("=") for pair in arguments.outputs), strict=True)
    knobs: Any = _parse_knobs(names)
    cached = foreign.gather(arguments.full, dict(zip(knobs, paths, strict=True)))
  else:
    raise ValueError(
      "Expected the folder of `calm generate`, or both `--full` and `--outputs`."
    )
  if not arguments.references:
    return cached
  found = read_texts(arguments.references, "targets", several=True)
  if unknown := sorted(set(found) - set(cached.ids)):
    raise ValueError(
      f"Expected {arguments.references} to name prompts of these outputs, got {len(unknown)}"
      f" others, first {unknown[:5]}; leave them out."
    )
  prompts = tuple(
    prompt if prompt.targets else dataclasses.replace(prompt, targets=found.get(prompt.id, ()))
    for prompt in cached.prompts
  )
  return dataclasses.replace(cached, prompts=prompts)


def _parse_knobs(values: Sequence[str]) -> list[float] | list[str]:
  """Thresholds as numbers where all are in [0, 1], or the texts of any other knob."""
  found: list[float] = []
  for value in values:
    with contextlib.suppress(ValueError):
      found.append(thresholds_lib.parse_threshold(value))
  if found and len(found) != len(values):
    raise ValueError(
      f"Expected thresholds in [0, 1], or another knob throughout, got both: {list(values)}."
    )
  return found or list(values)


def _losses(arguments, cached, progress=None) -> sequence_losses.SequenceLosses:
  losses = sequence_losses.compute(
    cached, arguments.kind, metric=arguments.metric, progress=progress
  )
  return losses.ungrouped() if arguments.ungrouped else losses


def _look_at_prompts(arguments, console, cached: generations.Generations) -> None:
  """Says how prompts count; refuses those of which nothing could be certified."""
  groups, units = order.known_groups(cached.prompts), cached.ids
  if groups is not None:
    units = units if arguments.ungrouped else groups
    counted = "which count once each: the guarantee is about clusters."
    if arguments.ungrouped:
      counted = "each prompt is taken for an independent draw all the same (--ungrouped)."
    text = f"The {len(groups)} prompts come in {len(set(groups))} clusters (of one group, or of"
    print_text(console, f"{text} equal input); {counted}", "yellow")
  if arguments.risks:
    return
  support = sequence_losses.kind_support(arguments.kind, arguments.metric)
  count, share = len(set(units)), testing.first_share(arguments.testing, len(cached.thresholds))
  clustered = count < len(units)
  if arguments.promise == "mean" and (
    refusal := planning.refusal(
      count,
      arguments.tolerance,
      arguments.error_rate,
      support=Support(support.lower, support.upper) if clustered else support,
      method=arguments.method,
      share=share,
      unit="clusters of prompts" if clustered else "prompts",
    )
  ):
    raise ValueError(refusal)
  # Of signed losses few prompts may certify, if they gain: without change they need as many.
  rate = arguments.error_rate * share
  needed = planning.method_size(arguments.method, arguments.tolerance, rate)
  if support.lower < 0.0 and needed is not None and count < needed:
    text = f"So few prompts certify outputs that get better; unchanged ones need {needed}."
    print_text(console, text, "yellow")


def _promise(
  arguments, cached: generations.Generations, stored: risks_lib.Promise | None = None
) -> risks_lib.Promise:
  """The promise that the flags name, or the stored one, with what it needs of the outputs.

  Raises:
    ValueError: a flag is missing, or the outputs lack something.
  """
  name = arguments.promise if stored is None else stored.name
  if name == "every_group":
    return risks_lib.EveryGroup(labels=_labels(arguments, cached))
  made = (
    stored
    or {
      "mean": risks_lib.Mean,
      "quantile": lambda: risks_lib.Quantile(arguments.share),
      "tail_mean": lambda: risks_lib.TailMean(arguments.beta, arguments.start),
      "cost": lambda: risks_lib.Cost(arguments.at_most),
      "early_exits": lambda: risks_lib.EarlyExits(_depths(arguments.depths)),
    }[name]()
  )
  if name not in ("cost", "early_exits"):
    return made
  counts = cached.layer_counts()
  deepest = max((max(record.exit_layers or (0,)) for record in cached.full), default=0)
  if counts is None or deepest < 1:
    raise ValueError(
      f"--promise={name} needs outputs with `exit_layers`, as of `calm generate`."
    )
  depths = counts[0] / np.maximum(counts[1], 1)
  table = {"costs": depths / deepest} if name == "cost" else {"depths": depths}
  return dataclasses.replace(made, **table)


def _labels(arguments, cached: generations.Generations) -> list[str]:
  if not arguments.labels:
    raise ValueError("--promise=every_group needs `--labels`, a file of {id, label}.")
  found = read_texts(arguments.labels, "label")
  if missing := [name for name in cached.ids if name not in found]:
    raise ValueError(
      f"Expected `--labels` to name every prompt, got none for {len(missing)}, first"
      f" {missing[:5]}."
    )
  return [found[name][0] for name in cached.ids]


def _depths(text: str | None) -> tuple[float, ...]:
  try:
    return tuple(float(part) for part in (text or "").split(","))
  except ValueError:
    raise ValueError(
      "--promise=early_exits needs `--depths`, numbers above 0 that rise, for example"
      f" --depths=3,5; got {text!r}."
    ) from None


def read_texts(path: str, field: str, several: bool = False) -> dict[str, tuple[str, ...]]:
  """{id: its text, or `several`} of a file of {id, `field`}."""
  found: dict[str, tuple[str, ...]] = {}
  for line in storage.read_lines(path, pipes=True):
    name, value = line.value.get("id"), line.value.get(field)
    texts = value if several and isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in (name, *texts)) or name in found:
      raise line.error(f"expected an `id` that is new and `{field}`, got {line.value!r:.100}")
    found[str(name)] = tuple(map(str, texts))
  return found


def _parse_risk(text: str) -> tuple[str, str, float]:
  """(kind, metric, tolerance) of KIND:METRIC:DELTA; metrics may have colons of their own."""
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


def _risks(arguments, cached: generations.Generations) -> list[risks_lib.Risk]:
  """The risks of --risks, or the one of --kind, --metric and --tolerance."""
  own = [f"{arguments.kind}:{arguments.metric}:{arguments.tolerance}"]
  found = []
  for kind, metric, tolerance in map(_parse_risk, arguments.risks or own):
    losses = sequence_losses.compute(cached, kind, metric=metric)
    found.append(
      risks_lib.Risk(losses.ungrouped() if arguments.ungrouped else losses, tolerance)
    )
  return found


def _cheapest_configuration(arguments):
  """(the cheapest certified threshold of all folders, the outputs that it is of, or any)."""
  others = ("directory", "full", "outputs", "verify")
  odd = any(getattr(arguments, name) for name in others) or arguments.promise != "mean"
  if odd or not arguments.output:
    raise ValueError(
      "`--configurations` needs `--output`, and neither other outputs nor `--promise` or"
      " `--verify`."
    )
  risks, costs, runs = {}, {}, []
  for pair in arguments.configurations:
    name, _, folder = pair.partition("=")
    if not name or not folder or name in risks:
      raise ValueError(f"Expected `--configurations` as NAME=DIR, names unique, got {pair!r}.")
    cached = generations.load(folder)
    counts = cached.layer_counts()
    if counts is None:
      raise ValueError(f"Expected a complete run with `exit_layers` in {folder}, got none.")
    risks[name] = _risks(arguments, cached)
    costs[name] = counts[0] / np.maximum(counts[1], 1)
    runs.append(cached)
  found = calibrate_lib.calibrate_configurations(
    risks, costs, error_rate=arguments.error_rate, method=arguments.method
  )
  return found, next((run for run in runs if run.procedure == found.procedure), runs[0])


def _verify(arguments, console, cached: generations.Generations) -> int:
  """Makes a calibration again, by its own rates and method, and says what differs."""
  path = arguments.verify
  stored = calibrate_lib.Calibration.load(path)
  if stored.promise.name not in PROMISES:
    raise ValueError(
      f"Expected one of {list(PROMISES)} to verify, got {stored.promise.name!r}; make it again"
      " and compare the files."
    )
  metric = None if arguments.metric == METRIC else arguments.metric
  # Whoever writes a file would choose what runs: a name in it is never imported.
  allowed = (metric, metrics.get_metric(metric).name) if metric else metrics.METRICS
  if stored.metric not in allowed:
    raise ValueError(
      f"Expected `--metric` {stored.metric!r}, as {path} names it, got {metric or 'none'!r}; if"
      f" you trust that code, add --metric={stored.metric}."
    )
  losses = sequence_losses.compute(cached, stored.kind, metric=metric or stored.metric)
  # Only 'auto' gives parts of one promise different methods: each the one that fits its losses.
  several = len({part.method for part in stored.parts}) > 1
  certify = functools.partial(
    calibrate_lib.calibrate,
    losses if stored.clusters else losses.ungrouped(),
    promise=_promise(arguments, cached, stored.promise),
    tolerance=stored.tolerance,
    error_rate=stored.error_rate,
    method="auto" if several else stored.method,
    testing_procedure=stored.testing,
    randomized="betting_fixed_level" not in stored.methods,
    largest_cluster=stored.largest_cluster,
  )
  again = certify()
  if drawn := again.seed != stored.seed:
    again = certify(seed=stored.seed)
  ours, theirs = again.to_json(), stored.to_json()
  # Digests, provenance and sentences follow from the others.
  names = {**ours, **theirs}.keys() - {"digest", "provenance", "guarantee", "reason"}
  if differ := sorted(name for name in names if not _same(ours.get(name), theirs.get(name))):
    raise ValueError(
      f"Expected {path} to be what these outputs give, got other fields {differ}; calibrate"
      " again."
    )
  sentence = json.loads(pathlib.Path(path).read_bytes())["guarantee"]
  if sentence != stored.guarantee:
    raise ValueError(
      f"Expected `guarantee` of {path} to be the sentence of its numbers,"
      f" {stored.guarantee!r}, got {sentence!r}; calibrate again."
    )
  print_text(console, f"{path} is what these outputs give (digest {stored.digest}).")
  if drawn and stored.order == "permuted":
    text = (
      "Its order is not the one that these outputs give: earlier versions drew the order of"
    )
    text += " outputs without the texts of prompts. It was checked in the order that it names."
    print_text(console, text, "yellow")
  print_text(console, stored.guarantee)
  return 0


def _same(ours, theirs) -> bool:
  """Equal JSON, numbers to nine digits (libraries differ in the last ones)."""
  if isinstance(ours, dict) and isinstance(theirs, dict):
    return set(ours) == set(theirs) and all(_same(ours[key], theirs[key]) for key in ours)
  if isinstance(ours, list) and isinstance(theirs, list):
    return len(ours) == len(theirs) and all(map(_same, ours, theirs))
  if isinstance(ours, float) and isinstance(theirs, float):
    return math.isclose(ours, theirs, rel_tol=1e-9, abs_tol=1e-12)
  return ours == theirs
