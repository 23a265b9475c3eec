"""Defects of t5x/contrib/calm, one test each: ours passes, and what was there fails.

Numbers are those of the survey that the migration table answers. Items 10 (the full model as
baseline), 13 (beams) and 23 (a recompilation a threshold) need T5X's loops and are held by
`models_test`; item 12 (gin files that do not parse) by `t5x_configs_test`.
"""

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calm import confidence, exits, losses, objectives, propagation, schedules, t5x_loops
from tests import engine

RULE = exits.DynamicExits(confidence.Softmax())
L = 4


def fails(check, *arguments) -> bool:
  try:
    check(*arguments)
  except (AssertionError, TypeError, ValueError):
    return True
  return False


def agrees_with_the_yardstick(rule, threshold, yardstick=None):
  """Tokens, exits and caches, against the numpy decoder's reading of the paper."""
  toy = engine.toy()
  state = engine.run(toy, rule, threshold)
  rows = engine.reference_rows(toy, yardstick or rule, threshold)
  assert len(engine.agreeing_rows(rows, state.generation)) == len(rows)


def test_1_the_state_of_the_layer_left_is_propagated():
  agrees_with_the_yardstick(RULE, 0.6)
  first = dataclasses.replace(RULE, propagation=propagation.FirstState())
  assert fails(agrees_with_the_yardstick, first, 0.6, RULE)


def test_2_the_threshold_decays_along_the_sequence():
  rows = t5x_loops.make_rows(
    engine.encode(engine.toy()), jnp.zeros((8, engine.LENGTH), jnp.int32), 0.5, 1
  )

  def decays(rows):
    schedule = t5x_loops.AfterPrefix(engine.DECAYING, rows)
    values = [float(schedule(jnp.float32(0.5), i)[0]) for i in range(engine.LENGTH)]
    assert np.all(np.diff(values) < 0)

  decays(rows)
  assert fails(decays, dataclasses.replace(rows, generated=jnp.zeros_like(rows.generated)))


def test_3_the_schedule_is_equation_5():
  def is_equation_5(schedule):
    assert float(schedule(jnp.float32(0.5), 0)) == pytest.approx(0.55)
    assert float(schedule(jnp.float32(0.5), 8)) == pytest.approx(0.45 + 0.1 * np.exp(-4.0))

  is_equation_5(schedules.Decaying(4.0, 8))
  assert fails(is_equation_5, lambda lam, t: 0.9 * lam + 0.1 * lam * jnp.exp(-4.0 * t / 8))


def test_4_padding_touches_no_hidden_feature_of_a_real_token():
  rng = np.random.default_rng(0)
  normed = rng.standard_normal((L, 3, 5, 6)).astype(np.float32)
  mask = (np.arange(5)[None] < np.array([[5], [3], [2]])).astype(np.float32)
  per_feature = mask[..., None]

  def keeps_real_features(scale):
    np.testing.assert_array_equal((normed * scale)[:, mask > 0], normed[:, mask > 0])

  keeps_real_features(per_feature)
  assert fails(keeps_real_features, np.resize(per_feature, normed.shape))
  # Ours masks weights of the loss alone: whatever padding holds, nothing changes.
  kernel = rng.standard_normal((6, 9)).astype(np.float32)
  targets, weights = np.ones((3, 5), np.int32), jnp.asarray(losses.layer_weights(L))
  loss = lambda x: losses.layer_cross_entropy(
    jnp.asarray(x), jnp.asarray(kernel), jnp.asarray(targets), jnp.asarray(mask), weights
  )[0]
  noise = rng.standard_normal(normed.shape) * (1 - per_feature)
  assert float(loss(normed)) == float(loss((normed + noise).astype(np.float32)))


def their_cosine(a, b):
  return jnp.inner(b, a) / (jnp.linalg.norm(b) * jnp.linalg.norm(a))


def test_5_the_cosine_is_a_rows_own_and_in_range():
  rng = np.random.default_rng(1)
  a, b = jnp.asarray(rng.standard_normal((2, 5, 6)), jnp.float32)

  def is_by_row(cosine):
    got = cosine(a, b)
    assert got.shape == (5,) and float(got.min()) >= 0.0
    alone = [float(cosine(a[i : i + 1], b[i : i + 1])[0]) for i in range(5)]
    np.testing.assert_allclose(got, alone, atol=1e-6)

  is_by_row(confidence.cosine_similarity)
  assert fails(is_by_row, their_cosine)


