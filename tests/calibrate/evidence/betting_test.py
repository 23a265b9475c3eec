"""Bets against the mean: predictable, fair at the boundary, and as counted by hand."""

import itertools
import math

import numpy as np
import pytest

from calm.calibrate.evidence import betting, p_values
from tests.calibrate import laws


@pytest.mark.parametrize(
  "strategy", [betting.PLUG_IN, betting.FIXED_LEVEL, betting.EARLY], ids=lambda s: s.name
)
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
def test_betting_is_super_uniform_exactly(strategy, values, chances, size):
  tolerance = float(np.dot(values, chances))
  paths = np.array(list(itertools.product(range(len(values)), repeat=size)))
  weights = np.array(chances)[paths].prod(axis=1)
  losses = np.array(values)[paths].T
  p = p_values.betting(losses, tolerance, error_rate=0.2, strategy=strategy)
  assert weights.sum() == pytest.approx(1.0)
  laws.assert_super_uniform(p, weights)
  design = betting.Design(tolerance, 0.2, size)
  wealth = np.exp(betting.log_wealth(losses, design, strategy))
  np.testing.assert_allclose(wealth @ weights, 1.0, rtol=1e-9)  # a martingale at the boundary


def test_betting_by_hand():
  # Before the first prompt the variance is 1/4, so the bet is sqrt(2 log 20 / n) / 0.5.
  tolerance, losses = 0.5, np.array([0.2, 0.4])
  first = min(math.sqrt(math.log(20.0)) / 0.5, 0.9 / 0.5)
  mean = 0.2 / 2
  second = min(math.sqrt(math.log(20.0)) / math.sqrt((0.25 + (0.2 - mean) ** 2) / 2), 0.9 / 0.5)
  wealth = [1 + first * 0.3, (1 + first * 0.3) * (1 + second * 0.1)]
  found = p_values.betting(losses, tolerance)
  assert found == pytest.approx(1 / max(wealth), rel=1e-12)
  assert p_values.betting(losses, tolerance, log=True) == pytest.approx(-math.log(max(wealth)))


def test_small_bets_by_hand():
  # With many prompts planned the cap does not bind.
  losses = np.array([1.0, 0.0, 0.0])
  scale = math.sqrt(2 * math.log(10.0) / 1000)
  deviations = [math.sqrt(0.25), math.sqrt((0.25 + 0.25) / 2)]
  deviations.append(math.sqrt((0.25 + 0.25 + (0.0 - 1 / 3) ** 2) / 3))
  wealth = np.cumprod(1 + scale / np.array(deviations) * (0.3 - losses))
  found = p_values.betting(losses, 0.3, error_rate=0.1, planned_size=1000)
  assert found == pytest.approx(min(1.0, 1 / wealth.max()))
  design = betting.Design(0.3, 0.1, 1000)
  np.testing.assert_allclose(np.exp(betting.log_wealth(losses, design)), wealth)


def test_bets_see_the_past_only():
  generator = np.random.default_rng(5)
  losses = laws.signed(generator, 0.0, (40, 3))
  for strategy in (betting.PLUG_IN, betting.FIXED_LEVEL, betting.EARLY):
    design = strategy.design(0.1, 0.05, 40)
    bets = strategy.bets(losses, design)
    for row in (0, 1, 17, 39):
      changed = losses.copy()
      changed[row:] = generator.permutation(changed[row:]) * 0.5
      np.testing.assert_array_equal(strategy.bets(changed, design)[: row + 1], bets[: row + 1])
    assert np.all((bets >= 0.0) & (bets <= strategy.cap_share / 0.9 + 1e-15))


def test_pairs_beyond_one_block_are_certified_like_alone(monkeypatch):
  generator = np.random.default_rng(4)
  losses = laws.mostly_zero(generator, 0.05, (60, 5))
  columns = np.arange(20) % 5
  design = betting.FIXED_LEVEL.design(np.linspace(0.05, 0.4, 20), 0.05, 60)
  whole = betting.certifies(losses, columns, design, betting.FIXED_LEVEL)
  monkeypatch.setattr(betting, "_HEDGED_PAIRS", 7)
  parts = betting.certifies(losses, columns, design, betting.FIXED_LEVEL)
  np.testing.assert_array_equal(parts, whole)
  wealth = betting.log_wealth(losses[:, columns], design, betting.FIXED_LEVEL)
  np.testing.assert_array_equal(whole, wealth.max(axis=0) >= design.target)
  assert 0 < whole.sum() < 20


def test_wealth_that_just_gets_there_has_got_there():
  """A factor of 2 at an error rate of 1/2, to the last digit."""
  losses, only = np.array([[-0.99]]), np.array([0])
  for strategy in (betting.FIXED_LEVEL, betting.EARLY):
    design = strategy.design(0.01, 0.5, 1)
    assert float(design.cap) == 1.0 < strategy.free(losses.copy(), design)[0, 0]
    assert betting.log_wealth(losses, design, strategy)[0, 0] == design.target
    assert betting.certifies(losses, only, design, strategy)
  design = betting.Design(np.array([0.5]), 0.5, 1, cap_share=1.0)
  assert betting.reaches(np.zeros((1, 1)), np.full((1, 1), 2.0), only, design)


def test_every_tolerance_is_checked_against_the_upper_bound():
  for tolerance in ([0.1, 1.0], [1.0, 0.1], [0.1, math.nan]):
    with pytest.raises(ValueError, match="`tolerance` to be below `upper`"):
      betting.log_wealth(np.zeros((3, 2)), betting.Design(np.array(tolerance), 0.05, 3))


def test_a_huge_need_does_not_underflow():
  losses = np.ones((3000, 1))
  design = betting.FIXED_LEVEL.design(0.5, 1e-300, 3000)
  bets = betting.FIXED_LEVEL.bets(losses, design)
  assert np.all(np.isfinite(bets)) and np.all(bets > 0.0)
  assert p_values.betting(losses, 0.5, error_rate=1e-300, strategy=betting.FIXED_LEVEL) == 1.0


@pytest.mark.parametrize(
  "losses", [[], [[[0.0]]], [0.0, math.nan], [math.inf], [-math.inf], [1.5]]
)
def test_losses_that_cannot_be_bet_on_are_refused(losses):
  with pytest.raises(ValueError, match="`losses` to be"):
    p_values.betting(losses, 0.1)
  if losses != [1.5]:
    with pytest.raises(ValueError, match="`losses` to be"):
      p_values.clt_not_valid(losses, 0.1)


def test_levels_of_bets_are_checked():
  for changes in (
    {"tolerance": 1.0},
    {"tolerance": math.nan},
    {"error_rate": 0.0},
    {"error_rate": 1},
  ):
    with pytest.raises(ValueError, match=r"`tolerance` to be|`error_rate` to be"):
      p_values.betting([0.0], **{"tolerance": 0.1, **changes})
  with pytest.raises(ValueError, match="`planned_size` to be at least the number of losses"):
    p_values.betting([0.0, 0.0], 0.1, planned_size=1)
