"""Checkpoints and networks in T5X's terms: sizes, exit parts and a seqio vocabulary.

This module does not import T5X; `stored_vocabulary` imports seqio, which brings TensorFlow.
"""

import dataclasses
import logging
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from calm import arguments, checkpoints, exits, inference
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
