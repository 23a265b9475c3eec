"""Clusters of prompts and the order of tests: however a table is stored, the
level holds.
"""

import dataclasses
import itertools
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from calm.calibrate import (
  Prompt,
  SequenceLosses,
  Support,
  calibrate,
  calibrate_configurations,
  checks,
  clusters,
  methods,
)
from calm.calibrate.risks import Risk
from tests.calibrate import laws

RATES = dict(tolerance=0.1, error_rate=0.05)


@pytest.mark.parametrize("method", ["auto", "betting"])
@pytest.mark.parametrize(
  "values", [[0.0, 1.0], [0.0, 0.5, 1.0], [-1.0, 0.0, 1.0]]
)
def test_equal_calls_answer_equally_however_rows_are_stored(values, method):
  generator = np.random.default_rng(0)
  for _ in range(2):
    table = generator.choice([*values, *[0.0] * 8], size=(60, 1))
    losses = SequenceLosses(table, [0.5], Support(lower=min(values)))
    first = calibrate(losses, **RATES, method=method)
    assert calibrate(losses, **RATES, method=method) == first
    assert calibrate(losses, **RATES, method=method, seed=first.seed) == first
    moved = losses.rows(generator.permutation(60))
    assert calibrate(moved, **RATES, method=method).rows == first.rows
    named = dataclasses.replace(losses, ids=tuple(f"p{i}" for i in range(60)))
    seed, first = first.seed, calibrate(named, **RATES, method=method)
    assert seed != first.seed  # of names and contents
    assert (
      calibrate(named.rows(np.arange(60)[::-1]), **RATES, method=method).rows
      == first.rows
    )


@pytest.mark.parametrize("method", ["betting", "betting_fixed_level"])
@pytest.mark.parametrize(
  "count, tolerance",
  [(50, 0.1), (97, 0.05), (383, 0.1)],
)
def test_the_level_of_every_table_of_zeros_and_ones_is_exact(
  count, tolerance, method
):
  """The sum over all n + 1 tables: with one order made of contents up to 0.26
  (first: 0.25).
  """
  most = int(stats.binom.ppf(1 - 1e-5, count, tolerance))
  chosen = methods.get_method(method, Support())
  passed = []
  for ones in range(most + 1):
    losses = SequenceLosses(
      (np.arange(count) < ones).astype(float)[:, None], [0.5]
    )
    orders = clusters.tested_orders(losses)[2]
    assert len(orders) == (16 if ones else 1)
    columns = losses.values[np.stack(orders, axis=1), 0]
    log_p = chosen.log_p_values(columns, chosen.design(tolerance, 0.05, count))
    passed.append(bool(np.all(np.exp(log_p) <= 0.05)))
  chances = stats.binom.pmf(np.arange(most + 1), count, tolerance)
  assert chances[passed].sum() <= 0.05
  # the audit's 89 %
  worse = stats.binom.pmf(np.arange(most + 1), count, 1.3 * tolerance)
  assert worse[passed].sum() <= 0.02


def test_arrays_of_zeros_and_ones_are_tested_exactly_and_the_promise_says_so():
  table = laws.bernoulli(np.random.default_rng(0), 0.03, (100, 1))
  found = calibrate(table, [0.5], **RATES)
  declared = calibrate(table, [0.5], **RATES, support=Support(binary=True))
  assert (
    found == declared
    and found.method == "binomial"
    and found.order == "irrelevant"
  )
  assert "Every loss is taken to be 0 or 1 by its nature." in found.guarantee
  # What was declared, or was told to bet, stays as it was told.
  assert (
    calibrate(table, [0.5], **RATES, support=Support()).method
    == "betting_fixed_level"
  )
  assert calibrate(table, [0.5], **RATES, method="betting").method == "betting"
  table[0] = 0.5
  assert calibrate(table, [0.5], **RATES).method == "betting_fixed_level"


@pytest.mark.parametrize("kinds", [1, 2, 8, 9])
def test_tables_of_two_to_eight_kinds_of_rows_are_tested_in_many_orders(
  kinds, monkeypatch
):
  """However they are looked at; tiny losses are losses, and -0 is 0."""
  table = np.repeat(np.arange(kinds) * 1e-20, 3)[:, None]
  table[:2] = [[0.0], [-0.0]]
  for cells in (2**18, 8 * 3, 1):
    monkeypatch.setattr(checks, "_CELLS", cells)
    losses = SequenceLosses(table, [0.5])
    seeds, drawn, _ = clusters.tested_orders(losses)
    count = 16 if 1 < kinds <= 8 else 1
    assert drawn == (kinds > 8) and len(set(seeds)) == len(seeds) == count
    assert all(len(seed) == 16 and int(seed, 16) >= 0 for seed in seeds)
    # as it once was
    assert clusters.tested_orders(losses, "ab")[:2] == (("ab",), True)
    named = dataclasses.replace(losses, ids=tuple(map(str, range(3 * kinds))))
    assert clusters.tested_orders(named)[1] == drawn
    assert clusters.tested_orders(losses, seeds[0])[:2] == (seeds, drawn)
    texts, drawn, _ = clusters.tested_orders(
      dataclasses.replace(losses, contents="c")
    )
    assert len(texts) == 1 and drawn


