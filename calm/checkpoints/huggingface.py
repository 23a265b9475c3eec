"""Hugging Face T5 checkpoints <-> T5X's parameter tree, without torch or transformers.

Read: T5 1.0 and 1.1, LM-adapted, Flan-T5, mT5, ByT5, CodeT5, umT5, Pile-T5 and MADLAD-400, that
is `config.json` (and `generation_config.json`) beside `model.safetensors` (whole, or in shards
listed by `model.safetensors.index.json`), with `spiece.model` or `tokenizer.json`. The layers
compute the same functions; the differences are of names and layout: linear weights are stored
[out, in] there and [in, out] here, relative position biases [buckets, heads] there and
[heads, buckets] here.

The head takes care. Whether `lm_head` is tied is told by the weights alone (configurations of
transformers 5 call every T5 tied); whether decoder states are scaled by emb_dim**-0.5 before
it is told by the configuration. T5X ties and scales together, so every other combination is
folded into an untied head.

So do ids. The network takes token 0 for padding and for what decoding starts from. A model with
other ids (MADLAD-400: 0 is `<unk>` and starts, 1 is padding) has those rows exchanged, and its
vocabulary with them (`tokenizer_files.Renumbered`).
"""

import pathlib
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from calm.checkpoints import files, stored_vocabulary
from calm.data import tokenizer_files, vocabulary
from calm.t5 import limits, network, parameters

MODEL_TYPES = ("t5", "mt5", "umt5")
# Our field -> theirs; those that a file may lack have T5's defaults in both.
_FIELDS = {
  "vocab_size": "vocab_size",
  "emb_dim": "d_model",
  "head_dim": "d_kv",
  "mlp_dim": "d_ff",
  "num_heads": "num_heads",
  "num_encoder_layers": "num_layers",
  "num_decoder_layers": "num_decoder_layers",
  "dropout_rate": "dropout_rate",
  "relpos_buckets": "relative_attention_num_buckets",
  "relpos_max_distance": "relative_attention_max_distance",
}
# Their activation -> ours. flax's gelu is the tanh approximation, their "gelu_new".
_ACTIVATIONS = {"relu": "relu", "gelu_new": "gelu", "silu": "silu", "swish": "silu"}
_EMBEDDING, _HEAD = "shared.weight", "lm_head.weight"
_COPIES_OF_EMBEDDING = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
# A leftover of early T5 1.0 conversions that no implementation reads.
_UNUSED = ("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",)
_RELPOS = "relative_attention_bias.weight"
_IDS = ("pad_token_id", "eos_token_id", "decoder_start_token_id")
# What makes transformers decode otherwise than greedily, and what leaves it at that.
_GREEDY: Mapping[str, tuple[Any, ...]] = {
  "num_beams": (None, 1),
  "do_sample": (None, False),
  "repetition_penalty": (None, 1, 1.0),
  "no_repeat_ngram_size": (None, 0),
  "min_length": (None, 0),
  "min_new_tokens": (None, 0),
  "forced_bos_token_id": (None,),
  "forced_eos_token_id": (None,),
  "suppress_tokens": (None, []),
  "begin_suppress_tokens": (None, []),
  "bad_words_ids": (None, []),
}
_PROJECTIONS = {"query": "q", "key": "k", "value": "v", "out": "o"}


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
  theirs = _read_config(directory)
  with files.naming(directory / "config.json"):
    _check_config(theirs)
    _config(theirs, logits_via_embedding=False)  # before any weight is read
  _warn_unless_greedy(directory)
  weights = _read_weights(directory)
  embedding, head = _take_embedding_and_head(weights)
  scaled = _scales_decoder_states(theirs)
  pad, start = _padding_and_start(theirs)
  tied = head is None and scaled and not (pad or start)
  config = _config(theirs, logits_via_embedding=tied)
  params = _rename(weights, config)
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


def _read_config(directory: pathlib.Path) -> dict[str, Any]:
  """config.json with the ids that generation goes by, where they stand apart."""
  theirs = files.read_json(directory / "config.json")
  generation = _generation(directory)
  theirs |= {name: generation[name] for name in _IDS if generation.get(name) is not None}
  return theirs


