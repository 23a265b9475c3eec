"""The order of a sequential run on clusters: that of `calibrate`, clusters whole."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm.calibrate import Prompt, SequenceLosses, clusters
from calm.calibrate.generations import order
from tests.calibrate import laws

GROUPS = st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=20)


@given(GROUPS)
def test_clusters_stand_together_in_the_order_that_calibrate_tests_them(groups):
  ids = [f"id-{row:02d}" for row in range(len(groups))]
  procedure = laws.procedure()
  rows = order.decoding_order(ids, groups, procedure)
  assert sorted(rows.tolist()) == list(range(len(groups)))
  ordered = [groups[row] for row in rows]
  units = order.consecutive_units(len(rows), ordered)
  values = np.random.default_rng(0).random((len(groups), 1))
  losses = SequenceLosses(values, np.array([0.5]), ids=tuple(ids), procedure=procedure)
  means = clusters.cluster_means(losses, groups)
  seed = clusters.order_seed(means)
  (tested,) = clusters.tested_orders(means, [seed])
  assert [ordered[unit.start] for unit in units] == [means.ids[row] for row in tested]
  np.testing.assert_allclose(
    order.unit_means(values[rows, 0], units), means.values[tested, 0], rtol=1e-12
  )
  assert seed == order.order_seed(order.unit_names(ids, groups), procedure)


@given(GROUPS, st.randoms(use_true_random=False))
def test_the_order_does_not_depend_on_how_the_prompts_are_stored(groups, random):
  rows = [(f"id-{row:02d}", group) for row, group in enumerate(groups)]
  shuffled = random.sample(rows, len(rows))
  orders = []
  for stored in (rows, shuffled):
    ids, names = zip(*stored, strict=True)
    orders.append([ids[row] for row in order.decoding_order(ids, names, None)])
  assert orders[0] == orders[1]


def test_units_of_a_later_part_have_their_means():
  units = order.consecutive_units(5, ["a", "a", "b", "b", "c"])[1:]
  np.testing.assert_array_equal(order.unit_means([0.25, 0.5, 1.0], units), [0.375, 1.0])


def test_a_prompt_without_a_group_beside_others_is_a_cluster_of_its_own():
  grouped, also, bare = Prompt("x", "", (), "g"), Prompt("z", "", (), "g"), Prompt("y", "")
  assert order.known_groups([bare, Prompt("w", "")]) is None  # inputs that nobody knows
  assert order.known_groups([grouped, bare]) is None
  assert order.prompt_clusters([grouped, bare]) == ("g", "prompt y")
  assert order.known_groups([grouped, bare, also]) == ("g", "prompt y", "g")


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
  clusters = order.known_groups(prompts)
  assert clusters == (*["prompt p0"] * 3, "prompt p3", *["prompt p4"] * 2)
  assert order.known_groups(prompts[2:5]) is None


@given(st.text(max_size=12))
def test_folding_a_text_twice_changes_nothing(text):
  folded = order.fold_text(text)
  assert order.fold_text(folded) == folded
  assert order.fold_text(f"\n{text}\t ") == folded


def test_clusters_are_joined_by_groups_and_by_inputs():
  """p0 and p1 share a group, p1 and p2 an input, p2 and p3 a group: one cluster, any order."""
  prompts = [
    Prompt("p0", "a", (), "g"),
    Prompt("p1", "b", (), "g"),
    Prompt("p2", "B", (), "f"),
    Prompt("p3", "c", (), "f"),
    Prompt("p4", "d", (), "h"),
  ]
  for rows in itertools.permutations(prompts):
    clusters = dict(zip([p.id for p in rows], order.prompt_clusters(rows), strict=True))
    assert clusters == {"p0": "f", "p1": "f", "p2": "f", "p3": "f", "p4": "h"}


def test_a_seed_is_sixteen_digits_of_what_it_is_made_of():
  seeds = [
    order.order_seed(["a", "b"], None),
    order.order_seed(["a", "c"], None),
    order.order_seed(["a", "b"], None, "contents"),
    order.order_seed(["a", "b"], laws.procedure()),
  ]
  assert len(set(seeds)) == 4 and order.order_seed(["b", "a"], None) == seeds[0]
  assert all(len(seed) == 16 and int(seed, 16) >= 0 for seed in seeds)


def test_scattered_clusters_are_refused():
  with pytest.raises(ValueError, match="2 clusters in 3 places"):
    order.consecutive_units(3, ["a", "b", "a"])
