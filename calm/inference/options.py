"""How prompts are decoded: options, of one's own or from the file beside a checkpoint."""

import dataclasses
import functools
import pathlib
from typing import Any

from calm import arguments, exits
from calm.calibrate import thresholds as thresholds_lib
from calm.checkpoints import files
from calm.decode import engines
from calm.exits import confidence as confidence_lib
from calm.exits import propagation, schedules
from calm.t5 import limits

CHOICES = {
  "matmul_precision": ("default", "high", "highest"),
  "weights_dtype": ("float32", "bfloat16", "int8"),
  "encoder_dtype": ("int8",),
  "reference_dtype": ("float32",),
  "head_dtype": ("int8",),
}
# Options that are whole numbers of at least 1.
_NUMBERS = ("max_input_length", "max_decode_length", "batch_size", "num_devices", "num_drafts")
# Of `weights_dtype`: products of layers, not weights alone.
IN_8_BITS = "int8"
# The measure that is no confidence of a layer but the full model's own, of drafts.
VERIFIED = "verified"


@arguments.checked(schedule=schedules.schedule, engine=engines.by_name)
@dataclasses.dataclass(frozen=True)
class DecodeOptions:
  """How prompts are decoded; all of it belongs to the `Procedure`, but for the last six.

  Attributes:
    measure: confidence measure, one of `confidence.MEASURES`; 'verified' is `exits.Verified`,
      whose threshold is 1 - lambda, its slack.
    schedule: threshold schedule, `schedules.Constant()` or `schedules.Decaying(...)`.
    exit_layers: 1-based layers after which a token may leave; None allows every layer. Of
      'verified' the one layer that drafts.
    propagation: what skipped layers store; 'exit_state' is the paper's, 'learned' predicts it
      with the model's `exit_propagation`.
    shortlist: token ids, most likely first, for the measures 'shortlist' and 'probe',
      and for drafts.
    task_prefix: text put before every prompt.
    max_input_length: tokens of a prompt that are read, EOS included.
    max_decode_length: most tokens generated, EOS included. On a CPU texts that end long before
      it cost little more than under a lower one (`decode.staged`).
    matmul_precision: of products of float32 matrices: 'default', 'high' or 'highest', as
      `jax.default_matmul_precision` has them; None takes what JAX is configured to. A CPU
      knows one only.
    weights_dtype: 'float32' or 'bfloat16', what matrices and output heads are rounded to and
      stored in; products, logits and confidences are as wide as without. 'int8' multiplies the
      layers of encoder and decoder in 8 bits, what they are given too, and leaves embedding and
      heads: on a CPU the fastest, and another full model, to which losses are taken. A text
      then depends on the rows that it is decoded with, which round differently, so that the
      batch size is part of the `Procedure`, and nothing is decoded exactly from drafts. None
      stores matrices in the activation dtype and heads in float32.
    encoder_dtype: 'int8' multiplies in 8 bits what is multiplied once a prompt, whatever the
      decoder's layers are stored in: the encoder's layers, and its states with the matrices
      that make keys and values of them. What is said of texts in 8 bits holds for these too.
      None: as `weights_dtype` has it.
    reference_dtype: 'float32': the full model, which a promise is about and which
      `NEVER_EXIT` decodes with, is the one that was given, with states and weights in float32
      (`Predictor.reference`), so that what 8 bits or bfloat16 change counts as loss. None: full
      depth under these same options.
    reference_digest: `Predictor.parameters_digest` of another model, whose full-depth texts a
      promise compares with: that which `calm fit --train_all` was given. None: this model.
    head_dtype: 'int8' reads output heads in 8 bits, and again in full the pieces that may be
      the most likely: tokens at a layer are the same, confidences nearly so. It pays on a CPU,
      and takes a quarter more room than a head. None reads them as they are stored.
    batch_size: prompts that a device decodes together; results do not depend on it in
      float32.
    num_devices: devices that the prompts are spread over; results do not depend on it. On a
      CPU two of 16 rows are faster than one of 32 where the head is read in 8 bits.
    engine: how decode steps run, or the name of it; results do not depend on it. None takes the
      fastest for the rule, the rows and the platform (`engines.default_engine`).
    refill: whether `generate` puts the next prompt into a row whose text has ended, for lists
      that are longer than a batch. On one device, in float32, where results do not depend on
      it; not with a `weights_dtype` of 'int8'.
    grid: thresholds to decode at where none are given, descending, chosen for this measure,
      layers and schedule; None takes the measure's own (`thresholds.default_grid`).
    num_drafts: of 'verified', most tokens drafted before a pass; results do not depend on it.
  """

  measure: str = "softmax"
  schedule: schedules.Schedule = schedules.Constant()
  exit_layers: tuple[int, ...] | None = None
  propagation: str = "exit_state"
  shortlist: tuple[int, ...] | None = None
  task_prefix: str = ""
  max_input_length: int = 512
  max_decode_length: int = 64
  matmul_precision: str | None = None
  weights_dtype: str | None = None
  encoder_dtype: str | None = None
  reference_dtype: str | None = None
  reference_digest: str | None = None
  head_dtype: str | None = None
  batch_size: int = 8
  num_devices: int = 1
  engine: engines.Engine | None = None
  refill: bool = False
  grid: tuple[float, ...] | None = None
  num_drafts: int = 7

  def __post_init__(self):
    for name in _NUMBERS:
      limits.whole(name, getattr(self, name), 1, limits.LONGEST, "give a number in that range")
    if self.grid is not None:
      thresholds_lib.validate_grid(self.grid)
    for name, values in CHOICES.items():
      if getattr(self, name) not in (None, *values):
        raise ValueError(
          f"Expected `{name}` to be one of {', '.join(values)}, or None, got"
          f" {getattr(self, name)!r}."
        )
    if self.refill and self.num_devices > 1:
      raise ValueError(
        f"Expected `num_devices` of 1 with `refill`, got {self.num_devices}; leave one out."
      )
    if self.refill and self.weights_dtype == IN_8_BITS:
      raise ValueError(
        "Expected a `weights_dtype` of float32 or bfloat16 with `refill`, got 'int8': results"
        " would depend on which rows run together; leave one out."
      )

  def __repr__(self) -> str:
    """What differs from the defaults; long lists as how many they are."""
    told = []
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if field.name == "grid" and value:
        value = f"<{len(value)} thresholds, {value[0]:g} to {value[-1]:g}>"
      elif isinstance(value, tuple) and len(value) > 8:
        value = f"<{len(value)} tokens>"
      elif value == field.default and field.name != "measure":
        continue
      else:
        value = repr(value)
      told.append(f"{field.name}={value}")
    return f"{type(self).__name__}({', '.join(told)})"

  @property
  def uses_shortlist(self) -> bool:
    """Whether results depend on the shortlist."""
    if self.measure == VERIFIED:
      return self.shortlist is not None
    return confidence_lib.measure(self.measure).uses_shortlist

  @functools.cached_property
  def rule(self) -> exits.Rule:
    """The rule that these options name.

    Raises:
      ValueError: there is no such measure, or 'verified' has not one layer to draft.
    """
    if self.measure == VERIFIED:
      return self._verified()
    return exits.DynamicExits(
      confidence_lib.measure(self.measure),
      self.schedule,
      self.exit_layers,
      propagation.propagation(self.propagation),
    )

  def _verified(self) -> exits.Verified:
    layers = self.exit_layers or ()
    if len(layers) != 1:
      raise ValueError(
        "Expected one exit layer for the measure 'verified', the layer that drafts, got"
        f" {list(layers) or 'none'}; give `exit_layers` like (2,)."
      )
    if self.schedule != schedules.Constant():
      raise ValueError(
        "Expected a constant threshold for the measure 'verified', whose slack is one for all"
        f" tokens, got {self.schedule}; leave the schedule out."
      )
    head = "full" if self.shortlist is None else "shortlist"
    return exits.Verified(layers[0], self.num_drafts, head, measures=True)


