"""Exit rules and propagation on a toy decoder of a few lines: no network.

Every layer adds 1 to the state, which begins at 0: d^i = i. Layer i makes the key 10 i + d of
its input state d (so 10 i + i - 1 where it ran) and the value of the opposite sign. Any head
says the number in the state, so that the token is the layer whose state was read.
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
# Confidence [layer, row]; row 0 clears 0.5 at layer 1, row 1 at 3, row 2 never before the last.
TABLE = np.array(
  [[0.5, 0.2, 0.1], [0.0, 0.4, 0.3], [0.9, 0.8, 0.2], [0.7, 0.6, 0.05]], np.float32
)


@dataclasses.dataclass(frozen=True)
class Given:
  """A measure that reads a table [layers, batch], and one of cheaper bounds where given."""

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


def toy_layers(calls: list | None = None) -> layers_lib.Layers:
  calls = [] if calls is None else calls

  def key_value(name, layer, hidden):
    calls.append((name, layer))
    key = (10.0 * layer + hidden)[:, None, :]
    return layers_lib.KeyValue(key, -key)

  def logits(hidden):
    calls.append(("logits", 0))
    return 5.0 * jax.nn.one_hot(hidden[:, 0].astype(jnp.int32), L + 2)

  def code(layer, hidden):
    """A one of the layer's own: what learned propagation needs of this network, exactly."""
    return jnp.broadcast_to(jax.nn.one_hot(layer - 1, L), (len(hidden), L))

  def predict(layer, state):
    # Every layer adds 1.
    missing = jnp.maximum(layer - 1.0 - jnp.arange(1.0, L + 1.0), 0.0)
    return state[:, :2] + (state[:, 2:] @ missing)[:, None]

  return layers_lib.Layers(
    num_layers=L,
    code=code,
    predict=predict,
    run=lambda layer, hidden: (hidden + 1.0, key_value("run", layer, hidden)),
    project=lambda layer, hidden: key_value("project", layer, hidden),
    logits=logits,
    exit_logit=lambda hidden: hidden[:, 0],
    shortlist_logits=logits,
    probe_logit=lambda layer, read, hidden, previous: hidden[:, 0],
  )


def taking(rule, layers=None):
  """(threshold, active) -> one token of every row; compiled once for all of them."""
  layers = layers or toy_layers()
  decide = jax.jit(lambda *args: rule(layers, *args))

  def take(threshold: Any = 0.5, active=(True, True, True)):
    hidden = jnp.zeros((len(active), 2))
    return decide(hidden, jnp.array(active), jnp.asarray(threshold), jnp.int32(0))

  return take


def take(rule, threshold: Any = 0.5, *, active=(True, True, True), layers=None):
  """One token of every row."""
  return taking(rule, layers)(threshold, active)


def keys(token_exit) -> np.ndarray:
  """[row, layer] first number of every key; values must be their negatives."""
  for row in token_exit.rows:
    np.testing.assert_array_equal(row.value, -row.key)
  return np.stack([row.key[:, 0, 0] for row in token_exit.rows], axis=1)


def tokens(token_exit) -> list[int]:
  return jnp.argmax(token_exit.logits, axis=-1).tolist()


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
  ("uses_head", "allowed"),
  [(True, None), (False, None), (True, (2,)), (False, (1, 3)), (True, (1, 4)), (False, ())],
)
def test_the_rule_is_its_definition(uses_head, allowed):
  @jax.jit
  def decide(table, threshold):
    return take(exits.DynamicExits(Given(table, uses_head), allowed=allowed), threshold)

  rng = np.random.default_rng(0)
  seen = set()
  for threshold in (0.0, 0.3, 0.6, 0.9, NEVER):
    table = rng.uniform(size=(L, 3)).astype(np.float32)
    got = decide(table, jnp.float32(threshold))
    for row in range(3):
      expected = walk(
        table[:, row], threshold, allowed or range(1, L) if allowed is None else allowed
      )
      fields = got.exit_layer[row], got.confidence[row], got.rejected_confidence[row]
      np.testing.assert_array_equal(fields, expected)
      assert tokens(got)[row] == expected[0]
      seen.add(expected[0])
  assert allowed == () or len(seen) > 1


@pytest.mark.parametrize(
  ("name", "expected"),
  [
    # Rows leave at 1, 3 and 4. Where a layer ran: 10, 21, 32, 43.
    ("exit_state", [[10, 21, 31, 41], [10, 21, 32, 43], [10, 21, 32, 43]]),
    ("first_state", [[10, 21, 31, 41], [10, 21, 32, 41], [10, 21, 32, 43]]),
    ("learned", [[10, 21, 32, 43], [10, 21, 32, 43], [10, 21, 32, 43]]),
    ("copy_projections", [[10, 10, 10, 10], [10, 21, 32, 32], [10, 21, 32, 43]]),
  ],
)
def test_skipped_layers_store_what_the_propagation_says(name, expected):
  rule = exits.DynamicExits(Given(TABLE), propagation=propagation.propagation(name))
  taken = taking(rule)
  np.testing.assert_array_equal(keys(taken()), expected)
  # The same rows when the others have already left the batch.
  for row in range(3):
    active = np.arange(3) == row
    np.testing.assert_array_equal(keys(taken(active=active))[row], expected[row])


