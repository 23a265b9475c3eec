"""The T5 network: prompts, and what it refuses; `network_golden_test` holds trees and logits
against T5X's own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calm.t5 import network
from tests import engine, toys


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
  toy, tokens = engine.toy(), np.ones((1, 4), np.int32)
  with pytest.raises(ValueError, match=r"`decode=False`, got .*; decode by"):
    network.Transformer(toy.config).apply(
      {"params": toy.params}, tokens, tokens, tokens, decode=True
    )
