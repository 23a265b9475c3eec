"""Ranking, grids and forecasts by hand."""

import dataclasses
import math

import numpy as np
import pytest

from calm.fitting import choose
from calm.fitting.choose import Candidate


@pytest.fixture
def tokens():
  """Two texts of two tokens under three layers: what a layer says, and how sure
  it is.
  """
  sure = np.array(
    [[0.9, 0.95, 0.0], [0.2, 0.8, 0.0], [0.6, 0.7, 0.0], [0.1, 0.3, 0.0]]
  )
  agrees = np.array([[1, 1, 1], [0, 1, 1], [0, 1, 1], [0, 0, 1]], bool)
  return choose.Reading({"softmax": sure}, agrees, np.array([0, 1, 0, 1]))


def test_exits_and_losses_of_a_set_of_layers(tokens):
  levels = np.array([0.95, 0.6, 0.15])
  depths, losses = choose.simulate(
    tokens, Candidate("softmax", (1, 2)), levels, 2
  )
  assert depths.tolist() == [[2, 3, 3, 3], [1, 2, 1, 3], [1, 1, 1, 2]]
  # In each text the share from the first changed word on, two thirds of it.
  assert losses == pytest.approx([0.0, 1 / 3, 1 / 2])
  depths, losses = choose.simulate(
    tokens, Candidate("softmax", (2,)), levels, 2
  )
  assert depths.tolist() == [[2, 3, 3, 3], [2, 2, 2, 3], [2, 2, 2, 2]]
  assert losses == pytest.approx([0.0, 0.0, 1 / 6])


def test_a_decaying_threshold_falls_with_the_position(tokens):
  candidate = Candidate("softmax", (1, 2), temperature=4.0)
  # Eq. 5 at t = 0 and 1 of N = 2: 0.9 * 0.6 + 0.1 = 0.64, then 0.5535.
  depths, _ = choose.simulate(tokens, candidate, np.array([0.6]), 2)
  assert depths.tolist() == [[1, 2, 2, 3]]


def test_the_forecast_is_where_the_bound_crosses_the_tolerance():
  losses = np.tile([[0.0, 0.0, 0.0], [0.0, 0.2, 0.4]], (100, 1))
  # means 0, 0.1, 0.2: of endless prompts they are the bound
  thresholds = (0.9, 0.5, 0.1)
  assert choose.forecast(thresholds, losses, 0.15, 10**9) == pytest.approx(
    0.3, abs=1e-3
  )
  assert 0.5 < choose.forecast(thresholds, losses, 0.1, 100) < 0.9
  assert choose.forecast(thresholds, losses, 0.3, 10**9) == 0.1
  assert choose.forecast(thresholds, losses + 0.5, 0.1, 100) == math.inf
  # 0.07 of 40 may be more of others
  floor = np.repeat([[0.0], [0.7]], [36, 4], axis=0)
  found = [
    choose.forecast((0.9,), np.tile(floor, (n, 1)), 0.1, 10**9)
    for n in (1, 1000)
  ]
  assert found == [math.inf, 0.9]


def test_the_final_grid_descends_and_is_densest_near_the_tolerance():
  best = choose.Tried(
    Candidate("softmax", (1,)), (0.9, 0.5, 0.1), (0.01, 0.08, 0.3), 0.45
  )
  grid = np.array(choose.final_grid(best, 0.1))
  assert (np.diff(grid) < 0).all() and grid[-1] > 0.0 and grid[0] <= 1.0
  assert {0.9, 0.5, 0.45} <= set(grid.tolist())
  # Loss 0.2, twice the tolerance, is at 0.28; what lies far beyond is left out.
  assert grid[-1] == pytest.approx(0.281818, abs=1e-5)
  near = ((grid > 0.4) & (grid < 0.7)).sum()
  assert near > len(grid) / 2
  cut = dataclasses.replace(
    best, thresholds=(0.0,), losses=(0.05,), threshold=0.0
  )
  assert choose.final_grid(cut, 0.1) == (0.0,)


def test_ways_are_told_by_their_seconds_and_8_bits_must_gain_clearly():
  def way(*args):
    return choose.Tried(Candidate("softmax", (1,)), *args)

  chosen = way((0.5,), (0.1,), 0.5, 1.0, 2.1)
  looked = way((), (), 0.4, 1.0, 2.7)
  without = way((0.5,), (0.3,), math.inf)
  assert [entry.gains for entry in (chosen, looked, without)] == [False] * 3
  for speedup, gains in ((2.1, True), (0.9, False)):
    assert (
      dataclasses.replace(chosen, speedup=speedup, end_to_end=1.2).gains
      == gains
    )
  narrow = dataclasses.replace(chosen.candidate, in_8_bits="layers")
  for whole, better in ((1.3, False), (1.5, True)):
    in_8_bits = dataclasses.replace(chosen, candidate=narrow, end_to_end=whole)
    assert (
      in_8_bits.score > dataclasses.replace(chosen, end_to_end=1.2).score
    ) == better
  choice = choose.Choice((looked, without, chosen), 2, (0.5,), 2.0, 20)
  assert choice.lines() == [
    "  softmax after layer 1: x2.10 as fast at threshold 0.5 (chosen)",
    "  softmax after layer 1: no threshold within the tolerance",
    "  softmax after layer 1: x2.70 in a first timing, at threshold 0.4",
    "  no cut decoder keeps the promise; exits: x2.10",
  ]
  cut = dataclasses.replace(
    chosen, thresholds=(0.0,), threshold=0.0, speedup=1.5
  )
  choice = choose.Choice((looked, chosen, cut), 1, (0.5,), 2.0, 20)
  lines = [line.strip() for line in choice.lines()]
  assert lines[1] == "cut after layer 1: x1.50 as fast at threshold 0"
  assert (
    lines[3] == "cut after layer 1: x1.50 under the same promise; exits: x2.10"
  )
  # Full depth in 8 bits is no way to leave.
  whole = Candidate("verified", (), in_8_bits="layers")
  whole = dataclasses.replace(
    chosen, candidate=whole, thresholds=(1.0,), threshold=1.0
  )
  assert choose.final_grid(whole, 0.1) == (1.0,)
  whole = dataclasses.replace(whole, speedup=3.0)
  way = "full depth, drafts off the prompt, matrices in 8 bits"
  lines = choose.Choice((chosen, whole), 1, (1.0,), 2.0, 20).lines()
  assert lines[0] == f"  {way}: x3.00 as fast at threshold 1 (chosen)"
  assert lines[-1] == "  no cut decoder keeps the promise; exits: x2.10"
  assert choose.Choice((whole,), 0, (1.0,), 2.0, 20).compared == ""
