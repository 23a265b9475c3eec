import dataclasses
import json
import math

import numpy as np
import pytest

from calm.calibrate import (
  NEVER_EXIT,
  Calibration,
  Online,
  SequenceLosses,
  Support,
  calibrate,
  clusters,
  p_values,
  risks,
  testing,
)
from tests.calibrate import laws

GRID = np.array([0.9, 0.7, 0.5, 0.3])
RATES = dict(tolerance=0.1, error_rate=0.05)


def sample(count=300, means=(0.01, 0.03, 0.06, 0.2), seed=0, **fields):
  generator = np.random.default_rng(seed)
  values = np.stack(
    [laws.mostly_zero(generator, mean, count) for mean in means], axis=1
  )
  return SequenceLosses(values, GRID[: len(means)], **fields)


def test_paper_is_clipping_hoeffding_bentkus_and_fixed_sequence():
  values = sample().values - 0.02
  losses = SequenceLosses(
    values, GRID, support=Support(lower=-1.0), kind="risk_signed"
  )
  found = calibrate(losses, **RATES, method="paper")
  clipped = np.maximum(values, 0.0)
  p = p_values.hoeffding_bentkus(clipped.sum(axis=0), 300, 0.1)
  np.testing.assert_allclose(found.column("p_value"), p, rtol=1e-12)
  np.testing.assert_allclose(found.column("mean"), clipped.mean(axis=0))
  adjusted, visited = testing.fixed_sequence(p, 0.05)
  rejected = adjusted <= 0.05
  np.testing.assert_array_equal(found.column("rejected"), rejected)
  assert (
    found.visited == (*visited,) and found.threshold == GRID[rejected].min()
  )
  assert found.method == "paper" and found.support == Support()


def test_auto_goes_by_the_declared_support_never_by_values():
  zeros = np.zeros((100, 4))
  for procedure, bets in (
    ("fixed_sequence", "betting_fixed_level"),
    ("holm", "betting"),
    ("fallback", "betting"),
  ):
    options = {**RATES, "testing_procedure": procedure}
    assert calibrate(zeros, GRID, **options).method == bets
    assert (
      calibrate(zeros, GRID, **options, support=Support(binary=True)).method
      == "binomial"
    )
    assert (
      calibrate(zeros, GRID, **options, support=Support(lower=-1.0)).method
      == bets
    )


def test_a_randomised_test_says_so_and_repeats_itself():
  losses = sample(ids=tuple(f"id-{i}" for i in range(300)))
  found = calibrate(losses, **RATES)
  plain = calibrate(losses, **RATES, randomized=False)
  assert (found.method, plain.method) == (
    "betting_randomized",
    "betting_fixed_level",
  )
  assert (
    f"(seed {found.seed})" in found.guarantee
    and "randomised" not in plain.guarantee
  )
  assert calibrate(losses, **RATES) == found and found.seed == plain.seed
  assert np.all(found.column("p_value") <= plain.column("p_value"))
  assert Calibration.from_json(found.to_json()) == found


def test_rows_of_few_kinds_draw_no_uniform():
  """All their contents give is a function of their counts."""
  options = {**RATES, "support": Support()}
  for values in (np.zeros((25, 4)), np.round(sample().values)):
    found = calibrate(values, GRID, **options)
    assert found.method == "betting_fixed_level"
    explicit = calibrate(values, GRID, **options, method="betting_randomized")
    np.testing.assert_array_equal(
      explicit.column("p_value"), found.column("p_value")
    )
    assert (
      calibrate(values, GRID, **options, seed="abcd").method
      == "betting_randomized"
    )


def unequal_clusters(generator, count=150, bad=0.61):
  """One cluster in eight has 8 prompts, all lost; the others have one, which is
  not.
  """
  large = generator.random(count) < 1.0 / 8.0
  groups = np.repeat([f"g{row}" for row in range(count)], np.where(large, 8, 1))
  losses = np.repeat(large, np.where(large, 8, 1)) * (
    generator.random(len(groups)) < bad
  )
  return losses[:, None] * np.array([1.0, 0.9]), groups.tolist()


