"""One of many configurations, as a `Calibration`: chosen, stored, read again, never wrong."""

import dataclasses
import json

import numpy as np
import pytest
from scipy import stats

from calm.calibrate import (
  Calibration,
  SequenceLosses,
  Support,
  calibrate,
  calibrate_configurations,
  promises,
  verification,
)
from calm.calibrate.generations.procedure import Procedure

GRIDS = {"softmax": [0.9, 0.5], "state": [0.8]}
RATES = {"softmax": [0.01, 0.3], "state": [0.02]}
DEPTHS = {"softmax": [6.0, 2.0], "state": [4.0]}


def procedure(measure):
  return Procedure(
    "p", "t", "", 8, 8, 1, measure, (1,), {"name": "constant"}, "exit_state", None, "shared",
    "float32", {"name": "greedy"},
  )  # fmt: skip


def families(count=400, seed=0, tolerances=(0.1, 0.2), groups=None):
  generator = np.random.default_rng(seed)
  risks, costs = {}, {}
  for name, grid in GRIDS.items():
    values = (generator.random((count, len(grid))) < RATES[name]) * 1.0
    losses = SequenceLosses(
      values,
      grid,
      ids=tuple(f"p{row}" for row in range(count)),
      procedure=procedure(name),
      groups=groups,
    )
    signed = dataclasses.replace(losses, values=values / 2.0, kind="risk_clipped")
    risks[name] = [
      promises.Risk(losses, tolerances[0], "texts"),
      promises.Risk(signed, tolerances[1], "answers"),
    ]
    costs[name] = np.tile(DEPTHS[name], (count, 1))
  return risks, costs


def test_the_cheapest_certified_configuration_of_all_families():
  found = calibrate_configurations(*families(), error_rate=0.05, seed="ab")
  assert found.threshold == 0.8 and found.procedure == procedure("state")
  assert found.num_examples == 200 and found.testing == "fixed_sequence"
  promise = found.promise
  assert promise.names == ("texts", "answers") and promise.tolerances == (0.1, 0.2)
  assert promise.configurations[-1] == "softmax at 0.5" and promise.costs[-1] == 2.0
  assert [row.threshold for row in found.rows][-1] == 0.5 and not found.rows[-1].rejected
  assert "state at 0.8 is the cheapest (4) of 2 certified among 3" in found.reason
  assert "(state at 0.8) expected values of texts of at most 0.1 and answers of" in (
    found.guarantee
  )
  again = calibrate_configurations(*families(), error_rate=0.05, seed=found.seed)
  assert again == found


def test_it_is_stored_and_its_decision_made_again(tmp_path):
  found = calibrate_configurations(*families(), error_rate=0.05, seed="ab")
  path = tmp_path / "calibration.json"
  found.save(path)
  assert Calibration.load(path, expect_digest=found.digest) == found
  for change, message in (
    (lambda v: v.update(threshold=0.9), "`threshold` 0.8"),
    (lambda v: v["promise"].update(costs=[1.0, 9.0, 2.0][::-1]), "`threshold`"),
    (lambda v: v["promise"].update(configurations=["a"], costs=[1.0]), "one a configuration"),
    (lambda v: v["promise"].update(tolerances=[0.1, 0.3]), "`parts`"),
    (lambda v: v["promise"].update(costs=[1.0, 2.0, "x"]), "costs|numbers"),
  ):
    value = json.loads(path.read_text())
    change(value)
    value["digest"] = verification.digest(value)
    with pytest.raises(ValueError, match=message):
      Calibration.from_json(value)


def test_nothing_certified_is_full_depth():
  found = calibrate_configurations(*families(tolerances=(0.001, 0.2)), error_rate=0.05)
  assert not found.certified and "Nothing is certified: the safest" in found.reason
  assert Calibration.from_json(found.to_json()) == found


def test_clusters_are_the_units():
  groups = tuple(f"g{row // 4}" for row in range(400))
  found = calibrate_configurations(*families(groups=groups), error_rate=0.05)
  assert "in the average over clusters, of which each counts once" in found.promised
  assert found.clusters and found.num_examples == 50
  one = [{"softmax": table["softmax"]} for table in families(groups=groups)]
  alone = calibrate_configurations(*one, error_rate=0.05)
  assert alone.clusters and alone.promise.configurations == ("softmax at 0.9", "softmax at 0.5")


def test_what_texts_were_compared_with_is_recorded():
  risks, costs = families()
  found = calibrate_configurations(risks, costs, error_rate=0.05)
  assert found.provenance.references == "full model"
  against_targets = {
    name: [
      dataclasses.replace(r, losses=dataclasses.replace(r.losses, kind="risk_signed"))
      for r in several
    ]
    for name, several in risks.items()
  }
  found = calibrate_configurations(against_targets, costs, error_rate=0.05)
  assert found.provenance.references == "targets"


