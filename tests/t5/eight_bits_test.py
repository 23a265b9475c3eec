"""8 bits: products are whole sums of codes; the largest logit is the float32 head's."""

import itertools
import re

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies

from calm.exits import layers
from calm.t5 import eight_bits, kernels, platforms

INPUTS, OUTPUTS, PIECES = 24, 40, 200


@pytest.fixture(params=["signed", "unsigned", "tiled"])
def quantize(request, monkeypatch):
  """The ways to multiply a matrix in 8 bits, whatever the machine likes."""
  monkeypatch.setattr(platforms, "multiplies_unsigned", lambda: request.param == "unsigned")
  if request.param == "tiled" and not kernels.multiplies_codes():
    pytest.skip("needs llvmlite and a processor with AVX-512 VNNI")
  return lambda matrix: eight_bits.quantize(jnp.asarray(matrix), request.param == "tiled")


def matrix_and_rows(seed: int, rows: int, outlier: float = 1.0, outputs: int = OUTPUTS):
  """float32 [inputs, outputs] and [rows, inputs]; a number of either is above the rest."""
  random = np.random.default_rng(seed)
  matrix = random.normal(size=(INPUTS, outputs)).astype(np.float32)
  x = random.normal(size=(rows, INPUTS)).astype(np.float32)
  matrix[random.integers(INPUTS), random.integers(outputs)] *= outlier
  x[:, random.integers(INPUTS)] *= outlier
  return matrix, x


def by_hand(matrix: np.ndarray, x: np.ndarray) -> np.ndarray:
  """The docstring's formula in whole numbers."""
  steps = np.abs(x).max(1, keepdims=True) / np.float32(127)
  scales = np.abs(matrix).max(0, keepdims=True) / np.float32(127)
  codes, weights = np.round(x / steps).astype(int), np.round(matrix / scales).astype(int)
  return (codes @ weights) * steps * scales


@pytest.mark.parametrize("rows", [1, 2, 3, 8])
@pytest.mark.parametrize("outlier", [1.0, 100.0])
def test_a_product_is_the_scaled_sum_of_the_codes_products(quantize, rows, outlier):
  matrix, x = matrix_and_rows(0, rows, outlier)
  made = quantize(matrix).product(jnp.asarray(x))
  assert made.shape == (rows, OUTPUTS) and made.dtype == jnp.float32
  np.testing.assert_allclose(made, by_hand(matrix, x), rtol=1e-5, atol=1e-6)


def test_zeros_have_no_nan_and_rows_keep_their_dtype(quantize):
  nothing = quantize(jnp.zeros((INPUTS, OUTPUTS)))
  assert not np.any(nothing.product(jnp.ones((2, INPUTS))))
  coded = quantize(jnp.ones((INPUTS, OUTPUTS), jnp.bfloat16))
  made = coded.product(jnp.zeros((2, INPUTS)).at[1, 0].set(jnp.nan))
  assert not np.any(made[0]) and np.isnan(made[1]).all()
  made = coded.product(jnp.ones((2, INPUTS), jnp.bfloat16))
  assert made.dtype == jnp.bfloat16 and np.all(np.asarray(made, np.float32) == INPUTS)
  head = eight_bits.quantize_head(jnp.zeros((INPUTS, PIECES)))
  assert not np.asarray(head.logits(jnp.zeros((2, INPUTS)))).any()


@pytest.mark.parametrize("unsigned", [False, True])
def test_8_bits_reach_the_product(monkeypatch, unsigned):
  monkeypatch.setattr(platforms, "multiplies_unsigned", lambda: unsigned)
  matrix, x = matrix_and_rows(2, 5)
  coded = eight_bits.quantize(jnp.asarray(matrix))
  text = jax.jit(coded.product).lower(x).as_text()
  side = "ui8" if unsigned else "i8"
  sides = rf"<5x{INPUTS}x{side}>, tensor<{OUTPUTS}x{INPUTS}xi8>"
  assert re.search(rf"dot_general.*{sides}\) -> tensor<5x{OUTPUTS}xi32>", text)


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("outlier", [1.0, 100.0])
@pytest.mark.usefixtures("quantize")
def test_the_largest_logit_is_the_full_heads(batch, outlier):
  logits = jax.jit(lambda head, states: head.logits(states))
  for seed in range(20):
    head, states = matrix_and_rows(seed, batch, outlier, PIECES)
    expected = states @ head
    got = np.asarray(logits(eight_bits.quantize_head(jnp.asarray(head)), states))
    np.testing.assert_array_equal(got.argmax(-1), expected.argmax(-1))
    np.testing.assert_allclose(got.max(-1), expected.max(-1), rtol=1e-5)


