"""Arguments of models, options and rules: what stands for a value passes, the
rest is named.
"""

import dataclasses
import math
import re

import jax.numpy as jnp
import numpy as np
import pytest

from calm import exits, fitting, inference
from calm.exits import confidence, propagation, schedules
from calm.inference import DecodeOptions
from tests import odd_arguments

TEXTS = ["a", "some words"]


def test_options_and_rules_take_names_and_lists():
  options = {
    "exit_layers": np.array([1]),
    "grid": [0.9, 0.5],
    "shortlist": (i for i in (1, 2)),
  }
  plain = {"exit_layers": (1,), "grid": (0.9, 0.5), "shortlist": (1, 2)}
  filled = (
    confidence.State(),
    schedules.Constant(),
    (1,),
    propagation.CopyProjections(),
  )
  for odd, expected in (
    (DecodeOptions(schedule="constant", **options), DecodeOptions(**plain)),
    (
      exits.DynamicExits("state", "constant", [1], "copy_projections"),
      exits.DynamicExits(*filled),
    ),
    (exits.StaticExit(np.int64(2)), exits.StaticExit(2)),
  ):
    # programs are compiled by it
    assert odd == expected and hash(odd) == hash(expected)


def test_generate_takes_what_stands_for_texts_and_thresholds(model):
  plain = model.generate(TEXTS, threshold=0.5)
  for texts, threshold in (
    ((text for text in TEXTS), np.array(0.5)),
    (np.array(TEXTS), jnp.float32(0.5)),
    (TEXTS, "0.5"),
  ):
    made = model.generate(texts, threshold=threshold)
    assert made.items == plain.items and made.threshold == 0.5
  assert model.generate(TEXTS, threshold="never").threshold == math.inf


def test_generate_needs_a_threshold_and_layers_that_there_are(model):
  for options, message in (
    ({}, "Expected `threshold`, or a model loaded with a"),
    ({"rule": exits.StaticExit(0)}, "Expected `layer` in 1 ... 3, got 0"),
    ({"rule": exits.Speculative(99)}, "Expected `draft_layer` in 1 ... 2"),
  ):
    with pytest.raises(ValueError, match=re.escape(message)):
      model.generate(TEXTS, **options)


def fields(kind, **changes):
  """{field: default} of a dataclass."""
  made = {f.name: f.default for f in dataclasses.fields(kind) if f.init}
  return {**made, **changes}


BORDER = {
  "options": (DecodeOptions, fields(DecodeOptions)),
  "static": (exits.StaticExit, fields(exits.StaticExit)),
  "oracle": (exits.OracleExit, fields(exits.OracleExit)),
  "dynamic": (
    exits.DynamicExits,
    fields(exits.DynamicExits, measure="softmax"),
  ),
  "speculative": (exits.Speculative, fields(exits.Speculative, draft_layer=1)),
  "decaying": (
    schedules.schedule,
    {"name": "decaying", "temperature": 1.0, "max_length": 8},
  ),
  "layers": (exits.allowed_layers, {"allowed": (1,), "num_layers": 3}),
  "measure": (confidence.measure, {"name": "softmax"}),
  "propagation": (propagation.propagation, {"name": "exit_state"}),
  "fit": (fitting.FitOptions, fields(fitting.FitOptions)),
}


@pytest.mark.parametrize("name", BORDER)
def test_every_argument_is_taken_or_refused_by_name(name):
  call, given = BORDER[name]
  call(**given)
  assert list(odd_arguments.unclear(call, given)) == []


def test_every_argument_of_a_model_is_taken_or_refused_by_name(model):
  given = {"texts": TEXTS, "threshold": 0.5, "rule": None}
  assert list(odd_arguments.unclear(model.generate, given)) == []
  rates = {
    "tolerance": 0.1,
    "error_rate": 0.05,
    "consistency": "textual",
    "metric": "rouge_l",
  }
  given = {
    "prompts": TEXTS,
    **rates,
    "thresholds": None,
    "folder": None,
    "progress": None,
  }

  def calibrate(**options):  # two prompts are too few, whatever else is right
    with pytest.raises((TypeError, ValueError)) as caught:
      model.calibrate(**options)
    raise caught.value

  assert list(odd_arguments.unclear(calibrate, given)) == []


@pytest.mark.parametrize("dtype", ["", []])
def test_an_activation_dtype_that_is_none_is_not_taken_for_the_default(dtype):
  with pytest.raises(ValueError, match="Expected `dtype` to be the type of"):
    inference.load(dtype=dtype)
