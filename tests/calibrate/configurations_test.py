"""One of many configurations, as a `Calibration`: chosen, stored, read again, never wrong."""

import json
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from calm.calibrate import (
  Calibration,
  SequenceLosses,
  Support,
  calibrate,
  calibrate_configurations,
  calibration,
  risks,
)
from tests.calibrate import laws

GRIDS = {"softmax": [0.9, 0.5], "state": [0.8]}
RATES = {"softmax": [0.01, 0.3], "state": [0.02]}
DEPTHS = {"softmax": [6.0, 2.0], "state": [4.0]}


def procedure(measure):
  return laws.procedure(measure=measure)


def families(count=400, seed=0, tolerances=(0.1, 0.2), groups=None):
  generator = np.random.default_rng(seed)
  several, costs = {}, {}
  for name, grid in GRIDS.items():
    values = (generator.random((count, len(grid))) < RATES[name]) * 1.0
    losses = SequenceLosses(
      values,
      grid,
      ids=tuple(f"p{row}" for row in range(count)),
      procedure=procedure(name),
      groups=groups,
    )
    signed = replace(losses, values=values / 2.0, kind="risk_clipped")
    several[name] = [
      risks.Risk(losses, tolerances[0], "texts"),
      risks.Risk(signed, tolerances[1], "answers"),
    ]
    costs[name] = np.tile(DEPTHS[name], (count, 1))
  return several, costs


def test_the_cheapest_certified_configuration_of_all_families():
  found = calibrate_configurations(*families(), error_rate=0.05, seed="ab")
  assert found.threshold == 0.8 and found.procedure == procedure("state")
  assert found.num_examples == 400 and found.testing == "fixed_sequence"
  promise = found.promise
  assert promise.names == ("texts", "answers") and promise.tolerances == (0.1, 0.2)
  assert promise.configurations == ("softmax at 0.9", "softmax at 0.5", "state at 0.8")
  assert promise.costs == (6.0, 2.0, 4.0) and promise.grids == (2, 1)
  assert found.column("rejected").tolist() == [True, False, True]
  assert [part.share for part in found.parts] == [0.5, 0.5] and found.visited == (0, 1, 2)
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
    (lambda v: v["promise"].update(costs=[1.0, 2.0, 9.0]), "`threshold`"),
    (lambda v: v["promise"].update(grids=[3]), "`parts`"),
    (lambda v: v["promise"].update(grids=[1, 1]), "in `grids` that have them all"),
    (lambda v: v["promise"].pop("grids"), "`parts`"),
  ):
    value = json.loads(path.read_text())
    change(value)
    value["digest"] = calibration.digest(value)
    with pytest.raises(ValueError, match=message):
      Calibration.from_json(value)


def test_every_family_is_calibrated_at_its_share():
  several, costs = families()
  found = calibrate_configurations(several, costs, error_rate=0.05, seed="ab")
  for name, start in (("softmax", 0), ("state", 2)):
    alone = calibrate(risks=several[name], error_rate=0.025, seed="ab")
    stop = start + len(alone.rows)
    for part, whole in zip(alone.parts, found.parts, strict=True):
      assert part.log_p_values == whole.log_p_values[start:stop]
      assert part.upper_bounds == whole.upper_bounds[start:stop]
    rejected = found.column("rejected")[start:stop]
    assert rejected.tolist() == alone.column("rejected").tolist()


def test_nothing_certified_is_full_depth():
  found = calibrate_configurations(*families(tolerances=(0.001, 0.2)), error_rate=0.05)
  assert not found.certified and "Nothing is certified: the safest" in found.reason
  assert Calibration.from_json(found.to_json()) == found


def test_families_that_differ_are_refused():
  several, costs = families()
  grouped, _ = families(groups=tuple(f"g{row // 4}" for row in range(400)))
  state = several["state"]
  wide = [replace(r, losses=replace(r.losses, support=Support(-1.0))) for r in state]
  for changed, prices, message in (
    ({}, {}, "at least one family"),
    ([], {}, "at least one family, each with a table of `costs`"),
    (grouped["state"], {}, "the same prompts, got others"),
    ([replace(r, tolerance=0.3) for r in state], {}, "of every family"),
    (state, {"state": [1.0]}, r"`costs\['state'\]` of shape"),
    (wide, {}, "`risks` with one support of 'texts', got several"),
  ):
    families_ = {} if changed == {} else {**several, "state": changed}
    with pytest.raises(ValueError, match=message):
      calibrate_configurations(families_, {**costs, **prices}, error_rate=0.05)


def test_choosing_among_measures_is_part_of_one_family():
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
