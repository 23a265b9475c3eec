"""Sequential calibration: valid whenever one stops, with fewer prompts, and replayed."""

import dataclasses
import json
import math
import time

import numpy as np
import pytest
from scipy import stats

from calm.calibrate import (
  NEVER_EXIT,
  Calibration,
  Support,
  betting,
  calibrate,
  metrics,
  sequential,
)
from calm.calibrate import losses as sequence_losses
from calm.calibrate.generations import order
from tests.calibrate import laws

GRID = np.array([0.9, 0.7, 0.5])
RATES = dict(tolerance=0.1, error_rate=0.05)


def run(values, batch=16, support=None, **rates):
  """Feeds a complete table to a test; returns (test, losses asked for per threshold)."""
  test = sequential.SequentialCalibration(
    GRID[: values.shape[1]], len(values), support=support, **{**RATES, **rates}
  )
  asked = [0] * values.shape[1]
  while (request := test.request(batch)) is not None:
    column = GRID.tolist().index(request.threshold)
    assert request.start == asked[column] < request.stop <= len(values)
    asked[column] = request.stop
    test.add(values[request.start : request.stop, column])
  return test, asked


def table(means, count=400, law=laws.mostly_zero, seed=0):
  generator = np.random.default_rng(seed)
  return np.stack([law(generator, mean, count) for mean in means], axis=1)


def test_the_family_wise_error_is_kept_although_we_stop_when_we_like():
  wrong, draws = 0, 400
  for seed in range(draws):
    test, _ = run(table((0.1001, 0.02), 100, seed=seed), error_rate=0.2)
    wrong += test.calibration().certified
  assert stats.binomtest(wrong, draws, 0.2, alternative="greater").pvalue > 1e-3


def test_it_certifies_what_the_fixed_sample_certifies_with_fewer_prompts():
  values = table((0.01, 0.02, 0.3))
  test, asked = run(values, batch=1)
  found = test.calibration(kind="textual", metric="rouge_l")
  fixed = betting.p_value(values, 0.1)
  assert found.threshold == 0.7 and found.column("rejected").tolist() == [1, 1, 0]
  assert asked[0] < 200 and asked[1] < 300
  for column in (0, 1):
    used = found.rows[column].num_examples
    assert used == asked[column]
    prefix = betting.log_wealth(
      values[:used, column], betting.EARLY.design(0.1, 0.05, 400), betting.EARLY
    )
    assert prefix[-1] >= np.log(20) and np.all(prefix[:-1] < np.log(20))
    assert found.rows[column].p_value == pytest.approx(np.exp(-prefix[-1]))
  assert np.all(fixed[:2] <= 0.05)
  assert "0.7 is the lowest certified threshold; 0.5 could no longer" in found.reason


def test_nothing_is_asked_beyond_the_first_failure():
  test, asked = run(table((0.5, 0.0, 0.0)))
  assert asked[0] < 400 and asked[1:] == [0, 0] and test.finished
  found = test.calibration()
  assert found.threshold == NEVER_EXIT and found.reason.startswith("Nothing is certified")
  assert [row.num_examples for row in found.rows[1:]] == [0, 0]
  assert found.rows[1].p_value == 1.0 and np.isnan(found.rows[1].upper_bound)
  assert found.visited == (0,)


def decide(losses, lower=0.0, count=60):
  """(losses used, state) at one threshold."""
  column = sequential._Column(betting.EARLY.design(0.1, 0.05, count), lower)
  column.add(losses)
  return len(column.losses), column.state


@pytest.mark.parametrize("lower", [0.0, -1.0])
def test_hopeless_is_hopeless(lower):
  """Wherever it gives up, the lowest losses at the largest bets would not have certified."""
  design = betting.EARLY.design(0.1, 0.05, 60)
  generator = np.random.default_rng(1)
  for _ in range(50):
    losses = laws.bernoulli(generator, 0.4, 60)
    used, state = decide(losses, lower)
    assert state in (sequential.FAILED, sequential.CERTIFIED)
    if state == sequential.FAILED and used < 60:
      wealth = betting.log_wealth(losses[:used], design, betting.EARLY)[-1]
      best = wealth + (60 - used) * np.log1p(design.cap * (0.1 - lower))
      assert best < design.target
      # One prompt earlier it still had a chance.
      path = betting.log_wealth(losses[:used], design, betting.EARLY)
      before = path[-2] if used > 1 else 0.0
      assert before + (61 - used) * np.log1p(design.cap * (0.1 - lower)) >= design.target
  assert decide([0.0], lower) == (1, sequential.OPEN)
  assert decide(np.ones(60) * 0.09, lower)[1] == sequential.FAILED


