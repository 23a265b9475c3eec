"""Repeated calibration: violations are counted, and lockstep chooses what one
set chooses.
"""

import numpy as np
import pytest
from scipy import stats

from calm.calibrate import SequenceLosses, Support, methods, testing
from calm.paper import experiments
from tests.calibrate import laws

FINE = np.linspace(0.95, 0.1, 17)
# Of three thresholds, summed over a prompt's two tokens; 8 at full depth.
LAYERS = np.tile([12, 8, 4], (500, 1)), np.full((500, 3), 2), 8
TOLERANCES = [0.001, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7]


def losses(means=(0.02, 0.06, 0.2), count=500, law=laws.mostly_zero, **fields):
  generator = np.random.default_rng(0)
  values = np.stack([law(generator, mean, count) for mean in means], axis=1)
  return SequenceLosses(values, FINE[: len(means)], **fields)


@pytest.mark.parametrize("method", ["auto", "paper"])
def test_violations_stay_within_the_error_rate(method):
  pool = losses()
  boundary = [float(mean) - 1e-4 for mean in pool.values.mean(axis=0)]
  for found in experiments.repeat(pool, method, boundary, 0.2, 80, LAYERS):
    broken = stats.binomtest(found.violations, 200, 0.2, alternative="greater")
    assert (
      broken.pvalue > 1e-3
      and found.interval[0] <= found.share <= found.interval[1]
    )


def test_splits_report_risk_layers_and_spread():
  asked = losses(), "auto", [0.01, 0.1, 0.4], 0.05, 80, LAYERS
  strict, middle, loose = experiments.repeat(*asked, splits=20)
  assert (strict.certified_share, strict.risk_mean) == (0.0, 0.0)
  assert (strict.layers_mean, strict.layers_spread) == (8.0, 0.0)
  assert middle.certified_share == 1.0 and 0.0 < middle.risk_mean < 0.1
  assert middle.risk_spread > 0 and 4.0 <= middle.layers_mean <= 6.0
  assert loose.certified_share == 1.0 and loose.layers_mean == 2.0


def one_at_a_time(method, values, upper, draws, error_rate, uniforms):
  """The definition: fixed sequence testing of every set, every p-value
  computed.
  """
  chosen = np.empty((len(draws), len(TOLERANCES)), int)
  for i, rows in enumerate(draws):
    for j, tolerance in enumerate(TOLERANCES):
      design = method.design(
        tolerance, error_rate, len(rows), upper, uniforms[i]
      )
      log_p = method.log_p_values(values[rows], design)
      adjusted, _ = testing.fixed_sequence(np.exp(log_p), error_rate)
      chosen[i, j] = np.sum(adjusted <= error_rate) - 1
  return chosen


@pytest.mark.parametrize("method", sorted(methods.METHODS))
@pytest.mark.parametrize(("error_rate", "size"), [(0.05, 1), (0.4, 37)])
def test_lockstep_chooses_what_one_set_at_a_time_chooses(
  method, error_rate, size
):
  means = np.linspace(0.0, 0.3, len(FINE))
  more = {}
  if method == "binomial":
    more = {"law": laws.bernoulli, "support": Support(binary=True)}
  pool = losses(means, 240, **more)
  draws = np.random.default_rng(size).integers(240, size=(12, size))
  uniforms = np.random.default_rng(size).random(12)
  test = methods.get_method(method, pool.support)
  values, support = test.prepare(pool.values, pool.support)
  given = test, values, support.upper
  found = experiments.choose(*given, TOLERANCES, error_rate, draws, uniforms)
  expected = one_at_a_time(*given, draws, error_rate, uniforms)
  np.testing.assert_array_equal(found, expected)
  assert size == 1 or len(np.unique(found)) > 4  # it is not all or nothing
