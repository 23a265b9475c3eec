"""Kernels, functions of this process that XLA calls: the numbers of XLA's, in
every engine.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("llvmlite")

from calm import exits
from calm.decode import engines
from calm.decode import program as program_lib
from calm.exits import confidence
from calm.exits import layers as layers_lib
from calm.exits.layers import KeyValue
from calm.t5 import attention as attention_lib
from calm.t5 import caches, eight_bits, kernels, layers, tiles
from calm.t5.kernels import attention_kernel, coded_kernel, llvm, tiles_kernel
from calm.t5x import loops
from tests import engine

CLASSIFIER = exits.DynamicExits(confidence.Classifier())
ENGINES = {
  "static": (exits.StaticExit(), engines.Eager),
  "deferred": (CLASSIFIER, engine.sized(engines.Deferred, chunk_rows=8)),
  "compacted": (
    CLASSIFIER,
    engine.sized(engines.Compacted, sizes=(0, 2, 4, 8)),
  ),
  "drafts": (exits.Speculative(1, 3, "full"), None),
}


@pytest.fixture
def small(monkeypatch):
  """Kernels are taken for any size, and shared, whatever this machine has."""
  monkeypatch.setattr(attention_kernel, "AWAKE_NUMBERS", 0)
  monkeypatch.setattr(attention_kernel, "ASLEEP_NUMBERS", 0)
  monkeypatch.setattr(llvm, "num_cores", lambda: 2)


def drawn(*shape: int) -> jax.Array:
  return jnp.asarray(
    np.random.default_rng(shape[-1]).standard_normal(shape), jnp.float32
  )


def calls(function, *arguments) -> int:
  return str(jax.make_jaxpr(function)(*arguments)).count("ffi_call[")


def attention_of(
  batch, heads, head_dim, length, bias_rows=1
) -> attention_lib.Attention:
  """Attention, by XLA, whose last keys are masked, as those that are not
  decoded yet.
  """
  draws = np.random.default_rng(batch)

  def normal(*shape):
    return jnp.asarray(draws.standard_normal(shape), jnp.float32)

  past, cross = (
    caches.Cache(*(normal(batch, heads, length, head_dim) for _ in range(2)))
    for _ in range(2)
  )
  bias = normal(bias_rows, heads, length).at[:, :, -3:].set(layers.MASK_BIAS)
  if bias_rows > 1:  # rows that begin later do not see the first keys
    bias = bias.at[1:, :, :1].set(layers.MASK_BIAS)
  padding = np.zeros((batch, 1, length), np.float32)
  for row in range(batch):
    padding[row, :, length - row % (length - 1) :] = layers.MASK_BIAS
  past_bias = bias if bias_rows > 1 else bias[0]
  return attention_lib.Attention(
    past, past_bias, normal(heads), cross, jnp.asarray(padding), False
  )


def asked(batch, heads, head_dim):
  keys = jax.random.split(jax.random.key(9), 3)
  query, key, value = (
    jax.random.normal(k, (batch, heads, head_dim)) for k in keys
  )
  return query, KeyValue(key, value)


def mixed(whole, query, row):
  """(of the past, of the prompt)."""
  return jax.jit(lambda: (whole.to_past(query, row), whole.to_prompt(query)))()


def native(whole, **options) -> attention_lib.Attention:
  return dataclasses.replace(whole, native=True, **options)


@pytest.mark.parametrize(
  ("batch", "heads", "head_dim", "length"),
  [(1, 1, 8, 4), (3, 2, 8, 13), (8, 6, 64, 128), (5, 3, 32, 63), (2, 2, 24, 9)],
)
@pytest.mark.parametrize("bias", ["one for all rows", "one a row"])
def test_the_numbers_of_xla(batch, heads, head_dim, length, bias):
  """Of rows in order, and of rows that are named."""
  by_row = bias == "one a row"
  whole = attention_of(batch, heads, head_dim, length, batch if by_row else 1)
  query, row = asked(batch, heads, head_dim)
  made = mixed(
    native(whole, rows=jnp.arange(batch) if by_row else None), query, row
  )
  for ours, theirs in zip(made, mixed(whole, query, row), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize(
  ("batch", "positions", "head_dim", "length"),
  [(1, 4, 8, 10), (2, 4, 32, 40), (3, 6, 64, 33)],
)
def test_windows_have_the_numbers_of_xla(
  small, batch, positions, head_dim, length
):
  """And to the bit what each position gets alone."""
  whole = attention_of(batch, 2, head_dim, length)
  query, row = asked(batch * positions, 2, head_dim)
  draws = np.random.default_rng(0).standard_normal(
    (batch, 2, positions, length)
  )
  # Each position of each row sees one key more than the one before.
  last = np.arange(positions)[:, None] + np.arange(batch)[:, None, None, None]
  bias = jnp.asarray(
    np.where(np.arange(length) <= last, draws, layers.MASK_BIAS), jnp.float32
  )
  window = attention_lib.WindowAttention(
    whole.cache, bias, whole.cross, whole.cross_bias, False, True
  )
  assert calls(window.to_past, query, row) and calls(window.to_prompt, query)
  made, plain = (
    mixed(dataclasses.replace(window, native=way), query, row)
    for way in (True, False)
  )
  for ours, theirs in zip(made, plain, strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-5)
  for i in range(positions):
    alone = mixed(
      dataclasses.replace(window, bias=bias[:, :, i : i + 1]),
      query[i::positions],
      row,
    )
    for ours, theirs in zip(alone, made, strict=True):
      np.testing.assert_array_equal(ours, theirs[i::positions])


def test_who_sees_nothing_gets_zeros_and_what_is_nan_stays_so():
  whole = attention_of(3, 2, 8, 10)
  hidden = whole.cross_bias.at[1].set(layers.MASK_BIAS)
  keys = whole.cross.keys.at[2, 1, 0, 0].set(jnp.nan)
  cross = caches.Cache(keys, whole.cross.values)
  query, _ = asked(3, 2, 8)
  made = (
    native(whole, cross=cross, cross_bias=hidden)
    .to_prompt(query)
    .reshape(3, 2, 8)
  )
  assert not made[1].any()
  assert jnp.isnan(made[2, 1]).all() and not jnp.isnan(made[:2]).any()
  assert not jnp.isnan(made[2, 0]).any()


@pytest.mark.parametrize(
  "shape", [(1, 7), (3, 33), (2, 4096), (1, 70_000), (9, 32_100)]
)
def test_what_is_asked_of_logits_is_what_xla_finds(shape):
  logits = jax.random.normal(jax.random.key(3), shape) * 5.0
  # Two of the first row are as large, in different lanes of a vector.
  logits = logits.at[0, jnp.array([3, shape[1] - 1])].set(30.0)
  logits = logits.at[-1, 1].set(-jnp.inf)
  assert "calm_peaks" in jax.jit(kernels.peaks).lower(logits).as_text()
  made = jax.jit(kernels.peaks)(logits)
  wanted = layers_lib.peaks(logits)
  made = layers_lib.Peaks(*made or ())
  assert made.token[0] == 3 and made.second[0] == 30.0
  for name in ("token", "top", "second", "count"):
    np.testing.assert_array_equal(getattr(made, name), getattr(wanted, name))
  for name in ("total", "weighted", "margin", "certainty"):
    got = getattr(made, name)
    true = getattr(wanted, name)
    np.testing.assert_allclose(got, true, rtol=1e-5, atol=1e-6)
  # Logits that are no number clear no threshold.
  made = jax.jit(kernels.peaks)(logits.at[0, 2].set(jnp.nan))
  assert jnp.isnan(layers_lib.Peaks(*made or ()).margin)[0]


def quick(function):
  return jax.jit(
    function, compiler_options={"xla_backend_optimization_level": 0}
  )


def decoded(toy, rule, made, allowed: bool, threshold, active):
  """(generation, caches, the program's text)."""
  program = program_lib.Program(
    toy.config, rule, engine.LENGTH, engine=made, native=allowed
  )
  args = toy.weights, engine.encode(toy), active, threshold
  lowered = quick(lambda *args: program.decode_state(*args)).lower(*args)
  state = lowered.compile()(*args)
  return state.generation, state.cache, lowered.as_text()


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", ENGINES)
def test_engines_decode_the_same(name):
  toy, (rule, made) = engine.toy(), ENGINES[name]
  active = jnp.arange(len(engine.PROMPTS)) != 3
  limits = jnp.linspace(0.2, 0.9, len(engine.PROMPTS))
  threshold = {"static": jnp.float32(0), "drafts": jnp.float32(1)}.get(
    name, limits
  )
  got, cache, text = decoded(toy, rule, made, True, threshold, active)
  expected, plain, plain_text = decoded(
    toy, rule, made, False, threshold, active
  )
  for target in ("calm_attention", "calm_tiles")[
    : 1 + kernels.reads_tiles(jnp.float32)
  ]:
    assert target in text and target not in plain_text
  np.testing.assert_array_equal(got.tokens, expected.tokens)
  np.testing.assert_allclose(got.scores, expected.scores, rtol=1e-4, atol=1e-5)
  if name == "drafts":
    assert (
      got.verification.passes.tolist() == expected.verification.passes.tolist()
    )
    full, _, _ = decoded(
      toy, exits.StaticExit(), None, True, jnp.float32(0), active
    )
    np.testing.assert_array_equal(got.tokens, full.tokens)
    return
  np.testing.assert_array_equal(got.exit_layers, expected.exit_layers)
  assert name == "static" or len(set(np.unique(got.exit_layers)) - {0}) > 1
  for ours, theirs in zip(
    jax.tree.leaves(cache), jax.tree.leaves(plain), strict=True
  ):
    np.testing.assert_allclose(
      ours[active], theirs[active], rtol=1e-3, atol=1e-4
    )


def test_loops_of_others_do_not_call_it(small):
  """They may be exported, or split over devices by the compiler."""
  toy = engine.toy()
  prefix = jnp.zeros((len(engine.PROMPTS), engine.LENGTH), jnp.int32)
  rows = loops.make_rows(engine.encode(toy), prefix, 0.4)

  def run(weights):
    loop = loops.Loop(toy.config, CLASSIFIER, weights, rows, 1)
    return loops.greedy_decode(prefix, {}, loop, 1)

  assert (
    "calm_attention" not in jax.jit(run).lower(toy.weights.decoder).as_text()
  )


@pytest.mark.parametrize("make", [tiles.tiled, eight_bits.rounded])
@pytest.mark.parametrize("rows", [1, 2, 7, 9, 32])
@pytest.mark.parametrize(
  ("inputs", "outputs"), [(1, 1), (16, 17), (17, 250), (33, 128)]
)
def test_products_of_tiles_are_those_of_numpy(
  monkeypatch, make, rows, inputs, outputs
):
  """In pieces, in blocks of rows, and by XLA; of codes but for half a step of
  each number.
  """
  x = drawn(rows, inputs)
  given = drawn(inputs, outputs)
  matrix = make(given)
  numbers = np.asarray(
    matrix.product(jnp.eye(inputs), native=False), np.float64
  )
  coded = matrix.scales is not None
  np.testing.assert_allclose(numbers, given, atol=0.02 * coded)
  expected = np.asarray(x, np.float64) @ numbers
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-4)
  close(matrix.product(x, native=False), expected)
  whole = matrix.product(x, native=True)
  half = np.max(np.abs(x), axis=1, keepdims=True) / (2**16 - 2) * coded
  assert np.all(
    np.abs(whole - expected) <= 1e-5 + half * np.sum(np.abs(numbers), axis=0)
  )
  monkeypatch.setattr(kernels, "SHARED_PRODUCTS", 0)
  monkeypatch.setattr(llvm, "num_cores", lambda: 2)
  monkeypatch.setattr(tiles_kernel, "MOST_ROUNDED", 5)
  np.testing.assert_array_equal(matrix.product(x, native=True), whole)
  # So a text does not depend on the prompts that it is decoded with.
  for i in range(rows):
    alone = matrix.product(x[i : i + 1], native=True)
    np.testing.assert_array_equal(alone[0], whole[i])


