"""Tiny random models and prompts for tests: plain numpy, the same for the same
seed.

A random network with T5's initialisation has near-uniform softmaxes, so every
early-exit decision would be a tie or the same. Here the head is scaled so that
softmax margins spread over [0, 1], the exit classifier so that its sigmoid
does, and the blocks so that consecutive hidden states differ; the column of the
end-of-text token is larger than the others so that some rows end early. Norm
scales and the classifier's offset are not their initial values, so that a
decoder that forgets one disagrees.

    config = toys.Config(num_decoder_layers=5)
    params = toys.params(config, seed=1)
    prompts = toys.prompts(seed=2, batch=8, length=12,
    num_pieces=config.num_pieces)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

EOS_ID = 1
FIRST_PIECE = 3  # 0 pad, 1 end of text, 2 unknown.


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes of a toy, under the names that every T5 configuration here uses.

  `num_pieces` is the vocabulary; the embedding has `vocab_size` rows, more than
  that, so that a decoder that may emit an id beyond the pieces is caught.
  """

  vocab_size: int = 48
  num_pieces: int = 40
  emb_dim: int = 16
  num_heads: int = 2
  num_encoder_layers: int = 2
  num_decoder_layers: int = 4
  head_dim: int = 8
  mlp_dim: int = 24
  mlp_activations: Sequence[str] = ("gelu", "linear")
  logits_via_embedding: bool = False
  exit_classifier: bool = True
  exit_probes: bool = False
  exit_translators: Sequence[int] = ()
  exit_propagation: Sequence[int] = ()
  exit_propagation_rank: int = 0
  relpos_buckets: int = 32
  relpos_max_distance: int = 128


# The smallest network with an exit before its last layer, where only names and
# shapes matter.
SMALLEST: dict[str, Any] = dict(
  emb_dim=8,
  num_heads=2,
  num_encoder_layers=1,
  num_decoder_layers=2,
  head_dim=4,
  mlp_dim=12,
  mlp_activations=("gelu", "linear"),
)


def network_fields(config: Config) -> dict[str, Any]:
  """The configuration as keyword arguments of the network's own (`num_pieces`
  left out).
  """
  fields = dataclasses.asdict(config)
  del fields["num_pieces"]
  return fields


class _Draw:
  """Float32 leaves from one seeded generator; the order of calls is the order
  of the tree.
  """

  def __init__(self, config: Any, seed: int):
    self.config = config
    self.rng = np.random.default_rng(seed)

  def normal(self, *shape: int, std: float) -> np.ndarray:
    return (std * self.rng.standard_normal(shape)).astype(np.float32)

  def kernel(
    self, rows: int, columns: int, gain: float = 1.0
  ) -> dict[str, np.ndarray]:
    return {"kernel": self.normal(rows, columns, std=gain / np.sqrt(rows))}

  def norm(self) -> dict[str, np.ndarray]:
    scale = self.rng.uniform(0.7, 1.3, self.config.emb_dim)
    return {"scale": scale.astype(np.float32)}

  def attention(self, gain: float) -> dict[str, Any]:
    cfg = self.config
    joined = cfg.num_heads * cfg.head_dim
    return {
      # Logits are not divided by sqrt(head_dim), so queries are drawn that much
      # smaller.
      "query": self.kernel(
        cfg.emb_dim, joined, gain=1.5 / np.sqrt(cfg.head_dim)
      ),
      "key": self.kernel(cfg.emb_dim, joined),
      "value": self.kernel(cfg.emb_dim, joined),
      "out": self.kernel(joined, cfg.emb_dim, gain=gain),
    }

  def mlp(self, gain: float) -> dict[str, Any]:
    cfg = self.config
    gates = len(cfg.mlp_activations)
    names = ["wi"] if gates == 1 else [f"wi_{i}" for i in range(gates)]
    kernels: dict[str, Any] = {
      name: self.kernel(cfg.emb_dim, cfg.mlp_dim) for name in names
    }
    kernels["wo"] = self.kernel(cfg.mlp_dim, cfg.emb_dim, gain=gain)
    return kernels

  def relpos_bias(self) -> dict[str, np.ndarray]:
    cfg = self.config
    return {
      "rel_embedding": self.normal(cfg.num_heads, cfg.relpos_buckets, std=1.0)
    }

  def head(self, sharpness: float) -> dict[str, np.ndarray]:
    head = self.kernel(
      self.config.emb_dim, self.config.vocab_size, gain=sharpness
    )
    head["kernel"][:, EOS_ID] *= 1.7
    return head


