"""The toys are worth decoding: spread margins, every exit used, rows of many lengths."""

import dataclasses

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


def leaves(tree, path=()):
  if isinstance(tree, dict):
    return [x for name, child in tree.items() for x in leaves(child, (*path, name))]
  return [("/".join(path), tree)]


def test_the_same_seed_gives_the_same_tree():
  for config in CONFIGS.values():
    a, b, c = (leaves(toys.params(config, seed)) for seed in (1, 1, 2))
    assert [path for path, _ in a] == [path for path, _ in b]
    assert all(np.array_equal(x, y) for (_, x), (_, y) in zip(a, b, strict=True))
    assert not any(
      np.array_equal(x, y) for (p, x), (_, y) in zip(a, c, strict=True) if "bias" not in p
    )
    assert {x.dtype for _, x in a} == {np.dtype(np.float32)}


def test_shapes_are_those_of_the_t5_network():
  config = toys.Config(num_heads=3, head_dim=4, emb_dim=10, mlp_dim=7)
  shapes = {path: leaf.shape for path, leaf in leaves(toys.params(config, 0))}
  assert shapes["decoder/layers_3/self_attention/query/kernel"] == (10, 12)
  assert shapes["decoder/layers_0/encoder_decoder_attention/out/kernel"] == (12, 10)
  assert shapes["encoder/layers_1/mlp/wi_1/kernel"] == (10, 7)
  assert shapes["encoder/layers_1/mlp/wo/kernel"] == (7, 10)
  assert shapes["decoder/relpos_bias/rel_embedding"] == (3, 32)
  assert shapes["decoder/logits_dense/kernel"] == (10, 48)
  assert shapes["decoder/exit_classifier/kernel"] == (10, 1)
  assert shapes["decoder/exit_classifier/bias"] == (1,)
  assert "decoder/logits_dense/kernel" not in dict(leaves(toys.params(CONFIGS["tied"], 0)))


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


def test_sharp_heads_saturate():
  config = CONFIGS["gated"]
  params = toys.params(config, 2, sharpness=1000.0)
  model = reference.Model(params, config, config.num_pieces)
  row = reference.decode_static(model, [5, 6, 1], 6, max_decode_length=4)
  margins = [reference.MEASURES["softmax"](model, states, 3) for states in row.states]
  assert max(margins) == 1.0


def test_prompts_end_and_are_padded():
  rows = toys.prompts(4, batch=9, length=6, num_pieces=40)
  lengths = (rows > 0).sum(axis=1)
  assert rows.dtype == np.int32 and rows.shape == (9, 6)
  assert lengths[0] == 6 and lengths[1] == 2
  for row, length in zip(rows, lengths, strict=True):
    assert row[length - 1] == toys.EOS_ID
    assert not row[length:].any()
    assert (row[: length - 1] >= toys.FIRST_PIECE).all() and row.max() < 40
  np.testing.assert_array_equal(rows, toys.prompts(4, batch=9, length=6, num_pieces=40))


def test_network_fields_are_the_configuration_without_the_pieces():
  fields = toys.network_fields(CONFIGS["tied"])
  assert "num_pieces" not in fields
  assert toys.Config(**fields) == dataclasses.replace(CONFIGS["tied"], num_pieces=40)
