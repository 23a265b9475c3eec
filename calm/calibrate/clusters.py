"""The tested order of losses, and losses of whole clusters."""

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

from calm.calibrate import checks
from calm.calibrate.generations import order as order_lib
from calm.calibrate.losses import SequenceLosses, Support

_ORDERS = 16  # of which the least favourable counts, where rows are of few kinds


def order_seeds(
  losses: SequenceLosses, seed: str | None = None
) -> tuple[tuple[str, ...], bool]:
  """Hexadecimal seeds of the orders in which rows, or clusters, are tested.

  Rows of few kinds (0 or 1 at one threshold) leave too few seeds: for n prompts n + 1 fixed
  orders, with a level of up to 0.26 where 0.05 is promised. There 16 orders are tested and the
  largest p-value counts. Another `seed` than that of the contents is of one order. Returns
  seeds, of which the first is kept, and whether it is as good as drawn.
  """
  kinds = order_lib.FEW_KINDS + 1
  if not losses.contents:
    # A digest of the losses, where no text of a prompt is known.
    digests = order_lib.content_digests(_units(losses))
    contents = order_lib.digest_of_digests(digests)
    kinds = len(np.unique(digests))
    losses = dataclasses.replace(losses, contents=contents)
  own = order_seed(losses)
  if seed not in (None, own):
    return (seed,), True
  drawn = kinds > order_lib.FEW_KINDS
  many = range(1, 1 if drawn or kinds == 1 else _ORDERS)
  more = (hashlib.sha256(f"{own}/{number}".encode()) for number in many)
  return (own, *(digest.hexdigest()[:16] for digest in more)), drawn


def order_seed(losses: SequenceLosses) -> str:
  """Hexadecimal seed of ids, contents and procedure, for rows or clusters."""
  names = losses.ids or tuple(f"{row:09d}" for row in range(len(losses.values)))
  units = names if losses.groups is None else tuple(set(losses.groups))
  return order_lib.order_seed(units, losses.procedure, losses.contents)


def _units(losses: SequenceLosses) -> Iterator[bytes]:
  """Rows, or cluster means, as bytes; -0 is 0."""
  units = losses if losses.groups is None else cluster_means(losses, losses.groups)
  blocks = checks.row_blocks(units.values)
  return (row.tobytes() for block in blocks for row in block + 0.0)


def names_of_rows(losses: SequenceLosses) -> tuple[str, ...]:
  """Ids; without them numbers that rows keep however they are stored."""
  if losses.ids:
    return losses.ids
  digests = order_lib.content_digests(_units(dataclasses.replace(losses, groups=None)))
  places = np.argsort(np.argsort(digests, kind="stable"), kind="stable")
  return tuple(f"{place:09d}" for place in places.tolist())


def tested_orders(losses: SequenceLosses, seeds: Sequence[str]) -> list[np.ndarray]:
  """Row numbers of `losses` (units by now) in each of the tested orders."""
  names = names_of_rows(losses)
  return [order_lib.seeded_order(names, seed) for seed in seeds]


def declared_groups(losses: SequenceLosses) -> tuple[str, ...] | None:
  """The groups that `losses` carry, or None where each prompt is a cluster of its own."""
  groups = losses.groups
  return None if groups is None or len(set(groups)) == len(groups) else groups


def unit_support(losses: SequenceLosses, groups: Sequence[str] | None) -> Support:
  """Declared range of cluster means: means of several 0-or-1 losses are not 0 or 1."""
  binary = losses.support.binary and (groups is None or len(set(groups)) == len(groups))
  return dataclasses.replace(losses.support, binary=binary)


def means(
  values: np.ndarray, groups: Sequence[str] | np.ndarray, largest: int = 0, fill: float = 0.0
) -> tuple[list[str], np.ndarray]:
  """Sorted names and means [num_clusters, num_thresholds] of the prompts of each cluster.

  With a declared largest cluster m, smaller ones are filled with losses of `fill`: at the
  tolerance, (sum of losses + (m - size) tolerance) / m is at most the tolerance on average
  exactly where the loss of a prompt is, E[sum of losses] <= tolerance E[size].
  """
  names, index = np.unique(np.asarray(groups), return_inverse=True)
  sums = np.zeros((len(names), values.shape[1]))
  np.add.at(sums, index, values)
  sizes = np.bincount(index).astype(np.float64)[:, None]
  if largest and sizes.max() > largest:
    raise ValueError(
      f"Expected clusters of at most `largest_cluster` = {largest} prompts, got one of"
      f" {int(sizes.max())}; declare the largest that there may ever be."
    )
  found = (sums + (largest - sizes) * fill) / largest if largest else sums / sizes
  return names.tolist(), found


def cluster_means(losses: SequenceLosses, groups: Sequence[str]) -> SequenceLosses:
  """The losses of clusters: `means` over their prompts."""
  ids, values = means(losses.values, groups)
  support = unit_support(losses, groups)
  return dataclasses.replace(losses, values=values, support=support, ids=ids, groups=None)
