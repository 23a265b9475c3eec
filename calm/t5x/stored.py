"""Checkpoints, networks and calibrations in T5X's terms: sizes, exit parts, a vocabulary.

This module does not import T5X; `stored_vocabulary` imports seqio, which brings TensorFlow.
"""

import copy
import dataclasses
import logging
import os
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from calm import arguments, checkpoints, exits, inference
from calm.calibrate import Calibration
from calm.calibrate.generations.procedure import describe_differences
from calm.data import vocabulary as vocabularies
from calm.t5 import limits, network, parameters
from calm.training import objectives

_LOG = logging.getLogger(__name__)


@arguments.checked()
def stored_checkpoint(checkpoint: str = "packed") -> checkpoints.Checkpoint:
  """The model in the box ('packed'), or the checkpoint in a folder."""
  return checkpoints.load(_folder(checkpoint))


@arguments.checked()
def stored_options(checkpoint: str = "packed") -> inference.DecodeOptions:
  """How a checkpoint is decoded: what its `inference.json` says, or the defaults."""
  given = inference.options.stored_options(_folder(checkpoint))
  return dataclasses.replace(inference.DecodeOptions(), **given)


def _folder(checkpoint: str) -> pathlib.Path:
  return inference.PACKED if checkpoint == "packed" else pathlib.Path(checkpoint)


@arguments.checked()
def stored_config(checkpoint: str = "packed") -> network.T5Config:
  """The sizes of a checkpoint, for `network.Transformer.config`."""
  return stored_checkpoint(checkpoint).config


@arguments.checked()
def absolute_path(path: str) -> str:
  """A run's folder as T5X wants it: a relative path fails at its second checkpoint."""
  return path if "://" in path else os.path.abspath(path)


def refuse_missing_parts(checkpoint: Any, state: Any, *, is_resuming: bool = False) -> Any:
  """A `state_transformation_fns` of T5X's that changes nothing, and compares exit parts.

  `checkpoint` and `state` are T5X's state dictionaries of the checkpoint and of the model.

  Raises:
    ValueError: the model's decoder has an exit part, or maps of a layer, that the checkpoint's
      has not. Maps that the model has not are a warning.
  """
  del is_resuming
  held, brought = (_exit_parts(tree["target"]["decoder"]) for tree in (state, checkpoint))
  missing = [part for part in held if part not in brought]
  if missing:
    raise ValueError(
      f"Expected the checkpoint to hold decoder/{' and decoder/'.join(missing)}, which this"
      " model has, got none; train it (configs/runs/exit_classifier.gin, exit_translators.gin),"
      " or choose a rule that reads none, without"
      f" `network.T5Config.{missing[0].split('/')[0]}` where that is bound."
    )
  unread = [part for part in brought if "/" in part and part not in held]
  if unread:
    _LOG.warning(
      "The checkpoint's %s are not read: this model's exits were not told of them; name their"
      " layers (EXIT_LAYERS of configs/runs/exit_maps.gin).",
      ", ".join(f"decoder/{part}" for part in unread),
    )
  return checkpoint


def _exit_parts(decoder: Any) -> list[str]:
  """Exit parts of a decoder's tree; of maps, one a layer."""
  return [
    name
    for part in parameters.EXIT_PARTS
    if part in decoder
    for name in (
      [f"{part}/{i}" for i in decoder[part]] if part in limits.EXIT_LAYERS else [part]
    )
  ]


@arguments.checked()
def stored_vocabulary(checkpoint: str = "packed") -> Any:
  """The vocabulary of a checkpoint as seqio's, for tasks and models.

  Raises:
    ValueError: the checkpoint holds no vocabulary.
  """
  import seqio

  vocabulary = stored_checkpoint(checkpoint).vocabulary
  if vocabulary is None:
    raise ValueError(
      f"Expected a vocabulary in the checkpoint {checkpoint!r}, got none; bind `VOCABULARY` to"
      " a seqio vocabulary instead."
    )
  if isinstance(vocabulary, vocabularies.ByteVocabulary):
    return seqio.ByteVocabulary(extra_ids=vocabulary.extra_ids)
  if not isinstance(vocabulary, vocabularies.SentencePieceVocabulary):
    raise ValueError(
      f"Expected the checkpoint {checkpoint!r} to have SentencePiece's or bytes' vocabulary, as"
      f" seqio has, got {type(vocabulary).__name__}; bind `VOCABULARY` to one of your own."
    )
  return seqio.SentencePieceVocabulary(str(vocabulary.path), extra_ids=vocabulary.extra_ids)


