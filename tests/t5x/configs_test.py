"""Every gin file for T5X's scripts parses, finalises, and builds the model that
it says.
"""

import functools
import re
import sys
import types

import jax
import numpy as np
import pytest

from calm import exits
from calm.exits import confidence, propagation, schedules
from calm.t5 import network, parameters
from calm.training import distillation, objectives
from tests import configs_test, engine
from tests.t5x import setup

models = setup.import_models()
pytestmark = setup.MARKS

import gin

REPOSITORY = configs_test.REPOSITORY
CONFIGS = configs_test.CONFIGS
RUNS = sorted((CONFIGS / "runs").glob("*.gin"))
# Included by others, or after them.
PARTS = (
  *(
    "local.gin",
    "paper.gin",
    "early_exit.gin",
    "t5x_stored_model.gin",
    "decaying.gin",
  ),
  *(
    "exit_classifier.gin",
    "exit_maps.gin",
    "exit_translators.gin",
    "calibrated.gin",
  ),
)
WHOLE = [path for path in RUNS if path.name not in PARTS]
SIZES = sorted(
  str(path.relative_to(setup.t5x_root()))
  for path in (setup.t5x_root() / "t5x/examples/t5").glob("*/*.gin")
)
# Public figures of the T5 1.1 checkpoints.
NUM_PARAMETERS = {
  "small": 76_961_152,
  "base": 247_577_856,
  "large": 783_150_080,
}
SMALL = "t5x/examples/t5/t5_1_1/small.gin"
SYNOPSIS = "configs/tasks/debian_synopsis.gin"


def forget(module: str) -> None:
  """Takes a module's configurables out of gin's registry, as in a process that
  is new: T5X's small.gin says `network.T5Config` without an import, of which
  gin must know but one.
  """
  from gin import config

  for selector, known in list(config._REGISTRY.items()):
    if selector.startswith(module):
      config._REGISTRY.pop(selector)
      for original in [
        key for key, value in config._INVERSE_REGISTRY.items() if value is known
      ]:
        del config._INVERSE_REGISTRY[original]


@pytest.fixture(autouse=True)
def gin_of_t5x(monkeypatch):
  """T5X's scripts bind `__main__`, which they are when they run."""
  from t5x import eval as t5x_eval
  from t5x import infer, train

  from scripts import t5x_sweep

  main = types.ModuleType("__main__")
  main.train = train.train
  main.infer = infer.infer
  main.evaluate = t5x_eval.evaluate
  main.write_inferences_to_file = infer.write_inferences_to_file
  main.sweep = t5x_sweep.sweep
  monkeypatch.setitem(sys.modules, "__main__", main)
  for folder in (REPOSITORY, setup.t5x_root()):
    gin.add_config_file_search_path(str(folder))
  gin.clear_config()
  forget("calm.t5.network")
  forget("t5x.examples.t5.network")
  yield
  gin.clear_config()


def parse(*files, **given):
  gin.parse_config_files_and_bindings(
    list(files), [f"{k} = {v!r}" for k, v in given.items()]
  )


def required(path):
  """What the included T5X file, or ours, leaves open."""
  whole = configs_test.text_of(path)
  for name in re.findall(r'^include "(t5x/.+)"$', whole, re.MULTILINE):
    whole = (setup.t5x_root() / name).read_text() + whole
  open_ones = set(re.findall(r"^(\w+) = %gin.REQUIRED", whole, re.MULTILINE))
  bound = set(re.findall(r"^(\w+) = (?!%gin.REQUIRED)", whole, re.MULTILINE))
  return open_ones - bound - {"MIXTURE_OR_TASK_NAME", "TASK_FEATURE_LENGTHS"}


def parse_run(path, *after, size=SMALL, **more):
  """A run with T5X's network and a task beside it, as its header says, and
  files after it.
  """
  text = configs_test.text_of(path)
  name = str(path.relative_to(REPOSITORY))
  has_network = re.search(r'^include "t5x/examples/', text, re.MULTILINE)
  files = [name] if has_network else [size, name]
  files += [] if "tasks." in text else [SYNOPSIS]
  files += [f"configs/runs/{name}.gin" for name in after]
  given = {name: "x" for name in required(path)}
  parse(*files, **{"DATA": "x", **given, "TRAIN_STEPS": 3, **more})


def use_a_vocabulary_without_a_file(size: int = 32128):
  with gin.unlock_config():
    gin.parse_config(
      "from __gin__ import dynamic_registration\nimport seqio\n"
      "VOCABULARY = @seqio.PassThroughVocabulary()\n"
      "seqio.PassThroughVocabulary.size = "
      f"{size}\nseqio.PassThroughVocabulary.eos_id = 1"
    )


