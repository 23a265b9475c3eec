"""Hugging Face T5 checkpoints <-> T5X's parameter tree, without torch or
transformers.

Linear weights are stored [out, in] there and [in, out] here, relative position
biases [buckets, heads] there and [heads, buckets] here. Whether `lm_head` is
tied follows from the weights alone (configurations of transformers 5 call every
T5 tied); whether decoder states are scaled by emb_dim**-0.5 before it, by the
configuration. T5X ties and scales together; other combinations are folded into
an untied head.

The network takes token 0 for padding and for the start of decoding. A model
with other ids (MADLAD-400) has those rows exchanged, and its vocabulary with
them (`vocabulary.Renumbered`).
"""

import dataclasses
import pathlib
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from calm.checkpoints import files
from calm.data import vocabulary
from calm.t5 import limits, network, parameters

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
_SIZES = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")
# Their activation -> ours. flax's gelu is the tanh approximation, their
# "gelu_new".
_ACTIVATIONS = {
  "relu": "relu",
  "gelu_new": "gelu",
  "silu": "silu",
  "swish": "silu",
}
_IDS = ("pad_token_id", "eos_token_id", "decoder_start_token_id")
# The options of generation_config.json that leave decoding greedy only where
# they are None or:
_GREEDY: Mapping[str, Any] = {
  **{
    "num_beams": 1,
    "do_sample": False,
    "repetition_penalty": 1,
    "no_repeat_ngram_size": 0,
  },
  **dict.fromkeys(("min_length", "min_new_tokens"), 0),
  **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id")),
  **{
    name: []
    for name in ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids")
  },
}
_EMBEDDING = "shared.weight"
_HEAD = "lm_head.weight"
_COPIES_OF_EMBEDDING = (
  "encoder.embed_tokens.weight",
  "decoder.embed_tokens.weight",
)
# A leftover of early T5 1.0 conversions that no implementation reads.
_UNUSED = (
  "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",
)


def read(
  directory: pathlib.Path,
) -> tuple[network.T5Config, dict[str, np.ndarray]]:
  """(configuration without exit parts, {T5X's path: float32 array}) of a
  directory.

  Shapes are not yet checked. ValueError for another kind of model, or options
  that T5X's network does not have.
  """
  theirs, generation = _read_config(directory)
  with files.naming(directory / "config.json"):
    _check(theirs)
    config = _network_config(theirs)  # before any weight is read
  asked = {name: generation.get(name) for name in _GREEDY}
  if other := [
    f"{k}={v!r}" for k, v in asked.items() if v not in (None, _GREEDY[k])
  ]:
    warnings.warn(
      f"generation_config.json of {directory} asks for {', '.join(other)}; "
      "decoding here is"
      " greedy and leaves that out.",
      stacklevel=4,
    )
  weights = _read_weights(directory)
  embedding, head = _take_embedding_and_head(weights)
  # Are decoder states multiplied by emb_dim**-0.5 before the head? transformers
  # 5 stores it for T5 and never does it for mT5; before, it followed
  # `tie_word_embeddings` (true by default for T5), which published mT5 sets to
  # false.
  untied = theirs.get("tie_word_embeddings", True) is False
  scaled = theirs["model_type"] != "mt5" and theirs.get(
    "scale_decoder_outputs", not untied
  )
  pad, start = _padding_and_start(theirs)
  tied = head is None and scaled and not (pad or start)
  config = dataclasses.replace(config, logits_via_embedding=tied)
  pairs = _names(config)
  missing = sorted(set(pairs.values()) - set(weights))
  unknown = sorted(set(weights) - set(pairs.values()) - set(_UNUSED))
  if missing or unknown:
    raise ValueError(
      f"Expected the weights that config.json describes, got {len(missing)} "
      "missing"
      f" {missing[:3]} and {len(unknown)} unknown {unknown[:3]}; merge "
      "adapters, save again."
    )
  params = {
    ours: np.ascontiguousarray(weights[theirs].T)
    for ours, theirs in pairs.items()
  }
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


def _read_config(
  directory: pathlib.Path,
) -> tuple[dict[str, Any], dict[str, Any]]:
  """(config.json with the ids of generation, generation_config.json)."""
  theirs = files.read_json(directory / "config.json")
  generation = files.read_json(directory / "generation_config.json", missing={})
  ids = {
    name: generation[name] for name in _IDS if generation.get(name) is not None
  }
  return theirs | ids, generation


