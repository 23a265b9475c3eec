"""The page, its figures and tables from made-up results; no model is
decoded.
"""

import csv
import io
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree

import pytest

pytest.importorskip("matplotlib", reason="needs the extra 'report'")
pytest.importorskip("jinja2", reason="needs the extra 'report'")
pytest.importorskip("jax", reason="needs the extra 'decode'")

from calm.paper import page
from calm.paper import sections as sections_lib
from tests import renderers_test
from tests.paper import samples


@pytest.fixture(scope="module")
def sections():
  return sections_lib.sections([samples.report()])


@pytest.fixture(scope="module")
def made(sections):
  return page.Page("made <up>", (("model", "none & <nothing>"),), sections, 4)


@pytest.fixture(scope="module")
def text(made):
  return page.render(made)


def test_the_page_is_whole_and_fetches_nothing(sections, text):
  given = renderers_test.Page(text).attributes
  links = [
    value for name, value in given if name in ("src", "href", "xlink:href")
  ]
  assert all(link.startswith(("data:", "#")) for link in links)
  assert "@import" not in text and "url(http" not in text
  ids = [value for name, value in given if name == "id"]
  assert len(ids) == len(set(ids))
  used = set(re.findall(r"url\(#([^)]+)\)", text))
  assert used and used | {link[1:] for link in links if link[0] == "#"} <= set(
    ids
  )
  assert "<up>" not in text and "none &amp; &lt;nothing&gt;" in text
  # not from a prompt's text
  assert "</script>" not in re.sub(r"</script>\n", "", text)
  assert [section.name for section in sections] == list(sections_lib.SECTIONS)
  for section in sections:
    assert section.figures or section.tables or section.panels
    shown = [
      *(f.name for f in section.figures),
      *(f"table-{t.name}" for t in section.tables),
    ]
    assert set(shown) <= set(ids)


def test_files_are_written_with_figures_in_the_pages_ink(
  tmp_path, made, sections
):
  said = page.write(tmp_path / "report", made)
  drawn = [figure for section in sections for figure in section.figures]
  assert said.startswith(f"{len(drawn)} figures")
  assert (tmp_path / "report" / "index.html").read_text("utf-8") == page.render(
    made
  )
  for figure in drawn:
    ElementTree.parse(tmp_path / "report" / "figures" / f"{figure.name}.svg")
    assert figure.png.startswith(b"\x89PNG")
    assert page.INK in figure.svg and page.INK not in figure.inline
    head = figure.inline[: figure.inline.index(">")]
    assert "viewBox" in head and "height=" not in head and "width=" not in head
  for table in (table for section in sections for table in section.tables):
    written = (tmp_path / "report" / "tables" / f"{table.name}.csv").read_text(
      "utf-8"
    )
    rows = list(csv.reader(io.StringIO(written)))
    assert rows == [list(table.columns), *map(list, table.rows)]


def test_the_sliders_recolour_the_outputs_in_a_browser(tmp_path, text):
  chromium = shutil.which("chromium") or pytest.skip(
    "needs Chromium: apt-get install chromium"
  )
  shown = {}
  for slider, value in (("promised", 1), ("slider", 0)):
    move = f"const s = document.querySelector('.{slider}'); s.value = {value};"
    move += " s.dispatchEvent(new Event('input'))"
    (tmp_path / "page.html").write_text(
      f"{text}<script>{move}</script>", "utf-8"
    )
    flags = [
      "--headless",
      "--no-sandbox",
      "--disable-gpu",
      "--enable-logging=stderr",
    ]
    command = [
      chromium,
      *flags,
      "--dump-dom",
      (tmp_path / "page.html").as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "CONSOLE" not in done.stderr
    layers = re.findall(r'data-l="(\d)"', done.stdout)[:2]
    promise = re.search(r'class="promise">([^<]*)', done.stdout)
    assert promise is not None
    shown[slider] = layers, promise[1][:21]
  assert shown == {
    "promised": (["4", "1"], "δ = 0.2: at threshold"),
    "slider": (["4", "4"], "chosen by hand: no pr"),
  }
