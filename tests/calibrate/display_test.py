"""A calibration as a table, as HTML, as a DataFrame and as a picture."""

import dataclasses

import numpy as np
import pytest

from calm.calibrate import calibrate, display, from_texts
from tests.calibrate import laws


def made(means=(0.01, 0.4)):
  values = np.random.default_rng(0).random((300, 2)) * 2.0 * np.array(means)
  return calibrate(values, [0.9, 0.5], tolerance=0.1, error_rate=0.05)


def lines_of(axes):
  return {str(line.get_label()): line for line in axes.get_lines()}


def test_a_plot_shows_the_grid_the_bounds_and_what_is_certified():
  pytest.importorskip("matplotlib")
  axes = (found := made()).plot()
  lines = lines_of(axes)
  np.testing.assert_array_equal(lines["mean loss"].get_ydata(), found.column("mean"))
  assert lines["certified"].get_xdata().tolist() == [0.9]
  assert lines["chosen: 0.9"].get_xdata().tolist() == [0.9]
  title = "Certified down to threshold 0.9: at most 0.1, with probability 0.95"
  assert axes.get_title() == title and axes._repr_png_().startswith(b"\x89PNG\r\n")
  nothing = made((0.4, 0.4)).plot(axes.figure.add_subplot())
  assert nothing.get_title().startswith("Nothing is certified at a tolerance of 0.1")
  assert not any("chosen" in name for name in lines_of(nothing))
  axes = made().plot(layers=[7.5, 3.25])
  assert lines_of(axes)["chosen: 0.9"].get_xdata().tolist() == [7.5]
  assert axes.get_title().startswith("Certified down to 7.50 layers a token")
  rows = [
    tuple(laws.record(p.id, exit_layers=layers) for p in laws.prompts(2))
    for layers in ((4, 2, 0), (1, 1, 0))
  ]
  bare = laws.generations(2, grid=(0.9, 0.5))
  lines = lines_of(made().plot(layers=dataclasses.replace(bare, records=tuple(rows))))
  assert lines["mean loss"].get_xdata().tolist() == [3.0, 1.0]  # of the tokens that are there
  with pytest.raises(ValueError, match=r"Expected `layers` of \[2\].* shape \(0,\)"):
    made().plot(layers=bare)
  with pytest.raises(ValueError, match=r"Expected `layers` of \[2\].* shape \(0,\)"):
    made().plot(layers=dataclasses.replace(bare, records=(rows[0][:1], rows[1])))


def test_a_calibration_is_a_table_and_a_promise_of_one_line():
  found = made()
  assert "threshold=0.9" in repr(found) and "1 of 2 thresholds certified" in repr(found)
  title, head, *table, promise = str(found).splitlines()
  assert title == "loss"  # of what, nobody said
  assert head.split() == ["threshold", "mean", "loss", "upper", "bound", "p-value", "certified"]
  assert [line[0] for line in table] == [">", " "]
  layered = display.table(found, [7.5, 3.25]).splitlines()
  assert layered[1] == f"{head}  layers / token"
  assert [line.split()[-1] for line in layered[2:]] == ["7.50", "3.25"]
  assert promise.startswith("With probability at least 0.95 ")
  page = found._repr_html_()
  assert page.count("<tr") == 3 and page.count("<th ") == 5 and f">{promise}</p>" in page
  never = str(made((0.4, 0.4)))
  assert ">" not in never and "the full model is used (never)" in never


def test_knobs_are_called_by_their_names_and_frames_have_a_column_of_them(monkeypatch):
  full = [f"text {row}" for row in range(300)]
  base = [text if row % 100 else "another" for row, text in enumerate(full)]
  losses = from_texts(full, {"base": base, "tiny": ["x"] * 300}, metric="exact_match")
  found = calibrate(losses, tolerance=0.1, error_rate=0.05)
  title, head, *_ = str(found).splitlines()
  assert title == "textual loss, exact_match" and head.split()[0] == "knob"
  pytest.importorskip("matplotlib")
  axes = found.plot()
  assert [text.get_text() for text in axes.get_xticklabels()] == ["base", "tiny"]
  library = type("pandas", (), {"DataFrame": dict})
  monkeypatch.setattr(display.importlib, "import_module", lambda name: library)
  assert found.to_frame()["knob"] == ["base", "tiny"]
  assert made().to_frame()["threshold"] == [0.9, 0.5] and "knob" not in made().to_frame()
  with pytest.raises(ValueError, match=r"`library` 'pandas' or 'polars', got 'dask'"):
    made().to_frame("dask")
