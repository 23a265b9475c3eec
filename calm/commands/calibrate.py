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
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich import console as rich_console

from calm import calibrate as calibrate_lib
from calm import storage
from calm.calibrate import (
  Prompt,
  clusters,
  generations,
  methods,
  metrics,
  testing,
)
from calm.calibrate import losses as sequence_losses
from calm.calibrate import risks as risks_lib
from calm.calibrate import thresholds as thresholds_lib
from calm.calibrate.generations import foreign, records
from calm.commands import flags
from calm.commands import run as run_lib
from calm.console import Progress, print_text

# Promises that flags can describe; the others need tables, from Python.
PROMISES = (
  "mean",
  "quantile",
  "every_group",
  "early_exits",
  "tail_mean",
  "cost",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
  add = flags.add
  more = flags.more(parser)
  text = "folder written by `calm generate`"
  parser.add_argument("directory", nargs="?", type=flags.filled, help=text)
  add(parser, "full", "FILE", "JSON Lines of the full model's outputs")
  text = "outputs at thresholds, or at any other knob, the best first"
  add(parser, "outputs", "KNOB=FILE", text, nargs="+")
  flags.add_shared(parser, "tolerance", "error_rate")
  kinds = ("textual", "risk_signed", "risk_clipped")
  add(
    parser,
    "kind",
    "NAME",
    f"loss: {', '.join(kinds)}",
    "textual",
    choices=kinds,
  )
  flags.add_shared(parser, "metric")
  add(
    parser,
    "references",
    "FILE",
    "JSON Lines of {id, targets} of prompts without references",
  )
  text = f"bound: {', '.join(PROMISES)}"
  way = parser.add_mutually_exclusive_group()
  add(way, "promise", "NAME", text, "mean", choices=PROMISES)
  text = "several losses, each with its own tolerance"
  add(way, "risks", "KIND:METRIC:DELTA", text, nargs="+")
  text = "folders of the same prompts; certifies the cheapest of all thresholds"
  add(parser, "configurations", "NAME=DIR", text, nargs="+")
  add(
    parser,
    "output",
    "FILE",
    "where to write",
    without="DIRECTORY/calibration.json",
  )
  add(more, "method", "NAME", f"p-values: {', '.join(methods.NAMES)}", "auto")
  choices = {"choices": tuple(testing.PROCEDURES)}
  add(
    more,
    "testing",
    "NAME",
    ", ".join(choices["choices"]),
    "fixed_sequence",
    **choices,
  )
  flags.add_shared(more, "ungrouped")
  text = "most prompts of a cluster, ever: the guarantee is then about prompts"
  add(more, "largest_cluster", "N", text)
  add(more, "share", "X", "quantile: share of texts within the tolerance", 0.95)
  add(
    more,
    "labels",
    "FILE",
    "every_group: JSON Lines of {id, label}, one a prompt",
  )
  add(more, "depths", "X,X", "early_exits: mean layers a token, rising, as 3,5")
  add(more, "beta", "X", "tail_mean: share of texts that are not counted", 0.9)
  add(
    more,
    "start",
    "X",
    "tail_mean: where the tail begins, from other prompts",
    0.0,
  )
  text = "cost: layers a token over all layers"
  add(more, "at_most", "X", text, 2 / 3, without="%(default).3g")


def run(arguments: argparse.Namespace) -> int:
  console = rich_console.Console()
  if arguments.output:
    named = (pair.rpartition("=")[2] for pair in arguments.outputs or ())
    read = (arguments.full, arguments.references, *named)
    run_lib.check_output(arguments.output, read=read)
  choose = _cheapest_configuration if arguments.configurations else _threshold
  found, cached = choose(arguments, console)
  path = pathlib.Path(
    arguments.output or f"{arguments.directory or '.'}/calibration.json"
  )
  found.save(path)
  run_lib.print_calibration(
    console, found, None if arguments.configurations else cached
  )
  print_text(
    console, f"Written to {path}, digest {found.digest}", soft_wrap=True
  )
  model = (cached.provenance.notes or {}).get("model")  # as the user named it
  if found.procedure is not None and isinstance(model, str):
    named = [] if model == "packed" else [f"--model={model}"]
    words = ("infer", *named, f"--calibration={path}", "a long text")
    run_lib.print_next(console, "Serve it:", *words)
  return 0


def _threshold(arguments, console: rich_console.Console):
  """(the calibration of one grid, the outputs that it is of)."""
  cached = _read(arguments)
  rates = {
    "error_rate": arguments.error_rate,
    "method": arguments.method,
    "testing_procedure": arguments.testing,
    "largest_cluster": arguments.largest_cluster or 0,
  }
  groups = clusters.known_groups(clusters.prompt_clusters(cached.prompts))
  if groups is not None:
    counted = "which count once each: the guarantee is about clusters."
    if arguments.ungrouped:
      counted = (
        "each prompt is taken for an independent draw all the same "
        "(--ungrouped)."
      )
    text = (
      f"The {len(groups)} prompts come in {len(set(groups))} clusters (of "
      "one group, or of"
    )
    print_text(console, f"{text} equal input); {counted}", "yellow")
  if arguments.risks:
    return calibrate_lib.calibrate(
      risks=_risks(arguments, cached), **rates
    ), cached
  promise = _promise(arguments, cached)  # refused before any text is compared
  with Progress(console) as progress:
    report = progress.count(f"{arguments.metric} losses")
    losses = _losses(
      arguments, cached, arguments.kind, arguments.metric, report
    )
  rates["tolerance"] = arguments.tolerance
  return calibrate_lib.calibrate(losses, promise=promise, **rates), cached


def _read(arguments: argparse.Namespace) -> generations.Generations:
  """The outputs, with the references of --references."""
  elsewhere = arguments.full, arguments.outputs
  if arguments.directory and not any(elsewhere):
    cached = generations.load(arguments.directory)
  elif all(elsewhere) and not arguments.directory:
    names, _, paths = zip(
      *(pair.rpartition("=") for pair in arguments.outputs), strict=True
    )
    knobs: Any = _parse_knobs(names)
    cached = foreign.gather(
      arguments.full, dict(zip(knobs, paths, strict=True))
    )
  else:
    raise ValueError(
      "Expected a folder of `calm generate`, or both `--full` and `--outputs`."
    )
  if not arguments.references:
    return cached
  found = read_texts(arguments.references, "targets", several=True)
  if unknown := sorted(set(found) - set(cached.ids)):
    expected = (
      f"Expected {arguments.references} to name prompts of these outputs"
    )
    raise ValueError(
      f"{expected}, got {len(unknown)} others, first {unknown[:5]}."
    )
  prompts = tuple(
    prompt
    if prompt.targets
    else dataclasses.replace(prompt, targets=found.get(prompt.id, ()))
    for prompt in cached.prompts
  )
  return dataclasses.replace(cached, prompts=prompts)


def _parse_knobs(values: Sequence[str]) -> list[float] | list[str]:
  """Thresholds as numbers where all are in [0, 1], or the texts of any other
  knob.
  """
  found: list[float] = []
  for value in values:
    with contextlib.suppress(ValueError):
      found.append(thresholds_lib.parse_threshold(value))
  if found and len(found) != len(values):
    raise ValueError(
      "Expected thresholds in [0, 1] or another knob, got both: "
      f"{list(values)}."
    )
  return found or list(values)


def _losses(
  arguments, cached, kind, metric, progress=None
) -> sequence_losses.SequenceLosses:
  losses = sequence_losses.compute(
    cached, kind, metric=metric, progress=progress
  )
  return losses.ungrouped() if arguments.ungrouped else losses


def _promise(arguments, cached: generations.Generations) -> risks_lib.Promise:
  """The promise that the flags name, with what it needs of the outputs."""
  name = arguments.promise
  deepest = 1
  depths = np.empty(0)
  if name == "early_exits" and not arguments.depths:
    raise ValueError("--promise=early_exits needs `--depths`, like 3,5.")
  if name in ("cost", "early_exits"):
    counts = cached.layer_counts()
    deepest = max(
      (max(record.exit_layers or (0,)) for record in cached.full), default=0
    )
    if counts is None or deepest < 1:
      raise ValueError(f"--promise={name} needs outputs with `exit_layers`.")
    depths = counts[0] / np.maximum(counts[1], 1)
  return {
    "mean": risks_lib.Mean,
    "quantile": lambda: risks_lib.Quantile(arguments.share),
    "every_group": lambda: risks_lib.EveryGroup(
      labels=_labels(arguments, cached)
    ),
    "tail_mean": lambda: risks_lib.TailMean(arguments.beta, arguments.start),
    "cost": lambda: risks_lib.Cost(arguments.at_most, costs=depths / deepest),
    "early_exits": lambda: risks_lib.EarlyExits(
      arguments.depths, depths=depths
    ),
  }[name]()


def _labels(arguments, cached: generations.Generations) -> list[str]:
  if not arguments.labels:
    raise ValueError(
      "--promise=every_group needs `--labels`, a file of {id, label}."
    )
  found = read_texts(arguments.labels, "label")
  if missing := [name for name in cached.ids if name not in found]:
    got = f"got none for {len(missing)}, first {missing[:5]}"
    raise ValueError(f"Expected `--labels` to name every prompt, {got}.")
  return [found[name][0] for name in cached.ids]


def read_texts(
  path: str, field: str, several: bool = False
) -> dict[str, tuple[str, ...]]:
  """{id: its text, or `several`} of a file of {id, `field`}."""

  def parse(line: storage.Line) -> Prompt:
    given: Any = line.value.get
    return Prompt(given("id"), "", given(field) if several else (given(field),))

  found = records.read_each(
    path, parse, f"an `id` and its `{field}`", pipes=True
  )
  return {prompt.id: prompt.targets for _, prompt in found}


def _parse_risk(text: str) -> tuple[str, str, float]:
  """(kind, metric, tolerance) of KIND:METRIC:DELTA; metrics may have colons of
  their own.
  """
  kind, _, rest = text.partition(":")
  metric, _, number = rest.rpartition(":")
  try:
    tolerance = float(number)
  except ValueError:
    tolerance = -1.0
  if not metric or not 0.0 < tolerance < 1.0:
    raise ValueError(
      f"Expected `--risks` like textual:rouge_l:0.1, got {text!r}."
    )
  sequence_losses.kind_support(kind, metric)
  return kind, metrics.get_metric(metric).name, tolerance


def _risks(arguments, cached: generations.Generations) -> list[risks_lib.Risk]:
  """The risks of --risks, or the one of --kind, --metric and --tolerance."""
  own = [f"{arguments.kind}:{arguments.metric}:{arguments.tolerance}"]
  return [
    risks_lib.Risk(_losses(arguments, cached, kind, metric), tolerance)
    for kind, metric, tolerance in map(_parse_risk, arguments.risks or own)
  ]


def _cheapest_configuration(arguments, console: rich_console.Console):
  """(the cheapest certified threshold of all folders, the outputs that it is
  of, or any).
  """
  others = ("directory", "full", "outputs")
  odd = (
    any(getattr(arguments, name) for name in others)
    or arguments.promise != "mean"
  )
  if odd or not arguments.output:
    raise ValueError(
      "`--configurations` needs `--output`, and no other outputs or "
      "`--promise`."
    )
  risks = {}
  costs = {}
  runs = []
  for pair in arguments.configurations:
    name, _, folder = pair.partition("=")
    if not name or not folder or name in risks:
      raise ValueError(
        f"Expected `--configurations` as NAME=DIR, names unique, got {pair!r}."
      )
    cached = generations.load(folder)
    counts = cached.layer_counts()
    if counts is None:
      raise ValueError(
        f"Expected a complete run with `exit_layers` in {folder}, got none."
      )
    risks[name] = _risks(arguments, cached)
    costs[name] = counts[0] / np.maximum(counts[1], 1)
    runs.append(cached)
  found = calibrate_lib.calibrate_configurations(
    risks, costs, error_rate=arguments.error_rate, method=arguments.method
  )
  return found, next(
    (run for run in runs if run.procedure == found.procedure), runs[0]
  )