def test_a_declared_largest_cluster_makes_the_promise_one_about_prompts():
  """More than half of all prompts are in large clusters: mean 0.33 a prompt,
  0.08 a cluster.
  """
  rates = dict(tolerance=0.2, error_rate=0.05)
  wrong = 0
  named = 0
  for seed in range(12):
    losses, groups = unequal_clusters(np.random.default_rng(seed))
    options = dict(groups=groups, seed=f"{seed:04x}", randomized=False, **rates)
    by_cluster = calibrate(losses, [0.9, 0.5], **options)
    found = calibrate(losses, [0.9, 0.5], **options, largest_cluster=8)
    named, wrong = named + by_cluster.certified, wrong + found.certified
  assert named == 12 and wrong == 0
  assert (
    found.largest_cluster == 8
    and Calibration.from_json(found.to_json()) == found
  )
  assert "largest_cluster" not in by_cluster.to_json()
  mild, groups = unequal_clusters(np.random.default_rng(0), bad=0.05)
  options = dict(
    tolerance=0.3, error_rate=0.05, groups=groups, largest_cluster=8
  )
  for promise in (
    risks.Mean(),
    risks.Quantile(0.7),
    risks.EarlyExits((3.0,), depths=mild + 1),
  ):
    kept = calibrate(mild, [0.9, 0.5], **options, promise=promise)
    assert (
      kept.certified
      and "each counts once whatever its cluster" in kept.guarantee
    )
    assert (
      "No cluster has more than 8 prompts: the caller declared it."
      in kept.guarantee
    )
  with pytest.raises(
    ValueError, match="`largest_cluster` = 7 prompts, got one of 8"
  ):
    calibrate(mild, [0.9, 0.5], **rates, groups=groups, largest_cluster=7)
  losses = np.array([[0.2], [0.4], [1.0]])
  names, filled = clusters.means(losses, ["a", "a", "b"], 4, 0.1)
  np.testing.assert_allclose(filled[:, 0], [(0.6 + 0.2) / 4, (1.0 + 0.3) / 4])
  assert names == ["a", "b"]


def test_losses_of_0_and_1_that_are_not_declared_are_pointed_out():
  values = (np.arange(100)[:, None] < [0, 4, 40, 40]) * 1.0
  found = calibrate(SequenceLosses(values, GRID), **RATES)
  declared = calibrate(values, GRID, **RATES)
  assert declared.threshold == 0.7 and declared.method == "binomial"
  assert (
    found.threshold == 0.9
    and "Declare losses that are 0 or 1 alone" in found.reason
  )
  assert (
    Calibration.from_json(found.to_json()) == found
    and "binary" not in declared.reason
  )


def test_failure_is_a_value_with_a_sentence():
  few = calibrate(np.zeros((20, 4)), GRID, **RATES)
  assert (
    few.threshold == NEVER_EXIT
    and "expected at least 29 prompts at" in few.reason
  )
  split = calibrate(np.zeros((40, 4)), GRID, **RATES, testing_procedure="holm")
  assert "at least 42 prompts" in split.reason  # log(0.05 / 4) / log(0.9)
  bad = calibrate(np.ones((100, 4)), GRID, **RATES)
  assert (
    bad.reason == "Nothing is certified: the first threshold 0.9 already fails."
  )
  assert (
    "full model is used (never)" in bad.guarantee
    and bad.reason in bad.guarantee
  )
  assert "nothing is promised of its loss" in bad.guarantee
  textual = calibrate(
    SequenceLosses(np.ones((100, 4)), GRID, kind="textual"), **RATES
  )
  assert "against itself is 0 by definition" in textual.guarantee


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1.5, -0.1])
def test_losses_that_cannot_be_tested_stop_the_grid_there(bad):
  losses = sample(ids=tuple(f"id-{i}" for i in range(300)))
  losses.values[7, 1] = bad
  for method in ("auto", "paper", "convex_order"):
    found = calibrate(losses, **RATES, method=method)
    assert found.threshold == 0.9 and found.rows[1].p_value == 1.0
    assert (
      "row 7 (id 'id-7')" in found.reason
      and "0.7 is not certified" in found.reason
    )
    assert (
      Calibration.from_json(json.loads(json.dumps(found.to_json()))).threshold
      == 0.9
    )
  losses.values[7, 0] = bad
  assert calibrate(losses, **RATES).threshold == NEVER_EXIT
  assert (
    "must be in the declared range [0.0, 1.0]"
    in calibrate(losses, **RATES).reason
  )


def test_groups_are_cluster_means():
  values = laws.bernoulli(np.random.default_rng(0), 0.01, (180, 4))
  groups = [f"g{i // 3}" for i in range(180)]
  losses = SequenceLosses(values, GRID, support=Support(binary=True))
  found = calibrate(losses, **RATES, groups=groups)
  assert (
    found.num_examples == 60
    and found.clusters
    and found.method == "betting_fixed_level"
  )
  np.testing.assert_allclose(found.column("mean"), values.mean(axis=0))
  assert "clusters of prompts" in found.guarantee
  # what losses carry counts alike
  carried = dataclasses.replace(losses, groups=tuple(groups))
  assert calibrate(carried, **RATES) == found
  assert calibrate(carried.ungrouped(), **RATES).groups_ignored
  values[0, 0] = 2.0  # no mean hides a loss that is out of its range
  assert (
    "the loss of row 0 is" in calibrate(losses, **RATES, groups=groups).reason
  )
  values[0, 0] = 0.0
  single = calibrate(losses, **RATES, groups=[str(i) for i in range(180)])
  assert single.method == "binomial" and single.clusters


