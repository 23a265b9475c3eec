"""How prompts are decoded: options, of one's own, of a procedure or beside a checkpoint."""

import dataclasses
import functools
import hashlib
import pathlib
from typing import Any

import numpy as np

from calm import exits
from calm.calibrate import Procedure
from calm.checkpoints import files
from calm.decode import engines
from calm.exits import confidence as confidence_lib
from calm.exits import propagation, schedules


@dataclasses.dataclass(frozen=True)
class DecodeOptions:
  """How prompts are decoded; all of it belongs to the `Procedure`, but for the last four.

  Attributes:
    measure: confidence measure: 'softmax', 'state' or 'classifier'.
    schedule: threshold schedule, `schedules.Constant()` or `schedules.Decaying(...)`.
    exit_layers: 1-based layers after which a token may leave; None allows every layer.
    propagation: what skipped layers store; 'exit_state' is the paper's.
    shortlist: token ids, most likely first, for the measure 'shortlist'.
    task_prefix: text put before every prompt.
    max_input_length: tokens of a prompt that are read, EOS included.
    max_decode_length: most tokens generated, EOS included.
    batch_size: prompts that a device decodes together; results do not depend on it in
      float32.
    num_devices: devices that the prompts are spread over; results do not depend on it.
    engine: how decode steps run; results do not depend on it. None takes the fastest for the
      rule and the batch (`programs.default_engine`).
    refill: whether `generate` puts the next prompt into a row whose text has ended, for lists
      that are longer than a batch. On one device; results do not depend on it in float32.
  """

  measure: str = "softmax"
  schedule: schedules.Schedule = schedules.Constant()
  exit_layers: tuple[int, ...] | None = None
  propagation: str = "exit_state"
  shortlist: tuple[int, ...] | None = None
  task_prefix: str = ""
  max_input_length: int = 512
  max_decode_length: int = 64
  batch_size: int = 8
  num_devices: int = 1
  engine: engines.Engine | None = None
  refill: bool = False

  def __post_init__(self):
    for name in ("max_input_length", "max_decode_length", "batch_size", "num_devices"):
      if getattr(self, name) < 1:
        raise ValueError(f"Expected `{name}` of at least 1. Got {getattr(self, name)}.")
    if self.refill and self.num_devices > 1:
      raise ValueError(
        f"Expected `num_devices` of 1 with `refill`. Got {self.num_devices}; leave one out."
      )

  @functools.cached_property
  def rule(self) -> exits.DynamicExits:
    """The exit rule that these options name."""
    return exits.DynamicExits(
      confidence_lib.measure(self.measure),
      self.schedule,
      self.exit_layers,
      propagation.propagation(self.propagation),
    )


def options_of(procedure: Procedure, shortlist: tuple[int, ...] | None = None) -> DecodeOptions:
  """The options under which a calibration's outputs were decoded.

  Args:
    procedure: what the calibration recorded.
    shortlist: the checkpoint's list of likely tokens; the procedure says how many of them.
  """
  size = procedure.shortlist["size"] if procedure.shortlist else None
  return DecodeOptions(
    measure=procedure.measure,
    schedule=schedules.schedule(**procedure.schedule),
    exit_layers=procedure.exit_layers,
    propagation=procedure.propagation,
    shortlist=None if shortlist is None else shortlist[:size],
    task_prefix=procedure.task_prefix,
    max_input_length=procedure.max_input_length,
    max_decode_length=procedure.max_decode_length,
    batch_size=procedure.batch_bucket or DecodeOptions.batch_size,
  )


def shortlist_record(options: DecodeOptions) -> dict[str, Any]:
  """The shortlist as a `Procedure` names it."""
  ids = np.asarray(options.shortlist or (), np.int64)
  return {"digest": hashlib.sha256(ids.tobytes()).hexdigest(), "size": len(ids)}


def stored_options(directory: pathlib.Path) -> dict[str, Any]:
  """Decoding defaults that a checkpoint brings along in `inference.json`.

  Raises:
    ValueError: it is damaged, or names what is no option.
  """
  path = directory / "inference.json"
  stored = files.read_json(path) if path.exists() else {}
  unknown = sorted(set(stored) - {field.name for field in dataclasses.fields(DecodeOptions)})
  if unknown:
    raise ValueError(
      f"Expected {str(path)!r} to name fields of `DecodeOptions`. Got {unknown}; it was written"
      " by another program or a newer version."
    )
  return {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()}