def built(path, *after, **more):
  """MODEL of a run, with a vocabulary that needs no file."""
  parse_run(path, *after, **more)
  use_a_vocabulary_without_a_file()
  return gin.query_parameter("MODEL/macro.value").scoped_configurable_fn()


@pytest.mark.parametrize("path", WHOLE, ids=lambda path: path.stem)
def test_a_run_says_what_must_be_set_and_builds_our_model(path):
  header = path.read_text().split("from __gin__")[0]
  assert [name for name in required(path) if name not in header] == []
  model = built(path)
  assert isinstance(model, models.EncoderDecoderModel)
  assert isinstance(model.config, network.T5Config)
  assert isinstance(model.rule, exits.DynamicExits)
  assert model.threshold == schedules.NEVER_EXIT
  assert isinstance(model.objective, objectives.LayerWeighted)


@pytest.mark.parametrize("size", SIZES, ids=lambda size: size[13:-4])
def test_every_network_of_t5x_is_taken_as_it_is(size):
  """T5, T5 1.1, mT5 and ByT5: sizes and tree are T5X's own."""
  from t5x.examples.t5 import network as t5x_network

  parse(size, "configs/runs/early_exit.gin", DROPOUT_RATE=0.1)
  theirs = gin.get_bindings(t5x_network.T5Config)
  use_a_vocabulary_without_a_file(theirs["vocab_size"])
  config = (
    gin.query_parameter("MODEL/macro.value").scoped_configurable_fn().config
  )
  assert {name: getattr(config, name) for name in theirs} == theirs
  assert not config.exit_classifier
  if (
    "/t5/t5_1_1/" in size
    and (name := size.split("/")[-1][:-4]) in NUM_PARAMETERS
  ):
    shapes = parameters.expected_shapes(config).values()
    assert sum(int(np.prod(shape)) for shape in shapes) == NUM_PARAMETERS[name]


def test_the_papers_runs_are_the_papers():
  for task, temperature in (
    ("cnn_dailymail", 4.0),
    ("wmt15_enfr", 4.0),
    ("squad", 0.0),
  ):
    gin.clear_config()
    model = built(CONFIGS / "runs" / f"paper_{task}.gin")
    assert (
      model.config.num_decoder_layers == 8 and model.config.dtype == "bfloat16"
    )
    assert model.config.dropout_rate == 0.1
    assert model.rule.schedule.temperature == temperature
    assert model._loss_normalizing_factor == 2048 * 114
    assert gin.query_parameter("BATCH_SIZE/macro.value") == 128


def test_exits_beside_frozen_weights_train_and_load_from_one_pair_of_lines():
  """After the paper's runs too; in decoding, tokens leave after the layers that
  have maps.
  """
  lines = {"EXIT_LAYERS": (1, 3)}
  model = built(
    CONFIGS / "runs" / "paper_squad.gin", "exit_translators", **lines
  )
  assert isinstance(model.objective, distillation.ExitMaps)
  gin.clear_config()
  reads = built(CONFIGS / "runs" / "infer.gin", "exit_maps", **lines)
  for config in (model.config, reads.config):
    assert config.exit_translators == config.exit_propagation == (1, 3)
    assert config.exit_propagation_rank == 16
  assert reads.rule.allowed == (1, 3)
  assert reads.rule.propagation == propagation.Learned()
  gin.clear_config()
  plain = built(
    CONFIGS / "runs" / "infer.gin", "exit_maps", EXIT_RANK=0, **lines
  ).config
  assert plain.exit_translators == (1, 3) and plain.exit_propagation == ()


def test_decoding_takes_the_papers_schedule():
  numbers = {
    "schedules.Decaying.temperature": 4.0,
    "schedules.Decaying.max_length": 512,
  }
  model = built(CONFIGS / "runs" / "infer.gin", "decaying", **numbers)
  assert model.rule.schedule == schedules.Decaying(4.0, 512)
  assert model.is_greedy and model.whole_decoder


@pytest.mark.parametrize("run", ["infer", "early_exit"])
def test_a_network_after_the_run_is_refused(run):
  """T5X's file sets MODEL again, to a model without exits."""
  path = CONFIGS / "runs" / f"{run}.gin"
  given = {name: "x" for name in required(path)} | {
    "DATA": "x",
    "DROPOUT_RATE": 0.0,
  }
  given |= {
    "TASK_FEATURE_LENGTHS": {"inputs": 8, "targets": 8},
    "TRAIN_STEPS": 3,
  }
  with pytest.raises(ValueError, match="T5X's network file before the run"):
    parse(str(path.relative_to(REPOSITORY)), SMALL, SYNOPSIS, **given)