def _generation(directory: pathlib.Path) -> dict[str, Any]:
  path = directory / "generation_config.json"
  return files.read_json(path) if path.is_file() else {}


def _warn_unless_greedy(directory: pathlib.Path) -> None:
  generation = _generation(directory)
  other = [
    f"{name}={generation[name]!r}"
    for name, greedy in _GREEDY.items()
    if generation.get(name) not in greedy
  ]
  if other:
    warnings.warn(
      f"generation_config.json of {directory} asks for {', '.join(other)}; decoding here is"
      " greedy and leaves that out.",
      stacklevel=5,
    )


def _padding_and_start(theirs: Mapping[str, Any]) -> tuple[int, int]:
  """Ids of padding and of what decoding starts from, which is padding unless it is named."""
  pad = theirs.get("pad_token_id") or 0
  start = theirs.get("decoder_start_token_id")
  return pad, pad if start is None else start


def read_vocabulary(directory: pathlib.Path) -> stored_vocabulary.Vocabulary | None:
  """The vocabulary beside a model, with padding 0, or None."""
  theirs = _read_config(directory)
  pad, _ = _padding_and_start(theirs)
  made = _read_vocabulary(directory, theirs, pad)
  return tokenizer_files.Renumbered(made, pad) if made is not None and pad else made


def _read_vocabulary(directory: pathlib.Path, theirs: Mapping[str, Any], pad: int):
  options_path, model_path = directory / "tokenizer_config.json", directory / "spiece.model"
  options = files.read_json(options_path) if options_path.is_file() else {}
  if model_path.is_file():
    # The model files of mT5 and its kin hold their extra ids already.
    default = 100 if theirs.get("model_type") == "t5" and not pad else 0
    return vocabulary.SentencePieceVocabulary(
      model_path, extra_ids=options.get("extra_ids", default), padded=not pad
    )
  if str(options.get("tokenizer_class", "")).startswith("ByT5"):
    return vocabulary.ByteVocabulary(extra_ids=options.get("extra_ids", 125))
  path = directory / "tokenizer.json"
  if not path.is_file():
    return None
  eos = theirs.get("eos_token_id", 1)
  return tokenizer_files.TokenizerVocabulary(
    path, eos_id=eos[0] if isinstance(eos, list) else eos, pad_id=pad
  )


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
      "Expected `config` with one head for all layers: Hugging Face's T5 has no place for more."
      " Got `per_layer_heads`; save in this project's own format instead."
    )
  their_config = _their_config(config)
  parameters.check(params, config)
  flat = parameters.flatten(params)
  weights = {theirs: np.asarray(flat[ours]).T for ours, theirs in names(config).items()}
  weights[_EMBEDDING] = np.asarray(flat["token_embedder/embedding"])
  if not config.logits_via_embedding:
    weights[_HEAD] = np.asarray(flat["decoder/logits_dense/kernel"]).T
  writers = {
    "model.safetensors": files.safetensors_writer(weights, storage_dtype, format="pt"),
    "config.json": files.json_writer(their_config),
  }
  files.write_together(directory, writers)


def names(config: network.T5Config) -> dict[str, str]:
  """{T5X's path: Hugging Face's name} of all but the embedding and the head."""
  pairs = {}
  sides = {"encoder": config.num_encoder_layers, "decoder": config.num_decoder_layers}
  for side, num_layers in sides.items():
    for i in range(num_layers):
      pairs |= _layer_names(f"{side}/layers_{i}", f"{side}.block.{i}.layer", config)
    if not config.relpos_per_layer:
      first = f"{side}.block.0.layer.0.SelfAttention"
      pairs[f"{side}/relpos_bias/rel_embedding"] = f"{first}.{_RELPOS}"
    pairs[f"{side}/{side}_norm/scale"] = f"{side}.final_layer_norm.weight"
  return pairs


