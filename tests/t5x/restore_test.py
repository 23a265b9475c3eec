"""What the gin files restore, through T5X's own utilities: as `t5x/train.py` starts a run."""

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calm.t5 import parameters
from calm.training import objectives
from tests import engine
from tests.t5x import configs_test, setup

models = setup.import_models()
pytestmark = setup.MARKS
collect_orphans = setup.collect_orphans
gin_of_t5x = configs_test.gin_of_t5x

import gin

TOY = dict(num_encoder_layers=1, num_decoder_layers=2)
CLASSIFIER = {"decoder/exit_classifier/kernel", "decoder/exit_classifier/bias"}
FORMATS = ("legacy", "orbax")


@pytest.fixture(autouse=True)
def quick_compilation():
  """Toys compile for long and compute in no time."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


def initializer_of(model, optimizer: bool = True) -> Any:
  from t5x import partitioning, utils

  batch = setup.training_batch(engine.toy(**TOY))
  shapes = {name: array.shape for name, array in batch.items()}
  return utils.TrainStateInitializer(
    model.optimizer_def if optimizer else None,
    model.get_initial_variables,
    shapes,
    partitioning.PjitPartitioner(num_partitions=1),
  )


def trained(model, state, steps: int) -> Any:
  """T5X's own training steps."""
  from t5x import trainer

  batch = setup.training_batch(engine.toy(**TOY))

  def one(state, key):
    return trainer.train_with_lr(state, batch, jnp.float32(0.01), key, model, None)[0]

  step = jax.jit(one, compiler_options={"xla_backend_optimization_level": 0})
  for i in range(steps):
    state = step(state, jax.random.PRNGKey(i))
  return state


def saved(model, state, folder, layout: str) -> str:
  """The folder of a checkpoint that T5X has written, in its own format or Orbax's."""
  from t5x import checkpoints

  initializer = initializer_of(model)
  arguments = (initializer.global_train_state_shape, initializer._partitioner)
  if layout == "legacy":
    checkpoints.Checkpointer(*arguments, str(folder)).save(state)
  else:
    manager = checkpoints.OrbaxCheckpointManagerInterface(str(folder), *arguments)
    manager.save(state)
    manager.close()
  return str(folder / f"checkpoint_{int(state.step)}")


def started(run: str, path: str, *after: str, **bindings) -> tuple[Any, Any]:
  """The model of a gin file and the state that a run of it starts from."""
  from t5x import utils

  given = {"MODEL_DIR": "x", "INITIAL_CHECKPOINT_PATH": path, "TRAIN_STEPS": 9, "DATA": "x"}
  names = ("models/tiny.gin", run, "tasks/debian_synopsis.gin", *after)
  configs_test.parse(*names, **given)
  configs_test.use_a_vocabulary_without_a_file()
  with gin.unlock_config():
    for name, value in (toy_sizes() | bindings).items():
      gin.bind_parameter(name, value)
  model = gin.query_parameter("MODEL/macro.value").scoped_configurable_fn()
  config = gin.get_configurable(utils.RestoreCheckpointConfig)()
  initializer = initializer_of(model)
  state, _ = utils.create_checkpoint_manager_and_restore(
    initializer,
    initializer._partitioner,
    config,
    path,
    jax.random.PRNGKey(0),
    use_orbax=True,
  )
  return model, state


def started_stage_two(path: str, **bindings) -> tuple[Any, Any]:
  return started("runs/finetune.gin", path, "runs/exit_classifier.gin", **bindings)


def toy_sizes() -> dict[str, Any]:
  sizes = engine.toy(**TOY).config
  names = ("vocab_size", "emb_dim", "num_heads", "head_dim", "mlp_dim", "dropout_rate")
  names += ("num_encoder_layers", "num_decoder_layers", "mlp_activations")
  return {f"network.T5Config.{name}": getattr(sizes, name) for name in names}


def leaves(tree) -> dict[str, np.ndarray]:
  return parameters.flatten(jax.device_get(tree))


def assert_equal_leaves(got, expected):
  assert got.keys() == expected.keys()
  for path, leaf in expected.items():
    np.testing.assert_array_equal(got[path], leaf, err_msg=path)


def state_leaves(state) -> dict[str, Any]:
  """Optimizer state by path; what no optimizer looks after has none."""
  states = state.state_dict()["state"]["param_states"]
  return {path: leaf for path, leaf in leaves(states).items() if leaf is not None}


def two_steps(model) -> tuple[Any, Any]:
  """A model and its state after two steps of Adafactor."""
  return model, trained(model, initializer_of(model).from_scratch(jax.random.PRNGKey(7)), 2)


