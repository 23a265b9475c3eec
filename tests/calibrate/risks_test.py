"""What can be promised: each risk at its boundary, with its pitfall, tests and sentence."""

import dataclasses
import json
import types

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
from tests.calibrate import laws

ERROR_RATE = 0.1
GRID = np.array([0.9, 0.5])


def table(*columns, **fields):
  return SequenceLosses(np.stack(columns, axis=1), GRID[: len(columns)], **fields)


def calibrated(losses, promise=None, tolerance=0.2, **options):
  return calibrate(
    losses, tolerance=tolerance, error_rate=ERROR_RATE, promise=promise, **options
  )


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
  values = np.where(
    generator.random(size) < 0.5, 0.0, 0.2001 + generator.uniform(-0.1, 0.1, size)
  )
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
  generator = np.random.default_rng(0)
  draws = 120
  wrong = sum(calibrated(*law(generator, 160)).certified for _ in range(draws))
  assert stats.binomtest(wrong, draws, ERROR_RATE, alternative="greater").pvalue > 1e-3


@pytest.mark.parametrize("law", LAWS)
def test_it_is_certified_where_it_is_kept_with_room(law):
  losses, promise = law(np.random.default_rng(0), 800)
  if isinstance(promise, risks.Cost):
    promise = risks.Cost(0.8, costs=promise.costs)
  assert calibrated(losses, promise, 0.45 if law is not quantile else 0.95).certified


@pytest.mark.parametrize("law", LAWS)
def test_a_calibration_carries_it_there_and_back(law, tmp_path):
  losses, promise = law(np.random.default_rng(0), 800)
  found = calibrated(losses, promise, 0.45)
  found.save(tmp_path / "c.json")
  back = Calibration.load(tmp_path / "c.json")
  assert back == found and back.guarantee == found.guarantee
  assert back.promise == promise and type(back.promise) is type(promise)
  assert json.loads((tmp_path / "c.json").read_text())["promise"]["name"] == promise.name
  spoken = back.promise.statement(back, "loss") + back.promise.limits("prompts")
  assert ("0.45" in spoken and "nothing" in spoken) or "not" in spoken
  if law is not quantile and law is not tail:
    with pytest.raises(ValueError, match="a promise read from a file"):
      calibrated(losses, back.promise)


def test_pitfall_a_good_mean_hides_bad_texts():
  bad = np.arange(400) % 10 == 0
  losses = table(bad.astype(float))
  assert calibrated(losses).certified  # a mean of 0.1
  assert not calibrated(losses, risks.Quantile(0.95)).certified
  assert calibrated(losses, risks.Quantile(0.8)).certified


def test_a_quantile_counts_what_is_above_the_tolerance_exactly():
  losses = table(np.full(100, 0.3))
  assert calibrated(losses, risks.Quantile(0.9), 0.3).certified
  above = table(np.full(100, 1 - 0.7))  # 0.30000000000000004
  assert not calibrated(above, risks.Quantile(0.9), 0.3).certified
  values = np.zeros((100, 1))
  values[3] = np.nan
  found = calibrated(SequenceLosses(values, [0.5]), risks.Quantile(0.9))
  assert not found.certified and "row 3" in found.reason


@pytest.mark.parametrize(("share", "size"), [(0.9, 29), (0.95, 59), (0.99, 299)])
def test_quantiles_need_as_many_prompts_as_planned(share, size):
  promise = risks.Quantile(share)
  rates = dict(tolerance=0.3, error_rate=0.05)
  assert planning.promise_size(promise, **rates) == {"": size}
  enough = calibrate(np.zeros((size, 1)), [0.5], **rates, promise=promise)
  few = calibrate(np.zeros((size - 1, 1)), [0.5], **rates, promise=promise)
  assert enough.certified and not few.certified and f"at least {size}" in few.reason


