"""Colour scales, their legibility, and text coloured by exit layer."""

import html.parser
import io
import itertools
import re

import pytest

from calm.inference import colours

DEPTHS = [1, 2, 4, 8, 12, 24]

# Machado, Oliveira and Fernandes (2009), severity 1, on linear RGB.
DEFICIENCIES = {
  "protanopia": ((0.152, 1.053, -0.205), (0.115, 0.786, 0.099), (-0.004, -0.048, 1.052)),
  "deuteranopia": ((0.367, 0.861, -0.228), (0.280, 0.673, 0.047), (-0.012, 0.043, 0.969)),
  "tritanopia": ((1.256, -0.077, -0.179), (-0.078, 0.931, 0.148), (0.005, 0.691, 0.304)),
}


def seen(colour, matrix):
  """Linear RGB as a reader with the deficiency sees it."""
  channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
  linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
  return [sum(m * c for m, c in zip(row, linear, strict=True)) for row in matrix]


class Spans(html.parser.HTMLParser):
  """(text, title, style) of each span outside the legend and in it."""

  def __init__(self, page):
    super().__init__()
    self.found, self.open_tags = [], []
    self.feed(page)
    self.close()

  def handle_starttag(self, tag, attrs):
    self.open_tags.append(tag)
    if tag == "span":
      self.found.append(["", dict(attrs)["title"], dict(attrs)["style"]])

  def handle_endtag(self, tag):
    assert self.open_tags.pop() == tag

  def handle_data(self, data):
    if self.open_tags[-1] == "span":
      self.found[-1][0] += data


@pytest.mark.parametrize("num_layers", DEPTHS)
def test_lightness_alone_orders_the_layers(num_layers):
  scale = colours.scale(num_layers)
  assert len(scale) == len(set(scale)) == num_layers
  assert all(re.fullmatch("#[0-9a-f]{6}", colour) for colour in scale)
  luminances = [colours.luminance(colour) for colour in scale]
  assert luminances == sorted(luminances, reverse=True)


@pytest.mark.parametrize("deficiency", DEFICIENCIES)
def test_lightness_orders_the_layers_for_readers_with_colour_deficiencies(deficiency):
  lightness = [
    0.2126 * r + 0.7152 * g + 0.0722 * b
    for r, g, b in (seen(c, DEFICIENCIES[deficiency]) for c in colours.scale(12)[::-1])
  ]
  assert all(b > 1.1 * a for a, b in itertools.pairwise(lightness))


@pytest.mark.parametrize("num_layers", DEPTHS)
def test_text_reads_on_every_background(num_layers):
  for colour in colours.scale(num_layers):
    assert colours.contrast(colour, colours.text_colour(colour)) >= 4.5


def test_contrast_by_hand():
  assert colours.contrast("#000000", "#ffffff") == pytest.approx(21)
  assert colours.contrast("#777777", "#777777") == 1
  # 0x80 / 255 is 0.21586 linear: (1.05) / (0.26586).
  assert colours.contrast("#808080", "#ffffff") == pytest.approx(3.949, abs=1e-3)
  assert colours.luminance("#ff0000") == pytest.approx(0.2126)


def test_html_has_one_span_a_token_with_its_layer():
  page = colours.to_html(
    ["▁a", "<b>&", "▁\"c'"], [3, 1, 8], 8, confidences=[0.971, 1.0, 0.05], legend=False
  )
  spans = Spans(page).found
  assert [text for text, _, _ in spans] == [" a", "<b>&", " \"c'"]
  assert [title for _, title, _ in spans] == [
    "layer 3 of 8, confidence 0.97",
    "layer 1 of 8, confidence 1.00",
    "layer 8 of 8, confidence 0.05",
  ]
  scale = colours.scale(8)
  for (_, _, style), layer in zip(spans, [3, 1, 8], strict=True):
    assert f"background:{scale[layer - 1]};" in style
    assert f"color:{colours.text_colour(scale[layer - 1])};" in style


def test_html_leaves_padding_out_and_takes_no_confidence():
  page = colours.to_html(["x", "", ""], [2, 0, 0], 4, legend=False)
  assert [span[:2] for span in Spans(page).found] == [["x", "layer 2 of 4"]]


