"""How full depth is served from drafts: with the head that is faster then, where either is."""

import numpy as np
import pytest

from calm import exits, inference
from calm.calibrate import seconds
from calm.exits import schedules
from calm.fitting import choose
from calm.inference import result_cache

TEXTS = ["some words", "other words", "more of them"]


@pytest.fixture
def measured(monkeypatch):
  """Seconds that are told instead of measured: {head: (alone, in batches)}."""
  told, asked = {}, []

  def measure(predictor, texts, threshold, *, rule, base):
    assert list(texts) == TEXTS and threshold == 1.0
    assert rule == inference.exact_rule(base)
    asked.append((predictor.options.head_dtype, base.options.head_dtype))
    alone, batched = told[predictor.options.head_dtype]
    pair = lambda size, x: seconds.Pair(size, 3, x, 1.0, x, x)
    return seconds.Seconds(pair(1, alone), pair(8, batched))

  monkeypatch.setattr(inference.timing, "beside_full_depth", measure)
  monkeypatch.setattr(choose, "LEAST_NUMBERS", 1)
  return told, asked


@pytest.mark.parametrize(
  ("stored", "narrow", "served"),
  [
    ((1.5, 1.1), (2.5, 1.2), "int8"),
    ((1.5, 1.1), (1.52, 1.2), None),
    ((1.5, 1.1), (2.5, 0.9), None),
    ((0.9, 1.1), (1.2, 1.1), "int8"),
    ((0.9, 1.1), (0.8, 1.1), "full depth"),
  ],
)
def test_the_faster_head_is_served_and_none_where_drafts_are_slower(
  model, measured, tmp_path, stored, narrow, served
):
  told, asked = measured
  told |= {None: stored, "int8": narrow}
  for _ in range(2):  # the second time from what was kept
    chosen, found = choose.fastest_exact(model, TEXTS, result_cache.ResultCache(tmp_path))
    if served == "full depth":
      assert found is None and chosen is model
    else:
      assert chosen.options.head_dtype == served
      assert found.single.speedup == told[served][0]
  # Both beside the full depth that would be served otherwise.
  assert asked == [(None, None), ("int8", None)]


def test_a_small_head_is_timed_as_it_is(model, measured, monkeypatch, tmp_path):
  told, asked = measured
  told[None] = (1.5, 1.1)
  monkeypatch.setattr(choose, "LEAST_NUMBERS", 2**20)
  chosen, found = choose.fastest_exact(model, TEXTS, result_cache.ResultCache(tmp_path))
  assert chosen is model and found is not None and asked == [(None, None)]


def test_layers_in_8_bits_are_served_without_drafts(model, measured, tmp_path):
  coded = model.with_options(weights_dtype="int8")
  chosen, found = choose.fastest_exact(coded, TEXTS, result_cache.ResultCache(tmp_path))
  assert chosen is coded and found is None and measured[1] == []


def test_drafts_are_timed_beside_the_full_depth_of_another_head(model, monkeypatch):
  """Each in turn, on what was encoded once."""
  decoded = []
  real = inference.Predictor.decode

  def note(self, encoded, active, threshold, rule):
    decoded.append((self.options.head_dtype, type(rule), threshold))
    return real(self, encoded, active, threshold, rule)

  monkeypatch.setattr(inference.Predictor, "decode", note)
  narrow = model.with_options(head_dtype="int8")
  rule = inference.exact_rule(model)
  found = inference.timing.beside_full_depth(
    narrow, TEXTS, 1.0, rounds=2, rule=rule, base=model
  )
  full = (None, exits.StaticExit, schedules.NEVER_EXIT)
  drafted = ("int8", exits.Speculative, 1.0)
  assert decoded.count(full) == decoded.count(drafted) == len(decoded) / 2
  assert found.single.num_prompts > 0 and np.isfinite(found.single.speedup)
