"""What can be promised: each risk by hand, at its boundary, over clusters, in a
file.
"""

import dataclasses
import json
import types
import warnings

import numpy as np
import pytest

from calm.calibrate import (
  Calibration,
  SequenceLosses,
  Support,
  calibrate,
  calibrate_configurations,
  calibration,
  each_group,
  planning,
  risks,
)
from calm.calibrate.risks import Risk
from calm.calibrate.testing import Test
from tests.calibrate import laws

ERROR_RATE = 0.1
GRID = np.array([0.9, 0.5])


def table(*columns, **fields):
  return SequenceLosses(
    np.stack(columns, axis=1), GRID[: len(columns)], **fields
  )


def calibrated(losses, promise=None, tolerance=0.2, **options):
  return calibrate(
    losses,
    tolerance=tolerance,
    error_rate=ERROR_RATE,
    promise=promise,
    **options,
  )


SIGNED = Support(-1.0, 1.0)
VALUES = np.array([[0.1, 0.2], [0.25, 0.7], [1.0, 0.0]])
DEPTHS = np.array([[2.0, 1.0], [4.0, 4.1], [8.0, 3.0]])
LOSSES = SequenceLosses(
  VALUES,
  GRID,
  SIGNED,
  metric="rouge_l",
  ids=("a", "b", "c"),
  procedure=laws.procedure(),
)
# The user answers for a procedure that is unknown.
HALF = dataclasses.replace(LOSSES, values=VALUES / 2, procedure=None)
WEIGHTS = np.array([0.0, 0.5, 1.25])
MEAN = "an expected loss of at most 0.25"


def where(counts):
  return np.where(counts, VALUES, np.nan)


# promise, its tests at 0.25 of losses in [-1, 1], what each tests (NaN: no
# row), its sentence
BY_HAND = [
  (risks.Mean(), [Test("", 0.25, SIGNED)], [VALUES], MEAN),
  (
    risks.Quantile(),
    [Test("", 0.05, Support(binary=True))],
    [VALUES > 0.25],
    "a loss of at most 0.25 for at least 95 % of texts",
  ),
  (
    risks.EveryGroup(labels=["b", "a", "b"]),
    [Test("a", 0.25, SIGNED), Test("b", 0.25, SIGNED)],
    [where([[False], [True], [False]]), where([[True], [False], [True]])],
    f"{MEAN} in each of the groups 'a', 'b'",
  ),
  (
    risks.EarlyExits((2, 4.0), depths=DEPTHS),
    [Test("depth <= 2", 0.25, SIGNED), Test("depth <= 4", 0.25, SIGNED)],
    [where(DEPTHS <= 2.0), where(DEPTHS <= 4.0)],
    f"{MEAN} among texts of mean depth at most t, for each t of 2, 4",
  ),
  (
    risks.TailMean(start=0.2),
    [Test("", 0.25, Support(0.2, 0.2 + 0.8 / (1.0 - 0.9)))],
    [0.2 + 10.0 * np.maximum(0.0, VALUES - 0.2)],
    "a mean loss over the worst 10 % of texts of at most 0.25",
  ),
  (
    risks.KnownMixture(1.25, weights=WEIGHTS),
    [Test("", 0.25, Support(0.25 - 1.25 * 1.25, 0.25 + 1.25 * 0.75))],
    [0.25 + WEIGHTS[:, None] * (VALUES - 0.25)],
    f"{MEAN} over the mixture that the caller's weights (at most 1.25) "
    "describe",
  ),
  (
    risks.SeveralRisks(risks=[Risk(LOSSES, 0.25), Risk(HALF, 0.5, "answers")]),
    [
      Test("textual loss (rouge_l)", 0.25, SIGNED),
      Test("answers", 0.5, SIGNED),
    ],
    [VALUES, VALUES / 2],
    "expected values of textual loss (rouge_l) of at most 0.25 and answers "
    "of at most 0.5",
  ),
  (
    risks.Cost(0.8, 0.25, costs=DEPTHS / 10.0),
    [
      Test("risk", 0.25, SIGNED, 0.75),
      Test("cost", 0.8, Support(), 0.25, ascending=True),
    ],
    [VALUES, DEPTHS / 10.0],
    f"{MEAN}, and needs at most 0.8 of the decoder layers a token of full "
    "depth (at least x1.25"
    " fewer), on average over texts",
  ),
]


