"""Ranking, grids and forecasts by hand; which head and which drafts are timed and taken."""

import dataclasses
import math

import numpy as np
import pytest

from calm import inference
from calm.calibrate import Prompt
from calm.fitting import choose
from calm.fitting.choose import Candidate
from calm.inference import timing


@pytest.fixture
def tokens():
  """Two texts of two tokens under three layers: what a layer says, and how sure it is."""
  sure = np.array([[0.9, 0.95, 0.0], [0.2, 0.8, 0.0], [0.6, 0.7, 0.0], [0.1, 0.3, 0.0]])
  agrees = np.array([[1, 1, 1], [0, 1, 1], [0, 1, 1], [0, 0, 1]], bool)
  return choose.Reading({"softmax": sure}, agrees, np.array([0, 1, 0, 1]))


def test_exits_and_losses_of_a_set_of_layers(tokens):
  levels = np.array([0.95, 0.6, 0.15])
  depths, losses = choose.simulate(tokens, Candidate("softmax", (1, 2)), levels, 2)
  assert depths.tolist() == [[2, 3, 3, 3], [1, 2, 1, 3], [1, 1, 1, 2]]
  # In each text the share from the first changed word on, two thirds of it.
  assert losses == pytest.approx([0.0, 1 / 3, 1 / 2])
  depths, losses = choose.simulate(tokens, Candidate("softmax", (2,)), levels, 2)
  assert depths.tolist() == [[2, 3, 3, 3], [2, 2, 2, 3], [2, 2, 2, 2]]
  assert losses == pytest.approx([0.0, 0.0, 1 / 6])


def test_a_decaying_threshold_falls_with_the_position(tokens):
  candidate = Candidate("softmax", (1, 2), temperature=4.0)
  # Eq. 5 at t = 0 and 1 of N = 2: 0.9 * 0.6 + 0.1 = 0.64, then 0.5535.
  depths, _ = choose.simulate(tokens, candidate, np.array([0.6]), 2)
  assert depths.tolist() == [[1, 2, 2, 3]]


def test_layer_sets_are_of_real_layers_and_few():
  for count in (2, 3, 8, 24):
    sets = choose.layer_sets(count)
    assert tuple(range(1, count)) in sets and len(sets) == len(set(sets)) < 60
    assert all(1 <= layer < count for layers in sets for layer in layers)
    assert all(list(layers) == sorted(set(layers)) for layers in sets)
  assert {(3, 4), (2, 3, 4, 5), (2, 4), (3,)} <= set(choose.layer_sets(8))


def test_finalists_hold_the_best_of_every_measure_and_the_other_schedule():
  ranked = [
    choose.Tried(Candidate(measure, layers, tau), threshold=0.5)
    for measure, layers, tau in (
      ("softmax", (2,), None),
      ("softmax", (2,), 8.0),
      ("softmax", (2,), 4.0),
      ("softmax", (3,), None),
      ("state", (3,), 4.0),
      ("classifier", (1,), None),
    )
  ]
  got = choose.finalists(ranked, 4)
  # The best of each measure; of the first one the cheaper of those that decay.
  assert got == [ranked[0], ranked[4], ranked[5], ranked[1]]
  falling_first = choose.finalists([ranked[1], ranked[2], ranked[0]], 2)
  assert falling_first == [ranked[1], ranked[0]]
  # Room for one more goes to layers that none has yet.
  more = choose.Tried(Candidate("softmax", (1, 2)), threshold=0.5)
  assert choose.finalists([*ranked, more], 5) == [*got, more]


def test_the_forecast_is_where_the_bound_crosses_the_tolerance():
  losses = np.tile([[0.0, 0.0, 0.0], [0.0, 0.2, 0.4]], (100, 1))
  thresholds = (0.9, 0.5, 0.1)
  # Means 0, 0.1, 0.2: with endless prompts the bound is the mean.
  assert choose.forecast(thresholds, losses, 0.15, 10**9) == pytest.approx(0.3, abs=1e-3)
  assert 0.5 < choose.forecast(thresholds, losses, 0.1, 100) < 0.9
  assert choose.forecast(thresholds, losses, 0.3, 10**9) == 0.1
  assert choose.forecast(thresholds, losses + 0.5, 0.1, 100) == math.inf


