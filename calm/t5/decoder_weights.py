"""T5X-shaped parameters laid out for decoding: made once, at load time, and
never saved.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from calm import exits
from calm.exits.confidence import Probes
from calm.t5 import eight_bits, kernels, network, parameters, platforms
from calm.t5.network import Params
from calm.t5.tiles import Tiles, tiled, with_inputs

# A matrix that every step reads: as it is, or in tiles, maybe of 8-bit codes.
Matrix = jax.Array | Tiles


@struct.dataclass
class LayerWeights:
  """One decoder layer."""

  self_norm: jax.Array  # scales, [emb_dim]
  query: Matrix  # [emb_dim, heads * head_dim]
  # One matrix [emb_dim, 2 * heads * head_dim], or two
  # (`platforms.key_value_apart`); apart from the query, because filling a
  # skipped layer reads them alone and XLA would copy them out of a wider matrix
  # every time.
  key_value: tuple[Matrix, ...]
  self_out: Matrix  # [heads * head_dim, emb_dim]
  cross_norm: jax.Array
  cross_query: Matrix
  cross_out: Matrix
  mlp_norm: jax.Array
  # One matrix [emb_dim, mlp_dim] an activation; apart: XLA:CPU takes a twelfth
  # more time for more rows than one where they are fused.
  mlp_in: tuple[Matrix, ...]
  mlp_out: Matrix  # [mlp_dim, emb_dim]


@struct.dataclass
class LearnedPropagation:
  """Linear maps from exit layers j to the inputs of the layers k that a token
  skips.
  """

  # the exit layers, ascending
  layers: tuple[int, ...] = struct.field(pytree_node=False)
  down: tuple[Matrix, ...]  # of every exit layer, [emb_dim, rank]
  bias: tuple[jax.Array, ...]  # of every exit layer, [rank]
  # Of every decoder layer k, [maps * rank, emb_dim]: those of the exit layers
  # before k, if any.
  up: tuple[Matrix | None, ...]

  @property
  def rank(self) -> int:
    """Numbers that an exit layer keeps of a token."""
    return self.bias[0].shape[0]

  @property
  def width(self) -> int:
    """Numbers that are kept of a token, one block an exit layer."""
    return self.rank * len(self.layers)

  def codes(self, layer: int) -> int:
    """Numbers of a token that a decoder layer reads."""
    return self.rank * sum(j < layer for j in self.layers)

  def from_layers(self, layers: Sequence[int]) -> "LearnedPropagation":
    """Of some of the exit layers alone."""
    at = [self.layers.index(layer) for layer in layers]
    rank = self.rank

    def of(parts):
      return tuple(parts[i] for i in at)

    up = []
    for layer, whole in enumerate(self.up, start=1):
      codes = [
        i * rank + n for i in at if self.layers[i] < layer for n in range(rank)
      ]
      up.append(
        with_inputs(whole, codes) if whole is not None and codes else None
      )
    return LearnedPropagation(
      tuple(layers), of(self.down), of(self.bias), tuple(up)
    )


@struct.dataclass
class DecoderWeights:
  """What a decode step reads."""

  embedding: jax.Array  # [vocab, emb_dim], in the dtype of the matrices
  # [heads, buckets]: one for all layers, or one a layer
  relpos: tuple[jax.Array, ...]
  layers: tuple[LayerWeights, ...]
  # Of every layer, [emb_dim, 2 * heads * head_dim]; apart, since it is read
  # once a prompt.
  cross_key_value: tuple[jax.Array | eight_bits.EightBits, ...]
  decoder_norm: jax.Array  # [emb_dim]
  # of all layers, [emb_dim, num_pieces]
  head: Matrix | eight_bits.QuantizedHead
  exit_kernel: jax.Array | None  # [emb_dim], or None without a classifier
  exit_bias: jax.Array | None  # []
  shortlist: Matrix | None = None  # the head's columns for likely tokens
  probes: Probes | None = None
  shortlist_ids: jax.Array | None = None  # those tokens, int32
  # (A, b) of normed states x + x A + b, by 1-based exit layer, of those that
  # have one: A in the dtype of the heads, [emb_dim, emb_dim], b float32,
  # [emb_dim].
  translators: Mapping[int, tuple[Matrix, jax.Array]] = struct.field(
    default_factory=dict
  )
  propagation: LearnedPropagation | None = None

  def for_exits(self, rule: exits.Rule, num_layers: int) -> "DecoderWeights":
    """The weights with learned propagation from the exits that a rule may take
    alone; ValueError where there is none.
    """
    maps = self.propagation
    layers = exits.mapped_layers(
      rule, num_layers, () if maps is None else maps.layers
    )
    if maps is None or not layers or layers == maps.layers:
      return self
    return dataclasses.replace(self, propagation=maps.from_layers(layers))


def decoder_weights(
  params: Params,
  config: network.T5Config,
  num_pieces: int | None = None,
  shortlist: Sequence[int] | None = None,
  weights_dtype: Any = None,
  head_dtype: str | None = None,
  encoder_dtype: str | None = None,
  native: bool = False,
) -> DecoderWeights:
  """Lays T5X-shaped `params` out for decoding; the arguments are those of
  `program.model_weights`. Columns beyond `num_pieces` are cut from the heads,
  which is the same as logits of -inf for them.
  """
  decoder = params["decoder"]
  dtype = jnp.dtype(config.dtype)
  in_8_bits = weights_dtype == "int8"
  matrices = jnp.dtype(
    dtype if in_8_bits or weights_dtype is None else weights_dtype
  )
  num_pieces = config.vocab_size if num_pieces is None else num_pieces
  if not 0 < num_pieces <= config.vocab_size:
    raise ValueError(
      f"Expected a vocabulary of at most {config.vocab_size} pieces, the "
      "rows of the model's"
      f" embedding, got {num_pieces}; this vocabulary belongs to another model."
    )
  head = parameters.head_kernel(params, config)[:, :num_pieces]
  if weights_dtype is not None and not in_8_bits:
    head = head.astype(matrices)
  codes_first = head_dtype == "int8" and kernels.available()

  def in_tiles(x):
    return tiled(x) if native and kernels.reads_tiles(x.dtype) else x

  stored = eight_bits.rounded if in_8_bits else in_tiles
  classifier = decoder.get("exit_classifier")
  layers = [decoder[f"layers_{i}"] for i in range(config.num_decoder_layers)]
  translators = parameters.by_layer(decoder.get("exit_translators", {}))
  in_codes = in_8_bits or encoder_dtype == "int8"
  cross = "encoder_decoder_attention"

  def once(matrix):
    return eight_bits.quantize(matrix, tiled=True) if in_codes else matrix

  return DecoderWeights(
    embedding=jnp.asarray(params["token_embedder"]["embedding"], matrices),
    relpos=tuple(
      jnp.asarray(part["relpos_bias"]["rel_embedding"], dtype)
      for part in (layers if config.relpos_per_layer else [decoder])
    ),
    layers=tuple(
      _layer_weights(layer, config, matrices, stored) for layer in layers
    ),
    cross_key_value=tuple(
      once(_beside(layer[cross], matrices)) for layer in layers
    ),
    decoder_norm=jnp.asarray(decoder["decoder_norm"]["scale"], dtype),
    head=eight_bits.quantize_head(head) if codes_first else stored(head),
    exit_kernel=None
    if classifier is None
    else jnp.asarray(classifier["kernel"])[:, 0],
    exit_bias=None
    if classifier is None
    else jnp.asarray(classifier["bias"])[0],
    shortlist=None
    if shortlist is None
    else in_tiles(_shortlist_head(head, shortlist)),
    probes=parameters.probes(params),
    shortlist_ids=None
    if shortlist is None
    else jnp.asarray(shortlist, jnp.int32),
    translators={
      layer: (
        in_tiles(jnp.asarray(part["kernel"], head.dtype)),
        jnp.asarray(part["bias"], jnp.float32),
      )
      for layer, part in translators.items()
    },
    propagation=_learned_propagation(
      decoder.get("exit_propagation", {}), config, matrices, in_tiles
    ),
  )


def _learned_propagation(
  parts: Params,
  config: network.T5Config,
  matrices: Any,
  stored: Callable[[jax.Array], Matrix],
) -> LearnedPropagation | None:
  """The maps laid out by the layer that reads them; None without any."""
  found = parameters.by_layer(parts)

  def kernel(part):
    return jnp.asarray(part["kernel"], matrices)

  if not found:
    return None
  ups = {layer: kernel(part["up"]) for layer, part in found.items()}

  def before(k):
    return [up[k - j - 1] for j, up in ups.items() if j < k]

  blocks = map(before, range(1, config.num_decoder_layers + 1))
  return LearnedPropagation(
    tuple(found),
    tuple(stored(kernel(part["down"])) for part in found.values()),
    tuple(jnp.asarray(part["down"]["bias"]) for part in found.values()),
    tuple(
      stored(jnp.concatenate(of_layer)) if of_layer else None
      for of_layer in blocks
    ),
  )


def _layer_weights(
  layer: Params,
  config: network.T5Config,
  matrices: Any,
  stored: Callable[[jax.Array], Matrix],
) -> LayerWeights:
  """One layer, its matrices as they are `stored`."""

  def kernel(block, name):
    return jnp.asarray(layer[block][name]["kernel"], matrices)

  def scale(name):
    return jnp.asarray(layer[name]["scale"], config.dtype)

  names = ["key", "value"]
  apart = (
    [[name] for name in names]
    if platforms.key_value_apart(matrices)
    else [names]
  )
  mlp_names = sorted({*layer["mlp"]} - {"wo"})  # "wi", or "wi_0", "wi_1" ...
  return LayerWeights(
    self_norm=scale("pre_self_attention_layer_norm"),
    query=stored(kernel("self_attention", "query")),
    key_value=tuple(
      stored(_beside(layer["self_attention"], matrices, p)) for p in apart
    ),
    self_out=stored(kernel("self_attention", "out")),
    cross_norm=scale("pre_cross_attention_layer_norm"),
    cross_query=stored(kernel("encoder_decoder_attention", "query")),
    cross_out=stored(kernel("encoder_decoder_attention", "out")),
    mlp_norm=scale("pre_mlp_layer_norm"),
    mlp_in=tuple(stored(kernel("mlp", name)) for name in mlp_names),
    mlp_out=stored(kernel("mlp", "wo")),
  )


def _beside(
  block: Params, dtype: Any, names: Sequence[str] = ("key", "value")
) -> jax.Array:
  """Matrices of an attention, one beside the other."""
  return jnp.concatenate(
    [jnp.asarray(block[n]["kernel"], dtype) for n in names], axis=1
  )


def _shortlist_head(head: jax.Array, shortlist: Sequence[int]) -> jax.Array:
  ids = np.asarray(shortlist, np.int64)
  num_pieces = head.shape[1]
  distinct = len(np.unique(ids)) == len(ids)
  if len(ids) < 2 or not distinct or ids.min() < 0 or ids.max() >= num_pieces:
    raise ValueError(
      "Expected `shortlist` to be two or more different token ids below "
      f"{num_pieces},"
      f" got {len(ids)} ids, {ids[:5].tolist()} ...; make it from this "
      "vocabulary."
    )
  return head[:, ids]