# What was chosen for one measure, and what the grid was chosen for.
_OF_THE_MEASURE = ("exit_layers", "schedule", "propagation")


def change(options: DecodeOptions, **given: Any) -> DecodeOptions:
  """The options with some of them given.

  Layers, schedule and grid belong together, as a model folder brings them: whoever names a
  measure gets that measure's own defaults, and a grid goes with what it was made for.
  """
  base: dict[str, Any] = {}
  if "measure" in given:
    plain = DecodeOptions()
    base = {name: getattr(plain, name) for name in _OF_THE_MEASURE}
  if {"measure", *_OF_THE_MEASURE} & set(given):
    base["grid"] = None
  return dataclasses.replace(options, **{**base, **given})


def stored_options(directory: pathlib.Path) -> dict[str, Any]:
  """Decoding defaults that a checkpoint brings along in `inference.json`.

  Raises:
    ValueError: it is damaged, or names what is no option.
  """
  path = directory / "inference.json"
  stored = files.read_json(path) if path.exists() else {}
  if stored.get("weights_layout") in ("columns", None):
    stored.pop("weights_layout", None)  # an option of before, without effect on results
  unknown = sorted(set(stored) - {field.name for field in dataclasses.fields(DecodeOptions)})
  if unknown:
    raise ValueError(
      f"Expected {str(path)!r} to name fields of `DecodeOptions`, got {unknown}; it was written"
      " by another program or a newer version."
    )
  with files.naming(path):
    for name, value in stored.items():
      _check_stored(name, value)
  stored = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()}
  if stored.get("grid") is not None:
    stored["grid"] = tuple(map(float, stored["grid"]))
  if "schedule" in stored:
    stored["schedule"] = _schedule(stored["schedule"], path)
  return stored


