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
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich import console as rich_console

from calm import calibrate as calibrate_lib
from calm import storage
from calm.calibrate import (
  generations,
  methods,
  metrics,
  planning,
  testing,
  thresholds,
)
from calm.calibrate import losses as sequence_losses
from calm.calibrate import risks as risks_lib
from calm.calibrate.generations import foreign
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
  add(more, "testing", "NAME", ", ".join(testing.PROCEDURES), "fixed_sequence")
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
  # Others come only from Python, and from what is stored.
  parser.set_defaults(cost_share=risks_lib.Cost.share, randomized=True)


@run_lib.user_errors
def run(arguments: argparse.Namespace) -> int:
  """Calibrates, prints the table and the guarantee, writes the file."""
  console = rich_console.Console()
  if arguments.output:
    named = (pair.rpartition("=")[2] for pair in arguments.outputs or ())
    read = (arguments.full, arguments.references, *named)
    run_lib.check_output(arguments.output, read=read)
  if arguments.configurations:
    found, model, prompts = _cheapest_configuration(arguments)
    _save(arguments, console, found, prompts, model=model)
    return 0
  cached = _read(arguments)
  if arguments.verify:
    return _verify(arguments, console, cached)
  run_lib.print_clusters(arguments, console, cached.prompts)
  if arguments.risks:
    found = calibrate_lib.calibrate(risks=_risks(arguments, cached), **_rates(arguments))
  else:
    _plan(arguments, console, cached)
    found = _make(arguments, console, cached)
  _save(arguments, console, found, cached.prompts, cached=cached, model=_model(cached))
  return 0


def _save(arguments, console, result, prompts, **options) -> None:
  folder = arguments.directory or "."
  path = pathlib.Path(arguments.output or pathlib.Path(folder) / "calibration.json")
  folder = pathlib.Path(arguments.directory or path.parent)
  run_lib.save_calibration(console, result, path, prompts, folder=folder, **options)


def _model(cached: generations.Generations) -> object:
  """The model that outputs were decoded with, as the user named it; None: unknown."""
  return (cached.provenance.notes or {}).get("model")


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
      found.append(thresholds.parse_threshold(value))
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


def _rates(arguments: argparse.Namespace) -> dict[str, Any]:
  """Keyword arguments of `calibrate` without the tolerance."""
  return {
    "error_rate": arguments.error_rate,
    "method": arguments.method,
    "testing_procedure": arguments.testing,
    "randomized": arguments.randomized,
    "largest_cluster": arguments.largest_cluster or 0,
  }


def _plan(arguments, console, cached: generations.Generations) -> None:
  """Refuses, before any work, where nothing could be certified; warns where little could."""
  support = sequence_losses.kind_support(arguments.kind, arguments.metric)
  units = run_lib.tested_clusters(arguments, cached.prompts) or cached.ids
  share = 1.0
  if arguments.testing in testing.PROCEDURES:
    share = testing.first_share(arguments.testing, len(cached.thresholds))
  if arguments.promise == "mean":
    run_lib.refuse_few(arguments, units, support, arguments.method, share)
  # Of signed losses few prompts may certify, if they gain: without change they need as many.
  rate = arguments.error_rate * share
  needed = planning.method_size(arguments.method, arguments.tolerance, rate)
  if support.lower < 0.0 and needed is not None and len(set(units)) < needed:
    text = f"So few prompts certify outputs that get better; unchanged ones need {needed}."
    print_text(console, text, "yellow")


def _make(
  arguments, console, cached: generations.Generations, seed: str | None = None
) -> calibrate_lib.Calibration:
  """The calibration that the flags ask for."""
  promise = _promise(arguments, cached)  # refused before any text is compared
  with Progress(console) as progress:
    losses = _losses(arguments, cached, progress.count(f"{arguments.metric} losses"))
  rates = _rates(arguments) | {"tolerance": arguments.tolerance}
  return calibrate_lib.calibrate(losses, promise=promise, seed=seed, **rates)


