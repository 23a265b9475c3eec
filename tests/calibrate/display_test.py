"""A calibration as a table."""

import dataclasses

import numpy as np

from calm.calibrate import calibrate, display, from_texts
from tests.calibrate import laws


def made(means=(0.01, 0.4)):
  values = np.random.default_rng(0).random((300, 2)) * 2.0 * np.array(means)
  return calibrate(values, [0.9, 0.5], tolerance=0.1, error_rate=0.05)


def test_a_calibration_is_a_table_and_a_promise_of_one_line():
  title, head, *table, promise = repr(found := made()).splitlines()
  assert title == "loss"  # of what, nobody said
  assert head.split() == [
    "threshold",
    "mean",
    "loss",
    "upper",
    "bound",
    "p-value",
    "certified",
  ]
  assert [line[0] for line in table] == [">", " "]
  assert promise.startswith("With probability at least 0.95 ")
  never = str(made((0.4, 0.4)))
  assert ">" not in never and "the full model is used (never)" in never
  columns = [
    tuple(laws.record(p.id, exit_layers=layers) for p in laws.prompts(2))
    for layers in ((4, 2, 0), (1, 1, 0))
  ]
  bare = laws.generations(2, grid=(0.9, 0.5))
  known = dataclasses.replace(bare, records=tuple(columns))
  head, *layered = display.table(found, known).splitlines()[1:]
  assert head.endswith("layers / token")
  # of tokens, not of padding
  assert [line.split()[-1] for line in layered] == ["3.00", "1.00"]
  assert display.table(found, bare) == display.table(found)


def test_knobs_are_called_by_their_names():
  full = [f"text {row}" for row in range(300)]
  base = [text if row % 100 else "another" for row, text in enumerate(full)]
  losses = from_texts(
    full, {"base": base, "tiny": ["x"] * 300}, metric="exact_match"
  )
  title, head, *_ = str(
    calibrate(losses, tolerance=0.1, error_rate=0.05)
  ).splitlines()
  assert title == "textual loss, exact_match" and head.split()[0] == "knob"
