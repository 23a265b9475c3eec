"""A head in 8 bits: the largest logit is the float32 head's, whatever is rounded."""

import re

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies

from calm.exits import layers
from calm.t5 import platforms, quantized_heads

EMB, PIECES = 24, 200


def head_and_states(seed: int, batch: int, outlier: float = 1.0):
  """Float32 [emb, pieces] and [batch, emb], one number of either much larger than the rest."""
  random = np.random.default_rng(seed)
  head = random.normal(size=(EMB, PIECES)).astype(np.float32)
  states = random.normal(size=(batch, EMB)).astype(np.float32)
  head[random.integers(EMB), random.integers(PIECES)] *= outlier
  states[:, random.integers(EMB)] *= outlier
  return head, states


def test_products_without_a_sign_are_the_same_numbers(monkeypatch):
  head, states = head_and_states(0, 5, 100.0)
  made = quantized_heads.quantize(jnp.asarray(head))
  found = []
  for unsigned in (False, True):
    monkeypatch.setattr(platforms, "multiplies_unsigned", lambda unsigned=unsigned: unsigned)
    text = jax.jit(lambda states: made.rounded(states)).lower(states).as_text()
    # 8 bits reach the product: JAX makes 32 of them where it is not told otherwise.
    side = "ui8" if unsigned else "i8"
    assert re.search(rf"dot_general.*<5x{EMB}x{side}>, tensor<{PIECES}x{EMB}xi8>\) -> ", text)
    found.append(np.asarray(made.rounded(jnp.asarray(states)).logits))
  np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("batch", [1, 3, 8, 17])
@pytest.mark.parametrize("outlier", [1.0, 100.0])
@pytest.mark.usefixtures("unsigned")
def test_the_largest_logit_is_the_full_heads(batch, outlier):
  logits = jax.jit(lambda head, states: head.logits(states))
  for seed in range(20):
    head, states = head_and_states(seed, batch, outlier)
    expected = states @ head
    got = np.asarray(logits(quantized_heads.quantize(jnp.asarray(head)), states))
    np.testing.assert_array_equal(got.argmax(-1), expected.argmax(-1))
    np.testing.assert_allclose(got.max(-1), expected.max(-1), rtol=1e-5)


@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("pieces", [24, PIECES, 1040])
@pytest.mark.usefixtures("unsigned")
def test_the_most_likely_piece_is_known_without_all_logits(batch, pieces):
  """Pieces of whole groups, of a group that is not whole, and too few for candidates."""
  random = np.random.default_rng(pieces + batch)
  for _ in range(5):
    head = random.normal(size=(EMB, pieces)).astype(np.float32)
    states = jnp.asarray(random.normal(size=(batch, EMB)).astype(np.float32))
    made = quantized_heads.quantize(jnp.asarray(head))
    got, expected = jax.jit(made.greedy)(states), layers.greedy(made.logits(states))
    np.testing.assert_array_equal(got.token, expected.token)
    assert got.token.dtype == jnp.int32
    np.testing.assert_allclose(got.log_probability, expected.log_probability, atol=1e-5)


@hypothesis.given(
  seed=strategies.integers(0, 10**6),
  outlier=strategies.sampled_from([0.0, 1.0, 30.0, 1e4]),
  # One row is coded twice, more are once.
  batch=strategies.sampled_from([1, 2, 4, 12]),
)
@hypothesis.settings(max_examples=80, deadline=None)
def test_rounding_changes_no_logit_by_more_than_the_slack(seed, outlier, batch):
  head, states = head_and_states(seed, batch, outlier)
  made = quantized_heads.quantize(jnp.asarray(head)).rounded(jnp.asarray(states))
  exact = states.astype(np.float64) @ head.astype(np.float64)
  allowed = np.asarray(made.slack)
  assert (np.abs(np.asarray(made.logits) - exact) <= allowed).all()
  # And the bound is of use: most of what it allows is what was rounded, not a constant.
  assert (
    np.median(allowed)
    < 0.1 * np.linalg.norm(states, axis=1).max() * np.linalg.norm(head, axis=0).max()
  )


