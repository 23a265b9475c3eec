"""What exact decoding means, in plain numpy: every token at full depth, and
what was drafted.

The text needs no passes to be told: a draft is what layer k says after the same
tokens, and it is emitted where the full model's own probabilities allow. How
many passes it takes follows from which drafts were accepted. Shares no function
with the library, like `reference.py`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from tests import reference
from tests import reference_network as network


@dataclasses.dataclass(frozen=True)
class Text:
  """One row; per-token lists end with the end-of-text token or at the maximum
  length.

  Attributes:
    tokens: emitted ids.
    drafts: layer k's most likely token of the draft head, at each.
    agrees: whether the draft is emitted.
    ratios: p_full(draft) / max p_full, at each.
    scores: log-probability of each emitted token under the full head, nats.
    gaps: least distance to another decision, at each: of the two largest
      logits, of the two largest of the draft head, of the ratio from the
      threshold.
    confidences: each draft's probability under the draft head.
  """

  tokens: list[int]
  drafts: list[int]
  agrees: list[bool]
  ratios: list[float]
  scores: list[float]
  gaps: list[float]
  confidences: list[float]

  def passes(self, rule, exact: bool) -> tuple[int, list[bool]]:
    """Passes, which end at a draft of EOS, the limit, or where all drafts
    together are too improbable, and whether each token is an accepted draft.
    """
    at = 0
    passes = 0
    drafted = [False] * len(self.tokens)
    while at < len(self.tokens):
      passes += 1
      begin = at
      for i in range(rule.num_drafts + 1):
        # Without slack the last position of a pass has no draft.
        last = i == rule.num_drafts and exact
        drafted[at] = self.agrees[at] and not last
        at += 1
        probable = math.prod(self.confidences[begin:at]) >= rule.stop_below
        if at == len(self.tokens) or not drafted[at - 1] or not probable:
          break
    return passes, drafted


def decode(
  model: network.Model,
  prompt: Sequence[int],
  draft_layer: int,
  *,
  shortlist: Sequence[int] | None = None,
  threshold: float = 1.0,
  max_decode_length: int,
) -> Text:
  """Emits the draft of layer k where it is the argmax or, below a threshold of
  1 (1 - lambda), likely enough; `shortlist` are the ids that are drafted from,
  None: all.
  """
  layers = model.config.num_decoder_layers
  encoded = network.encode(model, prompt)
  cross = network.cross_memory(model, prompt, encoded)
  memory = network.Memory(
    [[] for _ in range(layers)], [[] for _ in range(layers)]
  )
  ids = np.arange(model.num_pieces or model.config.vocab_size)
  ids = ids if shortlist is None else np.asarray(shortlist)
  out = Text([], [], [], [], [], [], [])
  token = reference.START_ID
  while len(out.tokens) < max_decode_length:
    states = [network.embed(model, token)]
    for layer in range(1, layers + 1):
      states.append(
        network.decoder_layer(model, layer, states[-1], memory, cross)
      )
    listed = network.head_logits(model, draft_layer, states[draft_layer])[ids]
    draft = int(ids[listed.argmax()])
    probabilities = network.log_softmax(
      network.head_logits(model, layers, states[layers])
    )
    best = int(probabilities.argmax())
    ratio = float(np.exp(probabilities[draft] - probabilities[best]))
    agrees = draft == best or (threshold < 1 and ratio >= threshold)
    token = draft if agrees else best
    slack_gap = (
      abs(ratio - threshold) if threshold < 1 and draft != best else np.inf
    )
    out.gaps.append(
      min(
        network.top_two_gap(probabilities),
        network.top_two_gap(listed),
        slack_gap,
      )
    )
    out.tokens.append(token)
    out.drafts.append(draft)
    out.agrees.append(bool(agrees))
    out.ratios.append(ratio)
    out.scores.append(float(probabilities[token]))
    out.confidences.append(float(np.exp(network.log_softmax(listed).max())))
    if token == reference.EOS_ID:
      break
  return out
