"""Clusters of prompts, their losses, and the order in which a test sees them.

A betting test is valid if its order has nothing to do with losses: its seed is
made of names and of what the prompts say, since a permutation of names alone is
one fixed permutation.
"""

import dataclasses
import hashlib
import itertools
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse

from calm.calibrate import checks
from calm.calibrate.generations.records import Prompt

if TYPE_CHECKING:
  from calm.calibrate.losses import SequenceLosses

# Unicode's Default_Ignorable_Code_Point: soft hyphens, joiners, marks of
# direction, ...
_IGNORABLE = re.compile(
  "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e"
  "\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3"
  "\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)

# Tables (or lists of texts) of at most so many kinds hardly tell one draw from
# another.
FEW_KINDS = 8
# of which the least favourable counts, where rows are of few kinds
_ORDERS = 16


# ---- Which prompts are a cluster


def fold_text(text: str) -> str:
  """Unicode's NFKC_Casefold of a text, with every run of white space as one
  space.
  """
  if not text.isascii():
    text = _IGNORABLE.sub("", text)
    text = unicodedata.normalize(
      "NFKC", unicodedata.normalize("NFKC", text).casefold()
    )
  return " ".join(text.casefold().split())


def join_equal(names: Sequence[str], texts: Sequence[str]) -> tuple[str, ...]:
  """[num_rows] cluster of each row: rows of one name, or of equal text, are in
  one.

  A cluster has the name that is first of its names, sorted. '' is equal to no
  text.
  """
  ordered = sorted(set(names))
  first = dict[str, str]()
  place = {name: number for number, name in enumerate(ordered)}
  said = ((name, text) for name, text in zip(names, texts, strict=True) if text)
  pairs = [
    (place[name], place[first.setdefault(text, name)]) for name, text in said
  ]
  ends = tuple(np.array(pairs, np.int64).reshape(-1, 2).T)
  graph = sparse.coo_array(
    (np.ones(len(pairs)), ends), shape=(len(ordered), len(ordered))
  )
  _, labels = sparse.csgraph.connected_components(graph, directed=False)
  _, least = np.unique(labels, return_index=True)
  return tuple(ordered[least[labels[place[name]]]] for name in names)


def prompt_clusters(prompts: Sequence[Prompt]) -> tuple[str, ...]:
  """[num_prompts] cluster of each prompt: those of one group, or of equal
  `fold_text`.
  """
  names = [f"prompt {p.id}" if p.group is None else p.group for p in prompts]
  return join_equal(names, [fold_text(prompt.input) for prompt in prompts])


def known_groups(names: Sequence[str] | None) -> tuple[str, ...] | None:
  """Names of clusters, or None where every row is a cluster of its own."""
  return (
    tuple(names) if names is not None and len(set(names)) < len(names) else None
  )


# ---- Their losses


def means(
  values: np.ndarray,
  groups: Sequence[str] | np.ndarray,
  largest: int = 0,
  fill: float = 0.0,
) -> tuple[list[str], np.ndarray]:
  """Sorted names and means [num_clusters, num_thresholds] of the prompts of
  each cluster.

  With a declared largest cluster m, smaller ones are filled with losses of
  `fill`: at the tolerance, (sum of losses + (m - size) tolerance) / m is at
  most the tolerance on average exactly where the loss of a prompt is, E[sum of
  losses] <= tolerance E[size].
  """
  names, index = np.unique(np.asarray(groups), return_inverse=True)
  sums = np.zeros((len(names), values.shape[1]))
  np.add.at(sums, index, values)
  sizes = np.bincount(index).astype(np.float64)[:, None]
  if largest and sizes.max() > largest:
    raise ValueError(
      f"Expected clusters of at most `largest_cluster` = {largest} prompts, "
      "got one of"
      f" {int(sizes.max())}; declare the largest that there may ever be."
    )
  found = (
    (sums + (largest - sizes) * fill) / largest if largest else sums / sizes
  )
  return names.tolist(), found


# ---- The order


def content_digests(contents: Iterable[bytes]) -> np.ndarray:
  """[number of contents] SHA-256 of each, 32 bytes."""
  return np.fromiter(
    (hashlib.sha256(content).digest() for content in contents), "S32"
  )


def digest_of_digests(digests: np.ndarray) -> str:
  """SHA-256 (hexadecimal) of several digests, whatever their order."""
  return hashlib.sha256(np.sort(digests).tobytes()).hexdigest()


def run_digest(prompts: Sequence[Prompt], predictions: Iterable[str]) -> str:
  """Digest of what prompts say, whatever their order and names.

  Where an input is missing it is of the full model's texts too, '' if these are
  of few kinds.
  """
  texts = [prompt.input for prompt in prompts]
  if not all(texts):
    texts = [
      f"{p.input}\0{text}" for p, text in zip(prompts, predictions, strict=True)
    ]
    if len(set(texts)) <= FEW_KINDS:
      return ""
  return digest_of_digests(content_digests(text.encode() for text in texts))


def order_seed(losses: "SequenceLosses") -> str:
  """Hexadecimal seed (16 digits) of ids, contents and procedure, for rows or
  clusters.
  """
  procedure = losses.procedure
  names = losses.groups or losses.ids
  digest = hashlib.sha256(
    b"null" if procedure is None else procedure.digest().encode("ascii")
  )
  digest.update(losses.contents.encode("ascii"))
  count = len(losses.values)
  ordered = (
    sorted(set(names)) if names else [f"{row:09d}" for row in range(count)]
  )
  digest.update("\n".join(("", *ordered)).encode("utf-8"))
  return digest.hexdigest()[:16]


def tested_orders(
  losses: "SequenceLosses", seed: str | None = None
) -> tuple[tuple[str, ...], bool, list[np.ndarray]]:
  """Hexadecimal seeds of the orders in which rows, or clusters, are tested, and
  the orders.

  Rows of few kinds (0 or 1 at one threshold) leave too few seeds: for n prompts
  n + 1 fixed orders, with a level of up to 0.26 where 0.05 is promised. There
  16 orders are tested and the largest p-value counts. Another `seed` than that
  of the contents is of one order. Returns seeds, of which the first is kept;
  whether it is as good as drawn; and row numbers in each of the orders, however
  rows are stored (none where `losses` have groups).
  """
  kinds = FEW_KINDS + 1
  names = losses.ids
  groups = losses.groups
  digests = np.array([], "S32")
  if not losses.contents or not (names or groups):
    values = (
      losses.values if groups is None else means(losses.values, groups)[1]
    )
    rows = itertools.chain.from_iterable(checks.row_blocks(values))
    digests = content_digests((row + 0.0).tobytes() for row in rows)  # -0 is 0
  if not losses.contents:
    # A digest of the losses, where no text of a prompt is known.
    kinds = len(np.unique(digests))
    losses = dataclasses.replace(losses, contents=digest_of_digests(digests))
  own = order_seed(losses)
  drawn = kinds > FEW_KINDS or seed not in (None, own)
  many = range(1, 1 if drawn or kinds == 1 else _ORDERS)
  more = (hashlib.sha256(f"{own}/{number}".encode()) for number in many)
  seeds = (
    own if seed is None else seed,
    *(digest.hexdigest()[:16] for digest in more),
  )
  if groups is not None:
    return seeds, drawn, []
  if not names:  # numbers that rows keep
    places = np.argsort(np.argsort(digests, kind="stable"), kind="stable")
    names = [f"{place:09d}" for place in places.tolist()]
  return seeds, drawn, [seeded_order(names, each) for each in seeds]


def seeded_order(names: Sequence[str], seed: str) -> np.ndarray:
  """[num_examples] row numbers sorted by SHA-256 of seed and (unique) name."""
  keys = content_digests(f"{seed}\n{name}".encode() for name in names)
  return np.argsort(keys, kind="stable")


def seeded_uniform(seed: str) -> float:
  """A number in (0, 1) that is drawn beside the order of a seed."""
  digits = hashlib.sha256(f"{seed}/uniform".encode()).hexdigest()[:13]
  return (int(digits, 16) + 0.5) / 16.0**13
