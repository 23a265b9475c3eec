"""What each promise tests, to the last number, and the sentence that says it."""

import dataclasses
import types

import numpy as np
import pytest

from calm.calibrate import Calibration, SequenceLosses, Support, calibrate, promises
from calm.calibrate.promises import promise as base

GRID = np.array([0.9, 0.5])
SIGNED = Support(-1.0, 1.0)


def table(values, **fields):
  values = np.asarray(values, np.float64)
  return SequenceLosses(values, GRID[: values.shape[1]], **fields)


def said(promise, tolerance=0.25, rejected=(True, False)):
  rows = [types.SimpleNamespace(rejected=one) for one in rejected]
  calibration = types.SimpleNamespace(tolerance=tolerance, rows=rows)
  return promise.statement(calibration, "textual loss")


def only(promise, losses, tolerance=0.25):
  """The one part of a promise; what was planned is what is tested."""
  (part,), (test,) = promise.parts(losses, tolerance), promise.tests(tolerance, losses.support)
  assert (part.name, part.tolerance, part.share) == (test.name, test.tolerance, test.share)
  assert part.losses.support == test.support and part.share == 1.0 and not part.ascending
  assert part.rows is None
  return part


def test_the_mean_is_of_the_losses_as_they_are():
  losses = table([[0.1], [0.7]], support=SIGNED)
  part = only(promises.Mean(), losses)
  assert part.losses is losses and part.tolerance == 0.25
  assert said(promises.Mean()) == "an expected textual loss of at most 0.25"
  assert "nothing of any single prompt" in promises.Mean().limits("prompts")


def test_a_quantile_counts_and_what_is_outside_of_the_range_is_no_number():
  inside = [0.25, 0.26, 0.0 - 1e-9, 1.0 + 1e-9]
  outside = [-0.1, 1.1, np.nan, -np.inf, np.inf]
  part = only(promises.Quantile(0.9), table([[x] for x in inside + outside]))
  np.testing.assert_array_equal(part.losses.values[:, 0], [0, 1, 0, 1] + [np.nan] * 5)
  assert part.tolerance == 0.1 and part.losses.support == Support(binary=True)
  signed = table([[-0.5], [-1.1]], support=SIGNED)
  np.testing.assert_array_equal(
    only(promises.Quantile(), signed).losses.values[:, 0], [0, np.nan]
  )
  assert promises.Quantile() == promises.Quantile(0.95)
  assert said(promises.Quantile(0.9)) == (
    "a textual loss of at most 0.25 for at least 90 % of texts"
  )


def test_every_group_has_its_own_rows():
  losses = table([[0.1, 0.2]] * 5)
  promise = promises.EveryGroup(labels=["b", "a", "b", "c", "a"])
  parts, tests = promise.parts(losses, 0.25), promise.tests(0.25, losses.support)
  assert [part.name for part in parts] == [test.name for test in tests] == ["a", "b", "c"]
  assert all(part.losses is losses and part.tolerance == 0.25 for part in parts)
  assert [part.rows[:, 1].tolist() for part in parts] == [
    [False, True, False, False, True],
    [True, False, True, False, False],
    [False, False, False, True, False],
  ]
  assert said(promise).endswith("of at most 0.25 in each of the groups 'a', 'b', 'c'")
  names = [f"g{number:02d}" for number in range(13)]
  assert said(promises.EveryGroup(labels=names[:12])).endswith("'g10', 'g11'")
  assert said(promises.EveryGroup(labels=names)).endswith("'g11' and 1 more")
  assert "nor of a group that is not named" in promise.limits("prompts")
  with pytest.raises(ValueError, match=r"`labels` of shape \(5,\).* got shape \(3,\)"):
    promises.EveryGroup(labels=["a", "b", "c"]).parts(losses, 0.25)


