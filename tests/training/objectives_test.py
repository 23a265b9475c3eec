"""What each training stage minimises and touches."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from calm import training
from calm.exits import confidence
from calm.t5 import caches, decoder, decoder_weights, network
from calm.training import distillation, losses, objectives, updates
from tests import toys

TOY = toys.Config(num_decoder_layers=3, num_encoder_layers=1)


def model_of(toy=TOY, dropout_rate=0.0):
  config = network.T5Config(
    **toys.network_fields(toy),
    dropout_rate=dropout_rate,
    one_hot_embedding=False,
  )
  params = jax.tree.map(jnp.asarray, toys.params(toy, seed=1, sharpness=1.0))
  return network.Transformer(config), params


def batch_of(seed=2, batch=4):
  def rows(seed, length):
    return jnp.asarray(
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
  state = updates.init_state(jax.tree.map(jnp.copy, params), config, objective)
  metrics = None
  with jax.numpy_dtype_promotion("standard"):  # optax's own code promotes
    for batch in batches:
      state, metrics = step(state, batch)
  return state, metrics


def loss_of(objective, module, params, batch, key=None):
  """(loss, metrics) in one compilation."""
  return jax.jit(lambda p, b, k: objective.loss(module, p, b, k))(
    params, batch, key
  )


NAMES = (
  "encoder_input_tokens",
  "decoder_input_tokens",
  "decoder_target_tokens",
)


def hidden_states(module, params, batch):
  """(the network at these parameters, every layer's states)."""
  bound = module.bind({"params": params})
  return bound, bound.hidden_states(*(batch[name] for name in NAMES))


def log_probabilities(module, params, batch):
  """[layers, batch, length, vocab] by the network's own heads."""
  bound, hidden = hidden_states(module, params, batch)
  logits = [
    bound.decoder.logits(hidden[i], i + 1) for i in range(hidden.shape[0])
  ]
  return jax.nn.log_softmax(jnp.stack(logits))


def likelihoods(found, batch):
  """Of every layer, the sum over tokens of its negative log-likelihood."""
  label = jnp.take_along_axis(
    found, batch["decoder_target_tokens"][None, ..., None], axis=-1
  )
  return -jnp.sum(
    label[..., 0] * batch["decoder_loss_weights"][None], axis=(1, 2)
  )


@pytest.mark.parametrize("options", [{}, {"logits_via_embedding": True}])
def test_stage_one_is_equation_6_over_the_networks_own_heads(options):
  module, params = model_of(dataclasses.replace(TOY, **options))
  batch = batch_of()
  loss, metrics = loss_of(
    objectives.LayerWeighted(z_loss=0.0), module, params, batch
  )
  expected = np.asarray(
    likelihoods(log_probabilities(module, params, batch), batch)
  )
  np.testing.assert_allclose(metrics.cross_entropy, expected, rtol=1e-4)
  np.testing.assert_allclose(
    loss, expected @ np.array([1, 2, 3]) / 6, rtol=1e-4
  )
  assert int(metrics.weight) == int((batch["decoder_target_tokens"] > 0).sum())


def test_sampled_layers_are_an_unbiased_estimate(monkeypatch):
  # The expectation over what may be drawn, each with its probability, is
  # computed exactly.
  module, params = model_of()
  batch = batch_of()
  weights = losses.layer_weights(3)
  sampled = objectives.LayerWeighted(sampled_layers=2)
  drawn = {}
  monkeypatch.setattr(jax.random, "choice", lambda *args, **kw: drawn["layers"])

  @jax.jit
  def loss_of_layers(layers):
    drawn["layers"] = layers
    return sampled.loss(module, params, batch, jax.random.key(0))[0]

  expectation = 0.0
  for pair in itertools.product(range(3), repeat=2):
    loss = loss_of_layers(jnp.array(pair))
    expectation += weights[pair[0]] * weights[pair[1]] * float(loss)
  everything, _ = loss_of(objectives.LayerWeighted(), module, params, batch)
  np.testing.assert_allclose(expectation, everything, rtol=1e-5)


PROBED = dataclasses.replace(TOY, exit_probes=True, exit_translators=(1, 2))
PROBES = objectives.ExitProbes(shortlist=toys.shortlist(PROBED))


def test_probes_read_what_inference_reads():
  module, params = model_of(PROBED)
  batch = batch_of()
  _, metrics = loss_of(PROBES, module, params, batch)
  _, hidden = hidden_states(module, params, batch)
  weights = decoder_weights.decoder_weights(
    params, module.config, None, PROBES.shortlist
  )
  no_prompt = caches.Encoded((), jnp.zeros((1, 1, 1)), jnp.zeros((1, 1)))
  step = decoder.DecoderStep(weights, module.config, no_prompt, (), ())
  flat = [np.asarray(d).reshape(-1, PROBED.emb_dim) for d in hidden]
  flat = [jnp.asarray(d) for d in flat]
  read = [step.read(layer, d) for layer, d in enumerate(flat, start=1)]
  tokens = np.stack([np.asarray(step.logits(x)).argmax(-1) for x in read])
  sure = [
    np.asarray(step.probe_logit(i + 1, x, flat[i], flat[i - 1]))
    for i, x in enumerate(read)
  ]
  assert (sure[-1] == confidence.CERTAIN).all()
  real = np.asarray(batch["decoder_loss_weights"]).ravel()
  agrees = tokens == tokens[-1]
  hits = ((np.stack(sure) > 0) == agrees) * real
  np.testing.assert_array_equal(metrics.correct, hits.sum(1))
  np.testing.assert_allclose(
    metrics.cross_entropy,
    ((np.logaddexp(0, sure) - agrees * np.stack(sure)) * real).sum(1),
    rtol=1e-4,
    atol=1e-4,
  )


GEOMETRIC = objectives.ExitClassifier(losses.geometric_classifier_loss)


@pytest.mark.parametrize(
  "objective", [GEOMETRIC, PROBES, objectives.LayerWeighted()]
)
def test_neither_gradient_nor_weight_decay_reaches_what_a_stage_freezes(
  objective,
):
  module, params = model_of(
    dataclasses.replace(TOY, exit_probes=True), dropout_rate=0.5
  )

  def optimizer(rate):
    return optax.adamw(rate, weight_decay=0.1)

  batches = [batch_of(seed) for seed in range(3)]
  schedule = training.Schedule(0.05, 1)
  state, _ = trained(
    objective, module, params, batches, schedule, optimizer=optimizer
  )
  after = traverse_util.flatten_dict(state.params)
  for path, before in traverse_util.flatten_dict(params).items():
    part = {"exit_classifier", "exit_probes"}.intersection(path)
    moved = np.any(np.asarray(after[path]) != np.asarray(before))
    assert bool(moved) == (part == {*objective.parts}), path


def test_a_batch_in_parts_makes_the_step_of_the_whole():
  module, params = model_of()
  batch = batch_of()
  rows = len(batch["decoder_loss_weights"])
  assert (
    rows % 2 == 0
    and np.ptp(np.asarray(batch["decoder_loss_weights"]).sum(1)) > 0
  )
  objective = objectives.LayerWeighted()

  def stepped(count):
    return trained(
      objective,
      module,
      params,
      [batch],
      training.Schedule(0.5, 0),
      num_microbatches=count,
    )

  (one, whole), (two, parted) = stepped(1), stepped(2)
  # The penalty is what is left of the loss: as exact as the loss's own
  # rounding.
  np.testing.assert_allclose(
    whole.z_loss, parted.z_loss, atol=1e-6 * float(whole.loss)
  )
  sums = [
    dataclasses.replace(metrics, z_loss=jnp.zeros(()))
    for metrics in (whole, parted)
  ]
  for a, b in zip(*map(jax.tree.leaves, sums), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5)
  moved = jax.tree.map(
    lambda a, b: float(jnp.abs(a - b).max()), one.params, params
  )
  assert max(jax.tree.leaves(moved)) > 1e-3
  for a, b in zip(
    jax.tree.leaves(one.params), jax.tree.leaves(two.params), strict=True
  ):
    np.testing.assert_allclose(a, b, atol=1e-5)
  with pytest.raises(
    ValueError, match=f"divide the {rows} rows of a batch, got {rows + 1}"
  ):
    stepped(rows + 1)


def plain_loss(module, params, batch, share):
  """The docstring's equation, word for word."""
  found = log_probabilities(module, params, batch)
  wanted = jax.lax.stop_gradient(found[-1:])
  apart = jnp.sum(jnp.exp(wanted) * (wanted - found[:-1]), axis=-1)
  apart = jnp.sum(jnp.mean(apart, axis=0) * batch["decoder_loss_weights"])
  return likelihoods(found, batch)[-1] + share * apart


@pytest.mark.parametrize("options", [{}, {"logits_via_embedding": True}])
def test_self_distillation_is_its_equation_in_value_and_gradients(options):
  module, params = model_of(dataclasses.replace(TOY, **options))
  batch = batch_of()
  objective = distillation.SelfDistilled(share=2.0, z_loss=0.0)
  ours = jax.jit(
    jax.value_and_grad(lambda p: objective.loss(module, p, batch, None)[0])
  )
  plain = jax.jit(
    jax.value_and_grad(lambda p: plain_loss(module, p, batch, 2.0))
  )
  (loss, gradient), (expected, wanted) = ours(params), plain(params)
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  assert (
    max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(wanted)) > 0.1
  )
  jax.tree.map(
    lambda got, want: np.testing.assert_allclose(
      got, want, rtol=1e-3, atol=1e-4
    ),
    gradient,
    wanted,
  )


