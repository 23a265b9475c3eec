# Copyright 2026 The CALM Authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""What gin files of T5X read besides: sizes, a vocabulary, a calibration.

This module does not import T5X; seqio, which brings TensorFlow, when asked.
"""

import dataclasses
import os
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import gin
import jax

from calm import arguments, checkpoints, exits, inference
from calm.calibrate import Calibration, Procedure
from calm.calibrate.generations.procedure import describe_differences
from calm.data import vocabulary as vocabularies
from calm.t5 import network, parameters


def given_or_bound(theirs: Any, given: Mapping[str, Any]) -> dict[str, Any]:
  """Arguments in place of T5X's: what is None is what gin binds for T5X's."""
  try:
    bound = gin.get_bindings(theirs)  # pyright: ignore
  except ValueError:  # gin knows no such name
    bound = {}
  return bound | {k: value for k, value in given.items() if value is not None}


@arguments.checked()
def absolute_path(path: str) -> str:
  """A folder as T5X wants it: relative, its second checkpoint fails."""
  return path if "://" in path else os.path.abspath(path)


@arguments.checked()
def stored_checkpoint(checkpoint: str = "packed") -> checkpoints.Checkpoint:
  """The model in the box ('packed'), or the checkpoint in a folder."""
  packed = checkpoint == "packed"
  return checkpoints.load(inference.PACKED if packed else checkpoint)


@arguments.checked()
def stored_config(checkpoint: str = "packed") -> network.T5Config:
  """The sizes of a checkpoint, for `network.Transformer.config`."""
  return stored_checkpoint(checkpoint).config


@arguments.checked()
def stored_vocabulary(checkpoint: str = "packed") -> Any:
  """The vocabulary of a checkpoint as seqio's, for tasks and models; ValueError
  where seqio has none."""
  import seqio

  words = stored_checkpoint(checkpoint).vocabulary
  if isinstance(words, vocabularies.ByteVocabulary):
    return seqio.ByteVocabulary(extra_ids=words.extra_ids)
  if isinstance(words, vocabularies.SentencePieceVocabulary):
    return seqio.SentencePieceVocabulary(str(words.path), words.extra_ids)
  raise ValueError(
    f"Expected the checkpoint {checkpoint!r} to have a vocabulary of"
    f" SentencePiece or bytes, as seqio has, got {type(words).__name__}; bind"
    " `VOCABULARY` to one of your own."
  )


def our_vocabulary(words: Any) -> vocabularies.Vocabulary:
  """A seqio vocabulary as ours; ValueError where that would give other ids."""
  import seqio
  import tensorflow as tf

  if isinstance(words, seqio.ByteVocabulary):
    return vocabularies.ByteVocabulary(extra_ids=words.extra_ids)
  if not isinstance(words, seqio.SentencePieceVocabulary):
    raise ValueError(
      "Expected `vocabulary` to be seqio's SentencePieceVocabulary or"
      f" ByteVocabulary, got {type(words).__name__}."
    )
  with tempfile.TemporaryDirectory() as folder:
    # The file may be a bucket's, which ours does not read.
    path = str(pathlib.Path(folder) / "vocabulary.model")
    tf.io.gfile.copy(words.sentencepiece_model_file, path)
    ours = vocabularies.SentencePieceVocabulary(path, extra_ids=words.extra_ids)
  last = ours.vocab_size - 1
  theirs = words.tokenizer.id_to_piece(last).replace("\u2581", " ")
  overrides = getattr(words, "_normalizer_spec_overrides", None)
  if theirs != ours.piece(last) or overrides is not None:
    raise ValueError(
      "Expected `vocabulary` to use its model file as it is, with extra ids"
      " counted downward, got normalizer overrides or"
      " `reverse_extra_ids=False`."
    )
  return ours


def refuse_missing_parts(
  checkpoint: Any, state: Any, *, is_resuming: bool = False
) -> Any:
  """A `state_transformation_fns` of T5X's: ValueError where the model's decoder
  has an exit part, or maps of a layer, that the checkpoint's has not."""
  del is_resuming

  def parts_of(tree):
    return [
      f"decoder/{part}/{name}"
      for part in parameters.EXIT_PARTS
      for name in tree["target"]["decoder"].get(part, ())
    ]

  brought = parts_of(checkpoint)
  if missing := [part for part in parts_of(state) if part not in brought]:
    raise ValueError(
      f"Expected the checkpoint to hold {' and '.join(missing)}, which this"
      " model has, got none; train it (exit_classifier.gin or"
      " exit_translators.gin of configs/runs), or choose a rule without it."
    )
  return checkpoint


