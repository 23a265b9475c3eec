"""What a generation at one threshold says about a lower one, exactly.

Lowering the threshold changes nothing as long as no earlier layer would now exit. A token's
`rejected_confidences` entry is the highest confidence that was refused before its exit, so

    the sequence is the same  iff  rejected_confidences[t] < threshold at the new setting, all t

Up to the first t where this fails everything is the same, caches included; decoding goes on
there. Comparisons are in float32, as in the decoder. A refusal of 0 may also mean that nothing
was refused, so at threshold 0 less is kept than could be.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from calm.calibrate.generations.records import Record


def reusable_tokens(record: Record, thresholds: npt.ArrayLike) -> int:
  """Leading tokens of `record` that are the same when decoded with lower thresholds.

  Args:
    record: a generation at a higher threshold, `NEVER_EXIT` with measuring included.
    thresholds: [length] the schedule's value at every generated token of the new setting; each
      at most the value that `record` was decoded with. More values than tokens are ignored.

  Returns:
    The number of tokens, `len(record.tokens)` where the whole sequence is the same. The token
    at that position is where decoding goes on. 0 for records that lack `rejected_confidences`.

  Raises:
    ValueError: there are fewer thresholds than tokens.
  """
  refused = record.rejected_confidences
  if refused is None:
    return 0
  values = np.asarray(thresholds, np.float32)
  if values.ndim != 1 or len(values) < len(refused):
    raise ValueError(
      f"Expected `thresholds` to hold a value for each of the {len(refused)} tokens of"
      f" {record.id!r},"
      f" got shape {values.shape}."
    )
  exits_now = np.asarray(refused, np.float32) >= values[: len(refused)]
  return int(np.argmax(exits_now)) if exits_now.any() else len(refused)


def is_reusable(record: Record, thresholds: npt.ArrayLike) -> bool:
  """Whether the whole of `record` is the same at lower thresholds; see `reusable_tokens`."""
  refused = record.rejected_confidences
  return refused is not None and reusable_tokens(record, thresholds) == len(refused)


@dataclasses.dataclass(frozen=True)
class ReuseSummary:
  """How much of a grid was not decoded again.

  Attributes:
    sequences: sequences asked for.
    whole: of those, taken over whole.
    tokens: tokens of all of them as they came out.
    reused_tokens: of those, not decoded again.
  """

  sequences: int = 0
  whole: int = 0
  tokens: int = 0
  reused_tokens: int = 0

  def __add__(self, other: "ReuseSummary") -> "ReuseSummary":
    ours, theirs = dataclasses.astuple(self), dataclasses.astuple(other)
    return ReuseSummary(*(a + b for a, b in zip(ours, theirs, strict=True)))

  def __str__(self) -> str:
    return (
      f"reused {self.whole} of {self.sequences} sequences whole"
      f" ({_percent(self.whole, self.sequences)}) and {self.reused_tokens} of {self.tokens}"
      f" tokens ({_percent(self.reused_tokens, self.tokens)})"
    )


def _percent(part: int, total: int) -> str:
  return f"{part / total:.1%}" if total else "none to reuse"


def summarize(reused_tokens: Sequence[int], lengths: Iterable[int]) -> ReuseSummary:
  """Counts one threshold's sequences.

  Args:
    reused_tokens: [num_examples] tokens taken over for each sequence.
    lengths: [num_examples] tokens of each sequence as it came out.
  """
  lengths = tuple(lengths)
  kept = [min(part, length) for part, length in zip(reused_tokens, lengths, strict=True)]
  whole = sum(part == length for part, length in zip(kept, lengths, strict=True))
  return ReuseSummary(len(lengths), whole, sum(lengths), sum(kept))
