"""Early layers that learn the last one's probabilities."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from calm.training import distillation
from tests.training.samples import TOY, batch_of, model_of


def log_probabilities(module, params, batch):
  """[layers, batch, length, vocab] by the network's own heads."""
  bound = module.bind({"params": params})
  names = ("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens")
  hidden = bound.hidden_states(*(batch[name] for name in names))
  logits = [bound.decoder.logits(hidden[i], i + 1) for i in range(hidden.shape[0])]
  return jax.nn.log_softmax(jnp.stack(logits))


def plain_loss(module, params, batch, share):
  """The docstring's equation, word for word."""
  found = log_probabilities(module, params, batch)
  weights, targets = batch["decoder_loss_weights"], batch["decoder_target_tokens"]
  label = jnp.take_along_axis(found[-1], targets[..., None], axis=-1)[..., 0]
  wanted = jax.lax.stop_gradient(found[-1:])
  apart = jnp.sum(jnp.exp(wanted) * (wanted - found[:-1]), axis=-1)
  return -jnp.sum(label * weights) + share * jnp.sum(jnp.mean(apart, axis=0) * weights)


@pytest.mark.parametrize("options", [{}, {"logits_via_embedding": True}])
def test_loss_and_gradients_are_those_of_the_equation(options):
  module, params = model_of(dataclasses.replace(TOY, **options))
  batch = batch_of()
  objective = distillation.SelfDistilled(share=2.0, z_loss=0.0)
  ours = jax.jit(jax.value_and_grad(lambda p: objective.loss(module, p, batch, None)[0]))
  plain = jax.jit(jax.value_and_grad(lambda p: plain_loss(module, p, batch, 2.0)))
  (loss, gradient), (expected, wanted) = ours(params), plain(params)
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(wanted)) > 0.1
  jax.tree.map(
    lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4),
    gradient,
    wanted,
  )


MAPPED = dataclasses.replace(
  TOY, num_decoder_layers=4, exit_translators=(1, 2), exit_propagation=(1, 3),
  exit_propagation_rank=8,
)  # fmt: skip


def plain_maps_losses(module, params, batch):
  """The docstring's terms, word for word, without the full model's entropy."""
  found, weights = log_probabilities(module, params, batch), batch["decoder_loss_weights"]
  apart = jnp.sum(jnp.exp(found[-1:]) * (found[-1:] - found[:2]), axis=-1)
  bound = module.bind({"params": params})
  names = ("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens")
  hidden = bound.hidden_states(*(batch[name] for name in names))
  x = bound.decoder.normed(hidden)
  square = lambda state: jnp.sum(jnp.square(state) * weights[..., None])
  errors = []
  for j, k in ((1, 3), (1, 4)):  # from 3 no input is skipped that is not d^3 itself
    part = params["decoder"]["exit_propagation"][f"layers_{j - 1}"]
    code = x[j - 1] @ part["down"]["kernel"] + part["down"]["bias"][None, None]
    predicted = hidden[j - 1] + code @ part["up"]["kernel"][k - j - 1]
    errors.append(square(predicted - hidden[k - 2]) / square(hidden[k - 2]))
  part = params["decoder"]["exit_classifier"]
  read = jax.lax.stop_gradient(bound.decoder.read(hidden))
  told = (read @ part["kernel"])[..., 0] + part["bias"][0]
  agrees = jnp.argmax(found, -1) == jnp.argmax(found[-1:], -1)
  sure = jnp.where(agrees, jax.nn.softplus(-told), jax.nn.softplus(told))[:-1]
  return (
    jnp.sum(jnp.mean(apart, axis=0) * weights),
    sum(errors) / 2 * jnp.sum(weights),
    jnp.sum(jnp.mean(sure, axis=0) * weights),
  )


def test_maps_minimise_the_equation_and_no_gradient_reaches_the_base():
  module, params = model_of(MAPPED, dropout_rate=0.5)
  batch = batch_of()
  objective = distillation.ExitMaps()
  plain = lambda p: sum(plain_maps_losses(module, p, batch))
  ours = lambda p: objective.loss(module, p, batch, jax.random.key(0))
  expected, wanted = jax.jit(jax.value_and_grad(plain))(params)
  (loss, metrics), gradient = jax.jit(jax.value_and_grad(ours, has_aux=True))(params)
  sure = log_probabilities(module, params, batch)[-1]
  weights = batch["decoder_loss_weights"]
  entropy = -jnp.sum(jnp.exp(sure) * sure * weights[..., None])
  np.testing.assert_allclose(loss, expected + entropy, rtol=1e-5)
  assert (np.asarray(metrics.layer_weight) > 0).tolist() == [True, True, False, True]
  np.testing.assert_allclose(metrics.cross_entropy[-1], entropy, rtol=1e-5)
  assert metrics.correct[-1] == metrics.weight > metrics.correct[0]
  trained, wanted = set(), traverse_util.flatten_dict(wanted)
  for path, leaf in traverse_util.flatten_dict(gradient).items():
    if objective.trains(path):
      np.testing.assert_allclose(leaf, wanted[path], rtol=1e-3, atol=1e-3, err_msg=str(path))
    if np.any(leaf):
      trained.add(path[1:3])
  names = ("exit_translators", "layers_0"), ("exit_translators", "layers_1")
  classifier = {("exit_classifier", name) for name in ("kernel", "bias")}
  assert trained == {*names, ("exit_propagation", "layers_0"), *classifier}


def test_maps_of_no_layer_are_refused_by_name():
  module, params = model_of()
  with pytest.raises(ValueError, match=r"Expected `exit_translators` .* got no layers"):
    distillation.ExitMaps().loss(module, params, batch_of(), None)
