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


def with_decay(**more):
  from t5x import adafactor

  return adafactor.Adafactor(
    learning_rate=1e-2, weight_decay_rate=0.1, multiply_by_parameter_scale=False, **more
  )


def after_steps(optimizer, steps=3, toy=None, **more) -> dict[str, np.ndarray]:
  """Parameters by path after T5X's own training step of stage two."""
  from t5x import train_state, trainer

  toy, batch = toy or engine.toy(), setup.training_batch(engine.toy())
  stage_two = objectives.ExitClassifier()
  model = setup.model(toy, optimizer_def=optimizer, objective=stage_two, z_loss=1e-3, **more)
  shapes = {name: array.shape for name, array in batch.items()}
  variables = jax.eval_shape(lambda: model.get_initial_variables(jax.random.key(0), shapes))
  variables = dict(variables) | {"params": setup.params(toy)}
  state = train_state.FlaxOptimTrainState.create(optimizer, variables)

  def one(state, key):
    return trainer.train_with_lr(state, batch, jnp.float32(0.01), key, model, None)[0]

  step = jax.jit(one, compiler_options={"xla_backend_optimization_level": 0})
  for i in range(steps):
    state = step(state, jax.random.key(i))
  return parameters.flatten(jax.device_get(state.params))


def test_only_the_classifier_changes_bit_for_bit_weight_decay_or_not():
  before = parameters.flatten(engine.toy().params)
  changed = lambda after: {p for p in before if not np.array_equal(before[p], after[p])}
  ours = changed(after_steps(models.exit_classifier_optimizer(with_decay())))
  assert ours == {"decoder/exit_classifier/kernel", "decoder/exit_classifier/bias"}
  # Meta: frozen gradients alone do not freeze, the decay moves everything.
  assert len(changed(after_steps(with_decay()))) > len(before) / 2


def test_its_adafactor_knows_the_axes_of_maps():
  from t5x import adafactor

  toy = engine.toy(**engine.MAPS)
  before = parameters.flatten(toy.params)
  module = models.network.Transformer(toy.config)
  optimizer = with_decay(logical_factor_rules=adafactor.standard_logical_factor_rules())
  after = after_steps(optimizer, steps=1, toy=toy, module=module)
  maps = {path for path in before if "exit_translators" in path or "exit_propagation" in path}
  assert len(maps) == 3 * (2 + 3) and set(before) == set(after)
  # The decay moves them.
  assert all(not np.array_equal(before[path], after[path]) for path in maps)


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
  objective = distillation.ExitMaps(classifier=False)
  model = setup.model(toy, objective=objective, exit_maps=((2,), 3))
  params = parameters.add_exit_parts(setup.t5x_params(toy), model.config)
  loss, metrics = model.loss_fn(jax.tree.map(jnp.asarray, params), batch, None)
  values = {
    name: float(metric.compute()) for name, metric in metrics.items() if "/layer_" in name
  }
  names = {f"{kind}/layer_{layer}" for kind in ("accuracy", "loss") for layer in (2, 4)}
  assert values.keys() == names and np.isfinite([float(loss), *values.values()]).all()
  assert values["accuracy/layer_4"] == 1.0 > values["accuracy/layer_2"]
  assert values["loss/layer_2"] > values["loss/layer_4"] > 0.0