@pytest.fixture(params=["kernel", "xla"])
def finds(request, monkeypatch):
  """The kernel looks through logits however few they are, or XLA does."""
  monkeypatch.setattr(kernels, "_LEAST_LOGITS", 0 if request.param == "kernel" else 2**31)
  return request.param


@pytest.mark.parametrize(
  ("finds", "batch", "pieces"),
  [*itertools.product(["xla"], [1, 8], [24, PIECES, 1040]), ("kernel", 13, 1040)],
  indirect=["finds"],
)
@pytest.mark.usefixtures("quantize")
def test_the_most_likely_piece_is_known_without_all_logits(finds, batch, pieces):
  """Pieces of whole groups, of a group that is not whole, and too few for candidates."""
  both = jax.jit(lambda head, x: (head.greedy(x), layers.greedy(head.logits(x))))
  for seed in range(5):
    head, states = map(jnp.asarray, matrix_and_rows(seed, batch, outputs=pieces))
    made = eight_bits.quantize_head(head)
    got, expected = both(made, states)
    np.testing.assert_array_equal(got.token, expected.token)
    assert got.token.dtype == jnp.int32
    if finds == "xla":
      np.testing.assert_allclose(got.log_probability, expected.log_probability, atol=1e-5)
    # Pieces that cannot be the most likely stay rounded: each logit by at most its slack.
    error = got.log_probability - layers.greedy(made.whole(states)).log_probability
    assert (np.abs(error) <= np.max(made.rounded(states)[1], axis=1)).all()


@hypothesis.given(
  seed=strategies.integers(0, 10**6),
  outlier=strategies.sampled_from([0.0, 1.0, 30.0, 1e4]),
  # One row is coded twice, more are once.
  batch=strategies.sampled_from([1, 2, 4, 12]),
)
@hypothesis.settings(max_examples=25, deadline=None)
def test_rounding_changes_no_logit_by_more_than_the_slack(seed, outlier, batch):
  head, states = matrix_and_rows(seed, batch, outlier, PIECES)
  logits, slack = eight_bits.quantize_head(jnp.asarray(head)).rounded(jnp.asarray(states))
  exact = states.astype(np.float64) @ head.astype(np.float64)
  assert (np.abs(np.asarray(logits) - exact) <= slack).all()
  # And the bound is of use: most of what it allows is what was rounded, not a constant.
  norms = np.linalg.norm(states, axis=1).max() * np.linalg.norm(head, axis=0).max()
  assert np.median(slack) < 0.1 * norms


@pytest.mark.usefixtures("finds")
def test_where_more_pieces_are_in_question_the_full_head_is_asked():
  """Sixty pieces a hair apart: thirty-two scores do not settle which is first."""
  head, states = matrix_and_rows(0, 2, outputs=PIECES)
  first = states[0] / np.linalg.norm(states[0])
  for i in range(60):
    head[:, 100 + i] = 9 * first * (1 + 1e-5 * i)
  made = eight_bits.quantize_head(jnp.asarray(head))
  logits = np.asarray(made.logits(jnp.asarray(states)))
  np.testing.assert_array_equal(logits, np.asarray(made.whole(jnp.asarray(states))))
  assert logits[0].argmax() == 159
  said, asked = made.greedy(jnp.asarray(states)), layers.greedy(jnp.asarray(logits))
  assert said.token.tolist() == asked.token.tolist() and said.token[0] == 159
  np.testing.assert_allclose(said.log_probability, asked.log_probability, rtol=1e-6)
  # The rounded head does not know it.
  assert not np.array_equal(np.asarray(made.rounded(jnp.asarray(states))[0]), logits)
