"""DataFrames of pandas and polars, in and out."""

import numpy as np
import pytest

from calm.calibrate import SequenceLosses, Support, calibrate
from calm.calibrate.losses import frames

RATES = {"tolerance": 0.1, "error_rate": 0.05}
VALUES = (np.random.default_rng(0).random((200, 2)) < [0.02, 0.4]) * 1.0
IDS = [f"p{row}" for row in range(200)]


class Table(dict):
  """What a DataFrame is to `frames`: columns by name."""

  @property
  def columns(self):
    return list(self)


def columns(**more):
  # Not in the order of the grid.
  return {"0.5": VALUES[:, 1].tolist(), "id": IDS, "0.9": VALUES[:, 0].tolist(), **more}


@pytest.fixture(params=["pandas", "polars", "plain"])
def make(request):
  if request.param == "plain":
    return Table
  return pytest.importorskip(request.param).DataFrame


def test_a_frame_of_losses_is_calibrated(make):
  # 0 and 1 alone, and nothing declared: taken for binary.
  support = Support(binary=True)
  losses = SequenceLosses(VALUES, [0.9, 0.5], support, kind="loss", ids=tuple(IDS))
  expected = calibrate(losses, **RATES)
  found = calibrate(make(columns()), **RATES)
  assert found == expected and found.threshold == 0.9
  told = calibrate(make(columns()), support=Support(), **RATES)
  assert told.method == "betting_fixed_level"
  grouped = calibrate(make(columns(group=[f"g{row // 2}" for row in range(200)])), **RATES)
  assert grouped.clusters and grouped.num_examples == 100


def test_columns_that_are_no_thresholds_are_refused(make):
  with pytest.raises(ValueError, match=r"named by thresholds, `id` or `group`, got 'score'"):
    calibrate(make(columns(score=[0.0] * 200)), **RATES)
  with pytest.raises(ValueError, match="a column a threshold"):
    calibrate(make({"id": IDS}), **RATES)
  with pytest.raises(ValueError, match=r"column '0.9'` to be real numbers"):
    calibrate(make({"0.9": IDS}), **RATES)
  with pytest.raises(ValueError, match=r"in \[0, 1\]"):
    calibrate(make({"9": [0.0] * 40}), **RATES)


def test_two_columns_of_one_threshold_are_refused(make):
  with pytest.raises(
    ValueError, match=r"Expected one column .* a threshold, got '0.9' and '0.90' .*0\.9; "
  ):
    calibrate(make(columns(**{"0.90": [0.0] * 200})), **RATES)


def test_arrays_are_no_frames():
  assert not frames.is_frame(VALUES) and not frames.is_frame(VALUES.tolist())


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_a_calibration_is_a_frame(library):
  pytest.importorskip(library)
  found = calibrate(VALUES, [0.9, 0.5], **RATES)
  frame = found.to_frame(library)
  assert type(frame).__module__.startswith(library) and frame.shape == (2, 8)
  assert list(frame["threshold"]) == [0.9, 0.5] and list(frame["rejected"]) == [True, False]
  np.testing.assert_allclose(np.asarray(frame["mean"]), VALUES.mean(axis=0))
  # What comes out goes in again.
  table = {str(row.threshold): VALUES[:, place] for place, row in enumerate(found.rows)}
  assert calibrate(type(frame)(table), **RATES).threshold == found.threshold


def test_rows_without_a_group_are_refused_and_not_one_cluster(make):
  groups = [*(f"g{row}" for row in range(100)), *[None] * 100]
  with pytest.raises(
    ValueError, match=r"name the cluster of every row, got .* 100 rows without"
  ):
    calibrate(make(columns(group=groups)), **RATES)


def test_missing_groups_of_pandas_are_refused():
  pandas = pytest.importorskip("pandas")
  for kind, names in (
    ("object", ["a", float("nan")]),
    ("string", ["a", pandas.NA]),
    ("datetime64[ns]", ["2026-01-01", pandas.NaT]),
  ):
    table = pandas.DataFrame(columns()).assign(group=pandas.array(names * 100, dtype=kind))
    with pytest.raises(ValueError, match="name the cluster of every row"):
      calibrate(table, **RATES)
  numbered = pandas.DataFrame(columns()).assign(group=np.arange(200) // 2)
  assert calibrate(numbered, **RATES).num_examples == 100