def test_families_that_differ_are_refused():
  risks, costs = families()
  few, _ = families(count=300)
  grouped, _ = families(groups=tuple(f"g{row // 4}" for row in range(400)))
  lone = {"softmax": risks["softmax"]}
  other = {**risks, "state": [dataclasses.replace(r, tolerance=0.3) for r in risks["state"]]}
  for changed, prices, message in (
    ({}, {}, "at least one family"),
    ({**risks, "state": []}, costs, "at least one family, each with"),
    ({**risks, "state": grouped["state"]}, costs, "the same prompts everywhere, got others"),
    (lone, costs, "each with a table of `costs`"),
    (other, costs, "of every family"),
    ({**risks, "state": few["state"]}, costs, "same prompts"),
    (risks, {**costs, "state": [1.0]}, "`costs` of 'state' of shape"),
  ):
    with pytest.raises(ValueError, match=message):
      calibrate_configurations(changed, prices, error_rate=0.05)
  with pytest.raises(ValueError, match="error_rate"):
    calibrate_configurations(risks, costs, error_rate=1.0)


def test_sorted_tables_at_the_boundary_are_certified_as_seldom_as_any():
  generator = np.random.default_rng(3)
  wrong, draws = 0, 100
  for _ in range(draws):
    values = np.sort((generator.random((200, 2)) < 0.1) * 1.0, axis=0)
    losses = SequenceLosses(values, [0.9, 0.5])
    found = calibrate_configurations(
      {"a": [promises.Risk(losses, 0.1)]}, {"a": np.tile([2.0, 1.0], (200, 1))}, error_rate=0.05
    )
    wrong += found.certified
  assert stats.binomtest(wrong, draws, 0.05, alternative="greater").pvalue > 1e-3


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({}, "a cost each, got 0 and 0 costs"),
    ({"configurations": ("a",), "costs": (1.0, 2.0)}, "a cost each, got 1 and 2 costs"),
    ({"configurations": (1,), "costs": (1.0,)}, "of texts"),
    ({"configurations": ("a",), "costs": (float("inf"),)}, "finite `costs`"),
  ],
)
def test_a_promise_of_configurations_has_a_cost_for_each(fields, message):
  with pytest.raises(ValueError, match=message):
    promises.Configurations(names=("texts",), tolerances=(0.1,), **fields)


def test_of_certified_configurations_the_cheapest_is_served_and_of_equal_ones_the_safest():
  promise = promises.Configurations(
    names=("texts",),
    tolerances=(0.1,),
    configurations=tuple("abcd"),
    costs=(3.0, 2.0, 2.0, 1.0),
  )
  assert promise.place([True, True, True, False]) == 1
  assert promise.place([True, False, False, False]) == 0
  assert promise.place([False] * 4) is None
  promise.check_rows([0.5, 0.9, 0.9, 0.1])
  with pytest.raises(ValueError, match="Expected 4 `rows`"):
    promise.check_rows([0.5])
  assert promises.from_json(promise.to_json()) == promise


def test_a_risk_has_one_range_in_all_families():
  risks, costs = families()
  wider = [
    dataclasses.replace(risk, losses=dataclasses.replace(risk.losses, support=Support(-1.0)))
    for risk in risks["state"]
  ]
  with pytest.raises(ValueError, match="one support of 'texts'"):
    calibrate_configurations({**risks, "state": wider}, costs, error_rate=0.05)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"thresholds": np.array([0.8, 0.4])}, r"same grid, got \[0.8, 0.4\] of 'answers' beside"),
    ({"procedure": procedure("state")}, "one procedure, got another of 'answers': `measure`"),
  ],
)
def test_risks_of_other_outputs_are_refused(changes, message):
  risks, costs = families()
  first, second = risks["softmax"]
  other = promises.Risk(dataclasses.replace(second.losses, **changes), 0.2, "answers")
  with pytest.raises(ValueError, match=message):
    calibrate_configurations(
      {**risks, "softmax": [first, other]}, costs, error_rate=0.05, seed="ab"
    )
  with pytest.raises(ValueError, match=message):
    calibrate(risks=[first, other], error_rate=0.05, seed="ab")
  unknown = dataclasses.replace(second.losses, procedure=None)  # the user answers for it
  found = calibrate(
    risks=[first, promises.Risk(unknown, 0.2, "answers")], error_rate=0.05, seed="ab"
  )
  assert found.procedure == procedure("softmax")
