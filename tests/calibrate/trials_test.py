import numpy as np
import pytest
from scipy import stats

from calm.calibrate import SequenceLosses, trials
from calm.calibrate.evidence import draws as draws_lib
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
  from calm.calibrate.evidence import methods

  naive = methods.Method(
    "naive",
    lambda sample: np.where(sample.values.mean(axis=0) < sample.tolerance, -9.0, 0.0),
    lambda sample: sample.values.mean(axis=0),
    lambda support: "",
  )
  monkeypatch.setattr(methods, "METHODS", {**methods.METHODS, "naive": naive})
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

  class Spy(draws_lib.Draws):
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
