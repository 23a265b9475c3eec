"""Text of others is shown as text: every renderer of the package against every
kind of text.
"""

import contextlib
import dataclasses
import html.parser
import io
import pathlib
import re
import unicodedata
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="needs the extra 'report'")
pytest.importorskip("jinja2", reason="needs the extra 'report'")
pytest.importorskip("jax", reason="needs the extra 'decode'")

from rich import console as rich_console

from calm.calibrate import calibrate
from calm.commands import run as run_lib
from calm.console import print_text, sanitize
from calm.inference import outputs
from calm.paper import page
from calm.paper import sections as sections_lib
from tests.paper import samples

TEXTS = {
  "script": '<script>alert("x")</script>'
  "<img src=http://example.org/x onerror=alert(1)>",
  "end of a style": "</style></title></textarea><b>bold</b>",
  "attribute": '" onmouseover="alert(1)" x=\'',
  "link": "javascript:alert(1) [y](javascript:alert(1)) **z**",
  "entity": "&lt;b&gt; &#x1b; ]]> --> <!-- \u2028",
  "template": "{{ 7 * 7 }} {% raw %} {# gone #}",
  "colour": "\x1b[31mred\x1b[2J\x1b]8;;http://example.org\x07link\r\x08\x9b2J\x00",
  "rich": "[/b] [bold]x[/bold] [link=http://example.org]y[/link] [red :smile:",
  "direction": "a\u202eb\u2066c\u200fd",
  "mathematics": "$\\frac{1}{$ ^_",
}


def words(text: str) -> str:
  """Without spaces, which lines and pieces may change, and as it is shown."""
  return "".join(sanitize(text).split())


class Page(html.parser.HTMLParser):
  """Tags, attributes and text; `script` and `style` are read as a browser
  does.
  """

  def __init__(self, source: str):
    super().__init__()
    self.tags = []
    self.attributes = []
    self.text = ""
    self.feed(source)
    self.close()

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += [(name, value or "") for name, value in attrs]

  def handle_data(self, data):
    self.text += data

  def handle_comment(self, data):
    self.tags.append("<!--")


def console_of(draw) -> str:
  """What a terminal with colours gets."""
  file = io.StringIO()
  draw(
    rich_console.Console(
      file=file, width=300, force_terminal=True, color_system="truecolor"
    )
  )
  return file.getvalue()


def calibrated(text: str):
  losses = np.random.default_rng(0).random((100, 2)) * [0.05, 0.9]
  found = calibrate(losses, [0.9, 0.5], tolerance=0.2, error_rate=0.05)
  # None can be made so; a renderer asks nobody.
  for name in ("kind", "metric"):
    object.__setattr__(found, name, text)
  return found


def output(text: str) -> outputs.Output:
  shared = {
    "tokens": (3, 4, 1),
    "confidences": (0.5,) * 3,
    "rejected_confidences": (0.0,) * 3,
  }
  return outputs.Output(
    text=text,
    pieces=(text, " b", ""),
    exit_layers=(1, 2, 4),
    score=0.0,
    num_layers=4,
    **shared,
  )


def several(text: str) -> outputs.Outputs:
  timing = outputs.Timing(0.0, 0.0, 0)
  return outputs.Outputs((output(text),), 4, 0.5, f"promise {text}", timing)


def task(text: str):
  made = samples.report()
  levels = tuple(
    dataclasses.replace(level, pieces=(text, *level.pieces[1:]))
    for level in made.examples[0].items[0].levels
  )
  shown = {
    "id": text,
    "input": text,
    "reference": text,
    "full": text,
    "levels": levels,
  }
  item = dataclasses.replace(made.examples[0].items[0], **shown)
  example = dataclasses.replace(made.examples[0], items=(item,))
  renamed = samples.changed(examples=(example,))
  settings = dataclasses.replace(made.settings, title=text, metric_title=text)
  object.__setattr__(renamed, "settings", settings)
  return renamed


def sections(text: str):
  """Parts whose words are a user's; the figures, which are slow to draw, have a
  case.
  """
  return sections_lib.sections([task(text)], ("outputs", "gains"))


