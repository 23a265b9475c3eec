"""Prompts as padded batches: tokenised, cut to length, bucketed for few
compilations.
"""

import dataclasses
import itertools
import warnings
from collections.abc import Sequence

import numpy as np

from calm.data.vocabulary import Vocabulary

# Padded input lengths; every one that occurs is a compiled program.
INPUT_BUCKETS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
# Of a longer text than this, and than so many characters for each token that is
# kept, only a beginning is tokenised: a line of 60 MB would take gigabytes.
_LEAST_CUT = 2**16
_CHARACTERS = 32
_MOST_CHARACTERS = 2**22


@dataclasses.dataclass(frozen=True)
class PromptBatch:
  """Rows that are encoded and decoded together."""

  # positions of the prompts in the caller's list, [num_prompts]
  rows: np.ndarray
  # Token ids with EOS, 0 = pad, [batch, input_length] int32; rows beyond
  # `num_prompts` are pad.
  tokens: np.ndarray
  active: np.ndarray  # True where a row holds a prompt, [batch]


class CutPrompts(UserWarning):
  """`cut` of `count` prompts were cut to `limit`; of the `longest` maybe a
  `part` was read.
  """

  def __init__(
    self, cut: int, count: int, longest: int, limit: int, part: bool = False
  ):
    super().__init__(
      f"{cut} of {count} prompts have more than `max_input_length` = {limit} "
      "tokens (the"
      f" longest has {longest}{' or more' if part else ''}) and were cut at "
      "their end; raise"
      " `max_input_length` to read them whole."
    )
    self.cut = cut
    self.longest = longest
    self.limit = limit
    self.part = part


def tokenize(
  texts: Sequence[str],
  vocabulary: Vocabulary,
  *,
  prefix: str,
  max_input_length: int,
  eos_id: int,
) -> list[list[int]]:
  """Token ids of each prompt, EOS last; prompts that are too long are cut, with
  a warning.
  """
  found = [
    beginning(vocabulary, prefix + text, max_input_length) for text in texts
  ]
  if cut := sum(part or len(ids) >= max_input_length for ids, part in found):
    longest, part = (
      1 + max(len(ids) for ids, _ in found),
      any(part for _, part in found),
    )
    warnings.warn(
      CutPrompts(cut, len(found), longest, max_input_length, part), stacklevel=2
    )
  return [[*ids[: max_input_length - 1], eos_id] for ids, _ in found]


def beginning(
  vocabulary: Vocabulary, text: str, limit: int
) -> tuple[Sequence[int], bool]:
  """Token ids of a text, or of so much of it as has twice `limit`; and whether
  it was cut.

  A cut changes the tokens beside it, which are beyond the limit.
  """
  size = max(_LEAST_CUT, _CHARACTERS * limit)
  while size < len(text):
    ids = vocabulary.encode(text[:size])
    if len(ids) >= 2 * limit or size >= _MOST_CHARACTERS:
      return ids, True
    size *= 4  # blanks, or whatever else becomes few tokens
  return vocabulary.encode(text), False


def bucket_length(length: int, max_input_length: int) -> int:
  """The padded length of a prompt: the next of `INPUT_BUCKETS`, at most the
  maximum.
  """
  fitting = (bucket for bucket in INPUT_BUCKETS if bucket >= length)
  return min(next(fitting, max_input_length), max_input_length)


def plan(
  tokens: Sequence[Sequence[int]],
  *,
  batch_size: int,
  max_input_length: int,
  whole_batches: bool = False,
  one_shape: bool = False,
) -> list[PromptBatch]:
  """Groups prompts of like length into batches; together they hold every prompt
  once.

  What is left of one length when its batches are full goes along with the next,
  if that is at most twice as long: padding costs less than compiling a program
  for a few rows.

  With `whole_batches` every batch is padded to `batch_size`, not to a power of
  two below, and every prompt to its own bucket, so that no prompt is computed
  otherwise in another list; in `one_shape` to `batch_size` and the maximum.
  """
  least = max_input_length if one_shape else 0
  lengths = [
    bucket_length(max(least, len(row)), max_input_length) for row in tokens
  ]
  lengths, whole = np.array(lengths, int), whole_batches or one_shape
  batches = []
  waiting = np.zeros(0, int)
  for length, following in itertools.pairwise([*np.unique(lengths), np.inf]):
    members = np.concatenate([waiting, np.flatnonzero(lengths == length)])
    goes_along = not whole and following <= 2 * length
    taken = len(members) - (len(members) % batch_size if goes_along else 0)
    waiting = members[taken:]
    for start in range(0, taken, batch_size):
      rows = members[start : min(start + batch_size, taken)]
      size = (
        batch_size
        if whole
        else min(1 << (len(rows) - 1).bit_length(), batch_size)
      )
      padded = np.zeros((size, int(length)), np.int32)
      for i, row in enumerate(rows):
        padded[i, : len(tokens[row])] = tokens[row]
      batches.append(PromptBatch(rows, padded, np.arange(size) < len(rows)))
  return batches
