"""Kernels, functions of this process that XLA calls: the numbers of XLA's, in every engine."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("llvmlite")

from calm import exits
from calm.decode import engines
from calm.decode import program as program_lib
from calm.exits import confidence
from calm.t5 import eight_bits, kernels, network, platforms
from calm.t5.kernels import codes_kernel, llvm
from calm.t5x import loops
from tests import engine, toys

CLASSIFIER = exits.DynamicExits(confidence.Classifier())
ENGINES = {
  "static": (exits.StaticExit(), engines.Eager()),
  "deferred": (CLASSIFIER, engines.Deferred(8)),
  "compacted": (CLASSIFIER, engines.Compacted(buckets=(2, 4))),
  "drafts": (exits.Speculative(1, 3, "full"), None),
}


@pytest.fixture
def wide_vectors(monkeypatch):
  """Kernels are taken whatever this machine has."""
  monkeypatch.setattr(platforms, "has_wide_vectors", lambda: True)


def drawn(*shape: int) -> jax.Array:
  return jnp.asarray(np.random.default_rng(shape[-1]).standard_normal(shape), jnp.float32)


def quick(function):
  return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def decoded(toy, rule, made, allowed: bool, threshold, active):
  """(generation, caches, the program's text)."""
  program = program_lib.Program(toy.config, rule, engine.LENGTH, engine=made, native=allowed)
  args = toy.weights, engine.encode(toy), active, threshold
  lowered = quick(lambda *args: program.decode_state(*args)).lower(*args)
  state = lowered.compile()(*args)
  return state.generation, state.cache, lowered.as_text()


@pytest.mark.usefixtures("wide_vectors")
@pytest.mark.parametrize("name", ENGINES)
def test_engines_decode_the_same(name):
  toy, (rule, made) = engine.toy(), ENGINES[name]
  active = jnp.arange(len(engine.PROMPTS)) != 3
  limits = jnp.linspace(0.2, 0.9, len(engine.PROMPTS))
  threshold = {"static": jnp.float32(0), "drafts": jnp.float32(1)}.get(name, limits)
  got, cache, text = decoded(toy, rule, made, True, threshold, active)
  expected, plain, plain_text = decoded(toy, rule, made, False, threshold, active)
  assert "calm_product" in text and "calm_product" not in plain_text
  np.testing.assert_array_equal(got.tokens, expected.tokens)
  np.testing.assert_allclose(got.scores, expected.scores, rtol=1e-4, atol=1e-5)
  if name == "drafts":
    assert got.verification.passes.tolist() == expected.verification.passes.tolist()
    return
  np.testing.assert_array_equal(got.exit_layers, expected.exit_layers)
  assert name == "static" or len(set(np.unique(got.exit_layers)) - {0}) > 1
  for ours, theirs in zip(jax.tree.leaves(cache), jax.tree.leaves(plain), strict=True):
    np.testing.assert_allclose(ours[active], theirs[active], rtol=1e-3, atol=1e-4)


def test_loops_of_others_do_not_call_it(wide_vectors):
  """They may be exported, or split over devices by the compiler."""
  toy, prefix = engine.toy(), jnp.zeros((len(engine.PROMPTS), engine.LENGTH), jnp.int32)
  rows = loops.make_rows(engine.encode(toy), prefix, 0.4, 1, 1)
  loop = loops.Loop(toy.config, CLASSIFIER, engine.LENGTH, None)

  def run(weights):
    empty = loop.empty_cache(weights, rows, len(prefix))
    return loops.greedy_decode(prefix, empty, loop.bind(weights, rows, 1), 1)

  assert "calm_product" not in jax.jit(run).lower(toy.weights.decoder).as_text()


@pytest.mark.parametrize("rows", [2, 7, 8, 9, 16])
@pytest.mark.parametrize(
  ("inputs", "outputs"), [(1, 1), (5, 16), (16, 17), (17, 250), (33, 31), (128, 384), (100, 96)]
)
def test_products_are_those_of_numpy(rows, inputs, outputs):
  x, matrix = drawn(rows, inputs), drawn(inputs, outputs)
  made = jax.jit(kernels.product)(x, matrix)
  expected = np.asarray(x, np.float64) @ np.asarray(matrix, np.float64)
  np.testing.assert_allclose(made, expected, rtol=1e-5, atol=1e-5 * np.sqrt(inputs))


def test_a_row_is_the_same_whoever_stands_beside_it():
  """So a text does not depend on its batch, but for the sizes at which XLA takes over."""
  x, matrix = drawn(16, 100), drawn(100, 250)
  whole = kernels.product(x, matrix)
  for rows in range(2, 16):
    np.testing.assert_array_equal(kernels.product(x[:rows], matrix), whole[:rows])


def test_nan_stays_in_its_row_and_column():
  x, matrix = drawn(9, 20).at[4, 3].set(jnp.nan), drawn(20, 40).at[7, 33].set(jnp.inf)
  made = kernels.product(x, matrix)
  assert jnp.isnan(made[4]).all() and jnp.isinf(made[:, 33][jnp.arange(9) != 4]).all()
  others = np.delete(np.delete(np.asarray(made), 4, axis=0), 33, axis=1)
  assert np.isfinite(others).all()


def test_one_thread_multiplies_few_rows_and_small_layers(monkeypatch, wide_vectors):
  matrix = drawn(64, 64)
  assert kernels.single_threaded(matrix, 1) and kernels.single_threaded(
    matrix, kernels.MOST_ROWS
  )
  assert not kernels.single_threaded(matrix, kernels.MOST_ROWS + 1)
  assert not kernels.single_threaded(drawn(1024, 1024), 8)
  assert not kernels.single_threaded(matrix.astype(jnp.bfloat16), 8)
  with platforms.laid_out_for("tpu"):
    assert not kernels.single_threaded(matrix, 8)
  for owner, name, value in (
    (platforms, "has_wide_vectors", False),
    (kernels, "_has_llvmlite", False),
  ):
    with monkeypatch.context() as patch:
      patch.setattr(owner, name, lambda value=value: value)
      assert not kernels.single_threaded(matrix, 8)


def test_some_products_are_left_to_xla():
  x, matrix = drawn(8, 64), drawn(64, 64)
  assert kernels.product(x, matrix) is not None
  assert kernels.product(x[:1], matrix) is None  # XLA has code of its own for one
  assert kernels.product(drawn(8, 1024), drawn(1024, 2048)) is None
  assert kernels.product(x, matrix.astype(jnp.bfloat16)) is None


needs_bytes = pytest.mark.skipif(
  not platforms.multiplies_bytes(), reason="needs a CPU with AVX512-VNNI"
)


@pytest.fixture(params=[1, 3])
def threads(request, monkeypatch):
  """Rows are shared among several threads, however few they are."""
  for name in ("_LEAST_PRODUCTS", "_LEAST_NUMBERS"):
    monkeypatch.setattr(codes_kernel, name, 1)
  monkeypatch.setattr(llvm, "num_cores", lambda: request.param)
  # A name that no function has: what XLA was given stays.
  target = llvm.target
  monkeypatch.setattr(
    llvm, "target", lambda name, write: target(f"{name}_of_{request.param}", write)
  )


def matrix_and_rows(rows: int, inputs: int, outputs: int):
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


@needs_bytes
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("rows", [1, 3, 12, 13, 29, 97, 200])
@pytest.mark.parametrize(("inputs", "outputs"), [(16, 16), (48, 80), (1024, 32)])
def test_a_product_in_8_bits_is_numpys_and_xlas_bit_for_bit(rows, inputs, outputs):
  x, matrix = matrix_and_rows(rows, inputs, outputs)
  coded = eight_bits.quantize(jnp.asarray(matrix))
  packed = coded.for_many_rows()
  assert packed.packed is not None and coded.packed is None
  made = jax.jit(lambda matrix, x: matrix.product(x))(packed, x)
  np.testing.assert_array_equal(made, by_hand(x, matrix))
  np.testing.assert_array_equal(made, jax.jit(lambda m, x: m.product(x))(coded, x))


@needs_bytes
@pytest.mark.usefixtures("threads")
def test_rows_of_zeros_and_what_is_no_number_stay_in_their_rows():
  x, matrix = matrix_and_rows(40, 64, 48)
  packed = eight_bits.quantize(jnp.asarray(matrix)).for_many_rows()
  expected = np.asarray(packed.product(jnp.asarray(x)))
  changed = x.copy()
  changed[::4], changed[5, 7], changed[6, 0] = 0.0, np.nan, np.inf
  made = np.asarray(packed.product(jnp.asarray(changed)))
  assert not made[::4].any() and np.isnan(made[5:7]).all()
  same = np.setdiff1d(np.arange(40), [*range(0, 40, 4), 5, 6])
  np.testing.assert_array_equal(made[same], expected[same])


@needs_bytes
def test_axes_of_rows_stay_and_other_dtypes_and_sizes_are_xlas():
  x, matrix = matrix_and_rows(12, 32, 16)
  packed = eight_bits.quantize(jnp.asarray(matrix)).for_many_rows()
  made = packed.product(jnp.asarray(x).reshape(3, 4, 32))
  np.testing.assert_array_equal(made.reshape(12, 16), by_hand(x, matrix))
  assert packed.product(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16
  assert eight_bits.quantize(jnp.ones((24, 16))).for_many_rows().packed is None


@needs_bytes
def test_an_encoder_in_8_bits_is_xlas_but_for_last_bits(monkeypatch):
  sizes = toys.Config(
    vocab_size=48, emb_dim=32, num_heads=2, head_dim=16, mlp_dim=64, num_encoder_layers=2
  )
  config = network.T5Config(**toys.network_fields(sizes))
  tokens = np.random.default_rng(0).integers(1, sizes.vocab_size, (3, 16)).astype(np.int32)
  made = program_lib.Program(config, exits.StaticExit(), 4)
  params = toys.params(sizes, 0)
  weights = lambda: program_lib.model_weights(params, config, encoder_dtype="int8")
  text = jax.jit(made.encode).lower(weights(), tokens).compile().as_text()
  # Queries, keys and values, and both sides of a gate, share codes.
  assert text.count("calm_codes_in_8_bits") == 4 * 2 + 1
  got = made.encode(weights(), tokens)
  monkeypatch.setattr(platforms, "multiplies_bytes", lambda: False)
  other = weights()
  assert other.decoder.layers[0].cross_key_value.packed is None
  for ours, theirs in zip(got.cross, made.encode(other, tokens).cross, strict=True):
    np.testing.assert_allclose(ours.keys, theirs.keys, rtol=0.02, atol=0.02)