def test_the_final_grid_descends_and_is_densest_near_the_tolerance():
  best = choose.Tried(Candidate("softmax", (1,)), (0.9, 0.5, 0.1), (0.01, 0.08, 0.3), 0.45)
  grid = np.array(choose.final_grid(best, 0.1))
  assert (np.diff(grid) < 0).all() and grid[-1] > 0.0 and grid[0] <= 1.0
  assert {0.9, 0.5, 0.45} <= set(grid.tolist())
  # Loss 0.2, twice the tolerance, is at 0.28; what lies far beyond is left out.
  assert grid[-1] == pytest.approx(0.281818, abs=1e-5)
  near = ((grid > 0.4) & (grid < 0.7)).sum()
  assert near > len(grid) / 2


def test_a_way_that_was_looked_at_first_is_told_beside_the_others_first_looks():
  """Its x2.7 is of other rounds than the chosen one's x2.1, which was x3.1 in them."""
  way = lambda *args: choose.Tried(Candidate("softmax", (1,)), *args)
  chosen = way((0.5,), (0.1,), 0.5, 1.0, 2.1, 3.1)
  looked = way((), (), 0.4, 1.0, 2.7, 2.7)
  without = way((0.5,), (0.3,), math.inf, math.nan, math.nan, 2.9)
  assert [entry.gains for entry in (chosen, looked, without)] == [False] * 3
  assert dataclasses.replace(chosen, end_to_end=1.2).gains
  assert not dataclasses.replace(chosen, speedup=0.9, end_to_end=1.2).gains
  narrow = dataclasses.replace(chosen.candidate, in_8_bits="layers")
  for whole, better in ((1.3, False), (1.5, True)):
    in_8_bits = dataclasses.replace(chosen, candidate=narrow, end_to_end=whole)
    assert (in_8_bits.score > dataclasses.replace(chosen, end_to_end=1.2).score) == better
  choice = choose.Choice((looked, without, chosen), 2, (0.5,), 2.0, 20)
  assert choice.lines() == [
    "  softmax after layer 1: x2.10 as fast at threshold 0.5, x3.10 in a first timing (chosen)",
    "  softmax after layer 1: no threshold within the tolerance",
    "  softmax after layer 1: x2.70 in a first timing, at threshold 0.4",
  ]


PROMPTS = [Prompt(text, text) for text in ("some words", "other words", "more of them")]


def silent(share, text):
  del share, text


@pytest.mark.parametrize(("speedup", "pays"), [(1.2, True), (1.01, False), (0.8, False)])
def test_a_head_in_8_bits_is_taken_where_it_is_clearly_faster(
  model, monkeypatch, speedup, pays
):
  """Both heads are timed on the same prompts."""
  decoded, real, measured = [], inference.Predictor.decode, inference.timing.measure

  def note(self, *arguments):
    decoded.append(self.options.head_dtype)
    return real(self, *arguments)

  def measure(*arguments, **options):
    found = measured(*arguments, **options, rounds=1)
    row = dataclasses.replace(found.rows[1], speedup=speedup)
    return dataclasses.replace(found, rows=(found.rows[0], row))

  monkeypatch.setattr(inference.Predictor, "decode", note)
  monkeypatch.setattr(inference.timing, "measure", measure)
  found, said = choose.fastest_head(model, PROMPTS, silent)
  assert found.options.head_dtype == ("int8" if pays else None)
  assert f"x{speedup:.2f}" in said and ("read in 8 bits;" in said) == pays
  assert decoded.count(None) == decoded.count("int8") == len(decoded) / 2 > 0


def test_a_small_head_is_not_timed(model, monkeypatch):
  assert not choose.has_large_head(model)
  monkeypatch.setattr(choose, "LEAST_NUMBERS", 1)
  assert choose.has_large_head(model)
  assert not choose.has_large_head(model.with_options(head_dtype="int8"))


@pytest.mark.parametrize(
  ("alone", "batched", "served"), [(1.5, 1.1, True), (1.5, 0.9, False), (0.9, 1.1, False)]
)
def test_drafts_are_served_where_they_are_faster(model, monkeypatch, alone, batched, served):
  pair = lambda size, x: timing.Pair(size, 3, x, 1.0, x, x)

  def measure(predictor, texts, threshold, *, rule, base):
    assert texts == [prompt.input for prompt in PROMPTS] and threshold == 1.0
    assert rule == inference.exact_rule(base) and base is predictor
    return timing.Seconds(pair(1, alone), pair(8, batched))

  monkeypatch.setattr(inference.timing, "beside_full_depth", measure)
  assert bool(choose.faster_exact(model, PROMPTS)) == served
  coded = model.with_options(weights_dtype="int8")  # states are rounded to few bits
  assert choose.faster_exact(coded, PROMPTS) is None
