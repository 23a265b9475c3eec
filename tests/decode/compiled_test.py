"""Programs are compiled once a shape, and kept within a bound, oldest dropped
first.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from calm.decode import compiled

TRACED = []


@dataclasses.dataclass(frozen=True)
class Toy:
  factor: float

  @compiled.Method
  def times(self, x, *, shift=0.0):
    """Multiplies."""
    TRACED.append((self.factor, x.shape))
    return jax.lax.fori_loop(0, 3, lambda _, y: y * self.factor + shift, x)


@pytest.fixture(autouse=True)
def kept(monkeypatch):
  """Room for two; other tests' programs stay."""
  made = functools.lru_cache(2)(compiled._program.__wrapped__)
  monkeypatch.setattr(compiled, "_program", made)
  TRACED.clear()
  return made


def times(n: int, factor: float = 1.0, **options):
  return Toy(factor).times(np.ones(n, np.float32), **options)


def test_a_shape_is_compiled_once():
  for _ in range(3):
    np.testing.assert_allclose(times(3, 2.0), 8 * np.ones(3))
    np.testing.assert_allclose(times(3, 2.0, shift=1.0), 15 * np.ones(3))
  Toy.times(Toy(3.0), np.ones(3, np.float32))
  assert TRACED == [(2.0, (3,)), (2.0, (3,)), (3.0, (3,))]
  assert Toy.times.__doc__ == "Multiplies."


def test_the_oldest_is_dropped_and_made_again(kept):
  for n in (1, 2, 1, 3):  # 2 was not used for longest
    times(n)
  assert kept.cache_info().currsize == 2
  times(1)
  assert [shape for _, shape in TRACED] == [(1,), (2,), (3,)]
  times(2)
  assert [shape for _, shape in TRACED] == [(1,), (2,), (3,), (2,)]


def test_programs_make_room_when_memory_maps_run_short(kept, monkeypatch):
  times(1)
  times(2)
  monkeypatch.setattr(compiled, "maps_part", lambda: 0.9)
  times(3)
  assert kept.cache_info().currsize == 1