def test_pitfall_a_good_mean_hides_a_bad_group_and_each_group_needs_prompts_of_its_own():
  labels = ["fr" if row % 10 == 0 else "en" for row in range(400)]
  values = np.array(
    [float(label == "fr" and row % 20 == 0) for row, label in enumerate(labels)]
  )
  losses = table(values)
  assert calibrated(losses).certified
  found = calibrated(losses, risks.EveryGroup(labels=labels))
  assert not found.certified and "(fr)" in found.reason
  sizes = planning.promise_size(found.promise, 0.2, ERROR_RATE)
  assert set(sizes) == {"en", "fr"} and sizes["fr"] == planning.method_size(
    "auto", 0.2, ERROR_RATE
  )
  few = ["rare" if row < 5 else "en" for row in range(400)]
  assert (
    "rare: expected at least 11 prompts"
    in calibrated(table(np.zeros(400)), risks.EveryGroup(labels=few)).reason
  )
  every = each_group(losses, labels, tolerance=0.2, error_rate=ERROR_RATE)
  assert every["en"].certified and not every["fr"].certified
  assert every["en"].error_rate == ERROR_RATE / 2


def test_pitfall_texts_that_never_leave_hide_those_that_do():
  depth = np.where(np.arange(400) % 4 == 0, 2.0, 8.0)
  losses = table(np.where(depth < 4, np.arange(400) % 8 == 0, 0.0))
  assert calibrated(losses).certified  # an eighth of all, half of those that left
  promise = risks.EarlyExits((4.0, 8.0), depths=depth[:, None])
  assert not calibrated(losses, promise).certified
  nobody = risks.EarlyExits((1.0,), depths=depth[:, None])
  assert not calibrated(table(np.zeros(400)), nobody).certified
  assert calibrated(table(np.zeros(400)), promise).parts[0].num_examples == (100,)


def test_pitfall_a_mean_says_nothing_of_the_tail():
  losses = table((np.arange(400) % 10 == 0).astype(float))
  assert calibrated(losses).certified
  assert not calibrated(losses, risks.TailMean(0.9, 0.1)).certified
  with pytest.raises(ValueError, match="`start` below the tolerance"):
    calibrated(losses, risks.TailMean(0.9, 0.2))
  # Any start is an upper bound of the tail mean.
  values = laws.mostly_zero(np.random.default_rng(0), 0.1, 4000)
  worst = np.sort(values)[-400:].mean()
  for start in (0.0, 0.1, 0.3):
    bound = start + np.maximum(0.0, values - start).mean() / 0.1
    assert bound >= worst - 1e-9


def test_pitfall_another_mixture_is_another_mean():
  second = np.arange(600) % 2 == 0
  losses = table(np.where(second, np.arange(600) % 6 == 0, 0.0))
  assert calibrated(losses, tolerance=0.25).certified
  weights = np.where(second, 1.9, 0.1)
  assert not calibrated(losses, risks.KnownMixture(2.0, weights=weights), 0.25).certified
  flat = calibrated(losses, risks.KnownMixture(1.0, weights=np.ones(600)), 0.25)
  np.testing.assert_allclose(flat.column("mean"), losses.values.mean(axis=0))
  with pytest.raises(ValueError, match=r"`weights` in \[0, `most`\]"):
    risks.KnownMixture(1.5, weights=weights)


def test_several_risks_need_all_their_tolerances():
  generator = np.random.default_rng(0)
  fine = table(laws.mostly_zero(generator, 0.02, 400), kind="textual", metric="rouge_l")
  bad = table(laws.bernoulli(generator, 0.15, 400), kind="risk_signed", metric="f1")
  risk = risks.Risk
  both = calibrate(risks=[risk(fine, 0.1), risk(bad, 0.1)], error_rate=ERROR_RATE)
  assert not both.certified and "(risk_signed loss (f1))" in both.reason
  kept = calibrate(risks=[risk(fine, 0.1), risk(bad, 0.3)], error_rate=ERROR_RATE)
  assert kept.certified and Calibration.from_json(kept.to_json()) == kept
  assert "textual loss (rouge_l) of at most 0.1 and" in kept.guarantee
  alone = calibrate(fine, tolerance=0.1, error_rate=ERROR_RATE)
  assert kept.rows[0].p_value >= alone.rows[0].p_value
  for arguments, message in (
    (dict(risks=[fine]), "`risks` to be a list of `Risk`"),
    (dict(losses=fine, risks=[risk(fine, 0.1)]), "`risks` alone"),
    (dict(), "`losses` and `tolerance`, or `risks`"),
    (dict(risks=[risk(fine, 0.1), risk(fine.rows(range(9)), 0.1, "x")]), "of the same prompts"),
    (dict(risks=[risk(fine, 0.1)] * 2), "of different names"),
  ):
    with pytest.raises(ValueError, match=message):
      calibrate(**arguments, error_rate=ERROR_RATE)


