"""Whatever order a table is stored in, a test keeps its level."""

import dataclasses

import numpy as np
import pytest

from calm.calibrate import SequenceLosses, calibrate
from calm.calibrate.generations import order
from calm.calibrate.losses import checks, clusters
from tests.calibrate import laws

RATES = dict(tolerance=0.1, error_rate=0.05)


def stored(values, way, generator):
  """The same rows as somebody may have stored them."""
  if way == "sorted":
    return np.sort(values, axis=0)
  if way == "descending":
    return np.sort(values, axis=0)[::-1]
  if way == "stratified":  # the easy half first
    return np.concatenate([np.sort(half, axis=0) for half in np.array_split(values, 4)])
  return values[np.argsort((values[:, 0] > 0) * generator.random(len(values)))]  # clustered


@pytest.mark.parametrize("named", [False, True])
def test_a_sorted_table_certifies_no_more_often_than_as_drawn(named):
  generator = np.random.default_rng(0)
  wrong = 0
  ids = tuple(f"p{i}" for i in range(383)) if named else None
  for _ in range(60):
    values = np.sort(laws.bernoulli(generator, 0.13, (383, 1)), axis=0)
    found = calibrate(SequenceLosses(values, [0.5], ids=ids), **RATES, method="betting")
    wrong += found.certified
  assert wrong <= 5  # 89 % of draws when names alone made the order; as drawn 1 %


@pytest.mark.parametrize("way", ["sorted", "descending", "stratified", "clustered"])
@pytest.mark.parametrize("law", [laws.bernoulli, laws.mostly_zero])
def test_every_stored_order_keeps_the_level_at_every_size(way, law, monkeypatch):
  """At the boundary, over sizes up to 400; each draw has another size."""
  generator = np.random.default_rng(1)
  monkeypatch.setattr(clusters.secrets, "token_hex", lambda n: generator.bytes(n).hex())
  sizes = np.arange(30, 401, 2)
  wrong = 0
  for size in sizes:
    values = stored(law(generator, 0.2, (size, 1)), way, generator)
    wrong += calibrate(values, [0.5], tolerance=0.2, error_rate=0.1).certified
  spread = np.sqrt(0.1 * 0.9 / len(sizes))
  assert wrong / len(sizes) <= 0.1 + 3 * spread


def test_contents_move_the_order_and_storage_does_not():
  values = laws.mostly_zero(np.random.default_rng(0), 0.2, (50, 3))
  ids = tuple(f"p{i}" for i in range(50))
  losses = clusters.with_contents(SequenceLosses(values, [0.9, 0.7, 0.5], ids=ids))
  first, seed = clusters.tested_order(losses)
  other = clusters.with_contents(dataclasses.replace(losses, values=values[::-1], contents=""))
  assert clusters.tested_order(other)[1] == seed  # the same rows in another order
  changed = values.copy()
  changed[3, 0] += 1e-9
  moved = clusters.with_contents(dataclasses.replace(losses, values=changed, contents=""))
  assert clusters.tested_order(moved)[1] != seed
  assert sorted(first.tolist()) == list(range(50))
  # The text of prompts counts before their losses do, and can be known before them.
  told = dataclasses.replace(losses, contents="ab")
  assert clusters.with_contents(told) is told


def test_few_kinds_of_rows_draw_their_order_and_can_be_repeated():
  values = laws.bernoulli(np.random.default_rng(0), 0.05, (200, 1))
  first = calibrate(values, [0.5], **RATES)
  assert calibrate(values, [0.5], **RATES, seed=first.seed) == first
  assert len({calibrate(values, [0.5], **RATES).seed for _ in range(3)}) == 3
  same = calibrate(np.zeros((50, 1)), [0.5], **RATES)  # one kind: no order can matter
  assert same == calibrate(np.zeros((50, 1)), [0.5], **RATES)


@pytest.mark.parametrize("kinds", [1, 2, 8, 9])
def test_tables_of_two_to_eight_kinds_of_rows_draw_their_order(kinds, monkeypatch):
  """However they are looked at; tiny losses are losses, and -0 is 0."""
  table = np.repeat(np.arange(kinds) * 1e-20, 3)[:, None]
  table[:2] = [[0.0], [-0.0]]
  for cells in (2**18, 8 * 3, 1):
    monkeypatch.setattr(checks, "_CELLS", cells)
    losses = SequenceLosses(table, [0.5])
    first, second = (clusters.with_contents(losses).contents for _ in range(2))
    assert (first != second) == (1 < kinds <= 8)
    assert len(first) == len(second) == 64 and int(first, 16) >= 0


def test_contents_of_a_table_are_the_digests_of_its_rows():
  table = np.arange(20.0).reshape(10, 2) / 100.0
  signed = table.copy()
  table[0, 0], signed[0, 0] = 0.0, -0.0
  expected = order.contents_digest(row.tobytes() for row in table)
  for values in (table, signed, table[::-1]):
    losses = SequenceLosses(values, [0.9, 0.5])
    assert clusters.with_contents(losses).contents == expected


def test_places_are_those_of_sha256_whatever_the_version_of_numpy():
  assert order.seeded_order([f"id-{i}" for i in range(8)], "0123456789abcdef").tolist() == [
    *(7, 2, 3, 5, 0, 6, 4, 1)
  ]
  assert order.contents_digest([b"a", b"b"]) == order.contents_digest([b"b", b"a"])
  assert order.contents_digest([b"a", b"b"]) != order.contents_digest([b"a", b"a"])


def test_an_order_that_follows_the_losses_is_warned_of():
  values = np.sort(laws.mostly_zero(np.random.default_rng(0), 0.1, (100, 1)), axis=0)
  losses = SequenceLosses(values, [0.5])
  calibrate(losses, **RATES)
  with pytest.warns(UserWarning, match="follows the losses"):
    calibrate(losses.in_given_order(), **RATES)
  calibrate(losses.in_given_order(), **RATES, method="paper")  # sums have no order


def test_copied_prompts_are_warned_of():
  values = np.repeat(laws.mostly_zero(np.random.default_rng(0), 0.2, (100, 2)), 3, axis=0)
  with pytest.warns(UserWarning, match="copies of one prompt count once"):
    calibrate(values, [0.9, 0.5], **RATES)
  calibrate(values, [0.9, 0.5], **RATES, groups=[str(row // 3) for row in range(300)])
