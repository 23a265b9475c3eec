"""Products in 8 bits: whole sums of codes, whatever rows lie beside each other."""

import re

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies

from calm.t5 import eight_bits

INPUTS, OUTPUTS = 24, 40


def matrix_and_rows(seed: int, rows: int, outlier: float = 1.0):
  """float32 [inputs, outputs] and [rows, inputs], one number of either larger than the rest."""
  random = np.random.default_rng(seed)
  matrix = random.normal(size=(INPUTS, OUTPUTS)).astype(np.float32)
  x = random.normal(size=(rows, INPUTS)).astype(np.float32)
  matrix[random.integers(INPUTS), random.integers(OUTPUTS)] *= outlier
  x[random.integers(rows), random.integers(INPUTS)] *= outlier
  return matrix, x


def by_hand(matrix: np.ndarray, x: np.ndarray) -> np.ndarray:
  """The docstring's formula in whole numbers."""
  steps = np.abs(x).max(1, keepdims=True) / np.float32(127)
  scales = np.abs(matrix).max(0, keepdims=True) / np.float32(127)
  codes, weights = np.round(x / steps).astype(int), np.round(matrix / scales).astype(int)
  return (codes @ weights) * steps * scales


@pytest.mark.parametrize("rows", [1, 2, 3, 8])
@pytest.mark.parametrize("outlier", [1.0, 100.0])
@pytest.mark.usefixtures("unsigned")
def test_a_product_is_the_scaled_sum_of_the_codes_products(rows, outlier):
  matrix, x = matrix_and_rows(0, rows, outlier)
  made = eight_bits.quantize(jnp.asarray(matrix)).product(jnp.asarray(x))
  assert made.shape == (rows, OUTPUTS) and made.dtype == jnp.float32
  np.testing.assert_allclose(made, by_hand(matrix, x), rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("unsigned")
def test_a_rows_product_does_not_depend_on_the_rows_beside_it():
  matrix, x = matrix_and_rows(1, 7, 30.0)
  coded = eight_bits.quantize(jnp.asarray(matrix))
  every = np.asarray(coded.product(jnp.asarray(x)))
  for row, one in zip(x, every, strict=True):
    np.testing.assert_array_equal(coded.product(jnp.asarray(row[None]))[0], one)
  stacked = coded.product(jnp.asarray(np.stack([x, x[::-1]])))
  np.testing.assert_array_equal(stacked, np.stack([every, every[::-1]]))


@hypothesis.given(
  seed=strategies.integers(0, 2**16),
  outlier=strategies.floats(0.01, 1e4),
  rows=strategies.integers(1, 5),
)
@hypothesis.settings(max_examples=60, deadline=None)
def test_rounding_moves_a_product_by_half_a_step_a_number(seed, outlier, rows):
  """|w x - v y| <= |w - v| |x| + |v| |x - y|, in norms of the largest and of the sum."""
  matrix, x = matrix_and_rows(seed, rows, outlier)
  made = eight_bits.quantize(jnp.asarray(matrix)).product(jnp.asarray(x))
  wide, exact = x.astype(np.float64), x.astype(np.float64) @ matrix.astype(np.float64)
  steps = np.abs(wide).max(1, keepdims=True) / 254
  scales = np.abs(matrix.astype(np.float64)).max(0, keepdims=True) / 254
  bound = np.abs(wide).sum(1, keepdims=True) * scales
  bound = bound + (np.abs(matrix).sum(0, keepdims=True) + INPUTS * scales) * steps
  assert np.all(np.abs(made - exact) <= 1.001 * bound + 1e-6)


def test_8_bits_reach_the_product(unsigned):
  matrix, x = matrix_and_rows(2, 5)
  coded = eight_bits.quantize(jnp.asarray(matrix))
  text = jax.jit(coded.product).lower(x).as_text()
  side = "ui8" if unsigned else "i8"
  sides = rf"<5x{INPUTS}x{side}>, tensor<{OUTPUTS}x{INPUTS}xi8>"
  assert re.search(rf"dot_general.*{sides}\) -> tensor<5x{OUTPUTS}xi32>", text)


def test_zeros_have_no_nan():
  coded = eight_bits.quantize(jnp.zeros((INPUTS, OUTPUTS)))
  assert not np.any(coded.product(jnp.ones((2, INPUTS))))
  coded = eight_bits.quantize(jnp.ones((INPUTS, OUTPUTS)))
  assert not np.any(coded.product(jnp.zeros((2, INPUTS))))


def test_rows_keep_their_dtype():
  coded = eight_bits.quantize(jnp.ones((INPUTS, OUTPUTS), jnp.bfloat16))
  made = coded.product(jnp.ones((2, INPUTS), jnp.bfloat16))
  assert made.dtype == jnp.bfloat16 and np.all(np.asarray(made, np.float32) == INPUTS)
