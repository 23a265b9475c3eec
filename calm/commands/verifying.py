"""`calm calibrate --verify`: what a calibration says, against one that is made again."""

import argparse
import math

from calm.calibrate import Calibration, promises
from calm.calibrate.losses import metrics
from calm.commands import promise_flags

# The default of --metric.
METRIC = "rouge_l"


def take_over(arguments: argparse.Namespace, told: Calibration) -> None:
  """Sets the flags to those that a calibration was made with.

  Raises:
    ValueError: its promise needs tables that no flag names, or its metric is neither built in
      nor that of `--metric`.
  """
  if told.promise.name not in promise_flags.PROMISES:
    raise ValueError(
      f"Expected a calibration of one of {list(promise_flags.PROMISES)} to verify, got"
      f" {told.promise.name!r}; make it again and compare the files."
    )
  arguments.tolerance, arguments.error_rate = told.tolerance, told.error_rate
  given = None if arguments.metric == METRIC else arguments.metric
  metrics.stored_metric(told.metric, given)
  arguments.kind, arguments.metric = told.kind, given or told.metric
  # Only 'auto' gives parts of one promise different methods: each the one that fits its losses.
  several = len({part.method for part in told.parts}) > 1
  arguments.method = "auto" if several else told.method
  arguments.testing = told.testing
  arguments.ungrouped = not told.clusters
  arguments.promise = told.promise.name
  for name, value in told.promise.to_json().items():
    if name == "limits_of_depth":
      arguments.depths = ",".join(map(repr, value))
    elif name in ("share", "beta", "start", "at_most"):
      setattr(arguments, name, value)
  if isinstance(told.promise, promises.Cost):  # its share is another thing than --share
    arguments.cost_share = told.promise.share


def differences(told: Calibration, again: Calibration) -> list[str]:
  """Fields that differ; digests, provenance and sentences follow from the others."""
  ours, theirs = again.to_json(), told.to_json()
  ignored = {"digest", "provenance", "guarantee", "reason"}
  names = {**ours, **theirs}.keys() - ignored  # files leave out what is as it mostly is
  return sorted(name for name in names if not _same(ours.get(name), theirs.get(name)))


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
