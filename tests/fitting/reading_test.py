"""How weights are read: decided by seconds, where something is to be gained."""

import numpy as np
import pytest

from calm import inference
from calm.calibrate import Prompt
from calm.fitting import reading
from calm.t5 import columns

PROMPTS = [Prompt(f"p{i}", f"some words {i}", (), f"g{i}") for i in range(3)]


@pytest.mark.parametrize("option", reading.WAYS)
def test_both_ways_are_timed_on_the_same_prompts(model, monkeypatch, option):
  decoded = []
  real = inference.Predictor.decode

  def note(self, *arguments):
    decoded.append(getattr(self.options, option))
    return real(self, *arguments)

  monkeypatch.setattr(inference.Predictor, "decode", note)
  shares = []
  found = reading.measure(model, option, PROMPTS, lambda share, text: shares.append(share))
  assert found.num_prompts == 3 and shares[-1] == 1.0
  assert found.stored > 0 and found.other > 0
  # Each as often as the other, and neither always first.
  value = reading.WAYS[option].value
  assert decoded.count(None) == decoded.count(value) == 3 * (reading.ROUNDS + 1)
  assert {tuple(decoded[i : i + 2]) for i in range(0, len(decoded), 2)} == {
    (None, value),
    (value, None),
  }


@pytest.mark.parametrize("option", reading.WAYS)
@pytest.mark.parametrize(
  ("stored", "other", "pays"), [(6.0, 5.0, 1), (6.0, 5.9, 0), (5.0, 6.0, 0)]
)
def test_another_way_is_taken_where_it_is_clearly_faster(option, stored, other, pays):
  found, way = reading.Reading(option, stored, other, 8), reading.WAYS[option]
  assert found.pays == bool(pays)
  assert f"{way.subject}: {way.taken if pays else way.left};" in str(found)
  assert f"x{stored / other:.2f}" in str(found)


def test_nothing_is_timed_where_nothing_can_be_gained(model, monkeypatch):
  assert reading.to_try(model) == []  # a small head, and small matrices
  monkeypatch.setattr(reading, "LEAST_NUMBERS", 1)
  monkeypatch.setattr(columns, "LEAST_NUMBERS", 1)
  assert reading.to_try(model) == list(reading.WAYS)
  for option in reading.WAYS:
    assert option not in reading.to_try(reading.with_option(model, option))
  coded = model.with_options(weights_dtype="int8")
  assert reading.to_try(coded) == ["head_dtype"]  # whose matrices are not cut
  assert not np.isfinite(reading.Reading("head_dtype", float("nan"), float("nan"), 0).speedup)
