"""Early exit as other loops call it, without T5X: the cache they may shuffle, and replay."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calm import exits
from calm.decode import engines
from calm.exits import confidence, propagation, schedules
from calm.t5x import loops
from tests import engine

NEVER = schedules.NEVER_EXIT
RULE = exits.DynamicExits(confidence.Softmax(), engine.DECAYING)
ENGINES = {
  "eager": engines.Eager(),
  "deferred": engines.Deferred(),
  "compacted": engines.Compacted(buckets=(2,)),
  "learned": engines.Deferred(),
}
LEARNED = exits.DynamicExits(confidence.State(), engine.DECAYING, (1, 3), propagation.Learned())
EOS = 1


def rule_of(name: str) -> exits.DynamicExits:
  return LEARNED if name == "learned" else RULE


def compiled(function):
  return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def bound(toy, name, prefix=None, num_decodes=1, threshold=0.4):
  encoded = engine.encode(toy)
  empty = jnp.zeros((len(engine.PROMPTS), engine.LENGTH), jnp.int32)
  prefix = empty if prefix is None else jnp.asarray(prefix, jnp.int32)
  rows = loops.make_rows(encoded, prefix, threshold, EOS, num_decodes)
  loop = loops.Loop(toy.config, rule_of(name), engine.LENGTH, ENGINES[name])
  return loop, rows, prefix


def decoded(toy, name, threshold, prefix=None):
  """(tokens, scores, exits of the same pass, exits by replay)."""

  def run(weights, threshold):
    loop, rows, given = bound(toy, name, prefix, threshold=threshold)
    tokens, scores, same_pass = loops.greedy_decode(
      given,
      loop.empty_cache(weights, rows, len(given)),
      loop.bind(weights, rows, EOS),
      EOS,
    )
    return tokens[:, 0], scores[:, 0], same_pass, loop.replay(weights, rows, tokens[:, 0], EOS)

  return compiled(run)(toy.weights.decoder, jnp.asarray(threshold, jnp.float32))


@pytest.mark.parametrize("name", ENGINES)
def test_it_is_our_own_decoder_and_replay_finds_the_same_exits(name):
  toy, rule = engine.toy_for(rule_of(name)), rule_of(name)
  expected = engine.run(toy, rule, 0.6).generation
  tokens, scores, *both = decoded(toy, name, 0.6)
  np.testing.assert_array_equal(tokens, expected.tokens)
  np.testing.assert_allclose(scores, expected.scores, atol=1e-4)
  for found in both:
    for name, field in (
      ("exit_layers", found.exit_layers),
      ("confidences", found.confidences),
      ("rejected_confidences", found.rejected_confidences),
    ):
      np.testing.assert_allclose(field, getattr(expected, name), atol=1e-4)
  assert 1 < expected.mean_layers < 4 and np.any(expected.tokens == EOS)


@pytest.mark.parametrize("name", ENGINES)
def test_every_leaf_of_the_cache_has_its_rows_first_and_is_finite(name):
  toy = engine.toy_for(rule_of(name))
  loop, rows, _ = bound(toy, name, num_decodes=3)
  cache = loop.empty_cache(toy.weights.decoder, rows, 8)
  excluded = ("cache_index", "cached_bias", "position_embedder_index")
  for path, leaf in jax.tree.leaves_with_path(cache):
    assert all(isinstance(key, jax.tree_util.DictKey) for key in path)
    assert leaf.shape[:1] == (8,) if path[-1].key not in excluded else leaf.ndim == 0
    assert np.all(np.isfinite(leaf))
  assert cache["cache_index"].shape == ()


@pytest.mark.parametrize("name", ENGINES)
def test_shuffling_the_rows_of_a_cache_shuffles_what_follows(name):
  """What beam search does between two steps."""
  toy, order = engine.toy_for(rule_of(name)), np.array([3, 3, 0, 1, 7, 6, 5, 2])
  loop, rows, prefix = bound(toy, name)
  weights = toy.weights.decoder
  same_prompt = dataclasses.replace(
    rows, encoded=jax.tree.map(lambda x: jnp.repeat(x[:1], 8, 0), rows.encoded)
  )
  step = compiled(loop.bind(weights, same_prompt, EOS))
  tokens = [jnp.arange(5, 13)[:, None], jnp.arange(20, 28)[:, None]]
  state = lambda token, cache: loops.LoopState(None, prefix, token, cache)
  _, cache = step(state(tokens[0], loop.empty_cache(weights, same_prompt, 8)))
  shuffled = jax.tree.map(lambda x: x[order] if x.ndim else x, cache)
  logits, _ = step(state(tokens[1], cache))
  got, after = step(state(tokens[1][order], shuffled))
  np.testing.assert_allclose(got, logits[order], atol=1e-4)
  assert after["cache_index"] == 2


def test_a_prefix_with_an_eos_ends_nothing_and_is_not_counted():
  prefix = np.zeros((8, engine.LENGTH), int)
  prefix[::2, 1:4] = [7, EOS, 9]
  tokens, _, same_pass, replayed = decoded(engine.toy(), "deferred", 0.0, prefix)
  np.testing.assert_array_equal(tokens[::2, :3], prefix[::2, 1:4])
  for found in (same_pass, replayed):
    assert np.all(found.exit_layers[::2, :3] == 0) and np.all(found.exit_layers[::2, 3] > 0)
    assert np.all(found.exit_layers[1::2, 0] > 0)
  np.testing.assert_array_equal(same_pass.exit_layers, replayed.exit_layers)


def caches_after(rule, tokens, forced) -> list[np.ndarray]:
  """Keys and values after every position of `tokens` was fed, forced or free."""
  toy, prefix = engine.toy(), jnp.asarray(tokens * forced, jnp.int32)
  rows = loops.make_rows(engine.encode(toy), prefix, 0.0, EOS)
  loop = loops.Loop(toy.config, rule, engine.LENGTH, engines.Eager())
  step = compiled(loop.bind(toy.weights.decoder, rows, EOS))
  cache = loop.empty_cache(toy.weights.decoder, rows, len(tokens))
  for i in range(engine.LENGTH - 1):
    current = jnp.asarray(tokens[:, i : i + 1], jnp.int32)
    _, cache = step(loops.LoopState(None, prefix, current, cache))
  carried = {name: leaf for name, leaf in cache.items() if name.startswith("carried_")}
  return [np.asarray(leaf) for leaf in jax.tree.leaves(carried)]


def test_a_prefix_runs_every_layer_under_the_oracle_too():
  tokens = np.arange(8 * engine.LENGTH).reshape(8, -1) % 30 + 5
  tokens[:, 0] = 0
  full = caches_after(exits.StaticExit(), tokens, 1)
  for oracle in (exits.OracleExit(), exits.DynamicExits(confidence.Softmax())):
    same = lambda a, b: all(np.allclose(x, y, atol=1e-5) for x, y in zip(a, b, strict=True))
    assert same(caches_after(oracle, tokens, 1), full)
    # Meta: the same tokens, had the model been free to choose them, leave early.
    assert not same(caches_after(oracle, tokens, 0), full)


def test_real_tokens_end_with_the_generated_eos_or_the_last_that_is_not_padding():
  tokens = jnp.array([[5, 1, 0, 0], [5, 6, 0, 0], [1, 7, 1, 9], [0, 0, 0, 0], [5, 0, 6, 0]])
  rows = dataclasses.replace(
    bound(engine.toy(), "eager")[1], num_eos=jnp.array([0, 0, 1, 0, 0])
  )
  got = np.sum(loops.real_tokens(tokens, rows, EOS), axis=1)
  np.testing.assert_array_equal(got, [2, 2, 3, 0, 3])


def test_exact_decoding_is_greedy_decoding_at_full_depth_its_prefix_too():
  toy, prefix = engine.toy(), np.zeros((8, engine.LENGTH), int)
  prefix[::2, 1:4] = [7, EOS, 9]

  def run(weights, rule):
    rows = loops.make_rows(engine.encode(toy), jnp.asarray(prefix), NEVER, EOS)
    loop = loops.Loop(toy.config, rule, engine.LENGTH)
    cache = loop.empty_cache(weights, rows, 8)
    return loops.greedy_decode(jnp.asarray(prefix), cache, loop.bind(weights, rows, EOS), EOS)

  exact = exits.Speculative(3, 3, draft_head="full")
  one, other = (
    compiled(lambda weights, rule=rule: run(weights, rule))(toy.weights.decoder)
    for rule in (exits.StaticExit(), exact)
  )
  np.testing.assert_array_equal(one[0], other[0])
  np.testing.assert_allclose(one[1], other[1], atol=1e-5)
  np.testing.assert_array_equal(one[2].exit_layers, other[2].exit_layers)
  np.testing.assert_array_equal(other[0][::2, 0, :3], prefix[::2, 1:4])


def test_exact_decoding_refuses_loops_that_ask_token_by_token():
  toy = engine.toy()
  loop, rows, _ = bound(toy, "eager")
  exact = dataclasses.replace(loop, rule=exits.Speculative(2, draft_head="full"))
  ask = exact.bind(toy.weights.decoder, rows, EOS)
  with pytest.raises(ValueError, match="greedy_decode"):
    ask(None)


def test_greedy_decoding_refuses_several_decodes():
  with pytest.raises(ValueError, match="num_decodes"):
    loops.greedy_decode(jnp.zeros((1, 2), jnp.int32), {}, lambda s: s, EOS, num_decodes=3)
