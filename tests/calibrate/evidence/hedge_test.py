"""The bet that hedges an option, by hand: variances, looks, caps, and any range of losses."""

import math

import numpy as np
import pytest
from scipy import stats

from calm.calibrate.evidence import betting, p_values, strategies
from tests.calibrate import laws


def hedge_by_hand(losses, tolerance, error_rate, planned, least_pace=0.0):
  """One column, its wealth looked at before every loss; see `strategies.Hedge`."""
  target, pace = math.log(1 / error_rate), math.sqrt(2 * math.log(1 / error_rate) / planned)
  wealth, highest, squares, total = 0.0, 0.0, 8 * tolerance * (1 - tolerance), 0.0
  bets, deviations = [], []
  for row, loss in enumerate(losses):
    deviation = math.sqrt(squares / (row + 8))
    chance = min(1.0, error_rate * math.exp(wealth))
    if highest < target and chance > error_rate**2:
      z = stats.norm.ppf(chance)
      bet = stats.norm.pdf(z) / (chance * deviation * math.sqrt(planned - row))
      bet = max(bet, least_pace * pace / deviation)
    else:
      bet = pace / deviation
    bets.append(bet)
    deviations.append(deviation)
    wealth += math.log(1 + min(bet, 0.99 / (1 - tolerance)) * (tolerance - loss))
    highest = max(highest, wealth)
    total += loss
    squares += (loss - total / (row + 2)) ** 2
  return np.array(bets), highest, np.array(deviations)


@pytest.mark.parametrize(("mean", "reached"), [(0.01, True), (0.1, False), (0.3, False)])
@pytest.mark.parametrize("error_rate", [0.05, 0.3])
@pytest.mark.parametrize(
  ("strategy", "pace"), [(betting.FIXED_LEVEL, 0.0), (betting.EARLY, 0.7)]
)
def test_the_hedge_by_hand(mean, reached, error_rate, strategy, pace):
  losses = laws.mostly_zero(np.random.default_rng(8), mean, 90)
  bets, highest, _ = hedge_by_hand(losses, 0.1, error_rate, 120, pace)
  design = strategy.design(0.1, error_rate, 120)
  found = strategy.free(losses[:, None], design)[:, 0]
  # Where wealth is nearly there the chance is nearly 1, and its digits cancel.
  np.testing.assert_allclose(found, bets, rtol=1e-6, atol=1e-6)
  p = p_values.betting(losses, 0.1, error_rate=error_rate, planned_size=120, strategy=strategy)
  assert p == pytest.approx(math.exp(-highest), rel=1e-6) and reached == (p <= error_rate)
  assert betting.certifies(losses[:, None], np.array([0]), design, strategy) == reached


def test_a_sequential_hedge_bets_at_least_seven_tenths_of_the_plug_in_pace():
  losses = laws.mostly_zero(np.random.default_rng(8), 0.02, 300)[:, None]
  design = betting.EARLY.design(0.1, 0.05, 300)
  early = betting.EARLY.free(losses, design)
  plain = betting.FIXED_LEVEL.free(losses, betting.FIXED_LEVEL.design(0.1, 0.05, 300))
  # Ahead, a hedge slows down to nothing; this one does not.
  ahead = early[60:80] / plain[60:80]
  assert np.all(ahead > 1.0) and early.shape == plain.shape
  assert (betting.EARLY.least_pace, betting.FIXED_LEVEL.least_pace) == (0.7, 0.0)
  assert betting.EARLY.cap_share == betting.FIXED_LEVEL.cap_share == 0.99


def test_what_comes_before_a_row_is_summed_by_hand():
  losses = np.array([[0.5], [0.0], [0.2]])
  first = (0.5 - 0.5 / 2) ** 2
  second = first + (0.0 - 0.5 / 3) ** 2
  found = strategies.squares_before(losses)
  np.testing.assert_allclose(found[:, 0], [0.0, first, second], rtol=1e-14)
  np.testing.assert_array_equal(losses[:, 0], [0.5, 0.0, 0.2])  # they are left alone