@pytest.mark.parametrize(("heads", "head_dim"), [(3, 24), (2, 64), (1, 200)])
def test_prompts_attend_to_themselves_alone(heads, head_dim):
  """The equation's numbers, zeros behind the end, and to the bit what a prompt
  gets alone.
  """
  counts = np.array([5, 0, 1, 40], np.int32)
  begins = np.array([0, 7, 9, 10, 60], np.int32)
  states = drawn(3, 60, heads, head_dim)
  biases = drawn(heads, 95)
  attend = jax.jit(kernels.attend_within)
  got = attend(begins, counts, *states, biases)
  for begin, count, end in zip(begins, counts, begins[1:], strict=False):
    rows = slice(begin, begin + count)
    distance = np.arange(count) - np.arange(count)[:, None]
    q, k, v = np.moveaxis(np.asarray(states[:, rows], float), 2, 1)
    weights = np.exp(
      q @ k.swapaxes(1, 2) + np.asarray(biases, float)[:, distance + 47]
    )
    expected = np.moveaxis(weights / weights.sum(-1, keepdims=True) @ v, 0, 1)
    np.testing.assert_allclose(got[rows], expected, rtol=2e-5, atol=2e-5)
    assert not np.any(got[begin + count : end])
    alone = attend(
      np.array([0, count]), np.array([count]), *states[:, rows], biases
    )
    np.testing.assert_array_equal(alone, got[rows])


