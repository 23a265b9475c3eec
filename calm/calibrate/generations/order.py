"""The order in which a test sees prompts, and clusters of prompts.

A betting test is valid if its order has nothing to do with losses: its seed is made of names
and of what the prompts say, since a permutation of names alone is one fixed permutation.
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


def run_digest(prompts: Sequence[Prompt], predictions: Iterable[str]) -> str:
  """Digest of what prompts say, whatever their order and names.

  Where an input is missing it is of the full model's texts too, '' if these are of few kinds.
  """
  texts = [prompt.input for prompt in prompts]
  if not all(texts):
    texts = [f"{p.input}\0{text}" for p, text in zip(prompts, predictions, strict=True)]
    if len(set(texts)) <= FEW_KINDS:
      return ""
  return digest_of_digests(content_digests(text.encode() for text in texts))


def order_seed(ids: Sequence[str], procedure: Procedure | None, contents: str = "") -> str:
  """Hexadecimal seed (16 digits) of sorted unit names, procedure and contents' digest."""
  digest = hashlib.sha256()
  digest.update(b"null" if procedure is None else procedure.digest().encode("ascii"))
  digest.update(contents.encode("ascii"))
  for name in sorted(ids):
    digest.update(b"\n" + name.encode("utf-8"))
  return digest.hexdigest()[:16]


def seeded_order(names: Sequence[str], seed: str) -> np.ndarray:
  """[num_examples] row numbers sorted by SHA-256 of seed and (unique) name."""
  keys = content_digests(f"{seed}\n{name}".encode() for name in names)
  return np.argsort(keys, kind="stable")


def seeded_uniform(seed: str) -> float:
  """A number in (0, 1) that is drawn beside the order of a seed."""
  digits = hashlib.sha256(f"{seed}/uniform".encode()).hexdigest()[:13]
  return (int(digits, 16) + 0.5) / 16.0**13


def fold_text(text: str) -> str:
  """Unicode's NFKC_Casefold of a text, with every run of white space as one space."""
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
  """[num_prompts] cluster of each prompt: those of one group, or of equal `fold_text`."""
  names = [f"prompt {p.id}" if p.group is None else p.group for p in prompts]
  return join_equal(names, [fold_text(prompt.input) for prompt in prompts])


def known_groups(prompts: Sequence[Prompt]) -> tuple[str, ...] | None:
  """`prompt_clusters`, or None where every prompt is a cluster of its own."""
  names = prompt_clusters(prompts)
  return names if len(set(names)) < len(names) else None
