"""`calm infer --monitor`: a share of the prompts is decoded at full depth too, and watched."""

import argparse
import hashlib
import json
import pathlib
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from typing import Any

from calm.calibrate import NEVER_EXIT, Calibration, Prompt, audit, promises
from calm.calibrate.losses import metrics

# Exit status of a run with an alarm, where it was asked for.
ALARM_STATUS = 3
# Share of the prompts that is checked by default; more where a promise is on trial.
SHARE, TRIAL_SHARE = 0.05, 0.25
# Probability of a false alarm, ever, where none is named.
LEVEL = 0.05
# Bets are on the mean of the loss as it is. These bound it by `tolerance`; all others bound
# transforms, parts or other losses. Of the cost nothing is seen.
_WATCHED = (promises.Mean, promises.Cost)


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares the options of a monitor."""
  parser.add_argument(
    "--allow_platform",
    action="store_true",
    help="serve a calibration that was made on another platform, or with another matmul"
    " precision, on trial: a share of the prompts is decoded at full depth too and watched, as"
    " by --monitor",
  )
  parser.add_argument(
    "--monitor",
    metavar="FILE",
    help="watch the promise of a mean loss while it is served: decode a share of the prompts at"
    " full depth too, bet on how the texts differ, and keep the bets in this file from run to"
    " run",
  )
  parser.add_argument(
    "--monitor_share",
    type=float,
    metavar="SHARE",
    help="share of prompts, chosen by a hash of their ids, that --monitor checks (default"
    f" {SHARE}; {TRIAL_SHARE} with --allow_platform)",
  )
  parser.add_argument(
    "--monitor_level",
    type=float,
    metavar="LEVEL",
    help=f"probability that --monitor ever raises a false alarm (default {LEVEL})",
  )
  parser.add_argument(
    "--metric",
    metavar="NAME",
    help="metric of the calibration again, where it is not a built-in one: a name in a file is"
    " never imported (file.py:function or module:function)",
  )
  parser.add_argument(
    "--fail_on_alarm",
    action="store_true",
    help=f"end with exit status {ALARM_STATUS} if the monitor has raised its alarm",
  )


class Monitored:
  """A monitor and the model that it asks."""

  def __init__(self, predictor: Any, monitor: audit.Monitor, metric: metrics.Metric):
    self._predictor, self._monitor, self._metric = predictor, monitor, metric
    self._before, self._repeated = monitor.wealth.count, monitor.repeated
    self._lost = monitor.waiting
    for number in self._lost:
      # Its run was killed before the loss was known; this makes no false alarm more likely.
      monitor.record(number, monitor.watch.support.lower)

  @property
  def alarm(self) -> bool:
    """Whether the risk has been shown to exceed the tolerance, in this run or before."""
    return self._monitor.alarm

  def check(self, prompts: Sequence[Prompt], outputs: Sequence[Any]) -> None:
    """Counts served outputs, and decodes those at full depth that the coin picks."""

    def full_model(rows: list[int]) -> list[str]:
      texts = [prompts[row].input for row in rows]
      return [output.text for output in self._predictor.generate(texts, threshold=NEVER_EXIT)]

    self._monitor.check(
      [output.text for output in outputs],
      full_model,
      self._metric,
      names=[prompt.id for prompt in prompts],
    )

  def report(self) -> str:
    """What is known by now, in words."""
    monitor, watch = self._monitor, self._monitor.watch
    checked = monitor.wealth.count
    count = (
      f"Monitor: {checked - self._before} of these prompts were decoded at full depth too,"
      f" {checked} of {monitor.served} so far; evidence against the promise: p ="
      f" {monitor.p_value:.3g}."
    )
    lost = (
      f" {len(self._lost)} of a run that was killed count as unchanged." if self._lost else ""
    )
    if repeated := monitor.repeated - self._repeated:
      lost += (
        f" {repeated} were not checked, as their ids had been before: a prompt that is served"
        " again is no independent draw. Give new prompts ids of their own."
      )
    if self._predictor.platform_mismatch:
      count = f"{self._trial(checked)} {count}"
    if not monitor.alarm:
      return f"{count}{lost} No alarm."
    return (
      f"{count}{lost} ALARM: the expected loss of the prompts that are served has been above"
      f" {watch.tolerance:.10g} (a false alarm, ever, has probability at most"
      f" {watch.alarm_level:.10g}). Calibrate again on prompts like these."
    )

  def _trial(self, checked: int) -> str:
    found = (
      "None of these prompts was checked: raise --monitor_share."
      if not checked
      else "What was checked here is below; it can speak against the promise, not renew it."
    )
    return (
      "Served on trial, the calibration being made elsewhere:"
      f" {self._predictor.platform_mismatch}. {found}"
    )


def open_monitored(
  arguments: argparse.Namespace, predictor: Any, threshold: float
) -> Monitored | None:
  """The monitor that was asked for, or that a promise from elsewhere needs, or None.

  Raises:
    ValueError: there is no promise of a mean loss that full-depth texts can check, its metric
      is neither built in nor that of `--metric`, or an option leaves its range.
    LockedError: another process writes the monitor's file.
  """
  on_trial = bool(predictor.platform_mismatch) and threshold not in (NEVER_EXIT, None)
  if arguments.monitor is None and not on_trial:
    for name in ("fail_on_alarm", "monitor_share", "monitor_level", "metric"):
      if (given := getattr(arguments, name)) is not None and given is not False:
        raise ValueError(f"Expected `--monitor` beside `--{name}`, got none; name a file.")
    return None
  promise = _promise(predictor.calibration, threshold)
  metric = metrics.stored_metric(promise.metric, arguments.metric)
  share = arguments.monitor_share
  if share is None:
    share = TRIAL_SHARE if on_trial else SHARE
  watch = audit.Watch(
    tolerance=promise.tolerance,
    alarm_level=LEVEL if arguments.monitor_level is None else arguments.monitor_level,
    sampling_rate=share,
    seed=_digest(promise),
    support=promise.support,
    calibration_digest=_digest(promise),
  )
  if arguments.monitor is not None:
    return Monitored(predictor, audit.open_monitor(arguments.monitor, watch), metric)
  folder = tempfile.mkdtemp(prefix="calm-monitor-")  # nobody asked to keep it
  monitor = audit.open_monitor(pathlib.Path(folder) / "monitor.jsonl", watch)
  weakref.finalize(monitor, shutil.rmtree, folder, True)
  return Monitored(predictor, monitor, metric)


def _promise(calibration: Calibration | None, threshold: float) -> Calibration:
  if calibration is None or calibration.threshold != threshold or threshold == NEVER_EXIT:
    raise ValueError(
      "Expected `--monitor` with a calibration and its own threshold, got no promise to watch;"
      " name a calibration.json that certified a threshold, and leave `--threshold` out."
    )
  if not isinstance(calibration.promise, _WATCHED):
    names = " or ".join(repr(promise.name) for promise in _WATCHED)
    raise ValueError(
      f"Expected `--monitor` or `--allow_platform` with the promise {names}, whose mean loss is"
      f" what is watched, got {calibration.promise.name!r}, which bounds something else; leave"
      " `--monitor` out, calibrate on this platform (or with --promise=mean), or record what it"
      " bounds yourself: `calm.calibrate.audit`."
    )
  if calibration.kind != "textual" or calibration.clusters:
    unit = "clusters of prompts" if calibration.clusters else "prompts"
    raise ValueError(
      "Expected `--monitor` with a promise on the textual loss of single prompts, which texts"
      f" at full depth show, got {calibration.kind!r} over {unit}; record such losses yourself:"
      " `calm.calibrate.audit`."
    )
  return calibration


def _digest(calibration: Calibration) -> str:
  text = json.dumps(calibration.to_json(), sort_keys=True, ensure_ascii=False)
  return hashlib.sha256(text.encode()).hexdigest()[:32]