@functools.cache
def of_t5x() -> tuple[Any, Any]:
  """T5X's own model of a toy's sizes, which has no classifier."""
  return two_steps(setup.t5x_model(engine.toy(**TOY)))


@functools.cache
def after_stage_one() -> tuple[Any, Any]:
  toy = engine.toy(**TOY)
  return two_steps(setup.model(toy, module=models.network.Transformer(toy.config)))


@pytest.mark.parametrize("layout", FORMATS)
def test_t5x_own_checkpoint_restores_and_the_exit_parts_start_fresh(tmp_path, layout):
  theirs, expected = of_t5x()
  path = saved(theirs, expected, tmp_path, layout)
  _, state = started("runs/finetune.gin", path)
  assert int(state.step) == 2
  params, before = leaves(state.params), leaves(expected.params)
  assert set(params) - set(before) == CLASSIFIER
  assert not any(np.any(params.pop(path)) for path in CLASSIFIER)
  assert_equal_leaves(params, before)
  optimizer, kept = state_leaves(state), state_leaves(expected)
  added = {path for path in optimizer if "exit_classifier" in path}
  assert added and not any(np.any(optimizer.pop(path)) for path in added)
  assert_equal_leaves(optimizer, kept)
  assert any(np.any(leaf) for leaf in kept.values())


def test_without_the_transformation_that_checkpoint_is_refused(tmp_path):
  path = saved(*of_t5x(), tmp_path, "legacy")
  with pytest.raises(ValueError, match="exit_classifier"):
    started(
      "runs/finetune.gin",
      path,
      **{
        "utils.RestoreCheckpointConfig.fallback_to_scratch": False,
        "utils.RestoreCheckpointConfig.state_transformation_fns": (),
      },
    )


@pytest.mark.parametrize("layout", FORMATS)
def test_stage_two_restores_the_target_alone_and_freezes_it_bit_for_bit(tmp_path, layout):
  stage_one, expected = after_stage_one()
  path = saved(stage_one, expected, tmp_path, layout)
  decay = {"adafactor.Adafactor.weight_decay_rate": 0.1}
  model, state = started_stage_two(path, **decay)
  assert isinstance(model.objective, objectives.ExitClassifier)
  assert model.optimizer_def.sub_optimizers[0].hyper_params.weight_decay_rate == 0.1
  before = leaves(state.params)
  assert_equal_leaves(before, leaves(expected.params))
  assert any(np.any(leaf) for leaf in state_leaves(expected).values())
  optimizer = state_leaves(state)
  assert optimizer and all("exit_classifier" in path for path in optimizer)
  assert not any(np.any(leaf) for leaf in optimizer.values()), "its state starts fresh"
  after = leaves(trained(model, state, 3).params)
  assert {
    path for path in before if not np.array_equal(before[path], after[path])
  } == CLASSIFIER


MAPS = "EXIT_LAYERS = (1,)\nEXIT_RANK = 3"


def resumed(model, folder) -> Any:
  """The state from which `t5x/train.py` goes on in a MODEL_DIR that has checkpoints."""
  from t5x import utils

  given = gin.get_configurable(utils.RestoreCheckpointConfig)()
  transformations = [
    functools.partial(function, is_resuming=True) for function in given.state_transformation_fns
  ]
  config = utils.RestoreCheckpointConfig(
    str(folder), mode="latest", dtype="float32", state_transformation_fns=transformations
  )
  config, (path,) = utils.get_first_valid_restore_config_and_paths([config])
  initializer = initializer_of(model)
  state, _ = utils.create_checkpoint_manager_and_restore(
    initializer,
    initializer._partitioner,
    config,
    path,
    jax.random.PRNGKey(1),
    use_orbax=True,
  )
  return state


def of_maps(path: str, *more: str) -> tuple[Any, Any]:
  """Of T5X's finetune.gin and exit_translators.gin."""
  lines = "\n".join([MAPS, *more])
  return of_t5x_files(path, "finetune", "exit_translators", bindings=lines)


