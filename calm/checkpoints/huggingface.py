"""Hugging Face T5 checkpoints <-> T5X's parameter tree, without torch or transformers.

Read: T5 1.0 and 1.1, LM-adapted, Flan-T5, mT5, ByT5, CodeT5, umT5, Pile-T5 and MADLAD-400, that
is `config.json` (and `generation_config.json`) beside `model.safetensors` (whole, or in shards
listed by `model.safetensors.index.json`), with `spiece.model` or `tokenizer.json`, which is
taken where it alone has what was added to the pieces (`added_tokens`). The layers compute the
same functions; the differences are of names and layout: linear weights are stored [out, in]
there and [in, out] here, relative position biases [buckets, heads] there and [heads, buckets]
here.

The head takes care. Whether `lm_head` is tied is told by the weights alone (configurations of
transformers 5 call every T5 tied); whether decoder states are scaled by emb_dim**-0.5 before
it is told by the configuration. T5X ties and scales together, so every other combination is
folded into an untied head.

So do ids. The network takes token 0 for padding and for what decoding starts from. A model with
other ids (MADLAD-400: 0 is `<unk>` and starts, 1 is padding) has those rows exchanged, and its
vocabulary with them (`tokenizer_files.Renumbered`).
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from calm.checkpoints import (
  added_tokens,
  files,
  huggingface_config,
  huggingface_names,
  stored_vocabulary,
)
from calm.data import tokenizer_files, vocabulary
from calm.t5 import network, parameters

_EMBEDDING, _HEAD = "shared.weight", "lm_head.weight"
_COPIES_OF_EMBEDDING = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")


def read(directory: pathlib.Path) -> tuple[network.T5Config, dict[str, np.ndarray]]:
  """Reads a Hugging Face directory.

  Returns:
    The configuration (without exit parts) and {path: float32 array} by T5X's paths, shapes
    not yet checked against the configuration.

  Raises:
    FileNotFoundError: a file is missing.
    ValueError: another kind of model, an option that T5X's network does not have, or weights
      whose names are not those of this kind of model.
  """
  theirs = huggingface_config.read(directory)
  with files.naming(directory / "config.json"):
    huggingface_config.check(theirs)
    # Before any weight is read.
    huggingface_config.network_config(theirs, logits_via_embedding=False)
  huggingface_config.warn_unless_greedy(directory)
  weights = _read_weights(directory)
  embedding, head = _take_embedding_and_head(weights)
  scaled = huggingface_config.scales_decoder_states(theirs)
  pad, start = huggingface_config.padding_and_start(theirs)
  tied = head is None and scaled and not (pad or start)
  config = huggingface_config.network_config(theirs, logits_via_embedding=tied)
  params = huggingface_names.renamed(weights, config)
  order = np.arange(len(embedding))
  order[[0, pad]] = order[[pad, 0]]
  rows = embedding[order]
  rows[0] = embedding[start]
  params["token_embedder/embedding"] = rows
  if not tied:
    head = (embedding if head is None else head)[order]
    kernel = head.T * config.emb_dim**-0.5 if scaled else head.T
    params["decoder/logits_dense/kernel"] = np.array(kernel, np.float32)
  return config, params


def read_vocabulary(directory: pathlib.Path) -> stored_vocabulary.Vocabulary | None:
  """The vocabulary beside a model, with padding 0, or None."""
  theirs = huggingface_config.read(directory)
  pad, _ = huggingface_config.padding_and_start(theirs)
  made = _read_vocabulary(directory, theirs, pad)
  return tokenizer_files.Renumbered(made, pad) if made is not None and pad else made


def _read_vocabulary(directory: pathlib.Path, theirs: Mapping[str, Any], pad: int):
  pieces, path = _read_pieces(directory, theirs, pad), directory / "tokenizer.json"
  if pieces is not None and not added_tokens.need_tokenizer(directory, pieces):
    return pieces
  if not path.is_file():
    return None
  eos = _ends(theirs)[0]
  if type(eos) is not int or not 0 <= eos < 2**31 or eos == pad:
    raise ValueError(
      f"Expected `eos_token_id` of {str(directory)!r} to be a token id, and not that of"
      f" padding, got {eos!r}; copy the model's config.json and generation_config.json again."
    )
  return tokenizer_files.TokenizerVocabulary(path, eos_id=eos, pad_id=pad)


def _read_pieces(
  directory: pathlib.Path, theirs: Mapping[str, Any], pad: int
) -> vocabulary.SentencePieceVocabulary | vocabulary.ByteVocabulary | None:
  options_path, path = directory / "tokenizer_config.json", directory / "spiece.model"
  options = files.read_json(options_path) if options_path.exists() else {}
  if path.is_file():
    # The model files of mT5 and its kin hold their extra ids already.
    default = 100 if theirs.get("model_type") == "t5" and not pad else 0
    made = vocabulary.SentencePieceVocabulary(
      path, extra_ids=options.get("extra_ids", default), padded=not pad
    )
    ends = _ends(theirs)
    if ends != [None] and made.eos_id not in ends:
      raise ValueError(
        f"Expected {str(path)!r} to end a text with the model's token {ends[0]}"
        f" (`eos_token_id`), got {made.eos_id}; it belongs to another model."
      )
    return made
  # As transformers looks for it: ByT5's may be named in config.json alone.
  kind = options.get("tokenizer_class") or theirs.get("tokenizer_class")
  if str(kind).startswith("ByT5"):
    return vocabulary.ByteVocabulary(extra_ids=options.get("extra_ids", 125))
  return None


def _ends(theirs: Mapping[str, Any]) -> list[Any]:
  """Tokens that end a text, the first of them what is told of them all."""
  eos = theirs.get("eos_token_id", 1)
  return eos if isinstance(eos, list) and eos else [eos]


def write(
  directory: pathlib.Path,
  params: Mapping[str, Any],
  config: network.T5Config,
  *,
  storage_dtype: str = "float32",
) -> None:
  """Writes a directory that transformers' `T5ForConditionalGeneration` opens.

  The exit classifier has no place there and is left out.

  Args:
    directory: made if missing.
    params: the tree of `config`.
    config: one shared head; activations that transformers has.
    storage_dtype: 'float32' or 'bfloat16'.

  Raises:
    ValueError: per-layer heads, which have no place there, another activation, or `params`
      that are not the tree of `config`.
    OSError: `directory` cannot be written.
  """
  if config.per_layer_heads:
    raise ValueError(
      "Expected `config` with one head for all layers: Hugging Face's T5 has no place for more,"
      " got `per_layer_heads`; save in this project's own format instead."
    )
  their_config = huggingface_config.their_config(config)
  parameters.check(params, config)
  flat = parameters.flatten(params)
  pairs = huggingface_names.names(config)
  weights = {theirs: np.asarray(flat[ours]).T for ours, theirs in pairs.items()}
  weights[_EMBEDDING] = np.asarray(flat["token_embedder/embedding"])
  if not config.logits_via_embedding:
    weights[_HEAD] = np.asarray(flat["decoder/logits_dense/kernel"]).T
  writers = {
    "model.safetensors": files.safetensors_writer(weights, storage_dtype, format="pt"),
    "config.json": files.json_writer(their_config),
  }
  files.write_together(directory, writers)


def _read_weights(directory: pathlib.Path) -> dict[str, np.ndarray]:
  index_path = directory / "model.safetensors.index.json"
  if not index_path.is_file():
    path = directory / "model.safetensors"
    pickled = sorted(directory.glob("*.bin"))
    if pickled and not path.is_file():
      raise FileNotFoundError(
        f"Expected `path` to hold {path.name!r}, got {pickled[0].name!r} only, a pickle, which"
        " is never opened here; save the model as safetensors with transformers first."
      )
    return files.read_safetensors(path)
  weight_map = files.read_json(index_path).get("weight_map")
  if not (isinstance(weight_map, dict) and weight_map) or not all(
    isinstance(name, str) and name.endswith(".safetensors") for name in weight_map.values()
  ):
    raise ValueError(
      f"Expected {index_path.name!r} to hold a `weight_map` of weights to .safetensors files,"
      f" got {repr(weight_map)[:60]} in {str(directory)!r}; download the checkpoint again."
    )
  weights: dict[str, np.ndarray] = {}
  for name in sorted(set(weight_map.values())):
    # The index is not trusted with where to look.
    shard = files.read_safetensors(directory / pathlib.PurePosixPath(name).name)
    listed = {weight for weight, place in weight_map.items() if place == name}
    if set(shard) != listed:
      odd = sorted(set(shard) ^ listed)
      raise ValueError(
        f"Expected {name!r} to hold the weights that {index_path.name!r} lists for it, got"
        f" {len(odd)} that are in one of the two only, as {odd[0]!r}, in {str(directory)!r};"
        " download the checkpoint again."
      )
    weights |= shard
  return weights


def _take_embedding_and_head(
  weights: dict[str, np.ndarray],
) -> tuple[np.ndarray, np.ndarray | None]:
  """Removes both from `weights`; the head is None where it is the embedding."""
  copies = {n: weights.pop(n) for n in _COPIES_OF_EMBEDDING if n in weights}
  head = weights.pop(_HEAD, None)
  embedding = weights.pop(_EMBEDDING, None)
  if embedding is None:
    # Tied weights are stored once, under any of their names.
    embedding = next(iter(copies.values()), head)
  if embedding is None:
    raise ValueError(
      f"Expected `path` to hold the token embedding {_EMBEDDING!r}, got none; give a whole T5"
      " checkpoint."
    )
  for name, copy in copies.items():
    if not np.array_equal(copy, embedding):
      raise ValueError(
        f"Expected `path` to hold one token embedding, got {name!r} that differs from"
        f" {_EMBEDDING!r}; an encoder and a decoder with embeddings of their own are not T5."
      )
  return embedding, None if head is None or np.array_equal(head, embedding) else head
