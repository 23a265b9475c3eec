"""Distribution-free calibration of early exits, with numpy and scipy: no JAX.

    generations   cached outputs per threshold, on disk and in memory (`load`, `open_writer`)
    losses        cached outputs -> losses [num_examples, num_thresholds]
    methods       losses -> p-values of "the expected loss exceeds the tolerance": `p_values` of
                  the sum (the paper's is `p_values.hoeffding_bentkus`), or `betting`
    testing       p-values -> what is certified: fixed sequence, fallback, Holm
    certify       all of it: `calibrate(losses, ...)` -> `calibration.Calibration`
    risks         what can be promised: mean, quantiles, groups, tails, costs, ...
    configurations  the cheapest of many configurations
    verification  validation of calibration files
    ledger        the calibrations on the same prompts, and what they cost
    planning      how many prompts are needed, before any is decoded
    sequential    stops decoding prompts as soon as the outcome is clear
    trials        the paper's 50 splits, and whether the promise holds as often as it says
    monitor       watches a deployed threshold
    seconds       measured seconds beside full depth, kept with the calibration

The shortest way, from losses of any origin:

    from calm import calibrate
    result = calibrate.calibrate(losses, [0.9, 0.8, 0.7], tolerance=0.1, error_rate=0.05)
    result.threshold, result.guarantee
"""

from calm.calibrate import monitor, risks
from calm.calibrate.calibration import Calibration
from calm.calibrate.certify import calibrate, each_group
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

# The names of versions before.
promises, audit = risks, monitor

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
  "betting",
  "calibrate",
  "calibrate_configurations",
  "default_grid",
  "display",
  "each_group",
  "from_texts",
  "generations",
  "label_requests",
  "ledger",
  "load",
  "losses",
  "methods",
  "metrics",
  "monitor",
  "open_writer",
  "p_values",
  "planning",
  "risk_losses",
  "risks",
  "seconds",
  "sequential",
  "testing",
  "textual_losses",
  "thresholds",
  "trials",
]