def test_a_cost_is_tested_from_the_cheap_end_and_both_share_the_error_rate():
  generator = np.random.default_rng(0)
  losses = table(0.01 * generator.random(400), 0.1 * generator.random(400))
  costs = np.stack([np.full(400, 0.9), np.full(400, 0.4)], axis=1)
  found = calibrated(losses, risks.Cost(0.5, costs=costs))
  assert found.threshold == 0.5 and found.column("rejected").tolist() == [False, True]
  assert "at least x2 fewer" in found.guarantee
  assert [part.share for part in found.parts] == [0.5, 0.5]
  assert Calibration.from_json(found.to_json()) == found
  risky = table(losses.values[:, 0], np.full(400, 0.9))
  assert not calibrated(risky, risks.Cost(0.5, costs=costs)).certified


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: risks.Quantile(1.0), "`share` to be in"),
    (lambda: risks.Quantile(True), "`share` to be in"),
    (lambda: risks.EveryGroup(labels=["a", None]), "`labels` to be texts, got None"),
    (lambda: risks.EveryGroup(), "at least one group"),
    (lambda: risks.EarlyExits((2.0, 1.0)), "rise strictly"),
    (lambda: risks.TailMean(beta=1.0), "`beta`"),
    (lambda: risks.KnownMixture(0.5), "`most` of at least 1"),
    (lambda: risks.Cost(0.0), "`at_most`"),
    (lambda: risks.SeveralRisks(), "at least one `Risk`"),
    (lambda: risks.from_json({"name": "quantile", "share": "x"}), "`share`"),
    (lambda: risks.from_json({"name": "quantile"}), "with the fields"),
    (lambda: risks.from_json({"name": "early_exits", "limits_of_depth": 3}), "of numbers"),
  ],
)
def test_what_cannot_be_promised_is_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()


SIGNED = Support(-1.0, 1.0)


def losses_of(values, **fields):
  values = np.asarray(values, np.float64)
  return SequenceLosses(values, GRID[: values.shape[1]], **fields)


def said(promise, tolerance=0.25, rejected=(True, False)):
  rows = [types.SimpleNamespace(rejected=one) for one in rejected]
  calibration = types.SimpleNamespace(tolerance=tolerance, rows=rows)
  return promise.statement(calibration, "textual loss")


def only(promise, losses, tolerance=0.25):
  """The one part of a promise; what was planned is what is tested."""
  (part,), (test,) = promise.parts(losses, tolerance), promise.tests(tolerance, losses.support)
  assert part.test == test and part.losses.support == test.support and test.share == 1.0
  assert part.rows is None and not part.ascending
  return part


def test_the_mean_is_of_the_losses_as_they_are():
  losses = losses_of([[0.1], [0.7]], support=SIGNED)
  part = only(risks.Mean(), losses)
  assert part.losses is losses and part.test.tolerance == 0.25
  assert said(risks.Mean()) == "an expected textual loss of at most 0.25"
  assert "nothing of any single prompt" in risks.Mean().limits("prompts")


