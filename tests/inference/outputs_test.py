"""What a terminal and a notebook show of outputs."""

import dataclasses
import html.parser
import math

import pytest

from calm.inference import outputs

TEXT = "a <b> & c"
GUARANTEE = 'with 95 % the loss is < 0.1 & "small"'
VOID = ("area", "br", "hr", "img", "input", "link", "meta")


class Page(html.parser.HTMLParser):
  """Collects text and titles; tags must close in the order of their nesting."""

  def __init__(self, source: str):
    super().__init__()
    self.open, self.tags, self.text, self.titles = [], [], "", []
    self.feed(source)
    self.close()
    assert not self.open, f"not closed: {self.open}"

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.titles += [value for name, value in attrs if name == "title"]
    if tag not in VOID:
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open and self.open.pop() == tag

  def handle_data(self, data):
    if "style" not in self.open:
      self.text += data


def output(text=TEXT, layers=(1, 4, 2, 3)) -> outputs.Output:
  count = len(layers)
  return outputs.Output(
    text=text,
    tokens=(5, 6, 7, 1)[:count],
    pieces=("a", " <b>", " & c", "</s>")[:count],
    exit_layers=layers,
    confidences=(0.875, 0.5, 0.25, 1.0)[:count],
    rejected_confidences=(0.0, 0.25, 0.125, 0.5)[:count],
    score=-1.5,
    num_layers=4,
  )


def several(count=2, threshold: float | None = 0.5, guarantee: str | None = GUARANTEE):
  timing = outputs.Timing(0.5, 1.25, 0)
  items = tuple(output(f"text {i}", (1, 2, 3)) for i in range(count))
  return outputs.Outputs(items, 4, threshold, guarantee, timing)


def test_the_models_own_end_of_text_is_the_one_that_is_marked():
  assert output().visible[0] == ("a", " <b>", " & c", "⏎")
  other = dataclasses.replace(output(), eos_id=7)
  assert other.visible[0] == ("a", " <b>", "⏎", "</s>")


def test_the_checker_can_fail():
  for source in ("<div><p>a</div></p>", "<div>", "</p>"):
    with pytest.raises(AssertionError):
      Page(source)


def test_one_output_in_words():
  assert repr(output()) == "Output('a <b> & c', tokens=4, mean_layers=2.50/4)"
  assert output().mean_layers == 2.5
  assert math.isnan(output("", ()).mean_layers)
  assert repr(output("", ())) == "Output('', tokens=0, mean_layers=nan/4)"


def test_end_of_text_is_shown_as_a_mark():
  pieces, exit_layers, confidences = output().visible
  assert pieces == ("a", " <b>", " & c", "⏎")
  assert exit_layers == (1, 4, 2, 3) and confidences == (0.875, 0.5, 0.25, 1.0)


def test_coloured_text_for_terminals():
  assert output().coloured("plain") == "[1] a [4] <b> [2] & c[3]⏎"
  assert "\x1b[48;5;" in output().coloured("256")


def test_the_space_before_the_first_word_is_not_shown():
  first = dataclasses.replace(output(), pieces=(" a", " <b>", " & c", "</s>"))
  assert first.visible[0] == ("a", " <b>", " & c", "⏎")
  blank = dataclasses.replace(output(), pieces=(" ", "b", " & c", "</s>"))
  assert blank.visible[0][0] == " "  # a token of its own stays to be seen


def test_one_output_as_html():
  page = Page(output()._repr_html_())
  assert page.text.startswith("a <b> & c⏎")
  assert "b" not in page.tags  # the text is escaped
  assert page.titles[:2] == ["layer 1 of 4, confidence 0.88", "layer 4 of 4, confidence 0.50"]


def test_outputs_are_a_sequence_in_order():
  made = several(3)
  assert len(made) == 3 and made.texts == ["text 0", "text 1", "text 2"]
  assert made[1].text == "text 1" and [o.text for o in made[1:]] == ["text 1", "text 2"]
  assert [o.text for o in made] == made.texts
  assert made.timing.seconds == 1.75


def test_means_weigh_tokens_not_texts():
  items = (output("a", (1,)), output("b", (4, 4, 4)))
  made = outputs.Outputs(items, 4, None, None, outputs.Timing(0.0, 0.0, 0))
  assert made.mean_layers == 13 / 4
  assert math.isnan(several(0).mean_layers)


@pytest.mark.parametrize(
  ("threshold", "words"),
  [(0.5, "threshold 0.5"), (math.inf, "threshold never"), (None, "threshold none")],
)
def test_outputs_in_words(threshold, words):
  shown = repr(several(7, threshold)).split("\n")
  assert shown[0].startswith("7 outputs") and words in shown[0]
  assert "2.00 of 4 decoder layers a token" in shown[0]
  assert len(shown) == 7 and shown[-1] == "  ... and 2 more"
  assert len(repr(several(5)).split("\n")) == 6
  assert repr(several(1)).startswith("1 output, ")


def test_outputs_as_html():
  page = Page(several(23)._repr_html_())
  assert "… and 3 more" in page.text and GUARANTEE in page.text
  assert page.text.count("decoder layers per token") == 1  # one legend for all
  assert "2.00 of 4" in page.text
  assert "more" not in Page(several(20, guarantee=None)._repr_html_()).text
  assert Page(several(0)._repr_html_()).text.startswith("0 outputs")