def _padding_and_start(theirs: Mapping[str, Any]) -> tuple[int, int]:
  """Ids of padding and of the start of decoding, which is padding unless it is
  named.
  """
  pad = theirs.get("pad_token_id") or 0
  start = theirs.get("decoder_start_token_id")
  return pad, pad if start is None else start


def _check(theirs: Mapping[str, Any]) -> None:
  """Raises ValueError, naming the field, for a model that is not of the T5
  family.
  """
  rows = theirs.get("vocab_size", 0)
  rows = rows if type(rows) is int else 2**31  # which `_network_config` refuses

  def is_row(value):
    return type(value) is int and 0 <= value < max(rows, 1)

  def is_flag(value):
    return isinstance(value, bool)

  row = f"one of the {rows} rows of the embedding"
  for field, default, is_good, expected in (
    (
      "model_type",
      "",
      lambda value: value in MODEL_TYPES,
      "'t5' or 'mt5' or 'umt5'",
    ),
    (
      "layer_norm_epsilon",
      1e-6,
      lambda value: value == 1e-6,
      "1e-06 (the T5 family)",
    ),
    ("tie_word_embeddings", None, is_flag, "true or false"),
    ("scale_decoder_outputs", None, is_flag, "true or false"),
    (
      "is_encoder_decoder",
      None,
      lambda value: value is True,
      "true: a whole model",
    ),
    ("pad_token_id", None, is_row, row),
    ("decoder_start_token_id", None, is_row, row),
  ):
    value = theirs.get(field, default)
    if not is_good(value) and (value is not None or default is not None):
      raise ValueError(
        f"Expected `{field}` in config.json to be {expected}, got {value!r:.60}"
      )


def _network_config(theirs: Mapping[str, Any]) -> network.T5Config:
  """Our configuration, without exit parts and with an untied head."""
  missing = [field for field in _SIZES if field not in theirs]
  if missing:
    raise ValueError(
      f"Expected config.json to give {', '.join(_SIZES)}, got none of {missing}"
    )
  options = {"relpos_buckets": 32, "relpos_max_distance": 128}
  options |= {
    ours: theirs[name] for ours, name in FIELDS.items() if name in theirs
  }
  if theirs.get("num_decoder_layers") is None:  # as many as the encoder has
    options["num_decoder_layers"] = theirs["num_layers"]
  kind = theirs.get(
    "feed_forward_proj",
    "relu" if theirs["model_type"] == "t5" else "gated-gelu",
  )
  # transformers means the tanh approximation by "gated-gelu", and by no other
  # "gelu".
  name = (
    "gelu_new" if kind == "gated-gelu" else str(kind).removeprefix("gated-")
  )
  if not isinstance(kind, str) or name not in _ACTIVATIONS:
    known = "gated-gelu, relu, silu, gelu_new, or one of these after 'gated-'"
    raise ValueError(
      f"Expected `feed_forward_proj` to be {known}, got {kind!r}"
    )
  activation = _ACTIVATIONS[name]
  return network.T5Config(
    **limits.check(options, FIELDS),
    mlp_activations=(activation, "linear")
    if kind.startswith("gated-")
    else (activation,),
    logits_via_embedding=False,
    exit_classifier=False,
    relpos_per_layer=theirs["model_type"] == "umt5",
  )


def _read_weights(directory: pathlib.Path) -> dict[str, np.ndarray]:
  index_path = directory / "model.safetensors.index.json"
  if not index_path.is_file():
    path = directory / "model.safetensors"
    pickled = sorted(directory.glob("*.bin"))
    if pickled and not path.is_file():
      raise FileNotFoundError(
        f"Expected `path` to hold {path.name!r}, got {pickled[0].name!r} "
        "only, a pickle, which"
        " is never opened; save the model as safetensors first."
      )
    return files.read_safetensors(path)[0]
  weight_map = files.read_json(index_path).get("weight_map")
  if not (isinstance(weight_map, dict) and weight_map) or not all(
    isinstance(name, str) and name.endswith(".safetensors")
    for name in weight_map.values()
  ):
    expected = (
      f"Expected {str(index_path)!r} to hold a `weight_map` to .safetensors "
      "files"
    )
    raise ValueError(f"{expected}, got {weight_map!r:.60}")
  # The index is not trusted with where to look.
  names = sorted(
    {pathlib.PurePosixPath(name).name for name in weight_map.values()}
  )
  shards = [files.read_safetensors(directory / name)[0] for name in names]
  if sorted(weight for shard in shards for weight in shard) != sorted(
    weight_map
  ):
    raise ValueError(
      f"Expected the weights that {str(index_path)!r} lists, got others"
    )
  return {name: weight for shard in shards for name, weight in shard.items()}


