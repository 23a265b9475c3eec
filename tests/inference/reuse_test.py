"""What a lower threshold keeps of an output, held against decoding again."""

import collections

import numpy as np
import pytest

from calm.calibrate import NEVER_EXIT, Record
from calm.inference.grid import reusable_tokens

LAYERS, LENGTH, ALLOWED = 5, 12, (1, 3, 4)


def schedule(threshold, decaying):
  """Constant, or Eq. 5 with `NEVER_EXIT` mapped to itself."""
  steps = np.arange(LENGTH)
  if not decaying or threshold == NEVER_EXIT:
    return np.full(LENGTH, threshold, np.float32)
  values = 0.9 * threshold + 0.1 * np.exp(-4.0 * steps / LENGTH)
  return np.clip(values, 0, 1).astype(np.float32)


def decode(prompt, thresholds, prefix=()):
  """(token, exit layer, confidence, refused) per step; `prefix` is taken over, not decoded."""
  steps = list(prefix)
  while len(steps) < LENGTH and not (steps and steps[-1][0] == 1):
    position, refused = len(steps), 0.0
    history = [token * 7 + layer for token, layer, _, _ in steps]
    for layer in range(1, LAYERS + 1):
      generator = np.random.default_rng([prompt, position, layer, *history])
      confidence = np.float32(generator.random())
      token = int(generator.integers(1, 12))
      if layer == LAYERS or (layer in ALLOWED and confidence >= thresholds[position]):
        steps.append((token, layer, 0.0 if layer == LAYERS else confidence, refused))
        break
      if layer in ALLOWED:
        refused = max(refused, confidence)
  return steps


def record(prompt, steps):
  tokens, layers, confidences, refused = zip(*steps, strict=True)
  return Record(str(prompt), "text", tokens, layers, confidences, refused)


@pytest.mark.parametrize("decaying", [False, True])
def test_reuse_down_a_grid_equals_plain_decoding(decaying):
  grid = [NEVER_EXIT, *np.linspace(0.99, 0.0, 12)]
  summary = collections.Counter()
  for prompt in range(40):
    previous = None
    for threshold in grid:
      values = schedule(threshold, decaying)
      plain = decode(prompt, values)
      if previous is not None:
        kept = reusable_tokens(record(prompt, previous), values)
        assert previous[:kept] == plain[:kept]
        # A refusal of 0 may mean none: at threshold 0 the rule keeps less than it could.
        if kept < len(previous) and threshold > 0.0:
          assert previous[kept] != plain[kept]  # exact: not one token more could be kept
        whole = kept == len(previous)
        assert whole == (previous == plain) or threshold == 0.0
        resumed = previous if whole else decode(prompt, values, previous[:kept])
        assert record(prompt, resumed) == record(prompt, plain)
        summary += collections.Counter(
          tokens=len(plain), reused=min(kept, len(plain)), sequences=1, whole=whole
        )
      previous = plain
  assert 0 < summary["reused"] < summary["tokens"]
  assert 0 < summary["whole"] < summary["sequences"]


def test_reuse_by_hand():
  row = Record("a", "x", [5, 6, 1], [2, 8, 8], [0.8, 0.0, 0.0], [0.1, 0.5, 0.2])
  for thresholds, kept in (
    ([0.6, 0.6, 0.6], 3),
    ([0.6, 0.6, 0.6, 0.0], 3),  # later values belong to no token
    ([0.5, 0.5, 0.5], 1),  # reaching it is exiting
    ([0.0, 0.0, 0.0], 0),
    ([0.6, 0.6, 0.2], 2),
  ):
    assert reusable_tokens(row, thresholds) == kept
  assert reusable_tokens(Record("a", "x", [1]), [1.0]) == 0
  # Comparisons are in float32, as in the decoder.
  confidence = float(np.float32(0.7))
  row = Record("a", "x", rejected_confidences=[confidence])
  assert confidence < 0.7 and reusable_tokens(row, [0.7]) == 0
