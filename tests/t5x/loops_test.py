"""Early exit as other loops call it, without T5X: the cache they may shuffle, and replay."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calm import exits
from calm.decode import engines
from calm.exits import confidence, propagation
from calm.t5x import loops
from tests import engine

RULE = exits.DynamicExits(confidence.Softmax(), engine.DECAYING)
LEARNED = exits.DynamicExits(confidence.State(), engine.DECAYING, (1, 3), propagation.Learned())
# Name -> how steps run, and the rule.
ENGINES = {
  "eager": (engines.Eager(), RULE),
  "deferred": (engines.Deferred(), RULE),
  "compacted": (engines.Compacted(buckets=(2,)), RULE),
  "learned": (engines.Deferred(), LEARNED),
  "row_by_row": (None, LEARNED),
}
EOS = 1


def compiled(function):
  return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def bound(toy, name, num_decodes=1, threshold=0.4):
  prefix = jnp.zeros((len(engine.PROMPTS), engine.LENGTH), jnp.int32)
  rows = loops.make_rows(engine.encode(toy), prefix, threshold, num_decodes)
  by, rule = ENGINES[name]
  return loops.Loop(toy.config, rule, engine.LENGTH, by), rows, prefix


@pytest.mark.parametrize("name", ENGINES)
def test_it_is_our_own_decoder_and_replay_finds_the_same_exits(name):
  rule = ENGINES[name][1]
  toy = engine.toy_for(rule)

  def run(weights, threshold):
    loop, rows, prefix = bound(toy, name, threshold=threshold)
    cache = loop.empty_cache(weights, rows, len(prefix))
    step = loop.bind(weights, rows, EOS)
    tokens, scores, same_pass = loops.greedy_decode(prefix, cache, step, EOS)
    return tokens[:, 0], scores[:, 0], same_pass, loop.replay(weights, rows, tokens[:, 0], EOS)

  expected = engine.run(toy, rule, 0.6).generation
  tokens, scores, *both = compiled(run)(toy.weights.decoder, jnp.float32(0.6))
  np.testing.assert_array_equal(tokens, expected.tokens)
  np.testing.assert_allclose(scores, expected.scores, atol=1e-4)
  for found in both:
    for name, field in vars(found).items():
      np.testing.assert_allclose(field, getattr(expected, name), atol=1e-4)
  assert 1 < expected.mean_layers < 4 and np.any(expected.tokens == EOS)


@pytest.mark.parametrize("name", ENGINES)
def test_every_leaf_of_the_cache_has_its_rows_first_and_is_finite(name):
  toy = engine.toy_for(ENGINES[name][1])
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
  toy, order = engine.toy_for(ENGINES[name][1]), np.array([3, 3, 0, 1, 7, 6, 5, 2])
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


def caches_after(rule, tokens, forced) -> list[np.ndarray]:
  """Keys and values after every position of `tokens` was fed, forced or free."""
  toy, prefix = engine.toy(), jnp.asarray(tokens * forced, jnp.int32)
  rows = loops.make_rows(engine.encode(toy), prefix, 0.0)
  loop = loops.Loop(toy.config, rule, engine.LENGTH, engines.Eager())
  step = compiled(loop.bind(toy.weights.decoder, rows, EOS))
  cache = loop.empty_cache(toy.weights.decoder, rows, len(tokens))
  for i in range(engine.LENGTH - 1):
    current = jnp.asarray(tokens[:, i : i + 1], jnp.int32)
    _, cache = step(loops.LoopState(None, prefix, current, cache))
  carried = {name: leaf for name, leaf in cache.items() if name.startswith("carried_")}
  return [np.asarray(leaf) for leaf in jax.tree.leaves(carried)]


def test_a_prefix_runs_every_layer():
  tokens = np.arange(8 * engine.LENGTH).reshape(8, -1) % 30 + 5
  tokens[:, 0] = 0
  full = caches_after(exits.StaticExit(), tokens, 1)
  same = lambda a, b: all(np.allclose(x, y, atol=1e-5) for x, y in zip(a, b, strict=True))
  rule = exits.DynamicExits(confidence.Softmax())
  assert same(caches_after(rule, tokens, 1), full)
  assert not same(caches_after(rule, tokens, 0), full), "meta: free tokens leave early"


def test_real_tokens_end_with_eos_or_the_last_that_is_not_padding():
  tokens = jnp.array([[5, 1, 0, 0], [5, 6, 0, 0], [1, 7, 1, 9], [0, 0, 0, 0], [5, 0, 6, 0]])
  got = np.sum(loops.real_tokens(tokens, EOS), axis=1)
  np.testing.assert_array_equal(got, [2, 2, 1, 0, 3])


def test_greedy_decoding_refuses_several_decodes():
  with pytest.raises(ValueError, match="num_decodes"):
    loops.greedy_decode(jnp.zeros((1, 2), jnp.int32), {}, lambda s: s, EOS, num_decodes=3)
