"""How the output head is read: decided by seconds, where something is to be gained."""

import numpy as np
import pytest

from calm import inference
from calm.calibrate import Prompt
from calm.fitting import heads

PROMPTS = [Prompt(f"p{i}", f"some words {i}", (), f"g{i}") for i in range(3)]


def test_both_heads_are_timed_on_the_same_prompts(model, monkeypatch):
  decoded = []
  real = inference.Predictor.decode

  def note(self, *arguments):
    decoded.append(self.options.head_dtype)
    return real(self, *arguments)

  monkeypatch.setattr(inference.Predictor, "decode", note)
  shares = []
  found = heads.measure(model, PROMPTS, lambda share, text: shares.append(share))
  assert found.num_prompts == 3 and shares[-1] == 1.0
  assert found.stored > 0 and found.narrow > 0
  # Each as often as the other, and neither always first.
  assert decoded.count(None) == decoded.count("int8") == 3 * (heads.ROUNDS + 1)
  assert {tuple(decoded[i : i + 2]) for i in range(0, len(decoded), 2)} == {
    (None, "int8"),
    ("int8", None),
  }


@pytest.mark.parametrize(
  ("stored", "narrow", "told"),
  [(6.0, 5.0, "read in 8 bits"), (6.0, 5.9, "as it is stored"), (5.0, 6.0, "as it is stored")],
)
def test_eight_bits_are_taken_where_they_are_clearly_faster(stored, narrow, told):
  found = heads.Heads(stored, narrow, 8)
  assert found.pays == (told == "read in 8 bits") and told in str(found)
  assert f"x{stored / narrow:.2f}" in str(found)


def test_nothing_is_timed_where_nothing_can_be_gained(model, monkeypatch):
  assert heads.nothing_to_gain(model)  # a small head
  monkeypatch.setattr(heads, "LEAST_NUMBERS", 1)
  assert not heads.nothing_to_gain(model)
  assert heads.nothing_to_gain(model.with_options(head_dtype="int8"))
  assert not np.isfinite(heads.Heads(float("nan"), float("nan"), 0).speedup)
