"""The T5 network: prompts, biases, what it refuses; `network_golden_test` has
trees and logits of T5X.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calm.t5 import layers, network
from tests import engine, toys


@pytest.mark.parametrize("per_layer", [False, True])
def test_prompts_are_encoded_as_the_network_encodes_them(per_layer):
  """Packed, too; of padding, which nobody reads, nothing is said."""
  pytest.importorskip("llvmlite")
  sizes = toys.Config(num_heads=3)
  config = network.T5Config(
    **toys.network_fields(sizes), relpos_per_layer=per_layer
  )
  params = network.Transformer(config).init(
    jax.random.key(0), *[np.ones((1, 8), np.int32)] * 3, enable_dropout=False
  )["params"]
  prompts = (
    np.random.default_rng(0)
    .integers(1, sizes.vocab_size, (4, 9))
    .astype(np.int32)
  )
  prompts[1, 5:], prompts[2] = 0, 0
  expected = network.Transformer(config).apply(
    {"params": params}, prompts, enable_dropout=False, method="encode"
  )
  real = prompts > 0
  packed = network.pack(prompts)
  assert len(packed.tokens) == 36 and packed.counts.tolist() == [9, 5, 0, 9]
  encode = functools.partial(
    network.encode, params, config, jnp.asarray(prompts)
  )
  for made in (
    encode(),
    network.apart(encode(packed), packed, prompts.shape[1]),
  ):
    np.testing.assert_allclose(made[real], expected[real], rtol=1e-5, atol=1e-5)
  narrow = dataclasses.replace(config, dtype="bfloat16")
  assert (
    network.encode(params, narrow, jnp.asarray(prompts)).dtype == jnp.bfloat16
  )
  # Embedded by their rows of the table, where training multiplies with it.
  whole = network.Transformer(config).bind({"params": params})
  ways = (
    lambda x: network.encode(params, config, x),
    lambda x: whole.encode(x, None, False),
  )
  one_hot = [
    f"4x9x{config.vocab_size}xf32" in jax.jit(w).lower(prompts).as_text()
    for w in ways
  ]
  assert one_hot == [False, True]


def test_a_call_for_t5xs_own_cache_is_refused():
  toy = engine.toy()
  tokens = np.ones((1, 4), np.int32)
  with pytest.raises(ValueError, match=r"`decode=False`, got .*; decode by"):
    network.Transformer(toy.config).apply(
      {"params": toy.params}, tokens, tokens, tokens, decode=True
    )


HEADS = 3
BUCKETS = 32
DISTANCE = 128
TABLE = (
  np.random.default_rng(0).normal(size=(HEADS, BUCKETS)).astype(np.float32)
)
LENGTHS = [(1, 7), (40, 23), (300, 300)]


def biases(table, *call, dtype=jnp.float32) -> Any:
  module = layers.RelativePositionBiases(
    network.T5Config(8, dtype, num_heads=HEADS)
  )
  return module.apply({"params": {"rel_embedding": table}}, *call)


def pair_buckets(lengths: tuple[int, int], bidirectional: bool) -> np.ndarray:
  queries, keys = lengths
  relative = np.arange(keys)[None, :] - np.arange(queries)[:, None]
  return layers.relative_position_buckets(
    relative, bidirectional, BUCKETS, DISTANCE
  )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_biases_are_the_tables_numbers_to_the_bit(
  lengths, bidirectional, dtype
):
  expected = TABLE.astype(dtype)[:, pair_buckets(lengths, bidirectional)]
  got = biases(TABLE, *lengths, bidirectional, dtype=dtype)
  assert got.dtype == dtype and got.shape == (1, HEADS, *lengths)
  np.testing.assert_array_equal(got[0], expected)


def test_biases_and_their_gradient_neither_gather_nor_scatter():
  """TPUs and partitioned programs are slow at both."""

  def loss(table):
    return biases(table, 5, 9, True).sum()

  text = str(jax.make_jaxpr(jax.value_and_grad(loss))(TABLE))
  assert (
    "dot_general" in text and "gather" not in text and "scatter" not in text
  )


def constant_bytes(length: int, **changes) -> int:
  """What `encode` of prompts of that length embeds in its program."""
  model = network.Transformer(
    dataclasses.replace(engine.toy().config, **changes)
  )
  tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)

  def make(tokens):
    return model.init(
      jax.random.key(0),
      tokens,
      tokens[:, :4],
      tokens[:, :4],
      enable_dropout=False,
    )

  def run(params, tokens):
    return model.apply(params, tokens, enable_dropout=False, method="encode")

  traced = jax.make_jaxpr(run)(jax.eval_shape(make, tokens), tokens)
  return sum(np.asarray(constant).nbytes for constant in traced.consts)


def test_an_encoders_constants_grow_with_its_length_not_its_square():
  short = constant_bytes(512)
  long = constant_bytes(1024)
  assert long < 1024 * 1024 * 8
  assert 0 < long <= 2 * short + 2**10
