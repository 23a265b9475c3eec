import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from calm.calibrate import Support
from calm.calibrate.evidence import betting, p_values, pareto
from calm.calibrate.generations import order
from tests.calibrate import laws

NAMES = [f"{row:09d}" for row in range(400)]
POINTS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=12)


@given(POINTS)
def test_the_front_is_what_nothing_beats(points):
  found = pareto.front(points).tolist()
  beaten = [
    any(all(a <= b for a, b in zip(q, p, strict=True)) and q != p for q in points)
    for p in points
  ]
  first = [points.index(p) == i for i, p in enumerate(points)]
  assert found == [i for i in range(len(points)) if not beaten[i] and first[i]]


def table(means, count=400, seed=0, law=laws.mostly_zero):
  generator = np.random.default_rng(seed)
  return np.stack([law(generator, mean, count) for mean in means], axis=1)


def test_the_cheapest_certified_configuration_is_chosen():
  values = table((0.3, 0.02, 0.05, 0.01))
  risk = pareto.Risk(values, 0.1)
  found = pareto.pareto_test(
    [risk], [1.0, 2.0, 3.0, 4.0], optimization_rows=range(200), error_rate=0.05
  )
  assert found.chosen == 1 and found.num_examples == 200
  assert found.order[-1] == 0 and not found.rejected[-1]  # the riskiest comes last
  assert sorted(found.rows) == list(range(200, 400))
  rest = values[np.ix_(found.rows, found.order)]
  expected = p_values.betting(rest, 0.1, strategy=betting.FIXED_LEVEL)
  np.testing.assert_allclose(found.p_values, expected)
  # They were put in order by p-values that can be compared.
  first = [row for row in order.seeded_order(NAMES, found.seed) if row < 200]
  guesses = p_values.betting(values[first], 0.1)
  assert np.all(np.diff(guesses[list(found.order)]) >= 0.0)


def test_several_risks_need_all_their_tolerances():
  first, second = table((0.02, 0.02)), table((0.3, 0.02), seed=1)
  options = dict(optimization_rows=np.arange(400) % 2 == 0, error_rate=0.05)
  one = pareto.pareto_test([pareto.Risk(first, 0.1)], [1.0, 2.0], **options)
  both = pareto.pareto_test(
    [pareto.Risk(first, 0.1), pareto.Risk(second, 0.1)], [1.0, 2.0], **options
  )
  assert one.chosen == 0 and both.chosen == 1
  for values, found in zip((first, second), both.evidence, strict=True):
    rows = values[np.ix_(both.rows, both.order)]
    log_p = p_values.betting(rows, 0.1, strategy=betting.FIXED_LEVEL, log=True)
    np.testing.assert_allclose(found.log_p_values, log_p)
    np.testing.assert_allclose(found.means, rows.mean(axis=0))
    assert np.all((found.upper_bounds <= 0.1) == (np.exp(log_p) <= 0.05))
  largest = np.max([found.log_p_values for found in both.evidence], axis=0)
  np.testing.assert_allclose(both.p_values, np.exp(largest))


def test_family_wise_error_with_an_order_learned_from_the_other_half():
  generator = np.random.default_rng(5)
  wrong, draws = 0, 300
  for _ in range(draws):
    values = laws.bernoulli(generator, np.array([0.2, 0.2, 0.2, 0.02]), (120, 4))
    risk = pareto.Risk(values, 0.199, Support(binary=True))
    found = pareto.pareto_test(
      [risk], [1.0, 2.0, 3.0, 4.0], optimization_rows=range(60), error_rate=0.1
    )
    certified = {found.order[i] for i in np.flatnonzero(found.rejected)}
    wrong += bool(certified & {0, 1, 2})
  assert stats.binomtest(wrong, draws, 0.1, alternative="greater").pvalue > 1e-3


def test_the_paper_method_clips_signed_risks_and_nothing_certified_is_none():
  values = table((0.4, 0.5)) - 0.1
  risk = pareto.Risk(values, 0.05, Support(lower=-1.0), method="paper")
  found = pareto.pareto_test([risk], [1.0, 2.0], optimization_rows=range(100), error_rate=0.05)
  assert found.chosen is None and not found.rejected.any()


