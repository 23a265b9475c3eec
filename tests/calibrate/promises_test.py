"""What can be promised besides the mean: each at its boundary, each with its pitfall."""

import json

import numpy as np
import pytest
from scipy import stats

from calm.calibrate import Calibration, SequenceLosses, Support, calibrate, planning, promises
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
  return table(np.where(bad, 0.9, 0.2 * generator.random(size))), promises.Quantile(0.85)


def every_group(generator, size):
  """One of four groups is at the boundary, the others are far from it."""
  labels = [f"g{row % 4}" for row in range(size)]
  means = np.where(np.arange(size) % 4 == 2, 0.2001, 0.02)
  values = (generator.random(size) < means).astype(float)
  return table(values, support=Support(binary=True)), promises.EveryGroup(labels=labels)


def early(generator, size):
  """Texts that leave early lose 0.2 on average; the others nothing."""
  depth = np.where(generator.random(size) < 0.6, 2.0, 8.0)
  values = np.where(depth < 4, (generator.random(size) < 0.2001).astype(float), 0.0)
  return table(values), promises.EarlyExits((4.0,), depths=depth[:, None])


def tail(generator, size):
  """A mean of 0.1 over all is 0.2 over the worst half."""
  values = np.where(
    generator.random(size) < 0.5, 0.0, 0.2001 + generator.uniform(-0.1, 0.1, size)
  )
  return table(values), promises.TailMean(beta=0.5, start=0.02)


def mixture(generator, size):
  """Tasks A and B in halves; served 1 : 3, where B loses 0.25 and A 0.05."""
  second = generator.random(size) < 0.5
  values = (generator.random(size) < np.where(second, 0.2501, 0.0501)).astype(float)
  return table(values), promises.KnownMixture(2.0, weights=np.where(second, 1.5, 0.5))


def cost(generator, size):
  """The risk is kept, the cost just not."""
  costs = 0.6001 + generator.uniform(-0.3, 0.3, (size, 1))
  return table(0.01 * generator.random(size)), promises.Cost(0.6, costs=costs)


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
  if isinstance(promise, promises.Cost):
    promise = promises.Cost(0.8, costs=promise.costs)
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
  assert not calibrated(losses, promises.Quantile(0.95)).certified
  assert calibrated(losses, promises.Quantile(0.8)).certified


def test_a_quantile_counts_what_is_above_the_tolerance_exactly():
  losses = table(np.full(100, 0.3))
  assert calibrated(losses, promises.Quantile(0.9), 0.3).certified
  above = table(np.full(100, 1 - 0.7))  # 0.30000000000000004
  assert not calibrated(above, promises.Quantile(0.9), 0.3).certified
  values = np.zeros((100, 1))
  values[3] = np.nan
  found = calibrated(SequenceLosses(values, [0.5]), promises.Quantile(0.9))
  assert not found.certified and "row 3" in found.reason


@pytest.mark.parametrize(("share", "size"), [(0.9, 29), (0.95, 59), (0.99, 299)])
def test_quantiles_need_as_many_prompts_as_planned(share, size):
  promise = promises.Quantile(share)
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
  found = calibrated(losses, promises.EveryGroup(labels=labels))
  assert not found.certified and "(fr)" in found.reason
  sizes = planning.promise_size(found.promise, 0.2, ERROR_RATE)
  assert set(sizes) == {"en", "fr"} and sizes["fr"] == planning.method_size(
    "auto", 0.2, ERROR_RATE
  )
  few = ["rare" if row < 5 else "en" for row in range(400)]
  assert (
    "rare: expected at least 11 prompts"
    in calibrated(table(np.zeros(400)), promises.EveryGroup(labels=few)).reason
  )
  every = promises.each_group(losses, labels, tolerance=0.2, error_rate=ERROR_RATE)
  assert every["en"].certified and not every["fr"].certified
  assert every["en"].error_rate == ERROR_RATE / 2


def test_pitfall_texts_that_never_leave_hide_those_that_do():
  depth = np.where(np.arange(400) % 4 == 0, 2.0, 8.0)
  losses = table(np.where(depth < 4, np.arange(400) % 8 == 0, 0.0))
  assert calibrated(losses).certified  # an eighth of all, half of those that left
  promise = promises.EarlyExits((4.0, 8.0), depths=depth[:, None])
  assert not calibrated(losses, promise).certified
  nobody = promises.EarlyExits((1.0,), depths=depth[:, None])
  assert not calibrated(table(np.zeros(400)), nobody).certified
  assert calibrated(table(np.zeros(400)), promise).parts[0].num_examples == (100,)


def test_pitfall_a_mean_says_nothing_of_the_tail():
  losses = table((np.arange(400) % 10 == 0).astype(float))
  assert calibrated(losses).certified
  assert not calibrated(losses, promises.TailMean(0.9, 0.1)).certified
  with pytest.raises(ValueError, match="`start` below the tolerance"):
    calibrated(losses, promises.TailMean(0.9, 0.2))
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
  assert not calibrated(losses, promises.KnownMixture(2.0, weights=weights), 0.25).certified
  flat = calibrated(losses, promises.KnownMixture(1.0, weights=np.ones(600)), 0.25)
  np.testing.assert_allclose(flat.column("mean"), losses.values.mean(axis=0))
  with pytest.raises(ValueError, match=r"`weights` in \[0, `most`\]"):
    promises.KnownMixture(1.5, weights=weights)


def test_several_risks_need_all_their_tolerances():
  generator = np.random.default_rng(0)
  fine = table(laws.mostly_zero(generator, 0.02, 400), kind="textual", metric="rouge_l")
  bad = table(laws.bernoulli(generator, 0.15, 400), kind="risk_signed", metric="f1")
  risk = promises.Risk
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
  found = calibrated(losses, promises.Cost(0.5, costs=costs))
  assert found.threshold == 0.5 and found.column("rejected").tolist() == [False, True]
  assert "at least x2 fewer" in found.guarantee
  assert [part.share for part in found.parts] == [0.5, 0.5]
  assert Calibration.from_json(found.to_json()) == found
  risky = table(losses.values[:, 0], np.full(400, 0.9))
  assert not calibrated(risky, promises.Cost(0.5, costs=costs)).certified


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: promises.Quantile(1.0), "`share` to be in"),
    (lambda: promises.Quantile(True), "`share` to be in"),
    (lambda: promises.EveryGroup(labels=["a", None]), "`labels` to be texts, got None"),
    (lambda: promises.EveryGroup(), "at least one group"),
    (lambda: promises.EarlyExits((2.0, 1.0)), "rise strictly"),
    (lambda: promises.TailMean(beta=1.0), "`beta`"),
    (lambda: promises.KnownMixture(0.5), "`most` of at least 1"),
    (lambda: promises.Cost(0.0), "`at_most`"),
    (lambda: promises.SeveralRisks(), "at least one `Risk`"),
    (lambda: promises.from_json({"name": "quantile", "share": "x"}), "`share`"),
    (lambda: promises.from_json({"name": "quantile"}), "with the fields"),
    (lambda: promises.from_json({"name": "early_exits", "limits_of_depth": 3}), "of numbers"),
  ],
)
def test_what_cannot_be_promised_is_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()