@pytest.mark.filterwarnings("default")
def test_an_error_rate_above_a_half_is_warned_of():
  rates = dict(tolerance=0.1, error_rate=0.95)
  for call in (
    lambda: calibrate(sample(), **rates),
    lambda: Online(None, [0.5], **rates),
  ):
    with pytest.warns(
      UserWarning, match="holds with probability 0.95, give 0.05"
    ):
      call()


def test_another_procedure_is_refused_by_field():
  found = calibrate(sample(procedure=laws.procedure()), **RATES)
  found.refuse_other(laws.procedure())
  with pytest.raises(
    ValueError, match="`measure`: expected 'softmax', got 'state'"
  ):
    found.refuse_other(laws.procedure(measure="state"))
  found = calibrate(sample(procedure=laws.procedure(platform="cpu")), **RATES)
  found.refuse_other(laws.procedure(platform="tpu"), allow_platform=True)
  with pytest.raises(
    ValueError, match=r"decode without it \(`--allow_platform`\)"
  ):
    found.refuse_other(laws.procedure(platform="tpu"))
  with pytest.raises(ValueError, match=r"has none \(null\)"):
    found.refuse_other(None)
  with pytest.raises(ValueError, match="`procedure` null"):
    calibrate(sample(), **RATES).refuse_other(laws.procedure())


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"tolerance": 0.0}, r"`tolerance` to be in \(0, 1\), got 0.0"),
    (
      {"support": Support(0.0, 0.05)},
      r"`tolerance` to be in \(-inf, 0.05\), got 0.1",
    ),
    ({"method": "best"}, "`method` to be one of .* got 'best'"),
    ({"method": "binomial"}, "got 'binomial'; declare losses binary"),
    (
      {"method": "paper", "support": Support(0.0, 2.0)},
      "got 'paper'; divide losses and",
    ),
    (
      {"method": "convex_order", "support": Support(-1.0)},
      "'convex_order'; signed losses go",
    ),
    (
      {"testing_procedure": "bh"},
      "`testing_procedure` to be one of .* got 'bh'",
    ),
    (
      {"method": "betting_fixed_level", "testing_procedure": "holm"},
      ".* use 'betting'",
    ),
    ({"thresholds": None}, "`thresholds` beside `losses` .*, got none"),
    (
      {"thresholds": GRID[:3]},
      r"\[n, 3\] with n at least 1, got shape \(30, 4\)",
    ),
    (
      {"losses": sample(), "thresholds": GRID - 0.1},
      "no `support` or `thresholds` beside",
    ),
    (
      {"losses": np.ma.masked_array(np.zeros((30, 4)), mask=np.eye(30, 4))},
      "masked",
    ),
    (
      {"losses": np.zeros((30, 4), complex)},
      "real numbers, got an array of complex128",
    ),
    ({"losses": [[0.0], [0.0, 1.0]]}, "rows of several lengths"),
    ({"losses": np.zeros((0, 4))}, "n at least 1"),
    *(
      (
        {"groups": ["a"] * 29 + [odd]},
        "`groups` to name the cluster of every row.*row 29",
      )
      for odd in (None, math.nan, 1.5, True, ["a"])
    ),
    ({"groups": ["a"] * 29}, "each of the 30 rows, got 29"),
  ],
)
def test_arguments_are_checked(changes, message):
  options = {
    "losses": np.zeros((30, 4)),
    "thresholds": GRID,
    **RATES,
    **changes,
  }
  losses = options.pop("losses")
  grid = options.pop("thresholds")
  with pytest.raises(ValueError, match=message):
    calibrate(losses, grid, **options)


@pytest.mark.parametrize(
  ("ids", "message"),
  [
    (("a",) * 29, "`ids` for each of the 30 rows, got 29"),
    (("a",) * 30, r"`ids` to be unique, got \['a'\] more than once"),
    (tuple(range(30)), r"`ids` to be texts, got 0 \(int\)"),
  ],
)
def test_losses_are_checked_where_they_are_made(ids, message):
  with pytest.raises(ValueError, match=message):
    SequenceLosses(np.zeros((30, 4)), GRID, ids=ids)
  with pytest.raises(ValueError, match="4 `knobs`, one a column, got 1"):
    SequenceLosses(np.zeros((30, 4)), GRID, knobs=("a",))
