"""Where heads lie side by side in the caches, as on a TPU, every engine decodes
the same.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calm import exits
from calm.decode import engines
from calm.decode import program as program_lib
from calm.exits import confidence
from calm.t5 import caches as caches_lib
from calm.t5 import platforms
from tests import engine


def decoded(name: str, platform: str):
  """The final state with the caches of a platform, traced anew; the caches
  heads apart.
  """
  toy = engine.toy()
  rule = exits.DynamicExits(confidence.Classifier())
  program = program_lib.Program(
    toy.config, rule, engine.LENGTH, engine=getattr(engines, name)
  )
  encoded = engine.encode(toy)
  if platform == "tpu":

    def beside(x):
      return caches_lib.Cache(_beside(x.keys), _beside(x.values))

    encoded = encoded.replace(cross=tuple(map(beside, encoded.cross)))

  def run(*args):
    return program.decode_state(toy.weights, *args)

  args = encoded, jnp.ones(len(engine.PROMPTS), bool), jnp.float32(0.5)
  with platforms.laid_out_for(platform):
    options = {"xla_backend_optimization_level": 0}
    state = jax.jit(run, compiler_options=options)(*args)
  if platform == "tpu":
    assert all(cache.keys.ndim == 3 for cache in state.cache)

    def apart(x):
      return _apart(x, toy.config.num_heads)

    state = state.replace(cache=jax.tree.map(apart, state.cache))
  return state


def _apart(beside: jax.Array, heads: int) -> jax.Array:
  split = beside.reshape(*beside.shape[:2], heads, -1)
  return jnp.transpose(split, (0, 2, 1, 3))


def _beside(apart: jax.Array) -> jax.Array:
  return jnp.transpose(apart, (0, 2, 1, 3)).reshape(
    apart.shape[0], apart.shape[2], -1
  )


@functools.cache
def plain():
  return decoded("Eager", "cpu")


@pytest.mark.parametrize("name", ["Compacted", "Deferred", "Eager"])
def test_heads_side_by_side_change_nothing(name):
  state = decoded(name, "tpu")
  layers = set(np.asarray(state.generation.exit_layers).ravel().tolist())
  assert len(layers - {0}) > 1
  for i in range(len(engine.PROMPTS)):
    engine.assert_same_row(state, plain(), i, i)
    engine.assert_same_confidences(state.generation, plain().generation, i, i)


def test_a_prompts_keys_and_values_are_the_same_numbers_in_either_layout():
  toy = engine.toy()
  states = jnp.sin(jnp.arange(2.0 * 5 * toy.config.emb_dim)).reshape(2, 5, -1)
  made = {}
  for platform in ("cpu", "tpu"):
    with platforms.laid_out_for(platform):
      made[platform] = caches_lib.cross_attention_inputs(
        toy.weights.decoder, toy.config, states, jnp.ones((2, 5), jnp.int32)
      ).cross
  for apart, beside in zip(made["cpu"], made["tpu"], strict=True):
    np.testing.assert_array_equal(_beside(apart.keys), beside.keys)
    np.testing.assert_array_equal(_beside(apart.values), beside.values)
