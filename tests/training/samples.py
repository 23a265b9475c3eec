"""A small model and a batch for what training minimises."""

import jax
import jax.numpy as jnp

from calm import training
from calm.t5 import network
from calm.training import updates
from tests import toys

TOY = toys.Config(num_decoder_layers=3, num_encoder_layers=1)


def model_of(toy=TOY, dropout_rate=0.0):
  config = network.T5Config(
    **toys.network_fields(toy), dropout_rate=dropout_rate, one_hot_embedding=False
  )
  params = jax.tree.map(jnp.asarray, toys.params(toy, seed=1, sharpness=1.0))
  return network.Transformer(config), params


def batch_of(seed=2, batch=4):
  rows = lambda seed, length: jnp.asarray(
    toys.prompts(seed, batch=batch, length=length, num_pieces=TOY.num_pieces)
  )
  targets = rows(seed + 1, 6)
  return {
    "encoder_input_tokens": rows(seed, 7),
    "decoder_input_tokens": jnp.pad(targets[:, :-1], ((0, 0), (1, 0))),
    "decoder_target_tokens": targets,
    "decoder_loss_weights": (targets > 0).astype(jnp.float32),
  }


def trained(objective, module, params, batches, schedule=None, **options):
  """(the state after a step on every batch, the last step's metrics)."""
  schedule = schedule or training.Schedule(3e-2, 4)
  config = training.TrainConfig(len(batches), schedule, **options)
  step = updates.make_train_step(module, config, objective, params)
  state, metrics = updates.init_state(jax.tree.map(jnp.copy, params), config, objective), None
  with jax.numpy_dtype_promotion("standard"):  # optax's own code promotes
    for batch in batches:
      state, metrics = step(state, batch)
  return state, metrics
