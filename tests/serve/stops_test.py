"""Stop texts: what a client sees, and where an output ends."""

import itertools
import time

import pytest

from calm.inference import outputs
from calm.serve import device, stops


def output_of(text):
  """One token a character, '|' ends the text."""
  tokens = tuple(1 if c == "|" else ord(c) for c in text)
  ones = (1.0,) * len(text)
  layers = (1,) * len(text)
  pieces = tuple(text)
  return outputs.Output(
    text.removesuffix("|"), tokens, pieces, layers, ones, ones, 0.0, 3
  )


@pytest.mark.parametrize(
  ("parts", "stop", "said"),
  [
    (["ab", "abc", "abcd|"], (), ["ab", "abc", "abcd|stop"]),
    (["ab", "ab ", "ab \ufffd", "ab é|"], (), ["ab", "ab", "ab", "ab é|stop"]),
    (
      ["ab", "abx", "abxy", "abxyz"],
      ("xyz",),
      ["ab", "ab", "ab", "ab|stop_sequence"],
    ),
    (["abx", "abxa", "abxab|"], ("xyz",), ["ab", "abxa", "abxab|stop"]),
    (["aXbY"], ("Y", "X"), ["a|stop_sequence"]),
    (["abcdefgh"], (), ["abcdefgh|length"]),
  ],
)
def test_what_a_client_sees_of_a_text_stays_and_ends_before_a_stop(
  parts, stop, said
):
  job = device.Job("", [], None, 8, stop)
  seen = ""
  found = []
  for part in parts:
    before = seen
    seen, reason = job.visible(output_of(part), before)
    assert seen.startswith(before)
    found.append(f"{seen}|{reason}" if reason else seen)
  assert found == said


def begun_by_prefixes(text, stop):
  """`stops.begun` by every prefix of the stop text."""
  sizes = [n for n in range(len(stop)) if text.endswith(stop[:n])]
  return max(sizes)


def test_what_may_become_a_stop_text_is_held_back():
  words = [""]
  for size in range(1, 6):
    words += map("".join, itertools.product("ab", repeat=size))
  for text, stop in itertools.product(words, words[1:]):
    assert stops.begun(text, stop) == begun_by_prefixes(text, stop)


def test_the_most_that_may_be_asked_for_is_held_back_in_one_pass():
  text = "a" * 100_000
  start = time.process_time()
  assert stops.held_back(text, ["a" * 255 + "b"] * 16) == 255
  assert time.process_time() - start < 0.25


def decode(tokens):
  return "".join(map(chr, tokens))


@pytest.mark.parametrize(
  ("text", "given", "expected"),
  [
    ("abcdef", ("cd",), "abcd"),
    ("abcdef", ("ef", "bc"), "abc"),
    ("abcabc", ("c",), "abc"),
    ("a", ("a",), "a"),
  ],
)
def test_an_output_is_cut_after_the_token_that_completes_a_stop_text(
  text, given, expected
):
  cut = stops.cut_output(output_of(text), given, decode)
  assert cut.text == decode(cut.tokens) == expected
  columns = (cut.pieces, cut.exit_layers, cut.confidences)
  assert {len(column) for column in columns} == {len(expected)}
