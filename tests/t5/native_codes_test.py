"""Products of many rows in 8 bits by a function of this process: XLA's, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("llvmlite")

from calm import exits
from calm.decode import program
from calm.t5 import eight_bits, native, network, platforms
from calm.t5.native import calls
from tests import toys

pytestmark = pytest.mark.skipif(
  not platforms.multiplies_bytes(), reason="needs a CPU with AVX512-VNNI"
)


@pytest.fixture(autouse=True, params=[1, 2, 3])
def threads(request, monkeypatch):
  """Rows are shared among several threads, however few they are."""
  from calm.t5.native import codes_kernel

  for name in ("_LEAST_PRODUCTS", "_LEAST_NUMBERS"):
    monkeypatch.setattr(codes_kernel, name, 1)
  monkeypatch.setattr(calls, "_num_cores", lambda: request.param)
  # A name that no function has: what XLA was given stays.
  target = calls.target
  monkeypatch.setattr(
    calls, "target", lambda name, make: target(f"{name}_of_{request.param}", make)
  )


def drawn(rows: int, inputs: int, outputs: int):
  random = np.random.default_rng(rows * inputs + outputs)
  x = random.standard_normal((rows, inputs)).astype(np.float32)
  x[random.integers(rows)] *= 100
  return x, random.standard_normal((inputs, outputs)).astype(np.float32)


def by_hand(x: np.ndarray, matrix: np.ndarray) -> np.ndarray:
  """The formula of `EightBits.product`, its sums in whole numbers."""
  one = np.float32(1 / 127)
  steps = np.maximum(np.abs(x).max(1, keepdims=True), np.float32(1e-30)) * one
  coded = eight_bits.quantize(jnp.asarray(matrix))
  codes = np.rint(x * (np.float32(1) / steps)).astype(np.int64)
  sums = codes @ np.asarray(coded.codes, np.int64).T
  return sums.astype(np.float32) * (steps * np.asarray(coded.scales))


@pytest.mark.parametrize("rows", [1, 3, 12, 13, 29, 97, 200])
@pytest.mark.parametrize(("inputs", "outputs"), [(16, 16), (48, 80), (128, 96), (1024, 32)])
def test_a_product_is_numpys_and_xlas_bit_for_bit(rows, inputs, outputs):
  x, matrix = drawn(rows, inputs, outputs)
  coded = eight_bits.quantize(jnp.asarray(matrix))
  packed = native.pack(coded)
  assert packed.packed is not None and coded.packed is None
  made = jax.jit(lambda matrix, x: matrix.product(x))(packed, x)
  np.testing.assert_array_equal(made, by_hand(x, matrix))
  np.testing.assert_array_equal(made, jax.jit(lambda m, x: m.product(x))(coded, x))


def test_rows_of_zeros_and_what_is_no_number_stay_in_their_rows():
  x, matrix = drawn(40, 64, 48)
  packed = native.pack(eight_bits.quantize(jnp.asarray(matrix)))
  expected = np.asarray(packed.product(jnp.asarray(x)))
  changed = x.copy()
  changed[::4], changed[5, 7], changed[6, 0] = 0.0, np.nan, np.inf
  made = np.asarray(packed.product(jnp.asarray(changed)))
  assert not made[::4].any() and np.isnan(made[5:7]).all()
  same = np.setdiff1d(np.arange(40), [*range(0, 40, 4), 5, 6])
  np.testing.assert_array_equal(made[same], expected[same])


def test_axes_of_rows_stay_and_other_dtypes_and_sizes_are_xlas():
  x, matrix = drawn(12, 32, 16)
  packed = native.pack(eight_bits.quantize(jnp.asarray(matrix)))
  made = packed.product(jnp.asarray(x).reshape(3, 4, 32))
  np.testing.assert_array_equal(made.reshape(12, 16), by_hand(x, matrix))
  assert packed.product(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16
  odd = eight_bits.quantize(jnp.ones((24, 16)))
  assert native.pack(odd) is odd


def test_an_encoder_takes_it_and_is_xlas_but_for_last_bits(monkeypatch):
  sizes = toys.Config(
    vocab_size=48, emb_dim=32, num_heads=2, head_dim=16, mlp_dim=64, num_encoder_layers=2
  )
  config = network.T5Config(**toys.network_fields(sizes))
  tokens = np.random.default_rng(0).integers(1, sizes.vocab_size, (3, 16)).astype(np.int32)
  made = program.Program(config, exits.StaticExit(), 4)
  weights = lambda: program.model_weights(toys.params(sizes, 0), config, encoder_dtype="int8")
  text = jax.jit(made.encode).lower(weights(), tokens).compile().as_text()
  # Queries, keys and values, and both sides of a gate, share codes.
  assert text.count("calm_codes_in_8_bits") == 4 * 2 + 1
  got = made.encode(weights(), tokens)
  monkeypatch.setattr(platforms, "multiplies_bytes", lambda: False)
  other = weights()
  assert other.decoder.layers[0].cross_key_value.packed is None
  for ours, theirs in zip(got.cross, made.encode(other, tokens).cross, strict=True):
    np.testing.assert_allclose(ours.keys, theirs.keys, rtol=0.02, atol=0.02)