@pytest.mark.parametrize(
  ("active", "deepest"), [((True, False, False), 1), ((True, True, False), 3)]
)
def test_layers_above_the_deepest_active_row_do_not_run(active, deepest):
  calls = []
  with jax.disable_jit():
    take(exits.DynamicExits(Given(TABLE)), active=active, layers=toy_layers(calls))
  assert [layer for name, layer in calls if name == "run"] == list(range(1, deepest + 1))
  projected = [layer for name, layer in calls if name == "project"]
  assert projected == list(range(deepest + 1, L + 1))


@pytest.mark.parametrize(
  ("uses_head", "allowed", "expected"),
  [(False, None, 1), (True, None, L), (True, (2,), 2)],  # one head after the exit, or inside
)
def test_no_head_more_than_the_measure_needs(uses_head, allowed, expected):
  calls = []
  rule = exits.DynamicExits(Given(TABLE, uses_head), allowed=allowed)
  with jax.disable_jit():
    take(rule, NEVER, layers=toy_layers(calls))
  assert [name for name, _ in calls].count("logits") == expected


@pytest.mark.parametrize("threshold", [0.0, 0.4, 0.7, NEVER])
def test_a_cheaper_bound_is_cleared_first(threshold):
  table, bounds = np.random.default_rng(3).uniform(size=(2, L, 8)).astype(np.float32)
  got = take(exits.DynamicExits(Given(table, True, bounds)), threshold, active=(True,) * 8)
  for row in range(8):
    # What failed is what is known of a layer: the bound, or else the measure.
    known = np.where(bounds < threshold, bounds, table)[:, row]
    known[-1] = table[-1, row]
    expected = walk(known, threshold, range(1, L))
    fields = got.exit_layer[row], got.confidence[row], got.rejected_confidence[row]
    np.testing.assert_array_equal(fields, expected)
    assert tokens(got)[row] == expected[0]


@pytest.mark.parametrize("depth", [1, 3, L, None])
def test_static_exit_is_a_shallower_decoder(depth):
  calls = []
  rule = exits.StaticExit(depth)
  got = take(rule, layers=toy_layers(calls))
  layers = depth or L
  assert got.exit_layer.tolist() == [layers] * 3 and tokens(got) == [layers] * 3
  assert [name for name, _ in calls] == ["run"] * layers + ["logits"]
  assert len(got.rows) == layers == rule.depth(L)
  assert not got.confidence.any() and not got.rejected_confidence.any()
  for beyond in (-1, L + 1):
    with pytest.raises(ValueError, match=rf"`layer` in 1 \.\.\. {L}, got {beyond}"):
      exits.StaticExit(beyond).depth(L)


# Argmax of the layers, [layer, row]: the last says 2 in every row.
SAID = np.array([[2, 0, 1], [0, 2, 1], [2, 1, 0], [2, 2, 2]])


@pytest.mark.parametrize(
  ("name", "expected"),
  [
    ("exit_state", [[10, 21, 31, 41], [10, 21, 32, 42], [10, 21, 32, 43]]),
    ("first_state", [[10, 21, 31, 41], [10, 21, 31, 41], [10, 21, 32, 43]]),
    ("learned", [[10, 21, 32, 43], [10, 21, 32, 43], [10, 21, 32, 43]]),
    ("copy_projections", [[10, 10, 10, 10], [10, 21, 21, 21], [10, 21, 32, 43]]),
  ],
)
def test_the_oracle_leaves_where_the_last_layers_token_first_stands(name, expected):

  def said(read):  # d^i is i
    tokens = jnp.asarray(SAID)[read[0, 0].astype(jnp.int32) - 1]
    return read[:, :1] * jax.nn.one_hot(tokens, L + 2)

  layers = dataclasses.replace(toy_layers(), logits=said)
  rule = exits.OracleExit(propagation=propagation.propagation(name))
  got = take(rule, layers=layers)
  assert got.exit_layer.tolist() == [1, 2, 4]
  assert tokens(got) == [2, 2, 2] and jnp.max(got.logits, axis=-1).tolist() == [1, 2, 4]
  assert got.confidence.tolist() == [1, 1, 1]
  np.testing.assert_array_equal(keys(got), expected)
  allowed = take(dataclasses.replace(rule, allowed=(2, 3)), layers=layers)
  assert allowed.exit_layer.tolist() == [3, 2, 4]


def test_allowed_layers():
  assert exits.allowed_layers(None, L) == (1, 2, 3)
  assert exits.allowed_layers((2, 4), L) == (2,)
  assert exits.allowed_layers([], L) == ()
  for bad in ([0], [5], [2, 1], [2, 2]):
    with pytest.raises(
      ValueError, match=r"`allowed` exit layers to be ascending within 1 \.\.\. 4"
    ):
      exits.allowed_layers(bad, L)


def test_propagations_are_found_by_name():
  for name, made in propagation.PROPAGATIONS.items():
    assert propagation.propagation(name) is made and made.name == name
  with pytest.raises(ValueError, match=r"`propagation`.*'copy_projections'.*got 'none'"):
    propagation.propagation("none")