@pytest.mark.skipif(not kernels.multiplies_codes(), reason="needs AVX-512 VNNI")
@pytest.mark.parametrize("names", [("gelu", "linear"), ("relu",)])
def test_feed_forward_blocks_in_8_bits_are_their_products(monkeypatch, names):
  """In one piece and in several, and zeros behind the rows that are asked
  for.
  """
  assert not kernels.multiplies_codes(("silu",))
  x, *inner = (
    drawn(17, 18),
    *(drawn(18, 70 + i)[:, :70] for i in range(len(names))),
  )
  tiled = [eight_bits.quantize(w, tiled=True) for w in (*inner, drawn(70, 19))]
  *first, outer = tiled
  parts = [
    layers.activation_fn(n)(m.product(x))
    for n, m in zip(names, first, strict=True)
  ]
  expected = outer.product(functools.reduce(jnp.multiply, parts))
  whole = kernels.coded_product(x, tiled, names)
  np.testing.assert_allclose(whole, expected, rtol=1e-5, atol=1e-5)
  monkeypatch.setattr(coded_kernel, "_SHARED_PRODUCTS", 0)
  monkeypatch.setattr(llvm, "num_cores", lambda: 2)
  made = jax.jit(lambda count: kernels.coded_product(x, tiled, names, count))(8)
  np.testing.assert_array_equal(
    made, np.where(np.arange(17)[:, None] < 8, whole, 0)
  )


@pytest.mark.skipif(not kernels.multiplies_codes(), reason="needs AVX-512 VNNI")
def test_heads_of_prompts_are_written_where_they_are_read():
  counts = np.array([5, 0, 1, 40], np.int32)
  begins = np.array([0, 7, 9, 10, 60], np.int32)
  x = drawn(60, 24)
  matrix = eight_bits.quantize(drawn(24, 256), tiled=True)
  assert kernels.writes_heads(4, 32) and not kernels.writes_heads(16, 8)
  made = kernels.coded_heads(x, begins, counts, matrix, 128, (4, 4, 45, 32))
  rows = matrix.product(x)[:, 128:].reshape(60, 4, 32)
  for prompt, begin, count in zip(made, begins, counts, strict=False):
    np.testing.assert_array_equal(
      prompt[:, :count], rows[begin : begin + count].swapaxes(0, 1)
    )
    assert not np.any(prompt[:, count:])
