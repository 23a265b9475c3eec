"""Family-wise error by exact enumeration first, then equality with the graphs, then numbers."""

import itertools

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from calm.calibrate.evidence import multiple_testing, p_values


def gate(p_values, error_rate):
  """A graph that is none of the special cases: the first opens all others, which feed back."""
  count = len(p_values)
  edges = np.zeros((count, count))
  edges[0, 1:] = 1.0 / max(1, count - 1)
  edges[1:, 0] = 0.5
  weights = np.concatenate([[0.7], np.full(count - 1, 0.3 / max(1, count - 1))])
  return multiple_testing.graphical(p_values, error_rate, weights=weights, transitions=edges)


PROCEDURES = {**multiple_testing.PROCEDURES, "graph": gate}
P_VALUES = st.lists(st.floats(0.0, 1.0), min_size=1, max_size=6)


def joint_laws():
  """Chances of every vector of k losses in {0, 1} of one prompt: {vector: chance}."""
  generator = np.random.default_rng(7)
  for count, repeats in ((2, 4), (3, 3)):
    vectors = list(itertools.product([0, 1], repeat=count))
    yield count, dict(zip(vectors, np.full(len(vectors), 1 / len(vectors)), strict=True))
    # All thresholds fail together; one fails exactly when the other does not.
    yield count, {(0,) * count: 0.5, (1,) * count: 0.5}
    yield count, {(0,) * (count - 1) + (1,): 0.5, (1,) * (count - 1) + (0,): 0.5}
    for _ in range(repeats):
      chances = generator.dirichlet(np.full(len(vectors), 0.5))
      yield count, dict(zip(vectors, chances, strict=True))


@pytest.mark.parametrize("name", sorted(PROCEDURES))
@pytest.mark.parametrize("tolerance", [0.4, 0.5])
def test_family_wise_error_by_enumeration(name, tolerance):
  """Every outcome of 5 prompts, for laws with every pattern of true and false hypotheses."""
  error_rate, size = 0.2, 5
  for _, law in joint_laws():
    # Move the law so that every hypothesis sits at, above or below its boundary.
    vectors, chances = np.array(list(law)), np.array(list(law.values()))
    means = chances @ vectors
    true = means > tolerance - 1e-12
    if not true.any():
      continue
    outcomes = {}
    for path in itertools.combinations_with_replacement(range(len(vectors)), size):
      ways = np.bincount(path, minlength=len(vectors))
      weight = _multinomial(ways) * np.prod(chances**ways)
      sums = tuple((ways @ vectors).tolist())
      outcomes[sums] = outcomes.get(sums, 0.0) + weight
    assert sum(outcomes.values()) == pytest.approx(1.0)
    wrong = 0.0
    for sums, weight in outcomes.items():
      p = p_values.binomial(np.array(sums), size, tolerance)
      wrong += weight * bool((PROCEDURES[name](p, error_rate).rejected & true).any())
    assert wrong <= error_rate + 1e-9, (law, wrong)


def _multinomial(ways):
  result, left = 1.0, int(ways.sum())
  for way in ways:
    for k in range(int(way)):
      result *= left / (k + 1)
      left -= 1
  return result


@pytest.mark.parametrize("name", sorted(PROCEDURES))
@pytest.mark.parametrize("true", list(itertools.product([False, True], repeat=3))[1:])
def test_family_wise_error_with_uniform_p_values_and_any_pattern_of_truth(name, true):
  """True hypotheses: independent, equal or opposite p-values on a grid; false ones: p = 0."""
  steps, error_rate = 20, 0.25
  grid = (np.arange(steps) + 1) / steps
  mask = np.array(true)
  free = int(mask.sum())
  independent = list(itertools.product(grid, repeat=free))
  equal = [(value,) * free for value in grid]
  opposite = [tuple(v if i % 2 else 1 + 1 / steps - v for i in range(free)) for v in grid]
  for family in (independent, equal, opposite):
    wrong = 0
    for values in family:
      p = np.zeros(3)
      p[mask] = np.minimum(values, 1.0)
      wrong += bool(PROCEDURES[name](p, error_rate).rejected[mask].any())
    assert wrong / len(family) <= error_rate + 1e-12


def same(first, second):
  np.testing.assert_array_equal(first.rejected, second.rejected)
  np.testing.assert_allclose(first.adjusted_p_values, second.adjusted_p_values, rtol=1e-12)


