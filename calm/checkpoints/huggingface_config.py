"""Hugging Face's config.json and generation_config.json <-> the configuration of a network."""

import pathlib
import warnings
from collections.abc import Mapping
from typing import Any

from calm.checkpoints import files
from calm.t5 import limits, network

MODEL_TYPES = ("t5", "mt5", "umt5")
# Our field -> theirs; those that a file may lack have T5's defaults in both.
FIELDS = {
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


def read(directory: pathlib.Path) -> dict[str, Any]:
  """config.json with the ids that generation goes by, where they stand apart."""
  theirs = files.read_json(directory / "config.json")
  generation = _generation(directory)
  theirs |= {name: generation[name] for name in _IDS if generation.get(name) is not None}
  return theirs


def _generation(directory: pathlib.Path) -> dict[str, Any]:
  path = directory / "generation_config.json"
  return files.read_json(path) if path.exists() else {}


def warn_unless_greedy(directory: pathlib.Path) -> None:
  """Says what generation_config.json asks for beyond greedy decoding."""
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


def padding_and_start(theirs: Mapping[str, Any]) -> tuple[int, int]:
  """Ids of padding and of what decoding starts from, which is padding unless it is named."""
  pad = theirs.get("pad_token_id") or 0
  start = theirs.get("decoder_start_token_id")
  return pad, pad if start is None else start


def scales_decoder_states(theirs: Mapping[str, Any]) -> bool:
  """Whether decoder states are multiplied by emb_dim**-0.5 before the head.

  transformers 5 writes it down for T5 and never does it for mT5; before, it followed
  `tie_word_embeddings` (true by default for T5), which published mT5 sets to false.
  """
  if theirs["model_type"] == "mt5":
    return False
  tied = theirs.get("tie_word_embeddings", True)
  return theirs.get("scale_decoder_outputs", tied is not False)


def check(theirs: Mapping[str, Any]) -> None:
  """Refuses what is not of the T5 family.

  Raises:
    ValueError: another kind of model, or an id outside of the embedding; names the field.
  """
  fixed = {
    "model_type": (MODEL_TYPES, None),
    "layer_norm_epsilon": ((1e-6,), 1e-6),
  }
  for field, (allowed, default) in fixed.items():
    value = theirs.get(field, default)
    if isinstance(value, bool | list | dict) or value not in allowed:
      raise ValueError(
        f"Expected `{field}` in config.json to be {' or '.join(repr(a) for a in allowed)} (the"
        f" T5 family), got {value!r}; such a model computes another function."
      )
  _check_kind(theirs)
  for field in ("pad_token_id", "decoder_start_token_id"):
    value, rows = theirs.get(field), theirs.get("vocab_size", 0)
    rows = rows if type(rows) is int else 2**31  # which is refused below
    if value is not None and not (type(value) is int and 0 <= value < max(rows, 1)):
      raise ValueError(
        f"Expected `{field}` in config.json to be one of the {rows} rows of the embedding, got"
        f" {value!r}; save the model again."
      )


def _check_kind(theirs: Mapping[str, Any]) -> None:
  for field in ("tie_word_embeddings", "is_encoder_decoder", "scale_decoder_outputs"):
    value = theirs.get(field)
    if value is not None and not isinstance(value, bool):
      raise ValueError(
        f"Expected `{field}` in config.json to be true or false, got {value!r:.60}; save the"
        " model again."
      )
  if theirs.get("is_encoder_decoder") is False:
    raise ValueError(
      "Expected `is_encoder_decoder` in config.json to be true, got False: that is an encoder"
      " alone, which writes no text; take the whole model."
    )
  names = theirs.get("architectures")
  names = [] if names is None else names
  if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
    raise ValueError(
      "Expected `architectures` in config.json to be a list of class names, got"
      f" {names!r:.60}; save the model again."
    )


def network_config(
  theirs: Mapping[str, Any], *, logits_via_embedding: bool
) -> network.T5Config:
  """Our configuration of theirs, without exit parts.

  Args:
    theirs: config.json, checked.
    logits_via_embedding: whether the head is the embedding, which the weights tell.

  Raises:
    ValueError: a size is missing or impossible, or an activation is unknown.
  """
  sizes = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")
  missing = [field for field in sizes if field not in theirs]
  if missing:
    raise ValueError(
      f"Expected config.json to give {', '.join(sizes)}, got none of {missing}; copy or"
      " download it again."
    )
  options = {"relpos_buckets": 32, "relpos_max_distance": 128}
  options |= {ours: theirs[name] for ours, name in FIELDS.items() if name in theirs}
  if theirs.get("num_decoder_layers") is None:  # as many as the encoder has
    options["num_decoder_layers"] = theirs["num_layers"]
  return network.T5Config(
    **limits.check(options, FIELDS),
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
      f"Expected `feed_forward_proj` to be a name, got {kind!r}; T5 1.1 has 'gated-gelu'."
    )
  # transformers means the tanh approximation by "gated-gelu", and by no other "gelu".
  name = "gelu_new" if kind == "gated-gelu" else kind.removeprefix("gated-")
  if name not in _ACTIVATIONS:
    raise ValueError(
      "Expected `feed_forward_proj` in config.json to be gated-gelu, relu, silu, gelu_new"
      f" (or one of these after 'gated-'), got {kind!r}; T5X's network has no other."
    )
  return (_ACTIVATIONS[name], "linear") if kind.startswith("gated-") else (_ACTIVATIONS[name],)


def their_config(config: network.T5Config) -> dict[str, Any]:
  """config.json for ours.

  Raises:
    ValueError: activations that transformers does not have.
  """
  gated = len(config.mlp_activations) == 2
  activation = config.mlp_activations[0]
  known = {"relu": "relu", "silu": "silu", "gelu": "gelu" if gated else "gelu_new"}
  if activation not in known or (gated and config.mlp_activations[1] != "linear"):
    raise ValueError(
      f"Expected `config.mlp_activations` to be one of {sorted(known)}, alone or before"
      f" 'linear', got {config.mlp_activations}; save in this project's own format instead."
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
