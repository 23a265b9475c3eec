"""The order in which a test sees prompts, and clusters of prompts.

A betting test is valid if its order has nothing to do with losses. A file may be sorted by
loss, and a permutation that names alone decide is one fixed permutation of it. So the seed is
made of names AND of what the prompts say; places come from SHA-256, in every version alike.
"""

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Sequence

import numpy as np

from calm.calibrate.generations.procedure import Procedure
from calm.calibrate.generations.records import Prompt

# Unicode's Default_Ignorable_Code_Point: soft hyphens, joiners, marks of direction, ...
_IGNORABLE = re.compile(
  "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e"
  "\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3"
  "\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)

# Tables (or lists of texts) of at most so many kinds hardly tell one draw from another.
FEW_KINDS = 8


def content_digests(contents: Iterable[bytes]) -> np.ndarray:
  """[number of contents] SHA-256 of each, 32 bytes."""
  return np.fromiter((hashlib.sha256(content).digest() for content in contents), "S32")


def digest_of_digests(digests: np.ndarray) -> str:
  """SHA-256 (hexadecimal) of several digests, whatever their order."""
  return hashlib.sha256(np.sort(digests).tobytes()).hexdigest()


def prompts_digest(prompts: Sequence[Prompt]) -> str:
  """What prompts say, as a digest that depends neither on their order nor on their names."""
  return digest_of_digests(content_digests(prompt.input.encode() for prompt in prompts))


def run_digest(prompts: Sequence[Prompt], predictions: Iterable[str]) -> str:
  """`prompts_digest`; where an input is missing, that of inputs and the full model's texts.

  '' where these texts are of few kinds, which say too little for a seed.
  """
  if all(prompt.input for prompt in prompts):
    return prompts_digest(prompts)
  texts = [f"{p.input}\0{text}" for p, text in zip(prompts, predictions, strict=True)]
  if len(set(texts)) <= FEW_KINDS:
    return ""
  return digest_of_digests(content_digests(text.encode() for text in texts))


def order_seed(ids: Sequence[str], procedure: Procedure | None, contents: str = "") -> str:
  """Hexadecimal seed (16 digits) of sorted unit names, procedure and contents' digest.

  Nobody can choose it by its outcome.
  """
  digest = hashlib.sha256()
  digest.update(b"null" if procedure is None else procedure.digest().encode("ascii"))
  digest.update(contents.encode("ascii"))
  for name in sorted(ids):
    digest.update(b"\n" + name.encode("utf-8"))
  return digest.hexdigest()[:16]


def seeded_order(names: Sequence[str], seed: str) -> np.ndarray:
  """[num_examples] row numbers sorted by SHA-256 of seed and (unique) name."""
  start = hashlib.sha256(seed.encode("utf-8") + b"\n")

  def key(name: str) -> bytes:
    digest = start.copy()
    digest.update(name.encode("utf-8"))
    return digest.digest()

  keys = np.fromiter(map(key, names), "S32", len(names))
  return np.argsort(keys, kind="stable")


def permutation(
  ids: Sequence[str], procedure: Procedure | None, contents: str = ""
) -> np.ndarray:
  """[num_examples] row numbers in the tested order, however the prompts are stored."""
  return seeded_order(ids, order_seed(ids, procedure, contents))


def seeded_uniform(seed: str) -> float:
  """A number in (0, 1) that is drawn beside the order of a seed."""
  digits = hashlib.sha256(f"{seed}/uniform".encode()).hexdigest()[:13]
  return (int(digits, 16) + 0.5) / 16.0**13


def fold_text(text: str) -> str:
  """Text without differences of Unicode form, case, invisible characters and white space.

  This is Unicode's NFKC_Casefold, with every run of white space as one space.
  """
  if not text.isascii():
    text = _IGNORABLE.sub("", text)
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
  return " ".join(text.casefold().split())


def letters(text: str) -> str:
  """What twins share: the text in lower case without punctuation, symbols and spaces."""
  folded = fold_text(text)
  others = {ord(c): None for c in set(folded) if unicodedata.category(c)[0] not in "LMN"}
  return folded.translate(others) or text


def join_equal(names: Sequence[str], texts: Sequence[str]) -> tuple[str, ...]:
  """[num_rows] cluster of each row: rows of one name, or of equal text, are in one.

  A cluster has the name that is first of its names, sorted. '' is equal to no text.
  """
  parent: dict[str, str] = {}

  def root(name: str) -> str:
    while (above := parent.setdefault(name, name)) != name:
      parent[name] = name = parent[above]
    return name

  first: dict[bytes, str] = {}
  for name, text in zip(names, texts, strict=True):
    if text:
      digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
      a, b = sorted((root(name), root(first.setdefault(digest, name))))
      parent[b] = a
  return tuple(map(root, names))


def prompt_clusters(prompts: Sequence[Prompt]) -> tuple[str, ...]:
  """[num_prompts] cluster of each prompt: prompts of one group or of equal input are in one.

  A prompt without a group is a group of its own. Inputs are equal if `fold_text` makes them so.
  """
  names = [
    f"prompt {prompt.id}" if prompt.group is None else str(prompt.group) for prompt in prompts
  ]
  return join_equal(names, [fold_text(prompt.input) for prompt in prompts])


def known_groups(prompts: Sequence[Prompt]) -> tuple[str, ...] | None:
  """`prompt_clusters`, or None where every prompt is a cluster of its own."""
  names = prompt_clusters(prompts)
  return names if len(set(names)) < len(names) else None


def unit_names(ids: Sequence[str], groups: Sequence[str] | None) -> tuple[str, ...]:
  """Names of the exchangeable units: prompts, or clusters where there are `groups`."""
  return tuple(ids) if groups is None else tuple(sorted(set(groups)))


def decoding_order(
  ids: Sequence[str],
  groups: Sequence[str] | None,
  procedure: Procedure | None,
  contents: str = "",
) -> np.ndarray:
  """[num_examples] row numbers in the order of a sequential run.

  Units are permuted as `calibrate` permutes them; the prompts of a cluster stand together,
  sorted by id, so that a run that stops leaves whole clusters.

  Args:
    ids: [num_examples] unique ids.
    groups: [num_examples] cluster of each, or None where prompts are the units.
    procedure: how outputs are decoded, or None.
    contents: `prompts_digest` of the prompts.
  """
  if groups is None:
    return permutation(ids, procedure, contents)
  names = unit_names(ids, groups)
  order = permutation(names, procedure, contents).tolist()
  place = {names[row]: position for position, row in enumerate(order)}
  rows = sorted(range(len(ids)), key=lambda row: (place[groups[row]], ids[row]))
  return np.array(rows, np.int64)


def consecutive_units(count: int, groups: Sequence[str] | None) -> tuple[slice, ...]:
  """[num_units] slices of rows, where the rows of a cluster stand together.

  `groups` are the [count] clusters; None makes every row its own unit. ValueError where a
  cluster stands in two places.
  """
  if groups is None:
    return tuple(slice(row, row + 1) for row in range(count))
  starts = [row for row in range(count) if row == 0 or groups[row] != groups[row - 1]]
  if len(starts) != len(set(groups)):
    raise ValueError(
      "Expected `groups` to have the rows of each cluster together to be tested in their"
      f" order, got {len(set(groups))} clusters in {len(starts)} places; use"
      " `decoding_order`."
    )
  ends = [*starts[1:], count]
  return tuple(slice(start, end) for start, end in zip(starts, ends, strict=True))


def unit_means(losses: np.ndarray, units: Sequence[slice]) -> np.ndarray:
  """[num_units] mean loss of consecutive units, the first of which begins at `losses[0]`."""
  starts = np.array([unit.start for unit in units]) - units[0].start
  sizes = np.array([unit.stop - unit.start for unit in units])
  return np.add.reduceat(np.asarray(losses, np.float64), starts) / sizes
