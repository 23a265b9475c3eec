"""What a calibration is valid for: the `Procedure` of a model under its options, and back."""

import dataclasses
import hashlib
from typing import Any

import jax
import numpy as np
from jax import lax

from calm import exits
from calm.calibrate import Procedure
from calm.exits import schedules
from calm.inference.options import CHOICES, IN_8_BITS, VERIFIED, DecodeOptions
from calm.t5 import network


def procedure(
  config: network.T5Config,
  options: DecodeOptions,
  *,
  parameters_digest: str,
  tokenizer_digest: str,
  eos_id: int,
  base_digest: str | None = None,
) -> Procedure:
  """What a calibration of a model's outputs is valid for.

  Args:
    config: the model's sizes and choices.
    options: how its prompts are decoded; those that change no result are left out.
    parameters_digest: of the parameter tree as decoded (`checkpoints.parameters_digest`).
    tokenizer_digest: of the vocabulary.
    eos_id: the token that ends a text.
    base_digest: of the base model (`t5.parameters.base_digest`), where it has exit maps.
  """
  schedule = {"name": options.schedule.name, **dataclasses.asdict(options.schedule)}  # pyright: ignore[reportArgumentType]
  return Procedure(
    parameters_digest=parameters_digest,
    tokenizer_digest=tokenizer_digest,
    task_prefix=options.task_prefix,
    max_input_length=options.max_input_length,
    max_decode_length=options.max_decode_length,
    eos_id=eos_id,
    measure=options.measure,
    exit_layers=exits.allowed_layers(options.exit_layers, config.num_decoder_layers),
    schedule=schedule,
    propagation=options.propagation,
    shortlist=shortlist_record(options) if options.uses_shortlist else None,
    heads="per_layer" if config.per_layer_heads else "shared",
    activation_dtype=config.dtype,
    decode_method={"name": "greedy"},
    batch_bucket=options.batch_size if batch_size_affects_output(config, options) else None,
    configuration=configuration_record(config),
    platform=jax.default_backend(),
    matmul_precision=precision_record(options),
    weights_dtype=options.weights_dtype,
    head_dtype=options.head_dtype,
    base_digest=base_digest,
    encoder_dtype=options.encoder_dtype,
    reference_dtype=options.reference_dtype,
    reference_digest=options.reference_digest,
  )


def batch_size_affects_output(config: network.T5Config, options: DecodeOptions) -> bool:
  """Whether a text depends on the rows that it is decoded with.

  Sums of other numbers of rows differ in their last bits. Where states are rounded to few bits,
  such a bit may decide how, and so, by and by, which of two likely tokens comes.
  """
  return decoder_rounds(config, options) or options.encoder_dtype == IN_8_BITS


def decoder_rounds(config: network.T5Config, options: DecodeOptions) -> bool:
  """Whether the decoder's states are rounded to few bits; its encoder may still be."""
  return config.dtype != "float32" or options.weights_dtype == IN_8_BITS


def options_of(procedure: Procedure, shortlist: tuple[int, ...] | None = None) -> DecodeOptions:
  """The options under which a calibration's outputs were decoded.

  Args:
    procedure: what the calibration recorded.
    shortlist: the checkpoint's list of likely tokens; the procedure says how many of them.
  """
  size = procedure.shortlist["size"] if procedure.shortlist else None
  if procedure.measure == VERIFIED and size is None:  # it drafts with the full head
    shortlist = None
  return DecodeOptions(
    measure=procedure.measure,
    schedule=schedules.schedule(**procedure.schedule),
    exit_layers=procedure.exit_layers,
    propagation=procedure.propagation,
    shortlist=None if shortlist is None else shortlist[:size],
    task_prefix=procedure.task_prefix,
    max_input_length=procedure.max_input_length,
    max_decode_length=procedure.max_decode_length,
    matmul_precision=_known(procedure.matmul_precision),
    weights_dtype=procedure.weights_dtype,
    encoder_dtype=procedure.encoder_dtype,
    reference_dtype=procedure.reference_dtype,
    reference_digest=procedure.reference_digest,
    head_dtype=procedure.head_dtype,
    batch_size=procedure.batch_bucket or DecodeOptions.batch_size,
  )


def precision_record(options: DecodeOptions) -> str:
  """The precision of products as a `Procedure` names it: JAX has several names for one."""
  name = options.matmul_precision or jax.config.jax_default_matmul_precision or "default"  # pyright: ignore[reportAttributeAccessIssue]
  try:
    return lax.Precision(name).name.lower()
  except ValueError:  # the name of an algorithm
    return name


def _known(precision: str | None) -> str | None:
  """A recorded precision as an option; that of an algorithm is for JAX's configuration."""
  return precision if precision in CHOICES["matmul_precision"] else None


def shortlist_record(options: DecodeOptions) -> dict[str, Any]:
  """The shortlist as a `Procedure` names it."""
  ids = np.asarray(options.shortlist or (), np.int64)
  return {"digest": hashlib.sha256(ids.tobytes()).hexdigest(), "size": len(ids)}


# Fields of a network's configuration that decoding does not read, or that stand in the
# procedure under a name of their own, or that the tree of its parameters tells.
_NOT_DECODED = (
  *("dtype", "dropout_rate", "one_hot_embedding"),
  *("exit_classifier", "exit_probes", "relpos_per_layer"),
  *("exit_translators", "exit_propagation", "exit_propagation_rank"),
)


def configuration_record(config: network.T5Config) -> dict[str, Any]:
  """The network's sizes and choices as a `Procedure` names them."""
  fields = dataclasses.asdict(config)
  return {name: value for name, value in fields.items() if name not in _NOT_DECODED}
