"""Table 1: how long the references and the outputs are."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Length:
  """Tokens of a set of texts.

  Attributes:
    count: texts.
    mean: mean tokens.
    low: 5th percentile.
    high: 95th percentile.
  """

  count: int
  mean: float
  low: float
  high: float

  def __str__(self) -> str:
    return f"{self.mean:.0f} ({self.low:.0f} - {self.high:.0f})"


@dataclasses.dataclass(frozen=True)
class Lengths:
  """Table 1 for one task.

  Attributes:
    references: first references, EOS not counted.
    inputs: prompts with their prefix.
    outputs: what the full model wrote, EOS not counted.
    cut_inputs: share of prompts longer than what is read, in [0, 1].
  """

  references: Length
  inputs: Length
  outputs: Length
  cut_inputs: float


def length(counts: Sequence[int]) -> Length:
  """Mean and percentiles of token counts."""
  values = np.asarray(counts, float)
  low, high = np.percentile(values, [5, 95])
  return Length(len(values), float(values.mean()), float(low), float(high))


def lengths(
  references: Sequence[str],
  inputs: Sequence[str],
  outputs: Sequence[str],
  encode: Callable[[str], Sequence[int]],
  max_input_length: int,
) -> Lengths:
  """Counts tokens.

  Args:
    references: one text a prompt.
    inputs: the prompts as they are read, prefix included.
    outputs: the full model's texts.
    encode: text -> token ids, without EOS.
    max_input_length: tokens read of a prompt, EOS included.
  """
  read = [len(encode(text)) for text in inputs]
  return Lengths(
    references=length([len(encode(text)) for text in references]),
    inputs=length(read),
    outputs=length([len(encode(text)) for text in outputs]),
    cut_inputs=float(np.mean([count >= max_input_length for count in read])),
  )
