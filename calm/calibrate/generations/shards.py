"""Shards of one list of prompts, each decoded by a process of its own, and merging them.

A prompt belongs to the shard that a hash of its name says, whatever else is in the list; the
prompts of a group go to one shard together. Shard k of N lies in a folder `shard-k-of-N`,
written by one process that talks to no other, and is done when `complete.json` is there, which
is written last and says what the shard is of. Merging copies lines as they are, in the order of
the list; the manifest of a merged folder, or the merged file itself, takes its place last.
"""

import collections
import dataclasses
import hashlib
import itertools
import json
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from calm import storage
from calm.calibrate.generations import cache
from calm.calibrate.generations.procedure import Procedure, describe_differences
from calm.calibrate.generations.records import GenerationsError, Prompt

MARK = "complete.json"
# What the shards of `calm infer` write.
OUTPUTS = "outputs.jsonl"
MOST_SHARDS = 99_999
_FOLDER = re.compile(r"shard-(\d{5})-of-(\d{5})")
_AGAIN = "take the folder away and run the shard again"
# Folders of finished shards, by number, and what each says of itself (`Listing.mark`).
Marks = Mapping[pathlib.Path, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Shard:
  """One of `count` shards; `number` counts from 0.

  Raises:
    ValueError: there is no such shard.
  """

  number: int
  count: int

  def __post_init__(self):
    if not 1 <= self.count <= MOST_SHARDS or not 0 <= self.number < self.count:
      raise ValueError(
        f"Expected `shard_id` in 0 ... `num_shards` - 1, of at most {MOST_SHARDS} shards, got"
        f" {self.number} of {self.count}; the first shard is 0."
      )

  @property
  def name(self) -> str:
    """The name of its folder."""
    return f"shard-{self.number:05d}-of-{self.count:05d}"

  def has(self, prompt: Prompt) -> bool:
    """Whether the prompt, by its group or, where it has none, its id, is of this shard.

    SHA-256 of the name, so that it is the same in every process, version and machine.
    """
    kind, name = ("id", prompt.id) if prompt.group is None else ("group", prompt.group)
    digest = hashlib.sha256(f"{kind}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % self.count == self.number


class Listing:
  """The whole list of prompts as every shard sees it: how many, a digest, and who is mine.

  Attributes:
    count: prompts seen so far.
    positions: places in the list of those of the shard, in order.
  """

  def __init__(self, shard: Shard):
    self.shard, self.count = shard, 0
    self.positions: list[int] = []
    self._digest = hashlib.sha256()

  def mine(self, prompts: Iterable[Prompt]) -> Iterator[Prompt]:
    """The prompts of the shard; everything of the list is counted on the way."""
    for prompt in prompts:
      self._digest.update(_digested(prompt))
      if self.shard.has(prompt):
        self.positions.append(self.count)
        yield prompt
      self.count += 1

  def mark(
    self, kind: str, about: Mapping[str, Any], folder: pathlib.Path, names: Iterable[str]
  ) -> dict[str, Any]:
    """What a finished shard says of itself.

    Args:
      kind: 'generate' or 'infer', the command that wrote it.
      about: what the outputs depend on, compared between shards.
      folder: where it is.
      names: its files, which are whole.
    """
    mark = {
      "schema_version": 1,
      "kind": kind,
      "num_shards": self.shard.count,
      "shard_id": self.shard.number,
      "num_prompts": self.count,
      "prompts_digest": self._digest.hexdigest(),
      "positions": self.positions,
      "about": about,
      "checksums": {name: storage.checksum(folder / name) for name in names},
    }
    return json.loads(json.dumps(mark))  # as it is when it is read again


def _digested(prompt: Prompt) -> bytes:
  return json.dumps(prompt.to_json(), sort_keys=True).encode() + b"\n"


def write_mark(folder: pathlib.Path, mark: Mapping[str, Any]) -> None:
  """Writes the mark: the shard is done."""
  storage.write_atomically(folder / MARK, json.dumps(mark, ensure_ascii=False) + "\n")


def _whole(least: int, most: int = 2**63):
  words = f"a whole number in {least} ... {most}"
  return words, lambda value: type(value) is int and least <= value <= most


_FIELDS: cache.Fields = {
  "schema_version": cache.VERSION,
  "kind": ("'generate' or 'infer'", lambda value: value in ("generate", "infer")),
  "num_shards": _whole(1, MOST_SHARDS),
  "shard_id": _whole(0, MOST_SHARDS - 1),
  "num_prompts": _whole(0),
  "prompts_digest": ("a text", lambda value: isinstance(value, str)),
  "positions": (
    "a list of ascending whole numbers",
    lambda value: (
      isinstance(value, list)
      and all(type(at) is int and at >= 0 for at in value)
      and all(a < b for a, b in itertools.pairwise(value))
    ),
  ),
  "about": ("an object", lambda value: isinstance(value, dict)),
  "checksums": cache.CHECKSUMS,
}


def read_mark(folder: pathlib.Path) -> dict[str, Any] | None:
  """What a shard says of itself; None where it is not done.

  Raises:
    GenerationsError: the mark is damaged, or of a folder of another name.
  """
  try:
    mark = cache.read_document(folder / MARK, _FIELDS, _AGAIN)
  except FileNotFoundError:
    return None
  number, count, places = mark["shard_id"], mark["num_shards"], mark["positions"]
  if number >= count or (places and places[-1] >= mark["num_prompts"]):
    raise GenerationsError(
      f"{folder / MARK}: expected `shard_id` below `num_shards`, and `positions` below"
      f" `num_prompts`, got {number} of {count}, {places[-1:]} of {mark['num_prompts']};"
      f" {_AGAIN}."
    )
  if named(folder) not in (None, Shard(number, count)):
    raise GenerationsError(
      f"{folder / MARK}: expected the folder {Shard(number, count).name} of its mark, got"
      f" {folder.name}; give the folder its name back."
    )
  return mark


def named(folder: pathlib.Path) -> Shard | None:
  """The shard that a folder's name tells."""
  match = _FOLDER.fullmatch(folder.name)
  return Shard(int(match[1]), int(match[2])) if match else None


def merge(places: Sequence[str | pathlib.Path], output: str | pathlib.Path) -> int:
  """Merges shards, and says how many prompts there are.

  Args:
    places: the folders of the shards, or one folder that holds them.
    output: the folder (of `calm generate`) or file (of `calm infer`) to write.

  Returns:
    Prompts of the list.

  Raises:
    GenerationsError: a shard is missing, not finished, there twice or of another list, grid or
      procedure; an id is missing or doubled; or a file is not as its shard left it. The message
      says which.
    OSError: `output` cannot be written, or another process is at it.
  """
  marks, output = parts(places), pathlib.Path(output)
  for folder in marks:
    if output.resolve().is_relative_to(folder.resolve()):
      raise GenerationsError(
        f"Expected `output` beside the shards, got {output}, in the shard {folder}, whose"
        " files it would replace; choose another."
      )
  first = next(iter(marks.values()))
  marks = {folder: mark for folder, mark in marks.items() if mark["positions"]}
  if first["kind"] == "infer":
    _check_files(marks, [OUTPUTS])
    with storage.replacing(output) as file:
      file.writelines(_end(line) for line in _in_order(marks, OUTPUTS))
  else:
    _merge_generations(marks, output)
  return first["num_prompts"]


def parts(places: Sequence[str | pathlib.Path]) -> Marks:
  """All shards of a list, checked against one another, by number.

  Raises:
    GenerationsError: as `merge` says, but for the contents of files.
  """
  at = [pathlib.Path(place) for place in places]
  if len(at) == 1 and named(at[0]) is None and at[0].is_dir() and not (at[0] / MARK).exists():
    at = sorted(folder for folder in at[0].iterdir() if folder.is_dir() and named(folder))
  marks = {folder: mark for folder in at if (mark := read_mark(folder)) is not None}
  which = {
    folder: Shard(mark["shard_id"], mark["num_shards"]) for folder, mark in marks.items()
  }
  counts = {shard.count for shard in (*which.values(), *map(named, at)) if shard is not None}
  numbers = collections.Counter(shard.number for shard in which.values())
  missing = sorted({*range(max(counts, default=0))} - {*numbers})
  half = [folder for folder in at if folder not in marks]
  twice = [folder for folder in marks if numbers[which[folder].number] > 1]
  for what, odd in (
    (f"a folder without any, as {MARK} ends each: {', '.join(map(str, places))}", not at),
    (f"folders that have no {MARK}: {_names(half)}; run them again, they go on", half),
    (f"divisions into {sorted(counts)}: {_names(at)}", len(counts) > 1),
    (f"one twice: {_names(twice)}; leave one out", twice),
    (f"none with --shard_id {_names(missing)} of {max(counts, default=0)}; run them", missing),
  ):
    if odd:
      raise GenerationsError(
        "Expected the finished folders of all shards of one run, as `calm generate` and `calm"
        f" infer` write them with --num_shards, got {what}."
      )
  marks = dict(sorted(marks.items(), key=lambda pair: pair[1]["shard_id"]))
  for folder in marks:
    _check_alike(marks, folder)
  _owners(marks)
  return marks


def _names(some: Sequence[Any]) -> str:
  return ", ".join(map(str, some[:8])) + (", ..." if len(some) > 8 else "")


def _check_alike(marks: Marks, other: pathlib.Path) -> None:
  """GenerationsError unless the first and another are shards of one run."""
  first = next(iter(marks))
  ours, theirs = (
    {name: marks[folder][name] for name in ("kind", "num_prompts", "prompts_digest")}
    | marks[folder]["about"]
    for folder in (first, other)
  )
  differ = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
  if not differ:
    return
  pairs = (f"`{name}` ({ours.get(name)!r}, {theirs.get(name)!r})" for name in differ)
  text = ", ".join(pairs)
  if differ == ["procedure"]:
    procedures = (Procedure.from_json(side["procedure"]) for side in (ours, theirs))
    text = describe_differences(*procedures) or "`procedure`, of which one says less"
  raise GenerationsError(
    f"Expected shards of one run, got two: {first} and {other} differ: {text}; merge those of"
    " one run alone."
  )


def _owners(marks: Marks) -> np.ndarray:
  """[num_prompts] index in `marks` of the shard of each place of the list, which is one."""
  # Counted first: `num_prompts` is no more than what a file says.
  places = [np.array(mark["positions"], np.int64) for mark in marks.values()]
  wanted = next(iter(marks.values()))["num_prompts"] if marks else 0
  if (count := sum(map(len, places))) < wanted:
    held = {*np.concatenate(places).tolist()}
    missing = itertools.islice((at + 1 for at in range(wanted) if at not in held), 10)
    raise GenerationsError(
      f"Expected every prompt in a shard, got {wanted - count} in none: the prompts"
      f" {', '.join(map(str, missing))} of the list; run the shards that have them."
    )
  owners = np.full(wanted, -1)
  for number, (folder, mine) in enumerate(zip(marks, places, strict=True)):
    if len(twice := mine[owners[mine] >= 0]):
      raise GenerationsError(
        f"Expected every prompt in one shard, got {len(twice)} in"
        f" {list(marks)[owners[twice[0]]]} and in {folder}, first the prompt {twice[0] + 1} of"
        " the list; leave one of these folders out."
      )
    owners[mine] = number
  return owners


def _in_order(marks: Marks, name: str) -> Iterator[storage.Line]:
  """The lines of shards' files, one a prompt in the order of each, in the order of the list."""
  files = [storage.read_lines(folder / name) for folder in marks]
  folders, seen = list(marks), dict[str, pathlib.Path]()
  for owner in _owners(marks).tolist():
    folder = folders[owner]
    if (line := next(files[owner], None)) is None:
      raise _other_number(marks, folder / name)
    key = line.value.get("id")
    if not isinstance(key, str):
      raise line.error(f"expected an `id`, a text, got {key!r}; {_AGAIN}.")
    if key in seen:
      raise line.error(
        f"expected every id in one shard, got {key!r} in {seen[key]} too; give every prompt its"
        " own."
      )
    seen[key] = folder
    yield line
  for folder, rest in zip(folders, files, strict=True):
    if next(rest, None) is not None:
      raise _other_number(marks, folder / name)


def _other_number(marks: Marks, path: pathlib.Path) -> GenerationsError:
  wanted = len(marks[path.parent]["positions"])
  return GenerationsError(
    f"{path}: expected {wanted} lines, one a prompt, got another number; {_AGAIN}."
  )


def _end(line: storage.Line) -> bytes:
  return line.raw.removesuffix(b"\n") + b"\n"


def _check_files(marks: Marks, names: Iterable[str]) -> None:
  """Every file is there, as its shard left it."""
  for folder, mark in marks.items():
    if odd := set(names) ^ set(mark["checksums"]):
      raise GenerationsError(
        f"{folder / MARK}: expected a mark that answers for the files of the run, got"
        f" {min(odd)} in one only; {_AGAIN}."
      )
    cache.check_checksums(folder, mark["checksums"], manifest=MARK)


def _merge_generations(marks: Marks, output: pathlib.Path) -> None:
  """One folder of cached generations."""
  folder = next(iter(marks))
  manifest = cache.read_manifest(folder)
  names = cache.file_names(manifest["thresholds"])
  _check_files(marks, names)
  prompts, ids, digest = [], [], hashlib.sha256()
  for line in _in_order(marks, cache.PROMPTS):
    digest.update(_digested(Prompt.from_json(line.value)))
    prompts.append(_end(line))
    ids.append(line.value["id"])
  if digest.hexdigest() != marks[folder]["prompts_digest"]:
    raise GenerationsError(
      f"{folder / cache.PROMPTS}: expected, with those of the other shards, the list of prompts"
      f" that {MARK} names by its digest, got another; {_AGAIN}."
    )
  manifest["provenance"] = {**(manifest.get("provenance") or {}), "num_examples": len(ids)}
  manifest["prompt_ids"] = ids
  with cache.claim(output, manifest, prompts)[0]:
    for name in names[1:]:
      lines = _records(marks, name, ids)
      with storage.replacing(output / name) as file:
        file.writelines(lines[key] for key in ids)
    manifest["checksums"] = {name: storage.checksum(output / name) for name in names}
    cache.write_manifest(output, manifest)


def _records(marks: Marks, name: str, ids: Sequence[str]) -> dict[str, bytes]:
  """Lines of the shards' records at one threshold, by id; each has those of its prompts."""
  found = {}
  for folder, mark in marks.items():
    procedure = mark["about"].get("procedure")
    procedure = None if procedure is None else Procedure.from_json(procedure)
    mine = {r.id: _end(line) for line, r in cache.read_records(folder / name, procedure)}
    wanted = [str(ids[at]) for at in mark["positions"]]
    if odd := set(wanted) ^ set(mine):
      raise GenerationsError(
        f"{folder / name}: expected a record of each of its {len(wanted)} prompts, got"
        f" {len(mine)}, first that is missing, or no prompt of it: {sorted(odd)[:3]}; {_AGAIN}."
      )
    found |= mine
  return found
