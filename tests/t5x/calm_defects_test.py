"""Defects of t5x/contrib/calm, one test each: ours passes, and what was there fails.

Numbers are those of the survey that the migration table answers. Items 10, 13 and 23 need the
real T5X; item 12 (gin files that do not parse) is in `configs_test.py`, and those of training
are in `calm_training_defects_test.py`.
"""

import dataclasses
import functools
import types
from typing import Any, ClassVar
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calm import exits
from calm.exits import confidence, propagation, rules, schedules
from calm.t5 import caches, network, parameters
from calm.t5x import loops
from calm.training import losses, objectives
from tests import engine
from tests.t5x import setup

needs_t5x = lambda test: functools.reduce(lambda f, mark: mark(f), setup.MARKS, test)
RULE = exits.DynamicExits(confidence.Softmax())
L = 4


def agrees_with_the_yardstick(rule, threshold, yardstick=None):
  """Tokens, exits and caches, against the numpy decoder's reading of the paper."""
  toy = engine.toy()
  state = engine.run(toy, rule, threshold)
  rows = engine.reference_rows(toy, yardstick or rule, threshold)
  assert len(engine.agreeing_rows(rows, state.generation)) == len(rows)
  for i, row in enumerate(rows):
    engine.compare_memory(state.cache, row, i, len(row.tokens))


def test_1_the_state_of_the_layer_left_is_propagated():
  agrees_with_the_yardstick(RULE, 0.6)
  first = dataclasses.replace(RULE, propagation=propagation.FirstState())
  assert setup.fails(agrees_with_the_yardstick, first, 0.6, RULE)


def test_2_the_threshold_decays_along_the_sequence():
  rows = loops.make_rows(
    engine.encode(engine.toy()), jnp.zeros((8, engine.LENGTH), jnp.int32), 0.5, 1
  )

  def decays(rows):
    schedule = loops.AfterPrefix(engine.DECAYING, rows)
    values = [float(schedule(jnp.float32(0.5), i)[0]) for i in range(engine.LENGTH)]
    assert np.all(np.diff(values) < 0)

  decays(rows)
  assert setup.fails(
    decays, dataclasses.replace(rows, generated=jnp.zeros_like(rows.generated))
  )


def test_3_the_schedule_is_equation_5():
  def is_equation_5(schedule):
    assert float(schedule(jnp.float32(0.5), 0)) == pytest.approx(0.55)
    assert float(schedule(jnp.float32(0.5), 8)) == pytest.approx(0.45 + 0.1 * np.exp(-4.0))

  is_equation_5(schedules.Decaying(4.0, 8))
  assert setup.fails(
    is_equation_5, lambda lam, t: 0.9 * lam + 0.1 * lam * jnp.exp(-4.0 * t / 8)
  )


def test_4_padding_touches_no_hidden_feature_of_a_real_token():
  toy = engine.toy()
  batch = {name: x[:2] for name, x in setup.training_batch(toy).items()}
  mask = batch["decoder_loss_weights"]
  module = network.Transformer(toy.config)
  objective = objectives.LayerWeighted()

  params = setup.params(toy)

  def is_the_sum_of_its_rows(objective):
    loss = jax.jit(
      lambda params, batch: objective.loss(module, params, batch, None)[0],
      compiler_options={"xla_backend_optimization_level": 0},
    )
    whole = loss(params, batch)
    alone = 0.0
    for row, length in enumerate(np.sum(mask, axis=1, dtype=int)):
      cut = {name: x[row : row + 1] for name, x in batch.items()}
      cut |= {name: x[:, :length] for name, x in cut.items() if name.startswith("decoder")}
      alone += float(loss(params, cut))
    assert float(whole) == pytest.approx(alone, rel=1e-4)

  assert 0 < np.sum(mask == 0) < np.sum(mask > 0)
  is_the_sum_of_its_rows(objective)
  with pytest.raises(AssertionError, match="comparison failed"):
    is_the_sum_of_its_rows(ScrambledMask())


@dataclasses.dataclass(frozen=True)
class ScrambledMask:
  """Their training: a mask of [batch, length, 1] "resized" to [layers, batch, length, emb]."""

  def loss(self, module, params, batch, rng):
    normed = objectives.normed_states(module, params, batch, rng)
    mask = batch["decoder_loss_weights"]
    scrambled = normed * jnp.resize(mask[..., None], normed.shape)
    weights = jnp.asarray(losses.layer_weights(normed.shape[0]))
    kernel = parameters.head_kernels(params, module.config)[0]
    targets = batch["decoder_target_tokens"]
    return losses.layer_cross_entropy(scrambled, kernel, targets, mask, weights)


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
  assert setup.fails(is_by_row, their_cosine)


