"""The shortest way through everything: also run with the newest JAX
(scripts/test.sh).
"""

import pathlib

import numpy as np
import pytest

jax = pytest.importorskip("jax", reason="the smoke group decodes: it needs JAX")

import jax.numpy as jnp

import calm
from calm import checkpoints, t5

PROMPTS = ["A library to read ZIP archives.", "A puzzle game for the desktop."]


def test_a_model_is_loaded_decodes_and_leaves_early():
  model = calm.load("packed")
  full = model.generate(PROMPTS, threshold=calm.NEVER_EXIT)
  early = model.generate(PROMPTS, threshold=0.0)
  assert full.mean_layers == model.num_layers and all(full.texts)
  assert early.mean_layers < full.mean_layers


def test_logits_are_those_of_the_golden_file():
  folder = pathlib.Path(__file__).parent / "golden" / "huggingface" / "t5_1_1"
  checkpoint = checkpoints.load(folder)
  expected = np.load(folder / "expected.npz")
  inputs = (
    jnp.asarray(expected[n], jnp.int32)
    for n in ("input_ids", "decoder_input_ids")
  )
  tokens, outputs = inputs
  parameters = {"params": checkpoint.params}
  logits = t5.Transformer(checkpoint.config).apply(
    parameters, tokens, outputs, jnp.ones_like(outputs), enable_dropout=False
  )
  assert np.abs(np.asarray(logits) - expected["logits"]).max() < 1e-4
