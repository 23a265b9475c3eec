"""Confidence measures: laws, numbers by hand, and laziness."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calm.exits import confidence


def view(layer=2, hidden=((3.0, 4.0),), previous=((4.0, 3.0),), logits=None, exit_logit=None):
  """A view whose lazy parts fail the test when nothing was given for them."""

  def given(value):
    def compute():
      assert value is not None, "computed what the measure does not need"
      return jnp.asarray(value, jnp.float32)

    return compute

  states = jnp.array(hidden), jnp.array(previous)
  heads = given(logits), given(exit_logit), given(None), given(None)
  return confidence.LayerView(layer, *states, *heads)


def test_softmax_margin_is_the_gap_of_sorted_probabilities():
  logits = 4 * jax.random.normal(jax.random.key(0), (3, 50, 30))
  top = jnp.sort(jax.nn.softmax(logits), axis=-1)[..., -2:]
  margin = confidence.softmax_margin(logits)
  np.testing.assert_allclose(margin, top[..., 1] - top[..., 0], atol=1e-6)
  assert margin.shape == (3, 50)
  assert margin.min() < 0.1 and margin.max() > 0.9
  shifted = confidence.softmax_margin(logits + 1000.0)
  np.testing.assert_allclose(shifted, margin, atol=1e-3)


def test_ties_have_no_margin_and_far_gaps_saturate_at_exactly_one():
  logits = jnp.array([[2.0, 2.0, 2.0], [0.0, 200.0, 0.0], [0.0, 20.0, 0.0]])
  assert confidence.softmax_margin(logits).tolist() == [0.0, 1.0, 1.0]
  more = jnp.array([[1.0, 0.2, 0.5, -jnp.inf]])  # which counts for nothing
  margins = confidence.softmax_margin(more), confidence.softmax_margin(more[:, :3])
  np.testing.assert_allclose(*margins, rtol=1e-6)


def test_cosine_by_hand():
  hidden = jnp.array([[3.0, 4.0], [1.0, 0.0], [1.0, 0.0], [0.0, 0.0], [3e3, 4e3]])
  previous = jnp.array([[4.0, 3.0], [-1.0, 0.0], [0.0, 2.0], [1.0, 1.0], [3.0, 4.0]])
  got = confidence.cosine_similarity(hidden, previous)
  np.testing.assert_allclose(got, [0.96, 0.0, 0.0, 0.0, 1.0], atol=1e-6)


def test_state_needs_a_layer_before_and_no_head():
  measure = confidence.State()
  np.testing.assert_allclose(measure(view(layer=2)), [0.96], atol=1e-6)
  assert measure(view(layer=1)).tolist() == [0.0]


def test_a_probe_is_one_linear_map_a_layer_of_state_and_evidence():
  hidden, previous = jnp.array([[3.0, 4.0]]), jnp.array([[4.0, 3.0]])
  listed = jnp.log(jnp.array([[0.5, 0.25, 0.125, 0.125]]))
  known = confidence.evidence(hidden, previous, listed)
  by_hand = [np.log(1 + np.log(2)), 0.25, 0.125, 0.96, 0.5 * np.log(12.5)]
  np.testing.assert_allclose(known[0], by_hand, rtol=1e-5)
  probes = confidence.Probes(
    kernel=jnp.array([[0.0, 1.0], [0.0, 2.0]]),
    features=jnp.array([[0.0, 1.0]] * confidence.NUM_FEATURES),
    bias=jnp.array([0.0, -1.0]),
  )
  assert probes.num_layers == 3
  assert probes.logit(1, hidden, known).tolist() == [0.0]
  expected = [3.0 + 8.0 + sum(by_hand) - 1.0]
  np.testing.assert_allclose(probes.logit(2, hidden, known), expected, rtol=1e-5)


def test_measures_are_found_by_name():
  heads = {"softmax": True, "probe": False, "state": False, "classifier": False}
  assert set(heads) <= set(confidence.MEASURES)
  for name, measure in confidence.MEASURES.items():
    assert confidence.measure(name) is measure and measure.name == name
    assert measure.uses_head == heads.get(name, measure.uses_head)
  with pytest.raises(ValueError, match=r"`measure`.*'classifier'.*'state'.*'margin'"):
    confidence.measure("margin")
  for removed in ("entropy", "patience"):
    with pytest.raises(ValueError, match=rf"`measure`.*'{removed}'; calibrate with"):
      confidence.measure(removed)
