"""Multiple testing: family-wise error by exact enumeration first, then numbers
by hand.
"""

import itertools

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from calm.calibrate import Support, p_values, testing
from calm.calibrate.testing import Evidence, decide

PROCEDURES = testing.READABLE
P_VALUES = st.lists(st.floats(0.0, 1.0), min_size=1, max_size=6)


def joint_laws():
  """Chances of every vector of k losses in {0, 1} of one prompt: {vector:
  chance}.
  """
  generator = np.random.default_rng(7)
  for count in (2, 3):
    vectors = list(itertools.product([0, 1], repeat=count))
    yield dict(
      zip(vectors, np.full(len(vectors), 1 / len(vectors)), strict=True)
    )
    # All thresholds fail together; one fails exactly when the other does not.
    yield {(0,) * count: 0.5, (1,) * count: 0.5}
    yield {(0,) * (count - 1) + (1,): 0.5, (1,) * (count - 1) + (0,): 0.5}
    for _ in range(3):
      chances = generator.dirichlet(np.full(len(vectors), 0.5))
      yield dict(zip(vectors, chances, strict=True))


@pytest.mark.parametrize("name", sorted(PROCEDURES))
@pytest.mark.parametrize("tolerance", [0.4, 0.5])
def test_family_wise_error_by_enumeration(name, tolerance):
  """Every outcome of 5 prompts, for laws with every pattern of true and false
  hypotheses.
  """
  error_rate = 0.2
  size = 5
  for law in joint_laws():
    # Move the law so that every hypothesis sits at, above or below its
    # boundary.
    vectors = np.array(list(law))
    chances = np.array(list(law.values()))
    means = chances @ vectors
    true = means > tolerance - 1e-12
    if not true.any():
      continue
    outcomes = {}
    for path in itertools.combinations_with_replacement(
      range(len(vectors)), size
    ):
      ways = np.bincount(path, minlength=len(vectors))
      weight = stats.multinomial.pmf(ways, size, chances)
      sums = tuple((ways @ vectors).tolist())
      outcomes[sums] = outcomes.get(sums, 0.0) + weight
    assert sum(outcomes.values()) == pytest.approx(1.0)
    wrong = 0.0
    for sums, weight in outcomes.items():
      p = p_values.binomial(np.array(sums), size, tolerance)
      adjusted, _ = PROCEDURES[name](p, error_rate)
      wrong += weight * bool(((adjusted <= error_rate) & true).any())
    assert wrong <= error_rate + 1e-9, (law, wrong)


@given(P_VALUES, st.floats(0.01, 0.5), st.floats(0.01, 0.5))
def test_adjusted_p_values_decide_at_every_level(p, first, second):
  for name, procedure in PROCEDURES.items():
    (low, visited), (high, _) = procedure(p, first), procedure(p, second)
    np.testing.assert_array_equal(low, high)
    assert np.all((low >= np.array(p) - 1e-15) & (low <= 1.0))
    assert len(set(visited)) == len(visited)
    if name != "bonferroni":  # of stored calibrations alone
      # The first hypothesis, the only good one, is certified up to its share of
      # the level.
      share = testing.first_share(name, len(p)) * first
      for good, certified in ((0.999 * share, True), (1.001 * share, False)):
        adjusted, _ = procedure([good, *[1.0] * (len(p) - 1)], first)
        assert (adjusted[0] <= first) == certified


@pytest.mark.parametrize(
  ("name", "adjusted", "visited"),
  [
    ("fixed_sequence", [0.01, 0.03, 0.2, 0.2], [0, 1, 2]),
    ("holm", [0.03, 0.06, 0.2, 0.004], [3, 0, 1]),
    ("bonferroni", [0.04, 0.12, 0.8, 0.004], [0, 1, 2, 3]),
    # Half the level first; the third fails and the fourth keeps its own share.
    ("fallback", [0.02, 0.045, 0.24, 0.006], [3, 0, 1, 2]),
  ],
)
def test_numbers_by_hand(name, adjusted, visited):
  found, places = testing.READABLE[name]([0.01, 0.03, 0.2, 0.001], 0.05)
  np.testing.assert_allclose(found, adjusted)
  assert list(places) == visited


