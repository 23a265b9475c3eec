"""Names of weights in Hugging Face's T5 checkpoints, by the paths of T5X's parameter tree."""

from collections.abc import Mapping

import numpy as np

from calm.t5 import network

# A leftover of early T5 1.0 conversions that no implementation reads.
_UNUSED = ("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",)
_RELPOS = "relative_attention_bias.weight"
_PROJECTIONS = {"query": "q", "key": "k", "value": "v", "out": "o"}


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


def renamed(
  weights: Mapping[str, np.ndarray], config: network.T5Config
) -> dict[str, np.ndarray]:
  """Weights by our paths, in our layout.

  Args:
    weights: {their name: [out, in]}, without embedding and head.
    config: the model's sizes.

  Raises:
    ValueError: weights are missing or unknown; says how many and which first.
  """
  pairs = names(config)
  missing = sorted(set(pairs.values()) - set(weights))
  unknown = sorted(set(weights) - set(pairs.values()) - set(_UNUSED))
  if missing or unknown:
    raise ValueError(
      "Expected `path` to hold the weights that its config.json describes, got"
      f" {len(missing)} missing {missing[:3]} and {len(unknown)} unknown {unknown[:3]}; give a"
      " whole T5 checkpoint of its own, adapters merged."
    )
  return {ours: np.ascontiguousarray(weights[theirs].T) for ours, theirs in pairs.items()}