@pytest.mark.parametrize(
  ("promise", "tests", "tested", "sentence"),
  BY_HAND,
  ids=[p[0].name for p in BY_HAND],
)
def test_what_is_tested_and_said_by_hand(promise, tests, tested, sentence):
  parts = promise.parts(LOSSES, 0.25)
  assert (
    promise.tests(0.25, SIGNED)
    == tuple(tests)
    == tuple(part.test for part in parts)
  )
  for part, expected in zip(parts, tested, strict=True):
    rows = True if part.rows is None else part.rows
    np.testing.assert_allclose(
      np.where(rows, part.losses.values, np.nan), expected
    )
    assert (
      part.losses.support == part.test.support and part.losses.ids == LOSSES.ids
    )
  rows = [types.SimpleNamespace(rejected=True)] * 2
  calibration = types.SimpleNamespace(tolerance=0.25, rows=rows)
  assert promise.statement(calibration, "loss") == sentence
  assert "nothing of" in promise.limits and "{unit}" in promise.limits
  # A file has numbers alone: no rows of prompts, which are neither shown nor
  # compared.
  stored = risks.from_json(json.loads(json.dumps(promise.to_json())))
  assert stored == promise and repr(stored) == repr(promise)
  if any(not field.compare for field in dataclasses.fields(promise)):
    with pytest.raises(ValueError, match=r"promise\s+read from a file"):
      stored.parts(LOSSES, 0.25)
  with pytest.raises(ValueError, match="with the fields"):
    risks.from_json({**promise.to_json(), "more": 1})


def test_what_is_outside_of_the_range_has_no_quantile():
  values = [
    [0.25],
    [0.0 - 1e-9],
    [1.0 + 1e-9],
    [-0.1],
    [1.1],
    [np.nan],
    [-np.inf],
  ]
  (part,) = risks.Quantile(0.9).parts(SequenceLosses(values, [0.5]), 0.25)
  np.testing.assert_array_equal(
    part.losses.values[:, 0], [0, 0, 1, *[np.nan] * 4]
  )
  found = calibrated(SequenceLosses(values * 40, [0.5]), risks.Quantile(0.9))
  assert not found.certified and "row 3" in found.reason
  above = table(np.full(100, 1 - 0.7))  # 0.30000000000000004
  assert not calibrated(above, risks.Quantile(0.9), 0.3).certified
  assert calibrated(
    table(np.full(100, 0.3)), risks.Quantile(0.9), 0.3
  ).certified


def chosen(**changes):
  fields = dict(
    names=("texts",), tolerances=(0.1,), configurations=("a", "b", "c")
  )
  return risks.Configurations(**{**fields, "costs": (3.0, 2.0, 2.0), **changes})


def two(**changes):
  other = dataclasses.replace(HALF, **changes)
  return lambda: calibrate(
    risks=[Risk(LOSSES, 0.25), Risk(other, 0.5, "x")], error_rate=0.1
  )


@pytest.mark.parametrize(
  ("make", "message"),
  [
    *(
      (lambda s=s: risks.Quantile(s), "`share` to be in")
      for s in (0.0, 1.0, True)
    ),
    (
      lambda: risks.EveryGroup(labels=["a", ""]),
      "`labels` to name a group of every prompt",
    ),
    (
      lambda: risks.EveryGroup(labels=["a"]).parts(LOSSES, 0.1),
      r"`labels` of shape \(3,\)",
    ),
    *(
      (lambda t=t: risks.EarlyExits(t), "finite, above 0 and to rise strictly")
      for t in (
        (),
        (0.0, 1.0),
        (1.0, np.inf),
        (1.0, 1.0),
        (2.0, 1.0),
        (np.nan,),
      )
    ),
    (
      lambda: risks.EarlyExits((1.0,), depths=[1.0]).parts(LOSSES, 0.1),
      r"`depths` of shape",
    ),
    *(
      (
        lambda d=d: risks.EarlyExits((1.0,), depths=d).parts(LOSSES, 0.1),
        "`depths` to be fin",
      )
      for d in (DEPTHS - 3.0, DEPTHS * np.nan, DEPTHS * np.inf)
    ),
    *((lambda b=b: risks.TailMean(b), "`beta` to be in") for b in (0.0, 1.0)),
    *(
      (lambda x=x: risks.TailMean(0.5, x), r"`start` to be in \(-2, 1\)")
      for x in (-2.0, 1)
    ),
    (
      lambda: risks.TailMean(0.5).tests(0.0, SIGNED),
      "`start` below the tolerance 0.0",
    ),
    *(
      (lambda m=m: risks.KnownMixture(m), "`most` of at least 1")
      for m in (0.99, np.inf)
    ),
    *(
      (lambda w=w: risks.KnownMixture(2, weights=[1, w]), f"up to {w}")
      for w in (2.1, np.nan)
    ),
    *(
      (lambda x=x: risks.Cost(*x), "`at_m|`sh")
      for x in ((0.0,), (1.0,), (0.5, 1.0))
    ),
    (lambda: risks.SeveralRisks(), "at least one `Risk`"),
    (lambda: risks.SeveralRisks(("a",), (0.1, 0.2)), "at least one `Risk`"),
    (two(ids=("a", "b", "x")), "same prompts, got .*'x'"),
    (
      two(thresholds=[0.8, 0.1]),
      r"and procedure, got another of 'x': the grid \[0.8, 0.1\] b",
    ),
    (
      two(procedure=laws.procedure(measure="state")),
      "procedure, got another of 'x': `measure`",
    ),
    (two(values=np.zeros((2, 2)), ids=("a", "b")), "same prompts"),
    (
      lambda: calibrate(LOSSES, risks=[Risk(LOSSES, 0.1)], error_rate=0.1),
      "`risks` alone",
    ),
    (lambda: calibrate(error_rate=0.1), "`losses` and `tolerance`, or `risks`"),
    (
      lambda: calibrate(risks=[Risk(LOSSES, 0.1)] * 2, error_rate=0.1),
      "of different names",
    ),
    (lambda: chosen(costs=(1.0, 2.0)), "finite cost each, .*got 3, 2 costs"),
    (lambda: chosen(costs=(1.0, np.nan, 2.0)), "a finite cost each"),
    (lambda: chosen(grids=(3, 0)), "`grids` that have them all"),
    (lambda: chosen(configurations=(), costs=()), "got 0, 0 costs"),
    *(
      (lambda j=j: risks.from_json(j), "name one of")
      for j in ({"name": "luck"}, ["mean"])
    ),
    (lambda: risks.from_json({"name": "quantile"}), "with the fields"),
  ],
)
def test_what_cannot_be_promised_is_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()
  assert risks.KnownMixture().most == 1.0  # the least that can be


