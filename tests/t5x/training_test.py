"""Stage two under T5X's trainer and optimizers, and its checkpoints in our own readers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calm import checkpoints
from calm.t5 import parameters
from calm.training import distillation, objectives
from tests import engine
from tests.t5x import setup

models = setup.import_models()
pytestmark = setup.MARKS
collect_orphans = setup.collect_orphans


def test_stage_two_of_t5x_moves_the_classifier_alone_bit_for_bit():
  """By T5X's own Adafactor over all parameters, whose axes of maps it knows too."""
  from t5x import adafactor, train_state, trainer

  toy, batch = engine.toy(**engine.MAPS), setup.training_batch(engine.toy())
  optimizer = adafactor.Adafactor(
    learning_rate=1e-2,
    multiply_by_parameter_scale=False,
    logical_factor_rules=adafactor.standard_logical_factor_rules(),
  )
  model = setup.model(
    toy,
    optimizer_def=optimizer,
    objective=objectives.ExitClassifier(),
    module=models.network.Transformer(toy.config),
  )
  shapes = {name: array.shape for name, array in batch.items()}
  variables = jax.eval_shape(lambda: model.get_initial_variables(jax.random.key(0), shapes))
  variables = dict(variables) | {"params": setup.params(toy)}
  state = train_state.FlaxOptimTrainState.create(optimizer, variables)

  def one(state, key):
    return trainer.train_with_lr(state, batch, jnp.float32(0.01), key, model, None)[0]

  step = jax.jit(one, compiler_options={"xla_backend_optimization_level": 0})
  for i in range(3):
    state = step(state, jax.random.key(i))
  before, after = map(parameters.flatten, (toy.params, jax.device_get(state.params)))
  changed = {path for path in before if not np.array_equal(before[path], after[path])}
  assert set(before) == set(after)
  assert changed == {"decoder/exit_classifier/kernel", "decoder/exit_classifier/bias"}


@pytest.mark.parametrize(("step", "maps"), [(0, {}), (7, engine.MAPS)])
def test_an_exported_checkpoint_is_ours_again_bit_for_bit(tmp_path, step, maps):
  toy = engine.toy(**maps)
  made = models.save_t5x_checkpoint(toy.params, toy.config, str(tmp_path), train_step=step)
  assert made == f"{tmp_path}/checkpoint_{step}"
  stored = checkpoints.load(made)
  assert stored.config == toy.config
  expected = parameters.flatten(toy.params)
  for path, leaf in parameters.flatten(stored.params).items():
    np.testing.assert_array_equal(leaf, expected[path])


def test_what_maps_learn_from_is_measured_of_layers_that_have_them():
  """The last layer's cross entropy with itself, the floor, stands beside."""
  toy, batch = engine.toy(), setup.training_batch(engine.toy())
  objective = distillation.ExitMaps()
  model = setup.model(toy, objective=objective, exit_maps=((2,), 3))
  params = parameters.add_exit_parts(setup.t5x_params(toy), model.config)
  loss, metrics = model.loss_fn(jax.tree.map(jnp.asarray, params), batch, None)
  values = {
    name: float(metric.compute()) for name, metric in metrics.items() if "/layer_" in name
  }
  kinds = ("accuracy", "loss", "agreement")
  names = {f"{kind}/layer_{layer}" for kind in kinds for layer in (2, 4)}
  assert values.keys() == names and np.isfinite([float(loss), *values.values()]).all()
  assert values["accuracy/layer_4"] == 1.0 > values["accuracy/layer_2"]
  assert values["loss/layer_2"] > values["loss/layer_4"] > 0.0
