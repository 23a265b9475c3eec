"""Eq. 6 and the exit-classifier losses against naive loops, and without their
memory.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calm.training import losses

LAYERS = 3
BATCH = 2
LENGTH = 5
EMB = 7
VOCAB = 11
Z_LOSS = 0.01


def draw(seed=0):
  rng = np.random.default_rng(seed)

  def normal(*shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)

  token_weights = np.ones((BATCH, LENGTH), np.float32)
  token_weights[1, 3:] = 0.0
  return {
    "normed": normal(LAYERS, BATCH, LENGTH, EMB),
    "kernel": normal(EMB, VOCAB),
    "targets": jnp.asarray(rng.integers(0, VOCAB, (BATCH, LENGTH)), jnp.int32),
    "token_weights": jnp.asarray(token_weights),
    "weights": jnp.asarray(losses.layer_weights(LAYERS)),
  }


def naive(normed, kernel, targets, token_weights, weights, z_loss):
  """The same loss with all logits at once and JAX's own gradients."""
  logits = normed @ kernel
  log_z = jax.nn.logsumexp(logits, axis=-1)
  terms = log_z - labels_of(logits, targets) + z_loss * log_z**2
  return jnp.sum(weights[:, None, None] * terms * token_weights[None])


def labels_of(logits, targets):
  is_label = jax.nn.one_hot(targets, VOCAB)
  return jnp.sum(logits * is_label[None], axis=-1)


def ours(normed, kernel, rest, z_loss=Z_LOSS):
  return losses.layer_cross_entropy(
    normed,
    kernel,
    rest["targets"],
    rest["token_weights"],
    rest["weights"],
    z_loss,
  )


def gradients_of(function, data):
  return jax.jit(jax.grad(function, argnums=(0, 1)))(
    data["normed"], data["kernel"]
  )


@pytest.mark.parametrize("z_loss", [0.0, Z_LOSS])
def test_layer_cross_entropy_is_the_naive_one_in_value_and_gradients(z_loss):
  data = draw()
  value, metrics = ours(data["normed"], data["kernel"], data, z_loss)

  def expected(n, k):
    return naive(
      n, k, data["targets"], data["token_weights"], data["weights"], z_loss
    )

  np.testing.assert_allclose(
    value, expected(data["normed"], data["kernel"]), rtol=1e-5
  )
  log_probabilities = jax.nn.log_softmax(data["normed"] @ data["kernel"])
  label = np.asarray(labels_of(log_probabilities, data["targets"]))
  real = np.asarray(data["token_weights"])
  targets = np.asarray(data["targets"])
  np.testing.assert_allclose(
    metrics.cross_entropy, -(label * real).sum((1, 2)), rtol=1e-5
  )
  hits = np.asarray(log_probabilities).argmax(-1) == targets
  np.testing.assert_array_equal(metrics.correct, (hits * real).sum((1, 2)))
  got = gradients_of(lambda n, k: 3.0 * ours(n, k, data, z_loss)[0], data)
  for left, right in zip(got, gradients_of(expected, data), strict=True):
    np.testing.assert_allclose(left, 3.0 * right, rtol=2e-4, atol=1e-5)


def buffer_sizes(jaxpr):
  """Element counts of every value in a jaxpr and the jaxprs inside it."""
  for equation in jaxpr.eqns:
    yield from (np.prod(v.aval.shape, dtype=int) for v in equation.outvars)
    for parameter in jax.tree.leaves(
      list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
    ):
      inner = getattr(parameter, "jaxpr", parameter)
      if hasattr(inner, "eqns"):
        yield from buffer_sizes(inner)


def test_logits_of_all_layers_never_exist_at_once():
  data = draw()
  rest = (data["targets"], data["token_weights"], data["weights"])
  all_logits = LAYERS * BATCH * LENGTH * VOCAB

  def function(n, k):
    return losses.layer_cross_entropy(n, k, *rest, Z_LOSS)[0]

  largest = {}
  for name, loss in {
    "ours": function,
    "naive": lambda n, k: naive(n, k, *rest, Z_LOSS),
  }.items():
    grad = jax.grad(loss, argnums=(0, 1))
    largest[name] = max(
      buffer_sizes(jax.make_jaxpr(grad)(data["normed"], data["kernel"]).jaxpr)
    )
  assert largest["ours"] < all_logits
  # the search does find them where they are
  assert largest["naive"] >= all_logits
  predictions = jax.make_jaxpr(losses.layer_predictions)(
    data["normed"], data["kernel"]
  )
  assert max(buffer_sizes(predictions.jaxpr)) < all_logits


def test_gradients_have_the_dtype_of_bfloat16_activations():
  arguments = draw()
  arguments["normed"] = arguments["normed"].astype(jnp.bfloat16)

  def loss(normed, kernel):
    return losses.layer_cross_entropy(
      **(arguments | {"normed": normed, "kernel": kernel})
    )[0]

  grads = jax.grad(lambda x, k: loss(2 * x, k), argnums=(0, 1))(
    arguments["normed"], arguments["kernel"]
  )
  assert [grad.dtype for grad in grads] == [jnp.bfloat16, jnp.float32]


def test_weights_are_those_of_equation_6():
  np.testing.assert_allclose(
    losses.layer_weights(4), [0.1, 0.2, 0.3, 0.4], rtol=1e-6
  )
  np.testing.assert_allclose(losses.layer_weights(8).sum(), 1.0, rtol=1e-6)
  np.testing.assert_array_equal(losses.last_layer_weights(3), [0, 0, 1])
  np.testing.assert_array_equal(losses.equal_weights(4), [0.25] * 4)


def naive_geometric(exit_logits, predictions, token_weights):
  total = 0.0
  for row, time in np.ndindex(*token_weights.shape):
    stay = 1.0
    layers_here = []
    for layer in range(len(predictions) - 1):
      q = 1 / (1 + np.exp(-exit_logits[layer, row, time]))
      layers_here.append(stay * q)
      stay *= 1 - q
    layers_here.append(stay)
    column = list(predictions[:, row, time])
    oracle = column.index(column[-1])
    total -= token_weights[row, time] * np.log(layers_here[oracle])
  return total


def naive_classifier(exit_logits, predictions, token_weights):
  total = 0.0
  below = len(predictions) - 1
  for layer, row, time in np.ndindex(below, *token_weights.shape):
    p = 1 / (1 + np.exp(-exit_logits[layer, row, time]))
    agrees = predictions[layer, row, time] == predictions[-1, row, time]
    total -= token_weights[row, time] * np.log(p if agrees else 1 - p) / below
  return total


@pytest.mark.parametrize(
  ("function", "loops"),
  [
    (losses.classifier_loss, naive_classifier),
    (losses.geometric_classifier_loss, naive_geometric),
  ],
)
def test_classifier_losses_are_those_of_naive_loops_and_ignore_padding(
  function, loops
):
  rng = np.random.default_rng(0)
  exit_logits = rng.standard_normal((4, BATCH, LENGTH)).astype(np.float32)
  predictions = rng.integers(0, 3, (4, BATCH, LENGTH))
  token_weights = np.array(draw()["token_weights"])

  def call():
    return function(
      *map(jnp.asarray, (exit_logits, predictions, token_weights))
    )

  value = call()
  np.testing.assert_allclose(
    value, loops(exit_logits, predictions, token_weights), rtol=1e-5
  )
  padded = token_weights == 0
  exit_logits[:, padded] = 50.0
  predictions[:, padded] = 9
  np.testing.assert_allclose(call(), value, rtol=1e-6)