def _layer_names(ours: str, theirs: str, config: network.T5Config) -> dict[str, str]:
  if ours.startswith("encoder"):
    blocks = [("attention", "pre_attention_layer_norm", "SelfAttention")]
  else:
    blocks = [
      ("self_attention", "pre_self_attention_layer_norm", "SelfAttention"),
      ("encoder_decoder_attention", "pre_cross_attention_layer_norm", "EncDecAttention"),
    ]
  pairs = {}
  for k, (block, norm, their_block) in enumerate(blocks):
    pairs[f"{ours}/{norm}/scale"] = f"{theirs}.{k}.layer_norm.weight"
    for projection, letter in _PROJECTIONS.items():
      path = f"{ours}/{block}/{projection}/kernel"
      pairs[path] = f"{theirs}.{k}.{their_block}.{letter}.weight"
  if config.relpos_per_layer:
    pairs[f"{ours}/relpos_bias/rel_embedding"] = f"{theirs}.0.SelfAttention.{_RELPOS}"
  last = len(blocks)
  pairs[f"{ours}/pre_mlp_layer_norm/scale"] = f"{theirs}.{last}.layer_norm.weight"
  for dense in ("wi_0", "wi_1", "wo") if len(config.mlp_activations) == 2 else ("wi", "wo"):
    pairs[f"{ours}/mlp/{dense}/kernel"] = f"{theirs}.{last}.DenseReluDense.{dense}.weight"
  return pairs


def _rename(
  weights: Mapping[str, np.ndarray], config: network.T5Config
) -> dict[str, np.ndarray]:
  pairs = names(config)
  missing = sorted(set(pairs.values()) - set(weights))
  unknown = sorted(set(weights) - set(pairs.values()) - set(_UNUSED))
  if missing or unknown:
    raise ValueError(
      "Expected `path` to hold the weights that its config.json describes. Got"
      f" {len(missing)} missing {missing[:3]} and {len(unknown)} unknown {unknown[:3]}; give a"
      " whole T5 checkpoint of its own, adapters merged."
    )
  return {ours: np.ascontiguousarray(weights[theirs].T) for ours, theirs in pairs.items()}


def _read_weights(directory: pathlib.Path) -> dict[str, np.ndarray]:
  index_path = directory / "model.safetensors.index.json"
  if not index_path.is_file():
    path = directory / "model.safetensors"
    pickled = sorted(directory.glob("*.bin"))
    if pickled and not path.is_file():
      raise FileNotFoundError(
        f"Expected `path` to hold {path.name!r}. Got {pickled[0].name!r} only, a pickle, which"
        " is never opened here; save the model as safetensors with transformers first."
      )
    return files.read_safetensors(path)
  weight_map = files.read_json(index_path).get("weight_map")
  if not (isinstance(weight_map, dict) and weight_map) or not all(
    isinstance(name, str) and name.endswith(".safetensors") for name in weight_map.values()
  ):
    raise ValueError(
      f"Expected {index_path.name!r} to hold a `weight_map` of weights to .safetensors files."
      f" Got {repr(weight_map)[:60]} in {str(directory)!r}; download the checkpoint again."
    )
  weights: dict[str, np.ndarray] = {}
  for name in sorted(set(weight_map.values())):
    # The index is not trusted with where to look.
    shard = files.read_safetensors(directory / pathlib.PurePosixPath(name).name)
    listed = {weight for weight, place in weight_map.items() if place == name}
    if set(shard) != listed:
      odd = sorted(set(shard) ^ listed)
      raise ValueError(
        f"Expected {name!r} to hold the weights that {index_path.name!r} lists for it. Got"
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
      f"Expected `path` to hold the token embedding {_EMBEDDING!r}. Got none; give a whole T5"
      " checkpoint."
    )
  for name, copy in copies.items():
    if not np.array_equal(copy, embedding):
      raise ValueError(
        f"Expected `path` to hold one token embedding. Got {name!r} that differs from"
        f" {_EMBEDDING!r}: an encoder and a decoder with embeddings of their own are not T5."
      )
  return embedding, None if head is None or np.array_equal(head, embedding) else head


def _scales_decoder_states(theirs: Mapping[str, Any]) -> bool:
  """Whether decoder states are multiplied by emb_dim**-0.5 before the head.

  transformers 5 writes it down for T5 and never does it for mT5; before, it followed
  `tie_word_embeddings` (true by default for T5), which published mT5 sets to false.
  """
  if theirs["model_type"] == "mt5":
    return False
  tied = theirs.get("tie_word_embeddings", True)
  return theirs.get("scale_decoder_outputs", tied is not False)


