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


def model(config=CONFIG, seed=3, **options) -> reference.Model:
  options = {"shortlist": toys.shortlist(config), **options}
  return reference.Model(toys.params(config, seed), config, config.num_pieces, **options)


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
