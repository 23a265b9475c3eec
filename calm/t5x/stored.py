"""Checkpoints of ours in T5X's terms: sizes and a seqio vocabulary for gin files.

This module does not import T5X; `stored_vocabulary` imports seqio, which brings TensorFlow.
"""

import dataclasses
import logging
import os
import pathlib
from typing import Any

from calm import arguments, checkpoints, inference
from calm.data import vocabulary as vocabularies
from calm.t5 import limits, network, parameters

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
  """What T5X read of a checkpoint, as it is: a `state_transformation_fns` of T5X's.

  Args:
    checkpoint: T5X's state dictionary of the checkpoint.
    state: that of the model.
    is_resuming: as T5X says it; not used.

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
