"""Distribution-free calibration of early exits, with numpy and scipy: no JAX.

Losses of any origin become a threshold with a promise:

    from calm import calibrate
    result = calibrate.calibrate(losses, [0.9, 0.8, 0.7], tolerance=0.1,
    error_rate=0.05) result.threshold, result.guarantee

Cached outputs are in `generations`; `losses` come of them, p-values of these
from `methods` (`p_values`, `betting`), what is certified of p-values from
`testing`, and `certify` does all.
"""

from calm.calibrate import risks
from calm.calibrate.calibration import Calibration
from calm.calibrate.certify import (
  calibrate,
  calibrate_configurations,
  each_group,
)
from calm.calibrate.generations import load, open_writer
from calm.calibrate.generations.procedure import Procedure, Provenance
from calm.calibrate.generations.records import GenerationsError, Prompt, Record
from calm.calibrate.losses import SequenceLosses, Support, from_texts
from calm.calibrate.online import Online
from calm.calibrate.thresholds import NEVER_EXIT, default_grid

__all__ = [
  "NEVER_EXIT",
  "Calibration",
  "GenerationsError",
  "Online",
  "Procedure",
  "Prompt",
  "Provenance",
  "Record",
  "SequenceLosses",
  "Support",
  "calibrate",
  "calibrate_configurations",
  "default_grid",
  "each_group",
  "from_texts",
  "load",
  "open_writer",
  "risks",
]