def test_early_exits_are_those_at_or_below_a_limit():
  losses = table([[0.1, 0.2]] * 3)
  depths = np.array([[2.0, 1.0], [4.0, 4.1], [8.0, 3.0]])
  promise = promises.EarlyExits((2, 4.0), depths=depths)
  parts, tests = promise.parts(losses, 0.25), promise.tests(0.25, losses.support)
  assert [part.name for part in parts] == ["depth <= 2", "depth <= 4"]
  assert [test.name for test in tests] == ["depth <= 2", "depth <= 4"]
  assert parts[0].rows.tolist() == [[True, True], [False, False], [False, False]]
  assert parts[1].rows.tolist() == [[True, True], [True, False], [False, True]]
  assert all(part.losses is losses and part.tolerance == 0.25 for part in parts)
  assert said(promise).endswith("mean depth at most t, for each t of 2, 4")
  for limits in ((), (0.0, 1.0), (1.0, np.inf), (1.0, 1.0), (2.0, 1.0), (np.nan,)):
    with pytest.raises(ValueError, match="`limits_of_depth` to be finite, above 0 and"):
      promises.EarlyExits(limits)


def test_a_tail_mean_magnifies_what_is_beyond_the_start():
  promise = promises.TailMean(beta=0.75, start=0.2)
  part = only(promise, table([[0.0], [0.2], [0.45], [1.0]]))
  np.testing.assert_allclose(part.losses.values[:, 0], [0.2, 0.2, 1.2, 3.4])
  assert part.losses.support == Support(0.2, 0.2 + 0.8 / 0.25) and part.tolerance == 0.25
  below = promises.TailMean(0.5, -0.5)
  assert only(below, table([[0.1]], support=SIGNED)).losses.support == Support(-0.5, 2.5)
  assert promises.TailMean() == promises.TailMean(0.9, 0.0)
  assert said(promises.TailMean()) == (
    "a mean textual loss over the worst 10 % of texts of at most 0.25"
  )
  with pytest.raises(ValueError, match=r"`start` below the tolerance 0\.2, got 0\.2"):
    promise.tests(0.2, Support())
  with pytest.raises(ValueError, match="`start` below the tolerance"):
    promises.TailMean(0.5, -0.5).tests(0.1, Support(0.1, 1.0))
  for start in (-2.0, 1.0):
    with pytest.raises(ValueError, match=r"`start` to be in \(-2, 1\)"):
      promises.TailMean(0.5, start)
  assert promises.TailMean(0.5, -1.5).start == -1.5
  for beta in (0.0, 1.0):
    with pytest.raises(ValueError, match=r"`beta` to be in \(0, 1\)"):
      promises.TailMean(beta)


def test_a_mixture_weighs_differences_from_the_tolerance():
  promise = promises.KnownMixture(2.0, weights=[0.0, 0.5, 2.0])
  part = only(promise, table([[1.0], [0.05], [1.0]]))
  np.testing.assert_allclose(part.losses.values[:, 0], [0.25, 0.15, 1.75])
  assert part.losses.support == Support(0.25 - 2.0 * 0.25, 0.25 + 2.0 * 0.75)
  signed = only(promise, table([[0.0]] * 3, support=SIGNED)).losses.support
  assert signed == Support(0.25 - 2.0 * 1.25, 0.25 + 2.0 * 0.75)
  assert said(promise).endswith("that the caller's weights (at most 2) describe")
  assert promises.KnownMixture() == promises.KnownMixture(1.0)
  for most in (0.99, np.inf, np.nan):
    with pytest.raises(ValueError, match="`most` of at least 1"):
      promises.KnownMixture(most)
  for weights in ([-0.1, 1.0], [1.0, 2.1], [np.nan]):
    with pytest.raises(ValueError, match=r"`weights` in \[0, `most`\]"):
      promises.KnownMixture(2.0, weights=weights)


def risks(**changes):
  """Two risks of the same prompts; the second one changed."""
  first = table([[0.1], [0.2]], kind="textual", metric="rouge_l", ids=("a", "b"))
  second = dataclasses.replace(first, **{"values": first.values / 2, "kind": "x", **changes})
  return first, [promises.Risk(first, 0.25), promises.Risk(second, 0.5, "answers")]


