"""Programs are compiled once a shape, and kept within a bound, oldest dropped first."""

import dataclasses

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
def fresh(monkeypatch):
  # Other tests' programs stay: theirs are compiled again at most.
  monkeypatch.setattr(compiled, "_kept", type(compiled._kept)())
  TRACED.clear()


def test_a_shape_is_compiled_once():
  for _ in range(3):
    np.testing.assert_allclose(Toy(2.0).times(np.ones(3, np.float32)), 8 * np.ones(3))
    np.testing.assert_allclose(
      Toy(2.0).times(np.ones(3, np.float32), shift=1.0), 15 * np.ones(3)
    )
  Toy.times(Toy(3.0), np.ones(3, np.float32))
  assert TRACED == [(2.0, (3,)), (2.0, (3,)), (3.0, (3,))] and len(compiled._kept) == 3
  assert Toy.times.__doc__ == "Multiplies."


def test_the_oldest_is_dropped_and_made_again(monkeypatch):
  monkeypatch.setattr(compiled, "LIMIT", 2)
  run = lambda n: Toy(1.0).times(np.ones(n, np.float32))
  for n in (1, 2, 1, 3):  # 2 was not used for longest
    run(n)
  assert len(compiled._kept) == 2
  run(1)
  assert [shape for _, shape in TRACED] == [(1,), (2,), (3,)]
  run(2)
  assert [shape for _, shape in TRACED] == [(1,), (2,), (3,), (2,)]


def test_programs_make_room_when_memory_maps_run_short(monkeypatch):
  for n in range(1, 9):
    Toy(1.0).times(np.ones(n, np.float32))
  monkeypatch.setattr(compiled, "maps_part", lambda: 0.9 if len(compiled._kept) > 2 else 0.4)
  Toy(1.0).times(np.ones(9, np.float32))
  assert len(compiled._kept) == 3
