"""The full model in float32 as the reference of what is decoded in fewer
bits.
"""

import dataclasses

import numpy as np
import pytest

from calm import calibrate, exits, inference
from calm.calibrate import Prompt, metrics
from calm.exits import schedules
from calm.inference import grid
from tests.inference.predictor_test import OPTIONS, save

pytestmark = pytest.mark.filterwarnings(
  "ignore::calm.inference.SlowerThanFullDepth"
)
TEXTS = [
  f"{word} {i}" for i in range(6) for word in ("some", "words", "to", "read")
]
PROMPTS = [Prompt(f"p{i}", text) for i, text in enumerate(TEXTS)]
NEVER = schedules.NEVER_EXIT
# What is decoded in fewer bits: states, or weights and the products of the
# encoder.
NARROW = (
  {"dtype": "bfloat16"},
  {"weights_dtype": "bfloat16", "encoder_dtype": "int8"},
)
NAMES = [
  "-".join(f"{name}-{value}" for name, value in given.items())
  for given in NARROW
]


def load(directory, given):
  return inference.load(
    directory, reference_dtype="float32", **given, **OPTIONS
  )


def tokens(outputs):
  return [tuple(output.tokens) for output in outputs]


@pytest.mark.parametrize("given", NARROW, ids=NAMES)
def test_what_is_compared_with_is_the_float32_text_token_by_token(
  directory, model, given
):
  narrow = load(directory, given)
  full_tokens = tokens(model.generate(TEXTS, threshold=NEVER))
  assert (
    narrow.reference is narrow.reference
    and narrow.reference.params is narrow.params
  )
  assert narrow.reference.procedure == model.procedure
  assert tokens(narrow.generate(TEXTS, threshold=NEVER)) == full_tokens
  options = {"tolerance": 0.99, "error_rate": 0.3, "thresholds": [1.0, 0.6]}
  _, cached = grid.certify(narrow, PROMPTS, **options)
  assert [tuple(record.tokens) for record in cached.full] == full_tokens
  served = narrow.generate(TEXTS, threshold=0.6)
  assert [tuple(record.tokens) for record in cached.records[1]] == tokens(
    served
  )


def test_what_8_bits_change_counts_as_loss_where_no_token_leaves(tmp_path):
  """At a threshold that no confidence of a toy reaches, of weights that
  rounding changes.
  """
  folder = save(tmp_path / "toy", seed=4)
  model = inference.load(folder, **OPTIONS)
  narrow = load(folder, {"weights_dtype": "int8"})
  own = narrow.generate(TEXTS, rule=exits.StaticExit()).texts
  pairs = zip(own, model.generate(TEXTS, threshold=NEVER).texts, strict=True)
  # A text without words is like itself, too.
  expected = np.mean(
    [0 if a == b else 1 - metrics.rouge_l(a, [b]) for a, b in pairs]
  )
  options = {"tolerance": 0.99, "error_rate": 0.3, "thresholds": [1.0]}
  made, _ = grid.certify(narrow, PROMPTS, **options)
  assert made.rows[0].mean == pytest.approx(expected) and expected > 0
  alone, _ = grid.certify(
    narrow.with_options(reference_dtype=None), PROMPTS, **options
  )
  assert alone.rows[0].mean == 0.0


def test_where_nothing_approximates_the_model_is_its_own_reference(model):
  assert model.reference is model
  alike = model.with_options(reference_dtype="float32", weights_dtype="float32")
  assert alike.reference is alike
  assert (
    model.with_options(weights_dtype="int8").reference.options.weights_dtype
    == "int8"
  )


def test_both_precisions_are_in_refusals_and_guarantees(model):
  narrow = model.with_options(encoder_dtype="int8", reference_dtype="float32")
  made = calibrate.calibrate(
    np.zeros((200, 1)), [0.9], tolerance=0.1, error_rate=0.05
  )
  made = dataclasses.replace(
    made, procedure=model.procedure, kind="textual", metric="rouge_l"
  )
  with pytest.raises(
    ValueError, match="`encoder_dtype`: expected None, got 'int8'; `reference"
  ):
    narrow.under(made)
  assert "dissimilarity to the full model, 1" in made.guarantee
  for kind, words in (
    ("textual", "dissimilarity to"),
    ("risk_signed", "against references,"),
  ):
    under = dataclasses.replace(made, procedure=narrow.procedure, kind=kind)
    assert (
      words in under.guarantee
      and "the full model in float32" in under.guarantee
    )
    assert narrow.under(under).generate(["a"]).guarantee == under.guarantee


def test_seconds_of_full_depth_are_those_of_the_reference(
  directory, monkeypatch
):
  narrow = load(directory, {"encoder_dtype": "int8"})
  decoded = set()
  decode = inference.Predictor.decode

  def noted(self, encoded, active, threshold, rule=None):
    if isinstance(rule, exits.StaticExit):
      decoded.add(self.options.encoder_dtype)
    return decode(self, encoded, active, threshold, rule)

  monkeypatch.setattr(inference.Predictor, "decode", noted)
  inference.timing.beside_full_depth(narrow, TEXTS[:4], 0.6, rounds=1)
  assert decoded == {None}
