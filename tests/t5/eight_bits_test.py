"""8 bits: products are whole sums of codes; the largest logit is the float32
head's.
"""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies

from calm.t5 import eight_bits, kernels

INPUTS = 24
OUTPUTS = 40
PIECES = 200


@pytest.fixture(params=["by XLA", "tiled"])
def quantize(request):
  """The ways to multiply a matrix in 8 bits, whatever the machine likes."""
  if request.param == "tiled" and not kernels.multiplies_codes():
    pytest.skip("needs llvmlite and a processor with AVX-512 VNNI")
  return lambda matrix: eight_bits.quantize(
    jnp.asarray(matrix), request.param == "tiled"
  )


def matrix_and_rows(
  seed: int, rows: int, outlier: float = 1.0, outputs: int = OUTPUTS
):
  """float32 [inputs, outputs] and [rows, inputs]; a number of either is above
  the rest.
  """
  random = np.random.default_rng(seed)
  matrix = random.normal(size=(INPUTS, outputs)).astype(np.float32)
  x = random.normal(size=(rows, INPUTS)).astype(np.float32)
  matrix[random.integers(INPUTS), random.integers(outputs)] *= outlier
  x[:, random.integers(INPUTS)] *= outlier
  return matrix, x


def by_hand(matrix: np.ndarray, x: np.ndarray, tiled: bool) -> np.ndarray:
  """The docstring's formula in whole numbers, or of rows that stay as they
  are.
  """
  steps = np.abs(x).max(1, keepdims=True) / np.float32(127)
  scales = np.abs(matrix).max(0, keepdims=True) / np.float32(127)
  codes = np.round(x / steps).astype(int)
  weights = np.round(matrix / scales).astype(int)
  return (codes @ weights) * steps * scales if tiled else (x @ weights) * scales


@pytest.mark.parametrize("rows", [1, 2, 3, 8])
@pytest.mark.parametrize("outlier", [1.0, 100.0])
def test_a_product_is_the_scaled_sum_of_the_codes_products(
  quantize, rows, outlier
):
  matrix, x = matrix_and_rows(0, rows, outlier)
  coded = quantize(matrix)
  made = coded.product(jnp.asarray(x))
  assert made.shape == (rows, OUTPUTS) and made.dtype == jnp.float32
  np.testing.assert_allclose(
    made, by_hand(matrix, x, coded.tiled), rtol=1e-5, atol=1e-4
  )


def test_zeros_have_no_nan_and_rows_keep_their_dtype(quantize):
  nothing = quantize(jnp.zeros((INPUTS, OUTPUTS)))
  assert not np.any(nothing.product(jnp.ones((2, INPUTS))))
  coded = quantize(jnp.ones((INPUTS, OUTPUTS), jnp.bfloat16))
  made = coded.product(jnp.zeros((2, INPUTS)).at[1, 0].set(jnp.nan))
  assert not np.any(made[0]) and np.isnan(made[1]).all()
  made = coded.product(jnp.ones((2, INPUTS), jnp.bfloat16))
  assert made.dtype == jnp.bfloat16 and np.all(
    np.asarray(made, np.float32) == INPUTS
  )
  if kernels.available():
    head = eight_bits.quantize_head(jnp.zeros((INPUTS, PIECES)))
    assert not np.asarray(head.logits(jnp.zeros((2, INPUTS)))).any()


native = pytest.mark.skipif(not kernels.available(), reason="needs llvmlite")


@native
@pytest.mark.parametrize(
  ("batch", "pieces"), [(1, PIECES), (8, PIECES), (2, 23), (13, 1040)]
)
@pytest.mark.parametrize("outlier", [1.0, 100.0])
def test_the_largest_logit_is_the_full_heads(batch, pieces, outlier):
  made = jax.jit(lambda head, x: head.logits(x))
  for seed in range(10):
    head, states = matrix_and_rows(seed, batch, outlier, pieces)
    coded = eight_bits.quantize_head(jnp.asarray(head))
    expected = states @ head
    got = np.asarray(made(coded, states))
    norms = np.linalg.norm(states, axis=1)
    np.testing.assert_array_equal(got.argmax(-1), expected.argmax(-1))
    np.testing.assert_allclose(got.max(-1), expected.max(-1), rtol=1e-5)
    # Pieces that cannot be the most likely stay rounded: each logit by at most
    # its slack.
    assert (np.abs(got - expected) <= np.outer(norms, coded.slack)).all()


@native
@hypothesis.given(
  seed=strategies.integers(0, 10**6),
  outlier=strategies.sampled_from([0.0, 1.0, 30.0, 1e4]),
  batch=strategies.sampled_from([1, 2, 4, 12]),
)
@hypothesis.settings(max_examples=25, deadline=None)
def test_rounding_changes_no_logit_by_more_than_the_slack(seed, outlier, batch):
  head, states = matrix_and_rows(seed, batch, outlier, PIECES)
  made = eight_bits.quantize_head(jnp.asarray(head))
  logits = np.asarray(made.rounded(jnp.asarray(states)))
  slack = np.outer(np.linalg.norm(states, axis=1), made.slack)
  assert (
    np.abs(logits - states.astype(np.float64) @ head.astype(np.float64))
    <= slack
  ).all()
  # And the bound is of use: most of what it allows is what was rounded, not a
  # constant.
  norms = (
    np.linalg.norm(states, axis=1).max() * np.linalg.norm(head, axis=0).max()
  )
  assert np.median(slack) < 0.1 * norms


@native
def test_however_many_pieces_are_in_question_they_are_scored_again():
  """Sixty pieces a hair apart, all of which the bound allows to be first."""
  head, states = matrix_and_rows(0, 2, outputs=PIECES)
  first = states[0] / np.linalg.norm(states[0])
  for i in range(60):
    head[:, 100 + i] = 9 * first * (1 + 1e-5 * i)
  made, states = (
    eight_bits.quantize_head(jnp.asarray(head)),
    jnp.asarray(states),
  )
  logits = np.asarray(made.logits(states))[0]
  np.testing.assert_allclose(
    logits[100:160], made.whole(states)[0, 100:160], rtol=1e-6
  )
  assert logits.argmax() == 159
  assert not np.isin(made.rounded(states)[0, 100:160], logits).all()
