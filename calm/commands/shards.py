"""Shards of one list of prompts, each decoded by a process of its own, and merging them.

Shard k of N lies in a folder `shard-k-of-N`, written by one process that talks to no other, and
is done when `complete.json` is there, which is written last and says what the shard is of.
Merging copies lines as they are, in the order of the list. Needs no JAX.
"""

import argparse
import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from rich import console as rich_console

from calm import arguments as arguments_lib
from calm import storage
from calm.calibrate import GenerationsError, Procedure, Prompt, generations
from calm.calibrate.generations.procedure import describe_differences
from calm.console import print_text

MARK = "complete.json"
# What the shards of `calm infer` write.
OUTPUTS = "outputs.jsonl"
MOST_SHARDS = 99_999
_FOLDER = re.compile(r"shard-\d{5}-of-\d{5}")
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
  """The shard that `--num_shards` and `--shard_id` name; None: all prompts.

  Raises:
    ValueError: one of them is missing, or there is no such shard.
  """
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
  """The prompts of one shard, to be iterated over as often as one likes, and its folder.

  Attributes:
    folder: where its files go.
    taken: the detected format, and how many of the prompts are in the shard.
  """

  def __init__(self, prompts: Any, which: Shard, output: str | None):
    if not output or output == "-" or (os.path.exists(output) and not os.path.isdir(output)):
      raise ValueError(
        f"`--num_shards` needs `--output`, a folder in which every shard has its own; got"
        f" {output!r}."
      )
    self._prompts, self._shard = prompts, which
    self.folder = pathlib.Path(output) / which.name
    self._count = sum(1 for _ in self)
    self.taken = f"{prompts.taken}; {self._count} of them are in {which.name}"

  def __iter__(self) -> Iterator[Prompt]:
    # Everything of the list is counted on the way; positions are those of this shard's prompts.
    self._total, self._positions, self._digest = 0, [], hashlib.sha256()
    for prompt in self._prompts:
      self._digest.update(_digested(prompt))
      if self._shard.has(prompt):
        self._positions.append(self._total)
        yield prompt
      self._total += 1

  def __len__(self) -> int:
    return self._count

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
    """Makes the folder; returns False where the shard is finished, of the same run.

    Args:
      kind: 'generate' or 'infer'.
      about: what the outputs depend on, compared between shards.
      console: says that the shard is finished.

    Raises:
      GenerationsError: it is finished, of another run.
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
  """Merges shards, and returns how many prompts there are.

  Args:
    places: the folders of the shards, or one folder that holds them.
    output: the folder (of `calm generate`) or file (of `calm infer`) to write.

  Raises:
    GenerationsError: a shard is missing, not finished, there twice or of another list, grid or
      procedure; an id is missing or doubled; or a file is not as its shard left it.
    OSError: `output` cannot be written, or another process is at it.
  """
  marks, output = parts(places), pathlib.Path(output)
  if any(output.resolve().is_relative_to(folder.resolve()) for folder in marks):
    raise GenerationsError(
      f"Expected `output` beside the shards, got {output}, in one of them, whose files it would"
      " replace; choose another."
    )
  first = next(iter(marks.values()))
  marks = {folder: mark for folder, mark in marks.items() if mark["positions"]}
  if first["kind"] == "generate":
    _merge_generations(marks, output)
  else:
    _check_files(marks, [OUTPUTS])
    lines = _in_order(marks, OUTPUTS).values()
    with storage.replacing(output) as file:
      file.writelines(lines)
  return first["num_prompts"]


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
  if not len(positions) == different == wanted:
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


def _check_files(marks: Marks, names: Sequence[str]) -> None:
  """Every file is there, as its shard left it."""
  for folder, mark in marks.items():
    if odd := set(names) ^ set(mark["checksums"]):
      raise GenerationsError(
        f"{folder / MARK}: expected a mark that answers for the files of the run, got"
        f" {min(odd)} in one only; {_AGAIN}"
      )
    generations.check_checksums(folder, mark["checksums"], manifest=MARK)


def _lines(marks: Marks, name: str) -> dict[str, bytes]:
  """{id: line} of a file of all shards, shard after shard, one line a prompt in each."""
  found: dict[str, bytes] = {}
  for folder, mark in marks.items():
    wanted = len(found) + len(mark["positions"])
    for line in storage.read_lines(folder / name):
      key = line.value.get("id")
      if not isinstance(key, str) or key in found:
        raise line.error(f"expected an `id`, a text, once in all shards, got {key!r}; {_AGAIN}")
      found[key] = line.raw.removesuffix(b"\n") + b"\n"
    if len(found) != wanted:
      raise GenerationsError(
        f"{folder / name}: expected one line a prompt, got {len(found) - wanted:+d}; {_AGAIN}"
      )
  return found


def _in_order(marks: Marks, name: str) -> dict[str, bytes]:
  """`_lines` of files that have prompts in the order of the list, in that order."""
  places = (at for mark in marks.values() for at in mark["positions"])
  pairs = sorted(zip(places, _lines(marks, name).items(), strict=True))
  return {key: line for _, (key, line) in pairs}


def _merge_generations(marks: Marks, output: pathlib.Path) -> None:
  """One folder of cached generations, whose manifest is written last."""
  folder = next(iter(marks))
  manifest = generations.read_manifest(folder)
  names = generations.file_names(manifest["thresholds"])
  _check_files(marks, names)
  prompts, digest = _in_order(marks, generations.PROMPTS), hashlib.sha256()
  for line in prompts.values():
    digest.update(_digested(Prompt.from_json(storage.parse_json(line))))
  if digest.hexdigest() != marks[folder]["prompts_digest"]:
    raise GenerationsError(
      f"{generations.PROMPTS}: expected, in all shards, the list of prompts of the digest in"
      f" {MARK}, got another; {_AGAIN}"
    )
  manifest["provenance"] = {**(manifest.get("provenance") or {}), "num_examples": len(prompts)}
  manifest["prompt_ids"] = [*prompts]
  with generations.claim(output, manifest, prompts.values())[0]:
    for name in names[1:]:
      lines = _lines(marks, name)
      if odd := sorted(set(lines) ^ set(prompts)):
        raise GenerationsError(
          f"{name}: expected a record of each prompt in the shards, got none, or one of no"
          f" prompt, for {odd[:3]}; {_AGAIN}"
        )
      with storage.replacing(output / name) as file:
        file.writelines(lines[key] for key in prompts)
    manifest["checksums"] = generations.checksums(output, names)
    generations.write_manifest(output, manifest)