@given(P_VALUES, st.sampled_from([0.05, 0.1, 0.5]))
def test_special_cases_equal_their_graphs(p, error_rate):
  count = len(p)
  first = np.eye(count)[0]
  even = np.full(count, 1 / count)
  graph = multiple_testing.graphical
  same(
    multiple_testing.fixed_sequence(p, error_rate),
    graph(p, error_rate, weights=first, transitions=multiple_testing.chain(count)),
  )
  same(
    multiple_testing.holm(p, error_rate),
    graph(p, error_rate, weights=even, transitions=multiple_testing.complete_graph(count)),
  )
  same(
    multiple_testing.bonferroni(p, error_rate),
    graph(p, error_rate, weights=even, transitions=np.zeros((count, count))),
  )
  same(
    multiple_testing.fixed_sequence(p, error_rate),
    multiple_testing.fallback(p, error_rate, weights=first),
  )


@given(P_VALUES, st.data())
def test_fallback_equals_its_definition(p, data):
  raw = data.draw(st.lists(st.integers(0, 5), min_size=len(p), max_size=len(p)))
  weights = np.array(raw) / max(1, sum(raw))
  carried, expected = 0.0, []
  for value, weight in zip(p, weights, strict=True):
    level = 0.3 * weight + carried
    assume(level == 0.0 or abs(value - level) > 1e-12)  # rounding decides ties
    expected.append(bool(level > 0.0 and value <= level))
    carried = level if expected[-1] else 0.0
  found = multiple_testing.fallback(p, 0.3, weights=weights)
  assert found.rejected.tolist() == expected


@given(P_VALUES, st.floats(0.01, 0.5), st.floats(0.01, 0.5))
def test_adjusted_p_values_decide_at_every_level(p, first, second):
  for procedure in multiple_testing.PROCEDURES.values():
    low, high = procedure(p, min(first, second)), procedure(p, max(first, second))
    np.testing.assert_array_equal(low.adjusted_p_values, high.adjusted_p_values)
    np.testing.assert_array_equal(low.rejected, low.adjusted_p_values <= min(first, second))
    assert np.all(low.rejected <= high.rejected)
    assert np.all(low.adjusted_p_values >= np.array(p) - 1e-15)
    assert sorted(set(low.visited)) == sorted(low.visited)


@given(P_VALUES)
def test_holm_rejects_all_that_bonferroni_does_and_ignores_the_order(p):
  holm, bonferroni = multiple_testing.holm(p, 0.2), multiple_testing.bonferroni(p, 0.2)
  assert np.all(holm.rejected >= bonferroni.rejected)
  np.testing.assert_array_equal(
    multiple_testing.holm(p[::-1], 0.2).rejected, holm.rejected[::-1]
  )


def test_numbers_by_hand():
  p = [0.01, 0.03, 0.2, 0.001]
  fixed = multiple_testing.fixed_sequence(p, 0.05)
  assert fixed.rejected.tolist() == [True, True, False, False]
  assert fixed.adjusted_p_values.tolist() == [0.01, 0.03, 0.2, 0.2]
  assert fixed.visited == (0, 1, 2)
  holm = multiple_testing.holm(p, 0.05)
  np.testing.assert_allclose(holm.adjusted_p_values, [0.03, 0.06, 0.2, 0.004])
  assert holm.rejected.tolist() == [True, False, False, True] and holm.visited == (3, 0, 1)
  bonferroni = multiple_testing.bonferroni(p, 0.05)
  np.testing.assert_allclose(bonferroni.adjusted_p_values, [0.04, 0.12, 0.8, 0.004])
  assert bonferroni.visited == (0, 1, 2, 3)
  weighted = multiple_testing.bonferroni(p, 0.05, weights=[0.0, 0.9, 0.0, 0.1])
  np.testing.assert_allclose(weighted.adjusted_p_values, [1.0, 0.03 / 0.9, 1.0, 0.01])
  # Fallback: half the level first; the third fails and the fourth keeps its own share.
  fallback = multiple_testing.fallback(p, 0.06)
  assert fallback.rejected.tolist() == [True, True, False, True]
  even = multiple_testing.fallback([0.2, 0.02], 0.05, weights=[0.5, 0.5])
  assert even.rejected.tolist() == [False, True]