def test_a_quantile_counts_and_what_is_outside_of_the_range_is_no_number():
  inside = [0.25, 0.26, 0.0 - 1e-9, 1.0 + 1e-9]
  outside = [-0.1, 1.1, np.nan, -np.inf, np.inf]
  part = only(risks.Quantile(0.9), losses_of([[x] for x in inside + outside]))
  np.testing.assert_array_equal(part.losses.values[:, 0], [0, 1, 0, 1] + [np.nan] * 5)
  assert part.test.tolerance == 0.1 and part.losses.support == Support(binary=True)
  signed = losses_of([[-0.5], [-1.1]], support=SIGNED)
  np.testing.assert_array_equal(only(risks.Quantile(), signed).losses.values[:, 0], [0, np.nan])
  assert risks.Quantile() == risks.Quantile(0.95)
  assert said(risks.Quantile(0.9)) == (
    "a textual loss of at most 0.25 for at least 90 % of texts"
  )


def test_every_group_has_its_own_rows():
  losses = losses_of([[0.1, 0.2]] * 5)
  promise = risks.EveryGroup(labels=["b", "a", "b", "c", "a"])
  parts, tests = promise.parts(losses, 0.25), promise.tests(0.25, losses.support)
  assert [part.test.name for part in parts] == [test.name for test in tests] == ["a", "b", "c"]
  assert all(part.losses is losses and part.test.tolerance == 0.25 for part in parts)
  assert [part.rows[:, 1].tolist() for part in parts] == [
    [False, True, False, False, True],
    [True, False, True, False, False],
    [False, False, False, True, False],
  ]
  assert said(promise).endswith("of at most 0.25 in each of the groups 'a', 'b', 'c'")
  names = [f"g{number:02d}" for number in range(13)]
  assert said(risks.EveryGroup(labels=names[:12])).endswith("'g10', 'g11'")
  assert said(risks.EveryGroup(labels=names)).endswith("'g11' and 1 more")
  assert "nor of a group that is not named" in promise.limits("prompts")
  with pytest.raises(ValueError, match=r"`labels` of shape \(5,\).* got shape \(3,\)"):
    risks.EveryGroup(labels=["a", "b", "c"]).parts(losses, 0.25)


def test_early_exits_are_those_at_or_below_a_limit():
  losses = losses_of([[0.1, 0.2]] * 3)
  depths = np.array([[2.0, 1.0], [4.0, 4.1], [8.0, 3.0]])
  promise = risks.EarlyExits((2, 4.0), depths=depths)
  parts, tests = promise.parts(losses, 0.25), promise.tests(0.25, losses.support)
  assert [part.test.name for part in parts] == ["depth <= 2", "depth <= 4"]
  assert [test.name for test in tests] == ["depth <= 2", "depth <= 4"]
  assert parts[0].rows.tolist() == [[True, True], [False, False], [False, False]]
  assert parts[1].rows.tolist() == [[True, True], [True, False], [False, True]]
  assert all(part.losses is losses and part.test.tolerance == 0.25 for part in parts)
  assert said(promise).endswith("mean depth at most t, for each t of 2, 4")
  for limits in ((), (0.0, 1.0), (1.0, np.inf), (1.0, 1.0), (2.0, 1.0), (np.nan,)):
    with pytest.raises(ValueError, match="`limits_of_depth` to be finite, above 0 and"):
      risks.EarlyExits(limits)


def test_a_tail_mean_magnifies_what_is_beyond_the_start():
  promise = risks.TailMean(beta=0.75, start=0.2)
  part = only(promise, losses_of([[0.0], [0.2], [0.45], [1.0]]))
  np.testing.assert_allclose(part.losses.values[:, 0], [0.2, 0.2, 1.2, 3.4])
  assert part.losses.support == Support(0.2, 0.2 + 0.8 / 0.25) and part.test.tolerance == 0.25
  below = risks.TailMean(0.5, -0.5)
  assert only(below, losses_of([[0.1]], support=SIGNED)).losses.support == Support(-0.5, 2.5)
  assert risks.TailMean() == risks.TailMean(0.9, 0.0)
  assert said(risks.TailMean()) == (
    "a mean textual loss over the worst 10 % of texts of at most 0.25"
  )
  with pytest.raises(ValueError, match=r"`start` below the tolerance 0\.2, got 0\.2"):
    promise.tests(0.2, Support())
  with pytest.raises(ValueError, match="`start` below the tolerance"):
    risks.TailMean(0.5, -0.5).tests(0.1, Support(0.1, 1.0))
  for start in (-2.0, 1.0):
    with pytest.raises(ValueError, match=r"`start` to be in \(-2, 1\)"):
      risks.TailMean(0.5, start)
  assert risks.TailMean(0.5, -1.5).start == -1.5
  for beta in (0.0, 1.0):
    with pytest.raises(ValueError, match=r"`beta` to be in \(0, 1\)"):
      risks.TailMean(beta)