@arguments.checked()
def needed_parts(rule: exits.Rule, objective: objectives.Objective) -> tuple[str, ...]:
  """Exit parts of the decoder that are measured or trained, fields of `T5Config`."""
  measured = getattr(getattr(rule, "measure", None), "part", None)
  return (*objective.parts, *([measured] if measured else []))


def config_of(
  module: Any,
  parts: Sequence[str] = ("exit_classifier",),
  exit_maps: tuple[Sequence[int], int] | None = None,
) -> network.T5Config:
  """The sizes of T5X's own T5 1.1 network, or of ours, as our configuration.

  Args:
    module: the network.
    parts: exit parts that a network of T5X's, whose sizes say nothing of them, gets.
    exit_maps: layers that have a translator and learned propagation, and the rank of that (0:
      without it), whatever the sizes say; None: as they say.

  Raises:
    ValueError: the module is of another architecture, or its sizes ask for what this
      network does not have (`scale_attn_logits` of T5X's contrib/gpu).
  """
  theirs: Any = getattr(module, "config", None)
  if theirs is None or not hasattr(theirs, "emb_dim") or hasattr(theirs, "scan_layers"):
    raise ValueError(
      "Expected `module` to be calm.t5.network.Transformer, or the Transformer of T5X's"
      f" examples/t5/network.py, got {type(module).__module__}.{type(module).__name__};"
      " scanned layers and Flaxformer's architectures have other parameter trees."
    )
  known = {field.name for field in network.T5Config.__dataclass_fields__.values()}
  for name, field in getattr(theirs, "__dataclass_fields__", {}).items():
    if name not in known and getattr(theirs, name) != field.default:
      raise ValueError(
        f"Expected {type(theirs).__module__}.{type(theirs).__name__}.{name} of {field.default},"
        f" got {getattr(theirs, name)}, which this network does not have; leave it out."
      )
  given = {name: getattr(theirs, name) for name in known if hasattr(theirs, name)}
  if "exit_classifier" not in given:
    given |= {part: part in parts for part in ("exit_classifier", "exit_probes")}
    if not parts:
      _LOG.warning(
        "No exit classifier: neither the measure nor the objective needs one, and the"
        " parameter tree is T5X's own."
      )
  if exit_maps is not None:
    layers, rank = exit_maps
    given |= {"exit_translators": layers, "exit_propagation": layers if rank else ()}
    given |= {"exit_propagation_rank": rank}
  return network.T5Config(**given)


# ---- Calibrations


