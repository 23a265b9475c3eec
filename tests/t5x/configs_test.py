"""Every gin file for T5X's scripts parses, finalises, and builds the model that it says."""

import re
import sys
import types

import pytest

from calm import exits
from calm.exits import propagation, schedules
from calm.t5 import network
from calm.training import distillation, objectives
from tests import configs_test
from tests.t5x import setup

models = setup.import_models()
pytestmark = setup.MARKS

import gin

REPOSITORY, CONFIGS = configs_test.REPOSITORY, configs_test.CONFIGS
RUNS = [path for path in sorted((CONFIGS / "runs").glob("*.gin")) if configs_test.of_t5x(path)]
# Files that others include; they are parsed with those.
PARTS = (
  *("local.gin", "paper.gin", "early_exit.gin", "t5x_model.gin", "t5x_stored_model.gin"),
  *("exit_classifier.gin", "exit_maps.gin", "exit_translators.gin", "calibrated.gin"),
)
WHOLE = [path for path in RUNS if path.name not in PARTS]


def forget(module: str) -> None:
  """Takes a module's configurables out of gin's registry, as in a process that is new.

  T5X's small.gin says `network.T5Config` without an import, and tests bind that name: gin must
  know but one of it.
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
  main.train, main.infer, main.evaluate = train.train, infer.infer, t5x_eval.evaluate
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


def parse(*names, **given):
  files = [str(CONFIGS / name) for name in names]
  gin.parse_config_files_and_bindings(files, [f"{k} = {v!r}" for k, v in given.items()])


def required(path):
  """What the included T5X file, or ours, leaves open."""
  whole = configs_test.text_of(path)
  for name in re.findall(r'^include "(t5x/.+)"$', whole, re.MULTILINE):
    whole = (setup.t5x_root() / name).read_text() + whole
  open_ones = set(re.findall(r"^(\w+) = %gin.REQUIRED", whole, re.MULTILINE))
  bound = set(re.findall(r"^(\w+) = (?!%gin.REQUIRED)", whole, re.MULTILINE))
  return open_ones - bound - {"MIXTURE_OR_TASK_NAME", "TASK_FEATURE_LENGTHS"}


def parse_run(path, *after, size="tiny", **more):
  """A run with a network and a task beside it, as its header says, and files after it."""
  names = [f"runs/{path.name}"]
  text = configs_test.text_of(path)
  if "network.Transformer.config = " not in text:
    names = [f"models/{size}.gin", *names]
  if "tasks." not in text:
    names += ["tasks/debian_synopsis.gin"]
  names += [f"runs/{name}.gin" for name in after]
  given = {name: "x" for name in required(path)}
  parse(*names, **{"DATA": "x", **given, "TRAIN_STEPS": 3, **more})


@pytest.mark.parametrize("path", WHOLE, ids=lambda path: path.stem)
def test_parses_finalises_and_says_what_must_be_set(path):
  text = path.read_text()
  assert text.startswith("#")
  for name in required(path):
    assert name in text.split("from __gin__")[0], f"{name} must be set, the header is silent"
  parse_run(path)
  assert gin.config_str()


def use_a_vocabulary_without_a_file():
  with gin.unlock_config():
    gin.parse_config(
      "from __gin__ import dynamic_registration\nimport seqio\n"
      "VOCABULARY = @seqio.PassThroughVocabulary()\n"
      "seqio.PassThroughVocabulary.size = 32128\nseqio.PassThroughVocabulary.eos_id = 1"
    )


def built(path, *after, **more):
  """MODEL of a run, with a vocabulary that needs no file."""
  parse_run(path, *after, **more)
  use_a_vocabulary_without_a_file()
  return gin.query_parameter("MODEL/macro.value").scoped_configurable_fn()


@pytest.mark.parametrize("path", WHOLE, ids=lambda path: path.stem)
def test_builds_our_model(path):
  model = built(path)
  assert isinstance(model, models.EncoderDecoderModel)
  assert isinstance(model.config, network.T5Config)
  assert isinstance(model.rule, exits.DynamicExits)
  assert model.threshold == schedules.NEVER_EXIT
  assert not isinstance(model.objective, objectives.ExitClassifier)


@pytest.mark.parametrize(("size", "layers"), [("small", 8), ("base", 12)])
def test_the_papers_runs_are_the_papers(size, layers):
  for task, temperature in (("cnn_dailymail", 4.0), ("wmt15_enfr", 4.0), ("squad", 0.0)):
    gin.clear_config()
    model = built(CONFIGS / "runs" / f"paper_{task}.gin", size=size)
    assert model.config.num_decoder_layers == layers and model.config.dtype == "bfloat16"
    assert model.rule.schedule.temperature == temperature
    assert model._loss_normalizing_factor == 2048 * 114
    assert gin.query_parameter("BATCH_SIZE/macro.value") == 128


def test_the_papers_second_stage_keeps_what_its_first_was_set_to():
  path = CONFIGS / "runs" / "paper_squad.gin"
  model = built(path, "exit_classifier")
  assert isinstance(model.objective, objectives.ExitClassifier)
  assert [type(o).__name__ for o in model.optimizer_def.sub_optimizers] == ["Adafactor"]
  assert model._loss_normalizing_factor == 2048 * 114 and model.config.dtype == "bfloat16"
  assert gin.query_parameter("BATCH_SIZE/macro.value") == 128


def test_exits_beside_frozen_weights_are_trained_and_read_from_one_pair_of_lines():
  """After the paper's runs too; in decoding, tokens leave after the layers that have maps."""
  path, lines = CONFIGS / "runs" / "paper_squad.gin", {"EXIT_LAYERS": (1, 3)}
  model = built(path, "exit_translators", **lines)
  assert isinstance(model.objective, distillation.ExitMaps) and model.objective.classifier
  assert [type(o).__name__ for o in model.optimizer_def.sub_optimizers] == ["Adafactor"]
  assert model._loss_normalizing_factor == 2048 * 114
  gin.clear_config()
  reads = built(CONFIGS / "runs" / "infer.gin", "exit_maps", **lines)
  for config in (model.config, reads.config):
    assert config.exit_translators == config.exit_propagation == (1, 3)
    assert config.exit_propagation_rank == 16
  assert reads.rule.allowed == (1, 3)
  assert reads.rule.propagation == propagation.Learned()
  gin.clear_config()
  plain = built(CONFIGS / "runs" / "infer.gin", "exit_maps", EXIT_RANK=0, **lines).config
  assert plain.exit_translators == (1, 3) and plain.exit_propagation == ()


