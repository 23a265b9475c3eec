"""Confidence measures: ties, saturation, names; `decode/engines_test.py` has
their numbers.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from calm.exits import confidence, layers


def test_ties_have_no_margin_and_far_gaps_saturate_at_exactly_one():
  logits = jnp.array([[2.0, 2.0, 2.0], [0.0, 200.0, 0.0], [0.0, 20.0, 0.0]])
  assert layers.peaks(logits).margin.tolist() == [0.0, 1.0, 1.0]
  more = jnp.array([[1.0, 0.2, 0.5, -jnp.inf]])  # which counts for nothing
  margins = layers.peaks(more).margin, layers.peaks(more[:, :3]).margin
  np.testing.assert_allclose(*margins, rtol=1e-6)


def test_measures_are_found_by_name():
  heads = {"softmax": True, "probe": False, "state": False, "classifier": False}
  assert set(heads) <= set(confidence.MEASURES)
  for name, measure in confidence.MEASURES.items():
    assert confidence.measure(name) is measure and measure.name == name
    assert measure.uses_head == heads.get(name, measure.uses_head)
  with pytest.raises(
    ValueError, match=r"`measure`.*'classifier'.*'state'.*'margin'"
  ):
    confidence.measure("margin")
  for removed in ("entropy", "patience"):
    with pytest.raises(
      ValueError, match=rf"`measure`.*'{removed}'; calibrate with"
    ):
      confidence.measure(removed)
