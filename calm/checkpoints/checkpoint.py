"""Checkpoints: a model (configuration, parameters, vocabulary) from disk, and back.

Our own format is a directory:
  config.json            the fields of `network.T5Config`, which format this is, and whether
                         exits are trained, where that is known
  params.safetensors     leaves by "/"-joined path; float32 or bfloat16 (read as float32)
  vocabulary.json        which vocabulary, its digest (absent: none was given)
  vocabulary.model       the SentencePiece model, or
  tokenizer.json         the tokenizer of a Hugging Face folder, where it is one
`load` also opens Hugging Face directories (`huggingface`) and T5X checkpoints, legacy and
Orbax (`t5x_checkpoints`), so that anything downstream sees one kind of `Checkpoint`.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from calm.checkpoints import files, huggingface, stored_vocabulary, t5x
from calm.data import vocabulary as vocabularies
from calm.t5 import limits, network, parameters

FORMAT = "calm checkpoint 1"
# The small model inside this package.
PACKED = pathlib.Path(__file__).parents[1] / "assets"
Vocabulary = stored_vocabulary.Vocabulary
parameters_digest = parameters.digest


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """A model as it was stored.

  Attributes:
    config: sizes and choices; `exit_classifier` tells whether `params` holds one.
    params: the parameter tree of `config`, leaves float32 numpy arrays.
    vocabulary: the vocabulary stored beside it, or None.
    exits_trained: whether layers before the last have learned to write, where that is known:
      False in Hugging Face's models and T5X's own; None where nothing tells.
  """

  config: network.T5Config
  params: dict[str, Any] = dataclasses.field(repr=False)
  vocabulary: Vocabulary | None = None
  exits_trained: bool | None = None


def save(
  directory: str | pathlib.Path,
  params: Mapping[str, Any],
  config: network.T5Config,
  *,
  vocabulary: Vocabulary | None = None,
  storage_dtype: str = "float32",
  exits_trained: bool | None = None,
) -> None:
  """Writes our own format; an earlier checkpoint in `directory` is replaced only at the end.

  Args:
    directory: made if missing.
    params: the tree of `config`; checked before anything is written.
    vocabulary: stored in the directory, so that it is whole without other files.
    storage_dtype: 'float32', or 'bfloat16' for half the size.
    exits_trained: whether layers before the last have learned to write; None says nothing.

  Raises:
    ValueError: `params` is not the tree of `config` or not finite, the vocabulary is larger
      than the embedding, or `storage_dtype` is unknown.
    OSError: `directory` cannot be written.
  """
  directory = pathlib.Path(directory)
  parameters.check(params, config)
  writers = {}
  if vocabulary is not None:
    vocabularies.check_fits(vocabulary, config.vocab_size)
    writers |= stored_vocabulary.writers(vocabulary)
  writers["params.safetensors"] = files.safetensors_writer(
    parameters.flatten(params), storage_dtype
  )
  fields = dataclasses.asdict(config)
  if exits_trained is not None:
    fields["exits_trained"] = exits_trained
  writers["config.json"] = files.json_writer({"format": FORMAT, **fields})
  files.write_together(directory, writers)
  for name in set(stored_vocabulary.NAMES) - set(writers):
    # Left by an earlier save with another vocabulary.
    (directory / name).unlink(missing_ok=True)


def load(
  path: str | pathlib.Path,
  *,
  config: network.T5Config | None = None,
  vocabulary: Vocabulary | None = None,
) -> Checkpoint:
  """Opens a checkpoint of any known format and checks it leaf by leaf.

  Args:
    path: a directory of our own format, of Hugging Face, or of T5X (the `checkpoint_N`
      folder, or the folder above it, whose newest is taken).
    config: replaces the stored configuration; for T5X, which stores none, it defaults to what
      names and shapes tell (gated GELU or ReLU, 128 as `relpos_max_distance`).
    vocabulary: replaces the stored vocabulary; T5X stores none.

  Raises:
    FileNotFoundError: `path`, or a file that belongs to it, is missing.
    ValueError: no known format; a truncated file; a leaf that is missing, of no use, of the
      wrong shape or not finite; a vocabulary larger than the embedding.
  """
  path = pathlib.Path(path)
  if not path.is_dir():
    raise FileNotFoundError(
      f"Expected `path` to be a checkpoint directory, got {str(path)!r}, which is"
      f" {'a file' if path.exists() else 'missing'}; give the folder that holds config.json"
      " (or a T5X checkpoint)."
    )
  stored, flat, stored_vocabulary, trained = _read(path)
  has_exit_parts = any(
    getattr(stored, part) for part in (*parameters.EXIT_PARTS, "per_layer_heads")
  )
  config = config or stored
  params = parameters.unflatten(flat)
  parameters.check(params, config)
  vocabulary = vocabulary or stored_vocabulary
  if vocabulary is not None:
    vocabularies.check_fits(vocabulary, config.vocab_size)
  if trained is False and has_exit_parts and not (path / "params.safetensors").is_file():
    trained = None  # T5X's own models have none: somebody trained them
  return Checkpoint(config, params, vocabulary, trained)


def _read(
  path: pathlib.Path,
) -> tuple[network.T5Config, dict[str, np.ndarray], Vocabulary | None, bool | None]:
  """(configuration, {path: leaf}, vocabulary, exits trained) of whichever format it is."""
  if (path / "config.json").is_file():
    fields = files.read_json(path / "config.json")
    if "model_type" in fields:
      config, flat = huggingface.read(path)
      return config, flat, huggingface.read_vocabulary(path), False
    trained = fields.pop("exits_trained", None)
    if trained not in (None, True, False):
      raise ValueError(
        f"Expected `exits_trained` in {str(path / 'config.json')!r} to be true or false, got"
        f" {trained!r}; save the model again."
      )
    config = _config_of(fields, path)
    flat = files.read_safetensors(path / "params.safetensors")
    return config, flat, stored_vocabulary.read(path), trained
  found = t5x.find(path)
  if found is None:
    names = sorted(child.name for child in path.iterdir())
    raise ValueError(
      "Expected `path` to be a checkpoint of this project, of Hugging Face (config.json in"
      f" both) or of T5X, got {str(path)!r} with {names[:6] or 'nothing in it'}; give the"
      " folder that holds one."
    )
  flat = t5x.read(found)
  return t5x.infer_config(flat), flat, None, False


def _config_of(fields: dict[str, Any], path: pathlib.Path) -> network.T5Config:
  known = {field.name for field in dataclasses.fields(network.T5Config)}
  stored_format = fields.pop("format", None)
  unknown = sorted(set(fields) - known)
  if stored_format != FORMAT or unknown or "vocab_size" not in fields:
    raise ValueError(
      f"Expected `path` to hold a config.json with format {FORMAT!r} and fields of T5Config,"
      f" got {str(path)!r} with format {stored_format!r}, unknown fields {unknown}; it was"
      " written by another program or a newer version."
    )
  with files.naming(path / "config.json"):
    return network.T5Config(**limits.check(fields))
