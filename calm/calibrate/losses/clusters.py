"""The tested order of losses, and losses of whole clusters."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from calm.calibrate.generations import order as order_lib
from calm.calibrate.losses.sequence_losses import SequenceLosses, Support


def tested_order(losses: SequenceLosses) -> tuple[np.ndarray, str]:
  """(row numbers in the tested order, hexadecimal seed) of `losses`."""
  count = len(losses.values)
  ids = losses.ids or tuple(f"{row:09d}" for row in range(count))
  seed = order_lib.order_seed(ids, losses.procedure)
  if losses.order == "given":
    return np.arange(count), seed
  return order_lib.permutation(ids, losses.procedure), seed


def unit_support(losses: SequenceLosses, groups: Sequence[str] | None) -> Support:
  """Declared range of cluster means: means of several 0-or-1 losses are not 0 or 1.

  Args:
    losses: losses of prompts.
    groups: [num_examples] cluster names; None leaves prompts alone.

  Raises:
    ValueError: `groups` has another length than `losses`.
  """
  if groups is None:
    return losses.support
  if len(groups) != len(losses.values):
    raise ValueError(
      f"`groups` must name the cluster of each of the {len(losses.values)} rows, got"
      f" {len(groups)} names."
    )
  binary = losses.support.binary and len(set(groups)) == len(groups)
  return Support(losses.support.lower, losses.support.upper, binary)


def cluster_means(losses: SequenceLosses, groups: Sequence[str]) -> SequenceLosses:
  """One row a cluster, the mean of its prompts: clusters are the exchangeable units.

  Args:
    losses: [num_examples, num_thresholds] losses.
    groups: [num_examples] cluster names.

  Returns:
    [num_clusters, num_thresholds] losses, clusters sorted by name.

  Raises:
    ValueError: `groups` has another length.
  """
  support = unit_support(losses, groups)
  names, index = np.unique(np.asarray([str(group) for group in groups]), return_inverse=True)
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
