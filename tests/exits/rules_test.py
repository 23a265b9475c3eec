"""Exit rules on a toy decoder of a few lines: no network.

Every layer adds 1 to the state, which begins at 0: d^i = i. Any head says the
number in the state, so that the token is the layer whose state was read.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calm import exits
from calm.exits import layers as layers_lib
from calm.exits import propagation, schedules

L = 4
NEVER = schedules.NEVER_EXIT
# Confidence [layer, row]; row 0 clears 0.5 at layer 1, row 1 at 3, row 2 never
# before the last.
TABLE = np.array(
  [[0.5, 0.2, 0.1], [0.0, 0.4, 0.3], [0.9, 0.8, 0.2], [0.7, 0.6, 0.05]],
  np.float32,
)


@dataclasses.dataclass(frozen=True)
class Given:
  """A measure that reads a table [layers, batch], and one of cheaper bounds
  where given.
  """

  table: Any
  uses_head: Any = False
  bounds: Any = None
  name: ClassVar[str] = "given"
  uses_shortlist: ClassVar[bool] = False
  part: ClassVar[str | None] = None

  def __call__(self, view):
    if self.uses_head:
      view.logits()
    return jnp.asarray(self.table)[view.layer - 1]

  @property
  def bound(self):
    if self.bounds is None:
      return None
    return lambda view: jnp.asarray(self.bounds)[view.layer - 1]


def toy_layers(calls: list) -> layers_lib.Layers:
  """It writes down what it is asked to compute."""

  def key_value(name, layer, hidden):
    calls.append((name, layer))
    return layers_lib.KeyValue(hidden[:, None, :], hidden[:, None, :])

  def logits(hidden):
    calls.append(("logits", 0))
    return 5.0 * jax.nn.one_hot(hidden[:, 0].astype(jnp.int32), L + 2)

  return layers_lib.Layers(
    num_layers=L,
    code=lambda layer, hidden: hidden,
    predict=lambda layer, state: state,
    run=lambda layer, hidden: (hidden + 1.0, key_value("run", layer, hidden)),
    project=lambda layer, hidden: key_value("project", layer, hidden),
    logits=logits,
    exit_logit=lambda hidden: hidden[:, 0],
    shortlist_logits=logits,
    probe_logit=lambda layer, read, hidden, previous: hidden[:, 0],
  )


def take(rule, threshold: Any = 0.5, *, active=(True, True, True), layers=None):
  """One token of every row."""
  hidden = jnp.zeros((len(active), 2))
  layers = toy_layers([]) if layers is None else layers
  return rule(
    layers, hidden, jnp.array(active), jnp.asarray(threshold), jnp.int32(0)
  )


def walk(confidences, threshold, allowed):
  """(exit layer, confidence, rejected) of one row, by the definition."""
  rejected = 0.0
  for layer in range(1, L + 1):
    if layer < L and layer not in allowed:
      continue
    if layer == L or confidences[layer - 1] >= threshold:
      return layer, confidences[layer - 1], rejected
    rejected = max(rejected, confidences[layer - 1])


@pytest.mark.parametrize(
  ("kind", "allowed"),
  [
    ("head", None),
    ("state", (1, 3)),
    ("head", (1, 4)),
    ("state", ()),
    ("bound", None),
  ],
)
def test_the_rule_is_its_definition(kind, allowed):
  """Also where a cheaper bound is cleared first."""

  @jax.jit
  def decide(table, bounds, threshold):
    measure = Given(table, kind != "state", bounds if kind == "bound" else None)
    return take(exits.DynamicExits(measure, allowed=allowed), threshold)

  rng = np.random.default_rng(0)
  seen = set()
  for threshold in (0.0, 0.3, 0.6, 0.9, NEVER):
    table, bounds = rng.uniform(size=(2, L, 3)).astype(np.float32)
    got = decide(table, bounds, jnp.float32(threshold))
    # What failed is what is known of a layer: the bound, or else the measure.
    known = np.where((bounds < threshold) & (kind == "bound"), bounds, table)
    known[-1] = table[-1]
    for row in range(3):
      expected = walk(
        known[:, row], threshold, range(1, L) if allowed is None else allowed
      )
      fields = (
        got.exit_layer[row],
        got.confidence[row],
        got.rejected_confidence[row],
      )
      np.testing.assert_array_equal(fields, expected)
      assert jnp.argmax(got.logits[row]) == expected[0]
      seen.add(expected[0])
  assert allowed == () or len(seen) > 1


@pytest.mark.parametrize(
  ("active", "deepest"), [((True, False, False), 1), ((True, True, False), 3)]
)
def test_layers_above_the_deepest_active_row_do_not_run(active, deepest):
  calls = []
  with jax.disable_jit():
    take(
      exits.DynamicExits(Given(TABLE)), active=active, layers=toy_layers(calls)
    )
  assert [layer for name, layer in calls if name == "run"] == list(
    range(1, deepest + 1)
  )
  projected = [layer for name, layer in calls if name == "project"]
  assert projected == list(range(deepest + 1, L + 1))


@pytest.mark.parametrize(
  ("uses_head", "allowed", "expected"),
  # one head after the exit, or inside
  [(False, None, 1), (True, None, L), (True, (2,), 2)],
)
def test_no_head_more_than_the_measure_needs(uses_head, allowed, expected):
  calls = []
  rule = exits.DynamicExits(Given(TABLE, uses_head), allowed=allowed)
  with jax.disable_jit():
    take(rule, NEVER, layers=toy_layers(calls))
  assert [name for name, _ in calls].count("logits") == expected


def test_layers_beyond_the_model_are_named():
  for beyond in (-1, L + 1):
    with pytest.raises(
      ValueError, match=rf"`layer` in 1 \.\.\. {L}, got {beyond}"
    ):
      exits.StaticExit(beyond).depth(L)
  assert exits.allowed_layers(None, L) == (1, 2, 3)
  assert exits.allowed_layers((2, 4), L) == (2,)
  assert exits.allowed_layers([], L) == ()
  for bad in ([0], [5], [2, 1], [2, 2]):
    with pytest.raises(
      ValueError,
      match=r"`allowed` exit layers to be ascending within 1 \.\.\. 4",
    ):
      exits.allowed_layers(bad, L)


def test_propagations_are_found_by_name():
  for name, made in propagation.PROPAGATIONS.items():
    assert propagation.propagation(name) is made and made.name == name
  with pytest.raises(
    ValueError, match=r"`propagation`.*'copy_projections'.*got 'none'"
  ):
    propagation.propagation("none")
