"""The whole configuration as decoded belongs to the procedure."""

import dataclasses

import pytest

from calm.inference import options
from calm.t5 import network

BASE = network.T5Config(vocab_size=32, mlp_activations=("gelu", "linear"))
OTHER = {
  "vocab_size": 64,
  "emb_dim": 8,
  "num_heads": 2,
  "num_encoder_layers": 1,
  "num_decoder_layers": 1,
  "head_dim": 4,
  "mlp_dim": 8,
  "mlp_activations": ("relu", "linear"),
  "logits_via_embedding": True,
  "float32_attention_logits": True,
  "per_layer_heads": True,
  "relpos_buckets": 16,
  "relpos_max_distance": 20,
}


def recorded(config):
  named = {"parameters_digest": "a", "tokenizer_digest": "b", "eos_id": 1}
  return options.procedure(config, options.DecodeOptions(), **named).configuration


@pytest.mark.parametrize("name", sorted(OTHER))
def test_every_choice_of_the_network_is_recorded(name):
  base, other = recorded(BASE), recorded(dataclasses.replace(BASE, **{name: OTHER[name]}))
  assert {key for key in base if base[key] != other[key]} == {name}


def test_nothing_else_is_there():
  """A new field of the configuration is recorded, or named as one that decoding ignores."""
  names = {field.name for field in dataclasses.fields(network.T5Config)}
  assert names == set(OTHER) | set(options._NOT_DECODED)
