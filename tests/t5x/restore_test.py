"""What the gin files restore, through T5X's own utilities: as `t5x/train.py`
starts a run.
"""

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calm.t5 import parameters
from tests import engine
from tests.t5x import configs_test, setup

models = setup.import_models()
pytestmark = setup.ORBAX
gin_of_t5x = configs_test.gin_of_t5x

import gin

TOY = dict(num_encoder_layers=1, num_decoder_layers=2)
CLASSIFIER = {"decoder/exit_classifier/kernel", "decoder/exit_classifier/bias"}
# T5X's own run and the one line, or ours, which has both.
THEIRS = ("t5x/configs/runs/finetune.gin", "configs/runs/early_exit.gin")
OURS = ("configs/runs/finetune.gin",)
INFER = ("t5x/configs/runs/infer.gin", "configs/runs/early_exit.gin")
STAGE_TWO, READ_MAPS = (
  f"configs/runs/{x}.gin" for x in ("exit_classifier", "exit_maps")
)
MEASURED = {"exits.DynamicExits.measure": "@confidence.Classifier()"}
MAPS = {"EXIT_LAYERS": "(1,)", "EXIT_RANK": "3"}


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
    return trainer.train_with_lr(
      state, batch, jnp.float32(0.01), key, model, None
    )[0]

  step = setup.compiled(one)
  for i in range(steps):
    state = step(state, jax.random.PRNGKey(i))
  return state


def saved(model, state, folder, layout: str) -> str:
  """The folder of a checkpoint that T5X has written, in its own format or
  Orbax's.
  """
  from t5x import checkpoints

  folder.mkdir(parents=True, exist_ok=True)
  initializer = initializer_of(model)
  arguments = (initializer.global_train_state_shape, initializer._partitioner)
  if layout == "legacy":
    checkpoints.Checkpointer(*arguments, str(folder)).save(state)
  else:
    manager = checkpoints.OrbaxCheckpointManagerInterface(
      str(folder), *arguments
    )
    manager.save(state)
    manager.close()
  return str(folder / f"checkpoint_{int(state.step)}")


def started(files, path: str, lines=None, resumes=None) -> tuple[Any, Any]:
  """Model and first state of T5X's network file in a toy's sizes, and a run's
  files after it; `resumes` is a MODEL_DIR that has checkpoints, from which
  `t5x/train.py` goes on.
  """
  from t5x import utils

  gin.clear_config()
  sizes = engine.toy(**TOY).config
  names = (
    "vocab_size",
    "emb_dim",
    "num_heads",
    "head_dim",
    "mlp_dim",
    "dropout_rate",
  )
  names += ("num_encoder_layers", "num_decoder_layers", "mlp_activations")
  words = "seqio.PassThroughVocabulary"
  given = {
    f"network.T5Config.{name}": repr(getattr(sizes, name)) for name in names
  }
  given |= {"network.T5Config.dtype": "'float32'", "VOCABULARY": f"@{words}()"}
  given |= {f"{words}.size": "40", f"{words}.eos_id": "1"}
  is_infer = "infer" in files[0]
  given["CHECKPOINT_PATH" if is_infer else "INITIAL_CHECKPOINT_PATH"] = repr(
    path
  )
  text = [
    *(
      "from __gin__ import dynamic_registration",
      "import seqio",
      "from calm import exits",
    ),
    *(
      "from calm.exits import confidence",
      "from t5x.examples.t5 import network",
    ),
    *(f'include "{file}"' for file in (configs_test.SMALL, *files)),
    *(f"{name} = {value}" for name, value in (given | (lines or {})).items()),
  ]
  gin.parse_config("\n".join(text))
  model = gin.query_parameter("MODEL/macro.value").scoped_configurable_fn()
  config = gin.get_configurable(utils.RestoreCheckpointConfig)()
  if is_infer:  # as infer.py does
    config.strict = False
  if resumes is not None:
    functions = config.state_transformation_fns
    resuming = [
      functools.partial(function, is_resuming=True) for function in functions
    ]
    config = utils.RestoreCheckpointConfig(
      str(resumes),
      mode="latest",
      dtype="float32",
      state_transformation_fns=resuming,
    )
    config, (path,) = utils.get_first_valid_restore_config_and_paths([config])
  initializer = initializer_of(model, not is_infer)
  given = initializer, initializer._partitioner, config, path
  key = None if is_infer else jax.random.PRNGKey(0)
  return model, utils.create_checkpoint_manager_and_restore(
    *given, key, use_orbax=True
  )[0]


def leaves(tree) -> dict[str, np.ndarray]:
  return parameters.flatten(jax.device_get(tree))


def assert_equal_leaves(got, expected):
  assert got.keys() == expected.keys()
  for path, leaf in expected.items():
    np.testing.assert_array_equal(got[path], leaf, err_msg=path)