@given(P_VALUES)
def test_fallback_equals_its_definition(p):
  """Half of the level first; a rejection hands its whole level to the next."""
  weights = (
    [0.5, *[0.5 / max(1, len(p) - 1)] * (len(p) - 1)] if len(p) > 1 else [1.0]
  )
  carried = 0.0
  expected = []
  for value, weight in zip(p, weights, strict=True):
    level = 0.3 * weight + carried
    assume(abs(value - level) > 1e-12)  # rounding decides ties
    expected.append(value <= level)
    carried = level if expected[-1] else 0.0
  adjusted, _ = testing.fallback(p, 0.3)
  assert (adjusted <= 0.3).tolist() == expected
  assert testing.fallback([0.2], 0.3)[0] == 0.2  # alone it has the whole level
  assert testing.fallback([0.4, 0.1], 0.3)[0].tolist() == [0.8, 0.2]


GRID = [0.9, 0.6, 0.3]


def part(p_values, share=1.0, ascending=False):
  many = len(p_values)
  return Evidence(
    name="",
    tolerance=0.1,
    method="betting",
    support=Support(),
    share=share,
    ascending=ascending,
    num_examples=(9,) * many,
    means=(0.0, float("nan"), 0.5)[:many],
    log_p_values=tuple(np.log(p_values).tolist()),
    upper_bounds=(0.2,) * many,
  )


def check(found, p_values, worst, rejected, adjusted, visited):
  rows, tested, least_certain = found

  def column(name):
    return [getattr(row, name) for row in rows]

  np.testing.assert_allclose(column("p_value"), p_values, rtol=1e-12)
  np.testing.assert_allclose(
    np.exp(column("log_p_value")), p_values, rtol=1e-12
  )
  np.testing.assert_allclose(column("adjusted_p_value"), adjusted, rtol=1e-12)
  assert least_certain.tolist() == worst and column("rejected") == rejected
  assert tested == visited and column("threshold") == GRID


def test_the_worst_part_decides():
  parts = [part([0.01, 0.02, 0.2]), part([0.03, 0.01, 0.04])]
  found = decide(parts, GRID, "fixed_sequence", 0.05)
  largest = [0.03, 0.02, 0.2]
  check(
    found, largest, [1, 0, 0], [True, True, False], [0.03, 0.03, 0.2], (0, 1, 2)
  )


def test_what_is_tested_from_either_end_has_shares_and_needs_both():
  risk = part([0.01, 0.02, 0.024], share=0.5)
  costs = [
    part([0.4, 0.012, 0.006], share=0.5, ascending=True),
    part([0.6, 0.01, 0.008], share=0.5, ascending=True),
  ]
  found = decide([risk, *costs], GRID, "fixed_sequence", 0.05)
  # Over its share, a p-value above 1/2 is 1. Costs are accumulated from the
  # last threshold up.
  largest = [1.0, 0.04, 0.048]
  adjusted = [1.0, 0.04, 0.048]
  check(found, largest, [2, 0, 0], [False, True, True], adjusted, (0, 1, 2))
  found = decide(
    [part([0.01, 0.02, 0.3], share=0.5), *costs], GRID, "fixed_sequence", 0.05
  )
  check(
    found,
    [1.0, 0.04, 0.6],
    [2, 0, 0],
    [False, True, False],
    [1.0, 0.04, 0.6],
    (0, 1, 2),
  )


def test_grids_are_tested_each_for_itself():
  parts = [
    part([0.01, 0.03, 0.02], share=0.5),
    part([0.02, 0.001, 0.024], share=0.5),
  ]
  p = [0.04, 0.06, 0.048]
  certified = [True, False, True]
  for lengths in ((2, 1), (1, 1, 1)):
    found = decide(parts, GRID, "fixed_sequence", 0.05, lengths)
    check(found, p, [1, 0, 1], certified, p, (0, 1, 2))


def test_a_p_value_equal_to_its_level_is_rejected_and_the_next_is_tested():
  assert list(testing.fixed_sequence([0.25, 0.5], 0.25)[1]) == [0, 1]
  assert testing.holm([0.125, 0.5], 0.25)[1] == [0, 1]
  rows, visited, _ = decide(
    [part([0.25, 0.5, 0.1])], GRID, "fixed_sequence", 0.25
  )
  assert rows[0].rejected and visited == (0, 1)
