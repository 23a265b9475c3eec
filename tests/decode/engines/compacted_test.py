"""Compacted batches: each row as the yardstick decodes it alone, caches included."""

import jax.numpy as jnp
import numpy as np
import pytest

from calm import exits
from calm.decode import engines
from calm.decode.engines import compacted
from calm.exits import confidence, propagation, schedules
from tests import engine

SOFTMAX, STATE, CLASSIFIER, PROBE = (
  confidence.MEASURES[name] for name in ("softmax", "state", "classifier", "probe")
)
FIRST, LEARNED = map(propagation.propagation, ("first_state", "learned"))
ENGINE = engines.Compacted()
FITTED = engines.Compacted(ratio=2)


@pytest.mark.parametrize(
  ("rule", "made"),
  [
    (exits.DynamicExits(CLASSIFIER), ENGINE),
    (exits.DynamicExits(PROBE, allowed=(1, 3)), ENGINE),
    (exits.DynamicExits(SOFTMAX, engine.DECAYING, allowed=(2, 3)), FITTED),
    (
      exits.DynamicExits(STATE, propagation=FIRST, allowed=(1, 3)),
      engines.Compacted(chunk_rows=512, buckets=(3,), part_by_row=0.0),
    ),
    (exits.DynamicExits(CLASSIFIER, propagation=LEARNED), FITTED),
    (exits.DynamicExits(SOFTMAX, propagation=LEARNED, allowed=(1, 3)), ENGINE),
  ],
  ids=["classifier", "probe", "softmax", "first_state", "learned", "learned_softmax"],
)
def test_the_yardstick_caches_included(rule, made):
  toy, seen = engine.toy_for(rule), set()
  for threshold in (0.3, 0.6, 0.9, schedules.NEVER_EXIT):
    seen |= set(engine.compare(toy, rule, threshold, engine=made).tolist())
  assert len(seen) >= 2


def test_each_row_keeps_its_own_threshold():
  toy, rule = engine.toy(), exits.DynamicExits(CLASSIFIER)
  thresholds = np.linspace(0.2, 0.9, len(engine.PROMPTS)).astype(np.float32)
  together = engine.run(toy, rule, thresholds, engine=ENGINE)
  for i, threshold in enumerate(thresholds):
    engine.assert_same_row(together, engine.run(toy, rule, threshold), i, i)


def test_a_bucket_begins_with_the_rows_that_stay():
  stays = jnp.array([False, True, False, True, True, False])
  assert compacted.compact(stays).order.tolist() == [1, 3, 4, 0, 2, 5]
  rows = compacted.compact(stays).first(4)
  assert rows.order.tolist() == [1, 3, 4, 0]
  assert rows.rank.tolist() == [3, 0, 4, 1, 2, 5]
  tens = 10 * jnp.arange(6)
  assert rows.take(tens).tolist() == [10, 30, 40, 0]
  assert [rows.row(i, tens).tolist() for i in range(4)] == [[10], [30], [40], [0]]
  assert rows.spread(jnp.array([1, 2, 3, 4]))[jnp.array([1, 3, 4, 0])].tolist() == [1, 2, 3, 4]


def test_bucket_sizes():
  assert ENGINE.sizes(32) == (0, 4, 16, 32)
  assert ENGINE.sizes(8) == (0, 4, 8)
  assert ENGINE.sizes(6) == (0, 3, 6)
  assert ENGINE.sizes(2) == (0, 2)
  assert ENGINE.sizes(1) == (0, 1)
  assert engines.Compacted(ratio=2).sizes(16) == (0, 2, 4, 8, 16)
  assert engines.Compacted(buckets=(16, 4)).sizes(8) == (0, 4, 8)
  with pytest.raises(ValueError, match=r"Expected `ratio` of at least 2, got 1"):
    engines.Compacted(ratio=1)
