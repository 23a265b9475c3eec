"""Caches made and written by functions of this process: numbers, shapes, and where."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calm.exits.layers import KeyValue
from calm.t5 import caches as caches_lib
from calm.t5 import native, platforms, windows
from calm.t5.native import zeros as zeros_lib

pytest.importorskip("llvmlite")


def drawn(*shape: int) -> jax.Array:
  return jnp.asarray(np.random.default_rng(sum(shape)).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize(
  ("batch", "heads", "length", "head_dim", "window"),
  [(1, 4, 9, 32, 1), (3, 2, 13, 24, 4), (8, 3, 5, 7, 1), (2, 1, 6, 64, 6)],
)
def test_windows_are_written_as_xla_writes_them(batch, heads, length, head_dim, window):
  cached, new = (batch, heads, length, head_dim), (batch, heads, window, head_dim)
  caches = [caches_lib.Cache(drawn(*cached) + i, drawn(*cached) - i) for i in range(3)]
  given = [KeyValue(drawn(*new) + i, drawn(*new) - i) for i in range(3)]
  # The last lies behind the room that there is, and is moved into it.
  places = jnp.asarray([(5 * i) % (length + 2) for i in range(batch)], jnp.int32)
  made = native.write(caches, given, places)
  for cache, row, ours in zip(caches, given, made, strict=True):
    theirs = windows.write_window(cache, row, places)
    np.testing.assert_array_equal(ours.keys, theirs.keys)
    np.testing.assert_array_equal(ours.values, theirs.values)


def test_rows_that_are_in_step_name_one_position():
  cache = caches_lib.Cache(drawn(3, 2, 7, 8), drawn(3, 2, 7, 8) + 1)
  row = KeyValue(drawn(3, 2, 1, 8), drawn(3, 2, 1, 8) - 1)
  (one,) = native.write([cache], [row], jnp.array([4], jnp.int32))
  (each,) = native.write([cache], [row], jnp.full(3, 4, jnp.int32))
  np.testing.assert_array_equal(one.keys, each.keys)
  np.testing.assert_array_equal(one.values, each.values)


def test_what_was_given_stays_where_it_is_read_again():
  """An update in place of an array that others hold is an update of a copy."""
  cache = caches_lib.Cache(drawn(1, 2, 7, 8), drawn(1, 2, 7, 8) + 1)
  row = KeyValue(drawn(1, 2, 1, 8), drawn(1, 2, 1, 8) - 1)
  before = np.array(cache.keys)
  both = jax.jit(lambda cache: (native.write([cache], [row], jnp.array([4])), cache))
  (made,), kept = both(cache)
  np.testing.assert_array_equal(cache.keys, before)
  np.testing.assert_array_equal(kept.keys, before)
  assert np.any(np.asarray(made.keys) != before)


def test_zeros_are_zeros_of_the_same_shapes():
  arrays = {
    "keys": jnp.ones((2, 3, 5, 7), jnp.float32),
    "tokens": jnp.ones((2, 9), jnp.int32),
    "one": jnp.ones((), jnp.float32),
    "flags": jnp.ones((2, 3), bool),
  }
  made = jax.jit(native.zeros_like)(arrays)
  assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, arrays)
  assert jax.tree.map(lambda x: x.dtype, made) == jax.tree.map(lambda x: x.dtype, arrays)
  assert made["flags"].all()  # not ours: as XLA made them
  assert not any(np.any(made[name]) for name in ("keys", "tokens", "one"))
  assert str(jax.make_jaxpr(native.zeros_like)(arrays)).count("ffi_call[") == 1


def test_zeros_are_xlas_where_they_are_many_or_nothing_may_be_called(monkeypatch):
  arrays = [jnp.zeros((4, 4), jnp.float32)]
  calls = lambda: str(jax.make_jaxpr(lambda x: native.zeros_like(x))(arrays)).count("ffi_call[")
  assert calls() == 1
  with platforms.laid_out_for("tpu"):
    assert calls() == 0
  monkeypatch.setattr(zeros_lib, "MOST_NUMBERS", 15)
  assert calls() == 0