def config_of(
  module: Any,
  parts: Sequence[str | None] = ("exit_classifier",),
  exit_maps: tuple[Sequence[int], int] | None = None,
) -> network.T5Config:
  """The sizes of T5X's own T5 network, with exit parts of these names.

  `exit_maps` are layers with a translator and learned propagation, and the rank
  of that (0: without it); None: as the sizes say. ValueError for another
  architecture, or sizes that ask for what this network does not have.
  """
  theirs: Any = getattr(module, "config", None)
  if not hasattr(theirs, "emb_dim") or hasattr(theirs, "scan_layers"):
    kind = type(module)
    raise ValueError(
      "Expected `module` to be the Transformer of T5X's examples/t5, got"
      f" {kind.__module__}.{kind.__name__}, which has another parameter tree;"
      " scripts/to_t5x.py writes a checkpoint of examples/scalable_t5 anew."
    )
  names = ("exit_classifier", "exit_probes")
  sizes: dict[str, Any] = {name: name in parts for name in names}
  known = {field.name for field in dataclasses.fields(network.T5Config)}
  for field in dataclasses.fields(theirs):
    value = getattr(theirs, field.name)
    name = field.name
    if name in known:
      sizes[name] = value
    elif value != field.default:
      raise ValueError(
        f"Expected {name} of {field.default}, got {value}, which this network"
        " does not have; leave it out."
      )
  if exit_maps is not None:
    layers, sizes["exit_propagation_rank"] = exit_maps
    sizes["exit_translators"] = layers
    sizes["exit_propagation"] = layers if exit_maps[1] else ()
  return network.T5Config(**sizes)


@arguments.checked()
@dataclasses.dataclass(frozen=True)
class Calibrated:
  """A calibration that a run decodes under (configs/runs/calibrated.gin)."""

  path: str  # what `calm calibrate` wrote for a sweep (scripts/t5x_sweep.py)
  checkpoint: str  # the checkpoint that the run restores
  task_prefix: str = ""  # what the task puts before every input

  def load(self, model: Any) -> Calibration:
    """The calibration, for a model whose outputs are those that it is about;
    ValueError names every field that differs. Reads the checkpoint's parameters
    once, for their digest; the rest is known with a batch (`refuse_batch`)."""
    found = Calibration.load(self.path)
    theirs = found.procedure
    if theirs is None or found.knobs:
      raise ValueError(
        f"Expected {self.path} to be of one sweep (scripts/t5x_sweep.py), got"
        " outputs from elsewhere, or several configurations; calibrate what"
        " the sweep wrote."
      )
    stored = parameters.flatten(checkpoints.load(self.checkpoint).params)
    # A classifier that nothing reads is left out.
    read = [x for x in parameters.expected_shapes(model.config) if x in stored]
    ours = procedure_of(
      model,
      parameters.unflatten({path: stored[path] for path in read}),
      our_vocabulary(model.output_vocabulary),
      task_prefix=self.task_prefix,
      max_input_length=theirs.max_input_length,
      max_decode_length=theirs.max_decode_length,
      batch_size=inference.options_of(theirs).batch_size,
    )
    if difference := describe_differences(theirs, ours):
      raise ValueError(
        f"Expected the calibration {self.path} to be of this run, got one of"
        f" another procedure: {difference}; set these, or give THRESHOLD, which"
        " promises nothing."
      )
    return found


def procedure_of(
  model: Any, params: Any, words: Any, **options: Any
) -> Procedure:
  """What outputs of `calm.t5x.models` hold for, as `calm infer` records it;
  `options` are lengths, rows and prefix of `inference.DecodeOptions`."""
  rule = model.rule
  if not model.is_greedy or not isinstance(rule, exits.DynamicExits):
    raise ValueError(
      "Expected `decode_fn` models.greedy_decode and a `rule`"
      f" exits.DynamicExits, got {model.decode_fn} and {rule}; outputs of"
      " others have no calibration here."
    )
  decoding = inference.DecodeOptions(
    measure=rule.measure.name,
    schedule=rule.schedule,
    exit_layers=rule.allowed,
    propagation=rule.propagation.name,
    shortlist=model.shortlist,
    matmul_precision=model.matmul_precision,
    **options,
  )
  return inference.Predictor(model.config, params, words, decoding).procedure


def refuse_batch(
  calibration: Calibration, params: Any, batch: Mapping[str, Any], num_rows: int
) -> None:
  """ValueError for a batch of another length, number of rows a device or dtype
  of parameters than those of the calibration."""
  theirs: Any = calibration.procedure
  dtypes = {leaf.dtype.name for leaf in jax.tree.leaves(params)}
  rows = theirs.batch_bucket
  names = ("encoder_input", "decoder_input")
  expected = (theirs.max_input_length, theirs.max_decode_length, rows)
  lengths = (batch[f"{name}_tokens"].shape[1] for name in names)
  got = (*lengths, rows and num_rows)
  if expected != got or dtypes != {"float32"}:
    raise ValueError(
      "Expected inputs and targets of TASK_FEATURE_LENGTHS, and rows a device,"
      f" of {expected}, and RestoreCheckpointConfig.dtype float32, as the"
      f" calibration was made with, got {got} and {', '.join(dtypes)}; set"
      " these, or calibrate a sweep with yours."
    )
