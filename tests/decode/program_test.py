"""Laws of whole programs on toys: what early exit may and may not change."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calm import exits
from calm.decode import compiled, loop
from calm.decode import program as program_lib
from calm.exits import confidence, propagation, schedules
from calm.t5 import network
from tests import engine

NEVER = schedules.NEVER_EXIT
MEASURES = tuple(
  map(confidence.measure, ("softmax", "state", "classifier", "probe"))
)
SCHEDULES = {"constant": schedules.Constant(), "decaying": engine.DECAYING}
STATIC = exits.StaticExit()
SOFTMAX = exits.DynamicExits(confidence.Softmax())
LEARNED = exits.DynamicExits(
  confidence.Classifier(), propagation=propagation.Learned()
)
BATCH = len(engine.PROMPTS)


@pytest.mark.parametrize(
  ("measure", "schedule"),
  [*zip(MEASURES, [*SCHEDULES] * 2, strict=True)],
  ids=["softmax", "state", "classifier", "probe"],
)
def test_never_exit_is_the_full_model_caches_included(measure, schedule):
  propagated = (
    propagation.Learned()
    if schedule == "constant"
    else propagation.FirstState()
  )
  rule = exits.DynamicExits(
    measure, SCHEDULES[schedule], propagation=propagated
  )
  toy = engine.toy_for(rule, sharpness=1000.0)  # whose margins are saturated
  engine.assert_same_rows(
    toy, engine.run(toy, rule, NEVER), engine.run(toy, STATIC), STATIC
  )


def test_cut_models_and_the_oracle_read_through_translators():
  toy = engine.toy(exit_translators=(1, 2))
  for rule in (exits.StaticExit(2), exits.OracleExit()):
    engine.compare(toy, rule, 0.0)


def rows_of(rule, prompts, active=None):
  learns = isinstance(getattr(rule, "propagation", None), propagation.Learned)
  toy = engine.toy(**engine.MAPS) if learns else engine.toy()
  return engine.run(toy, rule, 0.6, prompts=prompts, active=active)


@pytest.mark.parametrize("rule", [STATIC, LEARNED], ids=["static", "learned"])
def test_rows_do_not_depend_on_mates_padding_or_batch_size(rule):
  prompts = engine.PROMPTS
  everything = rows_of(rule, engine.PROMPTS)
  active = np.arange(BATCH) % 3 != 1
  maps = engine.MAPS if rule is LEARNED else {}
  rows = engine.reference_rows(engine.toy(**maps), rule, 0.6)
  sure = engine.agreeing_rows(rows, everything.generation)
  order = np.random.default_rng(0).permutation(BATCH)
  padded = np.pad(prompts, [(0, 0), (0, 5)])
  others = [
    (rows_of(rule, prompts[order]), order),
    (rows_of(rule, padded), range(BATCH)),
    (rows_of(rule, prompts[2:5]), (2, 3, 4)),
    (rows_of(rule, prompts[7:8]), (7,)),
    (
      rows_of(rule, np.where(active[:, None], prompts, 0), active),
      range(BATCH),
    ),
  ]
  for field in (
    "tokens",
    "exit_layers",
    "confidences",
    "rejected_confidences",
    "scores",
  ):
    assert not np.asarray(getattr(others[-1][0].generation, field))[
      ~active
    ].any()
  # Which do not hold up the loop.
  assert (
    others[-1][0].position == engine.lengths(others[-1][0].generation).max()
  )
  for state, originals in others:
    for j, i in enumerate(originals):
      if i in sure and (state is not others[-1][0] or active[i]):
        engine.assert_same_row(everything, state, i, j)
        engine.assert_same_confidences(
          everything.generation, state.generation, i, j
        )


def test_a_shortlist_of_everything_is_softmax_and_a_part_never_leaves_earlier():
  toy = engine.toy()
  rule = exits.DynamicExits(confidence.measure("shortlist"))

  def run(ids, threshold):
    weights = program_lib.model_weights(
      toy.params, toy.config, toy.sizes.num_pieces, ids
    )
    return engine.run(
      dataclasses.replace(toy, weights=weights), rule, threshold
    )

  everything = tuple(range(40))
  part = tuple(range(0, 40, 3))
  softmax = engine.run(toy, SOFTMAX, 0.6)
  engine.assert_same_rows(toy, run(everything, 0.6), softmax, SOFTMAX, 0.6)
  engine.assert_same_rows(
    toy, run(part, NEVER), engine.run(toy, STATIC), STATIC
  )
  # Of the first token, which has no past: the same state is asked by both.
  layers = run(part, 0.6).generation.exit_layers[:, 0]
  assert (layers >= softmax.generation.exit_layers[:, 0]).all()
  assert set(
    np.asarray(run(part, 0.0).generation.exit_layers).ravel().tolist()
  ) <= {0, 1}


def test_a_whole_grid_is_one_trace():
  # Another length than elsewhere, so that nothing was compiled before.
  toy = engine.toy()
  fresh = program_lib.Program(toy.config, SOFTMAX, engine.LENGTH - 1)
  encoded = engine.encode(toy)
  active = jnp.ones(BATCH, bool)
  before = compiled.num_made("Program.decode")
  grid = [NEVER, 1.0, *np.linspace(0.95, 0.05, 19), 0.0]
  made = [
    fresh.decode(toy.weights, encoded, active, jnp.float32(x)) for x in grid
  ]
  assert compiled.num_made("Program.decode") == before + 1
  means = [*map(engine.mean_layers, made)]
  assert means[0] == 4 and means[-1] == 1 and len(set(means)) > 5
  # A threshold a row: one trace more, and each row as at its own threshold.
  rows = jnp.array([NEVER, 1.0, *np.linspace(0.9, 0.1, BATCH - 2)], jnp.float32)
  many = fresh.decode(toy.weights, encoded, active, rows)
  fresh.decode(toy.weights, encoded, active, rows[::-1])
  assert compiled.num_made("Program.decode") == before + 2
  for i, threshold in enumerate(rows):
    one = fresh.decode(toy.weights, encoded, active, threshold)
    np.testing.assert_array_equal(one.tokens[i], many.tokens[i])
    np.testing.assert_array_equal(one.exit_layers[i], many.exit_layers[i])
  assert compiled.num_made("Program.decode") == before + 2


@functools.partial(jax.jit, static_argnums=0)
def teacher_forced(config, params, tokens):
  """Logits [layers, batch, length, vocab] of the network on emitted tokens,
  every layer's.
  """
  fed = jnp.pad(tokens, [(0, 0), (1, 0)])[:, :-1]
  model = network.Transformer(config)
  variables = {"params": params}
  # Targets only tell which positions are real; the first input is the padding
  # token.
  hidden = model.apply(
    variables, engine.PROMPTS, fed, tokens, method="hidden_states"
  )

  def head(model, states):
    return jnp.stack(
      [
        model.decoder.logits(state, layer)
        for layer, state in enumerate(states, start=1)
      ]
    )

  return model.apply(variables, hidden, method=head)


@pytest.mark.parametrize(
  ("depth", "changes"),
  [
    (4, {"mlp_activations": ("relu",)}),
    (1, {"exit_translators": (1, 3), "logits_via_embedding": True}),
  ],
)
def test_cached_decoding_is_teacher_forced_decoding(depth, changes):
  toy = engine.toy(**changes)
  got = engine.run(toy, exits.StaticExit(depth)).generation
  logits = teacher_forced(toy.config, toy.params, got.tokens)[depth - 1]
  logits = logits[..., : toy.sizes.num_pieces]
  tokens = np.asarray(got.tokens)
  real = np.asarray(got.exit_layers) > 0
  np.testing.assert_array_equal(np.argmax(logits, axis=-1)[real], tokens[real])
  chosen = np.take_along_axis(
    jax.nn.log_softmax(logits), tokens[..., None], axis=-1
  )[..., 0]
  np.testing.assert_allclose(
    got.scores, np.where(real, chosen, 0).sum(1), atol=1e-3
  )


def test_bfloat16_runs_with_float32_logits_and_confidences():
  toy = engine.toy()
  narrow = engine.toy(dtype="bfloat16")
  assert narrow.weights.decoder.embedding.dtype == jnp.bfloat16
  assert narrow.weights.decoder.head.dtype == jnp.float32
  state = engine.run(narrow, SOFTMAX, 0.6)
  for field in ("confidences", "rejected_confidences", "scores"):
    assert getattr(state.generation, field).dtype == jnp.float32
  assert {cache.keys.dtype for cache in state.cache} == {jnp.dtype("bfloat16")}
  # Agreement is measured, not promised (seed 4 keeps 3 rows of 8, seed 1 all of
  # them).
  wide = engine.run(toy, SOFTMAX, 0.6).generation
  same = (state.generation.tokens == wide.tokens).all(axis=1)
  assert same.mean() >= 0.5
  rounding = jnp.abs(state.generation.confidences - wide.confidences)[
    same
  ].max()
  assert 1e-4 < rounding < 0.2  # it is bfloat16 that was computed


@pytest.mark.parametrize(
  "rule", [SOFTMAX, exits.Speculative(2, num_drafts=4, stop_below=0.0)]
)
def test_a_generation_comes_back_bit_for_bit(rule):
  toy = engine.toy()
  rows = 3
  active = np.arange(rows) != 1
  program = program_lib.Program(toy.config, rule, engine.LENGTH)
  encoded = engine.encode(toy, engine.PROMPTS[:rows])
  expected = program.decode(toy.weights, encoded, active, np.float32(0.4))
  array = program.decode_packed(toy.weights, encoded, active, np.float32(0.4))
  got = loop.unpack(np.asarray(array), engine.LENGTH)
  assert jax.tree.structure(got) == jax.tree.structure(jax.device_get(expected))
  for ours, theirs in zip(
    jax.tree.leaves(got), jax.tree.leaves(expected), strict=True
  ):
    assert ours.dtype == theirs.dtype and isinstance(ours, np.ndarray)
    np.testing.assert_array_equal(ours, theirs)
  assert np.any(got.tokens) and np.any(got.scores)
