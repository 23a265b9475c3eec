"""What decoding means, in plain numpy: one row, one token, one layer at a time.

This is the yardstick that the fast decoder is held against, so it shares no function with the
library and imports neither it nor JAX. It is written to be read beside the paper (sections 3.1
to 3.5) and is slow on purpose: no batch, no padding of outputs, nothing precomputed but what a
sentence of the definition names. The network itself is in `reference_network.py`.

    model = reference.Model(params, config, num_pieces=50)
    full = reference.decode_static(model, prompt, 4, max_decode_length=16)
    rule = reference.ExitRule("softmax", threshold=0.6)
    early = reference.decode_dynamic(model, prompt, rule, max_decode_length=16)

Rounding can flip a comparison that is nearly a tie. `Decoded.is_tie` says whether a first
difference at some token is excused, and `Decoded.first_difference` finds that token.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from tests import reference_network as network
from tests.reference_measures import MEASURES
from tests.reference_network import Model, encode

__all__ = ["MEASURES", "Model", "encode"]

NEVER_EXIT = float("inf")
START_ID = 0
EOS_ID = 1
TIE = 1e-5


def constant(threshold: float, step: int) -> float:
  """The same threshold at every token."""
  del step
  return threshold


def decaying(temperature: float, length: int) -> Callable[[float, int], float]:
  """Eq. 5: clip(0.9 threshold + 0.1 exp(-temperature step / length)); inf stays inf.

  Args:
    temperature: the paper's tau.
    length: the paper's N, maximum output length that the schedule was made for.

  Returns:
    Function of the threshold and of the number of tokens generated so far.
  """

  def schedule(threshold: float, step: int) -> float:
    if math.isinf(threshold):
      return threshold
    raw = 0.9 * threshold + 0.1 * math.exp(-temperature * step / length)
    return min(1.0, max(0.0, raw))

  return schedule


# ----------------------------------------------------------------------------------------------
# Filling the layers that a token skipped.
# ----------------------------------------------------------------------------------------------

# Fills one skipped layer: (model, layer, states, exit layer, memory) -> key and value.
Propagation = Callable[
  [network.Model, int, Sequence[np.ndarray], int, network.Memory], tuple[np.ndarray, np.ndarray]
]


def hidden_state(
  model: network.Model,
  layer: int,
  states: Sequence[np.ndarray],
  exit_layer: int,
  memory: network.Memory,
) -> tuple[np.ndarray, np.ndarray]:
  """d^exit, through the skipped layer's own norm and projections (section 3.2)."""
  del memory
  return network.self_projections(model, layer, states[exit_layer])


def first_state(
  model: network.Model,
  layer: int,
  states: Sequence[np.ndarray],
  exit_layer: int,
  memory: network.Memory,
) -> tuple[np.ndarray, np.ndarray]:
  """d^1 whatever the exit, through the skipped layer's own norm and projections."""
  del exit_layer, memory
  return network.self_projections(model, layer, states[1])


def learned(
  model: network.Model,
  layer: int,
  states: Sequence[np.ndarray],
  exit_layer: int,
  memory: network.Memory,
) -> tuple[np.ndarray, np.ndarray]:
  """The layer's input as the exit layer's own maps predict it, projected as above."""
  del memory
  predicted = network.predicted_input(model, layer, states[exit_layer], exit_layer)
  return network.self_projections(model, layer, predicted)


def copied_projections(
  model: network.Model,
  layer: int,
  states: Sequence[np.ndarray],
  exit_layer: int,
  memory: network.Memory,
) -> tuple[np.ndarray, np.ndarray]:
  """Key and value of the exit layer itself, copied (the ablation of section 3.3.1)."""
  del model, layer, states
  return memory.keys[exit_layer - 1][-1], memory.values[exit_layer - 1][-1]


PROPAGATIONS: Mapping[str, Propagation] = {
  "hidden_state": hidden_state,
  "first_state": first_state,
  "learned": learned,
  "copied_projections": copied_projections,
}


