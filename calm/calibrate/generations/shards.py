"""Parts of one list of prompts, each decoded by a process of its own, and how they are marked.

A prompt belongs to the part that a hash of its name says, whatever else is in the list and
whoever asks; the prompts of a group go to one part together. Part k of N lies in a folder
`shard-k-of-N`, written by one process that talks to no other, and is done when `complete.json`
is there, which is written last and says what the part is of. `merging` puts parts together.
"""

import dataclasses
import hashlib
import itertools
import json
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from calm import storage
from calm.calibrate.generations.records import GenerationsError, Prompt

SCHEMA_VERSION = 1
MARK = "complete.json"
_FOLDER = re.compile(r"shard-(\d{5})-of-(\d{5})")
MOST_SHARDS = 99_999


@dataclasses.dataclass(frozen=True)
class Shard:
  """One of `count` parts; `number` counts from 0.

  Raises:
    ValueError: there is no such part.
  """

  number: int
  count: int

  def __post_init__(self):
    whole = type(self.count) is int and type(self.number) is int
    if not whole or not 1 <= self.count <= MOST_SHARDS or not 0 <= self.number < self.count:
      raise ValueError(
        f"Expected `shard_id` in 0 ... `num_shards` - 1, of at most {MOST_SHARDS} shards, got"
        f" {self.number!r} of {self.count!r}; the first shard is 0."
      )

  @property
  def name(self) -> str:
    """The name of its folder."""
    return f"shard-{self.number:05d}-of-{self.count:05d}"

  def has(self, prompt: Prompt) -> bool:
    """Whether the prompt is of this part."""
    return shard_of(prompt, self.count) == self.number


def shard_of(prompt: Prompt, count: int) -> int:
  """The part of `count` that a prompt belongs to, by its group or, where it has none, its id.

  SHA-256 of the name, so that it is the same in every process, version and machine.
  """
  kind, name = ("id", prompt.id) if prompt.group is None else ("group", prompt.group)
  digest = hashlib.sha256(f"{kind}/{name}".encode()).digest()
  return int.from_bytes(digest[:8], "big") % count


class Listing:
  """The whole list of prompts as every part sees it: how many, a digest, and who is mine.

  Attributes:
    count: prompts seen so far.
    positions: places in the list of those of the part, in order.
  """

  def __init__(self, shard: Shard):
    self.shard, self.count = shard, 0
    self.positions: list[int] = []
    self._digest = hashlib.sha256()

  def mine(self, prompts: Iterable[Prompt]) -> Iterator[Prompt]:
    """The prompts of the part; everything of the list is counted on the way."""
    for prompt in prompts:
      self._digest.update(json.dumps(prompt.to_json(), sort_keys=True).encode() + b"\n")
      if self.shard.has(prompt):
        self.positions.append(self.count)
        yield prompt
      self.count += 1

  @property
  def digest(self) -> str:
    """SHA-256 (hexadecimal) of the list."""
    return self._digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class Mark:
  """What a finished part says of itself.

  Attributes:
    kind: 'generate' or 'infer', the command that made it.
    shard: which part.
    num_prompts: prompts of the whole list.
    prompts_digest: of the whole list.
    positions: places in the list of this part's prompts.
    about: what the outputs depend on, compared between parts.
    checksums: SHA-256 of its files.
  """

  kind: str
  shard: Shard
  num_prompts: int
  prompts_digest: str
  positions: tuple[int, ...]
  about: Mapping[str, Any]
  checksums: Mapping[str, str]

  def save(self, folder: pathlib.Path) -> None:
    """Writes the mark: the part is done."""
    value = {
      "schema_version": SCHEMA_VERSION,
      "kind": self.kind,
      "num_shards": self.shard.count,
      "shard_id": self.shard.number,
      "num_prompts": self.num_prompts,
      "prompts_digest": self.prompts_digest,
      "positions": list(self.positions),
      "about": dict(self.about),
      "checksums": dict(self.checksums),
    }
    storage.write_atomically(folder / MARK, json.dumps(value, ensure_ascii=False) + "\n")


def mark_of(
  kind: str, listing: Listing, about: Mapping[str, Any], folder: pathlib.Path, names
) -> Mark:
  """The mark of a part whose files are whole; `names` are those that it answers for."""
  sums = {name: storage.checksum(folder / name) for name in names}
  # As it is when it is read again: what is compared was JSON once.
  plain = json.loads(json.dumps(about))
  positions = tuple(listing.positions)
  return Mark(kind, listing.shard, listing.count, listing.digest, positions, plain, sums)


def read_mark(folder: pathlib.Path) -> Mark | None:
  """What a part says of itself; None where it is not done.

  Raises:
    GenerationsError: the mark is damaged, or of a folder of another name.
  """
  path = folder / MARK
  try:
    value = storage.parse_json(storage.content(path))
  except FileNotFoundError:
    return None
  except (OSError, ValueError) as error:
    raise GenerationsError(
      f"{path}: expected the mark of a finished shard, got no JSON: {error}; take the folder"
      " away and run the shard again."
    ) from error
  try:
    mark = _checked(value)
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise GenerationsError(
      f"{path}: expected the mark of a finished shard, got one that is not: {error!r}; take"
      " the folder away and run the shard again."
    ) from error
  if folder.name != mark.shard.name and _FOLDER.fullmatch(folder.name):
    raise GenerationsError(
      f"{path}: expected the folder {mark.shard.name} of its mark, got {folder.name}; give"
      " the folder its name back."
    )
  return mark


def _checked(value: Any) -> Mark:
  if value["schema_version"] != SCHEMA_VERSION or value["kind"] not in ("generate", "infer"):
    raise ValueError(
      f"Expected `schema_version` {SCHEMA_VERSION} and `kind` generate or infer, got"
      f" {value['schema_version']!r} and {value['kind']!r}"
    )
  positions, total = value["positions"], value["num_prompts"]
  whole = lambda number: type(number) is int
  if not whole(value["schema_version"]) or not isinstance(value["prompts_digest"], str):
    raise ValueError(
      "Expected `schema_version` to be a number and `prompts_digest` a text, got others"
    )
  if not isinstance(positions, list) or not isinstance(value["about"], dict):
    raise ValueError("Expected `positions` to be a list and `about` an object, got others")
  if not whole(total) or not all(whole(at) and 0 <= at < total for at in positions):
    raise ValueError("Expected `positions` to be places of a list of `num_prompts`, got others")
  if any(a >= b for a, b in itertools.pairwise(positions)):
    raise ValueError("Expected `positions` to ascend, got another order")
  sums = value["checksums"]
  if not all(isinstance(v, str) and "/" not in k for k, v in sums.items()):
    raise ValueError("Expected `checksums` to be texts by file, got others")
  return Mark(
    value["kind"],
    Shard(value["shard_id"], value["num_shards"]),
    total,
    value["prompts_digest"],
    tuple(positions),
    value["about"],
    dict(sums),
  )


def folders(root: pathlib.Path) -> list[pathlib.Path]:
  """The folders of parts in a folder, by name."""
  found = [path for path in root.iterdir() if path.is_dir() and _FOLDER.fullmatch(path.name)]
  return sorted(found)


def named(folder: pathlib.Path) -> Shard | None:
  """The part that a folder's name tells."""
  found = _FOLDER.fullmatch(folder.name)
  return Shard(int(found[1]), int(found[2])) if found else None
