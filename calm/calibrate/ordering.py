"""The order in which a test sees prompts, and clusters of prompts."""

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np

from calm.calibrate.procedures import Procedure
from calm.calibrate.sequence_losses import SequenceLosses, Support


def order_seed(ids: Sequence[str], procedure: Procedure | None) -> str:
  """Hexadecimal seed made of sorted ids and procedure: nobody chooses it by its outcome."""
  digest = hashlib.sha256()
  digest.update(b"null" if procedure is None else procedure.digest().encode("ascii"))
  for name in sorted(ids):
    digest.update(b"\n" + name.encode("utf-8"))
  return digest.hexdigest()[:16]


def permutation(ids: Sequence[str], procedure: Procedure | None) -> np.ndarray:
  """Row numbers in the tested order; it does not depend on how the prompts are stored.

  Args:
    ids: [num_examples] unique ids.
    procedure: how outputs were decoded, or None.

  Returns:
    [num_examples] row numbers.
  """
  by_name = np.array(sorted(range(len(ids)), key=ids.__getitem__), dtype=np.int64)
  generator = np.random.Generator(np.random.PCG64(int(order_seed(ids, procedure), 16)))
  return by_name[generator.permutation(len(ids))]


def tested_order(losses: SequenceLosses) -> tuple[np.ndarray, str]:
  """(row numbers in the tested order, hexadecimal seed) of `losses`."""
  count = len(losses.values)
  ids = losses.ids or tuple(f"{row:09d}" for row in range(count))
  seed = order_seed(ids, losses.procedure)
  if losses.order == "given":
    return np.arange(count), seed
  return permutation(ids, losses.procedure), seed


def unit_support(losses: SequenceLosses, groups: Sequence[str] | None) -> Support:
  """Declared range of cluster means: means of several 0-or-1 losses are not 0 or 1.

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
