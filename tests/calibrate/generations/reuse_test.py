"""Reuse against plain decoding, on a toy decoder whose confidences depend on its past."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm.calibrate import NEVER_EXIT
from calm.calibrate.generations import reuse
from calm.calibrate.generations.records import Record

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
  summary = reuse.ReuseSummary()
  for prompt in range(40):
    previous = None
    for threshold in grid:
      values = schedule(threshold, decaying)
      plain = decode(prompt, values)
      if previous is not None:
        kept = reuse.reusable_tokens(record(prompt, previous), values)
        assert previous[:kept] == plain[:kept]
        # A refusal of 0 may mean none: at threshold 0 the rule keeps less than it could.
        if kept < len(previous) and threshold > 0.0:
          assert previous[kept] != plain[kept]  # exact: not one token more could be kept
        whole = reuse.is_reusable(record(prompt, previous), values)
        assert whole == (previous == plain) or threshold == 0.0
        resumed = previous if whole else decode(prompt, values, previous[:kept])
        assert record(prompt, resumed) == record(prompt, plain)
        summary += reuse.summarize([kept], [len(plain)])
      previous = plain
  assert 0 < summary.reused_tokens < summary.tokens and 0 < summary.whole < summary.sequences


def test_by_hand():
  row = Record("a", "x", [5, 6, 1], [2, 8, 8], [0.8, 0.0, 0.0], [0.1, 0.5, 0.2])
  assert reuse.reusable_tokens(row, [0.6, 0.6, 0.6]) == 3
  assert reuse.is_reusable(row, [0.6, 0.6, 0.6, 0.0])  # later values belong to no token
  assert reuse.reusable_tokens(row, [0.5, 0.5, 0.5]) == 1  # reaching it is exiting
  assert reuse.reusable_tokens(row, [0.0, 0.0, 0.0]) == 0
  assert not reuse.is_reusable(row, [0.6, 0.6, 0.2])
  assert reuse.reusable_tokens(row, [0.6, 0.6, 0.2]) == 2


def test_records_without_the_field_are_never_reused():
  assert reuse.reusable_tokens(Record("a", "x", [1]), [1.0]) == 0
  assert not reuse.is_reusable(Record("a", "x", [1]), [1.0])


def test_comparisons_are_in_float32_as_in_the_decoder():
  confidence = float(np.float32(0.7))
  row = Record("a", "x", rejected_confidences=[confidence])
  assert confidence < 0.7 and not reuse.is_reusable(row, [0.7])


@given(
  st.lists(st.floats(0, 1, width=32), min_size=1, max_size=8), st.floats(0, 1), st.floats(0, 1)
)
def test_a_lower_threshold_keeps_no_more(refused, first, second):
  row = Record("a", "x", rejected_confidences=refused)
  low, high = sorted([first, second])
  count = len(refused)
  assert reuse.reusable_tokens(row, [low] * count) <= reuse.reusable_tokens(row, [high] * count)


def test_every_token_needs_a_threshold():
  row = Record("a", "x", rejected_confidences=[0.1, 0.2])
  for bad in ([0.5], 0.5, [[0.5, 0.5]]):
    with pytest.raises(ValueError, match="each of the 2 tokens of 'a'"):
      reuse.reusable_tokens(row, bad)


def test_summaries_add_up_and_speak():
  summary = reuse.summarize([3, 1], [3, 4]) + reuse.summarize([9], [5])
  assert summary == reuse.ReuseSummary(3, 2, 12, 9)
  assert str(summary) == "reused 2 of 3 sequences whole (66.7%) and 9 of 12 tokens (75.0%)"
  assert "none to reuse" in str(reuse.ReuseSummary())