def report_page(text: str) -> str:
  return page.render(
    page.Page(text, ((text, text),), sections(text), 4, ((text, text),))
  )


HTML = {
  "an output": lambda text: output(text)._repr_html_(),
  "outputs": lambda text: several(text)._repr_html_(),
  "the report": report_page,
}


def told(text: str, write) -> str:
  file = io.StringIO()
  with contextlib.redirect_stderr(file):
    write(text)
  return file.getvalue()


PLAIN, PAINTED = (
  rich_console.Console(
    file=io.StringIO(), color_system=system, force_jupyter=False
  )
  for system in (None, "truecolor")
)
TERMINAL = {
  "a line": lambda text: console_of(lambda console: print_text(console, text)),
  "a calibration": lambda text: console_of(
    lambda console: run_lib.print_calibration(console, calibrated(text))
  ),
  "a calibration's text": lambda text: repr(calibrated(text)),
  "an error": lambda text: told(text, run_lib._print_error),
  "a warning": lambda text: told(
    text,
    lambda text: run_lib._show_warning(UserWarning(text), UserWarning, "", 0),
  ),
  "coloured tokens": lambda text: outputs.to_terminal([text], [2], 4, PAINTED),
  "tokens without colour": lambda text: outputs.to_terminal(
    [text], [2], 4, PLAIN
  ),
  "an output": lambda text: repr(output(text)) + repr(several(text)),
}
# Where marks that do something are replaced by a sign, or written as Python
# writes them.
REPLACED = ("an output", "outputs", "coloured tokens", "tokens without colour")


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize("name", HTML)
def test_pages_show_text_as_text(name, kind):
  text = TEXTS[kind]
  made = Page(HTML[name](text))
  harmless = Page(HTML[name]("harmless"))
  assert made.tags == harmless.tags
  assert [n for n, _ in made.attributes] == [n for n, _ in harmless.attributes]
  for attribute, value in made.attributes:
    assert not attribute.startswith("on")
    if attribute in ("href", "src", "action"):
      assert not value.lower().startswith(("javascript:", "http"))
  assert not dangerous(made.text)
  if name not in REPLACED or sanitize(text) == text:
    assert words(text) in "".join(made.text.split())


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize("name", TERMINAL)
def test_terminals_show_text_as_text(name, kind):
  text = TEXTS[kind]
  made = TERMINAL[name](text)
  # What the package itself colours by and moves the bar with.
  bare = re.sub(r"\x1b\[(?:[0-9;]*m|\?25[lh]|[0-9]*[AK]|2K)", "", made).replace(
    "\r", ""
  )
  assert not dangerous(bare)
  assert "\x1b[31m" not in made or "\x1b[31m" in TERMINAL[name]("harmless")
  if name not in REPLACED:
    assert words(text) in "".join(bare.split())


def dangerous(text: str) -> list[str]:
  """Characters that steer a terminal or turn what follows."""
  return [
    c
    for c in text
    if unicodedata.category(c) in ("Cc", "Cf", "Zl") and c not in "\n\t"
  ]


@pytest.mark.parametrize("kind", ["entity", "colour", "mathematics"])
def test_figures_are_drawn_whatever_their_titles_say(kind):
  made = page.draw("f", TEXTS[kind], "", ("x", "y"), ())
  ElementTree.fromstring(made.svg)
  assert made.png.startswith(b"\x89PNG")


def test_every_template_is_escaped():
  """`panel.environment` renders them all, that of `calm.fitting` too."""
  templates = list(pathlib.Path(page.__file__).parents[1].rglob("*.j2"))
  assert len(templates) > 5
  texts = [template.read_text("utf-8") for template in templates]
  assert not [
    text for text in texts if re.search(r"\bsafe\b.*}}|autoescape", text)
  ]


def test_the_check_can_fail():
  assert dangerous("\x1b[2J") and dangerous("a\u202eb") and dangerous("\u2028")
  assert Page("<p><script>x</script>").tags == ["p", "script"]