MAPPED = dataclasses.replace(
  TOY,
  num_decoder_layers=4,
  exit_translators=(1, 2),
  exit_propagation=(1, 3),
  exit_propagation_rank=8,
)


def plain_maps_losses(module, params, batch):
  """The docstring's terms, word for word, without the full model's entropy."""
  found = log_probabilities(module, params, batch)
  weights = batch["decoder_loss_weights"]
  apart = jnp.sum(jnp.exp(found[-1:]) * (found[-1:] - found[:2]), axis=-1)
  bound, hidden = hidden_states(module, params, batch)
  x = bound.decoder.normed(hidden)

  def square(state):
    return jnp.sum(jnp.square(state) * weights[..., None])

  errors = []
  # from 3 no input is skipped that is not d^3 itself
  for j, k in ((1, 3), (1, 4)):
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

  def plain(p):
    return sum(plain_maps_losses(module, p, batch))

  def ours(p):
    return objective.loss(module, p, batch, jax.random.key(0))

  expected, wanted = jax.jit(jax.value_and_grad(plain))(params)
  (loss, metrics), gradient = jax.jit(jax.value_and_grad(ours, has_aux=True))(
    params
  )
  sure = log_probabilities(module, params, batch)[-1]
  weights = batch["decoder_loss_weights"]
  entropy = -jnp.sum(jnp.exp(sure) * sure * weights[..., None])
  np.testing.assert_allclose(loss, expected + entropy, rtol=1e-5)
  assert (np.asarray(metrics.layer_weight) > 0).tolist() == [
    True,
    True,
    False,
    True,
  ]
  np.testing.assert_allclose(metrics.cross_entropy[-1], entropy, rtol=1e-5)
  assert metrics.correct[-1] == metrics.weight > metrics.correct[0]
  trained, wanted = set(), traverse_util.flatten_dict(wanted)
  for path, leaf in traverse_util.flatten_dict(gradient).items():
    if objective.trains(path):
      np.testing.assert_allclose(
        leaf, wanted[path], rtol=1e-3, atol=1e-3, err_msg=str(path)
      )
    if np.any(leaf):
      trained.add(path[1:3])
  names = ("exit_translators", "layers_0"), ("exit_translators", "layers_1")
  classifier = {("exit_classifier", name) for name in ("kernel", "bias")}
  assert trained == {*names, ("exit_propagation", "layers_0"), *classifier}


def test_maps_of_no_layer_are_refused_by_name():
  module, params = model_of()
  with pytest.raises(
    ValueError, match=r"Expected `exit_translators` .* got no layers"
  ):
    distillation.ExitMaps().loss(module, params, batch_of(), None)
