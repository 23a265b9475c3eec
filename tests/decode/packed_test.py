"""What a program made comes back in one array, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calm import exits
from calm.decode import drafting, packed
from calm.decode import program as program_lib
from calm.exits import confidence
from tests import engine


@pytest.mark.parametrize(
  "rule",
  [
    exits.StaticExit(),
    exits.DynamicExits(confidence.Softmax()),
    exits.Verified(2, num_drafts=4, stop_below=0.0),
  ],
)
@pytest.mark.parametrize("rows", [1, 3])
def test_a_generation_comes_back_bit_for_bit(rule, rows):
  toy = engine.toy()
  active = np.arange(rows) != 1
  program = program_lib.Program(toy.config, rule, engine.LENGTH)
  encoded = engine.encode(toy, engine.PROMPTS[:rows])
  expected = program.decode(toy.weights, encoded, active, np.float32(0.4))
  known = np.array([0.4], np.float32)
  array = np.asarray(program.decode_packed(toy.weights, encoded, active, known))
  got = packed.unpacked(array, engine.LENGTH)
  assert jax.tree.structure(got) == jax.tree.structure(jax.device_get(expected))
  for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    assert ours.dtype == theirs.dtype and isinstance(ours, np.ndarray)
    np.testing.assert_array_equal(ours, theirs)
  assert np.any(got.tokens) and np.any(got.scores)


def test_bits_that_are_no_number_stay_as_they_are():
  generation = program_lib.loop.empty_generation(2, 3)
  odd = jnp.array([[jnp.nan, -0.0, jnp.inf], [1e-45, -jnp.inf, 1.0]], jnp.float32)
  generation = generation.replace(confidences=odd)
  array = np.asarray(jax.jit(packed.packed)(generation))
  got = packed.unpacked(array, 3).confidences
  np.testing.assert_array_equal(got.view(np.int32), np.asarray(odd).view(np.int32))


def test_what_is_known_of_drafts_is_sent_beside_the_threshold():
  toy, rule = engine.toy(), exits.Verified(2, num_drafts=4, stop_below=0.0)
  program = program_lib.Program(toy.config, rule, engine.LENGTH)
  encoded, active = engine.encode(toy, engine.PROMPTS[:1]), np.ones(1, bool)
  prior = drafting.Prior(0.02, 0.02, 100.0)
  values = jax.tree.map(np.float32, prior)
  expected = program.decode(toy.weights, encoded, active, np.float32(1.0), values)
  known = np.array([1.0, 0.02, 0.02, 100.0], np.float32)
  array = np.asarray(program.decode_packed(toy.weights, encoded, active, known))
  got = packed.unpacked(array, engine.LENGTH)
  np.testing.assert_array_equal(got.verification.counts, expected.verification.counts)
  np.testing.assert_array_equal(got.verification.expected, expected.verification.expected)
  other = program.decode(toy.weights, encoded, active, np.float32(1.0))
  assert np.any(other.verification.expected != expected.verification.expected)