def test_several_risks_are_each_their_own_table():
  first, both = risks()
  promise = promises.SeveralRisks(risks=both)
  parts, tests = promise.parts(first, 0.9), promise.tests(0.9, SIGNED)
  for tested in (parts, tests):
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
    first, both = risks(**other)
    with pytest.raises(ValueError, match=r"(same prompts|same grid), got .*answers"):
      promises.SeveralRisks(risks=both).parts(first, 0.9)
  stored = promises.SeveralRisks(names=("a",), tolerances=(0.1,))
  with pytest.raises(ValueError, match="a promise read from a file"):
    stored.parts(first, 0.9)
  for names, tolerances in (((), ()), (("a",), ()), (("a",), (0.1, 0.2))):
    with pytest.raises(ValueError, match="at least one `Risk`"):
      promises.SeveralRisks(names, tolerances)


def test_a_cost_has_its_share_of_the_error_rate():
  losses = table([[0.1, 0.2]] * 2, support=SIGNED)
  costs = np.array([[0.9, 0.4], [0.7, 0.2]])
  promise = promises.Cost(0.8, share=0.25, costs=costs)
  risk, cost = promise.parts(losses, 0.3)
  assert (risk.name, risk.tolerance, risk.share, risk.ascending) == ("risk", 0.3, 0.75, False)
  assert (cost.name, cost.tolerance, cost.share, cost.ascending) == ("cost", 0.8, 0.25, True)
  assert risk.losses is losses and cost.losses.support == Support()
  np.testing.assert_array_equal(cost.losses.values, costs)
  assert promise.tests(0.3, SIGNED) == (
    promises.Test("risk", 0.3, SIGNED, 0.75),
    promises.Test("cost", 0.8, Support(), 0.25),
  )
  assert promises.Cost() == promises.Cost(0.5, 0.5, "decoder layers a token")
  assert said(promise).endswith(
    "of at most 0.25, and needs at most 0.8 of the decoder layers a token of full depth"
    " (at least x1.25 fewer), on average over texts"
  )
  for fields in ({"at_most": 1.0}, {"at_most": 0.0}, {"share": 1.0}, {"share": 0.0}):
    with pytest.raises(ValueError, match=r"` to be in \(0, 1\)"):
      promises.Cost(**fields)


def chosen(**changes):
  fields = dict(names=("texts",), tolerances=(0.1,), configurations=("a", "b", "c"))
  return promises.Configurations(**{**fields, "costs": (3.0, 2.0, 2.0), **changes})


def test_the_cheapest_configuration_is_served_and_of_equal_ones_the_safest():
  promise = chosen()
  assert promise.place([True, True, True]) == promise.place([False, True, True]) == 1
  assert promise.place([True, False, True]) == 2 and promise.place([True, False, False]) == 0
  assert promise.place([False] * 3) is None
  assert promise.reason([False] * 3) == "Nothing is certified: the safest, a, already fails."
  assert promise.reason([True, True, False]) == (
    "b is the cheapest (2) of 2 certified among 3 configurations that no other beats."
  )
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
  place = promises.Mean().place
  assert place([True, True, False]) == 1 and place([False, False, True]) == 2
  assert place([False, False]) is None
  promises.Mean().check_rows([0.9, 0.5])
  for rows in ([0.5, 0.9], [0.9, 0.9]):
    with pytest.raises(ValueError, match="strictly descending thresholds"):
      promises.Mean().check_rows(rows)


def test_data_of_a_promise_have_a_row_a_prompt():
  losses = table([[0.1, 0.2]] * 3)
  assert base.rows_of([1, 2, 3], losses, "labels", table=False).tolist() == [1, 2, 3]
  assert base.rows_of(np.ones((3, 2)), losses, "depths", table=True).shape == (3, 2)
  for values, rows in ((None, False), ([1, 2], False), (np.ones(3), True)):
    with pytest.raises(ValueError, match="a row a prompt of `losses`, got"):
      base.rows_of(values, losses, "labels", table=rows)


@pytest.mark.parametrize("value", [0, 1, 0.0, 1.0, -1, True, False, "0.5", None, np.nan])
def test_numbers_lie_strictly_between_the_ends(value):
  assert base.in_range("x", np.float32(0.5), 0.0, 1.0) == 0.5
  assert base.in_range("x", 1, 0.0, 2.0) == 1.0
  with pytest.raises(ValueError, match=r"Expected `x` to be in \(0, 1\)"):
    base.in_range("x", value, 0.0, 1.0)


