"""Shards of one list of prompts, each decoded by a process of its own, and merging them.

Shard k of N lies in a folder `shard-k-of-N`, written by one process that talks to no other, and
is done when `complete.json` is there, which is written last and says what the shard is of.
Merging copies lines as they are, in the order of the list. Needs no JAX.
"""

import argparse
import dataclasses
import hashlib
import heapq
import itertools
import json
import operator
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from rich import console as rich_console

from calm import arguments as arguments_lib
from calm import storage
from calm.calibrate import NEVER_EXIT, GenerationsError, Procedure, Prompt, generations
from calm.calibrate.generations.procedure import describe_differences
from calm.console import print_text

MARK = "complete.json"
# What the shards of `calm infer` write.
OUTPUTS = "outputs.jsonl"
MOST_SHARDS = 99_999
_FOLDER = re.compile(r"shard-\d{5}-of-\d{5}")
_AT_ONCE = 1024  # records that are merged at once
_AGAIN = "take the folder away and run the shard again."
# Folders of finished shards, by number, and what each says of itself (`complete.json`).
Marks = Mapping[pathlib.Path, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Shard:
  """One of `count` shards; `number` counts from 0; ValueError where there is no such shard."""

  number: int
  count: int

  def __post_init__(self):
    if not 1 <= self.count <= MOST_SHARDS or not 0 <= self.number < self.count:
      raise ValueError(
        f"Expected `shard_id` in 0 ... `num_shards` - 1, and at most {MOST_SHARDS} shards, got"
        f" {self.number} of {self.count}; the first shard is 0."
      )

  @property
  def name(self) -> str:
    """The name of its folder."""
    return f"shard-{self.number:05d}-of-{self.count:05d}"

  def has(self, prompt: Prompt) -> bool:
    """Whether the prompt, by its group or, where it has none, its id, is of this shard.

    SHA-256 of the name alone, so that it is the same in every list, process and version.
    """
    kind, name = ("id", prompt.id) if prompt.group is None else ("group", prompt.group)
    digest = hashlib.sha256(f"{kind}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % self.count == self.number


def parse_shard(arguments: argparse.Namespace) -> Shard | None:
  """The shard that `--num_shards` and `--shard_id` name; None: all prompts."""
  count, number = arguments.num_shards, arguments.shard_id
  if count is None and number is None:
    return None
  if count is None or number is None:
    raise ValueError(
      "Expected both `--num_shards` and `--shard_id`, got one; in a Slurm array give"
      " --num_shards=$SLURM_ARRAY_TASK_COUNT --shard_id=$SLURM_ARRAY_TASK_ID (from 0 on), in an"
      " indexed Kubernetes job --shard_id=$JOB_COMPLETION_INDEX."
    )
  return Shard(number, count)


class ShardRun:
  """The prompts of one shard, and its `folder`; `taken` says how many they are."""

  def __init__(self, prompts: Any, which: Shard, output: str | None):
    if not output or output == "-" or (os.path.exists(output) and not os.path.isdir(output)):
      raise ValueError(
        f"`--num_shards` needs `--output`, a folder in which every shard has its own; got"
        f" {output!r}."
      )
    self._prompts, self._shard = prompts, which
    self.folder = pathlib.Path(output) / which.name
    self._total, self._positions, self._digest = 0, [], hashlib.sha256()
    for prompt in prompts:
      self._digest.update(_digested(prompt))
      self._positions += [self._total] if which.has(prompt) else []
      self._total += 1
    self.taken = f"{prompts.taken}; {len(self)} of them are in {which.name}"

  def __iter__(self) -> Iterator[Prompt]:
    return filter(self._shard.has, self._prompts)

  def __len__(self) -> int:
    return len(self._positions)

  def _mark(self, kind: str, about: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    mark = {
      "schema_version": generations.SCHEMA_VERSION,
      "kind": kind,
      "num_shards": self._shard.count,
      "shard_id": self._shard.number,
      "num_prompts": self._total,
      "prompts_digest": self._digest.hexdigest(),
      "positions": self._positions,
      "about": about,
      "checksums": generations.checksums(self.folder, names),
    }
    return json.loads(json.dumps(mark))  # as it is when it is read again

  def begin(self, kind: str, about: Mapping[str, Any], console: rich_console.Console) -> bool:
    """Makes the folder; False where the shard is finished, an error where of another run.

    `kind` is 'generate' or 'infer', `about` what the outputs depend on.
    """
    if (there := read_mark(self.folder)) is None:
      self.folder.mkdir(parents=True, exist_ok=True)
      return True
    mark = self._mark(kind, about, there["checksums"])
    ours, theirs = ({**each, "about": None, **each["about"]} for each in (mark, there))
    if differ := [name for name in ours | theirs if ours.get(name) != theirs.get(name)]:
      got = "; ".join(f"`{n}`: {theirs.get(n)!r:.200} for {ours.get(n)!r:.200}" for n in differ)
      raise GenerationsError(
        f"{self.folder / MARK}: expected a finished shard of this run, got another's: {got};"
        f" choose another --output, or take {self.folder} away."
      )
    print_text(console, f"{self.folder} is finished already.", soft_wrap=True)
    return False

  def finish(self, kind: str, about: Mapping[str, Any], names: Iterable[str]) -> None:
    """Marks the shard as done; its files, `names`, are whole."""
    text = json.dumps(self._mark(kind, about, names), ensure_ascii=False) + "\n"
    storage.write_atomically(self.folder / MARK, text)


def _digested(prompt: Prompt) -> bytes:
  return json.dumps(prompt.to_json(), sort_keys=True).encode() + b"\n"


@arguments_lib.checked()
def _check_mark(
  schema_version: Literal[1],
  kind: Literal["generate", "infer"],
  num_shards: int,
  shard_id: int,
  num_prompts: int,
  prompts_digest: str,
  positions: list[int],
  about: dict[str, Any],
  checksums: dict[str, str],
  **others: Any,
) -> None:
  del schema_version, kind, prompts_digest, about, checksums, others
  Shard(shard_id, num_shards)
  if not all(a < b for a, b in itertools.pairwise([-1, *positions, max(0, num_prompts)])):
    text = f"from 0 to below `num_prompts` {num_prompts}, got {positions!r:.60}"
    raise ValueError(f"Expected `positions` to rise, {text}")


def read_mark(folder: pathlib.Path) -> dict[str, Any] | None:
  """What a shard says of itself; None where it is not done, GenerationsError if damaged."""
  return generations.read_document(folder / MARK, _check_mark, _AGAIN)


def merge(places: Sequence[str | pathlib.Path], output: str | pathlib.Path) -> int:
  """Merges shards into a folder (of `calm generate`) or a file; returns the number of prompts.

  Args:
    places: the folders of the shards, or one folder that holds them.
    output: where to write.

  Raises:
    GenerationsError: a shard is missing, not finished, there twice or of another list, grid or
      procedure; or a file is not as its shard left it.
  """
  marks, output = parts(places), pathlib.Path(output)
  if any(output.resolve().is_relative_to(folder.resolve()) for folder in marks):
    raise GenerationsError(
      f"Expected `output` beside the shards, got {output}, in one of them, whose files it would"
      " replace; choose another."
    )
  first = next(iter(marks.values()))
  marks = {folder: mark for folder, mark in marks.items() if mark["positions"]}
  for folder, mark in marks.items():
    generations.check_checksums(folder, mark["checksums"], manifest=MARK)
  if first["kind"] == "generate":
    _merge_generations(marks, output)
  else:
    lines = [
      [line.raw.removesuffix(b"\n") + b"\n" for line in storage.read_lines(folder / OUTPUTS)]
      for folder in marks
    ]
    lines = list(_in_order(marks, lines))
    with storage.replacing(output) as file:
      file.writelines(lines)
  return first["num_prompts"]


def _in_order(marks: Marks, columns: Sequence[Sequence[Any]]) -> Iterator[Any]:
  """Items of all shards, one a prompt, in the order of the list."""
  for (folder, mark), column in zip(marks.items(), columns, strict=True):
    if len(column) != len(mark["positions"]):
      raise GenerationsError(
        f"{folder}: expected outputs of {len(mark['positions'])} prompts, as {MARK} says, got"
        f" {len(column)}; {_AGAIN}"
      )
  pairs = map(zip, (mark["positions"] for mark in marks.values()), columns)
  return (item for _, item in heapq.merge(*pairs, key=operator.itemgetter(0)))


def _merge_generations(marks: Marks, output: pathlib.Path) -> None:
  """Writes one folder of cached generations, or goes on with it."""
  runs = [generations.load(folder) for folder in marks]
  prompts = list(_in_order(marks, [run.prompts for run in runs]))
  digest = hashlib.sha256(b"".join(map(_digested, prompts))).hexdigest()
  if digest != next(iter(marks.values()))["prompts_digest"]:
    raise GenerationsError(
      f"{generations.PROMPTS}: expected, in all shards, the list of prompts of the digest in"
      f" {MARK}, got another; {_AGAIN}"
    )
  writer = generations.open_writer(
    output,
    prompts=prompts,
    thresholds=runs[0].thresholds,
    procedure=runs[0].procedure,
    provenance=runs[0].provenance,
  )
  columns = zip(*((run.full, *run.records) for run in runs), strict=True)
  for threshold, column in zip(
    (NEVER_EXIT, *runs[0].thresholds.tolist()), columns, strict=True
  ):
    done = writer.completed_ids(threshold)
    records = (record for record in _in_order(marks, column) if record.id not in done)
    while some := list(itertools.islice(records, _AT_ONCE)):
      writer.append(threshold, some)
  writer.finish()


def parts(places: Sequence[str | pathlib.Path]) -> Marks:
  """All shards of a list, checked against one another (but for their files), by number."""
  at = [pathlib.Path(place) for place in places]
  if len(at) == 1 and at[0].is_dir() and not (at[0] / MARK).exists():
    at = sorted(folder for folder in at[0].iterdir() if _FOLDER.fullmatch(folder.name)) or at
  found = {folder: mark for folder in at if (mark := read_mark(folder)) is not None}
  marks = dict(sorted(found.items(), key=lambda pair: pair[1]["shard_id"]))
  counts = sorted({mark["num_shards"] for mark in marks.values()})
  numbers = [mark["shard_id"] for mark in marks.values()]
  for what, odd in (
    (f"folders that have no {MARK}: {{}}", [folder for folder in at if folder not in marks]),
    ("divisions into {}", counts[1:] and counts),
    ("the --shard_id {} twice", sorted({n for n in numbers if numbers.count(n) > 1})),
    ("none with --shard_id {}", sorted({*range(max(counts, default=0))} - {*numbers})),
  ):
    if odd:
      got = what.format(", ".join(map(str, odd[:8])) + ", ..." * (len(odd) > 8))
      raise GenerationsError(
        "Expected the finished folders of all shards of one run, as `calm generate` and `calm"
        f" infer` write them with --num_shards, got {got}; run the shards again, they go on."
      )
  first, *others = marks
  for other in others:
    if text := _differences(marks[first], marks[other]):
      raise GenerationsError(
        f"Expected shards of one run, got two: {first} and {other} differ: {text}; merge those"
        " of one run alone."
      )
  positions = [at for mark in marks.values() for at in mark["positions"]]
  wanted, different = marks[first]["num_prompts"], len(set(positions))
  if not len(positions) == different == wanted > 0:
    raise GenerationsError(
      f"Expected every prompt of the list in one shard, got {wanted - different} in none and"
      f" {len(positions) - different} in several; run the shards again."
    )
  return marks


def _differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
  """What keeps two marks from being of one run, in words."""
  names = ("kind", "num_prompts", "prompts_digest")
  ours, theirs = ({n: mark[n] for n in names} | mark["about"] for mark in (one, other))
  differ = [name for name in ours | theirs if ours.get(name) != theirs.get(name)]
  if differ == ["procedure"]:
    procedures = (Procedure.from_json(side["procedure"]) for side in (ours, theirs))
    return describe_differences(*procedures) or "`procedure`, of which one says less"
  return ", ".join(f"`{name}` ({ours.get(name)!r}, {theirs.get(name)!r})" for name in differ)