def test_a_mixture_weighs_differences_from_the_tolerance():
  promise = risks.KnownMixture(2.0, weights=[0.0, 0.5, 2.0])
  part = only(promise, losses_of([[1.0], [0.05], [1.0]]))
  np.testing.assert_allclose(part.losses.values[:, 0], [0.25, 0.15, 1.75])
  assert part.losses.support == Support(0.25 - 2.0 * 0.25, 0.25 + 2.0 * 0.75)
  signed = only(promise, losses_of([[0.0]] * 3, support=SIGNED)).losses.support
  assert signed == Support(0.25 - 2.0 * 1.25, 0.25 + 2.0 * 0.75)
  assert said(promise).endswith("that the caller's weights (at most 2) describe")
  assert risks.KnownMixture() == risks.KnownMixture(1.0)
  for most in (0.99, np.inf, np.nan):
    with pytest.raises(ValueError, match="`most` of at least 1"):
      risks.KnownMixture(most)
  for weights in ([-0.1, 1.0], [1.0, 2.1], [np.nan]):
    with pytest.raises(ValueError, match=r"`weights` in \[0, `most`\]"):
      risks.KnownMixture(2.0, weights=weights)


def two_risks(**changes):
  """Two risks of the same prompts; the second one changed."""
  first = losses_of([[0.1], [0.2]], kind="textual", metric="rouge_l", ids=("a", "b"))
  second = dataclasses.replace(first, **{"values": first.values / 2, "kind": "x", **changes})
  return first, [risks.Risk(first, 0.25), risks.Risk(second, 0.5, "answers")]


def test_several_risks_are_each_their_own_losses_of():
  first, both = two_risks()
  promise = risks.SeveralRisks(risks=both)
  parts, tests = promise.parts(first, 0.9), promise.tests(0.9, SIGNED)
  assert tuple(part.test for part in parts) == promise.tests(0.9, first.support)
  for tested in (tests,):
    assert [(one.name, one.tolerance, one.share) for one in tested] == [
      ("textual loss (rouge_l)", 0.25, 1.0),
      ("answers", 0.5, 1.0),
    ]
  assert [part.losses for part in parts] == [risk.losses for risk in both]
  assert [test.support for test in tests] == [SIGNED, SIGNED]
  assert said(promise) == (
    "expected values of textual loss (rouge_l) of at most 0.25 and answers of at most 0.5"
  )
  more = dict(values=np.zeros((3, 1)), ids=("a", "b", "c"))
  for other in (dict(ids=("a", "c")), dict(ids=None), dict(thresholds=[0.8]), more):
    first, both = two_risks(**other)
    with pytest.raises(ValueError, match=r"(same prompts|same grid), got .*answers"):
      risks.SeveralRisks(risks=both).parts(first, 0.9)
  stored = risks.SeveralRisks(names=("a",), tolerances=(0.1,))
  with pytest.raises(ValueError, match="a promise read from a file"):
    stored.parts(first, 0.9)
  for names, tolerances in (((), ()), (("a",), ()), (("a",), (0.1, 0.2))):
    with pytest.raises(ValueError, match="at least one `Risk`"):
      risks.SeveralRisks(names, tolerances)


