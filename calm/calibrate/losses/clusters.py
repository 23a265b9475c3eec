"""The tested order of losses, and losses of whole clusters."""

import dataclasses
import secrets
from collections.abc import Sequence

import numpy as np

from calm.calibrate.generations import order as order_lib
from calm.calibrate.losses import checks
from calm.calibrate.losses.sequence_losses import SequenceLosses, Support

# Tables with fewer kinds of rows than this hardly tell one draw of prompts from another.
_FEW_KINDS = 8


def with_contents(losses: SequenceLosses) -> SequenceLosses:
  """`losses` with a digest of their rows, where nothing is known of what the prompts say.

  Rows of few kinds (0 or 1 at one threshold) say too little: the seed would be a function of
  their counts, and a table stored sorted would be tested in one fixed order for each. Their
  contents are then drawn from the operating system's entropy; the seed is recorded.
  """
  if losses.contents:
    return losses
  blocks = checks.row_blocks(losses.values)
  contents = order_lib.contents_digest(
    row.tobytes() for b in blocks for row in b + 0.0
  )  # no -0
  if 1 < _kinds(losses.values) <= _FEW_KINDS:
    contents = secrets.token_hex(32)
  return dataclasses.replace(losses, contents=contents)


def _kinds(values: np.ndarray) -> int:
  """How many different rows there are, or more than `_FEW_KINDS`."""
  kinds: set[bytes] = set()
  for block in checks.row_blocks(values):
    kinds |= {row.tobytes() for row in np.unique(block + 0.0, axis=0)}  # -0 is 0
    if len(kinds) > _FEW_KINDS:
      break
  return len(kinds)


def _names(losses: SequenceLosses) -> tuple[str, ...]:
  return losses.ids or tuple(f"{row:09d}" for row in range(len(losses.values)))


def order_seed(losses: SequenceLosses) -> str:
  """Hexadecimal seed of the order in which rows, or clusters, are tested."""
  names = order_lib.unit_names(_names(losses), losses.groups)
  return order_lib.order_seed(names, losses.procedure, losses.contents)


def tested_order(losses: SequenceLosses, seed: str | None = None) -> tuple[np.ndarray, str]:
  """(row numbers in the tested order, hexadecimal seed) of `losses`.

  Args:
    losses: with `contents` (`with_contents`).
    seed: a seed that was recorded before; None makes it.
  """
  seed = seed or order_seed(losses)
  if losses.order == "given":
    return np.arange(len(losses.values)), seed
  return order_lib.seeded_order(_names(losses), seed), seed


def declared_groups(losses: SequenceLosses) -> tuple[str, ...] | None:
  """The groups that `losses` carry, or None where each prompt is a cluster of its own."""
  groups = losses.groups
  return None if groups is None or len(set(groups)) == len(groups) else groups


def unit_support(losses: SequenceLosses, groups: Sequence[str] | None) -> Support:
  """Declared range of cluster means: means of several 0-or-1 losses are not 0 or 1.

  Args:
    losses: losses of prompts.
    groups: [num_examples] cluster names; None leaves prompts alone.

  Raises:
    ValueError: `groups` has another length than `losses`, or a row has none.
  """
  if groups is None:
    return losses.support
  groups = checks.check_groups(groups, len(losses.values))
  binary = losses.support.binary and len(set(groups)) == len(groups)
  return Support(losses.support.lower, losses.support.upper, binary)


def cluster_means(losses: SequenceLosses, groups: Sequence[str]) -> SequenceLosses:
  """One row a cluster, the mean of its prompts: clusters are the exchangeable units.

  Args:
    losses: [num_examples, num_thresholds] losses.
    groups: [num_examples] cluster names.

  Returns:
    [num_clusters, num_thresholds] losses, clusters sorted by name, or by where they begin if
    rows are tested in the given order.

  Raises:
    ValueError: `groups` has another length, or a row has none.
  """
  support = unit_support(losses, groups)
  groups = checks.check_groups(groups, len(losses.values))
  names, first, index = np.unique(np.asarray(groups), return_index=True, return_inverse=True)
  if losses.order == "given":
    places = np.argsort(first)
    names, index = names[places], np.argsort(places)[index]
  sizes = np.bincount(index).astype(np.float64)
  sums = np.zeros((len(names), losses.values.shape[1]))
  np.add.at(sums, index, losses.values)
  return dataclasses.replace(
    losses,
    values=sums / sizes[:, None],
    support=support,
    ids=tuple(names.tolist()),
    groups=None,
  )
