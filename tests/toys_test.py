"""The toys are worth decoding: spread margins, every exit used, rows of many lengths."""

import numpy as np
import pytest

from tests import reference, toys

CONFIGS = {
  "gated": toys.Config(num_decoder_layers=6),
  "tied": toys.Config(logits_via_embedding=True, mlp_activations=("relu",)),
}


def decoded(config, seed=2, batch=12):
  model = reference.Model(toys.params(config, seed), config, config.num_pieces)
  rows = toys.prompts(seed, batch=batch, length=8, num_pieces=config.num_pieces)
  last = config.num_decoder_layers
  return model, [reference.decode_static(model, p, last, max_decode_length=8) for p in rows]


@pytest.mark.parametrize("name", CONFIGS)
def test_confidences_spread_over_the_unit_interval(name):
  config = CONFIGS[name]
  model, rows = decoded(config)
  layers = range(2, config.num_decoder_layers + 1)
  # Width from the first to the ninth decile; residual cosines live nearer to 1.
  for measure, width in {"softmax": 0.6, "classifier": 0.5, "state": 0.15}.items():
    confidences = [
      reference.MEASURES[measure](model, states, layer)
      for row in rows
      for states in row.states
      for layer in layers
    ]
    low, high = np.quantile(confidences, [0.1, 0.9])
    assert high - low > width, (measure, low, high)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_middling_threshold_uses_every_kind_of_exit(name):
  config = CONFIGS[name]
  model, rows = decoded(config)
  prompts = toys.prompts(2, batch=12, length=8, num_pieces=config.num_pieces)
  rule = reference.ExitRule("softmax", 0.6)
  early = [reference.decode_dynamic(model, p, rule, max_decode_length=8) for p in prompts]
  exits = {layer for row in early for layer in row.exit_layers}
  assert {1, 2, config.num_decoder_layers} <= exits
  pairs = zip(early, rows, strict=True)
  assert any(row.tokens != full.tokens for row, full in pairs)
