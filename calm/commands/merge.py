"""Put the shards of `calm generate` or `calm infer` together, in order.

Refuses shards of unlike procedures, grids or prompts, and shards that are
missing, doubled or not finished; names the shard, the field or the id. Needs
no JAX.

  calm merge runs/cache  # -> runs/cache/merged, for `calm calibrate`
  calm merge runs/outputs --output=outputs.jsonl
"""

import argparse
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
from calm.calibrate import NEVER_EXIT, GenerationsError, Prompt, generations
from calm.commands import flags
from calm.commands import run as run_lib
from calm.console import print_text

# A shard's folder is done when this file is there, which says what the shard is of.
MARK = "complete.json"
# What the shards of `calm infer` write.
OUTPUTS = "outputs.jsonl"
MOST_SHARDS = 99_999
_FOLDER = re.compile(r"shard-\d{5}-of-\d{5}")
_AGAIN = "take the folder away and run the shard again."
# Folders of finished shards, by number, and their marks.
Marks = Mapping[pathlib.Path, Mapping[str, Any]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
  text = "the folder with all shards in it, or each shard"
  parser.add_argument("shards", nargs="+", metavar="DIR", type=flags.filled, help=text)
  without = "merged, or outputs.jsonl of `calm infer`, beside the shards"
  flags.add(parser, "output", "PLACE", "where to write", without=without)


@run_lib.user_errors
def run(arguments: argparse.Namespace) -> int:
  marks = parts(arguments.shards)
  folder, mark = next(iter(marks.items()))
  generated = mark["kind"] == "generate"
  name = "merged" if generated else OUTPUTS
  output = pathlib.Path(arguments.output or folder.parent / name)
  count = merge(arguments.shards, output)
  console = rich_console.Console(highlight=False)
  print_text(console, f"{count} prompts of {len(marks)} shards: {output}")
  if generated:
    run_lib.print_next(console, "Calibrate on them:", "calibrate", output)
  return 0


# ---- One shard


def shard_of(prompt: Prompt, count: int) -> int:
  """The shard of a prompt, by its group or, where it has none, its id.

  SHA-256 of the name alone, so that it is the same in every list, process and version.
  """
  kind, name = ("id", prompt.id) if prompt.group is None else ("group", prompt.group)
  digest = hashlib.sha256(f"{kind}/{name}".encode()).digest()
  return int.from_bytes(digest[:8], "big") % count


def _check_shard(number: int, count: int) -> None:
  if not 1 <= count <= MOST_SHARDS or not 0 <= number < count:
    raise ValueError(
      f"Expected `shard_id` in 0 ... `num_shards` - 1, and at most {MOST_SHARDS} shards, got"
      f" {number} of {count}; the first shard is 0."
    )


class Shard:
  """The prompts of one shard, decoded by a process that talks to no other, and its `folder`.

  Where `number` and `count` are None, it has all prompts, and no folder.
  """

  def __init__(self, prompts: Any, number: int | None, count: int | None, output: str | None):
    self.prompts, self.folder = prompts, None
    if number is None and count is None:
      return
    if number is None or count is None:
      raise ValueError(
        "Expected both `--num_shards` and `--shard_id`, got one; in a Slurm array these are"
        " $SLURM_ARRAY_TASK_COUNT and $SLURM_ARRAY_TASK_ID, from 0 on."
      )
    _check_shard(number, count)
    if not output or output == "-" or (os.path.exists(output) and not os.path.isdir(output)):
      raise ValueError(f"`--num_shards` needs `--output`, the shards' folder; got {output!r}.")
    self.folder = pathlib.Path(output) / f"shard-{number:05d}-of-{count:05d}"
    positions = [at for at, prompt in enumerate(prompts) if shard_of(prompt, count) == number]
    self._mark = {
      "schema_version": generations.SCHEMA_VERSION,
      "num_shards": count,
      "shard_id": number,
      "num_prompts": len(prompts),
      "prompts_digest": _digest(prompts),
      "positions": positions,
    }
    self.prompts = type(prompts)(prompts[at] for at in positions)
    mine = f"{len(positions)} of them are in {self.folder.name}"
    self.prompts.taken = f"{prompts.taken}; {mine}"

  def begin(self, kind: str, about: dict[str, Any], console: rich_console.Console) -> bool:
    """Makes the folder; False where the shard is finished, an error where of another run.

    `kind` is 'generate' or 'infer', `about` what the outputs depend on.
    """
    if self.folder is None:
      return True
    self._mark |= {"kind": kind, "about": about}
    if (there := read_mark(self.folder)) is None:
      self.folder.mkdir(parents=True, exist_ok=True)
      return True
    if text := _differences(self._mark, there):
      got = f"expected a finished shard of this run, got another's: {text}"
      raise GenerationsError(f"{self.folder / MARK}: {got}; take it away.")
    print_text(console, f"{self.folder} is finished already.", soft_wrap=True)
    return False

  def finish(self) -> None:
    """Marks the shard as done; its files are whole."""
    if self.folder is not None:
      storage.write_atomically(self.folder / MARK, storage.dump_line(self._mark))


def _digest(prompts: Iterable[Prompt]) -> str:
  digest = hashlib.sha256()
  for prompt in prompts:
    digest.update(json.dumps(prompt.to_json(), sort_keys=True).encode() + b"\n")
  return digest.hexdigest()


def _differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
  """What keeps two marks from being of one run, in words."""
  names = ("kind", "num_shards", "num_prompts", "prompts_digest")
  sides = []
  for mark in json.loads(json.dumps((one, other))):  # as it is when it is read
    procedure = mark["about"].pop("procedure", None)
    sides.append({name: mark[name] for name in names} | mark["about"] | (procedure or {}))
  ours, theirs = sides
  differ = [name for name in ours | theirs if ours.get(name) != theirs.get(name)]
  return "; ".join(
    f"`{name}`: {theirs.get(name)!r:.200} for {ours.get(name)!r:.200}" for name in differ
  )


# ---- All shards


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
  **others: Any,
) -> None:
  del schema_version, kind, prompts_digest, others
  _check_shard(shard_id, num_shards)
  if not isinstance(about.get("procedure"), dict | None):
    raise ValueError(f"Expected `procedure` to be an object, got {about['procedure']!r:.60}")
  if not all(a < b for a, b in itertools.pairwise([-1, *positions, max(0, num_prompts)])):
    text = f"from 0 to below `num_prompts` {num_prompts}, got {positions!r:.60}"
    raise ValueError(f"Expected `positions` to rise, {text}")


