"""The yardstick itself: laws of decoding on toys, then numbers worked by hand."""

import dataclasses
import math

import numpy as np
import pytest

from tests import reference, toys
from tests import reference_measures as measures
from tests import reference_network as network

CONFIG = toys.Config(exit_probes=True)
MAPPED = dataclasses.replace(
  CONFIG, exit_translators=(1, 3), exit_propagation=(1, 2, 3), exit_propagation_rank=5
)
LENGTH = 8


def model(config=CONFIG, seed=3, **options) -> reference.Model:
  options = {"shortlist": toys.shortlist(config), **options}
  return reference.Model(toys.params(config, seed), config, config.num_pieces, **options)


def prompts(batch=4, length=7, seed=5) -> np.ndarray:
  return toys.prompts(seed, batch=batch, length=length, num_pieces=CONFIG.num_pieces)


def dynamic(m, prompt, measure, threshold=reference.NEVER_EXIT, **options):
  rule = reference.ExitRule(measure, threshold, **options)
  return reference.decode_dynamic(m, prompt, rule, max_decode_length=LENGTH)


def static(m, prompt, num_layers):
  return reference.decode_static(m, prompt, num_layers, max_decode_length=LENGTH)


def skipped(row):
  return [
    (step, layer)
    for step, exit_layer in enumerate(row.exit_layers)
    for layer in range(exit_layer + 1, CONFIG.num_decoder_layers + 1)
  ]


@pytest.mark.parametrize("measure", ["softmax", "oracle"])
def test_skipped_layers_remember_what_the_propagation_says(measure):
  m = model(MAPPED)
  count = 0
  for prompt in prompts():
    for propagation in reference.PROPAGATIONS:
      threshold = reference.NEVER_EXIT if measure == "oracle" else 0.5
      row = dynamic(m, prompt, measure, threshold, propagation=propagation)
      for step, layer in skipped(row):
        count += 1
        exit_layer = row.exit_layers[step]
        key, value = {
          "hidden_state": network.self_projections(m, layer, row.states[step][exit_layer]),
          "first_state": network.self_projections(m, layer, row.states[step][1]),
          "learned": network.self_projections(
            m,
            layer,
            network.predicted_input(m, layer, row.states[step][exit_layer], exit_layer),
          ),
          "copied_projections": network.self_projections(
            m, exit_layer, row.states[step][exit_layer - 1]
          ),
        }[propagation]
        np.testing.assert_array_equal(row.memory.keys[layer - 1][step], key)
        np.testing.assert_array_equal(row.memory.values[layer - 1][step], value)
      assert all(len(keys) == len(row.tokens) for keys in row.memory.keys)
  assert count > 30


def test_a_tied_head_is_read():
  tied = model(toys.Config(logits_via_embedding=True))
  state = network.embed(tied, 3)
  normed = network.rms_norm(tied, state, "decoder", "decoder_norm")
  row = tied.params["token_embedder"]["embedding"][7]
  assert network.head_logits(tied, 2, state)[7] == pytest.approx(normed @ row / 4, rel=1e-5)


def test_translators_are_read_by_heads_and_confidences_by_hand():
  m = model(dataclasses.replace(CONFIG, exit_translators=(2,)))
  part = m.params["decoder"]["exit_translators"]["layers_1"]
  part["kernel"], part["bias"] = np.diag(np.full(16, 2.0, np.float32)), np.arange(16.0)
  state = network.embed(m, 3)
  normed = network.rms_norm(m, state, "decoder", "decoder_norm")
  np.testing.assert_allclose(network.head_input(m, 2, state), 3 * normed + part["bias"])
  np.testing.assert_array_equal(network.head_input(m, 3, state), normed)
  head = m.params["decoder"]["logits_dense"]["kernel"][:, : CONFIG.num_pieces]
  got = network.head_logits(m, 2, state)[: CONFIG.num_pieces]
  np.testing.assert_allclose(got, (3 * normed + part["bias"]) @ head, rtol=1e-5)
  states = [state] * 4
  for measure in ("classifier", "probe"):
    asked = [measures.MEASURES[measure](m, states, layer) for layer in (2, 3)]
    assert asked[0] != asked[1]


def test_predicted_inputs_by_hand():
  m = model(MAPPED)
  part = m.params["decoder"]["exit_propagation"]["layers_1"]
  part["down"] = {"kernel": np.eye(16)[:, :5], "bias": np.full(5, 0.5)}
  part["up"]["kernel"] = np.stack([np.zeros((5, 16)), np.eye(16)[:5]])
  state = network.embed(m, 3)
  normed = network.rms_norm(m, state, "decoder", "decoder_norm")
  np.testing.assert_array_equal(network.predicted_input(m, 3, state, 2), state)
  expected = state + np.concatenate([normed[:5] + 0.5, np.zeros(11)])
  np.testing.assert_allclose(network.predicted_input(m, 4, state, 2), expected, rtol=1e-6)


def test_decaying_schedule_by_hand():
  for threshold, temperature, step, expected in (
    (0.5, 4.0, 16, 0.4867879441),
    (1.0, 4.0, 0, 1.0),
    (0.0, 4.0, 0, 0.1),
    (0.5, 0.0, 40, 0.55),
    (math.inf, 4.0, 40, math.inf),
  ):
    assert reference.decaying(temperature, 64)(threshold, step) == pytest.approx(expected)