def test_a_cost_has_its_share_of_the_error_rate():
  losses = losses_of([[0.1, 0.2]] * 2, support=SIGNED)
  costs = np.array([[0.9, 0.4], [0.7, 0.2]])
  promise = risks.Cost(0.8, share=0.25, costs=costs)
  risk, cost = promise.parts(losses, 0.3)
  assert (risk.test, cost.test) == promise.tests(0.3, SIGNED)
  assert not risk.ascending and cost.ascending
  assert risk.losses is losses and cost.losses.support == Support()
  np.testing.assert_array_equal(cost.losses.values, costs)
  assert promise.tests(0.3, SIGNED) == (
    risks.Test("risk", 0.3, SIGNED, 0.75),
    risks.Test("cost", 0.8, Support(), 0.25),
  )
  assert risks.Cost() == risks.Cost(0.5, 0.5, "decoder layers a token")
  assert said(promise).endswith(
    "of at most 0.25, and needs at most 0.8 of the decoder layers a token of full depth"
    " (at least x1.25 fewer), on average over texts"
  )
  for fields in ({"at_most": 1.0}, {"at_most": 0.0}, {"share": 1.0}, {"share": 0.0}):
    with pytest.raises(ValueError, match=r"` to be in \(0, 1\)"):
      risks.Cost(**fields)


def chosen(**changes):
  fields = dict(names=("texts",), tolerances=(0.1,), configurations=("a", "b", "c"))
  return risks.Configurations(**{**fields, "costs": (3.0, 2.0, 2.0), **changes})


def test_the_cheapest_configuration_is_served_and_of_equal_ones_the_safest():
  promise = chosen()
  assert promise.place([True, True, True]) == promise.place([False, True, True]) == 1
  assert promise.place([True, False, True]) == 2 and promise.place([True, False, False]) == 0
  assert promise.place([False] * 3) is None
  means = "expected values of texts of at most 0.1"
  assert said(promise, rejected=(True, False, False)) == f"(a) {means}"
  assert said(promise, rejected=(False,) * 3) == means
  promise.check_rows([0.1, 0.9, 0.5])
  with pytest.raises(ValueError, match="Expected 3 `rows`, one a configuration, got 2"):
    promise.check_rows([0.9, 0.5])


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"costs": (1.0, 2.0)}, "a cost each, got 3 and 2 costs"),
    ({"configurations": (), "costs": ()}, "a cost each, got 0 and 0 costs"),
    ({"configurations": ("a", 2, "c")}, "of texts of at most 500 .*, got 2; "),
    ({"costs": (1.0, np.inf, 2.0)}, "finite `costs`"),
    ({"costs": (1.0, np.nan, 2.0)}, "finite `costs`"),
  ],
)
def test_configurations_that_are_none_are_refused(change, message):
  with pytest.raises(ValueError, match=message):
    chosen(**change)


def test_of_certified_thresholds_the_lowest_is_served():
  place = risks.Mean().place
  assert place([True, True, False]) == 1 and place([False, False, True]) == 2
  assert place([False, False]) is None
  risks.Mean().check_rows([0.9, 0.5])
  for rows in ([0.5, 0.9], [0.9, 0.9]):
    with pytest.raises(ValueError, match="strictly descending thresholds"):
      risks.Mean().check_rows(rows)


def test_data_of_a_promise_have_a_row_a_prompt():
  losses = losses_of([[0.1, 0.2]] * 3)
  assert risks.rows_of([1, 2, 3], losses, "labels", table=False).tolist() == [1, 2, 3]
  assert risks.rows_of(np.ones((3, 2)), losses, "depths", table=True).shape == (3, 2)
  for values, rows in ((None, False), ([1, 2], False), (np.ones(3), True)):
    with pytest.raises(ValueError, match="a row a prompt of `losses`, got"):
      risks.rows_of(values, losses, "labels", table=rows)


@pytest.mark.parametrize("value", [0, 1, 0.0, 1.0, -1, True, False, "0.5", None, np.nan])
def test_numbers_lie_strictly_between_the_ends(value):
  assert risks.in_range("x", np.float32(0.5), 0.0, 1.0) == 0.5
  assert risks.in_range("x", 1, 0.0, 2.0) == 1.0
  with pytest.raises(ValueError, match=r"Expected `x` to be in \(0, 1\)"):
    risks.in_range("x", value, 0.0, 1.0)