def read_mark(folder: pathlib.Path) -> dict[str, Any] | None:
  """What a shard says of itself; None where it is not done, GenerationsError if damaged."""
  return generations.read_document(folder / MARK, _check_mark, _AGAIN)


def parts(places: Sequence[str | pathlib.Path]) -> Marks:
  """All shards of a list, in these folders or in one, checked against one another, by number.

  GenerationsError where a shard is missing, not finished, there twice, or of another run.
  """
  at = [pathlib.Path(place) for place in places]
  if len(at) == 1 and at[0].is_dir() and not (at[0] / MARK).exists():
    at = sorted(folder for folder in at[0].iterdir() if _FOLDER.fullmatch(folder.name)) or at
  found = {folder: read_mark(folder) for folder in at}
  unfinished = [str(folder) for folder, mark in found.items() if mark is None]
  marks = {folder: mark for folder, mark in found.items() if mark is not None}
  marks = dict(sorted(marks.items(), key=lambda pair: pair[1]["shard_id"]))
  numbers = [mark["shard_id"] for mark in marks.values()]
  counts = sorted({mark["num_shards"] for mark in marks.values()})
  if unfinished or len(counts) != 1 or numbers != list(range(counts[0])):
    got = f"the --shard_id {numbers!s:.60} of {counts}"
    if unfinished:
      got = f"folders that have no {MARK}: {', '.join(unfinished[:8])}"
    raise GenerationsError(
      f"Expected the finished folders of all shards of one run, got {got}; run them again."
    )
  first, *others = marks
  for other in others:
    if text := _differences(marks[first], marks[other]):
      raise GenerationsError(
        f"Expected shards of one run, got two: {first} and {other} differ: {text}."
      )
  positions = [at for mark in marks.values() for at in mark["positions"]]
  wanted, different = marks[first]["num_prompts"], len(set(positions))
  if not len(positions) == different == wanted > 0:
    got = f"got {wanted - different} in none and {len(positions) - different} in several"
    raise GenerationsError(f"Expected every prompt of the list in one shard, {got}.")
  return marks


def merge(places: Sequence[str | pathlib.Path], output: str | pathlib.Path) -> int:
  """Merges shards into a folder (of `calm generate`) or a file; returns the number of prompts.

  Lines are copied as they are. GenerationsError as of `parts`, and where a file is not as its
  manifest says, or `output` lies in a shard.
  """
  marks, output = parts(places), pathlib.Path(output)
  if any(output.resolve().is_relative_to(folder.resolve()) for folder in marks):
    raise GenerationsError(
      f"Expected `output` beside the shards, got {output}, in one of them."
    )
  first = next(iter(marks.values()))
  marks = {folder: mark for folder, mark in marks.items() if mark["positions"]}
  if first["kind"] == "generate":
    _merge_generations(marks, output)
    return first["num_prompts"]
  lines = [
    [line.raw.removesuffix(b"\n") + b"\n" for line in storage.read_lines(folder / OUTPUTS)]
    for folder in marks
  ]
  ordered = list(_in_order(marks, lines))
  with storage.replacing(output) as file:
    file.writelines(ordered)
  return first["num_prompts"]


def _in_order(marks: Marks, columns: Sequence[Sequence[Any]]) -> Iterator[Any]:
  """Items of all shards, one a prompt, in the order of the list."""
  for (folder, mark), column in zip(marks.items(), columns, strict=True):
    if len(column) != len(mark["positions"]):
      expected = f"expected outputs of {len(mark['positions'])} prompts, as {MARK} says"
      raise GenerationsError(f"{folder}: {expected}, got {len(column)}; {_AGAIN}")
  pairs = map(zip, (mark["positions"] for mark in marks.values()), columns)
  return (item for _, item in heapq.merge(*pairs, key=operator.itemgetter(0)))


def _merge_generations(marks: Marks, output: pathlib.Path) -> None:
  """Writes one folder of cached generations, or goes on with it."""
  runs = [generations.load(folder) for folder in marks]
  prompts = list(_in_order(marks, [run.prompts for run in runs]))
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
    while some := list(itertools.islice(records, 1024)):
      writer.append(threshold, some)
  writer.finish()