BUCKETS = {
  # Away by 16 * 8 ** (k / 16): 16, 18.2, 20.7, ... 112.4; keys after the query are distance 0.
  False: {0: 0, 5: 0, -1: 1, -15: 15, -16: 16, -18: 16, -19: 17, -20: 17, -21: 18, -64: 26}
  | {-112: 30, -113: 31, -127: 31, -128: 31, -1000: 31},
  # Away by 8 * 2 ** (k / 2): 8, 11.3, 16, 22.6, 32, 45.3, 64, 90.5; after the query 16 more.
  True: {0: 0, -1: 1, 1: 17, -7: 7, -8: 8, -11: 8, -12: 9, -16: 10, -32: 12, -64: 14}
  | {64: 30, -90: 14, -91: 15, -128: 15, 500: 31},
}


@pytest.mark.parametrize("bidirectional", [False, True])
def test_relative_buckets_by_hand(bidirectional):
  for distance, bucket in BUCKETS[bidirectional].items():
    assert network.relative_bucket(distance, bidirectional, 32, 128) == bucket, distance


def test_each_side_reads_its_own_bias_by_distance():
  m, prompt = model(), prompts(1)[0]
  tables = {
    side: m.leaf(side, "relpos_bias", "rel_embedding") for side in ("encoder", "decoder")
  }
  encoder, decoder = (network.position_bias(m, side, 2, 4) for side in tables)
  np.testing.assert_array_equal(encoder, tables["encoder"][:, [2, 1, 0, 17]])
  np.testing.assert_array_equal(decoder, tables["decoder"][:, [2, 1, 0, 0]])
  encoded, decoded = network.encode(m, prompt), static(m, prompt, 4).logits
  tables["decoder"][:] = 0
  np.testing.assert_array_equal(network.encode(m, prompt), encoded)
  assert not np.allclose(static(m, prompt, 4).logits[1], decoded[1])
  tables["encoder"][:] = 0
  assert not np.allclose(network.encode(m, prompt), encoded)


def test_measures_by_hand():
  assert measures.cosine(np.array([3.0, 4.0]), np.array([4.0, 3.0])) == pytest.approx(0.96)
  m = model(dtype=np.float64)
  up, down = np.ones(16), -np.ones(16)
  assert measures.state_confidence(m, [up, up, down], 2) == 0.0
  assert measures.state_confidence(m, [up, up, down], 1) == 0.0
  assert measures.state_confidence(m, [up, up, 2 * up], 2) == pytest.approx(1.0)
  probabilities = np.exp(network.log_softmax(np.log([6.0, 1.0, 3.0])))
  np.testing.assert_allclose(probabilities, [0.6, 0.1, 0.3])
  assert network.top_two_gap(probabilities) == pytest.approx(0.3)


def test_classifier_by_hand():
  m = model()
  m.params["decoder"]["exit_classifier"] = {
    "kernel": np.full((16, 1), 0.25, np.float32),
    "bias": np.array([-1.0], np.float32),
  }
  m.params["decoder"]["decoder_norm"]["scale"] = np.ones(16, np.float32)
  state = np.full(16, 0.5, np.float32)
  # Normed, the state is all ones: 16 / 4 - 1 = 3. Raw it is halves: 2 - 1 = 1.
  assert measures.classifier_confidence(m, [state, state], 1) == pytest.approx(0.9525741)
  raw = dataclasses.replace(m, raw_classifier=True)
  assert measures.classifier_confidence(raw, [state, state], 1) == pytest.approx(0.7310586)


def test_norm_activation_and_attention_by_hand():
  m = reference.Model({"norm": {"scale": np.array([2.0, 0.5])}}, CONFIG, dtype=np.float64)
  normed = network.rms_norm(m, np.array([3.0, 4.0]), "norm")
  np.testing.assert_allclose(normed, [1.6970563, 0.5656854], rtol=1e-6)
  gelu = network.activation(m, "gelu", np.array([1.0, -1.0, 0.0]))
  np.testing.assert_allclose(gelu, [0.841192, -0.158808, 0.0], atol=1e-6)
  # Four dimensions, so that a scale of 1/2 would show: logits ln 3 and 0, weights 3/4 and 1/4.
  query = np.array([[math.log(3), 0, 0, 0]])
  keys = [np.eye(4)[:1], np.zeros((1, 4))]
  values = [np.full((1, 4), 8.0), np.zeros((1, 4))]
  np.testing.assert_allclose(network.attend(query, keys, values, np.zeros((1, 2))), 6.0)
  bias = np.array([[0.0, math.log(3)]])
  np.testing.assert_allclose(network.attend(query, keys, values, bias), 4.0)


def test_one_decoder_layer_by_hand():
  config = toys.Config(
    emb_dim=1, num_heads=1, head_dim=1, num_decoder_layers=1, mlp_activations=("relu",)
  )

  def kernels(**values):
    return {name: {"kernel": np.array([[value]])} for name, value in values.items()}

  one = {"scale": np.ones(1)}
  layer = {
    "pre_self_attention_layer_norm": one,
    "self_attention": kernels(query=1, key=1, value=0.5, out=1),
    "pre_cross_attention_layer_norm": one,
    "encoder_decoder_attention": kernels(query=1, key=0.5 * math.log(3), value=4, out=1),
    "pre_mlp_layer_norm": one,
    "mlp": kernels(wi=2, wo=-0.25),
  }
  bias = {"rel_embedding": np.zeros((1, 32))}
  params = {"decoder": {"layers_0": layer, "relpos_bias": bias}}
  m = reference.Model(params, config, dtype=np.float64)
  cross = network.cross_memory(m, [5, 1], np.array([[1.0], [-1.0]]))
  memory = network.Memory([[]], [[]])
  # In one dimension a norm leaves the sign. 2 + 0.5 from itself; + 4 (3/4 - 1/4) from the
  # encoder; - 2/4 from the MLP.
  out = network.decoder_layer(m, 1, np.array([2.0]), memory, cross)
  np.testing.assert_allclose(out, 4.0, rtol=1e-6)
  np.testing.assert_allclose(memory.values, 0.5, rtol=1e-6)
