"""Mistakes seen in published risk-control code that no other test would notice."""

import math

import numpy as np
import pytest
from scipy import stats

from calm.calibrate import (
  NEVER_EXIT,
  SequenceLosses,
  Support,
  betting,
  calibrate,
  calibrate_configurations,
  metrics,
  p_values,
  risks,
  trials,
)
from tests.calibrate import laws

RATES = dict(tolerance=0.1, error_rate=0.05)
GRID = np.array([0.9, 0.7, 0.5])


def test_01_the_factor_e_belongs_to_bounded_losses_and_not_to_binary_ones():
  binary = p_values.binomial(3, 100, 0.1)
  assert binary == pytest.approx(stats.binom.cdf(3, 100, 0.1))
  hoeffding_bentkus = p_values.hoeffding_bentkus(3, 100, 0.1)
  assert binary < hoeffding_bentkus <= math.e * binary * (1 + 1e-12)
  with pytest.raises(ValueError, match="declared binary"):
    calibrate(np.zeros((50, 3)), GRID, **RATES, method="binomial")  # zeros, but not declared


@pytest.mark.parametrize("size", [1, 9, 100, 5000])
def test_02_all_losses_zero_give_one_minus_tolerance_to_the_n(size):
  for p_value in (p_values.hoeffding_bentkus, p_values.convex_order, p_values.binomial):
    assert p_value(0, size, 0.1) == pytest.approx(0.9**size, rel=1e-10)
  for p_value in (p_values.hoeffding_bentkus, p_values.convex_order, p_values.hoeffding):
    assert p_value(size, size, 0.1) == 1.0  # and 0 log 0 at the other end


def test_05_means_that_are_not_quite_whole_do_not_move_the_ceiling():
  for count in (7, 14, 28, 29, 55, 56, 57, 58):
    mean = count / 100
    performance = 1 - mean
    for total in (
      100 * mean,
      100 * (1 - performance),
      math.fsum([mean] * 100),
      np.sum(np.full(100, mean)),
    ):
      found = p_values.hoeffding_bentkus(total, 100, 0.7)
      assert found == pytest.approx(
        float(p_values.hoeffding_bentkus(count, 100, 0.7)), rel=1e-9
      )
      exact = p_values.binomial(total, 100, 0.7)
      assert exact == pytest.approx(stats.binom.cdf(count, 100, 0.7), rel=1e-9)
  above = p_values.hoeffding_bentkus(29.001, 100, 0.7)
  assert above >= p_values.hoeffding_bentkus(29, 100, 0.7)


def test_06_bentkus_rounds_sums_up_also_in_its_bound():
  bound = p_values.invert(p_values.hoeffding_bentkus, 1.99, 100, error_rate=0.05)
  assert bound > 0.06
  assert math.e * stats.binom.cdf(2, 100, bound) == pytest.approx(0.05, rel=1e-4)
  assert math.e * stats.binom.cdf(1, 100, bound) < 0.03  # what floor would have called 0.05


def test_07_the_betting_test_is_one_sided():
  generator = np.random.default_rng(0)
  for mean in (0.2, 0.396, 0.9):
    losses = laws.bernoulli(generator, mean, (500, 50))
    assert np.mean(betting.p_value(losses, 0.1) <= 0.05) <= 0.05
    assert np.median(betting.p_value(losses, 0.1)) > 0.3


def test_08_signed_losses_are_refused_by_sums_and_out_of_range_losses_are_never_clipped():
  for p_value in (p_values.hoeffding, p_values.hoeffding_bentkus, p_values.convex_order):
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
      p_value(-3.0, 100, 0.1)
  signed = Support(lower=-1.0)
  with pytest.raises(ValueError, match="signed losses go into"):
    calibrate(np.zeros((50, 3)), GRID, **RATES, support=signed, method="convex_order")
  outside = calibrate(np.full((50, 3), -0.5), GRID, **RATES)
  assert outside.threshold == NEVER_EXIT and "declared range" in outside.reason


def test_12_log_p_survives_where_p_underflows():
  found = calibrate(np.zeros((50_000, 1)), [0.5], **RATES, method="paper")
  assert found.rows[0].p_value == 0.0
  assert found.rows[0].log_p_value == pytest.approx(50_000 * math.log(0.9), rel=1e-9)


def test_19_choosing_among_measures_is_part_of_one_family():
  with pytest.raises(ValueError, match="drop duplicates"):
    calibrate(np.zeros((100, 2)), [0.5, 0.5], **RATES)
  generator = np.random.default_rng(3)
  wrong, naive, draws = 0, 0, 100
  for _ in range(draws):
    values = laws.bernoulli(generator, 0.3, (120, 12))  # twelve measures, all just too risky
    families, costs = {}, {}
    for column in range(12):
      losses = SequenceLosses(values[:, column : column + 1], [0.5], Support(binary=True))
      families[f"m{column}"] = [risks.Risk(losses, 0.299)]
      costs[f"m{column}"] = np.full((120, 1), float(column))
    found = calibrate_configurations(families, costs, error_rate=0.1)
    wrong += found.certified
    naive += bool((found.column("p_value") / 12 <= 0.1).any())
  assert stats.binomtest(wrong, draws, 0.1, alternative="greater").pvalue > 1e-3
  # The best of them, picked after twelve tests, would not have kept the rate.
  assert stats.binomtest(naive, draws, 0.1, alternative="greater").pvalue < 1e-6


def test_23_violations_are_counted_against_the_pool_not_against_a_noisy_split():
  losses = SequenceLosses(laws.bernoulli(np.random.default_rng(0), 0.097, (400, 1)), GRID[:1])
  mean = float(losses.values.mean())
  safe = trials.validity_trials(losses, [mean + 1e-6], error_rate=0.2, trials=100)[0]
  assert safe.violations == 0  # the pool itself keeps that tolerance, whatever splits say
  risky = trials.validity_trials(losses, [mean - 1e-6], error_rate=0.2, trials=200)[0]
  assert risky.violations > 0 and risky.interval[0] < risky.share < risky.interval[1]
  assert stats.binomtest(risky.violations, 200, 0.2, alternative="greater").pvalue > 1e-3


def test_24_samples_of_one_prompt_count_once_and_corpus_metrics_are_refused():
  generator = np.random.default_rng(0)
  prompts = laws.bernoulli(generator, 0.12, (20, 1))
  copied = np.repeat(prompts, 30, axis=0)
  groups = [str(i // 30) for i in range(600)]
  found = calibrate(copied, GRID[:1], **RATES, groups=groups)
  assert found.num_examples == 20 and found.threshold == NEVER_EXIT
  with pytest.raises(ValueError, match="to be a mean over prompts, got"):
    metrics.get_metric("bleu")
  assert "nothing of any single prompt" in calibrate(np.zeros((99, 3)), GRID, **RATES).guarantee
