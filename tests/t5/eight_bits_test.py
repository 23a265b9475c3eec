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

INPUTS, OUTPUTS = 24, 40


@pytest.fixture(params=[False, True], ids=["signed", "unsigned"])
def unsigned(request, monkeypatch):
  """Both ways to multiply, whatever the machine likes."""
  monkeypatch.setattr(platforms, "multiplies_unsigned", lambda: request.param)
  return request.param


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


@pytest.mark.usefixtures("unsigned")
def test_zeros_have_no_nan_and_rows_keep_their_dtype():
  nothing = eight_bits.quantize(jnp.zeros((INPUTS, OUTPUTS)))
  assert not np.any(nothing.product(jnp.ones((2, INPUTS))))
  coded = eight_bits.quantize(jnp.ones((INPUTS, OUTPUTS), jnp.bfloat16))
  assert not np.any(coded.product(jnp.zeros((2, INPUTS))))
  made = coded.product(jnp.ones((2, INPUTS), jnp.bfloat16))
  assert made.dtype == jnp.bfloat16 and np.all(np.asarray(made, np.float32) == INPUTS)
  head = eight_bits.quantize_head(jnp.zeros((EMB, PIECES)))
  assert not np.asarray(head.logits(jnp.zeros((2, EMB)))).any()


def test_8_bits_reach_the_product(unsigned):
  matrix, x = matrix_and_rows(2, 5)
  coded = eight_bits.quantize(jnp.asarray(matrix))
  text = jax.jit(coded.product).lower(x).as_text()
  side = "ui8" if unsigned else "i8"
  sides = rf"<5x{INPUTS}x{side}>, tensor<{OUTPUTS}x{INPUTS}xi8>"
  assert re.search(rf"dot_general.*{sides}\) -> tensor<5x{OUTPUTS}xi32>", text)


EMB, PIECES = 24, 200


def head_and_states(seed: int, batch: int, outlier: float = 1.0):
  """Float32 [emb, pieces] and [batch, emb], one number of either much larger than the rest."""
  random = np.random.default_rng(seed)
  head = random.normal(size=(EMB, PIECES)).astype(np.float32)
  states = random.normal(size=(batch, EMB)).astype(np.float32)
  head[random.integers(EMB), random.integers(PIECES)] *= outlier
  states[:, random.integers(EMB)] *= outlier
  return head, states


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("outlier", [1.0, 100.0])
@pytest.mark.usefixtures("unsigned")
def test_the_largest_logit_is_the_full_heads(batch, outlier):
  logits = jax.jit(lambda head, states: head.logits(states))
  for seed in range(20):
    head, states = head_and_states(seed, batch, outlier)
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
@pytest.mark.usefixtures("unsigned")
def test_the_most_likely_piece_is_known_without_all_logits(finds, batch, pieces):
  """Pieces of whole groups, of a group that is not whole, and too few for candidates."""
  random, both = (
    np.random.default_rng(pieces + batch),
    jax.jit(lambda head, x: (head.greedy(x), layers.greedy(head.logits(x)))),
  )
  for _ in range(5):
    head = random.normal(size=(EMB, pieces)).astype(np.float32)
    states = jnp.asarray(random.normal(size=(batch, EMB)).astype(np.float32))
    made = eight_bits.quantize_head(jnp.asarray(head))
    got, expected = both(made, states)
    np.testing.assert_array_equal(got.token, expected.token)
    assert got.token.dtype == jnp.int32
    if finds == "xla":
      np.testing.assert_allclose(got.log_probability, expected.log_probability, atol=1e-5)
    # Pieces that cannot be the most likely stay rounded: each logit by at most its slack.
    exact = layers.greedy(made.whole(states)).log_probability
    assert (
      np.abs(got.log_probability - exact) <= np.max(made.rounded(states)[1], axis=1)
    ).all()


@hypothesis.given(
  seed=strategies.integers(0, 10**6),
  outlier=strategies.sampled_from([0.0, 1.0, 30.0, 1e4]),
  # One row is coded twice, more are once.
  batch=strategies.sampled_from([1, 2, 4, 12]),
)
@hypothesis.settings(max_examples=25, deadline=None)
def test_rounding_changes_no_logit_by_more_than_the_slack(seed, outlier, batch):
  head, states = head_and_states(seed, batch, outlier)
  logits, slack = eight_bits.quantize_head(jnp.asarray(head)).rounded(jnp.asarray(states))
  exact = states.astype(np.float64) @ head.astype(np.float64)
  allowed = np.asarray(slack)
  assert (np.abs(np.asarray(logits) - exact) <= allowed).all()
  # And the bound is of use: most of what it allows is what was rounded, not a constant.
  assert (
    np.median(allowed)
    < 0.1 * np.linalg.norm(states, axis=1).max() * np.linalg.norm(head, axis=0).max()
  )


@pytest.mark.usefixtures("finds")
def test_where_more_pieces_are_in_question_the_full_head_is_asked():
  """Sixty pieces a hair apart: thirty-two scores do not settle which is first."""
  head, states = head_and_states(0, 2)
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
