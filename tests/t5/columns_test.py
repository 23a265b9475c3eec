"""A matrix in columns is the matrix, and is cut only where that may be faster."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calm.t5 import columns, decoder_weights, platforms
from tests import engine

RNG = np.random.default_rng(0)
CUT = ("query", "self_out", "cross_query", "cross_out", "mlp_out")


def normal(*shape: int) -> np.ndarray:
  return RNG.normal(size=shape).astype(np.float32)


@pytest.fixture
def small_are_cut(monkeypatch):
  """Toys too, into pieces of four columns or of two."""
  monkeypatch.setattr(columns, "LEAST_NUMBERS", 1)
  monkeypatch.setattr(columns, "WIDTH", 4)
  monkeypatch.setattr(columns, "LEAST_PIECES", 5)


@pytest.mark.parametrize("rows", [1, 2, 8])
@pytest.mark.parametrize(("outputs", "width"), [(768, 64), (512, 32), (390, 32)])
def test_products_are_those_of_the_whole_matrix(rows, outputs, width):
  matrix, x = normal(400, outputs), normal(rows, 400)
  cut = columns.cut(jnp.asarray(matrix))
  assert isinstance(cut, columns.Columns)
  assert {piece.shape[1] for piece in cut.pieces[:-1]} == {width}
  assert 0 < cut.pieces[-1].shape[1] <= width
  made = cut.product(jnp.asarray(x))
  assert made.shape == (rows, outputs) and made.dtype == jnp.float32
  np.testing.assert_allclose(made, x @ matrix, rtol=1e-4, atol=1e-4)


def test_narrow_pieces_are_multiplied_in_the_dtype_of_the_rows():
  matrix, x = jnp.asarray(normal(400, 384), jnp.bfloat16), jnp.asarray(normal(3, 400))
  made = columns.cut(matrix).product(x)
  assert made.dtype == jnp.float32
  np.testing.assert_allclose(made, x @ matrix.astype(jnp.float32), rtol=1e-4, atol=1e-4)


def test_more_products_are_ready_than_one_thread_keeps():
  """Nine, of every matrix that is cut into whole pieces at T5 1.1's sizes."""
  for outputs in (384, 512, 768, 1024, 2048, 2816, 4096, 5120):
    assert outputs / columns.width(outputs) > 9
    assert outputs % columns.width(outputs) == 0


def test_a_single_row_is_multiplied_as_two():
  cut = columns.cut(jnp.zeros((512, 384)))
  products = lambda rows: [
    eqn.invars[0].aval.shape[0]
    for eqn in jax.make_jaxpr(cut.product)(jnp.zeros((rows, 512))).eqns
    if eqn.primitive.name == "dot_general"
  ]
  assert products(1) == [2] * 12 and products(5) == [5] * 12


def test_small_matrices_stay_whole():
  matrix = jnp.zeros((128, 1024))  # of the model in the box
  assert columns.cut(matrix) is matrix and not columns.is_cut(*matrix.shape)


def test_layers_are_cut_but_for_what_a_prompt_needs_once(small_are_cut):
  toy = engine.toy()
  whole = decoder_weights.decoder_weights(toy.params, toy.config)
  made = decoder_weights.decoder_weights(toy.params, toy.config, layout="columns")
  for before, after in zip(whole.layers, made.layers, strict=True):
    for name in CUT:
      pieces = getattr(after, name).pieces
      np.testing.assert_array_equal(np.concatenate(pieces, axis=1), getattr(before, name))
    for name in ("key_value", "mlp_in"):
      for one, cut in zip(getattr(before, name), getattr(after, name), strict=True):
        np.testing.assert_array_equal(np.concatenate(cut.pieces, axis=1), one)
    rest = {field.name for field in dataclasses.fields(after)} - {*CUT, "key_value", "mlp_in"}
    assert all(isinstance(getattr(after, name), jax.Array) for name in rest)


@pytest.mark.parametrize(
  ("platform", "dtype"), [("tpu", "float32"), ("gpu", "float32"), ("cpu", "bfloat16")]
)
def test_nothing_is_cut_elsewhere_nor_for_narrow_sums(small_are_cut, platform, dtype):
  toy = engine.toy()
  config = dataclasses.replace(toy.config, dtype=dtype)
  with platforms.laid_out_for(platform):
    made = decoder_weights.decoder_weights(toy.params, config, layout="columns")
  assert all(isinstance(layer.query, jax.Array) for layer in made.layers)
