"""What users bind for T5X's own class holds for the model with exits, or is refused."""

import functools
import re

import gin
import jax
import numpy as np
import pytest

from calm import exits
from calm.exits import confidence, schedules
from calm.t5x import bindings
from calm.training import objectives
from tests import engine
from tests.t5x import configs_test, setup

models = setup.import_models()
pytestmark = setup.MARKS
gin_of_t5x = configs_test.gin_of_t5x

SMALL = 'include "t5x/examples/t5/t5_1_1/small.gin"'
FINETUNE, INFER = (f'include "t5x/configs/runs/{name}.gin"' for name in ("finetune", "infer"))
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


def model_of(*lines: str):
  """MODEL of a user's file."""
  text = "\n".join(["from __gin__ import dynamic_registration", *lines])
  imports = [line for line in text.split("\n") if line.startswith(("import", "from"))]
  others = [line for line in text.split("\n") if not line.startswith(("import", "from"))]
  gin.parse_config("\n".join([*imports, *others]))
  return gin.query_parameter("MODEL/macro.value").scoped_configurable_fn()


def test_one_line_honours_what_is_bound_for_t5x_class_and_its_methods():
  model = model_of(
    SMALL,
    "from t5x import models",
    "from t5x import decoding",
    "models.EncoderDecoderModel.predict_batch_with_aux.num_decodes = 4",
    "models.EncoderDecoderModel.predict_batch_with_aux.return_all_decodes = True",
    "models.EncoderDecoderModel.decode_fn = @decoding.temperature_sample",
    "decoding.temperature_sample.temperature = 0.5",
    "Z_LOSS = 0.25",
    OURS,
    "THRESHOLD = 0.4",
    NETWORK,
  )
  assert isinstance(model, models.EncoderDecoderModel)
  assert model.threshold == 0.4 and model.objective == objectives.LayerWeighted(z_loss=0.25)
  batch = setup.batch(engine.PROMPTS[:2], length=4)
  shapes = {name: x.shape for name, x in batch.items()}
  params = jax.eval_shape(lambda: model.get_initial_variables(jax.random.key(0), shapes))
  tokens, aux = jax.eval_shape(model.predict_batch_with_aux, params["params"], batch)
  assert tokens.shape == (2, 4, 4) == aux["exit_layers"].shape
  given = functools.partial(model.predict_batch_with_aux, return_all_decodes=False)
  assert jax.eval_shape(given, params["params"], batch)[0].shape == (2, 4)


def test_stage_two_and_the_papers_schedule_hold_after_the_one_line():
  from t5x import optimizers

  model = model_of(
    SMALL,
    FINETUNE,
    OURS,
    'include "configs/runs/exit_classifier.gin"',
    'include "configs/runs/decaying.gin"',
    "from calm.exits import schedules",
    "schedules.Decaying.temperature = 4.0",
    "schedules.Decaying.max_length = 512",
    NETWORK,
  )
  assert isinstance(model.objective, objectives.ExitClassifier)
  assert model.config.exit_classifier, "it is trained"
  assert isinstance(model.optimizer_def, optimizers.MultiOptimizer)
  assert model.rule.schedule == schedules.Decaying(4.0, 512)


SWEEP = 'include "configs/runs/sweep.gin"'
OF_SWEEP = """
MIXTURE_OR_TASK_NAME = 'x'
TASK_FEATURE_LENGTHS = {'inputs': 8, 'targets': 8}
CHECKPOINT_PATH = 'x'
OUTPUT_DIR = 'x'
"""


@pytest.mark.parametrize(
  "files",
  [(SMALL, SWEEP), (SMALL, SWEEP, OURS), (SWEEP, SMALL, OURS), (SMALL, OURS, SWEEP)],
  ids=lambda files: "-".join(re.findall(r"(\w+)\.gin", " ".join(files))),
)
def test_a_sweep_takes_t5x_own_network(files):
  model = model_of(*files, "from t5x import adafactor", NETWORK, OF_SWEEP)
  gin.finalize()
  assert isinstance(model, models.EncoderDecoderModel) and model.is_greedy
  assert (model.config.emb_dim, model.config.vocab_size) == (16, 44)
  assert isinstance(model.rule, exits.DynamicExits) and not model.config.exit_classifier


MEASURED = (
  "from calm import exits",
  "from calm.exits import confidence",
  "exits.DynamicExits.measure = @confidence.Classifier()",
)


@pytest.mark.parametrize(
  ("lines", "said"),
  [
    (["THRESHOLD = 0.5"], "exits: softmax after 1-3, threshold 0.5"),
    (
      ["TRESHOLD = 0.5"],
      "no exits: every token runs 4 layers, unless a call gives a threshold",
    ),
    ([*MEASURED, "THRESHOLD = 0.25"], "exits: classifier after 1-3, threshold 0.25"),
    (
      ["THRESHOLD = 1", MEASURED[0], "exits.DynamicExits.allowed = (1, 3)"],
      "exits: softmax after 1, 3, threshold 1",
    ),
    (
      [
        "THRESHOLD = 0",
        'include "configs/runs/decaying.gin"',
        "from calm.exits import schedules",
        "schedules.Decaying.temperature = 4.0",
        "schedules.Decaying.max_length = 9",
      ],
      "exits: softmax after 1-3, threshold 0 by Decaying(temperature=4.0, max_length=9)",
    ),
  ],
)
def test_one_line_says_what_decodes(caplog, lines, said):
  layers = "network.T5Config.num_decoder_layers = 4"
  model_of(SMALL, INFER, OURS, *lines, NETWORK, layers)
  assert [line for line in caplog.messages if "exits:" in line] == [said]


