"""Validity first, exactly where laws can be enumerated, by seeded simulation elsewhere."""

import decimal
import fractions
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from calm.calibrate import betting, p_values
from tests.calibrate import laws

SUM_BASED = (
  p_values.hoeffding,
  p_values.hoeffding_bentkus,
  p_values.convex_order,
)
LEVELS = (0.01, 0.05, 0.1, 0.25, 0.5)
TOLERANCES = st.floats(0.005, 0.9)


@pytest.mark.parametrize("p_value", [*SUM_BASED, p_values.binomial], ids=lambda f: f.__name__)
@pytest.mark.parametrize("tolerance", [0.02, 0.1, 0.25, 0.6])
def test_super_uniform_for_bernoulli_losses_exactly(p_value, tolerance):
  for size in (1, 2, 3, 7, 10, 31, 100):
    counts = np.arange(size + 1)
    weights = stats.binom.pmf(counts, size, tolerance)
    laws.assert_super_uniform(p_value(counts, size, tolerance), weights)


def cases():
  for law in laws.UNIT_LAWS:
    for name in ("hoeffding", "hoeffding_bentkus", "convex_order", "betting", "fixed_level"):
      yield law, name
  yield laws.bernoulli, "binomial"
  for law in laws.SIGNED_LAWS:
    yield law, "betting"
    yield law, "fixed_level"


def compute(name, losses, tolerance):
  if name in ("betting", "fixed_level"):
    hedges = name == "fixed_level"
    design = betting.Design(tolerance, 0.05, len(losses), hedges=hedges)
    return np.exp(betting.log_p_value(losses, design))
  return getattr(p_values, name)(losses.sum(axis=0), len(losses), tolerance)


@pytest.mark.parametrize(
  ("law", "name"), list(cases()), ids=lambda v: getattr(v, "__name__", v)
)
def test_super_uniform_at_the_boundary_by_simulation(law, name):
  size, draws = 100, 2000
  for tolerance in (0.05, 0.25):
    generator = np.random.default_rng([size, int(100 * tolerance)])
    losses = law(generator, tolerance, (size, draws))
    p = compute(name, losses, tolerance)
    assert p.shape == (draws,) and np.all((p > 0.0) & (p <= 1.0))
    for level in LEVELS:
      hits = int(np.sum(p <= level))
      test = stats.binomtest(hits, draws, level, alternative="greater")
      assert test.pvalue > 1e-5, (tolerance, level, hits / draws)


@given(st.integers(1, 400), st.floats(0, 1), st.floats(0, 1), TOLERANCES)
def test_p_does_not_fall_as_the_sum_grows(size, first, second, tolerance):
  low, high = sorted([first * size, second * size])
  for p_value in SUM_BASED:
    assert p_value(low, size, tolerance) <= p_value(high, size, tolerance) * (1 + 1e-9)
  ordered = [p_value(low, size, tolerance) for p_value in SUM_BASED]
  assert ordered[2] <= ordered[1] * (1 + 1e-9) and ordered[1] <= ordered[0] * (1 + 1e-9)
  low, high = math.floor(low), math.floor(high)
  assert p_values.binomial(low, size, tolerance) <= p_values.binomial(high, size, tolerance)


@given(st.integers(1, 30), st.fractions(0, 1, max_denominator=8), st.integers(1, 15))
def test_convex_order_equals_exact_fractions(size, share, sixteenths):
  tolerance = fractions.Fraction(sixteenths, 16)
  total = share * size
  mass = [
    math.comb(size, j) * tolerance**j * (1 - tolerance) ** (size - j) for j in range(size + 1)
  ]
  ratios = [
    sum(mass[j] * (h - j) for j in range(h)) / (h - total)
    for h in range(math.floor(total) + 1, size + 2)
  ]
  expected = float(min([fractions.Fraction(1), *ratios]))
  found = p_values.convex_order(float(total), size, float(tolerance))
  assert found == pytest.approx(expected, rel=1e-10)