def test_the_cheapest_configuration_is_served_and_of_equal_ones_the_safest():
  promise = chosen()
  assert (
    promise.place([True, True, True]) == promise.place([False, True, True]) == 1
  )
  assert (
    promise.place([True, False, True]) == 2
    and promise.place([False] * 3) is None
  )
  assert chosen(configurations=("a",), costs=(3.0,)).place([True]) == 0
  place = risks.Mean().place
  assert place([True, True, False]) == 1 and place([False, False]) is None
  for rejected, said in (
    ([True, False, False], "(a) expected values"),
    ([False] * 3, "exp"),
  ):
    rows = [types.SimpleNamespace(rejected=one) for one in rejected]
    assert promise.statement(types.SimpleNamespace(rows=rows), "").startswith(
      said
    )


def test_each_group_is_certified_by_prompts_of_its_own():
  labels = ["fr" if row % 10 == 0 else "en" for row in range(400)]
  losses = table((np.arange(400) % 20 == 0) * 1.0)
  assert calibrated(losses).certified
  found = calibrated(losses, risks.EveryGroup(labels=labels))
  assert not found.certified and "(fr)" in found.reason
  for count, end in ((12, ", '12'"), (13, ", '12' and 1 more")):
    many = risks.EveryGroup(
      tuple(f"{number:02d}" for number in range(1, count + 1))
    )
    assert many.statement(found, "loss").endswith(end)
  few = risks.EveryGroup(
    labels=["rare" if row < 5 else "en" for row in range(400)]
  )
  assert (
    "rare: expected at least 11 prompts"
    in calibrated(table(np.zeros(400)), few).reason
  )
  nobody = risks.EarlyExits((1.0,), depths=np.full((400, 1), 8.0))
  assert not calibrated(table(np.zeros(400)), nobody).certified
  (test,) = risks.Quantile(0.9).tests(0.3, Support())
  assert (
    planning.method_size("auto", test.tolerance, 0.05, support=test.support)
    == 29
  )
  every = each_group(losses, labels, tolerance=0.2, error_rate=ERROR_RATE)
  assert (
    list(every) == ["en", "fr"]
    and every["en"].certified
    and not every["fr"].certified
  )
  rows = losses.rows(np.flatnonzero(np.array(labels) == "en"))
  assert every["en"] == calibrate(
    rows, tolerance=0.2, error_rate=ERROR_RATE / 2
  )


def test_a_cost_is_tested_from_the_cheap_end_and_all_risks_need_tolerances():
  generator = np.random.default_rng(0)
  losses = table(0.01 * generator.random(400), 0.1 * generator.random(400))
  costs = np.stack([np.full(400, 0.9), np.full(400, 0.4)], axis=1)
  found = calibrated(losses, risks.Cost(costs=costs))
  assert "another kind, and nothing of seconds" in found.guarantee
  assert found.threshold == 0.5 and found.column("rejected").tolist() == [
    False,
    True,
  ]
  assert [part.share for part in found.parts] == [0.5, 0.5]
  risky = table(
    losses.values[:, 0], np.full(400, 0.9), kind="risk_signed", metric="f1"
  )
  assert not calibrated(risky, risks.Cost(0.5, costs=costs)).certified
  for bound, certified in ((0.1, 0.9), (0.95, 0.5)):
    both = calibrate(
      risks=[Risk(losses, 0.1), Risk(risky, bound)], error_rate=ERROR_RATE
    )
    assert both.threshold == certified
  assert "textual loss (unknown) of at most 0.1 and" in both.guarantee


