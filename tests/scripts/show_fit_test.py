"""The rows of `calm fit`'s table, and the folders that it starts from."""

import argparse
import json

import numpy as np
import pytest

pytest.importorskip(
  "orbax.checkpoint", reason="Orbax (the `train` extra) is not installed"
)
pytest.importorskip(
  "matplotlib", reason="matplotlib (the `report` extra) is not installed"
)

from calm import checkpoints
from scripts import show_fit

CANDIDATE = {"measure": "softmax", "exit_layers": [2, 4], "temperature": 4.0}
PAIR = {"full": 4.0, "early": 2.0, "speedup": 2.0, "end_to_end": 1.5}
MEAN = {"value": 0.0512, "margin": 0.0201, "count": 9}
RESULT = {
  "choice": {"chosen": 0, "tried": [{"candidate": CANDIDATE}]},
  "last": {
    "layers": 3.25,
    "risk": MEAN,
    "quality_full": MEAN,
    "quality_early": None,
  },
  "seconds": {"single": PAIR, "batched": None},
  "reason": "",
  "exact": None,
  "learned": {"seconds": 12.4},
  "num_layers": 8,
}


CHOSEN = "softmax after layers 2,4, decaying with tau 4"


def test_a_row_says_what_was_chosen_and_measured():
  row = show_fit.row("packed", "debian_qa", "frozen", RESULT)
  measured = {"cut", "layers at 0.05, 0.2", "full texts equal"}
  assert (
    set(row) | measured == set(show_fit.COLUMNS) and row["s learning"] == 12
  )
  assert (row["task"], row["exits"], row["chosen"]) == ("qa", "frozen", CHOSEN)
  assert (
    row["risk, 0.1 promised"] == "0.051 ± 0.020" and row["quality served"] == ""
  )
  assert row["speed-up"] == 2.0 and row["in batches"] is None
  full = {**RESULT, "reason": "slower", "seconds": None}
  assert (
    show_fit.row("packed", "debian_qa", "stored", full)["chosen"]
    == "full depth"
  )


def test_fits_are_put_into_one_table_whenever_they_are_made(tmp_path):
  arguments = argparse.Namespace(
    output=tmp_path / "fit.json",
    rows=600,
    budget="3m",
    models=["packed"],
    ways=["frozen"],
  )
  keys = (
    ("plain", "a", "x"),
    ("packed", "a", "x"),
    ("packed", "b", "x"),
    ("plain", "a", "x"),
  )
  for key in keys:
    show_fit.record(
      arguments, dict(zip(("model", "task", "exits"), key, strict=True))
    )
  table = json.loads((tmp_path / "fit.json").read_text("utf-8"))
  rows = [(row["model"], row["task"]) for row in table["rows"]]
  assert rows == [("packed", "a"), ("packed", "b"), ("plain", "a")]


def test_the_packed_weights_open_from_a_hugging_face_folder(tmp_path):
  folder = show_fit.save_packed(argparse.Namespace(work=tmp_path))
  opened = checkpoints.load(folder)
  packed = checkpoints.load(checkpoints.PACKED)
  assert opened.exits_trained is False and not opened.config.exit_classifier
  assert opened.vocabulary == packed.vocabulary
  name = "token_embedder"
  for key, leaf in packed.params[name].items():
    np.testing.assert_array_equal(opened.params[name][key], leaf)
  assert json.loads((folder / "config.json").read_text())["model_type"] == "t5"