def _promise(arguments, cached: generations.Generations) -> risks_lib.Promise:
  """The promise that the flags name, with what it needs of the outputs.

  Raises:
    ValueError: a flag is missing, or the outputs lack something.
  """
  name = arguments.promise
  if name == "quantile":
    return risks_lib.Quantile(arguments.share)
  if name == "tail_mean":
    return risks_lib.TailMean(arguments.beta, arguments.start)
  if name == "every_group":
    if not arguments.labels:
      raise ValueError("--promise=every_group needs `--labels`, a file of {id, label}.")
    found = read_texts(arguments.labels, "label")
    if missing := [name for name in cached.ids if name not in found]:
      raise ValueError(
        f"Expected `--labels` to name every prompt, got none for {len(missing)}, first"
        f" {missing[:5]}."
      )
    return risks_lib.EveryGroup(labels=[found[name][0] for name in cached.ids])
  if name == "mean":
    return risks_lib.Mean()
  counts = cached.layer_counts()
  deepest = max((max(record.exit_layers or (0,)) for record in cached.full), default=0)
  if counts is None or deepest < 1:
    raise ValueError(
      f"--promise={name} needs outputs with `exit_layers`, as of `calm generate`."
    )
  depths = counts[0] / np.maximum(counts[1], 1)
  if name == "cost":
    return risks_lib.Cost(arguments.at_most, arguments.cost_share, costs=depths / deepest)
  try:
    limits = tuple(float(text) for text in (arguments.depths or "").split(","))
    return risks_lib.EarlyExits(limits, depths=depths)
  except ValueError as error:
    raise ValueError(
      "--promise=early_exits needs `--depths`, numbers above 0 that rise, for example"
      f" --depths=3,5; got {arguments.depths!r} ({error})."
    ) from error


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
  """(the cheapest certified threshold of all folders, its model as named, the prompts)."""
  others = ("directory", "full", "outputs", "verify")
  odd = any(getattr(arguments, name) for name in others) or arguments.promise != "mean"
  if odd or not arguments.output:
    raise ValueError(
      "`--configurations` needs `--output`, and neither other outputs nor `--promise` or"
      " `--verify`."
    )
  risks, costs, models, prompts = {}, {}, [], ()
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
    prompts = cached.prompts
    models.append((cached.procedure, _model(cached)))
  found = calibrate_lib.calibrate_configurations(
    risks, costs, error_rate=arguments.error_rate, method=arguments.method
  )
  chosen = (model for procedure, model in models if procedure == found.procedure)
  return found, next(chosen, None), prompts


def _verify(arguments, console, cached: generations.Generations) -> int:
  """Makes a calibration again, by its own rates and method, and says what differs."""
  path = arguments.verify
  stored = calibrate_lib.Calibration.load(path)
  _apply_stored_flags(arguments, stored)
  again = _make(arguments, console, cached)
  if drawn := again.seed != stored.seed:
    again = _make(arguments, console, cached, stored.seed)
  if differ := _differences(stored, again):
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
    print_text(
      console,
      "Its order is not the one that these outputs give: earlier versions drew the order of"
      " outputs without the texts of prompts. It was checked in the order that it names.",
      "yellow",
    )
  print_text(console, stored.guarantee)
  return 0


def _apply_stored_flags(arguments, stored: calibrate_lib.Calibration) -> None:
  """Sets the flags to those that a calibration was made with.

  Raises:
    ValueError: its promise needs tables that no flag names, or its metric is neither built in
      nor that of `--metric`.
  """
  promise = stored.promise
  if promise.name not in PROMISES:
    raise ValueError(
      f"Expected one of {list(PROMISES)} to verify, got {promise.name!r}; make it again and"
      " compare the files."
    )
  arguments.tolerance, arguments.error_rate = stored.tolerance, stored.error_rate
  metric = None if arguments.metric == METRIC else arguments.metric
  # Whoever writes a file would choose what runs: a name in it is never imported.
  allowed = (metric, metrics.get_metric(metric).name) if metric else metrics.METRICS
  if stored.metric not in allowed:
    raise ValueError(
      f"Expected `--metric` {stored.metric!r}, as {arguments.verify} names it, got"
      f" {metric or 'none'!r}; if you trust that code, add --metric={stored.metric}."
    )
  arguments.kind, arguments.metric = stored.kind, metric or stored.metric
  # Only 'auto' gives parts of one promise different methods: each the one that fits its losses.
  several = len({part.method for part in stored.parts}) > 1
  arguments.method = "auto" if several else stored.method
  arguments.randomized = "betting_fixed_level" not in stored.methods
  arguments.largest_cluster = stored.largest_cluster
  arguments.testing, arguments.ungrouped = stored.testing, not stored.clusters
  arguments.promise = promise.name
  for name, value in promise.to_json().items():
    if name == "limits_of_depth":
      arguments.depths = ",".join(map(repr, value))
    elif name in ("share", "beta", "start", "at_most"):
      setattr(arguments, name, value)
  if isinstance(promise, risks_lib.Cost):  # its share is another thing than --share
    arguments.cost_share = promise.share


def _differences(
  stored: calibrate_lib.Calibration, again: calibrate_lib.Calibration
) -> list[str]:
  """Fields that differ; digests, provenance and sentences follow from the others."""
  ours, theirs = again.to_json(), stored.to_json()
  names = {**ours, **theirs}.keys() - {"digest", "provenance", "guarantee", "reason"}
  return sorted(name for name in names if not _same(ours.get(name), theirs.get(name)))


def _same(ours, theirs) -> bool:
  """Equal JSON, numbers to nine digits (libraries differ in the last ones)."""
  if isinstance(ours, dict) and isinstance(theirs, dict):
    return set(ours) == set(theirs) and all(_same(ours[key], theirs[key]) for key in ours)
  if isinstance(ours, list) and isinstance(theirs, list):
    return len(ours) == len(theirs) and all(map(_same, ours, theirs))
  if isinstance(ours, float) and isinstance(theirs, float):
    return math.isclose(ours, theirs, rel_tol=1e-9, abs_tol=1e-12)
  return ours == theirs