@pytest.mark.parametrize(
  ("promise", "tests", "tested", "sentence"),
  BY_HAND,
  ids=[p[0].name for p in BY_HAND],
)
def test_every_cluster_counts_once_with_the_mean_of_its_prompts(
  promise, tests, tested, sentence
):
  groups = np.array(["a", "b", "b"])
  # Named knobs, too: tables of some thresholds once kept the names of all.
  losses = dataclasses.replace(
    LOSSES, groups=tuple(groups), knobs=("slow", "fast")
  )
  found = calibrated(losses, promise, 0.25)
  assert found.clusters and found.num_examples == 2
  means = [part.means for part in found.parts] or [found.column("mean")]
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of means of nothing
    expected = [
      np.nanmean(
        [np.nanmean(values[groups == name], axis=0) for name in "ab"], axis=0
      )
      for values in np.array(tested, np.float64)
    ]
  np.testing.assert_allclose(means, expected, rtol=1e-12)


# ---- One of many configurations


GRIDS = {"softmax": [0.9, 0.5], "state": [0.8]}
RATES = {"softmax": [0.01, 0.3], "state": [0.02]}
DEPTHS = {"softmax": [6.0, 2.0], "state": [4.0]}


def procedure(measure):
  return laws.procedure(measure=measure)


def families(count=400, seed=0, tolerances=(0.1, 0.2), groups=None):
  generator = np.random.default_rng(seed)
  several = {}
  costs = {}
  for name, grid in GRIDS.items():
    values = (generator.random((count, len(grid))) < RATES[name]) * 1.0
    losses = SequenceLosses(
      values,
      grid,
      ids=tuple(f"p{row}" for row in range(count)),
      procedure=procedure(name),
      groups=groups,
    )
    signed = dataclasses.replace(
      losses, values=values / 2.0, kind="risk_clipped"
    )
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
  assert promise.names == ("texts", "answers") and promise.tolerances == (
    0.1,
    0.2,
  )
  assert promise.configurations == (
    "softmax at 0.9",
    "softmax at 0.5",
    "state at 0.8",
  )
  assert promise.costs == (6.0, 2.0, 4.0) and promise.grids == (2, 1)
  assert found.column("rejected").tolist() == [True, False, True]
  assert [part.share for part in found.parts] == [
    0.5,
    0.5,
  ] and found.visited == (0, 1, 2)
  assert (
    "state at 0.8 is the cheapest (4) of 2 certified among 3" in found.reason
  )
  assert (
    "(state at 0.8) expected values of texts of at most 0.1 and answers of"
    in (found.guarantee)
  )
  again = calibrate_configurations(
    *families(), error_rate=0.05, seed=found.seed
  )
  assert again == found
  never = calibrate_configurations(
    *families(tolerances=(0.001, 0.2)), error_rate=0.05
  )
  assert (
    not never.certified and "Nothing is certified: the safest" in never.reason
  )
  assert Calibration.from_json(never.to_json()) == never


def test_it_is_stored_and_its_decision_made_again(tmp_path):
  found = calibrate_configurations(*families(), error_rate=0.05, seed="ab")
  path = tmp_path / "calibration.json"
  found.save(path)
  assert Calibration.load(path, expect_digest=found.digest) == found
  for change, message in (
    (lambda v: v.update(threshold=0.9), "`threshold` 0.8"),
    (lambda v: v["promise"].update(costs=[1.0, 2.0, 9.0]), "`threshold`"),
    (lambda v: v["promise"].update(grids=[3]), "`parts`"),
    (
      lambda v: v["promise"].update(grids=[1, 1]),
      "in `grids` that have them all",
    ),
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


def test_families_that_differ_are_refused():
  several, costs = families()
  grouped, _ = families(groups=tuple(f"g{row // 4}" for row in range(400)))
  state = several["state"]
  wide = [
    dataclasses.replace(
      r, losses=dataclasses.replace(r.losses, support=Support(-1.0))
    )
    for r in state
  ]
  for changed, prices, message in (
    ({}, {}, "at least one family"),
    ([], {}, "at least one family, each with a table of `costs`"),
    (grouped["state"], {}, "the same prompts, got others"),
    (
      [dataclasses.replace(r, tolerance=0.3) for r in state],
      {},
      "of every family",
    ),
    (state, {"state": [1.0]}, r"`costs\['state'\]` of shape"),
    (wide, {}, "`risks` with one support of 'texts', got several"),
  ):
    families_ = {} if changed == {} else {**several, "state": changed}
    with pytest.raises(ValueError, match=message):
      calibrate_configurations(families_, {**costs, **prices}, error_rate=0.05)
