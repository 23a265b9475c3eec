"""Shards of one list of prompts, each decoded by a process of its own, and merging them.

A prompt belongs to the shard that a hash of its name says, whatever else is in the list; the
prompts of a group go to one shard together. Shard k of N lies in a folder `shard-k-of-N`,
written by one process that talks to no other, and is done when `complete.json` is there, which
is written last and says what the shard is of. Merging copies lines as they are, in the order of
the list; the manifest of a merged folder, or the merged file itself, takes its place last.
"""

import dataclasses
import hashlib
import itertools
import json
import pathlib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
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
_FOLDER = re.compile(r"shard-\d{5}-of-\d{5}")
_AGAIN = "take the folder away and run the shard again"
# Folders of finished shards, by number, and what each says of itself (`Listing.mark`).
Marks = Mapping[pathlib.Path, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Shard:
  """One of `count` shards; `number` counts from 0; ValueError where there is no such shard."""

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
  """The whole list of prompts as every shard sees it: how many, a digest, and who is mine."""

  def __init__(self, shard: Shard):
    self.shard, self.count = shard, 0
    self.positions: list[int] = []  # places in the list of those of the shard
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
    """What a finished shard of `calm generate` or `calm infer` (`kind`) says of itself.

    `about` is what the outputs depend on, compared between shards; `names` are its files.
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
  """What a shard says of itself; None where it is not done, GenerationsError if damaged."""
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
  return mark


def merge(places: Sequence[str | pathlib.Path], output: str | pathlib.Path) -> int:
  """Merges shards, and says how many prompts there are.

  Args:
    places: the folders of the shards, or one folder that holds them.
    output: the folder (of `calm generate`) or file (of `calm infer`) to write.

  Raises:
    GenerationsError: a shard is missing, not finished, there twice or of another list, grid or
      procedure; an id is missing or doubled; or a file is not as its shard left it.
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
    lines = _in_order(_lines(marks, OUTPUTS))
    with storage.replacing(output) as file:
      file.writelines(lines.values())
  else:
    _merge_generations(marks, output)
  return first["num_prompts"]


def parts(places: Sequence[str | pathlib.Path]) -> Marks:
  """All shards of a list, checked against one another (but for their files), by number."""
  at = [pathlib.Path(place) for place in places]
  if len(at) == 1 and at[0].is_dir() and not (at[0] / MARK).exists():
    at = sorted(folder for folder in at[0].iterdir() if _FOLDER.fullmatch(folder.name)) or at
  found = {folder: mark for folder in at if (mark := read_mark(folder)) is not None}
  marks = dict(sorted(found.items(), key=lambda pair: pair[1]["shard_id"]))
  counts = {mark["num_shards"] for mark in marks.values()}
  numbers = [mark["shard_id"] for mark in marks.values()]
  missing = sorted({*range(max(counts, default=0))} - {*numbers})
  half = [str(folder) for folder in at if folder not in marks]
  twice = [str(f) for f, mark in marks.items() if numbers.count(mark["shard_id"]) > 1]
  for what, odd in (
    ("folders that have no {MARK}: {}; run the shards again, they go on", half),
    ("divisions into {}", sorted(counts)[1:] and sorted(counts)),
    ("one twice: {}; leave one out", twice),
    (f"none with --shard_id {{}} of {max(counts, default=0)}; run them", missing),
  ):
    if odd:
      got = what.format(", ".join(map(str, odd[:8])) + ", ..." * (len(odd) > 8), MARK=MARK)
      raise GenerationsError(
        "Expected the finished folders of all shards of one run, as `calm generate` and `calm"
        f" infer` write them with --num_shards, got {got}."
      )
  for folder in marks:
    _check_alike(marks, folder)
  positions = [np.array(mark["positions"], np.int64) for mark in marks.values()]
  count, wanted = sum(map(len, positions)), next(iter(marks.values()))["num_prompts"]
  different = len(np.unique(np.concatenate(positions)))
  if not count == different == wanted:
    raise GenerationsError(
      f"Expected every prompt of the list in one shard, got {wanted - different} in none and"
      f" {count - different} in several; run the shards again."
    )
  return marks


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
  text = ", ".join(f"`{name}` ({ours.get(name)!r}, {theirs.get(name)!r})" for name in differ)
  if differ == ["procedure"]:
    procedures = (Procedure.from_json(side["procedure"]) for side in (ours, theirs))
    text = describe_differences(*procedures) or "`procedure`, of which one says less"
  raise GenerationsError(
    f"Expected shards of one run, got two: {first} and {other} differ: {text}; merge those of"
    " one run alone."
  )


def _check_files(marks: Marks, names: Collection[str]) -> None:
  """Every file is there, as its shard left it."""
  for folder, mark in marks.items():
    if odd := set(names) ^ set(mark["checksums"]):
      raise GenerationsError(
        f"{folder / MARK}: expected a mark that answers for the files of the run, got"
        f" {min(odd)} in one only; {_AGAIN}."
      )
    cache.check_checksums(folder, mark["checksums"], manifest=MARK)


def _lines(marks: Marks, name: str) -> dict[str, tuple[int, bytes]]:
  """{id: (place in the list, line)} of a file of all shards, one line a prompt in each."""
  found: dict[str, tuple[int, bytes]] = {}
  for folder, mark in marks.items():
    before, places = len(found), mark["positions"]
    for line in storage.read_lines(folder / name):
      key = line.value.get("id")
      if not isinstance(key, str) or key in found:
        raise line.error(
          f"expected an `id`, a text, once in all shards, got {key!r}; {_AGAIN}."
        )
      place = places[min(len(found) - before, len(places) - 1)]
      found[key] = (place, line.raw.removesuffix(b"\n") + b"\n")
    if len(found) - before != len(places):
      raise GenerationsError(
        f"{folder / name}: expected {len(places)} lines, one a prompt, got"
        f" {len(found) - before}; {_AGAIN}."
      )
  return found


def _in_order(lines: Mapping[str, tuple[int, bytes]]) -> dict[str, bytes]:
  """Lines of files that have prompts in the order of the list, by id, in that order."""
  return {key: line for key, (_, line) in sorted(lines.items(), key=lambda pair: pair[1][0])}


def _merge_generations(marks: Marks, output: pathlib.Path) -> None:
  """One folder of cached generations."""
  folder = next(iter(marks))
  manifest = cache.read_manifest(folder)
  names = cache.file_names(manifest["thresholds"])
  _check_files(marks, names)
  prompts, digest = _in_order(_lines(marks, cache.PROMPTS)), hashlib.sha256()
  for line in prompts.values():
    digest.update(_digested(Prompt.from_json(storage.parse_json(line))))
  if digest.hexdigest() != marks[folder]["prompts_digest"]:
    raise GenerationsError(
      f"{folder / cache.PROMPTS}: expected, with those of the other shards, the list of prompts"
      f" that {MARK} names by its digest, got another; {_AGAIN}."
    )
  manifest["provenance"] = {**(manifest.get("provenance") or {}), "num_examples": len(prompts)}
  manifest["prompt_ids"] = [*prompts]
  with cache.claim(output, manifest, prompts.values())[0]:
    for name in names[1:]:
      lines = _lines(marks, name)
      if odd := sorted(set(lines) ^ set(prompts)):
        raise GenerationsError(
          f"{name}: expected a record of each prompt in the shards, got none, or one of no"
          f" prompt, for {odd[:3]}; {_AGAIN}."
        )
      with storage.replacing(output / name) as file:
        file.writelines(lines[key][1] for key in prompts)
    manifest["checksums"] = {name: storage.checksum(output / name) for name in names}
    cache.write_manifest(output, manifest)