# What users bind for T5X's own class holds for the model with exits, or is
# refused.
NETWORK_FILE = 'include "t5x/examples/t5/t5_1_1/small.gin"'
INFER_FILE = 'include "t5x/configs/runs/infer.gin"'
ONE_LINE = 'include "configs/runs/early_exit.gin"'
NETWORK_SIZES = """
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
  imports = [
    line for line in text.split("\n") if line.startswith(("import", "from"))
  ]
  others = [
    line for line in text.split("\n") if not line.startswith(("import", "from"))
  ]
  gin.clear_config()
  gin.parse_config("\n".join([*imports, *others]))
  return gin.query_parameter("MODEL/macro.value").scoped_configurable_fn()


def shapes_of(model):
  """(parameters' shapes, a batch)."""
  batch = setup.batch(engine.PROMPTS[:2], length=4)
  shapes = {name: x.shape for name, x in batch.items()}
  made = jax.eval_shape(
    lambda: model.get_initial_variables(jax.random.key(0), shapes)
  )
  return made["params"], batch


def test_one_line_honours_what_is_bound_for_t5x_class_and_its_method():
  ours = (
    "calm_models.EncoderDecoderModel.predict_batch_with_aux.num_decodes = 2"
  )
  lines = [
    NETWORK_FILE,
    THEIRS,
    "from t5x import decoding",
    "models.EncoderDecoderModel.predict_batch_with_aux.num_decodes = 4",
    "models.EncoderDecoderModel.predict_batch_with_aux.return_all_decodes = "
    "True",
    "models.EncoderDecoderModel.decode_fn = @decoding.temperature_sample",
    "decoding.temperature_sample.temperature = 0.5",
    "Z_LOSS = 0.25",
    ONE_LINE,
    "THRESHOLD = 0.4",
    NETWORK_SIZES,
  ]
  model = model_of(*lines)
  assert isinstance(model, models.EncoderDecoderModel)
  assert model.threshold == 0.4 and model.objective == objectives.LayerWeighted(
    z_loss=0.25
  )
  assert not model.whole_decoder and model.rule == exits.DynamicExits(
    confidence.Softmax()
  )
  params, batch = shapes_of(model)
  tokens, aux = jax.eval_shape(model.predict_batch_with_aux, params, batch)
  assert tokens.shape == (2, 4, 4) == aux["exit_layers"].shape
  assert aux["relative_cost"].shape == (2, 4)
  given = functools.partial(
    model.predict_batch_with_aux, return_all_decodes=False
  )
  assert jax.eval_shape(given, params, batch)[0].shape == (2, 4)
  # What is bound for our own method goes before it.
  model = model_of(*lines, IMPORTED, ours)
  assert jax.eval_shape(model.predict_batch_with_aux, params, batch)[
    0
  ].shape == (2, 2, 4)


MEASURED = (
  "from calm import exits",
  "from calm.exits import confidence",
  "exits.DynamicExits.measure = @confidence.Classifier()",
)


@pytest.mark.parametrize(
  ("lines", "said"),
  [
    (["TRESHOLD = 0.5"], "no exits, unless a call gives a threshold"),
    (
      [*MEASURED, "THRESHOLD = 0"],
      "exits: threshold 0, DynamicExits(measure=Classifier()",
    ),
  ],
)
def test_one_line_says_what_decodes(caplog, lines, said):
  model = model_of(NETWORK_FILE, INFER_FILE, ONE_LINE, *lines, NETWORK_SIZES)
  (line,) = [line for line in caplog.messages if "exits" in line]
  assert line.startswith(said)
  assert model.config.exit_classifier == ("Classifier" in said), (
    "where it is needed"
  )


@pytest.mark.parametrize("value", ["[0.5, 0.9]", "'0.5'"])
def test_a_threshold_that_is_no_number_is_refused(value):
  with pytest.raises(
    ValueError, match="Expected `threshold` to be a number, got "
  ):
    model_of(
      NETWORK_FILE, INFER_FILE, ONE_LINE, f"THRESHOLD = {value}", NETWORK_SIZES
    )


def test_what_would_be_ignored_is_refused():
  """A model of another class is not what T5X's class is bound to."""
  other = ("models.DecoderOnlyModel.module = @network.Transformer()", THEIRS)
  with pytest.raises(TypeError, match="Expected `module`, `input_vocabulary`"):
    model_of(INFER_FILE, ONE_LINE, *other, NETWORK_SIZES)
  with pytest.raises(ValueError, match="label_smoothing"):
    model_of(NETWORK_FILE, "LABEL_SMOOTHING = 0.1", ONE_LINE, NETWORK_SIZES)