@arguments.checked()
@dataclasses.dataclass(frozen=True)
class Calibrated:
  """A calibration under which a run of T5X decodes (configs/runs/calibrated.gin).

  Attributes:
    path: the file that `calm calibrate` wrote for a sweep (scripts/t5x_sweep.py).
    checkpoint: the checkpoint that the run restores.
    task_prefix: what the task puts before every input.
  """

  path: str
  checkpoint: str
  task_prefix: str = ""

  def load(self, model: Any) -> Calibration:
    """The calibration, for a model whose outputs are those that it is about.

    Reads the checkpoint's parameters once, for their digest. Lengths, rows and the dtype that
    parameters are restored in are known with a batch alone: see `refuse_batch`.

    Raises:
      ValueError: the model decodes otherwise: every differing field is named.
    """
    found = Calibration.load(self.path)
    if found.procedure is None or found.knobs:
      raise ValueError(
        f"Expected {self.path} to be of one sweep in T5X (scripts/t5x_sweep.py), got one of"
        f" {'several configurations' if found.knobs else 'outputs from elsewhere'}; calibrate"
        " what the sweep wrote."
      )
    if not model.is_greedy or not isinstance(model.rule, exits.DynamicExits):
      raise ValueError(
        "Expected `decode_fn` models.greedy_decode and a `rule` exits.DynamicExits under a"
        f" calibration, got {model.decode_fn} and {model.rule}; bind these, or leave the"
        " calibration out."
      )
    theirs = found.procedure
    options = dataclasses.replace(
      decode_options(model, self.task_prefix),
      max_input_length=theirs.max_input_length,
      max_decode_length=theirs.max_decode_length,
      batch_size=inference.options_of(theirs).batch_size,
    )
    stored = parameters.flatten(checkpoints.load(self.checkpoint).params)
    read = parameters.expected_shapes(model.config)  # a classifier that nothing reads is not
    params = parameters.unflatten({path: stored[path] for path in read if path in stored})
    words = our_vocabulary(model.output_vocabulary)
    ours = inference.Predictor(model.config, params, words, options).procedure
    if difference := describe_differences(theirs, ours):
      raise ValueError(
        f"Expected the calibration {self.path} to be of this run, got one of another procedure:"
        f" {difference}; set these, or give THRESHOLD, which promises nothing."
      )
    return found


def decode_options(model: Any, task_prefix: str) -> inference.DecodeOptions:
  """How a model of `calm.t5x.models` decodes, but for lengths and rows."""
  return inference.DecodeOptions(
    measure=model.rule.measure.name,
    schedule=model.rule.schedule,
    exit_layers=model.rule.allowed,
    propagation=model.rule.propagation.name,
    shortlist=model.shortlist,
    task_prefix=task_prefix,
    matmul_precision=model.matmul_precision,
  )


def refuse_batch(
  calibration: Calibration, params: Any, batch: Mapping[str, Any], num_rows: int
) -> None:
  """Refuses a batch that is decoded otherwise than those of the calibration.

  Args:
    calibration: from `Calibrated.load`.
    params: as restored; arrays or tracers.
    batch: as `predict_batch_with_aux` has it.
    num_rows: rows that a device decodes together.

  Raises:
    ValueError: another length, number of rows or dtype, by name.
  """
  assert calibration.procedure is not None
  theirs = calibration.procedure
  rows = theirs.batch_bucket
  expected = {
    "inputs of TASK_FEATURE_LENGTHS": theirs.max_input_length,
    "targets of TASK_FEATURE_LENGTHS": theirs.max_decode_length,
    "rows a device": rows,
    "RestoreCheckpointConfig.dtype": "float32",
  }
  (dtype,) = {leaf.dtype.name for leaf in jax.tree.leaves(params)} or {"float32"}
  got = {
    "inputs of TASK_FEATURE_LENGTHS": batch["encoder_input_tokens"].shape[1],
    "targets of TASK_FEATURE_LENGTHS": batch["decoder_input_tokens"].shape[1],
    "rows a device": None if rows is None else num_rows,
    "RestoreCheckpointConfig.dtype": dtype,
  }
  if wrong := [name for name in expected if expected[name] != got[name]]:
    raise ValueError(
      "Expected what the calibration was made with, "
      + ", ".join(f"{name} {expected[name]}" for name in wrong)
      + ", got "
      + ", ".join(str(got[name]) for name in wrong)
      + "; set these, or calibrate a sweep with yours."
    )


def our_vocabulary(words: Any) -> Any:
  """A seqio vocabulary as ours, for its digest.

  Raises:
    ValueError: ours would give other ids.
  """
  import seqio
  import tensorflow as tf

  if not isinstance(words, seqio.SentencePieceVocabulary):
    return vocabularies.from_seqio(words)
  with tempfile.TemporaryDirectory() as folder:
    # The file may be a bucket's, which ours does not read.
    local = copy.copy(words)
    local._sentencepiece_model_file = str(pathlib.Path(folder) / "vocabulary.model")
    tf.io.gfile.copy(words.sentencepiece_model_file, local._sentencepiece_model_file)
    return vocabularies.from_seqio(local)
