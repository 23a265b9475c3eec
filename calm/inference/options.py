"""Decoding options, their stored form (`inference.json`), and their
`Procedure`.
"""

import contextlib
import dataclasses
import functools
import hashlib
import pathlib
from typing import Any, Literal, get_args

import jax
import numpy as np
from jax import lax

from calm import arguments, exits
from calm.calibrate import Procedure
from calm.calibrate import thresholds as thresholds_lib
from calm.checkpoints import files
from calm.exits import confidence, propagation, schedules
from calm.t5 import costs, limits, network

Precision = Literal["default", "high", "highest"]
_NUMBERS = (
  "max_input_length",
  "max_decode_length",
  "batch_size",
  "num_devices",
  "num_drafts",
)
# What a `Procedure` calls it: 'int8' there says that states were rounded, too.
_RECORDED = {"int8": "int8, states whole"}
# The measure that is no confidence of a layer but the full model's own, of
# drafts.
VERIFIED = "verified"
# Drafts off the prompt: a pass of so few positions takes little more than one.
LOOKED_UP = exits.Speculative(0, 3, "full")


@arguments.checked(schedule=schedules.schedule)
@dataclasses.dataclass(frozen=True)
class DecodeOptions:
  """How prompts are decoded.

  All of it belongs to the `Procedure` but `batch_size` and what follows it, on
  which no result depends; with 8-bit products or bfloat16 states the batch size
  does belong to it.

  Attributes:
    measure: confidence measure, one of `confidence.MEASURES`; 'verified' is
      `exits.Speculative`, whose threshold is 1 - lambda, its slack.
    schedule: threshold schedule, `schedules.Constant()` or
      `schedules.Decaying(...)`.
    exit_layers: 1-based layers after which a token may leave; None allows every
      layer, () none. Of 'verified' the one layer that drafts; (): drafts come
      off the prompt.
    propagation: what skipped layers store; 'exit_state' is the paper's,
      'learned' predicts it with the model's `exit_propagation`.
    shortlist: token ids, most likely first, for the measures 'shortlist' and
      'probe', and for drafts.
    task_prefix: text put before every prompt.
    max_input_length, max_decode_length: most tokens read and generated, EOS
      included.
    matmul_precision: of products of float32 matrices, as in
      `jax.default_matmul_precision`; None takes JAX's configuration. A CPU has
      one only.
    weights_dtype: type of stored matrices and output heads, 'float32' or
      'bfloat16' (products, logits and confidences keep their width); 'int8'
      rounds the decoder's matrices and head to 8 bits, and multiplies the
      encoder as `encoder_dtype` does. None: matrices in the activation dtype,
      heads in float32.
    encoder_dtype: 'int8' multiplies the encoder's layers and the decoder's
      cross-attention keys and values in 8 bits. None: as `weights_dtype` has
      it.
    reference_dtype: 'float32': full depth, which a promise compares with, has
      states and weights in float32 (`Predictor.reference`): the effect of fewer
      bits counts as loss.
    reference_digest: `Predictor.parameters_digest` of another model, with whose
      full-depth texts a promise compares: the model that `calm fit --train_all`
      started from.
    head_dtype: 'int8' reads output heads in 8 bits first, and the likely pieces
      again in full:
      tokens at a layer are the same, confidences nearly so.
    batch_size: prompts that a device decodes together.
    num_devices: devices that the prompts are spread over.
    grid: thresholds to decode at where none are given, descending, chosen for
      this measure, layers and schedule; None takes the measure's own
      (`thresholds.default_grid`).
    num_drafts: of 'verified', most tokens drafted before a pass.
  """

  measure: str = "softmax"
  schedule: schedules.Schedule = schedules.Constant()
  exit_layers: tuple[int, ...] | None = None
  propagation: str = "exit_state"
  shortlist: tuple[int, ...] | None = dataclasses.field(
    default=None, repr=False
  )
  task_prefix: str = ""
  max_input_length: int = 512
  max_decode_length: int = 64
  matmul_precision: Precision | None = None
  weights_dtype: Literal["float32", "bfloat16", "int8"] | None = None
  encoder_dtype: Literal["int8"] | None = None
  reference_dtype: Literal["float32"] | None = None
  reference_digest: str | None = None
  head_dtype: Literal["int8"] | None = None
  batch_size: int = 8
  num_devices: int = 1
  grid: tuple[float, ...] | None = dataclasses.field(default=None, repr=False)
  num_drafts: int = 7

  def __post_init__(self):
    for name in _NUMBERS:
      limits.whole(
        name,
        getattr(self, name),
        1,
        limits.LONGEST,
        "give a number in that range",
      )
    most_layers = limits.SIZES["num_decoder_layers"][1]
    for layer in self.exit_layers or ():
      limits.whole("exit_layers", layer, 1, most_layers, "name layers")
    if self.grid is not None:
      thresholds_lib.validate_grid(self.grid)

  @functools.cached_property
  def rule(self) -> exits.Rule:
    """The rule that these options name."""
    if self.measure != VERIFIED:
      return exits.DynamicExits(
        confidence.measure(self.measure),
        self.schedule,
        self.exit_layers,
        propagation.propagation(self.propagation),
      )
    if self.exit_layers == ():
      return LOOKED_UP
    layers = self.exit_layers or ()
    if len(layers) != 1 or self.schedule != schedules.Constant():
      raise ValueError(
        "Expected one exit layer, that drafts, and a constant threshold for "
        "the measure"
        f" 'verified', got {list(layers) or 'none'} and {self.schedule}; "
        "give `exit_layers`"
        " like (2,), and no schedule."
      )
    head = "full" if self.shortlist is None else "shortlist"
    return exits.Speculative(layers[0], self.num_drafts, head, measures=True)


