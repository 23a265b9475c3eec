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
from calm.t5 import caches, decoder, decoder_weights
from calm.training import losses, objectives
from tests import toys
from tests.training.samples import batch_of, model_of, trained


def loss_of(objective, module, params, batch, key=None):
  """(loss, metrics) in one compilation."""
  return jax.jit(lambda p, b, k: objective.loss(module, p, b, k))(params, batch, key)


def hidden_states(module, params, batch):
  """(the network at these parameters, every layer's states)."""
  bound = module.bind({"params": params})
  names = ("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens")
  return bound, bound.hidden_states(*(batch[name] for name in names))


def layer_losses(module, params, batch):
  """Mean NLL of each layer by the network's own logits, one layer at a time."""
  bound, hidden = hidden_states(module, params, batch)
  weights, targets = np.asarray(batch["decoder_loss_weights"]), batch["decoder_target_tokens"]
  values = []
  for layer, state in enumerate(hidden, start=1):
    logits = jax.nn.log_softmax(bound.decoder.logits(state, layer))
    picked = np.take_along_axis(np.asarray(logits), np.asarray(targets)[..., None], -1)
    values.append(-float((picked[..., 0] * weights).sum()))
  return np.array(values)


@pytest.mark.parametrize("options", [{}, {"logits_via_embedding": True}])
def test_stage_one_is_equation_6_over_the_networks_own_heads(options):
  toy = toys.Config(num_decoder_layers=3, num_encoder_layers=1, **options)
  module, params = model_of(toy)
  batch = batch_of()
  loss, metrics = loss_of(objectives.LayerWeighted(z_loss=0.0), module, params, batch)
  expected = layer_losses(module, params, batch)
  np.testing.assert_allclose(metrics.cross_entropy, expected, rtol=1e-4)
  np.testing.assert_allclose(loss, expected @ np.array([1, 2, 3]) / 6, rtol=1e-4)
  assert int(metrics.weight) == int((batch["decoder_target_tokens"] > 0).sum())


def test_sampled_layers_are_an_unbiased_estimate(monkeypatch):
  # The expectation over what may be drawn, each with its probability, is computed exactly.
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


PROBED = toys.Config(
  num_decoder_layers=3, num_encoder_layers=1, exit_probes=True, exit_translators=(1, 2)
)
PROBES = objectives.ExitProbes(shortlist=toys.shortlist(PROBED))


@pytest.mark.parametrize(
  "objective",
  [
    objectives.ExitClassifier(losses.classifier_loss),
    objectives.ExitClassifier(losses.geometric_classifier_loss),
    PROBES,
  ],
)
def test_gradients_of_stage_two_are_exactly_zero_outside_its_part(objective):
  module, params = model_of(PROBED, dropout_rate=0.5)
  loss = lambda p: objective.loss(module, p, batch_of(), jax.random.key(0))[0]
  gradients = traverse_util.flatten_dict(jax.jit(jax.grad(loss))(params))
  for path, gradient in gradients.items():
    assert bool(jnp.any(gradient != 0)) == (objective.parts[0] in path), path


def test_probes_read_what_inference_reads():
  module, params = model_of(PROBED)
  batch = batch_of()
  _, metrics = loss_of(PROBES, module, params, batch)
  _, hidden = hidden_states(module, params, batch)
  weights = decoder_weights.decoder_weights(params, module.config, None, PROBES.shortlist)
  no_prompt = caches.Encoded((), jnp.zeros((1, 1, 1)))
  step = decoder.DecoderStep(weights, module.config, no_prompt, (), ())
  flat = [np.asarray(d).reshape(-1, PROBED.emb_dim) for d in hidden]
  flat = [jnp.asarray(d) for d in flat]
  read = [step.read(layer, d) for layer, d in enumerate(flat, start=1)]
  tokens = np.stack([np.asarray(step.logits(x)).argmax(-1) for x in read])
  sure = [
    np.asarray(step.probe_logit(i + 1, x, flat[i], flat[i - 1])) for i, x in enumerate(read)
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


@pytest.mark.parametrize(
  ("objective", "classifier_moves"),
  [(objectives.ExitClassifier(), True), (objectives.LayerWeighted(), False)],
)
def test_weight_decay_never_reaches_what_a_stage_freezes(objective, classifier_moves):
  module, params = model_of()
  optimizer = lambda rate: optax.adamw(rate, weight_decay=0.1)
  batches, schedule = [batch_of(seed) for seed in range(3)], training.Schedule(0.05, 1)
  state, _ = trained(objective, module, params, batches, schedule, optimizer=optimizer)
  after = traverse_util.flatten_dict(state.params)
  for path, before in traverse_util.flatten_dict(params).items():
    if ("exit_classifier" in path) != classifier_moves:
      np.testing.assert_array_equal(after[path], before, err_msg=str(path))
    else:
      assert np.any(np.asarray(after[path]) != np.asarray(before)), path


def test_a_batch_in_parts_makes_the_step_of_the_whole():
  module, params = model_of()
  batch = batch_of()
  rows = len(batch["decoder_loss_weights"])
  assert rows % 2 == 0 and np.ptp(np.asarray(batch["decoder_loss_weights"]).sum(1)) > 0
  objective = objectives.LayerWeighted()

  stepped = lambda count: trained(
    objective, module, params, [batch], training.Schedule(0.5, 0), num_microbatches=count
  )
  (one, whole), (two, parted) = stepped(1), stepped(2)
  # The penalty is what is left of the loss: as exact as the loss's own rounding.
  np.testing.assert_allclose(whole.z_loss, parted.z_loss, atol=1e-6 * float(whole.loss))
  sums = [dataclasses.replace(metrics, z_loss=jnp.zeros(())) for metrics in (whole, parted)]
  for a, b in zip(*map(jax.tree.leaves, sums), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5)
  moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), one.params, params)
  assert max(jax.tree.leaves(moved)) > 1e-3
  for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(two.params), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)
  with pytest.raises(ValueError, match=f"divide the {rows} rows of a batch, got {rows + 1}"):
    stepped(rows + 1)


def test_stage_two_reads_what_inference_reads():
  module, params = model_of()
  batch = batch_of()
  _, metrics = loss_of(objectives.ExitClassifier(), module, params, batch)
  bound, hidden = hidden_states(module, params, batch)
  logits = [np.asarray(bound.decoder.logits(h, i + 1)).argmax(-1) for i, h in enumerate(hidden)]
  real = np.asarray(batch["decoder_loss_weights"])
  part, read = params["decoder"]["exit_classifier"], np.asarray(bound.decoder.read(hidden))
  exits = (read @ np.asarray(part["kernel"]))[..., 0] + np.asarray(part["bias"]) > 0
  hits = (exits == (np.stack(logits) == logits[-1])) * real
  np.testing.assert_array_equal(metrics.correct, hits.sum((1, 2)))