@hypothesis.given(
  seed=strategies.integers(0, 10**6),
  pieces=strategies.sampled_from([40, 512, 513, 1000, 2008]),
  equals=strategies.booleans(),
)
@hypothesis.settings(max_examples=40, deadline=None)
def test_the_largest_are_those_of_top_k(seed, pieces, equals):
  values = np.random.default_rng(seed).normal(size=(3, pieces)).astype(np.float32)
  values = np.round(values, 1) if equals else values
  found, places = quantized_heads.largest(jnp.asarray(values), 32)
  np.testing.assert_array_equal(found, jax.lax.top_k(values, 32)[0])
  np.testing.assert_array_equal(np.take_along_axis(values, np.asarray(places), 1), found)
  assert all(len(set(row)) == 32 for row in np.asarray(places).tolist())


@pytest.mark.parametrize(("rows", "multiplied"), [(1, 2), (2, 2), (3, 3), (8, 8)])
def test_one_row_is_multiplied_as_two_and_more_as_they_are(rows, multiplied):
  """XLA:CPU takes a row by itself number by number, and eight twice as long as two."""
  head, states = head_and_states(0, rows)
  made = quantized_heads.quantize(jnp.asarray(head))
  text = jax.jit(made.rounded).lower(jnp.asarray(states)).as_text()
  (product,) = re.findall(r"dot_general.*-> tensor<(\d+)x\d+xi32>", text)
  assert int(product) == multiplied


def test_few_pieces_are_in_question_at_random():
  """Of a random head, where the first piece leads by little, 32 scores settle most rows."""
  random = np.random.default_rng(0)
  head = random.normal(size=(256, 20_000)).astype(np.float32)
  states = random.normal(size=(64, 256)).astype(np.float32)
  made = quantized_heads.quantize(jnp.asarray(head)).rounded(jnp.asarray(states))
  logits, slack = np.asarray(made.logits), np.asarray(made.slack)
  best = np.max(logits - slack, axis=1, keepdims=True)
  assert np.mean(np.sum(logits + slack >= best, axis=1) < quantized_heads.CANDIDATES) > 0.9


def test_where_more_pieces_are_in_question_the_full_head_is_asked():
  """Sixty pieces a hair apart: thirty-two scores do not settle which is first."""
  head, states = head_and_states(0, 2)
  first = states[0] / np.linalg.norm(states[0])
  for i in range(60):
    head[:, 100 + i] = 9 * first * (1 + 1e-5 * i)
  made = quantized_heads.quantize(jnp.asarray(head))
  logits = np.asarray(made.logits(jnp.asarray(states)))
  np.testing.assert_array_equal(logits, np.asarray(made.whole(jnp.asarray(states))))
  assert logits[0].argmax() == 159
  said, asked = made.greedy(jnp.asarray(states)), layers.greedy(jnp.asarray(logits))
  assert said.token.tolist() == asked.token.tolist() and said.token[0] == 159
  np.testing.assert_allclose(said.log_probability, asked.log_probability, rtol=1e-6)
  # The rounded head does not know it.
  assert not np.array_equal(np.asarray(made.rounded(jnp.asarray(states)).logits), logits)


def test_equal_pieces_stay_equal():
  head, states = head_and_states(1, 1)
  head[:, 50] = head[:, 150] = 5 * states[0]
  logits = np.asarray(quantized_heads.quantize(jnp.asarray(head)).logits(jnp.asarray(states)))
  assert logits[0, 50] == logits[0, 150] == logits.max()
  # The first of equals, as `argmax` has it.
  said = quantized_heads.quantize(jnp.asarray(head)).greedy(jnp.asarray(states))
  assert said.token.tolist() == [50]


def test_a_vocabulary_of_few_pieces_is_scored_whole():
  head, states = head_and_states(2, 3)
  made = quantized_heads.quantize(jnp.asarray(head[:, :32]))
  np.testing.assert_allclose(made.logits(jnp.asarray(states)), states @ head[:, :32], rtol=1e-5)


def test_a_head_of_zeros_has_no_nan():
  made = quantized_heads.quantize(jnp.zeros((EMB, PIECES)))
  assert not np.asarray(made.logits(jnp.zeros((2, EMB)))).any()
