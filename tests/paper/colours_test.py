"""Series of figures can be told apart by deuteranopes and protanopes, and on both pages."""

import itertools
import pathlib
import re

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="needs the extra 'report'")
pytest.importorskip("jax", reason="needs the extra 'decode'")

from calm.paper import bench, figures
from tests.inference import outputs_test

# Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB.
SEEN_BY = {
  "everybody else": np.eye(3),
  "deuteranopes": np.array(
    [
      [0.367322, 0.860646, -0.227968],
      [0.280085, 0.672501, 0.047413],
      [-0.011820, 0.042940, 0.968881],
    ]
  ),
  "protanopes": np.array(
    [
      [0.152286, 1.052583, -0.204868],
      [0.114503, 0.786281, 0.099216],
      [-0.003882, -0.048116, 1.051998],
    ]
  ),
}
_XYZ = np.array(
  [
    [0.4124564, 0.3575761, 0.1804375],
    [0.2126729, 0.7151522, 0.0721750],
    [0.0193339, 0.1191920, 0.9503041],
  ]
)
# CIE 1976: 2.3 is just noticed side by side; thin lines and small marks want far more.
FAR = 20.0
_STYLES = pathlib.Path(figures.__file__).parent / "templates" / "page.css.j2"
PAGES = re.findall(r"--paper: (#[0-9a-f]{6})", _STYLES.read_text("utf-8"))


def lab(colour: str, seen_by: str) -> np.ndarray:
  rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255.0
  linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
  xyz = _XYZ @ np.clip(SEEN_BY[seen_by] @ linear, 0.0, 1.0) / (_XYZ @ np.ones(3))
  x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16.0 / 116.0)
  return np.array([116.0 * y - 16.0, 500.0 * (x - y), 200.0 * (y - z)])


def distance(a: str, b: str, seen_by: str) -> float:
  return float(np.linalg.norm(lab(a, seen_by) - lab(b, seen_by)))


def drawn() -> dict[str, figures.Style]:
  """Every series that one figure may have: measures, static, oracle and three variants."""
  variants = ("softmax@3,4", "classifier@3,4", "state@2")
  return figures.styles_of([*bench.MEASURES, *variants, "static", "oracle"])


def seen(colour: str, paper: str) -> str:
  """A series' colour on a page."""
  return figures.ON_DARK.get(colour, colour) if paper == PAGES[1] else colour


@pytest.mark.parametrize("paper", PAGES)
@pytest.mark.parametrize("seen_by", SEEN_BY)
def test_no_two_series_look_alike(seen_by, paper):
  for (a, one), (b, other) in itertools.combinations(drawn().items(), 2):
    pair = seen(one.colour, paper), seen(other.colour, paper)
    assert distance(*pair, seen_by) >= FAR, (a, b)
  for one, other in itertools.combinations(figures.LINES, 2):
    assert distance(seen(one[0], paper), seen(other[0], paper), seen_by) >= FAR


def test_no_two_series_share_a_marker():
  markers = [style.marker for style in drawn().values()]
  assert len(set(markers)) == len(markers)


def test_series_are_seen_on_both_pages():
  """WCAG 2.2 asks 3 of what is drawn."""
  assert len(PAGES) == 2
  for style in drawn().values():
    for paper in PAGES:
      assert outputs_test.contrast(seen(style.colour, paper), paper) >= 3.0, (style, paper)
