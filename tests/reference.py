"""What decoding means, in plain numpy: one row, one token, one layer at a time.

This is the yardstick that the fast decoder is held against, so it shares no
function with the library and imports neither it nor JAX. It is written to be
read beside the paper (sections 3.1 to 3.5) and is slow on purpose: no batch, no
padding of outputs, nothing precomputed but what a sentence of the definition
names. The network itself is in `reference_network.py`.

    model = reference.Model(params, config, num_pieces=50)
    full = reference.decode_static(model, prompt, 4, max_decode_length=16)
    rule = reference.ExitRule("softmax", threshold=0.6)
    early = reference.decode_dynamic(model, prompt, rule, max_decode_length=16)

Rounding can flip a comparison that is nearly a tie. `Decoded.ties` says whether
a first difference at some token is excused, and `Decoded.first_difference`
finds that token.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from tests import reference_network as network
from tests.reference_network import Model, encode

NEVER_EXIT = float("inf")
START_ID = 0
EOS_ID = 1
TIE = 1e-5


def constant(threshold: float, step: int) -> float:
  """The same threshold at every token."""
  del step
  return threshold


def decaying(temperature: float, length: int) -> Callable[[float, int], float]:
  """Eq. 5, of the threshold and the number of tokens so far: clip(0.9 threshold
  + 0.1 exp(-temperature step / length)); inf stays inf.
  """

  def schedule(threshold: float, step: int) -> float:
    if math.isinf(threshold):
      return threshold
    raw = 0.9 * threshold + 0.1 * math.exp(-temperature * step / length)
    return min(1.0, max(0.0, raw))

  return schedule


# states[i] is d^i of the current token, states[0] its embedding.
Measure = Callable[[network.Model, Sequence[np.ndarray], int], float]


def softmax_confidence(
  model: network.Model, states: Sequence[np.ndarray], layer: int
) -> float:
  """Difference of the two largest probabilities."""
  return network.top_two_gap(
    np.exp(
      network.log_softmax(network.head_logits(model, layer, states[layer]))
    )
  )


def cosine(a: np.ndarray, b: np.ndarray) -> float:
  return float(a @ b / (np.sqrt(a @ a) * np.sqrt(b @ b)))


def state_confidence(
  model: network.Model, states: Sequence[np.ndarray], layer: int
) -> float:
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
  logit = float(
    x @ model.leaf(*path, "kernel")[:, 0] + model.leaf(*path, "bias")[0]
  )
  return (
    1 / (1 + math.exp(-logit))
    if logit >= 0
    else math.exp(logit) / (1 + math.exp(logit))
  )


def certainty(logits: np.ndarray) -> float:
  """1 less the entropy of a softmax over the entropy of a uniform one."""
  real = network.log_softmax(logits[np.isfinite(logits)])
  return float(1 + np.sum(np.exp(real) * real) / math.log(len(real)))


def listed_logits(
  model: network.Model, states: Sequence[np.ndarray], layer: int
) -> np.ndarray:
  """Of the pieces on the shortlist."""
  return network.head_logits(model, layer, states[layer])[list(model.shortlist)]


def probe_confidence(
  model: network.Model, states: Sequence[np.ndarray], layer: int
) -> float:
  """Sigmoid of the layer's own linear map of normed state and five numbers; 1
  at the last.
  """
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
  return 1 / (
    1 + math.exp(-float(normed @ kernel + np.array(known) @ features + bias))
  )


MEASURES: Mapping[str, Measure] = {
  "softmax": softmax_confidence,
  "state": state_confidence,
  "classifier": classifier_confidence,
  "probe": probe_confidence,
}


# Fills one skipped layer: (model, layer, states, exit layer, memory) -> key and
# value. From d^exit through the layer's own norm and projections (section 3.2),
# from d^1, from the input that the exit layer's maps predict; and key and value
# of the exit layer itself (3.3.1).
PROPAGATIONS: Mapping[str, Callable[..., tuple[np.ndarray, np.ndarray]]] = {
  "exit_state": lambda model, layer, states, at, memory: (
    network.self_projections(model, layer, states[at])
  ),
  "first_state": lambda model, layer, states, at, memory: (
    network.self_projections(model, layer, states[1])
  ),
  "learned": lambda model, layer, states, at, memory: network.self_projections(
    model, layer, network.predicted_input(model, layer, states[at], at)
  ),
  "copy_projections": lambda model, layer, states, at, memory: (
    memory.keys[at - 1][-1],
    memory.values[at - 1][-1],
  ),
}


@dataclasses.dataclass(frozen=True)
class ExitRule:
  """When a token stops, and what the layers that it skipped remember of it."""

  # a key of `MEASURES`, or `oracle` (where the layer's argmax is the last's)
  measure: str
  # in [0, 1], or `NEVER_EXIT`; the oracle has none
  threshold: float = NEVER_EXIT
  # or what `decaying` returns
  schedule: Callable[[float, int], float] = constant
  # 1-based layers where a token may stop; None: all. The last always may.
  allowed_layers: Sequence[int] | None = None
  propagation: str = "exit_state"  # a key of `PROPAGATIONS`

  def allows(self, layer: int) -> bool:
    return self.allowed_layers is None or layer in self.allowed_layers


@dataclasses.dataclass(frozen=True)
class Exit:
  """Where one token stopped."""

  layer: int  # decoder layers run, 1-based
  # the measure at `layer`; 1 for the oracle, 0 for a static model
  confidence: float = 0.0
  # the highest confidence that was evaluated and refused, 0 if none
  rejected: float = 0.0
  # least |confidence - threshold| of the comparisons made
  threshold_gap: float = math.inf
  # least top-two gap of further argmaxes that the exit hung on
  logit_gap: float = math.inf


@dataclasses.dataclass(frozen=True)
class Decoded:
  """One row; lists are of tokens, with the end-of-text token or up to the
  maximum length.
  """

  # a static model of k layers leaves the lists above layer k empty
  memory: network.Memory
  tokens: list[int] = dataclasses.field(default_factory=list)
  exits: list[Exit] = dataclasses.field(default_factory=list)
  # log-probabilities, nats
  scores: list[float] = dataclasses.field(default_factory=list)
  # rounding may have decided it
  ties: list[bool] = dataclasses.field(default_factory=list)

  @property
  def exit_layers(self) -> list[int]:
    return [exit_.layer for exit_ in self.exits]

  @property
  def confidences(self) -> list[float]:
    return [exit_.confidence for exit_ in self.exits]

  @property
  def rejected_confidences(self) -> list[float]:
    return [exit_.rejected for exit_ in self.exits]

  @property
  def score(self) -> float:
    """Sum of the emitted tokens' log-probabilities, end of text included,
    nats.
    """
    return float(sum(self.scores))

  def first_difference(
    self, tokens: Sequence[int], exit_layers: Sequence[int]
  ) -> int | None:
    """First step where another decoder's row, padded with 0, differs; None
    where it agrees.
    """
    ours = [*zip(self.tokens, self.exit_layers, strict=True)]
    theirs = [*zip(tokens, exit_layers, strict=True)]
    ours += [(0, 0)] * (len(theirs) - len(ours))
    differing = (step for step, pair in enumerate(ours) if pair != theirs[step])
    return next(differing, None)


# Runs one token: appends d^1, d^2, ... to the states and fills the memory of
# every layer.
RunToken = Callable[
  [int, list[np.ndarray], network.Memory, network.Memory], Exit
]


def decode_static(
  model: Model,
  prompt: Sequence[int],
  num_layers: int,
  *,
  max_decode_length: int,
) -> Decoded:
  """Greedy decoding of a prompt, in which 0 is padding, with the first
  `num_layers` decoder layers, then norm and head; at most `max_decode_length`
  tokens, end of text included.
  """

  def run_token(step, states, memory, cross):
    del step
    for layer in range(1, num_layers + 1):
      states.append(
        network.decoder_layer(model, layer, states[-1], memory, cross)
      )
    return Exit(num_layers)

  return _decode(model, prompt, run_token, max_decode_length)


def decode_dynamic(
  model: Model,
  prompt: Sequence[int],
  rule: ExitRule,
  *,
  max_decode_length: int,
) -> Decoded:
  """Greedy decoding where each token stops by `rule` (Eq. 4). Arguments:
  `decode_static`.
  """
  last = model.config.num_decoder_layers
  run_layers = _run_oracle if rule.measure == "oracle" else _run_measured
  propagate = PROPAGATIONS[rule.propagation]

  def run_token(step, states, memory, cross):
    exit_ = run_layers(model, rule, step, states, memory, cross)
    for layer in range(exit_.layer + 1, last + 1):
      key, value = propagate(model, layer, states, exit_.layer, memory)
      memory.keys[layer - 1].append(key)
      memory.values[layer - 1].append(value)
    return exit_

  return _decode(model, prompt, run_token, max_decode_length)


def _run_measured(
  model: Model, rule: ExitRule, step, states, memory, cross
) -> Exit:
  """Layers until the confidence reaches the threshold of this step."""
  last = model.config.num_decoder_layers
  measure = MEASURES[rule.measure]
  threshold = rule.schedule(rule.threshold, step)
  rejected = 0.0
  gap = math.inf
  for layer in range(1, last + 1):
    states.append(
      network.decoder_layer(model, layer, states[-1], memory, cross)
    )
    if layer == last or not rule.allows(layer):
      continue
    confidence = measure(model, states, layer)
    gap = min(gap, abs(confidence - threshold))
    if confidence >= threshold:
      return Exit(layer, confidence, rejected, gap)
    rejected = max(rejected, confidence)
  return Exit(last, measure(model, states, last), rejected, gap)


def _run_oracle(
  model: Model, rule: ExitRule, step, states, memory, cross
) -> Exit:
  """All layers, then the first whose argmax is the last's; later ones are
  forgotten.
  """
  del step
  last = model.config.num_decoder_layers
  for layer in range(1, last + 1):
    states.append(
      network.decoder_layer(model, layer, states[-1], memory, cross)
    )
  final = network.head_logits(model, last, states[last])
  gap = network.top_two_gap(final)
  exit_layer = last
  for layer in range(1, last):
    if not rule.allows(layer):
      continue
    logits = network.head_logits(model, layer, states[layer])
    gap = min(gap, network.top_two_gap(logits))
    if logits.argmax() == final.argmax():
      exit_layer = layer
      break
  for layer in range(exit_layer + 1, last + 1):
    memory.keys[layer - 1].pop()
    memory.values[layer - 1].pop()
  return Exit(exit_layer, confidence=1.0, logit_gap=gap)


def _decode(
  model: Model,
  prompt: Sequence[int],
  run_token: RunToken,
  max_decode_length: int,
) -> Decoded:
  """The loop over tokens; the first input is id 0, then each token emitted."""
  num_layers = model.config.num_decoder_layers
  cross = network.cross_memory(model, prompt, encode(model, prompt))
  out = Decoded(
    network.Memory(*([[] for _ in range(num_layers)] for _ in range(2)))
  )
  token = START_ID
  for step in range(max_decode_length):
    states = [network.embed(model, token)]
    exit_ = run_token(step, states, out.memory, cross)
    logits = network.head_logits(model, exit_.layer, states[exit_.layer])
    token = int(logits.argmax())
    gaps = network.top_two_gap(logits), exit_.logit_gap, exit_.threshold_gap
    out.tokens.append(token)
    out.exits.append(exit_)
    out.scores.append(float(network.log_softmax(logits)[token]))
    out.ties.append(min(gaps) < TIE)
    if token == EOS_ID:
      break
  return out
