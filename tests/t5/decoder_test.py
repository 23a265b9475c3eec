"""The one-position decoder against the network and the numpy yardstick, on the
same tree.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calm import exits
from calm.exits import confidence, layers, propagation
from calm.t5 import attention as attention_lib
from calm.t5 import caches as caches_lib
from calm.t5 import decoder as decoder_lib
from calm.t5 import decoder_weights
from calm.t5 import layers as layers_lib
from tests import engine, reference_network

LENGTH = 6
PROMPTS = engine.PROMPTS[:3]
FIRST_MAP = {"exit_propagation": (1,), "exit_propagation_rank": 2}


def test_learned_propagation_that_a_model_lacks_is_refused_by_name():
  learned = exits.DynamicExits(
    confidence.State(), propagation=propagation.Learned()
  )
  for toy, found in (
    (engine.toy(), "none"),
    (engine.toy(**FIRST_MAP), r"\[1\]"),
  ):
    with pytest.raises(
      ValueError, match=rf"exit layers \[1, 2, 3\], got.*{found}; fit it"
    ):
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


def test_biases_by_distance_with_the_future_masked():
  # beyond the distance where buckets end
  toy = engine.toy()
  length = 200
  table = attention_lib.bias_table(toy.weights.decoder, toy.config, length)
  rel = toy.params["decoder"]["relpos_bias"]["rel_embedding"]
  for t in (0, 1, 17, 199):
    (got,) = map(np.asarray, table.at(jnp.int32(t)))
    expected = reference_network.position_bias(toy.reference, "decoder", t, t)
    np.testing.assert_array_equal(got[:, :t], expected)
    assert (got[:, t:] == layers_lib.MASK_BIAS).all()
  np.testing.assert_array_equal(table.current[0], rel[:, 0])


def test_a_vocabulary_larger_than_the_model_is_refused():
  toy = engine.toy()
  for pieces in (0, 49):
    with pytest.raises(
      ValueError, match=rf"at most 48 pieces.*got {pieces}; this vocabulary"
    ):
      decoder_weights.decoder_weights(toy.params, toy.config, pieces)


def test_a_model_without_classifier_says_so():
  decoder = decoder_step(engine.toy(exit_classifier=False))
  with pytest.raises(
    ValueError, match="exit classifier for the measure 'classifier'"
  ):
    decoder.exit_logit(jnp.ones((3, 16)))
  with pytest.raises(
    ValueError, match=r"exit probes for the measure 'probe'.*exit_probes.gin"
  ):
    decoder.probe_logit(2, *[jnp.ones((3, 16))] * 3)


def test_windows_read_caches_and_prompts_however_their_heads_lie():
  def normal(*shape):
    return jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)

  apart = caches_lib.Cache(normal(2, 2, 5, 8), normal(2, 2, 5, 8))
  query = normal(6, 2, 8)
  merged = jax.tree.map(
    lambda x: jnp.moveaxis(x, 1, 2).reshape(2, 5, 16), apart
  )
  made = []
  for cache in (apart, merged):
    biases = normal(2, 2, 3, 5), normal(2, 1, 5)
    window = attention_lib.WindowAttention(
      cache, biases[0], cache, biases[1], False
    )
    row = layers.KeyValue(query, query)
    made.append((window.to_past(query, row), window.to_prompt(query)))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *made
  )
