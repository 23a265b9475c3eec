"""The page in a real browser: no complaints, figures to be seen, controls that work."""

import pytest

pytest.importorskip("matplotlib", reason="needs the extra 'report'")
pytest.importorskip("jinja2", reason="needs the extra 'report'")
pytest.importorskip("jax", reason="needs the extra 'decode'")

from calm.paper import page, sections
from tests.paper import browser, samples

if browser.executable() is None:
  pytest.skip("needs Chromium: apt-get install chromium", allow_module_level=True)

TOKENS = "[...document.querySelectorAll('.example:nth-of-type(1) .tokens .k')]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp("report")
  every = sections.sections([samples.report()])
  page.write(path, page.Page("made up", (("model", "none"),), every, 4))
  return path


@pytest.fixture(scope="module")
def tab(folder):
  with browser.open_page(folder / "index.html") as opened:
    opened.size(1200, 900)
    yield opened


@pytest.fixture(autouse=True)
def no_complaints(tab):
  yield
  tab.media()
  tab.size(1200, 900)
  assert tab.complaints() == []


def layers(tab):
  return tab.evaluate(f"{TOKENS}.map(span => Number(span.dataset.l))")


def test_nothing_is_fetched_but_the_page(tab, folder):
  assert tab.requests() == [(folder / "index.html").as_uri()]


def test_every_figure_is_seen(tab):
  boxes = tab.evaluate(
    "[...document.querySelectorAll('figure svg')].map(svg => {"
    " const box = svg.getBoundingClientRect(); return [box.width, box.height]; })"
  )
  assert len(boxes) > 5
  assert all(300 < width < 700 and 200 < height < 600 for width, height in boxes)


def test_the_slider_recolours_the_outputs(tab):
  before = layers(tab)
  assert before[:2] == [4, 2]  # the calibrated threshold, 0.6
  tab.evaluate("document.querySelector('.slider').focus()")
  tab.press("ArrowRight")
  assert layers(tab)[:2] == [4, 1]
  assert tab.evaluate("document.querySelector('output.threshold').textContent") == "0.3"
  assert tab.evaluate("document.querySelector('.example .d').textContent") != "0.00"
  tab.press("Home")
  assert layers(tab)[:2] == [4, 3]
  assert tab.evaluate("document.querySelector('.example .d').textContent") == "0.00"
  colours = tab.evaluate(f"{TOKENS}.map(span => getComputedStyle(span).backgroundColor)")
  assert colours[0] != colours[1] and "rgba(0, 0, 0, 0)" not in colours


def test_another_measure_starts_at_its_own_threshold(tab):
  tab.evaluate(
    "{ const select = document.querySelector('.measure'); select.value = '1';"
    " select.dispatchEvent(new Event('change')); }"
  )
  assert tab.evaluate("document.querySelector('.slider').value") == "1"
  assert layers(tab)[:2] == [4, 2]


def test_layer_numbers_can_be_shown(tab):
  content = f"getComputedStyle({TOKENS}[0], '::after').content"
  assert tab.evaluate(content) == "none"
  tab.evaluate("document.querySelector('.numbers').focus()")
  tab.press(" ")
  assert tab.evaluate(content) == '"4"'
  tab.press(" ")
  tab.media(medium="print")  # paper has no tooltips
  assert tab.evaluate(content) == '"4"'


def test_dark_is_dark_and_readable(tab):
  ink = (
    "getComputedStyle(document.body).color + getComputedStyle(document.body).backgroundColor"
  )
  light = tab.evaluate(ink)
  tab.media(dark=True)
  dark = tab.evaluate(ink)
  assert light != dark
  axis = "getComputedStyle(document.querySelector('figure svg text')).fill"
  assert tab.evaluate(axis) == tab.evaluate("getComputedStyle(document.body).color")
  tab.media(dark=True, medium="print")
  assert tab.evaluate(ink) == light


@pytest.mark.parametrize("width", [375, 768, 1200])
def test_no_width_scrolls_the_page_sideways(tab, width):
  tab.size(width, 844)
  assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