def test_the_hedge_looks_at_its_wealth_less_often_where_many_prompts_are_left():
  losses = laws.mostly_zero(np.random.default_rng(8), 0.05, 400)
  _, _, deviations = hedge_by_hand(losses, 0.1, 0.05, 400)
  design = betting.FIXED_LEVEL.design(0.1, 0.05, 400)
  aims = betting.FIXED_LEVEL.free(losses[:, None], design)[:, 0] * deviations
  # 400 // 64 = 6 prompts are bet on before the second look, 394 // 64 = 6 before the third.
  np.testing.assert_allclose(aims[:6], aims[0])
  np.testing.assert_allclose(aims[6:12], aims[6])
  assert not math.isclose(aims[0], aims[6]) and not math.isclose(aims[6], aims[12])


def test_looks_are_a_64th_of_what_is_left():
  for planned, look in ((1, 1), (127, 1), (128, 2), (640, 10)):
    assert strategies.Hedge(betting.Design(0.1, 0.05, planned), 1).look == look
  assert betting.Design(0.1, 0.05, 9).least_pace == 0.0


@pytest.mark.parametrize("upper", [2.0, 0.25, -0.5])
def test_bets_know_no_unit(upper):
  """Losses, tolerance and range in another unit: bets in its inverse, the same wealth."""
  losses = laws.signed_smooth(np.random.default_rng(3), 0.05, (50, 2))
  tolerance = 0.1
  scale = abs(upper)
  moved = tolerance if upper > 0 else tolerance - 2.0  # an upper end below 0
  shifted = losses if upper > 0 else losses - 2.0
  plain = betting.Design(moved, 0.05, 50, math.copysign(1.0, upper))
  scaled = betting.Design(moved * scale, 0.05, 50, upper)
  expected = strategies.hedge_bets(shifted, plain)
  np.testing.assert_allclose(
    strategies.hedge_bets(shifted * scale, scaled) * scale, expected, rtol=1e-9
  )


@pytest.mark.parametrize(
  ("tolerance", "share"), [(0.001, 0.01), (0.2, 0.2), (0.5, 0.5), (0.9, 0.5)]
)
def test_the_first_bet_knows_the_tolerance_alone(tolerance, share):
  """At an error rate of 1/2 the chance is 1/2: phi(0) / (1/2) over the deviation."""
  design = betting.Design(tolerance, 0.5, 9)
  (bet,) = strategies.hedge_bets(np.zeros((1, 1)), design)[0]
  deviation = math.sqrt(share * (1.0 - share))
  assert bet == pytest.approx(math.sqrt(2.0 / math.pi) / deviation / 3.0)


@pytest.mark.parametrize(("loss", "factor"), [(-0.99, 2.0), (0.51, 0.5)])
def test_at_either_end_bets_go_on_at_the_plug_in_pace(loss, factor):
  """Wealth of exactly 1 / error_rate, or of error_rate: nothing is left to hedge."""
  design = betting.FIXED_LEVEL.design(0.01, 0.5, 2)
  losses = np.array([[loss], [0.0]])
  wealth = betting.log_wealth(losses[:1], design, betting.FIXED_LEVEL)
  assert wealth[0, 0] == math.log(factor)
  squares = 8.0 * 0.01 * 0.99 + (loss - loss / 2.0) ** 2
  pace = math.sqrt(2.0 * math.log(2.0) / 2.0)
  found = strategies.hedge_bets(losses, design)[1, 0]
  assert found == pytest.approx(pace * math.sqrt(9.0 / squares), rel=1e-9)


@pytest.mark.parametrize("rows", [1, 2, 63, 64, 65, 200])
def test_wealth_is_followed_alike_in_factors_and_in_logarithms(rows):
  gains = np.random.default_rng(rows).uniform(-0.5, 0.5, (rows, 4))
  sums = np.cumsum(np.log1p(gains), axis=0)
  highest, last = strategies.follow(gains.copy())
  np.testing.assert_allclose(highest, sums.max(axis=0), rtol=1e-9, atol=1e-12)
  np.testing.assert_allclose(last, sums[-1], rtol=1e-9, atol=1e-12)