@pytest.mark.parametrize("start", [started_stage_two, of_maps])
@pytest.mark.parametrize("layout", FORMATS)
def test_stage_two_stops_and_goes_on_as_if_it_had_not(tmp_path, layout, start):
  for name in ("one", "two"):
    (tmp_path / name).mkdir()
  path = saved(*after_stage_one(), tmp_path / "one", layout)
  model, state = start(path)
  middle = trained(model, state, 2)
  whole = trained(model, middle, 2)
  stopped = saved(model, middle, tmp_path / "two", layout)
  assert any(np.any(leaf) for leaf in state_leaves(middle).values())
  again = resumed(model, tmp_path / "two")
  for after, expected in ((again, middle), (trained(model, again, 2), whole)):
    assert int(after.step) == int(expected.step)
    assert_equal_leaves(leaves(after.params), leaves(expected.params))
    assert_equal_leaves(state_leaves(after), state_leaves(expected))
  # In a MODEL_DIR of its own that starts from there, the optimizer alone starts fresh.
  plain = functools.partial(started, "runs/finetune.gin")
  for begin in (start, plain) if start is not of_maps else (start,):
    gin.clear_config()
    _, elsewhere = begin(stopped)
    assert int(elsewhere.step) == 4
    assert_equal_leaves(leaves(elsewhere.params), leaves(middle.params))
    assert not any(np.any(leaf) for leaf in state_leaves(elsewhere).values())


def of_t5x_files(
  path: str, run: str, *after: str, bindings: str = "", dtype: str | None = None
) -> tuple[Any, Any]:
  """Model and first state of T5X's small.gin and one of its runs, with the documented line."""
  from t5x import utils

  lines = ["from __gin__ import dynamic_registration", "import seqio"]
  lines += ["from calm import exits", "from calm.exits import confidence"]
  lines += ["from t5x.examples.t5 import network"]
  lines += ['include "t5x/examples/t5/t5_1_1/small.gin"']
  lines += [f'include "t5x/configs/runs/{run}.gin"', 'include "configs/runs/early_exit.gin"']
  lines += [f'include "configs/runs/{name}.gin"' for name in after]
  lines += [f"{name} = {value!r}" for name, value in toy_sizes().items()]
  lines += ["VOCABULARY = @seqio.PassThroughVocabulary()", "network.T5Config.dtype = 'float32'"]
  lines += ["seqio.PassThroughVocabulary.size = 40", "seqio.PassThroughVocabulary.eos_id = 1"]
  name = "CHECKPOINT_PATH" if run == "infer" else "INITIAL_CHECKPOINT_PATH"
  gin.parse_config("\n".join([*lines, f"{name} = {path!r}", bindings]))
  model = gin.query_parameter("MODEL/macro.value").scoped_configurable_fn()
  config = gin.get_configurable(utils.RestoreCheckpointConfig)()
  if run == "infer":  # as infer.py does
    config.strict = False
    config.dtype = dtype or config.dtype
  initializer = initializer_of(model, optimizer=run != "infer")
  state, _ = utils.create_checkpoint_manager_and_restore(
    initializer,
    initializer._partitioner,
    config,
    path,
    None if run == "infer" else jax.random.PRNGKey(0),
    use_orbax=True,
  )
  return model, state


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("run", ["infer", "finetune"])
def test_a_classifier_that_the_checkpoint_lacks_is_named(tmp_path, run, layout):
  measured = "exits.DynamicExits.measure = @confidence.Classifier()"
  path = saved(*of_t5x(), tmp_path, layout)
  with pytest.raises(ValueError, match=r"to hold decoder/exit_classifier, .* got none; train"):
    of_t5x_files(path, run, bindings=measured)


@pytest.mark.parametrize("layout", FORMATS)
def test_exits_learn_beside_t5x_own_checkpoint_and_inference_reads_them(tmp_path, layout):
  """The base stays bit for bit, weight decay or not; without the lines a warning is all."""
  for name in ("theirs", "maps"):
    (tmp_path / name).mkdir()
  decay = "from t5x import adafactor\nadafactor.Adafactor.weight_decay_rate = 0.1"
  model, state = of_maps(saved(*of_t5x(), tmp_path / "theirs", layout), decay)
  before, theirs = leaves(state.params), leaves(of_t5x()[1].params)
  assert_equal_leaves({path: before[path] for path in theirs}, theirs)
  learned = trained(model, state, 3)
  after = leaves(learned.params)
  names = {path.removeprefix("decoder/") for path in before.keys() - theirs.keys()}
  maps = {f"exit_translators/layers_0/{name}" for name in ("kernel", "bias")}
  maps |= {f"exit_propagation/layers_0/{name}" for name in ("down/kernel", "down/bias")}
  classifier = {path.removeprefix("decoder/") for path in CLASSIFIER}
  up = "exit_propagation/layers_0/up/kernel"
  assert names == maps | classifier | {up}
  # From layer 1 of 2 no input is skipped that is to be predicted: the decay alone moves those.
  assert {n for n in names if np.any(after[f"decoder/{n}"] != before[f"decoder/{n}"])} == (
    names - {up, "exit_propagation/layers_0/down/bias"}
  )
  assert_equal_leaves({path: after[path] for path in theirs}, theirs)
  path = saved(model, learned, tmp_path / "maps", layout)
  gin.clear_config()
  measured = "exits.DynamicExits.measure = @confidence.Classifier()"
  reads, restored = of_t5x_files(
    path, "infer", "exit_maps", bindings=f"{MAPS}\n{measured}", dtype="float32"
  )
  assert_equal_leaves(leaves(restored.params), after)
  assert reads.rule.propagation.name == "learned" and reads.rule.allowed == (1,)