def _check_config(theirs: Mapping[str, Any]) -> None:
  fixed = {
    "model_type": (MODEL_TYPES, None),
    "layer_norm_epsilon": ((1e-6,), 1e-6),
  }
  for field, (allowed, default) in fixed.items():
    value = theirs.get(field, default)
    if isinstance(value, bool | list | dict) or value not in allowed:
      raise ValueError(
        f"Expected `{field}` in config.json to be {' or '.join(repr(a) for a in allowed)} (the"
        f" T5 family). Got {value!r}; such a model computes another function."
      )
  for field in ("pad_token_id", "decoder_start_token_id"):
    value, rows = theirs.get(field), theirs.get("vocab_size", 0)
    rows = rows if type(rows) is int else 2**31  # which is refused below
    if value is not None and not (type(value) is int and 0 <= value < max(rows, 1)):
      raise ValueError(
        f"Expected `{field}` in config.json to be one of the {rows} rows of the embedding. Got"
        f" {value!r}; save the model again."
      )


def _config(theirs: Mapping[str, Any], *, logits_via_embedding: bool) -> network.T5Config:
  sizes = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")
  missing = [field for field in sizes if field not in theirs]
  if missing:
    raise ValueError(f"Expected config.json to give {', '.join(sizes)}. Missing: {missing}.")
  options = {"relpos_buckets": 32, "relpos_max_distance": 128}
  options |= {ours: theirs[name] for ours, name in _FIELDS.items() if name in theirs}
  if theirs.get("num_decoder_layers") is None:  # as many as the encoder has
    options["num_decoder_layers"] = theirs["num_layers"]
  return network.T5Config(
    **limits.check(options, _FIELDS),
    mlp_activations=_activations(theirs),
    logits_via_embedding=logits_via_embedding,
    exit_classifier=False,
    relpos_per_layer=theirs["model_type"] == "umt5",
  )


def _activations(theirs: Mapping[str, Any]) -> tuple[str, ...]:
  default = "relu" if theirs["model_type"] == "t5" else "gated-gelu"
  kind = theirs.get("feed_forward_proj", default)
  if not isinstance(kind, str):
    raise ValueError(
      f"Expected `feed_forward_proj` to be a name. Got {kind!r}; T5 1.1 has 'gated-gelu'."
    )
  # transformers means the tanh approximation by "gated-gelu", and by no other "gelu".
  name = "gelu_new" if kind == "gated-gelu" else kind.removeprefix("gated-")
  if name not in _ACTIVATIONS:
    raise ValueError(
      "Expected `feed_forward_proj` in config.json to be gated-gelu, relu, silu, gelu_new (or"
      f" one of these after 'gated-'). Got {kind!r}, which T5X's network does not have."
    )
  return (_ACTIVATIONS[name], "linear") if kind.startswith("gated-") else (_ACTIVATIONS[name],)


def _their_config(config: network.T5Config) -> dict[str, Any]:
  gated = len(config.mlp_activations) == 2
  activation = config.mlp_activations[0]
  known = {"relu": "relu", "silu": "silu", "gelu": "gelu" if gated else "gelu_new"}
  if activation not in known or (gated and config.mlp_activations[1] != "linear"):
    raise ValueError(
      f"Expected `config.mlp_activations` to be one of {sorted(known)}, alone or before"
      f" 'linear'. Got {config.mlp_activations}; save in this project's own format instead."
    )
  return {
    "architectures": [f"{'UM' * config.relpos_per_layer}T5ForConditionalGeneration"],
    "model_type": "umt5" if config.relpos_per_layer else "t5",
    "vocab_size": config.vocab_size,
    "d_model": config.emb_dim,
    "d_kv": config.head_dim,
    "d_ff": config.mlp_dim,
    "num_layers": config.num_encoder_layers,
    "num_decoder_layers": config.num_decoder_layers,
    "num_heads": config.num_heads,
    "feed_forward_proj": ("gated-" if gated else "") + known[activation],
    "dropout_rate": config.dropout_rate,
    "layer_norm_epsilon": 1e-6,
    "relative_attention_num_buckets": config.relpos_buckets,
    "relative_attention_max_distance": config.relpos_max_distance,
    "tie_word_embeddings": config.logits_via_embedding,
    "scale_decoder_outputs": config.logits_via_embedding,
    "is_encoder_decoder": True,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
  }
