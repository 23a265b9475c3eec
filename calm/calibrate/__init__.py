"""Distribution-free calibration of early exits, with numpy and scipy: no JAX.

    generations   cached outputs per threshold, on disk and in memory (`load`, `open_writer`)
    losses        cached outputs -> losses [num_examples, num_thresholds]
    metrics       text metrics; `label_requests` asks for references where a loss needs them
    evidence      losses -> p-value of "the expected loss exceeds the tolerance" -> certified?
    certify       all of it: `calibrate(losses, ...)` -> `calibration.Calibration`
    configurations  one of many configurations, for several risks: Pareto testing
    promises      what can be promised besides the mean: quantiles, groups, tails, costs, ...
    verification  what a calibration's file must be before its promise is spoken
    ledger        what else was calibrated on the same prompts, and what that costs
    planning      how many prompts are needed, before any is decoded
    sequential    stops decoding prompts as soon as the outcome is clear
    trials        the paper's 50 splits, and whether the promise holds as often as it says
    audit         a watch on a deployed threshold
    seconds       what was measured of a threshold beside full depth, kept with the calibration

The shortest way, from losses of any origin:

    from calm import calibrate
    result = calibrate.calibrate(losses, [0.9, 0.8, 0.7], tolerance=0.1, error_rate=0.05)
    result.threshold, result.guarantee
"""

from calm.calibrate import promises
from calm.calibrate.calibration import Calibration
from calm.calibrate.certify import calibrate
from calm.calibrate.configurations import calibrate_configurations
from calm.calibrate.generations.cache import load
from calm.calibrate.generations.procedure import Procedure, Provenance
from calm.calibrate.generations.records import GenerationsError, Prompt, Record
from calm.calibrate.generations.writer import open_writer
from calm.calibrate.losses import (
  SequenceLosses,
  Support,
  from_texts,
  risk_losses,
  textual_losses,
)
from calm.calibrate.thresholds import NEVER_EXIT, default_grid

__all__ = [
  "NEVER_EXIT",
  "Calibration",
  "GenerationsError",
  "Procedure",
  "Prompt",
  "Provenance",
  "Record",
  "SequenceLosses",
  "Support",
  "audit",
  "calibrate",
  "calibrate_configurations",
  "default_grid",
  "evidence",
  "from_texts",
  "generations",
  "label_requests",
  "ledger",
  "load",
  "losses",
  "metrics",
  "open_writer",
  "planning",
  "promises",
  "risk_losses",
  "seconds",
  "sequential",
  "textual_losses",
  "thresholds",
  "trials",
  "views",
]
