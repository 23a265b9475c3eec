"""Confidences in plain numpy, one token and one layer at a time: the yardstick's measures."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from tests import reference_network as network

# states[i] is d^i of the current token, states[0] its embedding.
Measure = Callable[[network.Model, Sequence[np.ndarray], int], float]


def softmax_confidence(model: network.Model, states: Sequence[np.ndarray], layer: int) -> float:
  """Difference of the two largest probabilities."""
  return network.top_two_gap(
    np.exp(network.log_softmax(network.head_logits(model, layer, states[layer])))
  )


def cosine(a: np.ndarray, b: np.ndarray) -> float:
  return float(a @ b / (np.sqrt(a @ a) * np.sqrt(b @ b)))


def state_confidence(model: network.Model, states: Sequence[np.ndarray], layer: int) -> float:
  """Cosine of d^layer and d^(layer - 1), negative values 0; 0 at layer 1."""
  del model
  if layer == 1:
    return 0.0
  return max(0.0, min(1.0, cosine(states[layer], states[layer - 1])))


def classifier_confidence(
  model: network.Model, states: Sequence[np.ndarray], layer: int
) -> float:
  """Sigmoid of one linear map, the same at every layer."""
  x = network.head_input(model, layer, states[layer])
  path = ("decoder", "exit_classifier")
  logit = float(x @ model.leaf(*path, "kernel")[:, 0] + model.leaf(*path, "bias")[0])
  return 1 / (1 + math.exp(-logit)) if logit >= 0 else math.exp(logit) / (1 + math.exp(logit))


def certainty(logits: np.ndarray) -> float:
  """1 less the entropy of a softmax over the entropy of a uniform one."""
  real = network.log_softmax(logits[np.isfinite(logits)])
  return float(1 + np.sum(np.exp(real) * real) / math.log(len(real)))


def listed_logits(model: network.Model, states: Sequence[np.ndarray], layer: int) -> np.ndarray:
  """Of the pieces on the shortlist."""
  return network.head_logits(model, layer, states[layer])[list(model.shortlist)]


def probe_confidence(model: network.Model, states: Sequence[np.ndarray], layer: int) -> float:
  """Sigmoid of the layer's own linear map of normed state and five numbers; 1 at the last."""
  if layer == model.config.num_decoder_layers:
    return 1.0
  listed = listed_logits(model, states, layer)
  second, first = np.sort(listed)[-2:]
  known = [
    math.log(1 + first - second),
    network.top_two_gap(np.exp(network.log_softmax(listed))),
    certainty(listed),
    state_confidence(model, states, layer),
    0.5 * math.log(np.mean(np.square(states[layer]))),
  ]
  normed = network.head_input(model, layer, states[layer])
  kernel, features, bias = (
    model.leaf("decoder", "exit_probes", name)[..., layer - 1]
    for name in ("kernel", "features", "bias")
  )
  return 1 / (1 + math.exp(-float(normed @ kernel + np.array(known) @ features + bias)))


MEASURES: Mapping[str, Measure] = {
  "softmax": softmax_confidence,
  "state": state_confidence,
  "classifier": classifier_confidence,
  "probe": probe_confidence,
}