# What was chosen for one measure, and what the grid was chosen for.
_OF_THE_MEASURE = ("exit_layers", "schedule", "propagation")


def change(
  config: network.T5Config, options: DecodeOptions, **given: Any
) -> DecodeOptions:
  """The options with some of them given, for a model of these sizes.

  A named measure brings its own layers and schedule, and a grid goes with the
  fields that it was chosen for. 'verified' loses a shortlist that is not given
  where the whole head drafts better.
  """
  own = {name: getattr(DecodeOptions, name) for name in _OF_THE_MEASURE}
  base: dict[str, Any] = own if "measure" in given else {}
  if {"measure", *_OF_THE_MEASURE} & set(given):
    base["grid"] = None
  changed = dataclasses.replace(options, **{**base, **given})
  drafts = given.get("measure") == VERIFIED and "shortlist" not in given
  layers = changed.exit_layers or ()
  if (
    drafts
    and len(layers) == 1
    and draft_head(config, changed, layers[0]) == "full"
  ):
    return dataclasses.replace(changed, shortlist=None)
  return changed


def draft_head(
  config: network.T5Config, options: DecodeOptions, layer: int
) -> exits.DraftHead:
  """The head that drafts after a layer: the shortlist where the whole head
  costs more than the layers below it, since every token that the shortlist
  lacks is a refused draft.
  """
  listed = options.shortlist is not None
  cost = costs.decoding_costs(config, input_length=1, cache_length=1)
  return (
    "shortlist"
    if listed and cost.head.flops > layer * cost.layer.flops
    else "full"
  )


def measures(model: Any) -> tuple[str, ...]:
  """The confidence measures that a `Predictor` has: the classifier where it is
  trained.
  """
  decoder = model.params["decoder"]
  listed = bool(model.options.shortlist)
  # Exit parameters start at 0: those that are still 0 were never trained.
  trained = [
    part
    for part in ("exit_classifier", "exit_probes")
    if part in decoder and np.any(np.asarray(decoder[part]["kernel"]))
  ]
  known = confidence.MEASURES.items()
  return tuple(
    n for n, each in known if confidence.lacking(each, trained, listed) is None
  )


# ---- The stored form

_ALWAYS_STORED = (
  "measure",
  "task_prefix",
  "max_input_length",
  "max_decode_length",
)


def stored_options(directory: pathlib.Path) -> dict[str, Any]:
  """Decoding defaults that a checkpoint brings along in `inference.json`.

  Raises:
    ValueError: it is damaged, or names what is no option.
  """
  path = directory / "inference.json"
  stored = files.read_json(path) if path.exists() else {}
  # of earlier versions, without effect
  if stored.get("weights_layout") in ("columns", None):
    stored.pop("weights_layout", None)
  known = {field.name for field in dataclasses.fields(DecodeOptions)}
  if unknown := sorted(set(stored) - known):
    raise ValueError(
      f"Expected {str(path)!r} to name fields of `DecodeOptions`, got "
      f"{unknown}; it was written"
      " by another program or a newer version."
    )
  with files.naming(path):
    if "schedule" in stored:
      value = stored["schedule"]
      if not isinstance(value, dict) or "name" not in value:
        raise ValueError(
          f"Expected `schedule` to be a name and its numbers, got {value!r}."
        )
      stored["schedule"] = schedules.schedule(**value)
    options = DecodeOptions(**stored)
    for token in options.shortlist or ():
      limits.whole("shortlist", token, 0, limits.SIZES["vocab_size"][1])
  return {name: getattr(options, name) for name in stored}