def test_hoeffding_bentkus_by_hand():
  assert p_values.hoeffding(5.0, 100, 0.1) == pytest.approx(math.exp(-0.5), rel=1e-12)
  # n = 10, sum 0.5: KL term exp(-10 (0.05 log(0.05/0.3) + 0.95 log(0.95/0.7))), Bentkus e P(B
  # <= 1)
  divergence = 0.05 * math.log(0.05 / 0.3) + 0.95 * math.log(0.95 / 0.7)
  bentkus = math.e * (0.7**10 + 10 * 0.3 * 0.7**9)
  expected = min(math.exp(-10 * divergence), bentkus)
  assert p_values.hoeffding_bentkus(0.5, 10, 0.3) == pytest.approx(expected, rel=1e-12)
  # The Bentkus term is the smaller one here.
  bentkus = math.e * stats.binom.cdf(50, 1000, 0.1)
  assert p_values.hoeffding_bentkus(50, 1000, 0.1) == pytest.approx(bentkus, rel=1e-9)
  divergence = 0.05 * math.log(0.5) + 0.95 * math.log(0.95 / 0.9)
  assert bentkus < math.exp(-1000 * divergence)


def test_large_samples_do_not_underflow_in_log_space():
  size = 10**6
  for p_value in (*SUM_BASED, p_values.binomial):
    log_p = p_value(1000, size, 0.25, log=True)
    assert np.isfinite(log_p) and log_p < -2e5 / 1.7 and p_value(1000, size, 0.25) == 0.0
  exact = stats.binom.logpmf(1000, size, 0.25)  # the largest term of the lower tail
  assert p_values.binomial(1000, size, 0.25, log=True) == pytest.approx(exact, rel=1e-4)
  design = betting.Design(0.5, 0.05, 20_000)
  assert betting.log_p_value(np.zeros((20_000, 1)), design) < -1000


def test_tails_beyond_float64_join_the_rest():
  counts = np.array([0, 5, 300])
  logs = p_values.binomial(counts, [3000, 3000, 3000], 0.3, log=True)
  table = p_values.log_binomial_cdf_table(3000, 0.3)
  np.testing.assert_allclose(logs, table[counts], rtol=1e-10)
  mixed = p_values.binomial([[0, 5], [0, 900]], 3000, [[0.3, 0.3], [0.4, 0.3]], log=True)
  assert mixed[1, 0] == pytest.approx(3000 * math.log(0.6)) and mixed[1, 1] > -1.0
  np.testing.assert_allclose(mixed[0], table[[0, 5]], rtol=1e-10)
  beside = p_values.binomial([0, 1500], 3000, [0.3, 0.5], log=True)  # one tail is not so small
  assert beside[0] == logs[0] and beside[1] == p_values.binomial(1500, 3000, 0.5, log=True)
  np.testing.assert_allclose(
    np.exp(table), stats.binom.cdf(np.arange(3001), 3000, 0.3), atol=1e-9
  )


def test_means_that_are_not_quite_whole_do_not_move_the_ceiling():
  for count in (7, 29, 57):
    for total in (100 * (count / 100), 100 * (1 - (1 - count / 100)), count * (1 + 1e-10)):
      exact = p_values.binomial(total, 100, 0.7)
      assert exact == pytest.approx(stats.binom.cdf(count, 100, 0.7), rel=1e-9)
  at = lambda total: p_values.hoeffding_bentkus(total, 100, 0.7)
  assert at(29.001) >= at(29)


def test_bentkus_rounds_sums_up_also_in_its_bound():
  bound = p_values.invert(p_values.hoeffding_bentkus, 1.99, 100, error_rate=0.05)
  assert bound > 0.06
  assert math.e * stats.binom.cdf(2, 100, bound) == pytest.approx(0.05, rel=1e-4)
  assert math.e * stats.binom.cdf(1, 100, bound) < 0.03  # what floor would have called 0.05


def exact_binomial_cdf(count, size, probability):
  """The sum of the mass in 50 digits, from its largest term down."""
  with decimal.localcontext() as context:
    context.prec = 50
    success = decimal.Decimal(probability)
    failure = 1 - success
    term = decimal.Decimal(math.comb(size, count)) * success**count * failure ** (size - count)
    total = decimal.Decimal(0)
    while count >= 0 and term > total * decimal.Decimal("1e-40"):
      total += term
      term *= decimal.Decimal(count) / (size - count + 1) * failure / success
      count -= 1
    return float(total)


@pytest.mark.parametrize(("count", "tolerance"), [(4950, 0.05), (9900, 0.1), (24_900, 0.25)])
def test_binomial_is_exact_for_many_prompts(count, tolerance):
  expected = exact_binomial_cdf(count, 10**5, tolerance)
  assert p_values.binomial(count, 10**5, tolerance) == pytest.approx(expected, rel=1e-13)
  assert p_values.binomial(10**5, 10**5, tolerance) == 1.0