@dataclasses.dataclass(frozen=True)
class ExitRule:
  """When a token stops, and what the layers that it skipped remember of it.

  Attributes:
    measure: a key of `MEASURES`, or `oracle` (exit where the layer's argmax is the last's).
    threshold: in [0, 1], or `NEVER_EXIT`. The oracle has none.
    schedule: `constant`, or what `decaying` returns.
    allowed_layers: 1-based layers where a token may stop; None: all. The last always may.
    propagation: a key of `PROPAGATIONS`.
  """

  measure: str
  threshold: float = NEVER_EXIT
  schedule: Callable[[float, int], float] = constant
  allowed_layers: Sequence[int] | None = None
  propagation: str = "hidden_state"

  def __post_init__(self):
    if self.measure != "oracle" and self.measure not in MEASURES:
      raise ValueError(f"`measure` is {self.measure!r}; expected oracle or {list(MEASURES)}.")
    if self.propagation not in PROPAGATIONS:
      raise ValueError(f"`propagation` is {self.propagation!r}; expected {list(PROPAGATIONS)}.")
    if not (0 <= self.threshold <= 1 or self.threshold == NEVER_EXIT):
      raise ValueError(f"`threshold` is {self.threshold}; expected [0, 1] or NEVER_EXIT.")

  def allows(self, layer: int) -> bool:
    return self.allowed_layers is None or layer in self.allowed_layers


@dataclasses.dataclass(frozen=True)
class Exit:
  """Where one token stopped.

  Attributes:
    layer: decoder layers run, 1-based.
    confidence: the measure at `layer`; 1 for the oracle, 0 for a static model.
    rejected: the highest confidence that was evaluated and refused, 0 if none.
    threshold_gap: the least |confidence - threshold| of the comparisons made; inf if none.
    logit_gap: the least top-two gap of further argmaxes that the exit hung on; inf if none.
  """

  layer: int
  confidence: float = 0.0
  rejected: float = 0.0
  threshold_gap: float = math.inf
  logit_gap: float = math.inf


@dataclasses.dataclass(frozen=True)
class Decoded:
  """One row; per-token lists end with the end-of-text token or at the maximum length.

  Attributes:
    tokens: emitted ids.
    exit_layers: 1-based, per token.
    confidences: see `Exit.confidence`; at the last layer the measure's own value.
    rejected_confidences: see `Exit.rejected`.
    scores: log-probability of each emitted token under the head at its exit layer, nats.
    logit_gaps: top-two logit gap at the exit (for the oracle the least of those it used).
    threshold_gaps: see `Exit.threshold_gap`.
    logits: [vocab_size] at the exit, per token.
    states: d^0 (the embedding) ... d^k of the layers that were computed, per token.
    encoded: [len(prompt), emb_dim] encoder states.
    memory: self-attention keys and values by layer and position. A static model of k layers
      leaves the lists above layer k empty.
    cross: cross-attention keys and values by layer and real prompt position.
  """

  tokens: list[int]
  exit_layers: list[int]
  confidences: list[float]
  rejected_confidences: list[float]
  scores: list[float]
  logit_gaps: list[float]
  threshold_gaps: list[float]
  logits: list[np.ndarray]
  states: list[list[np.ndarray]]
  encoded: np.ndarray
  memory: network.Memory
  cross: network.Memory

  @property
  def score(self) -> float:
    """Sum of the emitted tokens' log-probabilities, end of text included, nats."""
    return float(sum(self.scores))

  def is_tie(self, step: int) -> bool:
    """Whether rounding may have decided token `step` (0-based)."""
    return self.logit_gaps[step] < TIE or self.threshold_gaps[step] < TIE

  def first_difference(self, tokens: Sequence[int], exit_layers: Sequence[int]) -> int | None:
    """First step where another decoder's row differs; None where it agrees.

    Args:
      tokens: the other decoder's ids, padded with 0 after the end or not.
      exit_layers: its exit layers, padded with 0 likewise.
    """
    longest = max(len(tokens), len(exit_layers), len(self.tokens))
    ours = _padded(self.tokens, longest), _padded(self.exit_layers, longest)
    theirs = _padded(tokens, longest), _padded(exit_layers, longest)
    for step in range(longest):
      if ours[0][step] != theirs[0][step] or ours[1][step] != theirs[1][step]:
        return step
    return None


def _padded(row: Sequence[int], length: int) -> list[int]:
  return [int(x) for x in row] + [0] * (length - len(row))


# Runs one token: appends d^1, d^2, ... to the states and fills the memory of every layer.
RunToken = Callable[[int, list[np.ndarray], network.Memory, network.Memory], Exit]


