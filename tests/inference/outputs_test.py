"""What a terminal and a notebook show of outputs, and the colours of exit
layers.
"""

import dataclasses
import io
import math
import re
import xml.etree.ElementTree as ElementTree

import pytest
from rich import console

from calm.inference import outputs

# A pipe, and a terminal of 256 colours.
PLAIN, COLOURED = (
  console.Console(file=io.StringIO(), color_system=system, force_jupyter=False)
  for system in (None, "256")
)
TEXT = "a <b> & c"
GUARANTEE = 'with 95 % the loss is < 0.1 & "small"'


def parsed(source: str) -> tuple[str, list]:
  """The text of well-formed HTML and its spans (text, title, style)."""
  tree = ElementTree.fromstring(source)
  # the text is escaped
  assert {each.tag for each in tree.iter()} <= {"div", "p", "span"}
  spans = [
    (each.text, each.get("title"), each.get("style"))
    for each in tree.iter("span")
  ]
  return "".join(tree.itertext()), spans


def output(text=TEXT, layers=(1, 4, 2, 3), **changes) -> outputs.Output:
  count = len(layers)
  made = outputs.Output(
    text=text,
    tokens=(5, 6, 7, 1)[:count],
    pieces=("a", " <b>", " & c", "</s>")[:count],
    exit_layers=layers,
    confidences=(0.875, 0.5, 0.25, 1.0)[:count],
    rejected_confidences=(0.0, 0.25, 0.125, 0.5)[:count],
    score=-1.5,
    num_layers=4,
  )
  return dataclasses.replace(made, **changes)


def several(count=2):
  items = tuple(output(f"text {i}", (1, 2, 3)) for i in range(count))
  return outputs.Outputs(items, 4, 0.5, GUARANTEE, outputs.Timing(0.5, 1.25, 0))


def test_end_of_text_is_a_mark_and_the_first_space_is_not_shown():
  for changes, pieces in (
    ({"eos_id": 7}, ("a", " <b>", "⏎", "</s>")),
    ({"pieces": (" a", " <b>", " & c", "</s>")}, ("a", " <b>", " & c", "⏎")),
    ({"pieces": (" ", "b", " & c", "</s>")}, (" ", "b", " & c", "⏎")),
  ):
    assert output(**changes).visible == pieces


def test_one_output_in_words_and_in_colours():
  assert repr(output()) == "Output('a <b> & c', tokens=4, mean_layers=2.50/4)"
  assert output().coloured(PLAIN) == "[1] a [4] <b> [2] & c[3]⏎"
  assert ";48;5;" in output().coloured(COLOURED)
  assert parsed(output()._repr_html_())[0].startswith("a <b> & c⏎")


def test_outputs_are_a_sequence_whose_means_weigh_tokens_not_texts():
  made = several(7)
  assert made.texts[:2] == ["text 0", "text 1"] and made.timing.seconds == 1.75
  assert made[1].text == "text 1" and [o.text for o in made[5:]] == [
    "text 5",
    "text 6",
  ]
  items = (output("a", (1,)), output("b", (4, 4, 4)))
  assert dataclasses.replace(made, items=items).mean_layers == 13 / 4
  assert math.isnan(several(0).mean_layers)
  shown = repr(made).split("\n")
  assert (
    shown[0] == "7 outputs, threshold 0.5, 2.00 of 4 decoder layers a token"
  )
  assert len(shown) == 7 and shown[-1] == "  ... and 2 more"
  text, _ = parsed(several(23)._repr_html_())
  assert "… and 3 more" in text and GUARANTEE in text
  assert text.count("decoder layers per token") == 1  # one legend for all


# ---- Colours


def luminance(colour):
  """Relative luminance (WCAG 2)."""
  channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
  r, g, b = (
    c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
    for c in channels
  )
  return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(a, b):
  """Contrast ratio of two colours, 1 to 21 (WCAG 2)."""
  light, dim = sorted((luminance(a), luminance(b)), reverse=True)
  return (light + 0.05) / (dim + 0.05)


@pytest.mark.parametrize("num_layers", [1, 2, 8, 24])
def test_lightness_alone_orders_the_layers_and_text_reads_on_all(num_layers):
  scale = outputs.scale(num_layers)
  assert len(scale) == len(set(scale)) == num_layers
  assert all(re.fullmatch("#[0-9a-f]{6}", colour) for colour in scale)
  luminances = [luminance(colour) for colour in scale]
  assert luminances == sorted(luminances, reverse=True)
  for colour in scale:
    assert contrast(colour, outputs.text_colour(colour)) >= 4.5


def test_the_share_of_tokens_by_layer_is_drawn():
  pytest.importorskip("matplotlib", reason="needs the extra 'report'")
  axes = dataclasses.replace(
    several(1), items=(output("abc", (1, 4, 4)),)
  ).plot()
  heights = [bar.get_height() for bar in axes.patches]
  assert heights == pytest.approx([100 / 3, 0, 0, 200 / 3])
  assert several(2).plot(axes) is axes


def test_html_has_one_span_a_token_and_a_legend_that_numbers_every_layer():
  made = output(pieces=("▁a", "<b>&", "▁\"c'", "</s>"))
  (_, spans), colours = parsed(made._repr_html_()), outputs.scale(4)
  ends = [
    ", confidence 0.88",
    ", confidence 0.50",
    ", confidence 0.25",
    ", confidence 1.00",
  ]
  layers = [*made.exit_layers, *range(1, 5)]
  numbers = [f" {i} " for i in range(1, 5)]
  assert [text for text, _, _ in spans] == [
    " a",
    "<b>&",
    " \"c'",
    "⏎",
    *numbers,
  ]
  for (_, title, style), layer, end in zip(
    spans, layers, [*ends, *4 * [""]], strict=True
  ):
    assert title == f"layer {layer} of 4{end}"
    colour = colours[layer - 1]
    assert f"background:{colour};color:{outputs.text_colour(colour)};" in style


def test_terminals_show_layers_by_brackets_or_colours_and_cannot_be_steered():
  pieces = ["▁Perl", "▁mod", "ule", "▁for"]
  layers = [1, 1, 8, 3]
  out = outputs.to_terminal(pieces, layers, 8, PLAIN)
  assert out == "[1] Perl mod[8]ule [3] for"
  out = outputs.to_terminal(["\x1b[2Jx\r", "ok"], [1, 1], 2, PLAIN)
  assert out == "[1] \\x1b[2Jx\\rok"
  # Colour ends before a line does, or the rest of the line would be painted
  # too.
  out = outputs.to_terminal(["a\nb"], [2], 2, COLOURED)
  assert re.fullmatch(r"(\x1b\[[0-9;]+m)a\x1b\[0m\n\1b\x1b\[0m", out)
  backgrounds = re.findall(r"48;5;(\d+)m", outputs.legend_terminal(8, COLOURED))
  assert len(backgrounds) == len(set(backgrounds)) == 8


def test_where_no_colour_is_wanted_there_are_numbers(monkeypatch):
  monkeypatch.setenv("NO_COLOR", "1")
  terminal = console.Console(
    file=io.StringIO(), force_terminal=True, force_jupyter=False
  )
  assert output().coloured(terminal) == output().coloured(PLAIN)
