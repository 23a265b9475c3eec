"""Wider MLPs of the same function."""

import dataclasses

import jax
import numpy as np
import pytest

from calm import checkpoints
from calm.t5 import network, parameters
from calm.training import objectives, run, updates
from tests.training import samples


def states(module, params, batch):
  return objectives.normed_states(module, params, batch, None)


def test_every_layers_states_are_those_of_the_narrower_model():
  module, params = samples.model_of()
  config, batch = module.config, samples.batch_of()
  grown, wider = parameters.wider(params, config, 3 * config.mlp_dim)
  parameters.check(grown, wider)
  assert dataclasses.replace(wider, mlp_dim=config.mlp_dim) == config
  made = states(network.Transformer(wider), grown, batch)
  np.testing.assert_allclose(made, states(module, params, batch), rtol=1e-5, atol=1e-5)


def test_wider_mlps_begin_as_the_checkpoint_and_a_line_says_so(tmp_path, caplog):
  config = network.T5Config(
    vocab_size=8, emb_dim=4, num_heads=1, head_dim=4, mlp_dim=4, num_encoder_layers=1,
    num_decoder_layers=2, exit_classifier=True,
  )  # fmt: skip
  params = jax.tree.map(np.asarray, updates.init_params(config, 0))
  checkpoints.save(tmp_path, params, config)
  wider = dataclasses.replace(config, mlp_dim=6)
  model, grown, _ = run.starting_point(wider, str(tmp_path), 0)
  assert "4 units each to 6" in caplog.text and model.mlp_dim == 6
  kernel = grown["decoder"]["layers_1"]["mlp"]["wo"]["kernel"]
  np.testing.assert_array_equal(
    kernel[:4], params["decoder"]["layers_1"]["mlp"]["wo"]["kernel"]
  )
  np.testing.assert_array_equal(kernel[4:], 0.0)
  with pytest.raises(ValueError, match="shape"):
    run.starting_point(dataclasses.replace(config, mlp_dim=3), str(tmp_path), 0)
