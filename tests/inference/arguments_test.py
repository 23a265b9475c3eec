"""Arguments of models, options and rules: what stands for a value passes, the rest is named."""

import dataclasses
import math
import re

import jax.numpy as jnp
import numpy as np
import pytest

from calm import exits, fitting, inference
from calm.exits import confidence, propagation, schedules
from calm.fitting import result
from calm.inference import DecodeOptions
from tests import odd_arguments
from tests.inference import predictor_test

TEXTS = ["a", "some words"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  folder = predictor_test.save(tmp_path_factory.mktemp("model") / "toy")
  return inference.load(str(folder), **{**predictor_test.OPTIONS, "max_decode_length": 3})


@pytest.mark.parametrize(
  ("odd", "plain"),
  [
    (lambda: DecodeOptions(schedule="constant"), lambda: DecodeOptions()),
    (lambda: DecodeOptions(exit_layers=[1]), lambda: DecodeOptions(exit_layers=(1,))),
    (lambda: DecodeOptions(exit_layers=np.array([1])), lambda: DecodeOptions(exit_layers=(1,))),
    (lambda: DecodeOptions(grid=[0.9, 0.5]), lambda: DecodeOptions(grid=(0.9, 0.5))),
    (
      lambda: DecodeOptions(shortlist=(token for token in (1, 2))),
      lambda: DecodeOptions(shortlist=(1, 2)),
    ),
    (
      lambda: exits.DynamicExits("state", "constant", [1], "copy_projections"),
      lambda: exits.DynamicExits(
        confidence.State(), schedules.Constant(), (1,), propagation.CopyProjections()
      ),
    ),
    (
      lambda: exits.OracleExit([1], "first_state"),
      lambda: exits.OracleExit((1,), propagation.FirstState()),
    ),
    (lambda: exits.StaticExit(np.int64(2)), lambda: exits.StaticExit(2)),
  ],
)
def test_options_and_rules_take_names_and_lists(odd, plain):
  made = odd()
  assert made == plain() and hash(made) == hash(plain())  # programs are compiled by it


def test_generate_takes_what_stands_for_texts_and_thresholds(model):
  plain = model.generate(TEXTS, threshold=0.5)
  for texts, threshold in (
    ((text for text in TEXTS), 0.5),
    (np.array(TEXTS), np.array(0.5)),
    (tuple(TEXTS), jnp.float32(0.5)),
    (TEXTS, "0.5"),
  ):
    made = model.generate(texts, threshold=threshold)
    assert made.items == plain.items and made.threshold == 0.5
  assert model.generate(TEXTS, threshold="never").threshold == math.inf


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"threshold": np.array([0.5])}, "Expected `threshold` to be a number or None, got array"),
    ({"threshold": math.nan}, "Expected `threshold` in [0, 1]"),
    ({"threshold": -0.1}, "Expected `threshold` in [0, 1]"),
    ({}, "Expected `threshold`, or a model loaded with a"),
    ({"threshold": "most"}, "Expected `threshold` to be a number in [0, 1] or 'never'"),
    ({"rule": "static"}, "Expected `rule` to be a `StepRule` or a `Speculative` or None, got"),
    ({"rule": exits.StaticExit(0)}, "Expected `layer` in 1 ... 3, got 0"),
    ({"rule": exits.Speculative(99)}, "Expected `draft_layer` in 1 ... 2"),
  ],
)
def test_generate_refuses_by_name(model, options, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    model.generate(TEXTS, **options)


@pytest.mark.parametrize(
  ("texts", "message"),
  [
    (None, "got None"),
    (b"a", "got b'a'"),
    ({"a": 1}, "got {'a': 1}"),
    ({"a"}, "got {'a'}"),
    ([b"a"], "got b'a'"),
  ],
)
def test_texts_are_a_list(model, texts, message):
  with pytest.raises(TypeError, match=re.escape(f"list of texts, {message}")):
    model.generate(texts, threshold=0.5)
  with pytest.raises(TypeError, match=r"Expected `?prompts`? to be"):
    model.calibrate(texts, tolerance=0.1)


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: exits.Speculative(1, 10**6), "Expected `num_drafts` in 1 ... 31, got 1000000"),
    (lambda: DecodeOptions(schedule="decaying"), "Expected `schedule` to be a name and its"),
    (lambda: DecodeOptions(grid=[0.5, 0.9]), "Expected `thresholds` to descend strictly"),
    (lambda: inference.load(None), "Expected `path` to be a text or a `Path`, got None"),
    (lambda: inference.load(calibration=1), "Expected `calibration` to be a `Calibration` or"),
    (lambda: fitting.fit(None, [], output="x"), "Expected `model` to be a text or a `Path`"),
  ],
)
def test_the_rest_is_refused_before_any_work(call, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    call()


def first_letter(prediction, references):
  return float(any(prediction[:1] == text[:1] for text in references))


def test_a_fit_goes_on_by_the_name_of_a_metric(tmp_path):
  asked = fitting.FitOptions(metric=f"{__name__}:first_letter")
  begin = lambda options: result.open_folder(
    tmp_path / "fit", {"model": "a", "rows": "b", "options": dataclasses.asdict(options)}
  )
  begin(asked)
  begin(asked)
  with pytest.raises(ValueError, match=r"other options: `metric` \('.*:first_letter' there"):
    begin(fitting.FitOptions(metric="chrf"))
  # A name that the file alone has is compared, and not imported.
  (tmp_path / "harmful.py").write_text("raise SystemExit('imported')\n")
  request = tmp_path / "fit" / "fit" / "request.json"
  harmful = f"{tmp_path}/harmful.py:run"
  request.write_text(request.read_text().replace(asked.metric, harmful))
  with pytest.raises(ValueError, match=r"`metric` \('.*harmful.py:run' there"):
    begin(asked)


def fields(kind, **changes):
  """{field: default} of a dataclass."""
  made = {f.name: f.default for f in dataclasses.fields(kind) if f.init}
  return {**made, **changes}


BORDER = {
  "options": (DecodeOptions, fields(DecodeOptions)),
  "static": (exits.StaticExit, fields(exits.StaticExit)),
  "oracle": (exits.OracleExit, fields(exits.OracleExit)),
  "dynamic": (exits.DynamicExits, fields(exits.DynamicExits, measure="softmax")),
  "speculative": (exits.Speculative, fields(exits.Speculative, draft_layer=1)),
  "decaying": (schedules.schedule, {"name": "decaying", "temperature": 1.0, "max_length": 8}),
  "threshold": (schedules.check_threshold, {"threshold": 0.5}),
  "slack": (exits.threshold_of, {"slack": 0.5}),
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
  rates = {"tolerance": 0.1, "error_rate": 0.05, "consistency": "textual", "metric": "rouge_l"}
  given = {"prompts": TEXTS, **rates, "thresholds": None, "folder": None, "progress": None}

  def calibrate(**options):  # two prompts are too few, whatever else is right
    with pytest.raises((TypeError, ValueError)) as caught:
      model.calibrate(**options)
    raise caught.value

  assert list(odd_arguments.unclear(calibrate, given)) == []