def _take_embedding_and_head(
  weights: dict[str, np.ndarray],
) -> tuple[np.ndarray, np.ndarray | None]:
  """Removes both from `weights`; the head is None where it is the embedding."""
  copies = {n: weights.pop(n) for n in _COPIES_OF_EMBEDDING if n in weights}
  head = weights.pop(_HEAD, None)
  # Tied weights are stored once, under any of their names.
  embedding = weights.pop(_EMBEDDING, next(iter(copies.values()), head))
  if embedding is None:
    raise ValueError(
      f"Expected `path` to hold the token embedding {_EMBEDDING!r}, got none"
    )
  for name, copy in copies.items():
    if not np.array_equal(copy, embedding):
      got = f"got {name!r} that differs from {_EMBEDDING!r}"
      raise ValueError(f"Expected `path` to hold one token embedding, {got}")
  return embedding, None if head is None or np.array_equal(
    head, embedding
  ) else head


# The attention blocks of a layer, in order: our name, our norm, their name.
_BLOCKS = {
  "encoder": (("attention", "pre_attention_layer_norm", "SelfAttention"),),
  "decoder": (
    ("self_attention", "pre_self_attention_layer_norm", "SelfAttention"),
    (
      "encoder_decoder_attention",
      "pre_cross_attention_layer_norm",
      "EncDecAttention",
    ),
  ),
}
_PROJECTIONS = {"query": "q", "key": "k", "value": "v", "out": "o"}


def _names(config: network.T5Config) -> dict[str, str]:
  """{T5X's path: Hugging Face's name} of all weights but the embedding and the
  head.
  """
  pairs = {}
  denses = (
    ("wi_0", "wi_1", "wo") if len(config.mlp_activations) == 2 else ("wi", "wo")
  )
  sides = {
    "encoder": config.num_encoder_layers,
    "decoder": config.num_decoder_layers,
  }
  for side, num_layers in sides.items():
    for i in range(num_layers):
      ours = f"{side}/layers_{i}"
      theirs = f"{side}.block.{i}.layer"
      for k, (block, norm, their_block) in enumerate(_BLOCKS[side]):
        pairs[f"{ours}/{norm}/scale"] = f"{theirs}.{k}.layer_norm.weight"
        for projection, letter in _PROJECTIONS.items():
          kernel = f"{ours}/{block}/{projection}/kernel"
          pairs[kernel] = f"{theirs}.{k}.{their_block}.{letter}.weight"
      last = f"{theirs}.{len(_BLOCKS[side])}"
      pairs[f"{ours}/pre_mlp_layer_norm/scale"] = f"{last}.layer_norm.weight"
      for dense in denses:
        pairs[f"{ours}/mlp/{dense}/kernel"] = (
          f"{last}.DenseReluDense.{dense}.weight"
        )
      if config.relpos_per_layer or i == 0:
        place = ours if config.relpos_per_layer else side
        name = f"{theirs}.0.SelfAttention.relative_attention_bias.weight"
        pairs[f"{place}/relpos_bias/rel_embedding"] = name
    pairs[f"{side}/{side}_norm/scale"] = f"{side}.final_layer_norm.weight"
  return pairs


def read_vocabulary(directory: pathlib.Path) -> vocabulary.Vocabulary | None:
  """The vocabulary beside a model, with padding 0, or None.

  `spiece.model` or ByT5's bytes, unless tokens were added to them, or
  `tokenizer.json`.
  """
  theirs, _ = _read_config(directory)
  pad, _ = _padding_and_start(theirs)
  ends = theirs.get("eos_token_id", 1)
  ends = ends if isinstance(ends, list) and ends else [ends]
  options = files.read_json(directory / "tokenizer_config.json", missing={})
  # As transformers looks for it: ByT5's may be named in config.json alone.
  kind = options.get("tokenizer_class") or theirs.get("tokenizer_class")
  made = None
  pieces = directory / "spiece.model"
  path = directory / "tokenizer.json"
  if pieces.is_file():
    # The model files of mT5 and its kin hold their extra ids already.
    default = 100 if theirs.get("model_type") == "t5" and not pad else 0
    made = vocabulary.SentencePieceVocabulary(
      pieces, extra_ids=options.get("extra_ids", default), padded=not pad
    )
    if ends != [None] and made.eos_id not in ends:
      expected = (
        f"to end a text with the model's token {ends[0]} (`eos_token_id`)"
      )
      raise ValueError(
        f"Expected {str(pieces)!r} {expected}, got {made.eos_id}"
      )
  elif str(kind).startswith("ByT5"):
    made = vocabulary.ByteVocabulary(extra_ids=options.get("extra_ids", 125))
  if made is None or _has_added_tokens(directory, made):
    if not path.is_file():
      return None
    if type(ends[0]) is not int or not 0 <= ends[0] < 2**31 or ends[0] == pad:
      expected = "to be a token id, and not that of padding"
      raise ValueError(
        f"Expected `eos_token_id` of {str(directory)!r} {expected}, got "
        f"{ends[0]!r}"
      )
    made = vocabulary.TokenizerVocabulary(path, eos_id=ends[0], pad_id=pad)
  return vocabulary.Renumbered(made, pad) if pad else made


