"""Validity first, exactly where laws can be enumerated, by seeded simulation
elsewhere.
"""

import dataclasses
import fractions
import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from calm.calibrate import Support, methods, p_values
from calm.calibrate.betting import (
  Design,
  log_p_value,
  log_wealth,
  upper_bound,
)
from tests.calibrate import laws

SUM_BASED = (
  p_values.hoeffding,
  p_values.hoeffding_bentkus,
  p_values.convex_order,
)
LEVELS = (0.01, 0.05, 0.1, 0.25, 0.5)
TOLERANCES = st.floats(0.005, 0.9)


@pytest.mark.parametrize(
  "p_value", [*SUM_BASED, p_values.binomial], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("tolerance", [0.02, 0.1, 0.25, 0.6])
def test_super_uniform_for_bernoulli_losses_exactly(p_value, tolerance):
  for size in (1, 2, 3, 7, 10, 31, 100):
    counts = np.arange(size + 1)
    weights = stats.binom.pmf(counts, size, tolerance)
    laws.assert_super_uniform(p_value(counts, size, tolerance), weights)


BETS = ("betting", "fixed_level")
CASES = [
  *itertools.product(
    laws.UNIT_LAWS, ("hoeffding", "hoeffding_bentkus", "convex_order", *BETS)
  ),
  *itertools.product(laws.SIGNED_LAWS, BETS),
  (laws.bernoulli, "binomial"),
]


def compute(name, losses, tolerance):
  if name in BETS:
    design = Design(tolerance, 0.05, len(losses), hedges=name == "fixed_level")
    return np.exp(log_p_value(losses, design))
  return getattr(p_values, name)(losses.sum(axis=0), len(losses), tolerance)


@pytest.mark.parametrize(
  ("law", "name"), CASES, ids=lambda v: getattr(v, "__name__", v)
)
def test_super_uniform_at_the_boundary_by_simulation(law, name):
  size = 100
  draws = 2000
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
    assert p_value(low, size, tolerance) <= p_value(high, size, tolerance) * (
      1 + 1e-9
    )
  ordered = [p_value(low, size, tolerance) for p_value in SUM_BASED]
  assert ordered[2] <= ordered[1] * (1 + 1e-9) and ordered[1] <= ordered[0] * (
    1 + 1e-9
  )
  low, high = math.floor(low), math.floor(high)
  assert p_values.binomial(low, size, tolerance) <= p_values.binomial(
    high, size, tolerance
  )


@given(
  st.integers(1, 30), st.fractions(0, 1, max_denominator=8), st.integers(1, 15)
)
def test_convex_order_equals_exact_fractions(size, share, sixteenths):
  tolerance = fractions.Fraction(sixteenths, 16)
  total = share * size
  mass = [
    math.comb(size, j) * tolerance**j * (1 - tolerance) ** (size - j)
    for j in range(size + 1)
  ]
  ratios = [
    sum(mass[j] * (h - j) for j in range(h)) / (h - total)
    for h in range(math.floor(total) + 1, size + 2)
  ]
  expected = float(min([fractions.Fraction(1), *ratios]))
  found = p_values.convex_order(float(total), size, float(tolerance))
  assert found == pytest.approx(expected, rel=1e-10)


def test_hoeffding_bentkus_by_hand():
  assert p_values.hoeffding(5.0, 100, 0.1) == pytest.approx(
    math.exp(-0.5), rel=1e-12
  )
  # n = 10, sum 0.5: KL term exp(-10 (0.05 log(0.05/0.3) + 0.95 log(0.95/0.7))),
  # Bentkus e P(B <= 1)
  divergence = 0.05 * math.log(0.05 / 0.3) + 0.95 * math.log(0.95 / 0.7)
  bentkus = math.e * (0.7**10 + 10 * 0.3 * 0.7**9)
  expected = min(math.exp(-10 * divergence), bentkus)
  assert p_values.hoeffding_bentkus(0.5, 10, 0.3) == pytest.approx(
    expected, rel=1e-12
  )
  # The Bentkus term is the smaller one here.
  bentkus = math.e * stats.binom.cdf(50, 1000, 0.1)
  assert p_values.hoeffding_bentkus(50, 1000, 0.1) == pytest.approx(
    bentkus, rel=1e-9
  )
  divergence = 0.05 * math.log(0.5) + 0.95 * math.log(0.95 / 0.9)
  assert bentkus < math.exp(-1000 * divergence)


def test_large_samples_do_not_underflow_in_log_space():
  size = 10**6
  for p_value in (*SUM_BASED, p_values.binomial):
    log_p = p_value(1000, size, 0.25, log=True)
    assert (
      np.isfinite(log_p)
      and log_p < -2e5 / 1.7
      and p_value(1000, size, 0.25) == 0.0
    )
  # the largest term of the lower tail
  exact = stats.binom.logpmf(1000, size, 0.25)
  assert p_values.binomial(1000, size, 0.25, log=True) == pytest.approx(
    exact, rel=1e-4
  )
  design = Design(0.5, 0.05, 20_000)
  assert log_p_value(np.zeros((20_000, 1)), design) < -1000


def test_tails_beyond_float64_join_the_rest():
  counts = np.array([0, 5, 300])
  logs = p_values.binomial(counts, [3000, 3000, 3000], 0.3, log=True)
  table = p_values.log_binomial_cdf_table(3000, 0.3)
  # rounding is cut
  assert np.all(p_values.log_binomial_cdf_table(3000, 0.1) <= 0.0)
  np.testing.assert_allclose(logs, table[counts], rtol=1e-10)
  mixed = p_values.binomial(
    [[0, 5], [0, 900]], 3000, [[0.3, 0.3], [0.4, 0.3]], log=True
  )
  assert (
    mixed[1, 0] == pytest.approx(3000 * math.log(0.6)) and mixed[1, 1] > -1.0
  )
  np.testing.assert_allclose(mixed[0], table[[0, 5]], rtol=1e-10)
  # one tail is not so small
  beside = p_values.binomial([0, 1500], 3000, [0.3, 0.5], log=True)
  assert beside[0] == logs[0] and beside[1] == p_values.binomial(
    1500, 3000, 0.5, log=True
  )
  np.testing.assert_allclose(
    np.exp(table), stats.binom.cdf(np.arange(3001), 3000, 0.3), atol=1e-9
  )


def test_means_that_are_not_quite_whole_do_not_move_the_ceiling():
  for count in (7, 29, 57):
    for total in (
      100 * (count / 100),
      100 * (1 - (1 - count / 100)),
      count * (1 + 1e-10),
    ):
      exact = p_values.binomial(total, 100, 0.7)
      assert exact == pytest.approx(stats.binom.cdf(count, 100, 0.7), rel=1e-9)
  # more than 1e-9 of it (of 1 at least) is no rounding
  for count in (0, 1, 57):
    over = p_values.binomial(count + 1.5e-9 * max(1, count), 100, 0.7)
    assert over == p_values.binomial(count + 1, 100, 0.7)


@pytest.mark.parametrize(
  ("count", "tolerance"), [(4950, 0.05), (9900, 0.1), (24_900, 0.25)]
)
def test_binomial_is_exact_for_many_prompts(count, tolerance):
  expected = np.exp(p_values.log_binomial_cdf_table(10**5, tolerance)[count])
  assert p_values.binomial(count, 10**5, tolerance) == pytest.approx(
    expected, rel=1e-9
  )
  assert p_values.binomial(10**5, 10**5, tolerance) == 1.0


# ---- Bets and bounds


@pytest.mark.parametrize("hedges", [False, True])
@pytest.mark.parametrize(
  ("values", "chances", "size"),
  [
    ((0.0, 1.0), (0.6, 0.4), 11),
    ((0.0, 1.0), (0.9, 0.1), 11),
    ((0.0, 0.5, 1.0), (0.5, 0.4, 0.1), 7),
    ((-1.0, 0.0, 1.0), (0.2, 0.4, 0.4), 7),
    ((-1.0, 1.0), (0.45, 0.55), 11),
  ],
)
def test_betting_is_super_uniform_exactly(hedges, values, chances, size):
  tolerance = float(np.dot(values, chances))
  paths = np.array(list(itertools.product(range(len(values)), repeat=size)))
  weights = np.array(chances)[paths].prod(axis=1)
  losses = np.array(values)[paths].T
  design = Design(tolerance, 0.2, size, hedges=hedges)
  assert weights.sum() == pytest.approx(1.0)
  laws.assert_super_uniform(np.exp(log_p_value(losses, design)), weights)
  wealth = np.exp(log_wealth(losses, design))
  # a martingale at the boundary
  np.testing.assert_allclose(wealth @ weights, 1.0, rtol=1e-9)


@pytest.mark.parametrize("planned", [2, 200])  # bets are cut, or not
def test_betting_by_hand(planned):
  # Before the first prompt the variance is 1/4, so the bet is sqrt(2 log 20 /
  # n) / 0.5.
  tolerance = 0.5
  losses = np.array([0.2, 0.4])
  pace = math.sqrt(2 * math.log(20.0) / planned)
  first = min(pace / 0.5, 0.9 / 0.5)
  second = min(pace / math.sqrt((0.25 + (0.2 - 0.2 / 2) ** 2) / 2), 0.9 / 0.5)
  wealth = [1 + first * 0.3, (1 + first * 0.3) * (1 + second * 0.1)]
  found = log_p_value(losses[:, None], Design(tolerance, 0.05, planned))
  assert found == pytest.approx(-math.log(max(wealth)), rel=1e-12)


def test_bets_see_the_past_only():
  generator = np.random.default_rng(5)
  losses = laws.signed(generator, 0.0, (40, 3))
  for hedges in (False, True):
    design = Design(0.1, 0.05, 40, hedges=hedges)
    bets = design.bets(losses)
    for row in (0, 1, 17, 39):
      changed = losses.copy()
      changed[row:] = generator.permutation(changed[row:]) * 0.5
      np.testing.assert_array_equal(
        design.bets(changed)[: row + 1], bets[: row + 1]
      )
    assert np.all(bets >= 0.0)
    assert design.cap == pytest.approx((0.99 if hedges else 0.9) / 0.9)


def hedge_by_hand(losses, tolerance, error_rate, planned, upper=1.0):
  """One column, its wealth looked at after every 64th of what is left
  (`hedge_bets`).
  """
  target = math.log(1 / error_rate)
  pace = math.sqrt(2 * math.log(1 / error_rate) / planned)
  share = min(max(tolerance / upper, 0.01), 0.5)
  wealth = 0.0
  highest = 0.0
  squares = 8 * upper**2 * share * (1 - share)
  total = 0.0
  bets = []
  look = 0
  for row, loss in enumerate(losses):
    deviation = math.sqrt(squares / (row + 8))
    if row == look:
      chance = min(1.0, error_rate * math.exp(wealth))
      left = planned - row
      look += max(1, left // 64)
      aim = pace
      if highest < target and chance > error_rate**2:
        z = stats.norm.ppf(chance)
        aim = stats.norm.pdf(z) / (chance * math.sqrt(left))
    bets.append(aim / deviation)
    wealth += math.log(
      1 + min(bets[-1], 0.99 / (upper - tolerance)) * (tolerance - loss)
    )
    highest = max(highest, wealth)
    total += loss
    squares += (loss - total / (row + 2)) ** 2
  return np.array(bets), highest


@pytest.mark.parametrize("error_rate", [0.05, 0.3])
@pytest.mark.parametrize(
  ("mean", "tolerance", "upper", "planned"),
  [
    *((mean, 0.1, 1.0, 120) for mean in (0.01, 0.1, 0.3)),
    *((0.05, 0.1, 1.0, 300), (0.1, 0.3, 0.5, 120), (0.001, 0.002, 0.5, 120)),
  ],
)
def test_the_hedge_by_hand(mean, tolerance, upper, planned, error_rate):
  losses = upper * laws.mostly_zero(np.random.default_rng(8), mean / upper, 90)
  bets, highest = hedge_by_hand(losses, tolerance, error_rate, planned, upper)
  design = Design(tolerance, error_rate, planned, upper, hedges=True)
  found = design.bets(losses[:, None])[:, 0]
  # Where wealth is nearly there the chance is nearly 1, and its digits cancel.
  np.testing.assert_allclose(found, bets, rtol=1e-6, atol=1e-6)
  assert log_p_value(losses[:, None], design) == pytest.approx(
    -highest, rel=1e-6
  )


@pytest.mark.parametrize(
  "p_value", [*SUM_BASED, p_values.binomial], ids=lambda f: f.__name__
)
@given(st.integers(1, 120), st.floats(0, 1), st.sampled_from([0.01, 0.05, 0.3]))
def test_the_bound_is_where_the_p_value_crosses_the_level(
  p_value, size, share, error_rate
):
  total = float(round(share * size))
  bound = float(p_values.invert(p_value, total, size, error_rate=error_rate))
  assert total / size <= bound <= 1.0
  if bound < 1.0:
    assert p_value(total, size, bound) <= error_rate * (1 + 1e-9)
  if bound > 1e-6:
    assert p_value(total, size, min(bound, 1.0) - 3e-9) > error_rate


def test_binomial_bound_is_clopper_pearson():
  for count, size in ((0, 10), (3, 10), (40, 500)):
    found = p_values.invert(p_values.binomial, count, size, error_rate=0.05)
    assert found == pytest.approx(
      stats.beta.ppf(0.95, count + 1, size - count), abs=2e-9
    )
  # no bound is below
  assert p_values.invert(p_values.binomial, 3, 10, error_rate=0.9) == 0.3
  # nor above 1
  assert p_values.invert(p_values.binomial, 0, 1, error_rate=1e-10) == 1.0


@pytest.mark.parametrize("name", sorted(methods.METHODS))
@given(
  st.integers(0, 10**6),
  st.sampled_from([1, 2, 30, 150]),
  st.floats(0.003, 0.9),
  st.sampled_from([0.01, 0.05, 0.3]),
  st.sampled_from([laws.bernoulli, laws.mostly_zero, laws.signed]),
)
def test_bounds_agree_with_decisions(
  name, seed, size, tolerance, error_rate, law
):
  generator = np.random.default_rng(seed)
  if name == "binomial":
    law = laws.bernoulli
  lower = -1.0 if law is laws.signed and name.startswith("betting") else 0.0
  means = tolerance * np.array([0.1, 0.5, 0.8, 0.95, 1.0, 1.05])
  losses = np.stack([law(generator, mean, size) for mean in means], axis=1)
  losses = np.clip(losses, lower, 1.0)
  support = Support(lower, binary=name == "binomial")
  method = methods.get_method(name, support)
  usable = np.ones(6, bool)
  design = method.design(tolerance, error_rate, size)
  log_p, bound = method.evidence(losses, support, design, usable)
  np.testing.assert_array_equal(bound <= tolerance, np.exp(log_p) <= error_rate)
  assert np.all((bound > lower) & (bound <= 1.0))


@pytest.mark.parametrize("hedges", [False, True])
@pytest.mark.parametrize("tolerance", [0.1, 0.4])
def test_a_uniform_at_the_end_keeps_the_level_over_all_paths(hedges, tolerance):
  """Losses of 0 and 1 at the bound: sum over paths of P(reject | path),
  exactly.
  """
  length = 11
  level = 0.05
  paths = ((np.arange(2**length) >> np.arange(length)[:, None]) & 1).astype(
    float
  )
  design = Design(tolerance, level, length, hedges=hedges)
  wealth = np.exp(log_wealth(paths, design))
  rejects = np.where(
    wealth.max(axis=0) >= 1 / level, 1.0, np.minimum(1.0, level * wealth[-1])
  )
  chance = np.prod(np.where(paths == 1.0, tolerance, 1.0 - tolerance), axis=0)
  without = np.sum(chance * (wealth.max(axis=0) >= 1 / level))
  assert without < np.sum(chance * rejects) <= level + 1e-12
  # p-values are of this test, for each uniform.
  columns = np.random.default_rng(0).integers(paths.shape[1], size=200)
  uniforms = np.random.default_rng(1).random(200)
  some = paths[:, columns]
  drawn = dataclasses.replace(design, uniform=uniforms)
  p = np.exp(log_p_value(some, drawn))
  end = wealth[-1, columns] / uniforms
  expected = np.minimum(1.0, 1.0 / np.maximum(wealth.max(axis=0)[columns], end))
  np.testing.assert_allclose(p, expected, rtol=1e-9)


@pytest.mark.parametrize("hedges", [False, True])
@pytest.mark.parametrize("size", [50, 150])
def test_a_bound_is_the_least_that_is_rejected_up_to_its_precision(
  size, hedges
):
  generator = np.random.default_rng(4)
  losses = 0.5 * laws.mostly_zero(
    generator, np.linspace(0.05, 0.3, 30), (size, 30)
  )
  losses.sort(axis=0)  # wealth is highest in the middle
  design = Design(
    0.05, 0.05, size, 0.5, hedges=hedges, uniform=generator.random(30) ** 2
  )
  bets = design.bets(losses)
  bounds = upper_bound(losses, design)

  def at(bound):
    return log_p_value(
      losses, dataclasses.replace(design, tolerance=bound), bets
    )

  assert np.all(at(bounds) <= math.log(0.05)) and bounds.max() < 0.5
  np.testing.assert_array_equal(bounds <= 0.05, at(0.05) <= math.log(0.05))
  assert np.all(at(bounds - 0.5 * 1.01e-4) > math.log(0.05))
