"""Checks of tables of losses: numbers, names, clusters, texts, copies."""

import collections
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from scipy import special

# Losses that are looked at at once.
_CELLS = 2**18
# How often a prompt may have been copied: all primes that are likely.
_COPIES = np.array([2, 3, 5, 7, 11, 13])
# Characters of a name (a knob, a label, a metric, a risk) in a calibration's
# file.
LONGEST_NAME = 500
LONGEST_KIND = 200


def as_numbers(values: Any, name: str) -> np.ndarray:
  """Real numbers as float64; ValueError for masked, complex, ragged, text and
  object arrays.
  """
  if np.ma.isMaskedArray(values):
    raise ValueError(
      f"Expected `{name}` without a mask, got a masked array: a mean without "
      "the failures"
      " promises too much; give each the largest loss, 1."
    )
  try:
    array = np.asarray(list(values) if isinstance(values, Iterator) else values)
  except ValueError as error:
    text = (
      f"Expected `{name}` to be a table of numbers, got rows of several "
      f"lengths ({error})."
    )
    raise ValueError(text) from error
  if array.dtype.kind not in "fiub":
    raise ValueError(
      f"Expected `{name}` to be real numbers, got an array of {array.dtype}."
    )
  return np.asarray(array, np.float64)


def in_range(name: str, value: Any, low: float, high: float) -> float:
  """A number strictly between two others; raises ValueError if it is not."""
  plain = isinstance(value, int | float | np.number) and not isinstance(
    value, bool
  )
  if not plain or not low < value < high:
    raise ValueError(
      f"Expected `{name}` to be in ({low:g}, {high:g}), got {value!r}."
    )
  return float(value)


def check_ids(ids: Sequence[Any], count: int) -> tuple[str, ...]:
  """Ids of `count` prompts; ValueError unless they are as many different
  texts.
  """
  if len(ids) != count:
    raise ValueError(
      f"Expected `ids` for each of the {count} rows, got {len(ids)}."
    )
  if odd := [name for name in ids if not isinstance(name, str)]:
    raise ValueError(
      f"Expected `ids` to be texts, got {odd[0]!r} ({type(odd[0]).__name__})."
    )
  if twice := repeated(ids):
    raise ValueError(
      f"Expected `ids` to be unique, got {twice[:5]} more than once; rows of "
      "one prompt are a"
      " cluster: give them ids of their own and one of the `groups`."
    )
  return tuple(map(str, ids))


def repeated(names: Iterable[str]) -> list[str]:
  """Names that occur more than once, sorted."""
  return sorted(
    name for name, times in collections.Counter(names).items() if times > 1
  )


def check_groups(groups: Sequence[Any], count: int) -> tuple[str, ...]:
  """The cluster of each of `count` prompts; ValueError where one is missing or
  no name.
  """
  if len(groups) != count:
    each = f"each of the {count} rows, got {len(groups)} names"
    raise ValueError(f"Expected `groups` to name the cluster of {each}.")

  def named(g):
    return isinstance(g, str | int | np.integer) and not isinstance(g, bool)

  if bare := [row for row, group in enumerate(groups) if not named(group)]:
    raise ValueError(
      "Expected `groups` to name the cluster of every row, got "
      f"{groups[bare[0]]!r} at row"
      f" {bare[0]} and {len(bare)} rows without a name; give such a row its "
      "own id."
    )
  return tuple(map(str, groups))


def warn_of_error_rate(error_rate: float) -> None:
  """Warns of an error rate above 0.5, which is most likely meant as its
  complement.
  """
  if error_rate > 0.5:
    warnings.warn(
      f"`error_rate` {error_rate:g} lets the promise fail with probability "
      f"{error_rate:g}: for"
      f" one that holds with probability {error_rate:g}, give "
      f"{1.0 - error_rate:.4g}.",
      stacklevel=5,
    )


def check_lines(
  values: Iterable[Any], name: str, longest: int = LONGEST_NAME
) -> None:
  """ValueError for the first that is no line of text, which no calibration may
  hold.
  """
  for value in values:
    if (
      not isinstance(value, str)
      or len(value) > longest
      or not value.isprintable()
    ):
      raise ValueError(
        f"Expected `{name}` of texts of at most {longest} printable "
        "characters, got"
        f" {value!r:.200}; write it on one line, without control characters."
      )


def check_seed(seed: str | None, name: str = "seed") -> None:
  """ValueError unless an order's seed is None or one that a calibration's file
  may hold.
  """
  if seed is not None and not re.fullmatch(r"[0-9a-f]{0,64}", seed):
    raise ValueError(
      f"Expected `{name}` of at most 64 hexadecimal digits, got {seed!r:.200}."
    )


def warn_of_copies(values: np.ndarray) -> None:
  """Warns where rows [num_examples, num_thresholds] without NaN occur as copies
  of prompts do.

  Nearly all kinds of equal rows then have a size that is a multiple of one k >=
  2; so many do once in 10^6 tables of independent draws at most:

      P(size of a kind = 0 mod k) < max(1 / k, 1 / 5) for independent draws
  """
  kinds = collections.Counter()
  for block in row_blocks(values):
    finite = block[np.isfinite(block).all(axis=1)] + 0.0  # -0 is 0
    kinds.update(hash(row.tobytes()) for row in finite)
  sizes = np.array([*kinds.values()])
  hits = (sizes[:, None] % _COPIES == 0).sum(axis=0)
  if (
    special.bdtrc(hits - 1, len(sizes), np.maximum(1.0 / _COPIES, 0.2)) < 1e-6
  ).any():
    warnings.warn(
      "rows of losses repeat as copies of a prompt do, and copies count "
      "once: give those of"
      " one prompt one of the `groups`.",
      stacklevel=5,
    )


def row_blocks(values: np.ndarray) -> Iterator[np.ndarray]:
  """`values` in pieces of whole rows, so that what is computed of each stays
  small.
  """
  step = max(1, _CELLS // values.shape[1])
  return (values[start : start + step] for start in range(0, len(values), step))
