"""Many calibration sets at once against one at a time, and what a pool holds."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm.calibrate import NEVER_EXIT, SequenceLosses, Support, calibrate
from calm.calibrate.evidence import betting, methods, multiple_testing, p_values
from calm.calibrate.evidence import draws as draws_lib
from tests.calibrate import laws

GRID = np.linspace(0.95, 0.1, 17)
TOLERANCES = [0.001, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7]
METHODS = sorted({*methods.METHODS} - {"auto"})


def losses(law=laws.mostly_zero, count=240, means=(0.0, 0.3), **fields):
  generator = np.random.default_rng(0)
  columns = [law(generator, mean, count) for mean in np.linspace(*means, len(GRID))]
  return SequenceLosses(np.stack(columns, axis=1), GRID, **fields)


def one_at_a_time(pool, draws, tolerances, error_rate):
  """The definition: fixed sequence testing of every set, every p-value computed."""
  chosen = np.empty((len(draws), len(tolerances)), int)
  for i, rows in enumerate(draws):
    for j, tolerance in enumerate(tolerances):
      sample = methods.Sample(pool.values[rows], pool.support, tolerance, error_rate)
      p = np.exp(pool.method.log_p_values(sample))
      chosen[i, j] = multiple_testing.fixed_sequence(p, error_rate).rejected.sum() - 1
  return chosen


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("error_rate", [0.05, 0.4])
@pytest.mark.parametrize("size", [1, 37, 150])
def test_lockstep_chooses_what_one_set_at_a_time_chooses(method, error_rate, size):
  made = losses(laws.bernoulli, support=Support(binary=True))
  if method != "binomial":
    made = losses()
  pool = draws_lib.Draws(made, method)
  draws = np.random.default_rng(size).integers(len(pool.values), size=(12, size))
  found = pool.choose(draws, TOLERANCES, error_rate)
  expected = one_at_a_time(pool, draws, TOLERANCES, error_rate)
  np.testing.assert_array_equal(found, expected)
  assert size == 1 or len(np.unique(found)) > 4  # it is not all or nothing


@pytest.mark.parametrize("method", ["auto", "paper"])
def test_lockstep_on_signed_losses(method):
  pool = draws_lib.Draws(
    losses(laws.signed, means=(-0.2, 0.3), support=Support(lower=-1.0)), method
  )
  draws = np.random.default_rng(0).integers(len(pool.values), size=(12, 150))
  found = pool.choose(draws, TOLERANCES, 0.05)
  np.testing.assert_array_equal(found, one_at_a_time(pool, draws, TOLERANCES, 0.05))
  assert len(np.unique(found)) > 4


def test_a_set_that_failed_takes_no_part_any_more():
  values = np.stack([np.zeros(100), np.ones(100), np.zeros(100)], axis=1)
  pool = draws_lib.Draws(SequenceLosses(values, GRID[:3]), "auto")
  sets = np.arange(100)[None]
  assert pool.choose(sets, [0.1, 0.001], 0.05).tolist() == [[0, -1]]
  assert draws_lib.Draws(SequenceLosses(1.0 - values, GRID[:3]), "auto").choose(
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
    p = p_values.betting(sample[:, column], tolerance, error_rate=error_rate)
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
  assert found[0] == (p_values.betting(poor[:, 0], 0.6, error_rate=1e-250) <= 1e-250)


def test_clustered_binary_losses_bet_and_paper_clips_before_it_averages():
  binary = losses(laws.bernoulli, support=Support(binary=True))
  groups = [str(i // 2) for i in range(240)]
  made = draws_lib.Draws(binary, "auto", groups)
  assert made.method.name == "betting_fixed_level" and made.values.shape == (120, 17)
  assert draws_lib.Draws(binary, "auto").method.name == "binomial"
  signed = losses(laws.signed, support=Support(lower=-1.0))
  clipped = draws_lib.Draws(signed, "paper", groups)
  expected = np.maximum(signed.values, 0).reshape(120, 2, 17).mean(axis=1)
  np.testing.assert_allclose(np.sort(clipped.values, axis=0), np.sort(expected, axis=0))
  np.testing.assert_allclose(clipped.values[clipped.unit_of_row[34]], expected[17])


def test_a_pool_chooses_what_calibrate_chooses():
  made = losses(count=300).in_given_order()
  pool = draws_lib.Draws(made, "auto", [f"{i:03d}" for i in range(300)])
  (columns,) = pool.choose(np.arange(300)[None], TOLERANCES, 0.05)
  for tolerance, column in zip(TOLERANCES, columns, strict=True):
    found = calibrate(made, tolerance=tolerance, error_rate=0.05)
    assert found.threshold == (NEVER_EXIT if column < 0 else GRID[column])


@pytest.mark.parametrize("support", [Support(), Support(-1.0, 2.0)])
def test_rounding_leaves_the_range_by_a_billionth_at_most(support):
  ends = np.array([[support.lower - 1e-9], [support.upper + 1e-9]])
  pool = draws_lib.Draws(SequenceLosses(ends, [0.5], support), "betting")
  assert pool.values[:, 0].tolist() == [support.lower, support.upper]
  for odd in (support.lower - 2e-9, support.upper + 2e-9, support.lower - 0.5):
    with pytest.raises(ValueError, match="to lie in the declared range"):
      draws_lib.Draws(SequenceLosses([[odd], [0.0]], [0.5], support), "betting")
