"""Sizes and choices of a T5 network, and the type of its parameters."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from calm.t5 import limits

# A parameter tree: nested mappings of names to arrays, as flax has it.
Params = Any


@dataclasses.dataclass(frozen=True)
class T5Config:
  """Sizes and choices of one model; static, so that changing any recompiles.

  Attributes:
    vocab_size: rows of the embedding (may exceed the pieces of the vocabulary).
    dtype: activation dtype; parameters, logits and confidences are float32.
    emb_dim: width of the residual stream.
    num_heads, head_dim: attention heads and the size of each.
    num_encoder_layers, num_decoder_layers: layers of either stack.
    mlp_dim: hidden units of a feed-forward block.
    dropout_rate: in [0, 1), in training only.
    float32_attention_logits: attention scores in float32 whatever `dtype`.
    relpos_buckets, relpos_max_distance: relative-position buckets, and the distance from which
      on all positions share the last one.
    mlp_activations: ('gelu', 'linear') is T5 1.1's gated GELU, ('relu',) is T5 1.0.
    logits_via_embedding: tie the output head to the embedding (T5 1.0).
    one_hot_embedding: embed by a one-hot product (partitioned training) or by a gather.
    per_layer_heads: one output head a decoder layer instead of one for all.
    exit_classifier: whether the tree holds the early-exit classifier (emb_dim + 1 numbers).
    exit_probes: whether it holds every layer's own exit probe (see `evidence.Probes`).
    exit_translators: 1-based layers below the last whose states heads read through a linear map
      of the layer's own: x + x A_i + b_i, x = decoder_norm(d^i).
    exit_propagation: 1-based layers below the last from which the inputs of skipped layers are
      predicted by a linear map (see `propagation.Learned`).
    exit_propagation_rank: rank of these maps, 0 without them.
    relpos_per_layer: relative-position biases of every layer's own (umT5, Pile-T5, T5X's
      scalable T5) instead of one embedding for all layers of a side.
  """

  vocab_size: int
  dtype: Any = "float32"
  emb_dim: int = 512
  num_heads: int = 8
  num_encoder_layers: int = 6
  num_decoder_layers: int = 6
  head_dim: int = 64
  mlp_dim: int = 2048
  mlp_activations: Sequence[str] = ("relu",)
  dropout_rate: float = 0.1
  logits_via_embedding: bool = False
  float32_attention_logits: bool = False
  one_hot_embedding: bool = True
  per_layer_heads: bool = False
  exit_classifier: bool = True
  relpos_buckets: int = 32
  relpos_max_distance: int = 128
  relpos_per_layer: bool = False
  exit_probes: bool = False
  exit_translators: Sequence[int] = ()
  exit_propagation: Sequence[int] = ()
  exit_propagation_rank: int = 0

  def __post_init__(self):
    # Gin gives lists and dtypes by name or object; a hashable static wants one form.
    for name, value in limits.check(dataclasses.asdict(self)).items():
      object.__setattr__(self, name, value)
    for name in limits.EXIT_LAYERS:
      if max(getattr(self, name), default=0) >= self.num_decoder_layers:
        raise ValueError(
          f"Expected `{name}` to be layers below the last of {self.num_decoder_layers} decoder"
          f" layers, got {list(getattr(self, name))}; leave the last out, whose head reads its"
          " own states."
        )
    if bool(self.exit_propagation) != bool(self.exit_propagation_rank):
      raise ValueError(
        "Expected `exit_propagation` with `exit_propagation_rank`, got the layers"
        f" {list(self.exit_propagation)} and the rank {self.exit_propagation_rank}; give both,"
        " or neither."
      )
    if self.per_layer_heads and self.logits_via_embedding:
      raise ValueError(
        "Expected `per_layer_heads` without `logits_via_embedding`: a tied head is shared by"
        " all layers, got both; turn one off."
      )
