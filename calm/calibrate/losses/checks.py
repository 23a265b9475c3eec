"""What a table of losses must be before anything reads it: numbers, names, clusters, texts."""

import collections
import hashlib
import numbers
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

# Losses that are looked at, and rows that are looked for, at once.
_CELLS, _ROWS_TRIED = 2**18, 16
# Characters of a name (a knob, a label, a metric, a risk) in a calibration's file.
LONGEST_NAME = 500
LONGEST_KIND = 200


def as_numbers(values: Any, name: str) -> np.ndarray:
  """Real numbers as float64; an array of float64 is returned as it is.

  Raises:
    ValueError: `values` is masked (what is under a mask is not known), complex, text or
      objects, or ragged.
  """
  if np.ma.isMaskedArray(values):
    raise ValueError(
      f"Expected `{name}` without a mask, got a masked array; leave out the masked prompts, or"
      " give each a loss."
    )
  try:
    array = np.asarray(values)
  except ValueError as error:
    raise ValueError(
      f"Expected `{name}` to be a table of numbers, got rows of several lengths ({error})."
    ) from error
  if array.dtype.kind not in "fiub":
    raise ValueError(
      f"Expected `{name}` to be real numbers, got an array of {array.dtype}; convert it, for"
      " example with `.astype(float)`, where that loses nothing."
    )
  return np.asarray(array, np.float64)


def check_ids(ids: Sequence[str], count: int) -> tuple[str, ...]:
  """Ids of `count` prompts.

  Raises:
    ValueError: another number of them, one is no text, or one occurs twice.
  """
  names = tuple(ids)
  if len(names) != count:
    raise ValueError(f"Expected `ids` for each of the {count} rows, got {len(names)}.")
  odd = [name for name in names if not isinstance(name, str)]
  if odd:
    raise ValueError(
      f"Expected `ids` to be texts, got {odd[0]!r} ({type(odd[0]).__name__}); use `str(id)`."
    )
  if len(set(names)) != count:
    seen: set[str] = set()
    twice = sorted({name for name in names if name in seen or seen.add(name)})
    raise ValueError(
      f"Expected `ids` to be unique, got {twice[:5]} more than once; several rows of one prompt"
      " are a cluster: give them ids of their own and one of the `groups`."
    )
  return tuple(str(name) for name in names)


def check_groups(groups: Sequence[Any], count: int) -> tuple[str, ...]:
  """The cluster of each of `count` prompts, as texts.

  Raises:
    ValueError: another number of them, or one is missing (None, NaN) or no name.
  """
  if isinstance(groups, str) or len(groups) != count:
    raise ValueError(
      f"Expected `groups` to name the cluster of each of the {count} rows, got {len(groups)}"
      " names."
    )
  bare = [
    row
    for row, group in enumerate(groups)
    if isinstance(group, bool) or not isinstance(group, str | numbers.Integral)
  ]
  if bare:
    raise ValueError(
      f"Expected `groups` to name the cluster of every row, got {groups[bare[0]]!r} at row"
      f" {bare[0]} and {len(bare)} rows without a name; give each a cluster (its own id if it"
      " has none), or leave these prompts out: together they would pass for one cluster."
    )
  return tuple(str(group) for group in groups)


def is_line(value: Any, longest: int = LONGEST_NAME) -> bool:
  """Whether a calibration's file may hold this text: it is printed as it is, on one line."""
  return isinstance(value, str) and len(value) <= longest and value.isprintable()


def check_lines(values: Iterable[Any], name: str, longest: int = LONGEST_NAME) -> None:
  """What a calibration will store and print, which loading it refuses otherwise.

  Raises:
    ValueError: names the first that `is_line` is not true of.
  """
  for value in values:
    if not is_line(value, longest):
      raise ValueError(
        f"Expected `{name}` of texts of at most {longest} printable characters, got"
        f" {value!r:.200}; write it on one line, with plain spaces and no control characters."
      )


def is_seed(value: Any) -> bool:
  """Whether a calibration's file may hold this seed."""
  return isinstance(value, str) and bool(re.fullmatch(r"[0-9a-f]{0,64}", value))


def check_seed(seed: str | None) -> None:
  """Raises ValueError unless an order's seed is None or one that a calibration has."""
  if seed is not None and not is_seed(seed):
    raise ValueError(
      f"Expected `seed` of at most 64 hexadecimal digits, got {seed!r:.200}; give the `seed` of"
      " an earlier calibration, or none."
    )


def looks_sorted(values: np.ndarray) -> bool:
  """Whether rows stand in an order that follows their losses.

      |r| sqrt(n - 1) > 4,   r Spearman's correlation of row number and mean loss

  Rows in an order that has nothing to do with losses look so once in 10,000 tables.

  Args:
    values: [num_examples, num_thresholds] finite losses.
  """
  means = values.mean(axis=1)
  _, place, sizes = np.unique(means, return_inverse=True, return_counts=True)
  if len(sizes) < 2:
    return False
  ranks = (np.cumsum(sizes) - (sizes - 1) / 2.0)[place]  # equal losses share a rank
  correlation = float(np.corrcoef(np.arange(len(ranks)), ranks)[0, 1])
  return abs(correlation) * np.sqrt(len(ranks) - 1.0) > 4.0


def looks_copied(values: np.ndarray) -> bool:
  """Whether every row of more than eight kinds stands there at least twice.

  Rows that are 0, 1 or -1 throughout are common and say nothing; of the others, independent
  prompts hardly ever leave none alone.
  """
  told = np.flatnonzero(~_plain_rows(values))
  if len(told) <= 16:
    return False
  # One row without a copy is enough to know, and most tables have one among the first.
  for row in told[:_ROWS_TRIED]:
    if _occurrences(values, row) < 2:
      return False
  counts = collections.Counter(
    hashlib.sha256((values[row] + 0.0).tobytes()).digest()
    for row in told.tolist()  # -0 is 0
  )
  return len(counts) > 8 and min(counts.values()) > 1


def row_blocks(values: np.ndarray) -> Iterator[np.ndarray]:
  """`values` in pieces of whole rows, so that what is made of each stays small."""
  step = max(1, _CELLS // values.shape[1])
  return (values[start : start + step] for start in range(0, len(values), step))


def _plain_rows(values: np.ndarray) -> np.ndarray:
  blocks = row_blocks(values)
  return np.concatenate([np.isin(b, (-1.0, 0.0, 1.0)).all(axis=1) for b in blocks])


def _occurrences(values: np.ndarray, row: int) -> int:
  alike = np.flatnonzero(values[:, 0] == values[row, 0])
  for column in range(1, values.shape[1]):
    alike = alike[values[alike, column] == values[row, column]]
  return len(alike)
