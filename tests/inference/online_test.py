"""A model whose threshold is calibrated while it serves."""

import numpy as np
import pytest

from calm import exits, inference
from calm.calibrate import NEVER_EXIT, Prompt
from calm.calibrate import losses as sequence_losses
from calm.inference import certified
from tests.inference import predictor_test

TEXTS = [f"{word} {i}" for i in range(6) for word in ("some", "words", "to", "read")]
GRID = [0.9, 0.6, 0.3]
# Lenient: losses of a toy are large.
RATES = {"tolerance": 0.8, "error_rate": 0.3, "thresholds": GRID}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  directory = predictor_test.save(tmp_path_factory.mktemp("model") / "toy")
  return inference.load(directory, **predictor_test.OPTIONS)


def test_it_learns_what_a_batch_of_the_same_prompts_would(model, tmp_path):
  path = tmp_path / "state.jsonl"
  online = model.online(path, **RATES)
  made = model.generate(TEXTS[:12], online=online)
  assert made.threshold == NEVER_EXIT and made.guarantee is None
  assert made.texts == model.generate(TEXTS[:12], threshold=NEVER_EXIT).texts
  assert (online.served, online.checked, online.missing) == (12, 12, 0)
  assert online.threshold in GRID  # twelve losses far below 0.8
  named = online.threshold
  made = model.generate(TEXTS[12:], online=online)
  assert (
    made.threshold == named and made.texts == model.generate(TEXTS[12:], threshold=named).texts
  )
  assert "at least 0.7 over the whole life" in made.guarantee and online.served == 24
  # The losses are those of a calibration of these prompts.
  prompts = [Prompt(text, text) for text in TEXTS[:12]]
  _, cached = certified.certify(model, prompts, **RATES)
  expected = sequence_losses.compute(cached, "textual").values
  again = model.online(None, **RATES)
  for text, row in zip(TEXTS[:12], expected.tolist(), strict=True):
    assert again.should_check(text)
    again.observe(text, dict(zip(GRID, row, strict=True)))
  assert again.threshold == named
  # It goes on: texts that were seen are not drawn again.
  checked = online.checked
  del online
  online = model.online(path, **RATES)
  np.testing.assert_allclose(online.checked, checked)
  model.generate(TEXTS[:12], online=online)
  assert online.checked == checked


def test_what_does_not_fit_is_refused(model):
  online = model.online(None, **RATES)
  for other in ({"threshold": 0.5}, {"rule": exits.StaticExit()}):
    with pytest.raises(ValueError, match="`online` needs neither"):
      model.generate(TEXTS[:1], online=online, **other)
  with pytest.raises(ValueError, match="`ids` of 1 texts, got 2"):
    model.generate(TEXTS[:1], online=online, ids=["a", "b"])
  with pytest.raises(ValueError, match="a state of this model under these options"):
    model.with_options(max_decode_length=3).generate(TEXTS[:1], online=online)
  assert online.served == 0


def test_prompts_of_one_id_are_checked_once(model):
  online = model.online(None, **RATES)
  model.generate(TEXTS[:4], online=online, ids=["a", "a", "b", "a"])
  assert (online.served, online.checked) == (4, 2)
