"""Early exit as other loops call it, without T5X: caches that they shuffle,
replay, meshes.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from flax.linen import partitioning

from calm import exits
from calm.decode import engines
from calm.exits import confidence, propagation
from calm.t5 import network
from calm.t5x import loops
from tests import engine
from tests.t5x import setup

RULE = exits.DynamicExits(confidence.Softmax(), engine.DECAYING)
LEARNED = exits.DynamicExits(
  confidence.State(), engine.DECAYING, (1, 3), propagation.Learned()
)
# Name -> how steps run, and the rule.
ENGINES = {
  "eager": (engines.Eager, RULE),
  "deferred": (engines.Deferred, RULE),
  "compacted": (engines.Compacted, RULE),
  "learned": (engines.Deferred, LEARNED),
  "row_by_row": (None, LEARNED),
}
EOS = 1
NO_PREFIX = jnp.zeros((len(engine.PROMPTS), engine.LENGTH), jnp.int32)


@struct.dataclass
class State:
  """What of T5X's `DecodingState` a step reads."""

  sequences: jax.Array
  cur_token: jax.Array
  cache: dict


def bound(
  name, weights=None, threshold=0.4, prefix=NO_PREFIX, **given
) -> loops.Loop:
  """A toy's loop by the name of an engine."""
  by, rule = ENGINES[name]
  toy = engine.toy_for(rule)
  rows = loops.make_rows(engine.encode(toy), prefix, threshold, **given)
  return loops.Loop(
    toy.config, rule, weights or toy.weights.decoder, rows, EOS, by
  )


@pytest.mark.parametrize("name", ENGINES)
def test_it_is_our_own_decoder_and_replay_finds_the_same_exits(name):
  rule = ENGINES[name][1]
  toy = engine.toy_for(rule)

  def run(weights, threshold):
    loop = bound(name, weights, threshold)
    tokens, scores, made = loops.greedy_decode(NO_PREFIX, {}, loop, EOS)
    return tokens, scores, loop.exits_of(tokens, made), loop.exits_of(tokens)

  expected = engine.run(toy, rule, 0.6).generation
  tokens, scores, *both = setup.compiled(run)(
    toy.weights.decoder, jnp.float32(0.6)
  )
  np.testing.assert_array_equal(tokens[:, 0], expected.tokens)
  np.testing.assert_allclose(scores[:, 0], expected.scores, atol=1e-4)
  for found in both:
    assert found.keys() == {"exit_layers", *loops.MEASURED}
    for field, values in found.items():
      np.testing.assert_allclose(
        values[:, 0], getattr(expected, field), atol=1e-4
      )
  assert 1 < engine.mean_layers(expected) < 4 and np.any(expected.tokens == EOS)


@pytest.mark.parametrize("name", ["deferred", "learned"])
def test_shuffling_the_rows_of_a_cache_shuffles_what_follows(name):
  """What beam search does between two steps."""
  order = np.array([3, 3, 0, 1, 7, 6, 5, 2])
  loop = bound(name)
  same_prompt = jax.tree.map(
    lambda x: jnp.repeat(x[:1], 8, 0), loop.rows.encoded
  )
  rows = dataclasses.replace(loop.rows, encoded=same_prompt)
  step = setup.compiled(dataclasses.replace(loop, rows=rows))
  tokens = [jnp.arange(5, 13)[:, None], jnp.arange(20, 28)[:, None]]
  _, cache = step(State(NO_PREFIX, tokens[0], loop.empty_cache(8)))
  shuffled = jax.tree.map(lambda x: x[order] if x.ndim else x, cache)
  logits, _ = step(State(NO_PREFIX, tokens[1], cache))
  got, after = step(State(NO_PREFIX, tokens[1][order], shuffled))
  np.testing.assert_allclose(got, logits[order], atol=1e-4)
  assert after["cache_index"] == 2
  excluded = ("cache_index", "cached_bias", "position_embedder_index")
  for path, leaf in jax.tree.leaves_with_path(cache):
    assert all(isinstance(key, jax.tree_util.DictKey) for key in path)
    assert (
      leaf.shape[:1] == (8,) if path[-1].key not in excluded else leaf.ndim == 0
    )


def test_real_tokens_end_with_eos_or_the_last_that_is_not_padding():
  tokens = jnp.array(
    [[5, 1, 0, 0], [5, 6, 0, 0], [1, 7, 1, 9], [0, 0, 0, 0], [5, 0, 6, 0]]
  )
  got = np.sum(loops.real_tokens(tokens, EOS), axis=1)
  np.testing.assert_array_equal(got, [2, 2, 1, 0, 3])


def test_rows_are_split_along_axes_that_divide_them():
  mesh = jax.sharding.AbstractMesh((4, 2), ("data", "model"))
  assert loops.row_axes(mesh, 16) == ("data", "model")
  assert loops.row_axes(mesh, 12) == ("data",)
  assert loops.row_axes(mesh, 3) == ()
  assert loops.row_axes(mesh, object()) == (), "a symbolic batch is never split"
  assert (
    loops.row_axes(jax.sharding.AbstractMesh((1, 4), ("data", "model")), 6)
    == ()
  )
  assert loops.row_axes(jax.sharding.AbstractMesh((), ()), 8) == ()


def test_a_decoder_that_is_kept_whole_lies_along_no_mesh_axis():
  toy = engine.toy(**engine.MAPS)
  tokens = jnp.ones((1, 4), jnp.int32)
  init = network.Transformer(toy.config).init
  variables = jax.eval_shape(
    lambda key: init(key, tokens, tokens, tokens), jax.random.key(0)
  )

  def is_spec(x):
    return isinstance(x, jax.sharding.PartitionSpec)

  rules = [(name, "model") for name in ("vocab", "mlp", "joined_kv", "heads")]
  rules += [(name, None) for name in ("embed", "kv", "relpos_buckets")]

  def along(made):
    """Paths that lie along the model axis."""
    axes = partitioning.get_axis_names(made["params_axes"])
    found = jax.tree_util.tree_leaves_with_path(axes, is_leaf=is_spec)

    def meshed(spec):
      return partitioning.logical_to_mesh_axes(spec, rules)

    return {
      jax.tree_util.keystr(path)
      for path, spec in found
      if "model" in meshed(spec)
    }

  before = along(variables)
  after = along(loops.kept_whole(variables))
  assert after == {path for path in before if "'encoder'" in path}
  assert len(before) > len(after) > 0 and not any(
    "exit_" in path for path in before
  )
