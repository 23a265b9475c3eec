"""The one-position decoder against the network and the numpy yardstick, on the same tree."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calm import exits
from calm.exits import confidence, layers, propagation
from calm.t5 import attention as attention_lib
from calm.t5 import caches as caches_lib
from calm.t5 import decoder as decoder_lib
from calm.t5 import decoder_weights, network, platforms
from calm.t5 import layers as layers_lib
from tests import engine, reference_network

LENGTH = 6
PROMPTS = engine.PROMPTS[:3]
TOKENS = np.random.default_rng(0).integers(3, 40, size=(3, LENGTH)).astype(np.int32)
VARIANTS = {
  "untied": {},
  "tied": {"logits_via_embedding": True},
  "relu": {"mlp_activations": ("relu",)},
  "translated": {"exit_translators": (1, 3), "logits_via_embedding": True},
}
FIRST_MAP = {"exit_propagation": (1,), "exit_propagation_rank": 2}


# One small program for all positions, compiled without trying hard.
@functools.partial(
  jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0}
)
def one_position(config, weights, encoded, caches, tokens, position):
  """(hidden, logits, exit logit, row, projected row) of every layer, and the new caches."""
  table = attention_lib.bias_table(weights.decoder, config, LENGTH)
  decoder = decoder_lib.DecoderStep(
    weights.decoder, config, encoded, table.at(position), table.current
  )
  hidden, column = weights.decoder.embedding[tokens], []
  for i in range(1, config.num_decoder_layers + 1):
    projected = decoder.project(i, hidden)
    hidden, row = decoder.run(i, hidden, caches[i - 1])
    read = decoder.read(i, hidden)
    column.append((hidden, decoder.logits(read), decoder.exit_logit(read), row, projected))
  return column, caches_lib.write_rows(
    caches, tuple(part[3] for part in column), [position] * len(caches)
  )


def by_steps(toy):
  """d^i, logits and exit logits, each [layer, batch, length, ...]; caches; pairs of rows."""
  encoded, out = engine.encode(toy, PROMPTS), []
  caches = caches_lib.empty_caches(toy.config, len(PROMPTS), LENGTH)
  for t in range(LENGTH):
    column, caches = one_position(
      toy.config, toy.weights, encoded, caches, jnp.asarray(TOKENS[:, t]), jnp.int32(t)
    )
    out.append(column)
  stack = lambda k: np.stack([np.stack([part[k] for part in c]) for c in out], axis=2)
  pairs = [part[3:] for column in out for part in column]
  return stack(0), stack(1), stack(2), caches, pairs


@functools.partial(
  jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0}
)
def teacher_forced(config, params):
  model, variables = network.Transformer(config), {"params": params}
  hidden = model.apply(
    variables, PROMPTS, TOKENS, jnp.ones_like(TOKENS), method="hidden_states"
  )
  part = params["decoder"]["exit_classifier"]

  def heads(model, states):
    read, decoder = model.decoder.read(states).astype(jnp.float32), model.decoder
    logits = jnp.stack([decoder.logits(x, i) for i, x in enumerate(states, start=1)])
    return logits, (read @ part["kernel"])[..., 0] + part["bias"][0]

  return hidden, *model.apply(variables, hidden, method=heads)


@pytest.mark.parametrize("variant", VARIANTS)
def test_steps_are_the_network_position_by_position(variant):
  toy = engine.toy(**VARIANTS[variant])
  ours = by_steps(toy)
  hidden, logits, exit_logits = teacher_forced(toy.config, toy.params)
  np.testing.assert_allclose(ours[0], hidden, rtol=1e-4, atol=1e-3)
  assert ours[1].dtype == jnp.float32 and ours[1].shape[-1] == toy.sizes.num_pieces
  np.testing.assert_allclose(ours[1], logits[..., : toy.sizes.num_pieces], atol=1e-3)
  np.testing.assert_allclose(ours[2], exit_logits, atol=1e-3)


def test_projecting_makes_the_keys_and_values_of_running():
  toy = engine.toy()
  *_, caches, pairs = by_steps(toy)
  assert len(pairs) == LENGTH * 4
  for ran, projected in pairs:
    np.testing.assert_allclose(ran.key, projected.key, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ran.value, projected.value, rtol=1e-5, atol=1e-5)
  # Positions lie along the second last axis.
  for i, cache in enumerate(caches):
    for t in range(LENGTH):
      row = pairs[4 * t + i][0]
      np.testing.assert_array_equal(cache.keys[..., t, :], row.key)
      np.testing.assert_array_equal(cache.values[..., t, :], row.value)


def test_learned_propagation_is_exact_of_a_layer_that_is_linear_in_what_it_reads():
  """d^2 = d^1 + mlp_norm(d^1) W: what layer 3 gets, in closed form."""
  changes = dict(num_decoder_layers=3, mlp_activations=("linear",))
  maps = dict(exit_propagation=(1,), exit_propagation_rank=16)
  toy = engine.toy(**changes, **maps)
  params = {**toy.params, "decoder": dict(toy.params["decoder"])}
  second = params["decoder"]["layers_1"] = dict(params["decoder"]["layers_1"])
  for name in ("self_attention", "encoder_decoder_attention"):
    second[name] = {**second[name], "out": {"kernel": np.zeros((16, 16), np.float32)}}
  scale = params["decoder"]["decoder_norm"]["scale"]
  scales = second["pre_mlp_layer_norm"]["scale"] / scale
  product = second["mlp"]["wi"]["kernel"] @ second["mlp"]["wo"]["kernel"]
  params["decoder"]["exit_propagation"] = {
    "layers_0": {
      "down": {"kernel": np.diag(scales), "bias": np.zeros(16, np.float32)},
      "up": {"kernel": np.stack([np.zeros_like(product), product])},
    }
  }
  decoder = decoder_step(engine.of_params(params, toy.sizes))
  hidden = jnp.asarray(np.random.default_rng(1).normal(size=(3, 16)), jnp.float32)
  cache, *_ = caches_lib.empty_caches(toy.config, 3, LENGTH)
  state = jnp.concatenate([hidden, decoder.code(1, hidden)], axis=1)
  np.testing.assert_array_equal(decoder.predict(2, state), hidden)
  ran, _ = decoder.run(2, hidden, cache)
  assert not np.allclose(ran, hidden, atol=0.1)
  np.testing.assert_allclose(decoder.predict(3, state), ran, rtol=1e-4, atol=1e-4)


def test_states_are_kept_for_the_exits_that_a_rule_may_take_alone():
  toy = engine.toy(**engine.MAPS)
  learned = exits.DynamicExits(
    confidence.State(), allowed=(1, 3), propagation=propagation.Learned()
  )
  some = toy.weights.decoder.for_exits(learned, 4)
  every = dataclasses.replace(decoder_step(toy), weights=toy.weights.decoder)
  part = dataclasses.replace(every, weights=some)
  hidden = jnp.asarray(np.random.default_rng(1).normal(size=(3, 16)), jnp.float32)
  assert every.code(1, hidden).shape == (3, 15) and part.code(1, hidden).shape == (3, 10)
  assert not part.code(2, hidden).any()
  for left in (1, 3):
    for layer in range(left + 1, 5):
      states = [jnp.concatenate([hidden, d.code(left, hidden)], axis=1) for d in (every, part)]
      got = [d.predict(layer, state) for d, state in zip((every, part), states, strict=True)]
      np.testing.assert_allclose(got[1], got[0], rtol=1e-5, atol=1e-5)
      for row, state in zip(got[1], np.asarray(hidden), strict=True):
        expected = reference_network.predicted_input(toy.reference, layer, state, left)
        np.testing.assert_allclose(row, expected, rtol=1e-4, atol=1e-4)
  assert toy.weights.decoder.for_exits(exits.StaticExit(), 4) is toy.weights.decoder


def test_learned_propagation_that_a_model_lacks_is_refused_by_name():
  learned = exits.DynamicExits(confidence.State(), propagation=propagation.Learned())
  for toy, found in ((engine.toy(), "none"), (engine.toy(**FIRST_MAP), r"\[1\]")):
    with pytest.raises(ValueError, match=rf"exit layers \[1, 2, 3\], got.*{found}; fit it"):
      toy.weights.decoder.for_exits(learned, 4)
  only = dataclasses.replace(learned, allowed=(1,))
  maps = engine.toy(**FIRST_MAP).weights.decoder.for_exits(only, 4).propagation
  assert maps is not None and maps.layers == (1,)


def decoder_step(toy) -> decoder_lib.DecoderStep:
  table = attention_lib.bias_table(toy.weights.decoder, toy.config, LENGTH)
  return decoder_lib.DecoderStep(
    toy.weights.decoder,
    toy.config,
    engine.encode(toy, PROMPTS),
    table.at(jnp.int32(0)),
    table.current,
  )


def test_projections_are_those_of_the_yardstick():
  toy = engine.toy()
  states = np.random.default_rng(1).normal(size=(3, 16)).astype(np.float32)
  decoder = decoder_step(toy)
  for layer in range(1, 5):
    got = decoder.project(layer, jnp.asarray(states))
    for row, state in enumerate(states):
      key, value = reference_network.self_projections(toy.reference, layer, state)
      np.testing.assert_allclose(got.key[row], key, rtol=1e-4, atol=1e-5)
      np.testing.assert_allclose(got.value[row], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("stored", "on_tpu"), [("float32", 1), ("bfloat16", 2)])
def test_keys_and_values_are_the_same_numbers_of_one_matrix_or_two(stored, on_tpu):
  """A TPU has two where weights are narrow; another platform never."""
  toy, decoder = engine.toy(), decoder_step(engine.toy())
  states = jnp.asarray(np.random.default_rng(1).normal(size=(3, 16)), jnp.float32)
  rows, counts = [], []
  for platform in ("cpu", "tpu"):
    with platforms.laid_out_for(platform):
      weights = decoder_weights.decoder_weights(toy.params, toy.config, weights_dtype=stored)
    counts.append({len(layer.key_value) for layer in weights.layers})
    made = dataclasses.replace(decoder, weights=weights)
    rows.append([made.project(layer, states) for layer in range(1, 5)])
  assert counts == [{1}, {on_tpu}]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), *rows)


def test_biases_by_distance_with_the_future_masked():
  toy, length = engine.toy(), 200  # beyond the distance where buckets end
  table = attention_lib.bias_table(toy.weights.decoder, toy.config, length)
  rel = toy.params["decoder"]["relpos_bias"]["rel_embedding"]
  for t in (0, 1, 17, 199):
    (got,) = map(np.asarray, table.at(jnp.int32(t)))
    expected = reference_network.position_bias(toy.reference, "decoder", t, t)
    np.testing.assert_array_equal(got[:, :t], expected)
    assert (got[:, t:] == layers_lib.MASK_BIAS).all()
  np.testing.assert_array_equal(table.current[0], rel[:, 0])


def test_heads_end_at_the_pieces_of_the_vocabulary():
  toy = engine.toy()
  kernel = toy.params["decoder"]["logits_dense"]["kernel"]
  np.testing.assert_array_equal(toy.weights.decoder.head, kernel[:, :40])
  whole = decoder_weights.decoder_weights(toy.params, toy.config)
  assert whole.head.shape == (16, 48)


def test_a_vocabulary_larger_than_the_model_is_refused():
  toy = engine.toy()
  for pieces in (0, 49):
    with pytest.raises(ValueError, match=rf"at most 48 pieces.*got {pieces}; this vocabulary"):
      decoder_weights.decoder_weights(toy.params, toy.config, pieces)


def test_a_model_without_classifier_says_so():
  decoder = decoder_step(engine.toy(exit_classifier=False))
  with pytest.raises(ValueError, match="exit classifier for the measure 'classifier'"):
    decoder.exit_logit(jnp.ones((3, 16)))
  with pytest.raises(ValueError, match=r"exit probes for the measure 'probe'.*exit_probes.gin"):
    decoder.probe_logit(2, *[jnp.ones((3, 16))] * 3)


def test_windows_read_caches_and_prompts_however_their_heads_lie():
  normal = lambda *shape: jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)
  apart, query = caches_lib.Cache(normal(2, 2, 5, 8), normal(2, 2, 5, 8)), normal(6, 2, 8)
  merged = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 2).reshape(2, 5, 16), apart)
  made = []
  for cache in (apart, merged):
    biases = normal(2, 2, 3, 5), normal(2, 1, 5)
    window = attention_lib.WindowAttention(cache, biases[0], cache, biases[1], False)
    row = layers.KeyValue(query, query)
    made.append((window.to_past(query, row), window.to_prompt(query)))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *made)


def test_the_number_of_rows_may_be_a_symbol():
  """As T5X exports a model: for any batch."""
  toy = engine.toy(**engine.MAPS)
  table = attention_lib.bias_table(toy.weights.decoder, toy.config, LENGTH)

  def run(hidden, encoded, cache):
    step = decoder_lib.DecoderStep(
      toy.weights.decoder, toy.config, encoded, table.at(jnp.int32(2)), table.current
    )
    hidden = step.predict(3, jnp.concatenate([hidden, step.code(2, hidden)], axis=1))
    hidden, _ = step.run(1, hidden, cache)
    return step.logits(step.read(1, hidden))

  def given(rows: int):
    encoded = jax.tree.map(lambda x: x[:rows], engine.encode(toy))
    cache, *_ = caches_lib.empty_caches(toy.config, rows, LENGTH)
    return jnp.ones((rows, toy.config.emb_dim)), encoded, cache

  (rows,) = jax.export.symbolic_shape("rows")
  symbolic = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), given(3)
  )
  exported = jax.export.export(jax.jit(lambda *leaves: run(*leaves)))(*symbolic)
  for count in (1, 3):
    ours, theirs = exported.call(*given(count)), run(*given(count))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
