"""Attention by functions of this process: the numbers of XLA's, in every engine."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("llvmlite")

from calm import exits
from calm.data import prompt_batches
from calm.decode import engines, pool_program
from calm.decode import program as program_lib
from calm.exits import confidence
from calm.exits.layers import KeyValue
from calm.t5 import attention as attention_lib
from calm.t5 import caches, layers, native, platforms, windows
from calm.t5.native import attention as native_attention
from calm.t5.native import calls, frames, instructions
from calm.t5x import loops
from tests import engine

TARGET = "calm_attention"
CLASSIFIER = exits.DynamicExits(confidence.Classifier())
ENGINES = {
  "static": (exits.StaticExit(), engines.Eager()),
  "eager": (CLASSIFIER, engines.Eager()),
  "deferred": (CLASSIFIER, engines.Deferred(8)),
  "compacted by row": (CLASSIFIER, engines.Compacted(buckets=(2, 4))),
  "compacted": (CLASSIFIER, engines.Compacted(buckets=(5,), part_by_row=0.0)),
}


@pytest.fixture
def small(monkeypatch):
  """Attention of any size is shared, whatever this machine has."""
  monkeypatch.setattr(native_attention, "AWAKE_NUMBERS", 0)
  monkeypatch.setattr(native_attention, "ASLEEP_NUMBERS", 0)
  monkeypatch.setattr(calls, "_num_cores", lambda: 2)


def drawn(batch, heads, head_dim, length, bias_rows=1) -> attention_lib.Attention:
  """Attention whose last keys are masked, as those that are not decoded yet."""
  draws = np.random.default_rng(batch)
  normal = lambda *shape: jnp.asarray(draws.standard_normal(shape), jnp.float32)
  past, cross = (
    caches.Cache(*(normal(batch, heads, length, head_dim) for _ in range(2))) for _ in range(2)
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
  query, key, value = (jax.random.normal(k, (batch, heads, head_dim)) for k in keys)
  return query, KeyValue(key, value)


@functools.partial(jax.jit, static_argnums=0)
def both(kind, whole, query, row):
  """(of the past, of the prompt), by XLA or natively."""
  attends = whole if kind == "xla" else native.NativeAttention(whole, jnp.arange(len(query)))
  return attends.to_past(query, row), attends.to_prompt(query)


for node in (attention_lib.Attention,):
  jax.tree_util.register_dataclass(
    node,
    [field.name for field in dataclasses.fields(node) if field.name != "float32"],
    ["float32"],
  )


@pytest.mark.parametrize(
  ("batch", "heads", "head_dim", "length"),
  [(1, 1, 8, 4), (3, 2, 8, 13), (8, 6, 64, 128), (5, 3, 32, 63), (2, 2, 24, 9)],
)
@pytest.mark.parametrize("bias", ["one for all rows", "one a row"])
def test_the_numbers_of_xla(batch, heads, head_dim, length, bias):
  whole = drawn(batch, heads, head_dim, length, batch if bias == "one a row" else 1)
  query, row = asked(batch, heads, head_dim)
  for ours, theirs in zip(
    both("native", whole, query, row), both("xla", whole, query, row), strict=True
  ):
    np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_windows_have_the_numbers_of_xla(small, batch):
  positions, whole = 4, drawn(batch, 2, 8, 10)
  query, row = asked(batch * positions, 2, 8)
  draws = np.random.default_rng(0).standard_normal((batch, 2, positions, 10))
  # Each position of each row sees one key more than the one before.
  seen = np.arange(10) <= np.arange(positions)[:, None] + np.arange(batch)[:, None, None, None]
  bias = jnp.asarray(np.where(seen, draws, layers.MASK_BIAS), jnp.float32)
  attends = [
    windows.WindowAttention(whole.cache, bias, whole.cross, whole.cross_bias, False, allowed)
    for allowed in (True, False)
  ]
  for method in ("to_past", "to_prompt"):
    given = (query, row) if method == "to_past" else (query,)
    ours, theirs = (getattr(each, method)(*given) for each in attends)
    np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-5)
    made = jax.make_jaxpr(getattr(attends[0], method))(*given)
    assert "ffi_call" in str(made)


def test_queries_read_the_rows_that_they_name():
  whole = drawn(6, 2, 8, 10)
  query, row = asked(4, 2, 8)
  rows = [5, 0, 3]
  named = native.NativeAttention(whole, jnp.array([*rows, -1], jnp.int32))
  taken = jax.tree.map(lambda x: x[jnp.array([*rows, 0])], (whole.cache, whole.cross))
  bias = whole.cross_bias[jnp.array([*rows, 0])]
  alone = dataclasses.replace(whole, cache=taken[0], cross=taken[1], cross_bias=bias)
  for ours, theirs in [
    (named.to_past(query, row), alone.to_past(query, row)),
    (named.to_prompt(query), alone.to_prompt(query)),
  ]:
    np.testing.assert_allclose(ours[:3], theirs[:3], rtol=2e-5, atol=1e-5)
    assert not ours[3].any() and theirs[3].any()


def test_who_sees_nothing_gets_zeros_and_what_is_nan_stays_so():
  whole = drawn(3, 2, 8, 10)
  hidden = whole.cross_bias.at[1].set(layers.MASK_BIAS)
  keys = whole.cross.keys.at[2, 1, 0, 0].set(jnp.nan)
  cross = caches.Cache(keys, whole.cross.values)
  whole = dataclasses.replace(whole, cross=cross, cross_bias=hidden)
  query, _ = asked(3, 2, 8)
  made = native.NativeAttention(whole).to_prompt(query).reshape(3, 2, 8)
  assert not made[1].any()
  assert jnp.isnan(made[2, 1]).all() and not jnp.isnan(made[:2]).any()
  assert not jnp.isnan(made[2, 0]).any()


def test_keys_that_nobody_may_see_are_not_read():
  whole = drawn(2, 2, 8, 10)
  spoiled = dataclasses.replace(
    whole, cache=jax.tree.map(lambda x: x.at[:, :, -3:].set(jnp.nan), whole.cache)
  )
  query, row = asked(2, 2, 8)
  attends = [native.NativeAttention(each) for each in (whole, spoiled)]
  np.testing.assert_array_equal(*(each.to_past(query, row) for each in attends))


def test_the_exponential_is_that_of_numpy():
  def write(w, frame):
    given, made = frame.argument(0), frame.result(0)
    x, out = frame.numbers(given), frame.numbers(made)
    zero = instructions.number(0)
    for place, part, mask in w.parts(x, zero, frame.size(given, 0), []):
      w.store(w.exp(part), w.item(out, place), mask)

  name = calls.target("calm_test_exp", lambda: frames.handler("exp", write))
  small = np.geomspace(1e-6, 87, 5003)
  x = np.concatenate([-small, [0.0], small]).astype(np.float32)
  exp = jax.ffi.ffi_call(name, jax.ShapeDtypeStruct(x.shape, "float32"))
  np.testing.assert_allclose(exp(x), np.exp(x.astype(np.float64)), rtol=3e-7)
  edges = jnp.array([-1e30, -jnp.inf, jnp.nan], jnp.float32)
  made = jax.ffi.ffi_call(name, jax.ShapeDtypeStruct((3,), "float32"))(edges)
  assert (made[:2] < 1e-37).all() and (made[:2] > 0).all() and jnp.isnan(made[2])


def test_it_is_taken_where_a_function_may_be_called(monkeypatch):
  whole, taken = drawn(8, 2, 8, 4), lambda whole: native.attends(whole, False)
  assert taken(whole) == native.NativeAttention(whole)
  for name in ("cross", "cache"):
    halves = jax.tree.map(lambda x: x.astype(jnp.bfloat16), getattr(whole, name))
    assert taken(dataclasses.replace(whole, **{name: halves})) is None
  with platforms.laid_out_for("tpu"):
    assert taken(whole) is None
  monkeypatch.setattr(calls, "_has_llvmlite", lambda: False)
  assert taken(whole) is None


@pytest.mark.parametrize(
  ("length", "alone", "cores", "pieces"),
  [
    (31, False, 2, 1),
    (32, False, 2, 12),
    (127, True, 2, 1),
    (128, True, 2, 12),
    (128, False, 1, 1),
  ],
)
def test_threads_share_what_is_worth_it(monkeypatch, length, alone, cores, pieces):
  """More of it where they have to be woken."""
  monkeypatch.setattr(calls, "_num_cores", lambda: cores)
  whole, (query, _) = drawn(8, 4, 64, length), asked(8, 4, 64)
  made = native.attends(whole, alone).to_prompt
  assert str(jax.make_jaxpr(made)(query)).count("ffi_call[") == pieces


def quick(function):
  return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def decoded(toy, rule, made, allowed: bool, threshold, active):
  """(generation, caches, the program's text)."""
  program = program_lib.Program(toy.config, rule, engine.LENGTH, engine=made, native=allowed)
  args = toy.weights, engine.encode(toy), active, threshold
  lowered = quick(lambda *args: program.decode_state(*args)).lower(*args)
  state = lowered.compile()(*args)
  return state.generation, state.cache, lowered.as_text()


@pytest.mark.parametrize("adapts", [True, False])
def test_drafts_decode_the_same(small, adapts):
  toy, active = engine.toy(), jnp.arange(len(engine.PROMPTS)) != 3
  rule = exits.Verified(1, 3, "full", adapts=adapts)
  got, _, text = decoded(toy, rule, None, True, jnp.float32(1), active)
  expected, _, plain_text = decoded(toy, rule, None, False, jnp.float32(1), active)
  assert TARGET in text and TARGET not in plain_text
  np.testing.assert_array_equal(got.tokens, expected.tokens)
  assert got.verification.passes.tolist() == expected.verification.passes.tolist()
  np.testing.assert_allclose(got.scores, expected.scores, rtol=1e-4, atol=1e-5)
  full, _, _ = decoded(toy, exits.StaticExit(), None, True, jnp.float32(0), active)
  np.testing.assert_array_equal(got.tokens, full.tokens)


@pytest.mark.parametrize("name", ENGINES)
def test_engines_decode_the_same(small, name):
  toy, (rule, made) = engine.toy(), ENGINES[name]
  active = jnp.arange(len(engine.PROMPTS)) != 3
  limits = jnp.linspace(0.2, 0.9, len(engine.PROMPTS))
  threshold = jnp.float32(0) if name == "static" else limits
  got, cache, text = decoded(toy, rule, made, True, threshold, active)
  expected, plain, plain_text = decoded(toy, rule, made, False, threshold, active)
  assert TARGET in text and TARGET not in plain_text
  np.testing.assert_array_equal(got.tokens, expected.tokens)
  np.testing.assert_array_equal(got.exit_layers, expected.exit_layers)
  np.testing.assert_allclose(got.scores, expected.scores, rtol=1e-4, atol=1e-5)
  assert name == "static" or len(set(np.unique(got.exit_layers)) - {0}) > 1
  for ours, theirs in zip(jax.tree.leaves(cache), jax.tree.leaves(plain), strict=True):
    np.testing.assert_allclose(ours[active], theirs[active], rtol=1e-3, atol=1e-4)


def test_refilled_rows_decode_the_same(small):
  toy, rows = engine.toy(), [row[row > 0].tolist() for row in engine.PROMPTS]
  batches = prompt_batches.plan(rows, batch_size=3, max_input_length=12)
  made = []
  for allowed in (True, False):
    program = program_lib.Program(toy.config, CLASSIFIER, engine.LENGTH, native=allowed)
    encode = lambda batch, program=program: program.encode(
      toy.weights, jnp.asarray(batch.tokens)
    )
    pool = pool_program.PoolProgram(program)
    made.append(pool.decode(toy.weights, batches, 0.5, encode))
  np.testing.assert_array_equal(made[0].tokens, made[1].tokens)
  np.testing.assert_array_equal(made[0].exit_layers, made[1].exit_layers)


def test_loops_of_others_do_not_call_it(small):
  """They may be exported, or split over devices by the compiler."""
  toy, prefix = engine.toy(), jnp.zeros((len(engine.PROMPTS), engine.LENGTH), jnp.int32)
  rows = loops.make_rows(engine.encode(toy), prefix, 0.4, 1, 1)
  loop = loops.Loop(toy.config, CLASSIFIER, engine.LENGTH, None)

  def run(weights):
    empty = loop.empty_cache(weights, rows, len(prefix))
    return loops.greedy_decode(prefix, empty, loop.bind(weights, rows, 1), 1)

  assert TARGET not in jax.jit(run).lower(toy.weights.decoder).as_text()


def test_pieces_cover_every_head_once(small):
  for queries, heads in itertools.product((1, 3, 8, 33), (1, 2, 6)):
    whole, (query, _) = drawn(queries, heads, 8, 4), asked(queries, heads, 8)
    made = jax.make_jaxpr(native.NativeAttention(whole, jnp.arange(queries)).to_prompt)(query)
    sizes = [
      eqn.outvars[0].aval.shape[0] for eqn in made.eqns if eqn.primitive.name == "ffi_call"
    ]
    assert sum(sizes) == queries * heads
    assert len(sizes) == min(calls.PIECES, queries * heads)