def _has_added_tokens(directory: pathlib.Path, pieces: Any) -> bool:
  """Whether tokens were added after `pieces`, all of them in tokenizer.json.

  transformers lists them there and, before its version 5, in added_tokens.json
  and in `added_tokens_decoder` of tokenizer_config.json, among padding, EOS and
  T5's sentinels. A listed token at the id of a piece is that piece; a sentinel
  is its own, wherever it stands.
  """

  def read(name):
    return files.read_json(directory / name, missing={})

  try:
    held = {
      t["id"]: t["content"]
      for t in read("tokenizer.json").get("added_tokens") or ()
    }
    listed = held | {i: token for token, i in read("added_tokens.json").items()}
    decoder = read("tokenizer_config.json").get("added_tokens_decoder") or {}
    listed |= {int(i): token["content"] for i, token in decoder.items()}
    if not all(
      type(i) is int and isinstance(token, str) for i, token in listed.items()
    ):
      raise TypeError(f"{listed!r:.60}")
  except (AttributeError, KeyError, TypeError) as error:
    expected = "to list added tokens, each a text with its id"
    raise ValueError(
      f"Expected files of {str(directory)!r} {expected}, got {error}"
    ) from error
  first = pieces.vocab_size - pieces.extra_ids
  added = {
    i: t
    for i, t in listed.items()
    if i >= first and not vocabulary.SENTINEL.fullmatch(t)
  }
  for token_id, token in added.items():
    if held.get(token_id) != token:
      raise ValueError(
        f"Expected {str(directory / 'tokenizer.json')!r} to hold all tokens "
        "that were added,"
        f" got {token!r} ({token_id}) elsewhere only; save it once with a "
        "fast tokenizer:"
        " AutoTokenizer.from_pretrained(FOLDER, "
        "use_fast=True).save_pretrained(FOLDER)."
      )
  return bool(added)


def write(
  directory: pathlib.Path, params: Mapping[str, Any], config: network.T5Config
) -> None:
  """Writes a directory that transformers' `T5ForConditionalGeneration` opens,
  without exits.

  ValueError for an activation that it lacks, or `params` that are no tree of
  `config`.
  """
  gated = len(config.mlp_activations) == 2
  activation = config.mlp_activations[0]
  known = {
    "relu": "relu",
    "silu": "silu",
    "gelu": "gelu" if gated else "gelu_new",
  }
  if activation not in known or (
    gated and config.mlp_activations[1] != "linear"
  ):
    expected = (
      f"Expected `config.mlp_activations` of {sorted(known)}, alone or "
      "before 'linear'"
    )
    raise ValueError(f"{expected}, got {config.mlp_activations}")
  parameters.check(params, config)
  flat = parameters.flatten(params)
  weights = {
    theirs: np.asarray(flat[ours]).T for ours, theirs in _names(config).items()
  }
  weights[_EMBEDDING] = np.asarray(flat["token_embedder/embedding"])
  if not config.logits_via_embedding:
    weights[_HEAD] = np.asarray(flat["decoder/logits_dense/kernel"]).T
  tied = config.logits_via_embedding
  their_config = {
    "architectures": [
      f"{'UM' * config.relpos_per_layer}T5ForConditionalGeneration"
    ],
    "model_type": "umt5" if config.relpos_per_layer else "t5",
    **{name: getattr(config, ours) for ours, name in FIELDS.items()},
    "feed_forward_proj": ("gated-" if gated else "") + known[activation],
    "layer_norm_epsilon": 1e-6,
    "tie_word_embeddings": tied,
    "scale_decoder_outputs": tied,
    "is_encoder_decoder": True,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
  }
  model = files.safetensors_writer(weights, format="pt")
  config_file = files.json_writer(their_config)
  files.write_together(
    directory, {"model.safetensors": model, "config.json": config_file}
  )