def test_a_graph_by_hand():
  # Two primary and two secondary hypotheses (Bretz et al. 2009, figure 4 with these numbers).
  edges = [[0, 0.5, 0.5, 0], [0.5, 0, 0, 0.5], [0, 1, 0, 0], [1, 0, 0, 0]]
  result = multiple_testing.graphical(
    [0.02, 0.055, 0.012, 0.1], 0.05, weights=[0.5, 0.5, 0, 0], transitions=edges
  )
  # 0.02 <= 0.025; then 2 holds 0.0125 and falls, handing all to 1: 0.055 > 0.05 stays.
  assert result.rejected.tolist() == [True, False, True, False]
  assert result.visited[:2] == (0, 2)
  np.testing.assert_allclose(result.adjusted_p_values, [0.04, 0.055, 0.048, 0.1])


def test_equality_with_the_level_rejects():
  for procedure in multiple_testing.PROCEDURES.values():
    assert procedure([0.05], 0.05).rejected.tolist() == [True]
    assert procedure([np.nextafter(0.05, 1)], 0.05).rejected.tolist() == [False]


@pytest.mark.parametrize(
  ("p", "error_rate", "message"),
  [
    ([], 0.05, "`p_values` to be a non-empty vector"),
    ([[0.1]], 0.05, "`p_values` to be a non-empty vector"),
    ([1.5], 0.05, r"`p_values` to lie in \[0, 1\]"),
    ([0.1, 1.5], 0.05, r"`p_values` to lie in \[0, 1\]"),
    ([-0.1], 0.05, r"`p_values` to lie in \[0, 1\]"),
    ([0.1], 0.0, "`error_rate` to be in"),
    ([0.1], 1.0, "`error_rate` to be in"),
    ([0.1], float("nan"), "`error_rate` to be in"),
  ],
)
def test_arguments_out_of_range_are_refused(p, error_rate, message):
  for procedure in multiple_testing.PROCEDURES.values():
    with pytest.raises(ValueError, match=message):
      procedure(p, error_rate)


@pytest.mark.parametrize("weights", [[1.0], [0.6, 0.6], [-0.1, 0.5], [float("nan"), 0.5]])
def test_bad_weights_are_refused(weights):
  for procedure in (multiple_testing.bonferroni, multiple_testing.fallback):
    with pytest.raises(ValueError, match="`weights` to be 2 numbers"):
      procedure([0.1, 0.2], 0.05, weights=weights)


@pytest.mark.parametrize(
  ("edges", "message"),
  [
    ([[0.0]], "zero diagonal"),
    ([[0.5, 0.5], [0.0, 0.0]], "zero diagonal"),
    ([[0.0, -1.0], [0.0, 0.0]], "zero diagonal"),
    ([[0.0, 1.5], [0.0, 0.0]], "to sum to at most 1"),
  ],
)
def test_bad_transitions_are_refused(edges, message):
  with pytest.raises(ValueError, match=message):
    multiple_testing.graphical([0.1, 0.2], 0.05, weights=[0.5, 0.5], transitions=edges)


def test_first_shares_are_the_largest_initial_weights():
  assert multiple_testing.first_share("fixed_sequence", 5) == 1.0
  assert (
    multiple_testing.first_share("fallback", 5) == 0.5
    and multiple_testing.first_share("fallback", 1) == 1.0
  )
  assert (
    multiple_testing.first_share("holm", 5)
    == multiple_testing.first_share("bonferroni", 5)
    == 0.2
  )
  assert set(multiple_testing._FIRST_SHARES) == set(multiple_testing.PROCEDURES)
  np.testing.assert_allclose(multiple_testing.front_loaded_weights(3), [0.5, 0.25, 0.25])
  np.testing.assert_allclose(multiple_testing.complete_graph(1), [[0.0]])


def test_adjusted_p_values_end_at_one():
  for procedure in multiple_testing.PROCEDURES.values():
    assert procedure([0.9, 1.0, float("nan")], 0.1).adjusted_p_values.max() == 1.0


def test_rounding_of_sums_is_taken_up_to_its_last_digit():
  most = 1.0 + 1e-12
  assert multiple_testing.check_weights([most], 1).tolist() == [most]
  edges = [[0.0, most], [0.0, 0.0]]
  assert multiple_testing.check_transitions(edges, 2).tolist() == edges
  with pytest.raises(ValueError, match="`weights`"):
    multiple_testing.check_weights([1.0 + 2e-12], 1)
  with pytest.raises(ValueError, match="`transitions`"):
    multiple_testing.check_transitions([[0.0, 1.0 + 2e-12], [0.0, 0.0]], 2)