def params(config: Any, seed: int, *, sharpness: float = 4.0) -> dict[str, Any]:
  """A random parameter tree of T5X's T5 1.1 shape, float32; `config` is a
  `Config`, or any object with its attributes other than `num_pieces`.

  `sharpness` is the standard deviation of the logits: 4 spreads softmax margins
  over [0, 1], 1000 saturates them (margin exactly 1 in float32).
  """
  draw = _Draw(config, seed)
  tied = config.logits_via_embedding
  # A tied head reads the embedding divided by sqrt(emb_dim): its scale is the
  # sharpness.
  embedding = draw.normal(
    config.vocab_size, config.emb_dim, std=sharpness if tied else 1.0
  )
  return {
    "token_embedder": {"embedding": embedding},
    "encoder": _encoder(draw),
    "decoder": _decoder(
      draw, sharpness, block_gain=5.0 * sharpness if tied else 3.0
    ),
  }


def _encoder(draw: _Draw) -> dict[str, Any]:
  tree: dict[str, Any] = {
    "relpos_bias": draw.relpos_bias(),
    "encoder_norm": draw.norm(),
  }
  for i in range(draw.config.num_encoder_layers):
    tree[f"layers_{i}"] = {
      "pre_attention_layer_norm": draw.norm(),
      "attention": draw.attention(gain=1.0),
      "pre_mlp_layer_norm": draw.norm(),
      "mlp": draw.mlp(gain=1.0),
    }
  return tree


def _decoder(
  draw: _Draw, sharpness: float, block_gain: float
) -> dict[str, Any]:
  cfg = draw.config
  tree: dict[str, Any] = {
    "relpos_bias": draw.relpos_bias(),
    "decoder_norm": draw.norm(),
  }
  for i in range(cfg.num_decoder_layers):
    tree[f"layers_{i}"] = {
      "pre_self_attention_layer_norm": draw.norm(),
      "self_attention": draw.attention(gain=block_gain),
      "pre_cross_attention_layer_norm": draw.norm(),
      "encoder_decoder_attention": draw.attention(gain=block_gain),
      "pre_mlp_layer_norm": draw.norm(),
      "mlp": draw.mlp(gain=block_gain),
    }
  if not cfg.logits_via_embedding:
    tree["logits_dense"] = draw.head(sharpness)
  if cfg.exit_classifier:
    tree["exit_classifier"] = {
      **draw.kernel(cfg.emb_dim, 1, gain=3.0),
      "bias": np.array([0.3], np.float32),
    }
  if cfg.exit_probes:
    tree["exit_probes"] = _probes(draw)
  # Any object with the attributes of older configurations will do.
  if translated := getattr(cfg, "exit_translators", ()):
    tree["exit_translators"] = {
      f"layers_{i - 1}": _translator(draw) for i in translated
    }
  if mapped := getattr(cfg, "exit_propagation", ()):
    tree["exit_propagation"] = {
      f"layers_{j - 1}": _propagation(draw, j) for j in mapped
    }
  return tree


def _translator(draw: _Draw) -> dict[str, Any]:
  emb_dim = draw.config.emb_dim
  return {
    **draw.kernel(emb_dim, emb_dim, gain=1.0),
    "bias": draw.normal(emb_dim, std=0.3),
  }


def _propagation(draw: _Draw, layer: int) -> dict[str, Any]:
  """Predictions that differ from d^j by about as much as a block of a layer
  changes it.
  """
  cfg = draw.config
  rank = cfg.exit_propagation_rank
  skipped = cfg.num_decoder_layers - layer
  return {
    "down": {
      **draw.kernel(cfg.emb_dim, rank),
      "bias": draw.normal(rank, std=0.3),
    },
    "up": {
      "kernel": draw.normal(skipped, rank, cfg.emb_dim, std=3.0 / np.sqrt(rank))
    },
  }


def _probes(draw: _Draw) -> dict[str, Any]:
  count = draw.config.num_decoder_layers - 1
  return {
    **draw.kernel(draw.config.emb_dim, count, gain=3.0),
    "features": draw.normal(5, count, std=0.3),
    "bias": draw.normal(count, std=0.3),
  }


def shortlist(config: Any) -> tuple[int, ...]:
  """Every other piece, the end of text included: some likely tokens are off the
  list.
  """
  return tuple(range(1, config.num_pieces, 2))


def prompts(
  seed: int, *, batch: int, length: int, num_pieces: int, min_length: int = 2
) -> np.ndarray:
  """Random prompts of ids below `num_pieces`, [batch, length] int32; each row
  ends with the end-of-text id, then 0. The first row is full, the second has
  `min_length` tokens.
  """
  rng = np.random.default_rng(seed)
  lengths = rng.integers(min_length, length + 1, size=batch)
  lengths[0] = length
  lengths[1:2] = min_length
  tokens = rng.integers(FIRST_PIECE, num_pieces, size=(batch, length))
  for row, real in zip(tokens, lengths, strict=True):
    row[real - 1] = EOS_ID
    row[real:] = 0
  return tokens.astype(np.int32)
