"""The T5 network: causality by gradients, padding, exits, and what it refuses.

`network_golden_test` holds trees, logits and caches against T5X's own.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calm.t5 import network
from tests import engine, toys

INPUTS = np.array([[5, 6, 7, 1, 0, 0]], np.int32)
# No token twice nor in the prompt, so that a row of the embedding is a position.
TOKENS = np.array([[20, 21, 22, 23, 24]], np.int32)
ALL_REAL = np.ones_like(TOKENS)
GATHER = dataclasses.replace(engine.toy().config, one_hot_embedding=False)


def apply(*args, params=None, config=GATHER, method=None, **options):
  model = network.Transformer(config)
  options.setdefault("enable_dropout", False)
  params = engine.toy().params if params is None else params
  return model.apply({"params": params}, *args, method=method, **options)


def influence(inputs=INPUTS, targets=ALL_REAL) -> np.ndarray:
  """Largest |d logits[t] / d embedding| by t and token id, [length, vocab]."""
  params = engine.toy().params
  mix = np.random.default_rng(0).normal(size=48).astype(np.float32)

  def mixed(table):
    changed = {**params, "token_embedder": {"embedding": table}}
    return apply(inputs, TOKENS, targets, params=changed)[0] @ mix

  table = jnp.asarray(params["token_embedder"]["embedding"])
  return np.abs(jax.jit(jax.jacrev(mixed))(table)).max(axis=-1)


def test_no_token_sees_later_ones_and_none_sees_padding():
  gradients = influence()
  by_position = gradients[:, TOKENS[0]]
  later = np.triu(np.ones((5, 5), bool), 1)
  assert (by_position[later] == 0).all()
  assert (by_position[~later] > 0).all()
  assert (gradients[:, 0] == 0).all()  # padding of the prompt
  assert (gradients[:, INPUTS[0, :4]] > 0).all()


@pytest.mark.parametrize("per_layer", [False, True])
def test_prompts_are_encoded_as_the_network_encodes_them(monkeypatch, per_layer):
  """However attention is laid out; of padding, which nobody reads, nothing is said."""
  sizes = toys.Config(num_heads=3)
  config = network.T5Config(**toys.network_fields(sizes), relpos_per_layer=per_layer)
  params = network.Transformer(config).init(
    jax.random.key(0), *[np.ones((1, 8), np.int32)] * 3, enable_dropout=False
  )["params"]
  prompts = np.random.default_rng(0).integers(1, sizes.vocab_size, (4, 9)).astype(np.int32)
  prompts[1, 5:], prompts[2] = 0, 0
  expected = network.Transformer(config).apply(
    {"params": params}, prompts, enable_dropout=False, method="encode"
  )
  real = prompts > 0
  laid_out = []
  mix = network._mix
  monkeypatch.setattr(network, "_mix", lambda *a: laid_out.append(len(a)) or mix(*a))
  made = network.encode(params, config, jnp.asarray(prompts))
  assert len(laid_out) == sizes.num_encoder_layers and np.isfinite(made).all()
  np.testing.assert_allclose(made[real], expected[real], rtol=1e-5, atol=1e-5)
  narrow = dataclasses.replace(config, dtype="bfloat16")
  assert network.encode(params, narrow, jnp.asarray(prompts)).dtype == jnp.bfloat16
  assert len(laid_out) == sizes.num_encoder_layers


def test_a_call_for_t5xs_own_cache_is_refused():
  with pytest.raises(ValueError, match=r"`decode=False`, got .*; decode by"):
    apply(INPUTS, TOKENS, ALL_REAL, decode=True)
