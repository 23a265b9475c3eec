"""What can be promised: each risk by hand, at its boundary, over clusters, in a file."""

import dataclasses
import types
import warnings

import numpy as np
import pytest
from scipy import stats

from calm.calibrate import (
  Calibration,
  SequenceLosses,
  Support,
  calibrate,
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
  return SequenceLosses(np.stack(columns, axis=1), GRID[: len(columns)], **fields)


def calibrated(losses, promise=None, tolerance=0.2, **options):
  return calibrate(
    losses, tolerance=tolerance, error_rate=ERROR_RATE, promise=promise, **options
  )


SIGNED = Support(-1.0, 1.0)
VALUES = np.array([[0.1, 0.2], [0.25, 0.7], [1.0, 0.0]])
DEPTHS = np.array([[2.0, 1.0], [4.0, 4.1], [8.0, 3.0]])
LOSSES = SequenceLosses(
  VALUES, GRID, SIGNED, metric="rouge_l", ids=("a", "b", "c"), procedure=laws.procedure()
)
# The user answers for a procedure that is unknown.
HALF = dataclasses.replace(LOSSES, values=VALUES / 2, procedure=None)
WEIGHTS = np.array([0.0, 0.5, 2.0])
MEAN = "an expected loss of at most 0.25"


def where(counts):
  return np.where(counts, VALUES, np.nan)


# promise, its tests at 0.25 of losses in [-1, 1], what each tests (NaN: no row), its sentence
BY_HAND = [
  (risks.Mean(), [Test("", 0.25, SIGNED)], [VALUES], MEAN),
  (
    risks.Quantile(0.9),
    [Test("", 0.1, Support(binary=True))],
    [VALUES > 0.25],
    "a loss of at most 0.25 for at least 90 % of texts",
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
    risks.TailMean(0.75, 0.2),
    [Test("", 0.25, Support(0.2, 0.2 + 0.8 / 0.25))],
    [0.2 + 4.0 * np.maximum(0.0, VALUES - 0.2)],
    "a mean loss over the worst 25 % of texts of at most 0.25",
  ),
  (
    risks.KnownMixture(2.0, weights=WEIGHTS),
    [Test("", 0.25, Support(0.25 - 2.0 * 1.25, 0.25 + 2.0 * 0.75))],
    [0.25 + WEIGHTS[:, None] * (VALUES - 0.25)],
    f"{MEAN} over the mixture that the caller's weights (at most 2) describe",
  ),
  (
    risks.SeveralRisks(risks=[Risk(LOSSES, 0.25), Risk(HALF, 0.5, "answers")]),
    [Test("textual loss (rouge_l)", 0.25, SIGNED), Test("answers", 0.5, SIGNED)],
    [VALUES, VALUES / 2],
    "expected values of textual loss (rouge_l) of at most 0.25 and answers of at most 0.5",
  ),
  (
    risks.Cost(0.8, 0.25, costs=DEPTHS / 10.0),
    [
      Test("risk", 0.25, SIGNED, 0.75),
      Test("cost", 0.8, Support(), 0.25, ascending=True),
    ],
    [VALUES, DEPTHS / 10.0],
    f"{MEAN}, and needs at most 0.8 of the decoder layers a token of full depth (at least x1.25"
    " fewer), on average over texts",
  ),
]


@pytest.mark.parametrize(
  ("promise", "tests", "tested", "sentence"), BY_HAND, ids=[p[0].name for p in BY_HAND]
)
def test_what_is_tested_and_said_by_hand(promise, tests, tested, sentence):
  parts = promise.parts(LOSSES, 0.25)
  assert promise.tests(0.25, SIGNED) == tuple(tests) == tuple(part.test for part in parts)
  for part, expected in zip(parts, tested, strict=True):
    rows = True if part.rows is None else part.rows
    np.testing.assert_allclose(np.where(rows, part.losses.values, np.nan), expected)
    assert part.losses.support == part.test.support and part.losses.ids == LOSSES.ids
  rows = [types.SimpleNamespace(rejected=True)] * 2
  calibration = types.SimpleNamespace(tolerance=0.25, rows=rows)
  assert promise.statement(calibration, "loss") == sentence
  assert "nothing of" in promise.limits and "{unit}" in promise.limits
  # A file has numbers alone: no rows of prompts, which are neither shown nor compared.
  stored = risks.from_json(promise.to_json())
  assert stored == promise and repr(stored) == repr(promise)
  if any(not field.compare for field in dataclasses.fields(promise)):
    with pytest.raises(ValueError, match=r"promise\s+read from a file"):
      stored.parts(LOSSES, 0.25)
  with pytest.raises(ValueError, match="with the fields"):
    risks.from_json({**promise.to_json(), "more": 1})


def test_what_is_outside_of_the_range_has_no_quantile():
  values = [[0.25], [0.0 - 1e-9], [1.0 + 1e-9], [-0.1], [1.1], [np.nan], [-np.inf]]
  (part,) = risks.Quantile(0.9).parts(SequenceLosses(values, [0.5]), 0.25)
  np.testing.assert_array_equal(part.losses.values[:, 0], [0, 0, 1, *[np.nan] * 4])
  found = calibrated(SequenceLosses(values * 40, [0.5]), risks.Quantile(0.9))
  assert not found.certified and "row 3" in found.reason
  above = table(np.full(100, 1 - 0.7))  # 0.30000000000000004
  assert not calibrated(above, risks.Quantile(0.9), 0.3).certified
  assert calibrated(table(np.full(100, 0.3)), risks.Quantile(0.9), 0.3).certified


def chosen(**changes):
  fields = dict(names=("texts",), tolerances=(0.1,), configurations=("a", "b", "c"))
  return risks.Configurations(**{**fields, "costs": (3.0, 2.0, 2.0), **changes})


def two(**changes):
  other = dataclasses.replace(HALF, **changes)
  return lambda: calibrate(risks=[Risk(LOSSES, 0.25), Risk(other, 0.5, "x")], error_rate=0.1)


@pytest.mark.parametrize(
  ("make", "message"),
  [
    *((lambda s=s: risks.Quantile(s), "`share` to be in") for s in (0.0, True)),
    (lambda: risks.EveryGroup(labels=["a", ""]), "`labels` to name a group of every prompt"),
    (lambda: risks.EveryGroup(labels=["a"]).parts(LOSSES, 0.1), r"`labels` of shape \(3,\)"),
    *(
      (lambda t=t: risks.EarlyExits(t), "finite, above 0 and to rise strictly")
      for t in ((), (0.0, 1.0), (1.0, np.inf), (1.0, 1.0), (2.0, 1.0), (np.nan,))
    ),
    (lambda: risks.EarlyExits((1.0,), depths=[1.0]).parts(LOSSES, 0.1), r"`depths` of shape"),
    *(
      (lambda d=d: risks.EarlyExits((1.0,), depths=d).parts(LOSSES, 0.1), "`depths` to be fin")
      for d in (DEPTHS - 3.0, DEPTHS * np.nan, DEPTHS * np.inf)
    ),
    (lambda: risks.TailMean(0.0), "`beta` to be in"),
    *((lambda x=x: risks.TailMean(0.5, x), r"`start` to be in \(-2, 1\)") for x in (-2.0, 1)),
    (lambda: risks.TailMean(0.5, 0.2).tests(0.2, Support()), "`start` below the tolerance"),
    *((lambda m=m: risks.KnownMixture(m), "`most` of at least 1") for m in (0.99, np.inf)),
    *((lambda w=w: risks.KnownMixture(2.0, weights=[w]), f"up to {w}") for w in (2.1, np.nan)),
    (lambda: risks.Cost(0.0), "`at_most`"),
    (lambda: risks.SeveralRisks(), "at least one `Risk`"),
    (lambda: risks.SeveralRisks(("a",), (0.1, 0.2)), "at least one `Risk`"),
    (two(ids=("a", "b", "x")), "same prompts, got .*'x'"),
    (two(thresholds=[0.8, 0.1]), r"and procedure, got another of 'x': the grid \[0.8, 0.1\] b"),
    (
      two(procedure=laws.procedure(measure="state")),
      "procedure, got another of 'x': `measure`",
    ),
    (two(values=np.zeros((2, 2)), ids=("a", "b")), "same prompts"),
    (lambda: calibrate(LOSSES, risks=[Risk(LOSSES, 0.1)], error_rate=0.1), "`risks` alone"),
    (lambda: calibrate(error_rate=0.1), "`losses` and `tolerance`, or `risks`"),
    (lambda: calibrate(risks=[Risk(LOSSES, 0.1)] * 2, error_rate=0.1), "of different names"),
    (lambda: chosen(costs=(1.0, 2.0)), "finite cost each, .*got 3, 2 costs"),
    (lambda: chosen(costs=(1.0, np.nan, 2.0)), "a finite cost each"),
    (lambda: chosen(grids=(3, 0)), "`grids` that have them all"),
    *((lambda j=j: risks.from_json(j), "name one of") for j in ({"name": "luck"}, ["mean"])),
    (lambda: risks.from_json({"name": "quantile"}), "with the fields"),
  ],
)
def test_what_cannot_be_promised_is_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_the_cheapest_configuration_is_served_and_of_equal_ones_the_safest():
  promise = chosen()
  assert promise.place([True, True, True]) == promise.place([False, True, True]) == 1
  assert promise.place([True, False, True]) == 2 and promise.place([False] * 3) is None
  place = risks.Mean().place
  assert place([True, True, False]) == 1 and place([False, False]) is None
  for rejected, said in (([True, False, False], "(a) expected values"), ([False] * 3, "exp")):
    rows = [types.SimpleNamespace(rejected=one) for one in rejected]
    assert promise.statement(types.SimpleNamespace(rows=rows), "").startswith(said)


def quantile(generator, size):
  """P(loss > 0.2) = 0.15: the share of 85 % is just not kept."""
  bad = generator.random(size) < 0.1501
  return table(np.where(bad, 0.9, 0.2 * generator.random(size))), risks.Quantile(0.85)


def every_group(generator, size):
  """One of four groups is at the boundary, the others are far from it."""
  labels = [f"g{row % 4}" for row in range(size)]
  means = np.where(np.arange(size) % 4 == 2, 0.2001, 0.02)
  values = (generator.random(size) < means).astype(float)
  return table(values, support=Support(binary=True)), risks.EveryGroup(labels=labels)


def early(generator, size):
  """Texts that leave early lose 0.2 on average; the others nothing."""
  depth = np.where(generator.random(size) < 0.6, 2.0, 8.0)
  values = np.where(depth < 4, (generator.random(size) < 0.2001).astype(float), 0.0)
  return table(values), risks.EarlyExits((4.0,), depths=depth[:, None])


def tail(generator, size):
  """A mean of 0.1 over all is 0.2 over the worst half."""
  values = 0.2001 + generator.uniform(-0.1, 0.1, size)
  values *= generator.random(size) >= 0.5
  return table(values), risks.TailMean(beta=0.5, start=0.02)


def mixture(generator, size):
  """Tasks A and B in halves; served 1 : 3, where B loses 0.25 and A 0.05."""
  second = generator.random(size) < 0.5
  values = (generator.random(size) < np.where(second, 0.2501, 0.0501)).astype(float)
  return table(values), risks.KnownMixture(2.0, weights=np.where(second, 1.5, 0.5))


def cost(generator, size):
  """The risk is kept, the cost just not."""
  costs = 0.6001 + generator.uniform(-0.3, 0.3, (size, 1))
  return table(0.01 * generator.random(size)), risks.Cost(0.6, costs=costs)


LAWS = [quantile, every_group, early, tail, mixture, cost]


@pytest.mark.parametrize("law", LAWS)
def test_at_the_boundary_the_promise_is_broken_no_more_often_than_it_says(law):
  generator, draws, wrong = np.random.default_rng(0), 80, 0
  for draw in range(draws):
    losses, promise = law(generator, 160)
    # Known texts of prompts need one order; rows of few kinds alone would be tested in 16.
    losses = dataclasses.replace(losses, contents=f"{draw:x}")
    wrong += calibrated(losses, promise).certified
  assert stats.binomtest(wrong, draws, ERROR_RATE, alternative="greater").pvalue > 1e-3
  losses, promise = law(np.random.default_rng(0), 800)  # kept with room
  if isinstance(promise, risks.Cost):
    promise = risks.Cost(0.8, costs=promise.costs)
  found = calibrated(losses, promise, 0.45 if law is not quantile else 0.95)
  back = Calibration.from_json(found.to_json())
  assert found.certified and back == found and type(back.promise) is type(promise)


def test_a_good_mean_hides_a_bad_group_and_each_group_needs_prompts_of_its_own():
  labels = ["fr" if row % 10 == 0 else "en" for row in range(400)]
  losses = table((np.arange(400) % 20 == 0) * 1.0)
  assert calibrated(losses).certified
  found = calibrated(losses, risks.EveryGroup(labels=labels))
  assert not found.certified and "(fr)" in found.reason
  few = risks.EveryGroup(labels=["rare" if row < 5 else "en" for row in range(400)])
  assert "rare: expected at least 11 prompts" in calibrated(table(np.zeros(400)), few).reason
  assert planning.promise_size(risks.Quantile(0.9), 0.3, 0.05) == {"": 29}
  every = each_group(losses, labels, tolerance=0.2, error_rate=ERROR_RATE)
  assert list(every) == ["en", "fr"] and every["en"].certified and not every["fr"].certified
  rows = losses.rows(np.flatnonzero(np.array(labels) == "en"))
  assert every["en"] == calibrate(rows, tolerance=0.2, error_rate=ERROR_RATE / 2)


def test_where_no_text_leaves_nothing_is_certified():
  depths = np.full((400, 1), 8.0)
  nobody = risks.EarlyExits((1.0,), depths=depths)
  assert not calibrated(table(np.zeros(400)), nobody).certified


def test_a_cost_is_tested_from_the_cheap_end_and_several_risks_need_all_tolerances():
  generator = np.random.default_rng(0)
  losses = table(0.01 * generator.random(400), 0.1 * generator.random(400))
  costs = np.stack([np.full(400, 0.9), np.full(400, 0.4)], axis=1)
  found = calibrated(losses, risks.Cost(0.5, costs=costs))
  assert found.threshold == 0.5 and found.column("rejected").tolist() == [False, True]
  assert [part.share for part in found.parts] == [0.5, 0.5]
  risky = table(losses.values[:, 0], np.full(400, 0.9), kind="risk_signed", metric="f1")
  assert not calibrated(risky, risks.Cost(0.5, costs=costs)).certified
  for bound, certified in ((0.1, 0.9), (0.95, 0.5)):
    both = calibrate(risks=[Risk(losses, 0.1), Risk(risky, bound)], error_rate=ERROR_RATE)
    assert both.threshold == certified
  assert "textual loss (unknown) of at most 0.1 and" in both.guarantee


@pytest.mark.parametrize(
  ("promise", "tests", "tested", "sentence"), BY_HAND, ids=[p[0].name for p in BY_HAND]
)
def test_every_cluster_counts_once_with_the_mean_of_its_prompts(
  promise, tests, tested, sentence
):
  groups = np.array(["a", "b", "b"])
  # Named knobs, too: tables of some thresholds once kept the names of all.
  losses = dataclasses.replace(LOSSES, groups=tuple(groups), knobs=("slow", "fast"))
  found = calibrated(losses, promise, 0.25)
  assert found.clusters and found.num_examples == 2
  means = [part.means for part in found.parts] or [found.column("mean")]
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of means of nothing
    expected = [
      np.nanmean([np.nanmean(values[groups == name], axis=0) for name in "ab"], axis=0)
      for values in np.array(tested, np.float64)
    ]
  np.testing.assert_allclose(means, expected, rtol=1e-12)
