"""Clusters of prompts, and the seed of the order in which they are tested."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from calm.calibrate import Prompt
from calm.calibrate.generations import order
from tests.calibrate import laws


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


def test_texts_stand_for_inputs_that_are_missing_where_they_are_of_many_kinds():
  some = [Prompt("p0", "a"), *(Prompt(f"p{row}", "") for row in range(1, 9))]
  assert order.run_digest(some[1:], "bcdefghi") == ""  # eight kinds
  assert len({order.run_digest(some, texts) for texts in ("abcdefghi", "abcdefghj")}) == 2
