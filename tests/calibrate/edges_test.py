"""Edges at which a promise used to break: declared ranges, groups, ids, tables of all kinds."""

import dataclasses
import math

import numpy as np
import pytest

from calm.calibrate import SequenceLosses, Support, calibrate
from tests.calibrate import laws

GRID = np.array([0.9, 0.5])
RATES = dict(tolerance=0.1, error_rate=0.05)


def zeros(count=60, **fields):
  return SequenceLosses(np.zeros((count, 2)), GRID, **fields)


@pytest.mark.parametrize("method", ["paper", "convex_order"])
def test_losses_above_1_are_not_clipped_to_1(method):
  wide = Support(0.0, 2.0)
  generator = np.random.default_rng(0)
  values = 2.0 * laws.bernoulli(generator, 0.045, (400, 1))  # risk 0.09
  with pytest.raises(ValueError, match=r"range \[0.0, 2.0\]; divide losses and tolerance"):
    calibrate(values, [0.5], tolerance=0.08, error_rate=0.05, support=wide, method=method)
  found = calibrate(values / 2.0, [0.5], tolerance=0.04, error_rate=0.05, method=method)
  assert not found.certified


@pytest.mark.parametrize("missing", [None, math.nan, 1.5, True, ["a"]])
def test_a_missing_group_is_refused_and_not_one_cluster(missing):
  values = np.concatenate([np.zeros((100, 1)), np.ones((1000, 1))])
  groups = [*(f"g{row}" for row in range(100)), *[missing] * 1000]
  with pytest.raises(ValueError, match=r"`groups` to name the cluster of every row.*row 100"):
    calibrate(values, [0.5], **RATES, groups=groups)
  with pytest.raises(ValueError, match="1000 rows without a name"):
    SequenceLosses(values, [0.5], groups=groups)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"ids": tuple(f"p{i}" for i in range(30))}, "`ids` for each of the 60 rows, got 30"),
    ({"ids": ("a",) * 60}, r"`ids` to be unique, got \['a'\] more than once"),
    ({"ids": tuple(range(60))}, r"`ids` to be texts, got 0 \(int\)"),
    ({"groups": ("a",) * 59}, "each of the 60 rows, got 59"),
    ({"support": (0, 1)}, "`support` to be a `Support`"),
    ({"support": {"lower": 0}}, "`support` to be a `Support`"),
  ],
)
def test_losses_are_checked_where_they_are_made(fields, message):
  with pytest.raises(ValueError, match=message):
    zeros(**fields)
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(zeros(), **fields)


@pytest.mark.parametrize(
  ("values", "message"),
  [
    (np.ma.masked_array(np.zeros((60, 2)), mask=np.eye(60, 2)), "masked"),
    (np.zeros((60, 2), complex), "real numbers, got an array of complex128"),
    (np.zeros((60, 2), object), "real numbers, got an array of object"),
    (np.full((60, 2), "0.1"), "real numbers, got an array of <U3"),
    ([[0.0], [0.0, 1.0]], "rows of several lengths"),
    (np.zeros(60), r"one row a prompt, one column a threshold"),
    (np.zeros((0, 2)), "n at least 1"),
  ],
)
def test_only_tables_of_real_numbers_are_losses(values, message):
  with pytest.raises(ValueError, match=message):
    calibrate(values, GRID, **RATES)
  with pytest.raises(ValueError, match=message):
    SequenceLosses(values, GRID)


def test_the_full_model_is_promised_nothing_where_losses_say_nothing_of_it():
  plain = calibrate(np.ones((100, 1)), [0.5], **RATES)
  assert "nothing is promised of its loss" in plain.guarantee
  textual = calibrate(SequenceLosses(np.ones((100, 1)), [0.5], kind="textual"), **RATES)
  assert "against itself is 0 by definition" in textual.guarantee


def test_a_range_above_the_tolerance_is_not_a_matter_of_how_many():
  losses = SequenceLosses(np.full((5, 1), 0.3), [0.5], Support(0.2, 1.0))
  found = calibrate(losses, tolerance=0.1, error_rate=0.05)
  assert not found.certified and "too few" not in found.reason
  assert found.reason.startswith("Nothing is certified: the first threshold 0.5 already fails")
