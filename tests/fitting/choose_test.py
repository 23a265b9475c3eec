"""Ranking, grids and forecasts by hand, without a model."""

import dataclasses
import math

import numpy as np
import pytest

from calm.fitting import candidates, choose
from calm.fitting.candidates import Candidate


@pytest.fixture
def tokens():
  """Two texts of two tokens under three layers: what a layer says, and how sure it is."""
  sure = np.array([[0.9, 0.95, 0.0], [0.2, 0.8, 0.0], [0.6, 0.7, 0.0], [0.1, 0.3, 0.0]])
  agrees = np.array([[1, 1, 1], [0, 1, 1], [0, 1, 1], [0, 0, 1]], bool)
  rows, positions = np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])
  return candidates.Reading({"softmax": sure}, agrees, rows, positions)


def test_exits_and_losses_of_a_set_of_layers(tokens):
  levels = np.array([0.95, 0.6, 0.15])
  depths, losses = candidates.simulate(tokens, Candidate("softmax", (1, 2)), levels, 2)
  assert depths.tolist() == [[2, 3, 3, 3], [1, 2, 1, 3], [1, 1, 1, 2]]
  # In each text the share from the first changed word on, two thirds of it.
  assert losses == pytest.approx([0.0, 1 / 3, 1 / 2])
  depths, losses = candidates.simulate(tokens, Candidate("softmax", (2,)), levels, 2)
  assert depths.tolist() == [[2, 3, 3, 3], [2, 2, 2, 3], [2, 2, 2, 2]]
  assert losses == pytest.approx([0.0, 0.0, 1 / 6])


def test_a_decaying_threshold_falls_with_the_position(tokens):
  candidate = Candidate("softmax", (1, 2), temperature=4.0)
  # Eq. 5 at t = 0 and 1 of N = 2: 0.9 * 0.6 + 0.1 = 0.64, then 0.5535.
  depths, _ = candidates.simulate(tokens, candidate, np.array([0.6]), 2)
  assert depths.tolist() == [[1, 2, 2, 3]]


def test_layer_sets_are_of_real_layers_and_few():
  for count in (2, 3, 8, 24):
    sets = candidates.layer_sets(count)
    assert tuple(range(1, count)) in sets and len(sets) == len(set(sets)) < 60
    assert all(1 <= layer < count for layers in sets for layer in layers)
    assert all(list(layers) == sorted(set(layers)) for layers in sets)
  assert {(3, 4), (2, 3, 4, 5), (2, 4), (3,)} <= set(candidates.layer_sets(8))


def test_finalists_hold_the_best_of_every_measure_and_the_other_schedule():
  ranked = [
    candidates.Ranked(Candidate(measure, layers, tau), 0.0, 0.0)
    for measure, layers, tau in (
      ("softmax", (2,), None),
      ("softmax", (2,), 8.0),
      ("softmax", (2,), 4.0),
      ("softmax", (3,), None),
      ("state", (3,), 4.0),
      ("classifier", (1,), None),
    )
  ]
  got = candidates.finalists(ranked, 4)
  assert got[:3] == [ranked[0].candidate, ranked[4].candidate, ranked[5].candidate]
  assert got[3:] == [Candidate("softmax", (2,), 8.0)]  # the cheaper of those that decay
  falling_first = candidates.finalists([ranked[1], ranked[2], ranked[0]], 2)
  assert falling_first == [Candidate("softmax", (2,), 8.0), Candidate("softmax", (2,), None)]
  # Room for one more goes to layers that none has yet.
  more = [*ranked, candidates.Ranked(Candidate("softmax", (1, 2)), 0.0, 0.0)]
  assert candidates.finalists(more, 5) == [*got, Candidate("softmax", (1, 2))]


def test_the_forecast_is_where_the_bound_crosses_the_tolerance():
  losses = np.tile([[0.0, 0.0, 0.0], [0.0, 0.2, 0.4]], (100, 1))
  thresholds = (0.9, 0.5, 0.1)
  # Means 0, 0.1, 0.2: with endless prompts the bound is the mean.
  assert candidates.forecast(thresholds, losses, 0.15, 10**9) == pytest.approx(0.3, abs=1e-3)
  assert 0.5 < candidates.forecast(thresholds, losses, 0.1, 100) < 0.9
  assert candidates.forecast(thresholds, losses, 0.3, 10**9) == 0.1
  assert candidates.forecast(thresholds, losses + 0.5, 0.1, 100) == math.inf


def test_the_final_grid_descends_and_is_densest_near_the_tolerance():
  candidate = Candidate("softmax", (1,))
  grid = np.array(
    candidates.final_grid(candidate, (0.9, 0.5, 0.1), (0.01, 0.08, 0.3), 0.45, 0.1)
  )
  assert (np.diff(grid) < 0).all() and grid[-1] > 0.0 and grid[0] <= 1.0
  assert {0.9, 0.5, 0.45} <= set(grid.tolist())
  # Loss 0.2, twice the tolerance, is at 0.28; what lies far beyond is left out.
  assert grid[-1] == pytest.approx(0.281818, abs=1e-5)
  near = ((grid > 0.4) & (grid < 0.7)).sum()
  assert near > len(grid) / 2


def test_a_way_that_was_looked_at_first_is_told_beside_the_others_first_looks():
  """Its x2.7 is of other rounds than the chosen one's x2.1, which was x3.1 in them."""
  way = lambda *args: choose.Tried(Candidate("softmax", (1,)), *args)
  chosen = way((0.5,), (0.1,), (2.0,), 0.5, 1.0, 2.1, 3.1)
  looked = way((), (), (), 0.4, 1.0, 2.7, 2.7)
  without = way((0.5,), (0.3,), (2.0,), math.inf, math.nan, math.nan, 2.9)
  assert [entry.gains for entry in (chosen, looked, without)] == [False] * 3
  assert dataclasses.replace(chosen, end_to_end=1.2).gains
  assert not dataclasses.replace(chosen, speedup=0.9, end_to_end=1.2).gains
  narrow = dataclasses.replace(chosen.candidate, in_8_bits="layers")
  for whole, better in ((1.3, False), (1.5, True)):
    in_8_bits = dataclasses.replace(chosen, candidate=narrow, end_to_end=whole)
    assert (in_8_bits.score > dataclasses.replace(chosen, end_to_end=1.2).score) == better
  choice = choose.Choice((looked, without, chosen), 2, (0.5,), 2.0, 20, 4)
  assert choice.lines() == [
    "  softmax after layer 1: x2.10 as fast at threshold 0.5, x3.10 in a first timing (chosen)",
    "  softmax after layer 1: no threshold within the tolerance",
    "  softmax after layer 1: x2.70 in a first timing, at threshold 0.4",
  ]