def test_html_legend_numbers_every_layer():
  with_legend = Spans(colours.to_html(["x"], [2], 6)).found
  assert [span[0].strip() for span in with_legend[1:]] == ["1", "2", "3", "4", "5", "6"]
  scale = colours.scale(6)
  assert all(c in style for c, (_, _, style) in zip(scale, with_legend[1:], strict=True))


def test_a_colour_means_the_same_layer_on_light_and_on_dark():
  """Nothing that is written asks for the page's or the terminal's colours."""
  scale = colours.scale(6)
  page = colours.to_html(["x"], [2], 6)
  assert not re.search(r"<style|var\(|prefers-color-scheme|light-dark", page)
  swatches = [
    re.findall(r"background:(#[0-9a-f]{6})", style)[0] for *_, style in Spans(page).found
  ]
  assert swatches == [scale[1], *scale]
  rgb = ";".join(str(int(scale[1][i : i + 2], 16)) for i in (1, 3, 5))
  assert f"48;2;{rgb}m" in colours.to_terminal(["x"], [2], 6, mode="truecolor")


def test_no_generated_text_can_steer_the_terminal():
  out = colours.to_terminal(["\x1b[2Jx\r", "ok"], [1, 1], 2, mode="plain")
  assert out == "[1] �[2Jx�ok"
  assert "\x1b" not in colours.to_html(["\x1b[2J"], [1], 2)


def test_plain_terminal_says_the_layers_in_brackets():
  pieces, layers = ["▁Perl", "▁mod", "ule", "▁for", ""], [1, 1, 8, 3, 0]
  out = colours.to_terminal(pieces, layers, 8, mode="plain")
  assert out == "[1] Perl mod[8]ule [3] for"
  assert "8 decoder layers" in colours.legend_terminal(8, mode="plain")


def test_truecolor_is_the_scale_and_is_reset():
  out = colours.to_terminal(["a\nb"], [2], 2, mode="truecolor")
  start = "\x1b[48;2;0;34;78m\x1b[38;2;255;255;255m"
  assert out == f"{start}a\x1b[0m\n{start}b\x1b[0m"


@pytest.mark.parametrize("num_layers", [2, 4, 8])
def test_256_colours_still_tell_the_layers_apart(num_layers):
  legend = colours.legend_terminal(num_layers, mode="256")
  backgrounds = re.findall(r"48;5;(\d+)m", legend)
  assert len(backgrounds) == len(set(backgrounds)) == num_layers
  assert all(16 <= int(code) <= 255 for code in backgrounds)


class Terminal(io.StringIO):
  def isatty(self):
    return True


@pytest.mark.parametrize(
  ("environ", "stream", "mode"),
  [
    ({"COLORTERM": "truecolor"}, Terminal(), "truecolor"),
    ({"COLORTERM": "24bit"}, Terminal(), "truecolor"),
    ({"TERM": "xterm"}, Terminal(), "256"),
    ({"TERM": "dumb", "COLORTERM": "truecolor"}, Terminal(), "plain"),
    ({"NO_COLOR": "1", "COLORTERM": "truecolor", "FORCE_COLOR": "1"}, Terminal(), "plain"),
    ({"NO_COLOR": ""}, Terminal(), "256"),
    ({}, io.StringIO(), "plain"),
    ({"FORCE_COLOR": "1"}, io.StringIO(), "256"),
  ],
)
def test_terminal_mode(environ, stream, mode):
  assert colours.terminal_mode(environ, stream) == mode


def test_no_color_is_honoured_without_being_passed(monkeypatch):
  monkeypatch.setenv("NO_COLOR", "1")
  assert colours.to_terminal(["a"], [1], 2) == "[1] a"


def test_bad_arguments_are_named():
  with pytest.raises(ValueError, match="`num_layers`"):
    colours.scale(0)
  with pytest.raises(ValueError, match="`exit_layers` for each"):
    colours.to_html(["a"], [1, 2], 4)
  with pytest.raises(ValueError, match=r"got 5\s+at token 1"):
    colours.to_terminal(["a", "b"], [1, 5], 4)
  with pytest.raises(ValueError, match="`confidences`"):
    colours.to_html(["a"], [1], 4, confidences=[])