def to_stored(options: DecodeOptions) -> dict[str, Any]:
  """The options as `inference.json` keeps them, without defaults and those of a
  machine.
  """
  values = {
    field.name: getattr(options, field.name)
    for field in dataclasses.fields(options)
  }

  def kept(name):
    return name in _ALWAYS_STORED or values[name] != getattr(
      DecodeOptions, name
    )

  stored = {
    name: values[name]
    for name in values
    if kept(name) and name != "num_devices"
  }
  if "schedule" in stored:
    stored["schedule"] = {
      "name": options.schedule.name,
      **vars(options.schedule),
    }
  return stored


# ---- The procedure

# Fields that have the same name and value in options and in their procedure.
_SAME = (
  *(
    "task_prefix",
    "max_input_length",
    "max_decode_length",
    "measure",
    "propagation",
  ),
  *("head_dtype", "encoder_dtype", "reference_dtype", "reference_digest"),
)
# Fields of a network's configuration that decoding does not read, or that stand
# in the procedure under a name of their own, or that follow from the tree of
# its parameters.
_NOT_DECODED = (
  *("dtype", "dropout_rate", "one_hot_embedding"),
  *("exit_classifier", "exit_probes", "relpos_per_layer"),
  *("exit_translators", "exit_propagation", "exit_propagation_rank"),
)


def procedure(model: Any) -> Procedure:
  """The procedure for which a calibration of a `Predictor`'s outputs is
  valid.
  """
  config = model.config
  options = model.options
  shortlist = None
  drafts = options.shortlist is not None
  measure = options.measure
  if (
    drafts
    if measure == VERIFIED
    else confidence.measure(measure).uses_shortlist
  ):
    ids = np.asarray(options.shortlist or (), np.int64)
    shortlist = {
      "digest": hashlib.sha256(ids.tobytes()).hexdigest(),
      "size": len(ids),
    }
  default: Any = jax.config
  precision = options.matmul_precision
  precision = precision or default.jax_default_matmul_precision or "default"
  # of several names for one; an algorithm has its own
  with contextlib.suppress(ValueError):
    precision = lax.Precision(precision).name.lower()
  # `per_layer_heads` is in every record so far: models might have a head a
  # layer once.
  fields = dataclasses.asdict(config) | {"per_layer_heads": False}
  return Procedure(
    parameters_digest=model.parameters_digest,
    tokenizer_digest=model.vocabulary.digest(),
    eos_id=model.eos_id,
    base_digest=model.base_digest,
    exit_layers=exits.allowed_layers(
      options.exit_layers, config.num_decoder_layers
    ),
    schedule={"name": options.schedule.name, **vars(options.schedule)},
    shortlist=shortlist,
    heads="shared",
    activation_dtype=config.dtype,
    decode_method={"name": "greedy"},
    batch_bucket=options.batch_size
    if model.batch_size_affects_output
    else None,
    configuration={
      name: fields[name] for name in fields if name not in _NOT_DECODED
    },
    platform=jax.default_backend(),
    matmul_precision=precision,
    weights_dtype=_RECORDED.get(
      options.weights_dtype or "", options.weights_dtype
    ),
    **{name: getattr(options, name) for name in _SAME},
  )


def options_of(
  procedure: Procedure, shortlist: tuple[int, ...] | None = None
) -> DecodeOptions:
  """The options that a calibration's outputs were decoded under; `shortlist` is
  the list of likely tokens of the checkpoint, of which the procedure says how
  many.
  """
  size = procedure.shortlist["size"] if procedure.shortlist else None
  # it drafts with the full head
  if procedure.measure == VERIFIED and size is None:
    shortlist = None
  precision: Any = procedure.matmul_precision
  weights: Any = procedure.weights_dtype
  return DecodeOptions(
    schedule=schedules.schedule(**procedure.schedule),
    exit_layers=procedure.exit_layers,
    shortlist=None if shortlist is None else shortlist[:size],
    # An algorithm's name is for JAX's configuration.
    matmul_precision=precision if precision in get_args(Precision) else None,
    batch_size=procedure.batch_bucket or DecodeOptions.batch_size,
    weights_dtype="int8" if weights == _RECORDED["int8"] else weights,
    **{name: getattr(procedure, name) for name in _SAME},
  )