def decode_static(
  model: Model,
  prompt: Sequence[int],
  num_layers: int,
  *,
  max_decode_length: int,
  eos_id: int = EOS_ID,
) -> Decoded:
  """Greedy decoding with the first `num_layers` decoder layers, then norm and head.

  Args:
    model: parameters and sizes.
    prompt: token ids; 0 is padding.
    num_layers: 1 ... num_decoder_layers; the latter is the full model.
    max_decode_length: most tokens to emit, end of text included.
    eos_id: the id that ends a row.

  Raises:
    ValueError: if `num_layers` is out of range.
  """
  if not 1 <= num_layers <= model.config.num_decoder_layers:
    raise ValueError(
      f"`num_layers` is {num_layers}; expected 1 to {model.config.num_decoder_layers}."
    )

  def run_token(step, states, memory, cross):
    del step
    for layer in range(1, num_layers + 1):
      states.append(network.decoder_layer(model, layer, states[-1], memory, cross))
    return Exit(num_layers)

  return _decode(model, prompt, run_token, max_decode_length, eos_id)


def decode_dynamic(
  model: Model,
  prompt: Sequence[int],
  rule: ExitRule,
  *,
  max_decode_length: int,
  eos_id: int = EOS_ID,
) -> Decoded:
  """Greedy decoding where each token stops by `rule` (Eq. 4). Arguments: `decode_static`."""
  last = model.config.num_decoder_layers
  if rule.allowed_layers is not None and not all(1 <= i <= last for i in rule.allowed_layers):
    raise ValueError(f"`allowed_layers` is {rule.allowed_layers}; expected 1 to {last}.")
  run_layers = _run_oracle if rule.measure == "oracle" else _run_measured
  propagate = PROPAGATIONS[rule.propagation]

  def run_token(step, states, memory, cross):
    exit_ = run_layers(model, rule, step, states, memory, cross)
    for layer in range(exit_.layer + 1, last + 1):
      key, value = propagate(model, layer, states, exit_.layer, memory)
      memory.keys[layer - 1].append(key)
      memory.values[layer - 1].append(value)
    return exit_

  return _decode(model, prompt, run_token, max_decode_length, eos_id)


def _run_measured(model: Model, rule: ExitRule, step, states, memory, cross) -> Exit:
  """Layers until the confidence reaches the threshold of this step."""
  last = model.config.num_decoder_layers
  measure = MEASURES[rule.measure]
  threshold = rule.schedule(rule.threshold, step)
  rejected, gap = 0.0, math.inf
  for layer in range(1, last + 1):
    states.append(network.decoder_layer(model, layer, states[-1], memory, cross))
    if layer == last or not rule.allows(layer):
      continue
    confidence = measure(model, states, layer)
    gap = min(gap, abs(confidence - threshold))
    if confidence >= threshold:
      return Exit(layer, confidence, rejected, gap)
    rejected = max(rejected, confidence)
  return Exit(last, measure(model, states, last), rejected, gap)


def _run_oracle(model: Model, rule: ExitRule, step, states, memory, cross) -> Exit:
  """All layers, then the first whose argmax is the last's; later ones are forgotten."""
  del step
  last = model.config.num_decoder_layers
  for layer in range(1, last + 1):
    states.append(network.decoder_layer(model, layer, states[-1], memory, cross))
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
  model: Model, prompt: Sequence[int], run_token: RunToken, max_decode_length: int, eos_id: int
) -> Decoded:
  """The loop over tokens; the first input is id 0, then each token emitted."""
  if max_decode_length < 1:
    raise ValueError(f"`max_decode_length` is {max_decode_length}; expected at least 1.")
  num_layers = model.config.num_decoder_layers
  encoded = encode(model, prompt)
  cross = network.cross_memory(model, prompt, encoded)
  memory = network.Memory([[] for _ in range(num_layers)], [[] for _ in range(num_layers)])
  out = Decoded([], [], [], [], [], [], [], [], [], encoded, memory, cross)
  token = START_ID
  for step in range(max_decode_length):
    states = [network.embed(model, token)]
    exit_ = run_token(step, states, memory, cross)
    logits = network.head_logits(model, exit_.layer, states[exit_.layer])
    token = int(logits.argmax())
    out.tokens.append(token)
    out.exit_layers.append(exit_.layer)
    out.confidences.append(exit_.confidence)
    out.rejected_confidences.append(exit_.rejected)
    out.scores.append(float(network.log_softmax(logits)[token]))
    out.logit_gaps.append(min(network.top_two_gap(logits), exit_.logit_gap))
    out.threshold_gaps.append(exit_.threshold_gap)
    out.logits.append(logits)
    out.states.append(states)
    if token == eos_id:
      break
  return out