@dataclasses.dataclass(frozen=True)
class OneArgmax(exits.OracleExit):
  """Their oracle: `argmax()` without an axis, one answer for the whole batch."""

  def __call__(self, *arguments):
    of_the_batch = lambda x, axis: jnp.broadcast_to(jnp.argmax(x), x.shape[:1])
    with mock.patch.object(rules, "jnp", types.SimpleNamespace(**vars(jnp))) as shim:
      shim.argmax = of_the_batch
      return super().__call__(*arguments)


def test_6_the_oracle_asks_every_row_for_its_own_argmax():
  agrees_with_the_yardstick(exits.OracleExit(), 0.0)
  assert setup.fails(agrees_with_the_yardstick, OneArgmax(), 0.0, exits.OracleExit())


def test_7_never_is_a_threshold_that_saturated_confidence_does_not_reach():
  toy = engine.toy(sharpness=1000.0)

  def is_full_depth(threshold):
    layers = np.asarray(engine.run(toy, RULE, threshold).generation.exit_layers)
    assert set(layers[layers > 0]) == {L}

  is_full_depth(schedules.NEVER_EXIT)
  assert setup.fails(is_full_depth, 1.0)


def test_8_exits_are_written_where_the_row_is_and_nothing_after_its_end(monkeypatch):
  toy, lengths = engine.toy(), np.array([0, 1, 0, 2, 0, 3, 0, 4])
  prefix = np.where(np.arange(engine.LENGTH)[None] <= lengths[:, None], 5, 0)
  prefix[:, 0] = 0

  def counts_what_each_row_generated(put):
    monkeypatch.setattr(loops, "_put", put)
    rows = loops.make_rows(engine.encode(toy), jnp.asarray(prefix), 0.6, 1)
    loop, weights = loops.Loop(toy.config, RULE, engine.LENGTH), toy.weights.decoder
    cache = loop.empty_cache(weights, rows, 8)
    decodes, _, found = loops.greedy_decode(
      jnp.asarray(prefix), cache, loop.bind(weights, rows, 1), 1
    )
    tokens, layers = np.asarray(decodes[:, 0]), np.asarray(found.exit_layers)
    ended = np.cumsum(tokens == 1, axis=1) - (tokens == 1) > 0
    given = np.pad(prefix[:, 1:], ((0, 0), (0, 1))) > 0
    assert np.all((layers > 0) == ~(ended | given)) and given.any()
    assert ended.any(), "some row ends before the others"

  put = loops._put
  counts_what_each_row_generated(put)

  def outer_product(array, position, column):
    """`exits.at[:, i].set(...)` with a vector i: every row writes every row's column."""
    if array.dtype != jnp.int32 or array.shape[1] != engine.LENGTH:
      return put(array, position, column)
    at = jnp.maximum(position - jnp.asarray(lengths), 0)
    return array.at[:, at].set(jnp.broadcast_to(column[:, None], (8, 8)))

  assert setup.fails(counts_what_each_row_generated, outer_product)


@dataclasses.dataclass(frozen=True)
class LeastOfTheBatch:
  """Their decision: the least sure row decides for all."""

  name: ClassVar[str] = "softmax"
  uses_head: ClassVar[bool] = True
  uses_shortlist: ClassVar[bool] = False
  part: ClassVar[str | None] = None
  bound: ClassVar[Any] = None

  def __call__(self, view):
    return jnp.full(view.hidden.shape[:1], jnp.min(confidence.Softmax()(view)))


def test_9_rows_leave_by_themselves():
  agrees_with_the_yardstick(RULE, 0.4)
  least = dataclasses.replace(RULE, measure=LeastOfTheBatch())
  assert setup.fails(agrees_with_the_yardstick, least, 0.4, RULE)


@needs_t5x
def test_10_the_full_model_is_a_baseline_of_its_own():
  """Theirs, the real one, over T5X's own network: it raises before it returns anything."""
  setup.import_models()
  from t5x import adafactor
  from t5x.contrib.calm import models as their_models

  toy, words = engine.toy(), setup.vocabulary(engine.toy().sizes.vocab_size)
  optimizer = adafactor.Adafactor(learning_rate=1e-3)

  def returns_full_depth(model, params):
    tokens, aux = model.predict_batch_with_aux(params, setup.batch())
    layers = np.asarray(aux["exit_layers"])
    assert layers.shape == tokens.shape and set(np.unique(layers)) <= {0, L}

  returns_full_depth(setup.model(toy, decode_fn=t5x_greedy()), setup.params(toy))
  theirs = their_models.EncoderDecoderModel(
    setup.t5x_module(toy),
    words,
    words,
    optimizer,
    t5x_greedy(),
    apply_early_inference=False,
  )
  with pytest.raises(TypeError, match="list indices"):
    returns_full_depth(theirs, setup.t5x_params(toy))


