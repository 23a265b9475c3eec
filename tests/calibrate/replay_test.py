"""A run that stopped early is calibrated again from its folder, as it was decided."""

import dataclasses

import numpy as np
import pytest

from calm.calibrate import NEVER_EXIT, ordering, replay, sequence_losses, sequential
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
  found = replay.replay(cached, **LOSS, **RATES)
  expected = test.calibration(
    **LOSS,
    seed=ordering.order_seed(cached.ids, cached.procedure),
    procedure=cached.procedure,
  )
  assert found.to_json() == expected.to_json()
  assert found.sequential and found.threshold == 0.9
  assert found.support.binary and found.column("rejected").tolist() == [True, False]


@pytest.mark.parametrize("rates", [{"tolerance": 0.03}, {"error_rate": 0.001}])
def test_stricter_rates_would_have_asked_for_more(rates):
  cached, _ = stopped()
  with pytest.raises(ValueError, match=r"stopped earlier, at threshold 0.9 after") as caught:
    replay.replay(cached, **LOSS, **{**RATES, **rates})
  assert f"after {len(cached.records[0])} prompts; generate again" in str(caught.value)


def test_a_run_that_certified_nothing_replays_as_such():
  everything = complete()
  bad = laws.generations(COUNT, texts=[["else"] * COUNT] * 2, procedure=laws.procedure())
  cached = dataclasses.replace(
    bad, records=(bad.records[0], ()), full=everything.full, sequential=True
  )
  found = replay.replay(cached, **LOSS, **RATES)
  assert found.threshold == NEVER_EXIT
  assert found.rows[0].num_examples < COUNT and np.isnan(found.rows[1].mean)