def test_labels_are_texts_and_each_is_named_once():
  assert risks._names_of(["b", "a", "b"]) == ("a", "b")
  for labels in (["a", ""], ["a", 3], [None, "a"]):
    with pytest.raises(ValueError, match="`labels` to be texts"):
      risks._names_of(labels)


@pytest.mark.parametrize("value", [{"name": "luck"}, {"name": 3}, {}, None, ["mean"]])
def test_a_promise_of_no_known_name_is_refused(value):
  with pytest.raises(ValueError, match=r"`promise` to name one of \['configurations', 'cost'"):
    risks.from_json(value)


def test_stored_promises_have_their_fields_and_no_others():
  stored = risks.Cost(0.5, costs=np.ones((2, 2))).to_json()
  assert stored == {
    "name": "cost", "at_most": 0.5, "share": 0.5, "unit": "decoder layers a token"
  }  # fmt: skip
  assert risks.from_json(stored) == risks.Cost(0.5)
  assert risks.EarlyExits((2.0,)).to_json()["limits_of_depth"] == [2.0]
  for change in ({"costs": [[1.0]]}, {"more": 1}):
    with pytest.raises(ValueError, match="with the fields"):
      risks.from_json({**stored, **change})


def test_rows_of_calibration_prompts_are_neither_shown_nor_compared():
  """A promise that was read from a file has none, and is the same promise."""
  _, both = two_risks()
  names = ("textual loss (rouge_l)", "answers")
  for promise, bare in (
    (risks.EveryGroup(labels=["a", "b"]), risks.EveryGroup(("a", "b"))),
    (risks.EarlyExits((2.0,), depths=np.ones((2, 1))), risks.EarlyExits((2.0,))),
    (risks.KnownMixture(2.0, weights=[1.0]), risks.KnownMixture(2.0)),
    (risks.SeveralRisks(risks=both), risks.SeveralRisks(names, (0.25, 0.5))),
    (risks.Cost(0.5, costs=np.ones((2, 1))), risks.Cost(0.5)),
  ):
    assert promise == bare and repr(promise) == repr(bare)


def test_groups_calibrated_one_by_one_share_the_error_rate():
  labels = ["a", "b", "c"] * 60
  losses = losses_of(np.zeros((180, 1)), ids=tuple(f"p{row}" for row in range(180)))
  found = each_group(losses, labels, tolerance=0.2, error_rate=0.375)
  assert list(found) == ["a", "b", "c"]
  for place, name in enumerate("abc"):
    rows = losses.rows(np.arange(place, 180, 3))
    assert found[name] == calibrate(rows, tolerance=0.2, error_rate=0.125)


# Three clusters of 1, 2 and 3 prompts, and what each promise counts of a prompt (nan: nothing).
_CLUSTERS = ("a", "b", "b", "c", "c", "c")
_LOSSES = np.array([0.9, 0.1, 0.3, 0.0, 0.2, 0.6])
_DEPTHS = np.array([2.0, 2.0, 8.0, 8.0, 2.0, 2.0])
_EARLY = np.where(_DEPTHS <= 3.0, _LOSSES, np.nan)
_LABELS = np.array(["x", "y", "x", "x", "x", "y"])
_COUNTED = {
  "mean": (risks.Mean(), [_LOSSES]),
  "quantile": (risks.Quantile(0.5), [_LOSSES > 0.25]),
  "tail_mean": (risks.TailMean(0.5, 0.1), [0.1 + np.maximum(0.0, _LOSSES - 0.1) / 0.5]),
  "every_group": (
    risks.EveryGroup(labels=_LABELS.tolist()),
    [np.where(label == _LABELS, _LOSSES, np.nan) for label in "xy"],
  ),
  "early_exits": (risks.EarlyExits((3.0,), depths=_DEPTHS[:, None]), [_EARLY]),
  "cost": (risks.Cost(0.5, costs=_DEPTHS[:, None] / 10.0), [_LOSSES, _DEPTHS / 10.0]),
  "known_mixture": (
    risks.KnownMixture(2.0, weights=np.array([2.0, 0, 1, 1, 0, 2])),
    [0.25 + np.array([2.0, 0, 1, 1, 0, 2]) * (_LOSSES - 0.25)],
  ),
  "several_risks": (None, [_LOSSES, 1.0 - _LOSSES]),
}


