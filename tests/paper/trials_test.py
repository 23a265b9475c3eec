"""Repeated calibration: violations are counted, and lockstep chooses what one set chooses."""

import dataclasses

import numpy as np
import pytest
from scipy import stats

from calm.calibrate import (
  NEVER_EXIT,
  SequenceLosses,
  Support,
  calibrate,
  clusters,
  methods,
  testing,
)
from calm.calibrate.generations import order
from calm.paper import trials
from tests.calibrate import laws

GRID = np.array([0.9, 0.7, 0.5])


def pool(means=(0.02, 0.06, 0.2), count=500, law=laws.mostly_zero, **fields):
  generator = np.random.default_rng(0)
  values = np.stack([law(generator, mean, count) for mean in means], axis=1)
  return SequenceLosses(values, GRID[: len(means)], **fields)


def depth(count=500):
  return np.tile([12, 8, 4], (count, 1)), np.full((count, 3), 2), 8


@pytest.mark.parametrize("method", ["auto", "paper", "convex_order"])
def test_violations_stay_within_the_error_rate(method):
  losses = pool()
  boundary = [float(mean) - 1e-4 for mean in losses.values.mean(axis=0)]
  for found in trials.validity_trials(trials.Draws(losses, method), boundary, 0.2, 80):
    assert stats.binomtest(found.violations, 200, 0.2, alternative="greater").pvalue > 1e-3
    assert found.share == found.violations / 200
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
  (found,) = trials.validity_trials(trials.Draws(losses, "naive"), [tolerance], 0.05, 500)
  assert found.interval[0] > 0.05


def test_split_trials_report_risk_layers_and_spread():
  drawn, options = trials.Draws(pool(), "auto"), {"layers": depth(), "trials": 20}
  strict, middle, loose = trials.split_trials(drawn, [0.01, 0.1, 0.4], 0.05, **options)
  assert strict.certified_share == 0.0
  assert strict.risk_mean == 0.0 and strict.layers_mean == 8.0 and strict.layers_spread == 0.0
  assert (
    middle.certified_share == 1.0 and 0.0 < middle.risk_mean < 0.1 and middle.risk_spread > 0
  )
  assert loose.certified_share == 1.0 and loose.layers_mean == 2.0
  assert middle.layers_mean in (6.0, 4.0) or 4.0 < middle.layers_mean < 6.0
  again = trials.split_trials(trials.Draws(pool(), "auto"), [0.1], 0.05, **options)
  assert again[0] == middle
  without = trials.split_trials(drawn, [0.1], 0.05, trials=20)
  assert np.isnan(without[0].layers_mean) and without[0].risk_mean == middle.risk_mean


def test_clusters_never_stand_on_both_sides():
  """Copies of one prompt in both parts would make both look alike."""
  losses = pool(count=60)
  groups = [f"g{i // 6}" for i in range(60)]
  seen = []

  class Spy(trials.Draws):
    def choose(self, draws, tolerances, error_rate, uniforms):
      seen.append(set(draws[0].tolist()))
      return np.zeros((len(draws), len(tolerances)), int)

  layers = np.arange(180).reshape(60, 3), np.ones((60, 3)), 8
  drawn = Spy(dataclasses.replace(losses, groups=tuple(groups)), "auto")
  (found,) = trials.split_trials(drawn, [0.1], 0.05, trials=1, layers=layers)
  assert len(seen[0]) == 8  # of 10 clusters
  left_out = sorted(set(range(10)) - seen[0])
  names = sorted({*groups})
  rows = [i for i in range(60) if names.index(groups[i]) in left_out]
  assert found.risk_mean == pytest.approx(losses.values[rows, 0].mean())
  assert found.layers_mean == pytest.approx(np.mean([3 * i for i in rows]))


FINE = np.linspace(0.95, 0.1, 17)
TOLERANCES = [0.001, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7]
METHODS = sorted(methods.METHODS)


def losses(law=laws.mostly_zero, count=240, means=(0.0, 0.3), **fields):
  generator = np.random.default_rng(0)
  columns = [law(generator, mean, count) for mean in np.linspace(*means, len(FINE))]
  return SequenceLosses(np.stack(columns, axis=1), FINE, **fields)


def one_at_a_time(pool, draws, tolerances, error_rate, uniforms):
  """The definition: fixed sequence testing of every set, every p-value computed."""
  chosen = np.empty((len(draws), len(tolerances)), int)
  for i, rows in enumerate(draws):
    for j, tolerance in enumerate(tolerances):
      values, uniform = pool.values[rows], uniforms[i]
      upper, test = pool.support.upper, pool.method
      design = test.design(tolerance, error_rate, len(values), upper, uniform)
      log_p = test.log_p_values(values, design)
      adjusted, _ = testing.fixed_sequence(np.exp(log_p), error_rate)
      chosen[i, j] = np.sum(adjusted <= error_rate) - 1
  return chosen


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("error_rate", "size"), [(0.05, 1), (0.05, 150), (0.4, 37)])
def test_lockstep_chooses_what_one_set_at_a_time_chooses(method, error_rate, size):
  made = losses(laws.bernoulli, support=Support(binary=True))
  if method != "binomial":
    made = losses()
  pool = trials.Draws(made, method)
  draws = np.random.default_rng(size).integers(len(pool.values), size=(12, size))
  uniforms = np.random.default_rng(size).random(12)
  found = pool.choose(draws, TOLERANCES, error_rate, uniforms)
  expected = one_at_a_time(pool, draws, TOLERANCES, error_rate, uniforms)
  np.testing.assert_array_equal(found, expected)
  assert size == 1 or len(np.unique(found)) > 4  # it is not all or nothing


def test_a_pool_chooses_what_calibrate_chooses():
  made = losses(count=300, ids=tuple(f"{i:03d}" for i in range(300)), contents="ab")
  (seed,), _ = clusters.order_seeds(made)
  tested = clusters.tested_orders(made, [seed])
  uniforms = [order.seeded_uniform(seed)]
  pool = trials.Draws(dataclasses.replace(made, groups=made.ids), "auto")
  (columns,) = pool.choose(np.stack(tested), TOLERANCES, 0.05, uniforms)
  for tolerance, column in zip(TOLERANCES, columns, strict=True):
    found = calibrate(made, tolerance=tolerance, error_rate=0.05)
    assert found.threshold == (NEVER_EXIT if column < 0 else FINE[column])
