"""What users bind for T5X's own class holds for the model with exits, or is refused."""

import functools
import re

import gin
import jax
import pytest

from calm import exits
from calm.exits import confidence
from calm.training import objectives
from tests import engine
from tests.t5x import configs_test, setup

models = setup.import_models()
pytestmark = setup.MARKS
gin_of_t5x = configs_test.gin_of_t5x

SMALL = 'include "t5x/examples/t5/t5_1_1/small.gin"'
INFER = 'include "t5x/configs/runs/infer.gin"'
OURS = 'include "configs/runs/early_exit.gin"'
NETWORK = """
import seqio
from t5x.examples.t5 import network
DROPOUT_RATE = 0.0
VOCABULARY = @seqio.PassThroughVocabulary()
seqio.PassThroughVocabulary.size = 40
seqio.PassThroughVocabulary.eos_id = 1
network.T5Config:
  vocab_size = 44
  emb_dim = 16
  num_heads = 2
  head_dim = 8
  num_encoder_layers = 1
  num_decoder_layers = 3
  mlp_dim = 16
"""
THEIRS = "from t5x import models"
IMPORTED = "from calm.t5x import models as calm_models"


def model_of(*lines: str):
  """MODEL of a user's file."""
  text = "\n".join(["from __gin__ import dynamic_registration", *lines])
  imports = [line for line in text.split("\n") if line.startswith(("import", "from"))]
  others = [line for line in text.split("\n") if not line.startswith(("import", "from"))]
  gin.clear_config()
  gin.parse_config("\n".join([*imports, *others]))
  return gin.query_parameter("MODEL/macro.value").scoped_configurable_fn()


def shapes_of(model):
  """(parameters' shapes, a batch)."""
  batch = setup.batch(engine.PROMPTS[:2], length=4)
  shapes = {name: x.shape for name, x in batch.items()}
  made = jax.eval_shape(lambda: model.get_initial_variables(jax.random.key(0), shapes))
  return made["params"], batch


def test_one_line_honours_what_is_bound_for_t5x_class_and_its_method():
  ours = "calm_models.EncoderDecoderModel.predict_batch_with_aux.num_decodes = 2"
  lines = [
    SMALL,
    THEIRS,
    "from t5x import decoding",
    "models.EncoderDecoderModel.predict_batch_with_aux.num_decodes = 4",
    "models.EncoderDecoderModel.predict_batch_with_aux.return_all_decodes = True",
    "models.EncoderDecoderModel.decode_fn = @decoding.temperature_sample",
    "decoding.temperature_sample.temperature = 0.5",
    "Z_LOSS = 0.25",
    OURS,
    "THRESHOLD = 0.4",
    NETWORK,
  ]
  model = model_of(*lines)
  assert isinstance(model, models.EncoderDecoderModel)
  assert model.threshold == 0.4 and model.objective == objectives.LayerWeighted(z_loss=0.25)
  assert not model.whole_decoder and model.rule == exits.DynamicExits(confidence.Softmax())
  params, batch = shapes_of(model)
  tokens, aux = jax.eval_shape(model.predict_batch_with_aux, params, batch)
  assert tokens.shape == (2, 4, 4) == aux["exit_layers"].shape
  assert aux["relative_cost"].shape == (2, 4)
  given = functools.partial(model.predict_batch_with_aux, return_all_decodes=False)
  assert jax.eval_shape(given, params, batch)[0].shape == (2, 4)
  # What is bound for our own method goes before it.
  model = model_of(*lines, IMPORTED, ours)
  assert jax.eval_shape(model.predict_batch_with_aux, params, batch)[0].shape == (2, 2, 4)


MEASURED = (
  "from calm import exits",
  "from calm.exits import confidence",
  "exits.DynamicExits.measure = @confidence.Classifier()",
)


@pytest.mark.parametrize(
  ("lines", "said"),
  [
    (["THRESHOLD = 0.5"], "exits: threshold 0.5, DynamicExits(measure=Softmax()"),
    (["TRESHOLD = 0.5"], "no exits, unless a call gives a threshold"),
    ([*MEASURED, "THRESHOLD = 0"], "exits: threshold 0, DynamicExits(measure=Classifier()"),
  ],
)
def test_one_line_says_what_decodes(caplog, lines, said):
  model = model_of(SMALL, INFER, OURS, *lines, NETWORK)
  (line,) = [line for line in caplog.messages if "exits" in line]
  assert line.startswith(said)
  assert model.config.exit_classifier == ("Classifier" in said), "where it is needed"


@pytest.mark.parametrize("value", ["[0.5, 0.9]", "'0.5'", "(0.5,)", "None", "True"])
def test_a_threshold_that_is_no_number_is_refused(value):
  with pytest.raises(ValueError, match="Expected `threshold` to be a number, got "):
    model_of(SMALL, INFER, OURS, f"THRESHOLD = {value}", NETWORK)


def precisions(model) -> set[str | None]:
  """Of every product of a prediction; None is JAX's own."""
  text = str(jax.make_jaxpr(model.predict_batch_with_aux)(*shapes_of(model)))
  found = re.findall(r"dot_general\[.*?\]\n", text, re.DOTALL)
  assert len(found) > 20
  named = [re.search(r"precision=\((\S+), \1\)", product) for product in found]
  return {name and name[1] for name in named}


def test_precision_of_products_is_an_option_of_decoding():
  made = lambda *lines: model_of(
    SMALL, INFER, OURS, IMPORTED, "THRESHOLD = 0.4", *lines, NETWORK
  )
  line = 'calm_models.EncoderDecoderModel.matmul_precision = "highest"'
  assert precisions(made(line)) == {"Precision.HIGHEST"}
  assert precisions(made()) == {None}
  with pytest.raises(ValueError, match="`matmul_precision` to be one of default, high"):
    made(line.replace("highest", "most"))


def test_what_would_be_ignored_is_refused():
  """A model of another class is not what T5X's class is bound to."""
  other = ("models.DecoderOnlyModel.module = @network.Transformer()", THEIRS)
  with pytest.raises(TypeError, match="Expected `module`, `input_vocabulary`"):
    model_of(INFER, OURS, *other, NETWORK)
  with pytest.raises(TypeError, match="Expected `module`, `input_vocabulary`"):
    models.EncoderDecoderModel(optimizer_def=1, output_vocabulary=setup.vocabulary(40))
  with pytest.raises(ValueError, match="label_smoothing"):
    model_of(SMALL, "LABEL_SMOOTHING = 0.1", OURS, NETWORK)
