"""Stop texts: where an output ends, and what of it may still become one."""

import dataclasses
from collections.abc import Callable, Sequence

from calm.inference import outputs

# of an output, an entry a token
_COLUMNS = (
  "tokens",
  "pieces",
  "exit_layers",
  "confidences",
  "rejected_confidences",
  "drafted",
)


def find_stop(text: str, stops: Sequence[str]) -> int | None:
  """The position of the first stop text in a text; None: there is none."""
  places = [text.find(stop) for stop in stops]
  return min((at for at in places if at >= 0), default=None)


def begun(text: str, stop: str) -> int:
  """Most characters at the end of a text with which a stop text begins, but is
  not complete.

  One pass: the border of the stop text followed by the text's end (Knuth,
  Morris and Pratt 1977).
  """
  end = text[max(0, len(text) - len(stop) + 1) :]
  whole = [*stop, None, *end]  # None is no character
  borders = [0]
  for character in whole[1:]:
    length = borders[-1]
    while length and whole[length] != character:
      length = borders[length - 1]
    borders.append(length + (whole[length] == character))
  return borders[-1]


def held_back(text: str, stops: Sequence[str]) -> int:
  """Characters at the end of a text that may belong to a stop text."""
  return max((begun(text, stop) for stop in stops), default=0)


def cut_output(
  output: outputs.Output,
  stops: Sequence[str],
  decode: Callable[[list[int]], str],
) -> outputs.Output:
  """An output that has a stop text, up to the token that completes one.

  Args:
    decode: the text of token ids.
  """
  without = 0
  count = len(output.tokens)
  while count - without > 1:
    middle = (without + count) // 2
    begin = list(output.tokens[:middle])
    if find_stop(decode(begin), stops) is None:
      without = middle
    else:
      count = middle
  cut = {}
  for column in _COLUMNS:
    cut[column] = getattr(output, column)[:count]
  text = decode(list(cut["tokens"]))
  return dataclasses.replace(output, text=text, **cut)
