import numpy as np
import pytest

from calm.calibrate import calibrate, views


def made(means=(0.01, 0.4)):
  values = np.random.default_rng(0).random((300, 2)) * 2.0 * np.array(means)
  return calibrate(values, [0.9, 0.5], tolerance=0.1, error_rate=0.05)


def test_a_plot_shows_the_grid_the_bounds_and_what_is_certified(tmp_path):
  pytest.importorskip("matplotlib")
  found = made()
  axes = found.plot()
  lines = {line.get_label(): line for line in axes.get_lines()}
  np.testing.assert_array_equal(lines["mean loss"].get_ydata(), found.column("mean"))
  assert lines["certified"].get_xdata().tolist() == [0.9]
  assert (
    lines["tolerance 0.1"].get_ydata()[0] == 0.1 and "0.9 is the lowest of" in axes.get_title()
  )
  axes.figure.savefig(tmp_path / "plot.png")
  assert (tmp_path / "plot.png").stat().st_size > 1000
  assert (
    made((0.4, 0.4)).plot(axes.figure.add_subplot()).get_title()
    == "none of 2 thresholds is certified"
  )


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_a_frame_has_a_line_a_threshold(library):
  pytest.importorskip(library)
  frame = made().to_frame(library)
  assert list(frame["threshold"]) == [0.9, 0.5] and list(frame["rejected"]) == [True, False]


def test_a_library_that_is_not_there_is_named(monkeypatch):
  class Frame:
    def __init__(self, columns):
      self.columns = columns

  def found(name):
    if name != "pandas":
      raise ModuleNotFoundError(name)
    return type("pandas", (), {"DataFrame": Frame})

  monkeypatch.setattr(views.importlib, "import_module", found)
  assert made().to_frame().columns["threshold"] == [0.9, 0.5]
  with pytest.raises(ModuleNotFoundError, match="'polars', which is not installed"):
    made().to_frame("polars")
  with pytest.raises(ModuleNotFoundError, match="'matplotlib', which is not installed"):
    made().plot()
  with pytest.raises(ValueError, match=r"`library` 'pandas' or 'polars', got 'dask'"):
    made().to_frame("dask")