@pytest.mark.parametrize("run", ["infer", "eval", "sweep"])
def test_decoding_takes_the_papers_schedule(run):
  path = CONFIGS / "runs" / f"{run}.gin"
  numbers = {"schedules.Decaying.temperature": 4.0, "schedules.Decaying.max_length": 512}
  given = {name: "x" for name in required(path)} | {"DATA": "x"} | numbers
  names = ("models/small.gin", f"runs/{run}.gin", "tasks/debian_synopsis.gin")
  parse(*names, "runs/decaying.gin", **given)
  use_a_vocabulary_without_a_file()
  model = gin.query_parameter("MODEL/macro.value").scoped_configurable_fn()
  assert model.rule.schedule == schedules.Decaying(4.0, 512)


@pytest.mark.parametrize("name", ["small", "base", "large"])
def test_networks_are_t5x_own(name):
  """Sizes and activation dtype, as T5X's files of the same names bind them."""
  from t5x.examples.t5 import network as t5x_network

  gin.parse_config(
    "from __gin__ import dynamic_registration\n"
    f'include "t5x/examples/t5/t5_1_1/{name}.gin"\nDROPOUT_RATE = 0.1'
  )
  theirs = gin.get_bindings(t5x_network.T5Config)
  gin.clear_config()
  parse(f"models/{name}.gin")
  ours = gin.get_bindings(network.T5Config)
  assert theirs.items() <= ours.items()
  assert set(ours) - set(theirs) == {"one_hot_embedding", "exit_classifier"}


def test_a_run_that_goes_on_reads_other_batches():
  parse_run(CONFIGS / "runs" / "local_debian.gin")
  assert gin.query_parameter("train/utils.DatasetConfig.seed") is None