def test_bets_do_not_see_later_rows():
  design = betting.EARLY.design(0.1, 0.05, 400)
  values = table((0.05,))
  bets = betting.EARLY.bets(values, design)
  for row in (1, 50, 399):
    later = values.copy()
    later[row:] = np.random.default_rng(row).permutation(later[row:])
    np.testing.assert_array_equal(betting.EARLY.bets(later, design)[: row + 1], bets[: row + 1])
  # ... and not how many rows came so far either, only how many are planned.
  np.testing.assert_array_equal(betting.EARLY.bets(values[:50], design), bets[:50])


def test_batches_do_not_change_the_outcome():
  values = table((0.01, 0.05, 0.2))
  rows = [run(values, batch=batch)[0].calibration().rows for batch in (1, 7, 400)]
  for other in rows[1:]:
    for a, b in zip(rows[0], other, strict=True):
      assert (a.threshold, a.num_examples, a.p_value) == (
        b.threshold,
        b.num_examples,
        b.p_value,
      )


def test_wealth_carried_on_is_wealth_taken_at_once():
  values = table((0.11,), 300)[:, 0]
  design = betting.EARLY.design(0.1, 0.05, 300)
  column = sequential._Column(design, -9.0)  # never hopeless
  column.add(values)
  whole = betting.log_wealth(values, design, betting.EARLY)[: len(column.losses)]
  assert column.highest == pytest.approx(max(0.0, whole.max()), abs=1e-11)


def test_signed_losses_certify_sooner():
  values = table((-0.2,), law=laws.signed)
  test, asked = run(values, batch=1, support=Support(lower=-1.0))
  found = test.calibration(kind="risk_signed")
  assert found.certified and asked[0] < 100
  assert found.reason.startswith("Every threshold of the grid is certified.")


def test_results_are_marked_and_honest():
  found = run(table((0.01, 0.01, 0.01)))[0].calibration(
    order="given", seed="ab", procedure=laws.procedure()
  )
  assert found.sequential and found.method == "betting_early" and found.threshold == 0.5
  assert np.isnan(found.column("mean")).all()
  assert np.all(found.column("upper_bound") < 0.2)
  assert np.all(found.column("upper_bound") > 0.0)
  assert found.column("adjusted_p_value").tolist() == sorted(found.column("adjusted_p_value"))
  assert "at most 400" in found.guarantee and "order given" in found.guarantee
  text = json.dumps(found.to_json(), allow_nan=False)
  back = Calibration.from_json(json.loads(text))
  assert back.rows[0].p_value == found.rows[0].p_value and back.sequential
  assert (
    "at most"
    not in calibrate(table((0.01,)), [0.9], **RATES).guarantee.split("draws of the")[1][:60]
  )


