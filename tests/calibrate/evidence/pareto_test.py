import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from calm.calibrate import Support
from calm.calibrate.evidence import betting, p_values, pareto
from tests.calibrate import laws

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
  rest = values[200:, found.order]
  expected = p_values.betting(rest, 0.1, strategy=betting.FIXED_LEVEL)
  np.testing.assert_allclose(found.p_values, expected)
  # They were put in order by p-values that can be compared.
  guesses = p_values.betting(values[:200], 0.1)
  assert np.all(np.diff(guesses[list(found.order)]) >= 0.0)


def test_several_risks_need_all_their_tolerances():
  first, second = table((0.02, 0.02)), table((0.3, 0.02), seed=1)
  options = dict(optimization_rows=np.arange(400) % 2 == 0, error_rate=0.05)
  one = pareto.pareto_test([pareto.Risk(first, 0.1)], [1.0, 2.0], **options)
  both = pareto.pareto_test(
    [pareto.Risk(first, 0.1), pareto.Risk(second, 0.1)], [1.0, 2.0], **options
  )
  assert one.chosen == 0 and both.chosen == 1
  log_p = pareto.max_log_p_values(
    [pareto.Risk(first, 0.1), pareto.Risk(second, 0.1)], range(100), [0, 1], 0.05
  )
  each = [p_values.betting(values[:100], 0.1, log=True) for values in (first, second)]
  np.testing.assert_allclose(log_p, np.maximum(*each))


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