@pytest.mark.parametrize("value", ["[0.5, 0.9]", "'0.5'", "(0.5,)", "None", "True"])
def test_a_threshold_that_is_no_number_is_refused(value):
  with pytest.raises(TypeError, match=r"THRESHOLD\) to be one number, got .*THRESHOLDS of"):
    model_of(SMALL, INFER, OURS, f"THRESHOLD = {value}", NETWORK)


def test_a_decoder_alone_is_refused_by_its_name():
  """A decoder has nothing to be early for here."""
  alone = (
    "from t5x import models",
    "models.DecoderOnlyModel.module = @network.Transformer()",
    "models.DecoderOnlyModel.vocabulary = %VOCABULARY",
    "models.DecoderOnlyModel.optimizer_def = %OPTIMIZER",
    "from calm.t5x import models as calm_models",
    "calm_models.early_exit.model = @models.DecoderOnlyModel()",
  )
  with pytest.raises(TypeError, match="got DecoderOnlyModel, which has no exits here; leave"):
    model_of(SMALL, INFER, OURS, *alone, NETWORK)
  gin.clear_config()
  replaced = ("from calm.t5x import models", "MODEL = @models.DecoderOnlyModel()")
  with pytest.raises(TypeError, match=r"got models.DecoderOnlyModel, which has no exits here"):
    model_of(SMALL, INFER, *replaced, NETWORK)


def test_without_a_need_for_it_there_is_no_classifier_and_one_line_says_so(caplog):
  model = model_of(SMALL, INFER, OURS, NETWORK)
  assert not model.config.exit_classifier
  (line,) = [r for r in caplog.messages if "exit classifier" in r]
  assert "\n" not in line
  gin.clear_config()
  assert model_of(SMALL, INFER, OURS, *MEASURED, NETWORK).config.exit_classifier


def test_replacing_the_import_is_enough():
  lines = (
    SMALL,
    "from calm.t5x import models",  # was: from t5x import models
    "MODEL = @models.EncoderDecoderModel()",
    "models.EncoderDecoderModel.predict_batch_with_aux.num_decodes = 2",
    "models.EncoderDecoderModel.threshold = 0.5",
    "Z_LOSS = 0.5",
  )
  model = model_of(*lines, NETWORK)
  assert isinstance(model, models.EncoderDecoderModel)
  assert (model.threshold, model._z_loss, model.config.emb_dim) == (0.5, 0.5, 16)
  signature = gin.get_bindings(models.EncoderDecoderModel.predict_batch_with_aux)
  assert signature == {"num_decodes": 2}


def precisions(model) -> set[str | None]:
  """Of every product of a prediction; None is JAX's own."""
  batch = setup.batch(engine.PROMPTS[:2], length=4)
  shapes = {name: x.shape for name, x in batch.items()}
  params = jax.eval_shape(lambda: model.get_initial_variables(jax.random.key(0), shapes))
  text = str(jax.make_jaxpr(model.predict_batch_with_aux)(params["params"], batch))
  found = re.findall(r"dot_general\[.*?\]\n", text, re.DOTALL)
  assert len(found) > 20
  named = [re.search(r"precision=\((\S+), \1\)", product) for product in found]
  return {name and name[1] for name in named}


def test_precision_of_products_is_an_option_of_decoding():
  def made(*lines):
    gin.clear_config()
    imports = "from calm.t5x import models as calm_models"
    return model_of(SMALL, INFER, OURS, imports, "THRESHOLD = 0.4", *lines, NETWORK)

  line = 'calm_models.EncoderDecoderModel.matmul_precision = "highest"'
  assert precisions(made(line)) == {"Precision.HIGHEST"}
  assert precisions(made()) == {None}
  with pytest.raises(
    ValueError, match="`matmul_precision` to be one of default, high, highest"
  ):
    made(line.replace("highest", "most"))


def test_what_would_be_ignored_is_refused():
  from t5x import models as t5x_models

  class Mine(t5x_models.EncoderDecoderModel):
    def loss_fn(self, params, batch, dropout_rng):
      raise AssertionError

  toy = engine.toy()
  words = setup.vocabulary(40)
  with pytest.raises(TypeError, match=r"got .*Mine, whose own methods would be lost"):
    models.early_exit(Mine(setup.t5x_module(toy), words, words, None))
  with pytest.raises(TypeError, match="Expected `module`, `input_vocabulary`"):
    models.EncoderDecoderModel(optimizer_def=1, output_vocabulary=words)
  with pytest.raises(ValueError, match="label_smoothing"):
    model_of(SMALL, "LABEL_SMOOTHING = 0.1", OURS, NETWORK)


def test_bindings_of_our_own_methods_go_before_those_of_t5x():
  from t5x import models as t5x_models

  model = model_of(
    SMALL,
    OURS,
    "from calm.t5x import models as calm_models",
    "from t5x import models",
    "models.EncoderDecoderModel.predict_batch_with_aux.num_decodes = 4",
    "calm_models.EncoderDecoderModel.predict_batch_with_aux.num_decodes = 2",
    NETWORK,
  )
  assert bindings.of(t5x_models.EncoderDecoderModel.predict_batch_with_aux)
  assert not isinstance(model.predict_batch_with_aux, functools.partial)
  assert np.isinf(model.threshold) and isinstance(model.rule, exits.DynamicExits)
  assert model.rule.measure == confidence.Softmax()


def test_a_decoder_stays_whole_where_it_is_asked_to():
  lines = [SMALL, INFER, OURS, "INFER_OUTPUT_DIR = '/tmp/none'", NETWORK]
  assert not model_of(*lines).whole_decoder
  gin.clear_config()
  assert model_of(*lines, "WHOLE_DECODER = True").whole_decoder
