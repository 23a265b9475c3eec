"""A run that stopped early is calibrated again from its folder, as it was decided."""

import dataclasses

import numpy as np
import pytest

from calm.calibrate import NEVER_EXIT, calibrate, metrics, sequential
from calm.calibrate import losses as sequence_losses
from calm.calibrate.evidence import betting
from calm.calibrate.generations import order
from tests.calibrate import laws

COUNT = 120
RATES = {"tolerance": 0.1, "error_rate": 0.05}
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
  losses = sequence_losses.textual_losses(
    dataclasses.replace(cached, sequential=False), metric="exact_match"
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