def test_misuse_is_refused():
  values = table((0.1, 0.2))
  good = pareto.Risk(values, 0.1)
  options = dict(optimization_rows=range(100), error_rate=0.05)
  for risks, costs in (
    ([], [1.0, 2.0]),
    ([good], [1.0]),
    ([good, pareto.Risk(values[:10], 0.1)], [1.0, 2.0]),
    ([pareto.Risk(values[0], 0.1)], [1.0, 2.0]),
  ):
    with pytest.raises(ValueError, match="`risks` to hold losses"):
      pareto.pareto_test(risks, costs, **options)
  for rows in ([], range(400)):
    with pytest.raises(ValueError, match="`optimization_rows` to leave rows on both sides"):
      pareto.pareto_test([good], [1.0, 2.0], optimization_rows=rows, error_rate=0.05)
  with pytest.raises(ValueError, match="declared range"):
    pareto.pareto_test([pareto.Risk(values - 0.5, 0.1)], [1.0, 2.0], **options)


@pytest.mark.parametrize("given", [False, True])
def test_how_rows_are_stored_plays_no_part(given):
  """Sorted columns, at risk exactly the tolerance: as often wrong as in any other order."""
  generator = np.random.default_rng(11)
  options = {} if not given else {"optimization_rows": np.arange(200) % 2 == 0}
  wrong, draws = 0, 200
  for _ in range(draws):
    values = np.sort((generator.random((200, 1)) < 0.1) * 1.0, axis=0)
    found = pareto.pareto_test([pareto.Risk(values, 0.1)], [1.0], error_rate=0.05, **options)
    wrong += found.chosen is not None
  assert stats.binomtest(wrong, draws, 0.05, alternative="greater").pvalue > 1e-3


def test_half_of_the_rows_are_tested_and_a_seed_repeats_it():
  values = table((0.02, 0.3), count=101)
  risk = pareto.Risk(values, 0.1)
  names = [f"prompt {row}" for row in range(101)]
  found = pareto.pareto_test([risk], [1.0, 2.0], error_rate=0.05, names=names)
  assert found.num_examples == 51 and len(set(found.rows)) == 51
  expected = order.seeded_order(names, found.seed)
  np.testing.assert_array_equal(found.rows, expected[50:])
  again = pareto.pareto_test([risk], [1.0, 2.0], error_rate=0.05, names=names, seed=found.seed)
  np.testing.assert_array_equal(again.p_values, found.p_values)
  other = pareto.pareto_test([risk], [1.0, 2.0], error_rate=0.05, names=names, seed="0")
  assert not np.array_equal(other.rows, found.rows)


def test_costs_of_prompts_are_read_on_the_optimization_rows_alone():
  values = table((0.02, 0.02))
  costs = np.tile([1.0, 2.0], (400, 1))
  options = {"optimization_rows": range(200), "error_rate": 0.05}
  costs[200:] = [9.0, 0.0]  # what the test rows cost is not looked at
  found = pareto.pareto_test([pareto.Risk(values, 0.1)], costs, **options)
  assert found.chosen == 0 and found.costs[list(found.order).index(0)] == 1.0
  flat = pareto.pareto_test([pareto.Risk(values, 0.1)], [1.0, 2.0], **options)
  assert flat.order == found.order


def test_rounding_leaves_the_range_by_a_billionth_at_most():
  values = np.array([[0.0 - 1e-9, 0.5], [1.0 + 1e-9, 0.5]])
  found = pareto.evidence(pareto.Risk(values, 0.1), [0, 1], [0, 1], 0.05)
  np.testing.assert_allclose(found.means, [0.5, 0.5])
  assert found.method == "betting"  # p-values that can be compared, unless it is said otherwise
  for odd in (-2e-9, 1.0 + 2e-9, -0.5, 1.5):
    with pytest.raises(ValueError, match="to lie in the declared range"):
      pareto.evidence(pareto.Risk([[odd], [0.0]], 0.1), [0, 1], [0], 0.05)


def test_a_configuration_is_as_likely_as_its_worst_risk():
  """The first is worse at the second risk than the other is at any; sums decide here."""
  bad = np.repeat([[0.0, 0.1, 0.05]], 80, axis=0)
  good = np.repeat([[0.2, 0.1, 0.15]], 80, axis=0)
  risks = [pareto.Risk(values, 0.3, method="convex_order") for values in (bad, good)]
  found = pareto.pareto_test(risks, [3.0, 2.0, 1.0], error_rate=0.05)
  assert found.order == (1, 2, 0)


def test_one_unknown_cost_among_many_is_refused():
  with pytest.raises(ValueError, match="`costs` to be finite"):
    pareto.pareto_test([pareto.Risk(table((0.1, 0.1)), 0.2)], [1.0, np.nan], error_rate=0.05)