def _check_stored(name: str, value: Any) -> None:
  """The types of `DecodeOptions`, of a file that anybody may have written."""
  if name in _NUMBERS:
    limits.whole(name, value, 1, limits.LONGEST)
  elif name in ("exit_layers", "shortlist") and value is not None:
    if not isinstance(value, list):
      raise ValueError(f"Expected `{name}` to be a list of whole numbers, got {value!r}.")
    for number in value:
      limits.whole(name, number, 0, limits.SIZES["vocab_size"][1])
  elif name == "grid" and value is not None:
    numbers = isinstance(value, list) and all(type(v) in (int, float) for v in value)
    if not numbers or not all(0 <= v <= 1 for v in value):
      raise ValueError(f"Expected `{name}` to be a list of numbers in [0, 1], got {value!r}.")
  elif name in (*CHOICES, "reference_digest") and not isinstance(value, str | None):
    raise ValueError(f"Expected `{name}` to be a text or null, got {value!r}.")
  elif name in ("measure", "propagation", "task_prefix") and not isinstance(value, str):
    raise ValueError(f"Expected `{name}` to be a text, got {value!r}.")
  elif name == "refill" and not isinstance(value, bool):
    raise ValueError(f"Expected `{name}` to be true or false, got {value!r}.")
  elif name == "engine":
    raise ValueError(f"Expected no `{name}` in a file: it changes no result, got {value!r}.")


def _schedule(value: Any, path: pathlib.Path) -> schedules.Schedule:
  with files.naming(path):
    if not isinstance(value, dict) or "name" not in value:
      raise ValueError(f"Expected `schedule` to be a name and its numbers, got {value!r}.")
    return schedules.schedule(**value)


def to_stored(options: DecodeOptions) -> dict[str, Any]:
  """The options as `inference.json` keeps them; what says nothing is left out."""
  plain = DecodeOptions()
  names = (
    "measure",
    "exit_layers",
    "propagation",
    "batch_size",
    "shortlist",
    "grid",
    "num_drafts",
    "reference_digest",
    *CHOICES,
  )
  limits = ("task_prefix", "max_input_length", "max_decode_length")
  stored: dict[str, Any] = {name: getattr(options, name) for name in limits}
  for name in names:
    value = getattr(options, name)
    if name == "measure" or value != getattr(plain, name):
      stored[name] = list(value) if isinstance(value, tuple) else value
  schedule = options.schedule
  if schedule != plain.schedule:
    numbers = dataclasses.asdict(schedule)  # pyright: ignore[reportArgumentType]
    stored["schedule"] = {"name": schedule.name, **numbers}
  return stored
