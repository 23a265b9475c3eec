"""Products of a few rows, and the most likely token of logits, by functions of this process."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("llvmlite")

from calm import exits
from calm.decode import program as program_lib
from calm.exits import layers
from calm.t5 import native, platforms
from calm.t5.native import calls, products
from tests import engine


@pytest.fixture(autouse=True)
def anywhere(monkeypatch):
  """Products are native, whatever this machine has."""
  monkeypatch.setattr(platforms, "has_wide_vectors", lambda: True)


def drawn(*shape: int) -> jax.Array:
  return jnp.asarray(np.random.default_rng(shape[-1]).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("rows", [2, 3, 7, 8, 9, 15, 16])
@pytest.mark.parametrize(
  ("inputs", "outputs"), [(1, 1), (5, 16), (16, 17), (17, 250), (33, 31), (128, 384), (100, 96)]
)
def test_products_are_those_of_numpy(rows, inputs, outputs):
  x, matrix = drawn(rows, inputs), drawn(inputs, outputs)
  made = jax.jit(native.product)(x, matrix)
  expected = np.asarray(x, np.float64) @ np.asarray(matrix, np.float64)
  np.testing.assert_allclose(made, expected, rtol=1e-5, atol=1e-5 * np.sqrt(inputs))


def test_a_row_is_the_same_whoever_stands_beside_it():
  """So a text does not depend on its batch, but for the sizes at which XLA takes over."""
  x, matrix = drawn(16, 100), drawn(100, 250)
  whole = native.product(x, matrix)
  for rows in range(2, 16):
    np.testing.assert_array_equal(native.product(x[:rows], matrix), whole[:rows])


def test_nan_stays_in_its_row_and_column():
  x, matrix = drawn(9, 20).at[4, 3].set(jnp.nan), drawn(20, 40).at[7, 33].set(jnp.inf)
  made = native.product(x, matrix)
  assert jnp.isnan(made[4]).all() and jnp.isinf(made[:, 33][jnp.arange(9) != 4]).all()
  others = np.delete(np.delete(np.asarray(made), 4, axis=0), 33, axis=1)
  assert np.isfinite(others).all()


def test_one_thread_multiplies_few_rows_and_small_layers(monkeypatch):
  matrix = drawn(64, 64)
  assert native.alone(matrix, 1) and native.alone(matrix, products.MOST_ROWS)
  assert not native.alone(matrix, products.MOST_ROWS + 1)
  assert not native.alone(drawn(1024, 1024), 8)
  assert not native.alone(matrix.astype(jnp.bfloat16), 8)
  with platforms.laid_out_for("tpu"):
    assert not native.alone(matrix, 8)
  for owner, name, value in (
    (platforms, "has_wide_vectors", False),
    (calls, "_has_llvmlite", False),
  ):
    with monkeypatch.context() as patch:
      patch.setattr(owner, name, lambda value=value: value)
      assert not native.alone(matrix, 8)


def test_some_products_are_left_to_xla():
  x, matrix = drawn(8, 64), drawn(64, 64)
  assert native.product(x, matrix) is not None
  assert native.product(x[:1], matrix) is None  # XLA has code of its own for one
  assert native.product(drawn(8, 1024), drawn(1024, 2048)) is None
  assert native.product(x, matrix.astype(jnp.bfloat16)) is None


@pytest.mark.parametrize("pieces", [1, 2, 15, 16, 17, 33, 1000])
@pytest.mark.parametrize("rows", [1, 5])
def test_the_most_likely_token_is_xlas(rows, pieces):
  logits = 5 * drawn(rows, pieces)
  got, expected = native.likeliest(logits), layers.greedy(logits)
  np.testing.assert_array_equal(got.token, expected.token)
  assert got.token.dtype == jnp.int32
  np.testing.assert_allclose(
    got.log_probability, expected.log_probability, rtol=1e-5, atol=1e-6
  )


def test_of_equal_logits_the_first_is_taken():
  for first, second in itertools.combinations((0, 3, 17, 31, 32, 39), 2):
    logits = drawn(2, 40).at[1, jnp.array([first, second])].set(9.0)
    assert native.likeliest(logits).token[1] == first
  assert native.likeliest(jnp.ones((1, 40))).token[0] == 0


def test_unlikely_tokens_count_as_little_as_they_do_and_nan_shows():
  far = jnp.zeros((3, 20)).at[0, 1:].set(-1e30).at[1, 1:].set(-jnp.inf).at[2, 4].set(jnp.nan)
  made = native.likeliest(far).log_probability
  np.testing.assert_array_equal(made[:2], 0.0)
  assert jnp.isnan(made[2])


def test_many_logits_are_left_to_xla():
  assert native.likeliest(jnp.zeros((3, 32128))) is None
  assert native.likeliest(jnp.zeros((1, 32128))) is not None


@pytest.mark.parametrize(
  "rule",
  [
    exits.StaticExit(),
    *(exits.Verified(1, 3, "full", adapts=adapts) for adapts in (True, False)),
  ],
  ids=["static", "drafts that adapt", "drafts"],
)
def test_programs_decode_the_same(rule):
  toy, active = engine.toy(), jnp.arange(len(engine.PROMPTS)) != 3
  made = []
  for allowed in (True, False):
    program = program_lib.Program(toy.config, rule, engine.LENGTH, native=allowed)
    args = toy.weights, engine.encode(toy), active, jnp.float32(1)
    lowered = jax.jit(lambda *args, program=program: program.decode_state(*args)).lower(*args)
    assert ("calm_product" in lowered.as_text()) == allowed
    assert ("calm_greedy" in lowered.as_text()) == allowed
    made.append(lowered.compile()(*args).generation)
  np.testing.assert_array_equal(made[0].tokens, made[1].tokens)
  np.testing.assert_allclose(made[0].scores, made[1].scores, rtol=1e-4, atol=1e-5)