def t5x_greedy():
  from t5x import decoding

  return functools.partial(decoding.temperature_sample, temperature=0.0, topk=0)


@dataclasses.dataclass(frozen=True)
class LastLayerTwice(exits.OracleExit):
  """Their `oracle_cache`, whose switch runs the last segment again when it is past the end."""

  def __call__(self, layers, hidden, active, threshold, generated):
    def run(layer, hidden):
      made = layers.run(layer, hidden)
      return layers.run(layer, made[0]) if layer == layers.num_layers else made

    again = dataclasses.replace(layers, run=run)
    return super().__call__(again, hidden, active, threshold, generated)


def test_11_the_oracle_may_skip_exits_and_a_position_is_written_once():
  rule = exits.OracleExit(allowed=(2,))
  agrees_with_the_yardstick(rule, 0.0)
  assert setup.fails(agrees_with_the_yardstick, LastLayerTwice(allowed=(2,)), 0.0, rule)


@needs_t5x
def test_13_beam_search_runs_with_early_exit(monkeypatch):
  setup.import_models()
  from t5x import decoding

  toy = engine.toy()

  def searches(contract):
    bind = loops.Loop.bind
    with monkeypatch.context() as patch:
      patch.setattr(loops.Loop, "bind", lambda *a, **named: contract(bind(*a, **named)))
      model = setup.model(toy, decode_fn=decoding.beam_search)
      tokens, aux = model.predict_batch_with_aux(
        setup.params(toy),
        setup.batch(),
        decoder_params={"threshold": 0.4},
        return_all_decodes=True,
        num_decodes=2,
      )
    assert aux["exit_layers"].shape == tokens.shape

  searches(lambda tokens_to_logits: tokens_to_logits)
  # Their `tokens_to_logits` returns four things, which T5X's beam search does not unpack.
  four = lambda tokens_to_logits: lambda state: (*tokens_to_logits(state), 0, 0)
  assert setup.fails(searches, four)


@needs_t5x
def test_23_a_grid_of_thresholds_compiles_once():
  models, toy = setup.import_models(), engine.toy()
  model = setup.model(toy, rule=RULE, decode_fn=models.greedy_decode)
  params, batch = setup.params(toy), setup.batch()
  quick = {"xla_backend_optimization_level": 0}

  def predict(params, batch, threshold):
    return model.predict_batch_with_aux(params, batch, decoder_params={"threshold": threshold})

  def compiles_once(step, of):
    depths = [step(params, batch, of(t))[1]["exit_layers"].sum() for t in (0.7, 0.4)]
    assert depths[0] > depths[1] and step._cache_size() == 1

  compiles_once(jax.jit(predict, compiler_options=quick), jnp.float32)
  # Theirs is an attribute of Python's: another constant in another program.
  constant = jax.jit(predict, static_argnums=2, compiler_options=quick)
  assert setup.fails(compiles_once, constant, float)


def test_24_cross_attention_is_projected_before_the_loop_and_not_in_it():

  toy = engine.toy()
  weights, encoded = toy.weights.decoder, engine.encode(toy)
  prefix = jnp.zeros((8, engine.LENGTH), jnp.int32)
  loop = loops.Loop(toy.config, RULE, engine.LENGTH)
  states = jnp.ones((8, toys_length(encoded), toy.config.emb_dim))
  joined = 2 * toy.config.num_heads * toy.config.head_dim

  def one_step(project, states):
    made = project(states)
    rows = loops.make_rows(made, prefix, 0.5, 1)
    state = loops.LoopState(
      None, prefix, prefix[:, :1], loop.empty_cache(weights, rows, len(prefix))
    )
    return loop.bind(weights, rows, 1)(state)[0]

  def projects_nothing(project):
    text = str(jax.make_jaxpr(functools.partial(one_step, project))(states))
    assert f"f32[8,{states.shape[1]},{joined}]" not in text

  projects_nothing(lambda states: encoded)
  again = lambda states: caches.cross_attention_inputs(
    weights, toy.config, states, jnp.asarray(engine.PROMPTS)
  )
  assert setup.fails(projects_nothing, again)


def toys_length(encoded) -> int:
  return encoded.bias.shape[-1]