@pytest.mark.parametrize("layout", FORMATS)
def test_maps_that_a_checkpoint_lacks_or_brings_unread_are_named(tmp_path, caplog, layout):
  path = saved(*of_t5x(), tmp_path, layout)
  with pytest.raises(ValueError, match=r"hold decoder/exit_translators/layers_0 and .* train"):
    of_t5x_files(path, "infer", "exit_maps", bindings=MAPS)
  gin.clear_config()
  model, state = of_maps(path)
  (tmp_path / "maps").mkdir()
  path = saved(model, state, tmp_path / "maps", layout)
  gin.clear_config()
  of_t5x_files(path, "infer")
  assert "decoder/exit_propagation/layers_0 are not read" in caplog.text


def of_contrib_calm() -> tuple[Any, Any]:
  """`t5x/contrib/calm`'s model over Flaxformer's network, from its own gin file."""
  name = "flaxformer.architectures.calm_t5.calm_architecture"
  pytest.importorskip(name, reason="needs flaxformer and aqtp", exc_type=ImportError)
  import flaxformer
  from t5x.contrib.calm import models as their_models

  sizes, words = engine.toy(**TOY).config, setup.vocabulary(40)
  given = {"NUM_ENCODER_LAYERS": sizes.num_encoder_layers, "NUM_HEADS": sizes.num_heads}
  given |= {"NUM_DECODER_LAYERS": sizes.num_decoder_layers, "HEAD_DIM": sizes.head_dim}
  given |= {"EMBED_DIM": sizes.emb_dim, "MLP_DIM": sizes.mlp_dim}
  given |= {"NUM_EMBEDDINGS": sizes.vocab_size, "ACTIVATION_DTYPE": "float32"}
  given |= {"RETURN_ALL_LOGITS": False, "FIRST_EXIT": 0, "EXIT_INTERVAL": 1}
  root = pathlib.Path(flaxformer.__file__).parents[1]
  path = "flaxformer/t5x/configs/calm/architectures/calm_t5_1_1_flaxformer.gin"
  gin.clear_config()
  gin.parse_config_files_and_bindings(
    [str(root / path)], [f"{name} = {value!r}" for name, value in given.items()]
  )
  module = gin.query_parameter("%ARCHITECTURE").scoped_configurable_fn()
  optimizer = setup.t5x_model(engine.toy(**TOY)).optimizer_def
  model = their_models.EncoderDecoderModel(module, words, words, optimizer)
  return model, initializer_of(model).from_scratch(jax.random.PRNGKey(3))


def test_checkpoints_of_contrib_calm_restore_as_they_are(tmp_path):
  theirs, expected = of_contrib_calm()
  path = saved(theirs, expected, tmp_path, "legacy")
  gin.clear_config()
  model, state = of_t5x_files(path, "finetune")
  assert isinstance(model, models.EncoderDecoderModel)
  assert_equal_leaves(leaves(state.params), leaves(expected.params))


@pytest.mark.parametrize(("run", "layout"), [("finetune", "legacy"), ("infer", "orbax")])
def test_t5x_own_files_restore_with_nothing_but_the_documented_line(tmp_path, run, layout):
  for name, (model, expected) in {"theirs": of_t5x(), "ours": after_stage_one()}.items():
    gin.clear_config()
    (tmp_path / name).mkdir()
    path = saved(model, expected, tmp_path / name, layout)
    _, state = of_t5x_files(path, run)
    dtype = jnp.bfloat16 if run == "infer" else jnp.float32
    before = {k: jnp.asarray(x, dtype) for k, x in leaves(expected.params).items()}
    # A classifier that nothing measures stays where it is.
    without = {k: x for k, x in before.items() if k not in CLASSIFIER}
    assert_equal_leaves(leaves(state.params), without)
    assert int(state.step) == 2


def test_stage_two_after_the_documented_line_trains_a_fresh_classifier(tmp_path):
  path = saved(*of_t5x(), tmp_path, "legacy")
  model, state = of_t5x_files(path, "finetune", "exit_classifier")
  before = leaves(state.params)
  assert set(before) - set(leaves(of_t5x()[1].params)) == CLASSIFIER
  after = leaves(trained(model, state, 3).params)
  assert {k for k in before if not np.array_equal(before[k], after[k])} == CLASSIFIER
