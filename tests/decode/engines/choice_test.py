"""Which engine is taken where none is named."""

import jax
import jax.export
import pytest

from calm import exits
from calm.decode import engines
from calm.exits import confidence, propagation

DYNAMIC = exits.DynamicExits(confidence.Softmax())
NOTHING_WAITS = (
  exits.StaticExit(),
  exits.OracleExit(),
  exits.DynamicExits(
    confidence.Softmax(), propagation=propagation.propagation("copy_projections")
  ),
)


def chosen(rule, platform) -> list[engines.Engine]:
  return [engines.default_engine(rule, size, platform) for size in (1, 7, 8, 32)]


@pytest.mark.parametrize("platform", ["cpu", "one that nobody has tried"])
def test_a_cpu_moves_rows_where_there_are_many(platform):
  few, many = engines.Deferred(), engines.Compacted()
  assert chosen(DYNAMIC, platform) == [few, few, many, many]


def test_a_tpu_fills_late_and_moves_no_rows():
  assert chosen(DYNAMIC, "tpu") == [engines.Deferred()] * 4


@pytest.mark.parametrize("platform", [None, "cpu", "tpu"])
def test_only_what_can_wait_is_deferred(platform):
  for rule in NOTHING_WAITS:
    assert chosen(rule, platform) == [engines.Eager()] * 4


def test_the_platform_is_jaxs_default_where_none_is_named(monkeypatch):
  assert chosen(DYNAMIC, None) == chosen(DYNAMIC, jax.default_backend())
  monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
  assert chosen(DYNAMIC, None) == chosen(DYNAMIC, "tpu") != chosen(DYNAMIC, "cpu")


def test_rows_may_be_symbolic():
  (rows,) = jax.export.symbolic_shape("b")
  assert engines.default_engine(DYNAMIC, rows) == engines.Eager()
  assert engines.default_engine(DYNAMIC, 8 * rows, "cpu") == engines.Eager()