def clustered(name, times=1, worth=1.0):
  """The calibration of one promise on `times` copies of the three clusters."""
  promise, counted = _COUNTED[name]
  rows = np.tile(np.arange(6), times)
  groups = tuple(f"{_CLUSTERS[row]}{i // 6}" for i, row in enumerate(rows))
  losses = SequenceLosses(worth * _LOSSES[rows, None], GRID[:1], groups=groups)
  options = dict(error_rate=0.05, testing_procedure="fixed_sequence")
  if promise is None:
    other = dataclasses.replace(losses, values=worth * (1.0 - _LOSSES[rows, None]))
    several = [risks.Risk(losses, 0.25, "one"), risks.Risk(other, 0.25, "other")]
    return calibrate(risks=several, **options), counted
  data = {
    field.name: np.asarray(value)[rows]
    for field in dataclasses.fields(promise)
    if not field.compare and (value := getattr(promise, field.name)) is not None
  }
  if "labels" in data:
    data = {"labels": data["labels"].tolist()}
  if "costs" in data:
    data = {"costs": worth * data["costs"]}
  promise = dataclasses.replace(promise, **data)
  return calibrate(losses, tolerance=0.25, promise=promise, **options), counted


@pytest.mark.parametrize("name", _COUNTED)
def test_what_is_tested_of_clusters_is_what_the_sentence_says(name):
  """Every cluster that has such prompts counts once, with the mean of what they count."""
  found, counted = clustered(name)
  parts = [part.means[0] for part in found.parts] or [found.rows[0].mean]
  expected = []
  for values in counted:
    means = [
      np.nanmean(rows)
      for cluster in "abc"
      if np.isfinite(rows := np.where(np.array(_CLUSTERS) == cluster, values, np.nan)).any()
    ]
    expected.append(np.mean(means))
  np.testing.assert_allclose(parts, expected, rtol=1e-12)
  assert found.clusters and found.num_examples == 3


@pytest.mark.parametrize("name", _COUNTED)
def test_a_promise_over_clusters_speaks_of_clusters(name, tmp_path):
  found, _ = clustered(name, times=40, worth=0.0)
  assert found.certified and found.promise.name == name
  found.save(tmp_path / "calibration.json")
  for one in (found, Calibration.load(tmp_path / "calibration.json")):
    # The first sentence stands alone in tables and notebooks.
    assert "over independent draws of the 120 calibration clusters of prompts" in one.promised
    assert "in the average over clusters, of which each counts once" in one.promised
    assert "prompts that are counted one by one" in one.guarantee
    assert "clusters of prompts" in found.promise.limits(one.unit)
    assert "on 120 clusters of prompts" in repr(one)
  alone = dataclasses.replace(found, clusters=False)
  assert (
    "cluster" not in alone.guarantee
    and "over independent draws of the 120 calibration prompts" in (alone.promised)
  )


@pytest.mark.parametrize("promise", [risks.Mean(), risks.Quantile(0.75)])
def test_unequal_clusters_keep_the_promise_over_clusters_at_its_boundary(promise):
  """One cluster in four is bad and large; counted one by one 91 % of prompts lose 1."""
  generator = np.random.default_rng(0)
  wrong = 0
  for _ in range(200):
    bad = generator.random(60) < 0.2501
    groups = np.repeat(np.arange(60), np.where(bad, 30, 1))
    values = bad[groups].astype(np.float64)[:, None]
    rates = dict(tolerance=0.25, error_rate=0.1, promise=promise)
    wrong += calibrate(values, GRID[:1], groups=groups.tolist(), **rates).certified
  assert wrong <= 34  # 10 % of 200; more has probability 0.0008
