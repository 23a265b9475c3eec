"""The argmax of a head in 8 bits by a function of this process: the float32 head's."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("llvmlite")

from calm import exits
from calm.decode import program as program_lib
from calm.t5 import native, platforms, quantized_heads
from calm.t5.native import calls
from calm.t5.native import heads as native_heads
from tests import engine


@pytest.fixture(autouse=True)
def small(monkeypatch):
  """Heads of any size are native, whatever this machine has."""
  monkeypatch.setattr(native_heads, "LEAST_NUMBERS", 0)
  monkeypatch.setattr(calls, "_num_cores", lambda: 2)


def drawn(pieces: int, emb: int = 24) -> quantized_heads.QuantizedHead:
  normal = np.random.default_rng(pieces).standard_normal((emb, pieces))
  return quantized_heads.quantize(jnp.asarray(normal, jnp.float32))


def states_of(batch: int, emb: int = 24) -> jax.Array:
  return jnp.asarray(np.random.default_rng(batch).standard_normal((batch, emb)), jnp.float32)


def check(head: quantized_heads.QuantizedHead, states: jax.Array) -> None:
  """Tokens are the float32 head's, probabilities as far off as rounding makes them."""
  got, logits = native.greedy(head, states), head.whole(states)
  np.testing.assert_array_equal(got.token, jnp.argmax(logits, axis=1))
  assert got.token.dtype == jnp.int32
  exact = jnp.max(jax.nn.log_softmax(logits), axis=1)
  slack = jnp.max(head.rounded(states).slack, axis=1) + 1e-5
  assert (jnp.abs(got.log_probability - exact) <= slack).all()


@pytest.mark.parametrize("pieces", [1, 5, 16, 33, 40, 1000])
@pytest.mark.parametrize("batch", [1, 2, 3, 8, 33])
def test_the_argmax_is_the_float32_heads(batch, pieces):
  check(drawn(pieces), states_of(batch))


def test_one_core_has_one_call(monkeypatch):
  monkeypatch.setattr(calls, "_num_cores", lambda: 1)
  check(drawn(100), states_of(3))
  assert str(jax.make_jaxpr(native.greedy)(drawn(100), states_of(3))).count("ffi_call[") == 1


def test_long_parts_are_cut_to_what_a_stack_holds(monkeypatch):
  monkeypatch.setattr(native_heads, "MOST_PIECES", 7)
  check(drawn(100), states_of(33))
  sizes = str(jax.make_jaxpr(native.greedy)(drawn(100), states_of(33)))
  assert f"f32[{33 * 15 // calls.PIECES},3]" in sizes


def test_codes_with_a_sign_say_the_same(monkeypatch):
  made = []
  for unsigned in (True, False):
    monkeypatch.setattr(platforms, "multiplies_unsigned", lambda unsigned=unsigned: unsigned)
    made.append(native.greedy(drawn(100), states_of(4)))
  jax.tree.map(np.testing.assert_array_equal, *made)


def test_of_equal_pieces_the_first_is_taken():
  rows = np.random.default_rng(0).standard_normal((24, 60)).astype(np.float32)
  states = jnp.asarray(rows[:, [7, 8]].T)  # each most like its own piece
  rows[:, [21, 50]], rows[:, 40] = rows[:, [7]], rows[:, 8]
  got = native.greedy(quantized_heads.quantize(jnp.asarray(rows)), states)
  assert got.token.tolist() == [7, 8]


def test_any_number_of_pieces_may_be_in_question():
  draws = np.random.default_rng(0)
  one = draws.standard_normal((24, 1))
  near = jnp.asarray(one + 1e-4 * draws.standard_normal((24, 300)), jnp.float32)
  head, states = (
    quantized_heads.quantize(near),
    jnp.tile(jnp.asarray(one.T, jnp.float32), (4, 1)),
  )
  bound = head.rounded(states)
  floor = jnp.max(bound.logits - bound.slack, axis=1, keepdims=True)
  assert jnp.sum(bound.logits + bound.slack >= floor) > 4 * quantized_heads.CANDIDATES
  check(head, states)


def test_a_row_that_is_nan_spoils_no_other():
  head, states = drawn(50), states_of(4)
  clean = native.greedy(head, states)
  got = native.greedy(head, states.at[2, 3].set(jnp.nan))
  assert jnp.isnan(got.log_probability[2]) and 0 <= int(got.token[2]) < 50
  others = jnp.array([0, 1, 3])
  np.testing.assert_array_equal(got.token[others], clean.token[others])
  np.testing.assert_array_equal(got.log_probability[others], clean.log_probability[others])


def test_it_is_taken_where_it_is_faster(monkeypatch):
  head, states = drawn(50), states_of(4)
  assert native.greedy(head, states) is not None
  narrow = dataclasses.replace(head, rows=head.rows.astype(jnp.bfloat16))
  assert native.greedy(narrow, states) is None
  with platforms.laid_out_for("tpu"):
    assert native.greedy(head, states) is None
  monkeypatch.setattr(native_heads, "LEAST_NUMBERS", 201)
  assert native.greedy(head, states) is None
  monkeypatch.setattr(native_heads, "LEAST_NUMBERS", 200)
  assert native.greedy(head, states) is not None


def test_programs_decode_the_same():
  toy = engine.toy()
  weights = program_lib.model_weights(toy.params, toy.config, head_dtype="int8")
  active, made = jnp.ones(len(engine.PROMPTS), bool), {}
  for allowed in (True, False):
    program = program_lib.Program(toy.config, exits.StaticExit(), engine.LENGTH, native=allowed)
    args = weights, engine.encode(toy), active, jnp.float32(0)
    lowered = jax.jit(lambda *args, program=program: program.decode_state(*args)).lower(*args)
    assert ("calm_head" in lowered.as_text()) == allowed
    made[allowed] = lowered.compile()(*args).generation
  np.testing.assert_array_equal(made[True].tokens, made[False].tokens)
  np.testing.assert_allclose(made[True].scores, made[False].scores, rtol=2e-2, atol=2e-2)
