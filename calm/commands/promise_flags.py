"""The promise that the flags of `calm calibrate` name."""

import argparse
from collections.abc import Sequence

import numpy as np

from calm import storage
from calm.calibrate import generations, promises
from calm.calibrate.generations import order, records

# Promises that flags can describe; the others need tables, from Python.
PROMISES = ("mean", "quantile", "every_group", "early_exits", "tail_mean", "cost")


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares the options of what is promised."""
  numbers = {"type": float, "metavar": "X"}
  parser.add_argument(
    "--promise",
    choices=[name for name in promises.PROMISES if name in PROMISES],
    default="mean",
    metavar="NAME",
    help=f"what is bounded: {', '.join(PROMISES)}; README of calm/calibrate (default"
    " %(default)s)",
  )
  parser.add_argument(
    "--share",
    default=0.95,
    help="quantile: share of texts within the tolerance (default %(default)s)",
    **numbers,
  )
  parser.add_argument(
    "--labels", metavar="FILE", help="every_group: JSON Lines of {id, label}, one a prompt"
  )
  parser.add_argument(
    "--depths", metavar="T,T", help="early_exits: mean layers a token, rising, as 3,5"
  )
  parser.add_argument(
    "--beta",
    default=0.9,
    help="tail_mean: share of texts that are not counted (default %(default)s)",
    **numbers,
  )
  parser.add_argument(
    "--start",
    default=0.0,
    help="tail_mean: where the tail begins, from other prompts (default %(default)s)",
    **numbers,
  )
  parser.add_argument(
    "--at_most",
    default=2 / 3,
    help="cost: layers a token over all layers (default %(default).3g)",
    **numbers,
  )
  parser.set_defaults(cost_share=promises.Cost.share)  # others are made in Python alone


def add_ungrouped(parser) -> None:
  """Declares `--ungrouped`."""
  parser.add_argument(
    "--ungrouped",
    action="store_true",
    help="take prompts of one group, or of equal input, for independent draws",
  )


def clusters_of(arguments, prompts: Sequence[records.Prompt]) -> tuple[str, ...] | None:
  """[num_prompts] clusters that are tested; None where prompts are, as `--ungrouped` says."""
  return None if arguments.ungrouped else order.known_groups(prompts)


def describe_clusters(arguments, prompts: Sequence[records.Prompt]) -> str:
  """How many clusters the prompts come in and what that means; '' where they come in none."""
  groups = order.known_groups(prompts)
  if groups is None:
    return ""
  counted = (
    "each prompt is taken for an independent draw all the same (--ungrouped)."
    if arguments.ungrouped
    else "which count once each: the promise is about clusters."
  )
  return (
    f"The {len(groups)} prompts come in {len(set(groups))} clusters (of one group, or of equal"
    f" input); {counted}"
  )


def promise_of(
  arguments: argparse.Namespace, cached: generations.Generations
) -> promises.Promise:
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
      f"Expected outputs with `exit_layers` for --promise={arguments.promise}, got none; use"
      " outputs of `calm generate`."
    )
  layers, tokens = counts
  depths = layers / np.maximum(tokens, 1)
  if arguments.promise == "cost":
    return promises.Cost(arguments.at_most, arguments.cost_share, costs=depths / deepest)
  if not arguments.depths:
    raise ValueError(
      "Expected `--depths` for --promise=early_exits, got none; give them as in 3,5."
    )
  try:
    limits = tuple(float(text) for text in arguments.depths.split(","))
    return promises.EarlyExits(limits, depths=depths)
  except ValueError as error:
    raise ValueError(
      "Expected `--depths` to be numbers above 0 that rise, as 3,5, got"
      f" {arguments.depths!r} ({error})"
    ) from error


def _labels(arguments, cached: generations.Generations) -> list[str]:
  if not arguments.labels:
    raise ValueError(
      "Expected `--labels` for --promise=every_group, got none; give a file of {id, label}."
    )
  found = {}
  for line in storage.read_lines(arguments.labels, pipes=True):
    name, label = line.value.get("id"), line.value.get("label")
    if not isinstance(name, str) or not isinstance(label, str) or name in found:
      raise line.error(f"expected an `id` that is new and a `label`, got {line.value!r:.100}")
    found[name] = label
  missing = [name for name in cached.ids if name not in found]
  if missing:
    raise ValueError(
      f"Expected `--labels` to name every prompt, got none for {len(missing)}, first"
      f" {missing[:5]}."
    )
  return [found[name] for name in cached.ids]