def test_labels_are_texts_and_each_is_named_once():
  assert base.names_of(["b", "a", "b"]) == ("a", "b")
  for labels in (["a", ""], ["a", 3], [None, "a"]):
    with pytest.raises(ValueError, match="`labels` to be texts"):
      base.names_of(labels)


@pytest.mark.parametrize("value", [{"name": "luck"}, {"name": 3}, {}, None, ["mean"]])
def test_a_promise_of_no_known_name_is_refused(value):
  with pytest.raises(ValueError, match=r"`promise` to name one of \['configurations', 'cost'"):
    promises.from_json(value)


def test_stored_promises_have_their_fields_and_no_others():
  stored = promises.Cost(0.5, costs=np.ones((2, 2))).to_json()
  assert stored == {
    "name": "cost", "at_most": 0.5, "share": 0.5, "unit": "decoder layers a token"
  }  # fmt: skip
  assert promises.from_json(stored) == promises.Cost(0.5)
  assert promises.EarlyExits((2.0,)).to_json()["limits_of_depth"] == [2.0]
  for change in ({"costs": [[1.0]]}, {"more": 1}):
    with pytest.raises(ValueError, match="with the fields"):
      promises.from_json({**stored, **change})


def test_rows_of_calibration_prompts_are_neither_shown_nor_compared():
  """A promise that was read from a file has none, and is the same promise."""
  _, both = risks()
  names = ("textual loss (rouge_l)", "answers")
  for promise, bare in (
    (promises.EveryGroup(labels=["a", "b"]), promises.EveryGroup(("a", "b"))),
    (promises.EarlyExits((2.0,), depths=np.ones((2, 1))), promises.EarlyExits((2.0,))),
    (promises.KnownMixture(2.0, weights=[1.0]), promises.KnownMixture(2.0)),
    (promises.SeveralRisks(risks=both), promises.SeveralRisks(names, (0.25, 0.5))),
    (promises.Cost(0.5, costs=np.ones((2, 1))), promises.Cost(0.5)),
  ):
    assert promise == bare and repr(promise) == repr(bare)


def test_a_test_of_a_promise_has_the_whole_error_rate_unless_it_says_otherwise():
  assert promises.Test("", 0.1, Support()).share == 1.0
  losses = table([[0.1]])
  part = promises.Part("", losses, 0.1)
  assert part.share == 1.0 and not part.ascending and part.rows is None


def test_groups_calibrated_one_by_one_share_the_error_rate():
  labels = ["a", "b", "c"] * 60
  losses = table(np.zeros((180, 1)), ids=tuple(f"p{row}" for row in range(180)))
  found = promises.each_group(losses, labels, tolerance=0.2, error_rate=0.375)
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
  "mean": (promises.Mean(), [_LOSSES]),
  "quantile": (promises.Quantile(0.5), [_LOSSES > 0.25]),
  "tail_mean": (promises.TailMean(0.5, 0.1), [0.1 + np.maximum(0.0, _LOSSES - 0.1) / 0.5]),
  "every_group": (
    promises.EveryGroup(labels=_LABELS.tolist()),
    [np.where(label == _LABELS, _LOSSES, np.nan) for label in "xy"],
  ),
  "early_exits": (promises.EarlyExits((3.0,), depths=_DEPTHS[:, None]), [_EARLY]),
  "cost": (promises.Cost(0.5, costs=_DEPTHS[:, None] / 10.0), [_LOSSES, _DEPTHS / 10.0]),
  "known_mixture": (
    promises.KnownMixture(2.0, weights=np.array([2.0, 0, 1, 1, 0, 2])),
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
    risks = [promises.Risk(losses, 0.25, "one"), promises.Risk(other, 0.25, "other")]
    return calibrate(risks=risks, **options), counted
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


@pytest.mark.parametrize("promise", [promises.Mean(), promises.Quantile(0.75)])
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
