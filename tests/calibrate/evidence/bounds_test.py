import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from calm.calibrate import Support
from calm.calibrate.evidence import betting, bounds, methods, p_values
from tests.calibrate import laws

SUM_BASED = (
  p_values.hoeffding,
  p_values.hoeffding_bentkus,
  p_values.convex_order,
  p_values.binomial,
)
STRATEGIES = (betting.PLUG_IN, betting.FIXED_LEVEL)


@pytest.mark.parametrize("p_value", SUM_BASED, ids=lambda f: f.__name__)
@given(st.integers(1, 120), st.floats(0, 1), st.sampled_from([0.01, 0.05, 0.3]))
def test_the_bound_is_where_the_p_value_crosses_the_level(p_value, size, share, error_rate):
  total = float(round(share * size))
  bound = float(bounds.invert(p_value, total, size, error_rate=error_rate))
  assert total / size <= bound <= 1.0
  if bound < 1.0:
    assert p_value(total, size, bound) <= error_rate * (1 + 1e-9)
  if bound > 1e-6:
    assert p_value(total, size, min(bound, 1.0) - 3e-9) > error_rate


def test_binomial_bound_is_clopper_pearson():
  for count, size in ((0, 10), (3, 10), (40, 500)):
    found = bounds.invert(p_values.binomial, count, size, error_rate=0.05)
    assert found == pytest.approx(stats.beta.ppf(0.95, count + 1, size - count), abs=2e-9)


def test_bounds_order_as_their_p_values_and_are_vectorised():
  sums = np.array([0.0, 3.3, 17.9, 3.3, 50.0])
  found = [bounds.invert(p, sums, 50, error_rate=0.05) for p in SUM_BASED[:3]]
  assert np.all(found[2] <= found[1] + 1e-9) and np.all(found[1] <= found[0] + 1e-9)
  assert found[2][1] == found[2][3] and found[2][4] == 1.0 and found[0].shape == (5,)


@pytest.mark.parametrize("law", [*laws.UNIT_LAWS, *laws.SIGNED_LAWS], ids=lambda f: f.__name__)
def test_betting_bound_covers(law):
  generator = np.random.default_rng(11)
  lower = -1.0 if law in laws.SIGNED_LAWS else 0.0
  losses = law(generator, 0.1, (150, 1500))
  bound = bounds.betting(losses, error_rate=0.1, lower=lower)
  misses = int(np.sum(bound < 0.1))
  assert stats.binomtest(misses, 1500, 0.1, alternative="greater").pvalue > 1e-5


def test_everything_above_the_betting_bound_is_rejected_without_assuming_an_interval():
  generator = np.random.default_rng(2)
  for law in (laws.bernoulli, laws.mostly_zero, laws.signed):
    lower = -1.0 if law is laws.signed else 0.0
    losses = law(generator, 0.08, (60, 8))
    bound = bounds.betting(losses, error_rate=0.1, lower=lower)
    for column, end in zip(losses.T, bound, strict=True):
      for tolerance in np.linspace(end, 1.0, 80)[:-1]:
        assert p_values.betting(column, tolerance, error_rate=0.1) <= 0.1 * (1 + 1e-9)
      if end < 1.0:
        # ... and it is not far above the largest tolerance that is not rejected.
        below = end - np.linspace(0.0, 0.05, 200)[1:]
        p = [p_values.betting(column, tolerance, error_rate=0.1) for tolerance in below]
        assert max(p) > 0.1


def test_betting_bound_ends():
  assert bounds.betting([0.0], error_rate=0.05) == 1.0
  assert bounds.betting([1.0] * 50, error_rate=0.05) == 1.0
  small = bounds.betting(np.zeros(2000), error_rate=0.05)
  assert 0.0015 < small < 0.003  # -log(0.05) / 2000 is the best that any bound can do
  signed = bounds.betting(np.full((2000, 2), -1.0), error_rate=0.05, lower=-1.0)
  assert signed.shape == (2,) and np.all(signed < -0.99)


def test_planned_size_makes_bets_smaller_and_bounds_wider():
  losses = laws.mostly_zero(np.random.default_rng(4), 0.05, (300, 1))
  planned = bounds.betting(losses, error_rate=0.05, planned_size=3000)
  assert planned > bounds.betting(losses, error_rate=0.05)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda s: s.name)
@pytest.mark.parametrize("law", [laws.mostly_zero, laws.signed], ids=lambda f: f.__name__)
def test_wealth_of_bets_that_aim_elsewhere_grows_with_the_tolerance(strategy, law):
  """So that rejected tolerances are an interval, and halving finds its end."""
  losses = law(np.random.default_rng(6), 0.1, (80, 5))
  free = strategy.free(losses, strategy.design(0.15, 0.05, 80))
  before = np.full(losses.shape, -np.inf)
  for tolerance in np.linspace(0.001, 0.999, 80):
    cap = strategy.design(tolerance, 0.05, 80).cap
    wealth = np.cumsum(np.log1p(np.minimum(free, cap) * (tolerance - losses)), axis=0)
    assert np.all(before <= wealth + 1e-12)
    before = wealth


ALL_METHODS = sorted({*methods.METHODS} - {"auto"})


@pytest.mark.parametrize("name", ALL_METHODS)
@given(
  st.integers(0, 10**6),
  st.sampled_from([1, 2, 30, 150]),
  st.floats(0.003, 0.9),
  st.sampled_from([0.01, 0.05, 0.3]),
  st.sampled_from([laws.bernoulli, laws.mostly_zero, laws.signed]),
)
def test_bounds_agree_with_decisions(name, seed, size, tolerance, error_rate, law):
  generator = np.random.default_rng(seed)
  if name == "binomial":
    law = laws.bernoulli
  lower = -1.0 if law is laws.signed and name.startswith("betting") else 0.0
  means = tolerance * np.array([0.1, 0.5, 0.8, 0.95, 1.0, 1.05])
  losses = np.stack([law(generator, mean, size) for mean in means], axis=1)
  losses = np.clip(losses, lower, 1.0)
  support = Support(lower, binary=name == "binomial")
  sample = methods.Sample(losses, support, tolerance, error_rate)
  log_p, bound = methods.get_method(name, support).evidence(sample, np.ones(6, bool))
  np.testing.assert_array_equal(bound <= tolerance, np.exp(log_p) <= error_rate)
  assert np.all((bound > lower) & (bound <= 1.0))


def test_levels_are_checked():
  with pytest.raises(ValueError, match="`error_rate`"):
    bounds.invert(p_values.hoeffding, 1.0, 10, error_rate=1.0)
  with pytest.raises(ValueError, match="`error_rate`"):
    bounds.betting([0.0], error_rate=0.0)
  with pytest.raises(
    ValueError, match=r"`tolerance` for the bets of 'fixed_level', .* got None"
  ):
    bounds.betting([0.0], error_rate=0.1, strategy=betting.FIXED_LEVEL)


def test_a_level_above_one_half_does_not_go_below_the_mean():
  assert bounds.invert(p_values.binomial, 50, 100, error_rate=0.99) == 0.5
