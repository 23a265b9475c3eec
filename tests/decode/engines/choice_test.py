"""Which engine is taken where none is named."""

import jax
import jax.export
import pytest

from calm import exits
from calm.decode import engines
from calm.exits import confidence, propagation

DYNAMIC = exits.DynamicExits(confidence.Softmax())
COPIES = exits.DynamicExits(
  confidence.Softmax(), propagation=propagation.propagation("copy_projections")
)
DEFERRED, COMPACTED, EAGER = engines.Deferred(), engines.Compacted(), engines.Eager()


@pytest.mark.parametrize(
  ("rule", "platform", "expected"),
  [
    (DYNAMIC, "cpu", [DEFERRED, DEFERRED, COMPACTED, COMPACTED]),
    (DYNAMIC, "one that nobody has tried", [DEFERRED, DEFERRED, COMPACTED, COMPACTED]),
    (DYNAMIC, "tpu", [DEFERRED] * 4),
    *((rule, "cpu", [EAGER] * 4) for rule in (exits.StaticExit(), exits.OracleExit(), COPIES)),
  ],
)
def test_the_fastest_engine_by_rule_rows_and_platform(rule, platform, expected, monkeypatch):
  assert [engines.default_engine(rule, rows, platform) for rows in (1, 7, 8, 32)] == expected
  monkeypatch.setattr(jax, "default_backend", lambda: platform)
  assert [engines.default_engine(rule, rows) for rows in (1, 7, 8, 32)] == expected


def test_rows_may_be_symbolic():
  (rows,) = jax.export.symbolic_shape("b")
  assert engines.default_engine(DYNAMIC, rows) == engines.Eager()
  assert engines.default_engine(DYNAMIC, 8 * rows, "cpu") == engines.Eager()
