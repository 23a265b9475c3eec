"""What `scripts/soak.py` calls a tie, and that it fails on what is none."""

import argparse
import dataclasses
import pathlib
import random

import numpy as np
import pytest

from calm import inference
from calm.data import vocabulary
from calm.t5 import network
from tests import toys

SCRIPTS = pathlib.Path(__file__).parents[2] / "scripts"
TEXT = "some words"
TWIN = 258
SIZES = toys.Config(vocab_size=264, num_pieces=259, num_encoder_layers=1, num_decoder_layers=3)


@pytest.fixture(scope="module")
def soak():
  with pytest.MonkeyPatch.context() as patched:
    patched.syspath_prepend(str(SCRIPTS))
    import soak
    import soak_measures
  return soak, soak_measures


MEASURES = ("softmax", "state", "classifier")


def predictor(measure, twin_of=None):
  """A toy; of `twin_of` there is another token that is as likely everywhere."""
  params = toys.params(SIZES, 1)
  if twin_of is not None:
    head = params["decoder"]["logits_dense"]["kernel"]
    head[:, TWIN] = head[:, twin_of]
  options = inference.DecodeOptions(
    measure=measure, max_input_length=32, max_decode_length=6, batch_size=1
  )
  config = network.T5Config(**toys.network_fields(SIZES))
  return inference.Predictor(config, params, vocabulary.ByteVocabulary(extra_ids=0), options)


@pytest.fixture(scope="module", params=MEASURES)
def model(request):
  return predictor(request.param)


def changed(output, at, **fields):
  """The output with its step `at` another."""
  values = {name: list(getattr(output, name)) for name in fields}
  for name, value in fields.items():
    values[name][at] = value
  return dataclasses.replace(output, **{n: tuple(v) for n, v in values.items()})


def test_an_exit_is_a_tie_only_near_the_threshold(soak, model):
  _, measures = soak
  never = model.generate([TEXT], threshold=float("inf"), rule=model.options.rule)[0]
  level = sorted({*never.rejected_confidences} - {0.0, 1.0})[-1]
  near = lambda by: float(np.float32(level + by))
  below = model.generate([TEXT], threshold=near(-3e-6))[0]
  above = model.generate([TEXT], threshold=near(3e-6))[0]
  assert measures.steps(below) != measures.steps(above)
  assert measures.is_tie(model, TEXT, near(3e-6), below)
  assert measures.is_tie(model, TEXT, near(-3e-6), above)
  assert not measures.is_tie(model, TEXT, near(3e-4), below)


def test_another_step_is_no_tie(soak, model):
  _, measures = soak
  threshold = measures.middle(model, [TEXT])
  theirs = model.generate([TEXT], threshold=threshold)[0]
  for at, (token, layer) in enumerate(measures.steps(theirs)):
    other = changed(theirs, at, exit_layers=1 if layer > 1 else 2)
    assert not measures.is_tie(model, TEXT, threshold, other)
    other = changed(theirs, at, tokens=token + 1)
    assert not measures.is_tie(model, TEXT, threshold, other)
  shorter = dataclasses.replace(
    theirs, tokens=theirs.tokens[:-1], exit_layers=theirs.exit_layers[:-1]
  )
  assert not measures.is_tie(model, TEXT, threshold, shorter)


@pytest.mark.parametrize("measure", MEASURES)
def test_of_two_tokens_as_likely_either_may_come(soak, measure):
  _, measures = soak
  token = predictor(measure).generate([TEXT], threshold=0.5)[0].tokens[0]
  model = predictor(measure, token)
  theirs = model.generate([TEXT], threshold=0.5)[0]
  at = theirs.tokens.index(token)
  assert measures.is_tie(model, TEXT, 0.5, changed(theirs, at, tokens=TWIN))
  layer = theirs.exit_layers[at] % 3 + 1
  assert not measures.is_tie(
    model, TEXT, 0.5, changed(theirs, at, tokens=TWIN, exit_layers=layer)
  )


def test_the_soak_fails_on_what_is_no_tie(soak, monkeypatch):
  script, measures = soak
  flags = argparse.Namespace(
    **{"measures": "state", "batches": 3, "texts": 2, "most_rows": 1, "programs": 50},
    **{"turn": 50, "seconds": 100.0},
  )
  monkeypatch.setattr(script, "flat", lambda found: True)
  assert script.batches(flags, random.Random(0))[1]
  monkeypatch.setattr(measures, "resized", wrong(measures.resized))
  lines, good = script.batches(flags, random.Random(0))
  assert not good and "3 of 3, 0 of them ties" in lines[0]


def wrong(resized):
  """Models that leave one layer later than they say."""

  def made(model, size):
    other = resized(model, size)
    generate = other.generate
    vars(other)["generate"] = lambda *a, **k: [
      changed(output, 0, exit_layers=output.exit_layers[0] + 1) for output in generate(*a, **k)
    ]
    return other

  return made