def state_leaves(state) -> dict[str, Any]:
  """Optimizer state by path."""
  return leaves(state.state_dict()["state"]["param_states"])


def two_steps(model) -> tuple[Any, Any]:
  """A model and its state after two steps of Adafactor."""
  return model, trained(
    model, initializer_of(model).from_scratch(jax.random.PRNGKey(7)), 2
  )


@functools.cache
def of_t5x() -> tuple[Any, Any]:
  """T5X's own model of a toy's sizes, which has no classifier."""
  return two_steps(setup.t5x_model(engine.toy(**TOY)))


@functools.cache
def after_stage_one() -> tuple[Any, Any]:
  """Ours, with a classifier beside that nothing trained."""
  toy = engine.toy(**TOY)
  return two_steps(
    setup.model(toy, module=models.network.Transformer(toy.config))
  )


@pytest.mark.parametrize(
  ("files", "layout"),
  [(OURS, "orbax"), (THEIRS, "legacy"), (INFER, "orbax")],
  ids=["ours", "theirs", "infer"],
)
def test_checkpoints_restore_as_they_are(tmp_path, files, layout):
  """T5X's own, and ours, whose classifier stays where it is if nothing reads
  it.
  """
  for name, (model, expected) in {
    "theirs": of_t5x(),
    "ours": after_stage_one(),
  }.items():
    path = saved(model, expected, tmp_path / name, layout)
    _, state = started(files, path)
    assert int(state.step) == 2
    dtype = jnp.bfloat16 if files is INFER else jnp.float32
    before = {
      k: jnp.asarray(x, dtype) for k, x in leaves(expected.params).items()
    }
    without = {k: x for k, x in before.items() if k not in CLASSIFIER}
    assert_equal_leaves(leaves(state.params), without)
    if files is not INFER and name == "theirs":
      kept = state_leaves(expected)
      assert_equal_leaves(state_leaves(state), kept)
      assert any(np.any(leaf) for leaf in kept.values())


def test_parts_that_the_checkpoint_lacks_are_named(tmp_path):
  path = saved(*of_t5x(), tmp_path, "orbax")
  with pytest.raises(
    ValueError, match=r"to hold decoder/exit_classifier/.* got none; train"
  ):
    started(THEIRS, path, MEASURED)
  with pytest.raises(
    ValueError, match=r"hold decoder/exit_translators/layers_0 and .* train"
  ):
    started((*INFER, READ_MAPS), path, MAPS)


def test_stage_two_moves_the_classifier_alone_and_resumes_exactly(
  tmp_path,
):
  """Bit for bit."""
  files, (before_model, expected) = (*OURS, STAGE_TWO), after_stage_one()
  path = saved(before_model, expected, tmp_path / "one", "legacy")
  model, state = started(files, path)
  before = leaves(state.params)
  theirs = leaves(expected.params)
  assert_equal_leaves({name: before[name] for name in theirs}, theirs)
  assert any(np.any(leaf) for leaf in state_leaves(expected).values())
  assert not any(np.any(leaf) for leaf in state_leaves(state).values()), (
    "it starts fresh"
  )
  middle = trained(model, state, 3)
  after = leaves(middle.params)
  assert {
    name for name in before if np.any(before[name] != after[name])
  } == CLASSIFIER
  saved(model, middle, tmp_path / "two", "legacy")
  whole = trained(model, middle, 2)
  _, again = started(files, path, resumes=tmp_path / "two")
  for got, same in ((again, middle), (trained(model, again, 2), whole)):
    assert int(got.step) == int(same.step)
    assert_equal_leaves(leaves(got.params), leaves(same.params))
    assert_equal_leaves(state_leaves(got), state_leaves(same))


def of_contrib_calm() -> tuple[Any, Any]:
  """`t5x/contrib/calm`'s model over Flaxformer's network, from its own gin
  file.
  """
  name = "flaxformer.architectures.calm_t5.calm_architecture"
  pytest.importorskip(
    name, reason="needs flaxformer and aqtp", exc_type=ImportError
  )
  import flaxformer
  from t5x.contrib.calm import models as their_models

  sizes = engine.toy(**TOY).config
  words = setup.vocabulary(40)
  given = {
    "NUM_ENCODER_LAYERS": sizes.num_encoder_layers,
    "NUM_HEADS": sizes.num_heads,
  }
  given |= {
    "NUM_DECODER_LAYERS": sizes.num_decoder_layers,
    "HEAD_DIM": sizes.head_dim,
  }
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
  model, state = started(THEIRS, saved(theirs, expected, tmp_path, "legacy"))
  assert isinstance(model, models.EncoderDecoderModel)
  assert_equal_leaves(leaves(state.params), leaves(expected.params))
