"""Repeated calibration: violations are counted, and lockstep chooses what one set chooses."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from calm.calibrate import (
  NEVER_EXIT,
  SequenceLosses,
  Support,
  betting,
  calibrate,
  methods,
  testing,
  trials,
)
from tests.calibrate import laws

GRID = np.array([0.9, 0.7, 0.5])


def pool(means=(0.02, 0.06, 0.2), count=500, law=laws.mostly_zero, **fields):
  generator = np.random.default_rng(0)
  values = np.stack([law(generator, mean, count) for mean in means], axis=1)
  return SequenceLosses(values, GRID[: len(means)], **fields)


def depth(count=500):
  return trials.LayerCounts(
    np.tile([12, 8, 4], (count, 1)), np.full((count, 3), 2), full_depth=8
  )


@pytest.mark.parametrize("method", ["auto", "paper", "convex_order"])
def test_violations_stay_within_the_error_rate(method):
  losses = pool()
  boundary = [float(mean) - 1e-4 for mean in losses.values.mean(axis=0)]
  for found in trials.validity_trials(
    losses, boundary, error_rate=0.2, method=method, calibration_size=80, trials=200
  ):
    assert stats.binomtest(found.violations, 200, 0.2, alternative="greater").pvalue > 1e-3
    assert found.share == found.violations / 200 and found.error_rate == 0.2
    low, high = found.interval
    assert low <= found.share <= high


def test_a_wrong_method_would_be_caught(monkeypatch):
  """With p-values that ignore chance (mean below tolerance: 0) violations exceed the rate."""

  def p_value(sums, count, tolerance, log=False):
    low = np.asarray(sums) / count < tolerance
    return np.where(low, -9.0, 0.0) if log else np.where(low, 1e-4, 1.0)

  naive = methods.Method("naive", p_value)
  monkeypatch.setattr(methods, "METHODS", {**methods.METHODS, "naive": naive})
  monkeypatch.setattr(methods, "NAMES", ("naive",))
  losses = pool(means=(0.05,))
  tolerance = float(losses.values.mean()) - 1e-4
  (found,) = trials.validity_trials(losses, [tolerance], error_rate=0.05, method="naive")
  assert found.interval[0] > 0.05


def test_split_trials_report_risk_layers_and_spread():
  found = trials.split_trials(
    pool(), [0.01, 0.1, 0.4], error_rate=0.05, layers=depth(), trials=20
  )
  strict, middle, loose = found
  assert strict.certified_share == 0.0 and np.isnan(strict.threshold_mean)
  assert strict.risk_mean == 0.0 and strict.layers_mean == 8.0 and strict.layers_spread == 0.0
  assert (
    middle.certified_share == 1.0 and 0.0 < middle.risk_mean < 0.1 and middle.risk_spread > 0
  )
  assert loose.threshold_mean == 0.5 and loose.layers_mean == 2.0 and loose.trials == 20
  assert middle.layers_mean in (6.0, 4.0) or 4.0 < middle.layers_mean < 6.0
  again = trials.split_trials(pool(), [0.1], error_rate=0.05, layers=depth(), trials=20)
  assert again[0] == middle
  without = trials.split_trials(pool(), [0.1], error_rate=0.05, trials=20)
  assert np.isnan(without[0].layers_mean) and without[0].risk_mean == middle.risk_mean


def test_clusters_never_stand_on_both_sides(monkeypatch):
  """Copies of one prompt in both parts would make both look alike."""
  losses = pool(count=60)
  groups = [f"g{i // 6}" for i in range(60)]
  seen = []

  class Spy(trials.Draws):
    def choose(self, draws, tolerances, error_rate):
      seen.append(set(draws[0].tolist()))
      return np.zeros((len(draws), len(tolerances)), int)

  monkeypatch.setattr(trials, "Draws", Spy)
  layers = trials.LayerCounts(np.arange(180).reshape(60, 3), np.ones((60, 3)), 8)
  (found,) = trials.split_trials(
    losses, [0.1], error_rate=0.05, groups=groups, trials=1, layers=layers
  )
  assert len(seen[0]) == 8  # of 10 clusters
  left_out = sorted(set(range(10)) - seen[0])
  names = sorted({*groups})
  rows = [i for i in range(60) if names.index(groups[i]) in left_out]
  assert found.risk_mean == pytest.approx(losses.values[rows, 0].mean())
  assert found.layers_mean == pytest.approx(np.mean([3 * i for i in rows]))


def test_bad_pools_are_refused():
  with pytest.raises(ValueError, match="at least 2 units"):
    trials.split_trials(pool(count=1), [0.1], error_rate=0.05)
  for bad in (np.nan, 1.5):
    losses = pool()
    losses.values[0, 0] = bad
    with pytest.raises(ValueError, match="declared range"):
      trials.validity_trials(losses, [0.1], error_rate=0.05)


FINE = np.linspace(0.95, 0.1, 17)
TOLERANCES = [0.001, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7]
METHODS = sorted(methods.METHODS)


def losses(law=laws.mostly_zero, count=240, means=(0.0, 0.3), **fields):
  generator = np.random.default_rng(0)
  columns = [law(generator, mean, count) for mean in np.linspace(*means, len(FINE))]
  return SequenceLosses(np.stack(columns, axis=1), FINE, **fields)


def one_at_a_time(pool, draws, tolerances, error_rate):
  """The definition: fixed sequence testing of every set, every p-value computed."""
  chosen = np.empty((len(draws), len(tolerances)), int)
  for i, rows in enumerate(draws):
    for j, tolerance in enumerate(tolerances):
      sample = methods.Sample(pool.values[rows], pool.support, tolerance, error_rate)
      p = np.exp(pool.method.log_p_values(sample))
      chosen[i, j] = testing.fixed_sequence(p, error_rate).rejected.sum() - 1
  return chosen


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("error_rate", [0.05, 0.4])
@pytest.mark.parametrize("size", [1, 37, 150])
def test_lockstep_chooses_what_one_set_at_a_time_chooses(method, error_rate, size):
  made = losses(laws.bernoulli, support=Support(binary=True))
  if method != "binomial":
    made = losses()
  pool = trials.Draws(made, method)
  draws = np.random.default_rng(size).integers(len(pool.values), size=(12, size))
  found = pool.choose(draws, TOLERANCES, error_rate)
  expected = one_at_a_time(pool, draws, TOLERANCES, error_rate)
  np.testing.assert_array_equal(found, expected)
  assert size == 1 or len(np.unique(found)) > 4  # it is not all or nothing


@pytest.mark.parametrize("method", ["auto", "paper"])
def test_lockstep_on_signed_losses(method):
  pool = trials.Draws(
    losses(laws.signed, means=(-0.2, 0.3), support=Support(lower=-1.0)), method
  )
  draws = np.random.default_rng(0).integers(len(pool.values), size=(12, 150))
  found = pool.choose(draws, TOLERANCES, 0.05)
  np.testing.assert_array_equal(found, one_at_a_time(pool, draws, TOLERANCES, 0.05))
  assert len(np.unique(found)) > 4


def test_a_set_that_failed_takes_no_part_any_more():
  values = np.stack([np.zeros(100), np.ones(100), np.zeros(100)], axis=1)
  pool = trials.Draws(SequenceLosses(values, FINE[:3]), "auto")
  sets = np.arange(100)[None]
  assert pool.choose(sets, [0.1, 0.001], 0.05).tolist() == [[0, -1]]
  assert trials.Draws(SequenceLosses(1.0 - values, FINE[:3]), "auto").choose(
    sets, [0.1], 0.05
  ).tolist() == [[-1]]


@given(
  st.integers(1, 300),
  st.lists(st.floats(0.01, 0.95), min_size=1, max_size=5),
  st.floats(0.01, 0.5),
  st.integers(0, 10_000),
)
def test_bets_certify_where_their_p_value_says_so(size, tolerances, error_rate, seed):
  generator = np.random.default_rng(seed)
  sample = laws.signed_smooth(generator, 0.0, (size, 3)) + generator.random(3) - 0.5
  columns = generator.integers(3, size=len(tolerances))
  design = betting.Design(np.array(tolerances), error_rate, size)
  found = betting.certifies(sample, columns, design)
  for column, tolerance, certified in zip(columns, tolerances, found, strict=True):
    p = betting.p_value(sample[:, column], tolerance, error_rate=error_rate)
    assert certified == (p <= error_rate) or p == pytest.approx(error_rate, rel=1e-9)


def test_wealth_beyond_float64_certifies_and_ruin_does_not_underflow():
  rich = np.full((3000, 1), -1.0)
  rich[1500:] = 1.0  # what was won stays won
  design = betting.Design(np.array([0.999]), 0.05, 3000)
  assert betting.certifies(rich, np.zeros(1, int), design).tolist() == [True]
  # 3000 losses of 1 at the largest bet would leave 1e-3000 of a product.
  poor = np.concatenate([np.ones((3000, 1)), np.zeros((90_000, 1))])
  design = betting.Design(np.array([0.6]), 1e-250, len(poor))
  assert betting.log_wealth(poor[:, 0], betting.Design(0.6, 1e-250, len(poor))).min() < -1000
  found = betting.certifies(poor, np.zeros(1, int), design)
  assert found[0] == (betting.p_value(poor[:, 0], 0.6, error_rate=1e-250) <= 1e-250)


def test_clustered_binary_losses_bet_and_paper_clips_before_it_averages():
  binary = losses(laws.bernoulli, support=Support(binary=True))
  groups = [str(i // 2) for i in range(240)]
  made = trials.Draws(binary, "auto", groups)
  assert made.method.name == "betting_fixed_level" and made.values.shape == (120, 17)
  assert trials.Draws(binary, "auto").method.name == "binomial"
  signed = losses(laws.signed, support=Support(lower=-1.0))
  clipped = trials.Draws(signed, "paper", groups)
  expected = np.maximum(signed.values, 0).reshape(120, 2, 17).mean(axis=1)
  np.testing.assert_allclose(np.sort(clipped.values, axis=0), np.sort(expected, axis=0))
  np.testing.assert_allclose(clipped.values[clipped.unit_of_row[34]], expected[17])


def test_a_pool_chooses_what_calibrate_chooses():
  made = losses(count=300).in_given_order()
  pool = trials.Draws(made, "auto", [f"{i:03d}" for i in range(300)])
  (columns,) = pool.choose(np.arange(300)[None], TOLERANCES, 0.05)
  for tolerance, column in zip(TOLERANCES, columns, strict=True):
    found = calibrate(made, tolerance=tolerance, error_rate=0.05)
    assert found.threshold == (NEVER_EXIT if column < 0 else FINE[column])


@pytest.mark.parametrize("support", [Support(), Support(-1.0, 2.0)])
def test_rounding_leaves_the_range_by_a_billionth_at_most(support):
  ends = np.array([[support.lower - 1e-9], [support.upper + 1e-9]])
  pool = trials.Draws(SequenceLosses(ends, [0.5], support), "betting")
  assert pool.values[:, 0].tolist() == [support.lower, support.upper]
  for odd in (support.lower - 2e-9, support.upper + 2e-9, support.lower - 0.5):
    with pytest.raises(ValueError, match="to lie in the declared range"):
      trials.Draws(SequenceLosses([[odd], [0.0]], [0.5], support), "betting")


@pytest.mark.parametrize("bad", [np.nan, 1.5, -0.1, 0.0, 1.0])
def test_trials_refuse_rates_that_are_none(bad):
  losses = SequenceLosses(np.zeros((60, 1)), [0.5])
  for run in (trials.split_trials, trials.validity_trials):
    with pytest.raises(ValueError, match=r"`tolerances` to be in \(0, 1\), got"):
      run(losses, [0.1, bad], error_rate=0.05)
    with pytest.raises(ValueError, match=r"`error_rate` to be in \(0, 1\), got"):
      run(losses, [0.1], error_rate=bad)
    with pytest.raises(ValueError, match="`tolerances` to be in"):
      run(losses, [], error_rate=0.05)
    with pytest.raises(ValueError, match="`trials` to be at least 1"):
      run(losses, [0.1], error_rate=0.05, trials=0)
  with pytest.raises(ValueError, match="`calibration_size` to be at least 1"):
    trials.validity_trials(losses, [0.1], error_rate=0.05, calibration_size=0)