def test_6_the_oracle_asks_every_row_for_its_own_argmax():
  toy, rule = engine.toy(), exits.OracleExit()
  got = engine.run(toy, rule).generation
  rows = engine.reference_rows(toy, rule)

  def by_row(layers):
    for row, found in zip(rows, layers, strict=True):
      assert found[: len(row.exit_layers)].tolist() == list(row.exit_layers)

  by_row(np.asarray(got.exit_layers))
  one_for_all = np.maximum(got.exit_layers, np.max(got.exit_layers, axis=0)[None])
  assert fails(by_row, one_for_all * (np.asarray(got.exit_layers) > 0))


def test_7_never_is_a_threshold_that_saturated_confidence_does_not_reach():
  toy = engine.toy(sharpness=1000.0)

  def is_full_depth(threshold):
    layers = np.asarray(engine.run(toy, RULE, threshold).generation.exit_layers)
    assert set(layers[layers > 0]) == {L}

  is_full_depth(schedules.NEVER_EXIT)
  assert fails(is_full_depth, 1.0)


def test_8_exits_are_written_where_the_row_is_and_nothing_after_its_end():
  generation = engine.run(engine.toy(), RULE, 0.6).generation
  tokens, layers = np.asarray(generation.tokens), np.asarray(generation.exit_layers)

  def counts_tokens_only(layers):
    ended = np.cumsum(tokens == 1, axis=1) - (tokens == 1) > 0
    assert ended.any() and np.all((layers > 0) == ~ended)

  counts_tokens_only(layers)
  assert fails(counts_tokens_only, np.where(layers > 0, layers, L))


@dataclasses.dataclass(frozen=True)
class LeastOfTheBatch:
  """Their decision: the least sure row decides for all."""

  name: ClassVar[str] = "softmax"
  uses_head: ClassVar[bool] = True
  bound: ClassVar[Any] = None

  def __call__(self, view):
    return jnp.full(view.hidden.shape[:1], jnp.min(confidence.Softmax()(view)))


def test_9_rows_leave_by_themselves():
  agrees_with_the_yardstick(RULE, 0.4)
  least = dataclasses.replace(RULE, measure=LeastOfTheBatch())
  assert fails(agrees_with_the_yardstick, least, 0.4, RULE)


def test_11_the_oracle_may_skip_exits_and_a_position_is_written_once():
  rule = exits.OracleExit(allowed=(2,))
  agrees_with_the_yardstick(rule, 0.0)
  assert fails(agrees_with_the_yardstick, rule, 0.0, exits.OracleExit())


def test_19_the_classifier_has_a_parameter_a_feature_and_reads_the_normed_state():
  toy = engine.toy()
  sizes = [leaf.size for leaf in jax.tree.leaves(toy.params["decoder"]["exit_classifier"])]
  assert sum(sizes) == toy.config.emb_dim + 1
  hidden = jnp.asarray(np.random.default_rng(2).standard_normal((3, 16)), jnp.float32)

  def reads_the_normed_state(logit):
    np.testing.assert_allclose(logit(100.0 * hidden), logit(hidden), atol=1e-3)

  weights = toy.weights.decoder
  decoder = engine_step(toy, weights)
  reads_the_normed_state(decoder.exit_logit)
  assert fails(reads_the_normed_state, lambda x: x @ weights.exit_kernel + weights.exit_bias)


def engine_step(toy, weights):
  from calm import step

  table = step.bias_table(weights, toy.config, engine.LENGTH)
  return step.DecoderStep(
    weights, toy.config, engine.encode(toy), (), table.at(jnp.array(0)), table.current
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
  assert fails(is_zero_without_tokens, their_classifier_loss)
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


def test_24_cross_attention_is_projected_before_the_loop_and_not_in_it():
  from calm import step

  toy = engine.toy()
  weights, encoded = toy.weights.decoder, engine.encode(toy)
  prefix = jnp.zeros((8, engine.LENGTH), jnp.int32)
  loop = t5x_loops.Loop(toy.config, RULE, engine.LENGTH)
  states = jnp.ones((8, toys_length(encoded), toy.config.emb_dim))
  joined = 2 * toy.config.num_heads * toy.config.head_dim

  def one_step(project, states):
    made = project(states)
    rows = t5x_loops.make_rows(made, prefix, 0.5, 1)
    state = t5x_loops.LoopState(
      None, prefix, prefix[:, :1], loop.empty_cache(weights, rows, len(prefix))
    )
    return loop.bind(weights, rows, 1)(state)[0]

  def projects_nothing(project):
    text = str(jax.make_jaxpr(functools.partial(one_step, project))(states))
    assert f"f32[8,{states.shape[1]},{joined}]" not in text

  projects_nothing(lambda states: encoded)
  again = lambda states: step.cross_attention_inputs(
    weights, toy.config, states, jnp.asarray(engine.PROMPTS)
  )
  assert fails(projects_nothing, again)


def toys_length(encoded) -> int:
  return encoded.bias.shape[-1]
