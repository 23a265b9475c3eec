"""How long inputs and texts of these rows are, in tokens: the model's limits."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from calm import inference
from calm.calibrate import Prompt

_SHARE = 0.99  # of the rows that are read and written whole
_LONGEST_INPUT, _LONGEST_TEXT = 1024, 256
_STEP = 8


@dataclasses.dataclass(frozen=True)
class Limits:
  """How texts are read and written; fields of `DecodeOptions`.

  Attributes:
    task_prefix: text put before every input.
    max_input_length: tokens read, EOS included.
    max_decode_length: most tokens written, EOS included.
  """

  task_prefix: str
  max_input_length: int
  max_decode_length: int


def of_rows(
  predictor: inference.Predictor, rows: Sequence[Prompt], prefix: str | None
) -> tuple[Limits, int]:
  """Limits for these rows, and how many of them are longer and will be cut.

  Args:
    predictor: the model; its own prefix is taken where none is given, and its own text limit
      where the rows have no references.
    rows: all rows.
    prefix: text put before every input, or None.

  Raises:
    ValueError: the vocabulary takes these texts for unknown pieces.
  """
  vocabulary = predictor.vocabulary
  prefix = predictor.options.task_prefix if prefix is None else prefix
  inputs = [vocabulary.encode(prefix + row.input) for row in rows]
  _check_known(inputs, vocabulary)
  # EOS besides.
  longest = 1 + int(np.quantile([len(tokens) for tokens in inputs], _SHARE, method="higher"))
  targets = [1 + len(vocabulary.encode(row.targets[0])) for row in rows if row.targets]
  decode_length = predictor.options.max_decode_length
  if targets:
    most = int(np.quantile(targets, _SHARE, method="higher"))
    decode_length = min(_LONGEST_TEXT, -(-most // _STEP) * _STEP)
  limit = min(longest, _LONGEST_INPUT)
  limits = Limits(prefix, -(-limit // 32) * 32, decode_length)
  return limits, sum(len(tokens) >= limits.max_input_length for tokens in inputs)


def _check_known(inputs: Sequence[Sequence[int]], vocabulary) -> None:
  """A tokenizer that is not the model's shows in pieces that it does not know."""
  unknown = sum(token == vocabulary.unk_id for tokens in inputs for token in tokens)
  total = sum(map(len, inputs))
  if unknown > 0.2 * max(total, 1):
    raise ValueError(
      f"Expected the model's vocabulary to know the rows' texts, got {unknown} unknown of"
      f" {total} pieces; is it the tokenizer that the model was trained with, and the language?"
    )