def test_cluster_means_are_the_units_and_are_not_binary():
  """Copies in a cluster count once: 3 prompts of loss 0 each do not certify like 3 prompts."""
  values = np.repeat(laws.bernoulli(np.random.default_rng(3), 0.02, 90), 3)
  units = order.consecutive_units(270, [str(row // 3) for row in range(270)])
  means = order.unit_means(values, units)
  np.testing.assert_array_equal(means, values[::3])
  test = sequential.SequentialCalibration(
    [0.9], len(units), support=Support(binary=True), clusters=True, **RATES
  )
  while (request := test.request(4)) is not None:
    test.add(means[request.start : request.stop])
  found = test.calibration(metric="exact_match")
  assert found.clusters and found.num_examples == 90 and not found.support.binary
  assert "at most 90 calibration clusters of prompts" in found.guarantee
  assert found.rows[0].num_examples == decide(means, count=90)[0]


def test_family_wise_error_with_clusters_of_copies():
  """Tested prompt by prompt, copies would certify a true hypothesis too often."""
  wrong = {True: 0, False: 0}
  for seed in range(300):
    means = laws.bernoulli(np.random.default_rng(seed), 0.1001, 40)
    for clusters in wrong:
      losses = means if clusters else np.repeat(means, 10)
      wrong[clusters] += run(losses[:, None], error_rate=0.2)[0].calibration().certified
  assert stats.binomtest(wrong[True], 300, 0.2, alternative="greater").pvalue > 1e-3
  assert stats.binomtest(wrong[False], 300, 0.2, alternative="greater").pvalue < 1e-6


def test_misuse_is_refused():
  for changes in ({"tolerance": 0.0}, {"tolerance": 1.0}, {"error_rate": 0.0}):
    with pytest.raises(ValueError, match=r"`tolerance` to be|`error_rate` to be"):
      sequential.SequentialCalibration(GRID, 10, **{**RATES, **changes})
  with pytest.raises(ValueError, match="`planned_size` at least 1"):
    sequential.SequentialCalibration(GRID, 0, **RATES)
  with pytest.raises(ValueError, match="descend strictly"):
    sequential.SequentialCalibration(GRID[::-1], 10, **RATES)
  test = sequential.SequentialCalibration(GRID, 10, **RATES)
  with pytest.raises(ValueError, match="more than it asked for"):
    test.add(np.zeros(11))
  for bad in (1.5, -0.1, np.nan):
    with pytest.raises(ValueError, match=r"declared range .* at prompt 1 of the order"):
      test.add([0.0, bad])
  with pytest.raises(ValueError, match="of a finished test, got one"):
    test.calibration()
  assert test.add(np.zeros(10)) == sequential.FAILED  # 10 prompts cannot certify 0.1
  assert test.request() is None
  with pytest.raises(ValueError, match="more than it asked for"):
    test.add([0.0])


def test_a_sequential_run_asks_for_something_and_plans_for_a_whole_number():
  for size in (2.5, math.nan, True, "9"):
    with pytest.raises(ValueError, match="`planned_size` to be a whole number, got"):
      sequential.SequentialCalibration([0.5], size, **RATES)
  test = sequential.SequentialCalibration([0.5], 60, **RATES)
  for batch in (0, -1, 2.5):
    with pytest.raises(ValueError, match="`batch_size` to be a"):
      test.request(batch)
  test.add([1.0 + 1e-12, -1e-12])  # rounding is no fault
  with pytest.raises(ValueError, match=r"got 1.1 at prompt 2"):
    test.add([1.1])


def test_a_sequential_run_is_linear_in_prompts():
  """Wealth is carried on: as many losses again take no more than about as long again."""
  test = sequential.SequentialCalibration([0.5], 40_000, tolerance=0.1, error_rate=0.05)
  seconds = []
  for _ in range(2):
    started = time.process_time()
    for _ in range(4_000):
      assert test.add([0.1]) == sequential.OPEN
    seconds.append(time.process_time() - started)
  assert seconds[1] < 2.0 * seconds[0] + 0.05


COUNT = 120
LOSS = {"kind": "textual", "metric": "exact_match"}


def complete():
  """Every prompt at both thresholds; at the lower one every third text is another."""
  same = [f"word{i} same" for i in range(COUNT)]
  wrong = [text if i % 3 else "else" for i, text in enumerate(same)]
  return laws.generations(COUNT, texts=[same, wrong], procedure=laws.procedure())


def stopped(**rates):
  """The run that stops where these rates decide, and the calibration that it printed."""
  everything = complete()
  columns = sequence_losses.prefix_losses(everything, "textual", metric="exact_match")
  test = sequential.SequentialCalibration(
    everything.thresholds,
    COUNT,
    support=sequence_losses.kind_support(**LOSS),
    **{**RATES, **rates},
  )
  asked = [0, 0]
  while (request := test.request(8)) is not None:
    column = everything.thresholds.tolist().index(request.threshold)
    asked[column] = request.stop
    test.add(columns[column][request.start : request.stop])
  cached = dataclasses.replace(
    everything,
    records=tuple(r[:n] for r, n in zip(everything.records, asked, strict=True)),
    full=everything.full[: max(asked)],
    sequential=True,
  )
  return cached, test


def test_it_is_the_calibration_of_the_run_itself():
  cached, test = stopped()
  lengths = [len(records) for records in cached.records]
  assert 0 < lengths[1] < lengths[0] < COUNT  # it did stop early, twice
  found = sequential.replay(cached, **LOSS, **RATES)
  expected = test.calibration(
    **LOSS,
    seed=order.order_seed(cached.ids, cached.procedure, order.prompts_digest(cached.prompts)),
    procedure=cached.procedure,
    groups_ignored=True,  # two prompts a group, tested one by one
  )
  assert found.to_json() == expected.to_json()
  by_function = {**LOSS, "metric": metrics.exact_match}
  assert sequential.replay(cached, **by_function, **RATES) == found
  assert "the caller took each for an independent draw" in found.guarantee
  assert found.sequential and found.threshold == 0.9
  assert found.support.binary and found.column("rejected").tolist() == [True, False]


def clustered():
  """A complete run by group, two prompts a cluster, in the order of the test."""
  made = complete()
  groups = order.prompt_clusters(made.prompts)
  contents = order.prompts_digest(made.prompts)
  rows = order.decoding_order(made.ids, groups, made.procedure, contents)
  return dataclasses.replace(
    made,
    prompts=tuple(made.prompts[row] for row in rows),
    records=tuple(tuple(column[row] for row in rows) for column in made.records),
    full=tuple(made.full[row] for row in rows),
    sequential=True,
    by_group=True,
  )


def test_a_run_by_group_is_tested_on_cluster_means():
  cached = clustered()
  found = sequential.replay(cached, **LOSS, **RATES)
  assert found.clusters and found.num_examples == COUNT // 2 and found.threshold == 0.9
  assert not found.support.binary and found.sequential
  used = found.rows[0].num_examples
  assert 0 < used < COUNT // 2
  # It needs whole clusters: one prompt less, and the last cluster is not there.
  enough = dataclasses.replace(
    cached, records=(cached.records[0][: 2 * used], cached.records[1])
  )
  assert sequential.replay(enough, **LOSS, **RATES) == found
  short = (cached.records[0][: 2 * used - 1], cached.records[1])
  with pytest.raises(ValueError, match=r"stopped earlier, at threshold 0\.9"):
    sequential.replay(dataclasses.replace(cached, records=short), **LOSS, **RATES)


def test_clusters_are_tested_in_the_order_that_calibrate_tests_them():
  cached = clustered()
  losses = sequence_losses.compute(
    dataclasses.replace(cached, sequential=False), "textual", metric="exact_match"
  )
  fixed = calibrate(losses, **RATES, groups=losses.groups, method="betting_early")
  found = sequential.replay(cached, **LOSS, **RATES)
  assert found.seed == fixed.seed and found.num_examples == fixed.num_examples
  used = found.rows[0].num_examples
  groups = order.prompt_clusters(cached.prompts)
  means = order.unit_means(losses.values[:, 1], order.consecutive_units(COUNT, groups))
  wealth = betting.log_wealth(means, betting.EARLY.design(0.1, 0.05, COUNT // 2), betting.EARLY)
  assert fixed.rows[1].log_p_value == pytest.approx(-max(0.0, wealth.max()), abs=1e-12)
  assert found.rows[1].log_p_value == pytest.approx(
    -max(0.0, wealth[: found.rows[1].num_examples].max())
  )
  assert used < COUNT // 2


@pytest.mark.parametrize("rates", [{"tolerance": 0.03}, {"error_rate": 0.001}])
def test_stricter_rates_would_have_asked_for_more(rates):
  cached, _ = stopped()
  with pytest.raises(ValueError, match=r"stopped earlier, at threshold 0.9 after") as caught:
    sequential.replay(cached, **LOSS, **{**RATES, **rates})
  assert f"after {len(cached.records[0])} prompts; generate again" in str(caught.value)


def test_a_run_that_certified_nothing_replays_as_such():
  everything = complete()
  bad = laws.generations(COUNT, texts=[["else"] * COUNT] * 2, procedure=laws.procedure())
  cached = dataclasses.replace(
    bad, records=(bad.records[0], ()), full=everything.full, sequential=True
  )
  found = sequential.replay(cached, **LOSS, **RATES)
  assert found.threshold == NEVER_EXIT
  assert found.rows[0].num_examples < COUNT and np.isnan(found.rows[1].mean)