def text_like(generator, mean, shape):
  """Rises along the grid, of texts with few words: 0, 1 and fractions of small
  numbers.
  """
  words = generator.integers(2, 12, (shape[0], 1))
  lost = generator.random((shape[0], 1)) * np.linspace(
    0.2, 6.0 * mean, shape[1]
  )
  return np.minimum(1.0, np.round(words * lost) / words)


def warned(values):
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    checks.warn_of_copies(values)
  return bool(caught)


@pytest.mark.parametrize("times", [2, 3, 10])
def test_copies_are_seen_in_tables_of_many_kinds_of_rows(times):
  generator = np.random.default_rng(0)
  for law in (text_like, laws.mostly_zero, laws.signed_smooth):
    prompts = law(generator, 0.2, (150, 5))
    copied = generator.permutation(np.repeat(prompts, times, axis=0))
    assert warned(
      np.concatenate([copied, prompts[:1], np.full((1, 5), np.nan)])
    )
    assert not warned(prompts)


def test_independent_draws_do_not_look_copied():
  """Among 400 tables not one; at its level one in 2,500 would."""
  generator = np.random.default_rng(1)
  everywhere = [*laws.UNIT_LAWS, *laws.SIGNED_LAWS, text_like]
  for seed in range(400):
    shape = (int(generator.integers(2, 400)), int(generator.integers(1, 9)))
    law = everywhere[seed % len(everywhere)]
    assert not warned(
      law(generator, float(generator.uniform(0.01, 0.3)), shape)
    ), (law, shape)


def test_copied_prompts_are_warned_of():
  values = np.repeat(
    laws.heavy(np.random.default_rng(0), 0.05, (200, 2)), 3, axis=0
  )
  with pytest.warns(UserWarning, match="as copies of a prompt do"):
    calibrate(values, [0.9, 0.5], **RATES)
  groups = [str(row // 3) for row in range(600)]
  calibrate(values, [0.9, 0.5], **RATES, groups=groups)
  losses = SequenceLosses(values, [0.9, 0.5], groups=groups).ungrouped()
  assert (
    "took each for an independent draw" in calibrate(losses, **RATES).guarantee
  )
  risk = Risk(SequenceLosses(values, [0.9, 0.5]), 0.2, "risk")
  with pytest.warns(UserWarning, match="as copies of a prompt do"):
    calibrate_configurations({"a": [risk]}, {"a": values}, error_rate=0.05)


def known(prompts):
  return clusters.known_groups(clusters.prompt_clusters(prompts))


def test_a_prompt_without_a_group_beside_others_is_a_cluster_of_its_own():
  grouped = Prompt("x", "", (), "g")
  also = Prompt("z", "", (), "g")
  bare = Prompt("y", "")
  assert known([bare, Prompt("w", "")]) is None  # inputs that nobody knows
  assert known([grouped, bare]) is None
  assert clusters.prompt_clusters([grouped, bare]) == ("g", "prompt y")
  assert known([grouped, bare, also]) == ("g", "prompt y", "g")


def test_inputs_that_are_equal_but_for_form_case_and_space_are_one():
  texts = [
    "Straße  7",
    " STRASSE\u00a07\n",
    "\ufeffstras\u00adse ７",
    "strasse 8",
    "x",
    "X\u200b",
  ]
  prompts = [Prompt(f"p{i}", text) for i, text in enumerate(texts)]
  assert known(prompts) == (*["prompt p0"] * 3, "prompt p3", *["prompt p4"] * 2)
  assert known(prompts[2:5]) is None


@given(st.text(max_size=12))
def test_folding_a_text_twice_changes_nothing(text):
  folded = clusters.fold_text(text)
  assert clusters.fold_text(folded) == folded
  assert clusters.fold_text(f"\n{text}\t ") == folded


def test_clusters_are_joined_by_groups_and_by_inputs():
  """p0 and p1 share a group, p1 and p2 an input, p2 and p3 a group: one
  cluster, any order.
  """
  prompts = [
    Prompt("p0", "a", (), "g"),
    Prompt("p1", "b", (), "g"),
    Prompt("p2", "B", (), "f"),
    Prompt("p3", "c", (), "f"),
    Prompt("p4", "d", (), "h"),
  ]
  for rows in itertools.permutations(prompts):
    found = dict(
      zip([p.id for p in rows], clusters.prompt_clusters(rows), strict=True)
    )
    assert found == {"p0": "f", "p1": "f", "p2": "f", "p3": "f", "p4": "h"}


def test_texts_stand_for_inputs_that_are_missing_where_they_are_of_many_kinds():
  some = [Prompt("p0", "a"), *(Prompt(f"p{row}", "") for row in range(1, 9))]
  assert clusters.run_digest(some[1:], "bcdefghi") == ""  # eight kinds
  assert (
    len(
      {clusters.run_digest(some, texts) for texts in ("abcdefghi", "abcdefghj")}
    )
    == 2
  )


def test_a_seed_draws_one_uniform():
  drawn = [clusters.seeded_uniform(f"{number:04x}") for number in range(4000)]
  assert (
    len(set(drawn)) == 4000 and stats.kstest(drawn, "uniform").pvalue > 0.01
  )
  assert clusters.seeded_uniform("0001") == drawn[1]
