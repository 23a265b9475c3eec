"""Defects of t5x/contrib/calm in training, one test each: ours passes, what was there fails.

Numbers are those of the survey that the migration table answers.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from calm.t5 import parameters
from calm.training import losses, objectives
from tests import engine
from tests.t5x import setup

L = 4


def test_19_the_classifier_has_a_parameter_a_feature_and_reads_the_normed_state():
  toy = engine.toy()
  shapes = parameters.expected_shapes(toy.config)
  sizes = {path: np.prod(shape) for path, shape in shapes.items() if "exit_class" in path}
  assert sum(sizes.values()) == toy.config.emb_dim + 1  # theirs: two classes, 2 emb_dim + 2
  hidden = jnp.asarray(np.random.default_rng(2).standard_normal((3, 16)), jnp.float32)

  def reads_the_normed_state(logit):
    np.testing.assert_allclose(logit(100.0 * hidden), logit(hidden), atol=1e-3)

  weights = toy.weights.decoder
  decoder = engine_step(toy, weights)
  reads_the_normed_state(lambda x: decoder.exit_logit(decoder.read(2, x)))
  assert setup.fails(
    reads_the_normed_state, lambda x: x @ weights.exit_kernel + weights.exit_bias
  )


def engine_step(toy, weights):
  from calm.t5 import attention, decoder

  table = attention.bias_table(weights, toy.config, engine.LENGTH)
  return decoder.DecoderStep(
    weights, toy.config, engine.encode(toy), table.at(jnp.array(0)), table.current
  )


def their_classifier_loss(exit_logits, predictions, token_weights):
  """Classes weighted by their shares, which an all-padding batch does not have."""
  agrees = (predictions[:-1] == predictions[-1:]).astype(jnp.float32)
  share = jnp.sum(agrees * token_weights) / (jnp.sum(token_weights) * agrees.shape[0])
  cost = jax.nn.softplus(exit_logits[:-1]) - agrees * exit_logits[:-1]
  return jnp.sum(cost * token_weights * jnp.where(agrees > 0, 1 - share, share))


def test_20_the_classifiers_loss_is_plain_and_finite_without_tokens():
  logits = jnp.asarray(np.random.default_rng(3).standard_normal((L, 2, 3)), jnp.float32)
  predictions = jnp.asarray(np.random.default_rng(4).integers(0, 2, (L, 2, 3)))

  def is_zero_without_tokens(loss):
    assert float(loss(logits, predictions, jnp.zeros((2, 3)))) == 0.0

  is_zero_without_tokens(losses.classifier_loss)
  assert setup.fails(is_zero_without_tokens, their_classifier_loss)
  # Neither z-loss nor label smoothing belongs to it: the objective has no such field.
  fields = {field.name for field in dataclasses.fields(objectives.ExitClassifier)}
  assert fields == {"objective"}


def largest(function, *arguments) -> int:
  """Elements of the largest array that a function makes, in all its sub-programs."""
  sizes = [0]

  def visit(jaxpr):
    for equation in jaxpr.eqns:
      sizes.extend(int(np.prod(v.aval.shape)) for v in equation.outvars)
      for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns")):
        inner = getattr(inner, "jaxpr", inner)
        if hasattr(inner, "eqns"):
          visit(inner)

  visit(jax.make_jaxpr(function)(*arguments).jaxpr)
  return max(sizes)


def test_22_no_array_holds_every_layers_logits():
  layers, tokens, emb, vocab = 6, 10, 4, 64
  normed, kernel = jnp.ones((layers, 1, tokens, emb)), jnp.ones((emb, vocab))
  targets, mask = jnp.ones((1, tokens), jnp.int32), jnp.ones((1, tokens))

  def ours(normed, kernel):
    weights = jnp.asarray(losses.layer_weights(layers))
    return losses.layer_cross_entropy(normed, kernel, targets, mask, weights)[0]

  def theirs(normed, kernel):
    return jnp.sum(jax.nn.logsumexp(normed @ kernel, axis=-1))

  stacked = layers * tokens * vocab
  assert largest(jax.grad(ours, argnums=(0, 1)), normed, kernel) < stacked
  assert largest(jax.grad(theirs, argnums=(0, 1)), normed, kernel) >= stacked
