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
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from rich import console as rich_console

from calm import arguments as arguments_lib
from calm import storage
from calm.calibrate import NEVER_EXIT, GenerationsError, Prompt, generations
from calm.commands import flags
from calm.commands import run as run_lib
from calm.console import print_text

# A shard's folder is done when this file is there, which says what the shard is
# of.
MARK = "complete.json"
# What a shard of `calm infer` writes.
OUTPUTS = "outputs.jsonl"
MOST_SHARDS = 99_999
_FOLDER = re.compile(r"shard-\d{5}-of-\d{5}")
_AGAIN = "take the folder away and run the shard again."
# Folders of finished shards, by number, and their marks.
Marks = Mapping[pathlib.Path, Mapping[str, Any]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
  text = "the folder with all shards in it, or each shard"
  parser.add_argument(
    "shards", nargs="+", metavar="DIR", type=flags.filled, help=text
  )
  without = "merged, or outputs.jsonl of `calm infer`, beside the shards"
  flags.add(parser, "output", "PLACE", "where to write", without=without)


def run(arguments: argparse.Namespace) -> int:
  marks = parts(arguments.shards)
  folder, mark = next(iter(marks.items()))
  generated = mark.get("kind") != "infer"
  beside = folder.parent / ("merged" if generated else OUTPUTS)
  output = pathlib.Path(arguments.output or beside)
  count = merge(arguments.shards, output)
  console = rich_console.Console(highlight=False)
  print_text(console, f"{count} prompts of {len(marks)} shards: {output}")
  if generated:
    run_lib.print_next(console, "Calibrate on them:", "calibrate", output)
  return 0


# ---- One shard


def shard_of(prompt: Prompt, count: int) -> int:
  """The shard of a prompt, by its group or, where it has none, its id.

  SHA-256 of the name alone, so that it is the same in every list, process and
  version.
  """
  kind, name = (
    ("id", prompt.id) if prompt.group is None else ("group", prompt.group)
  )
  digest = hashlib.sha256(f"{kind}/{name}".encode()).digest()
  return int.from_bytes(digest[:8], "big") % count


def _check_shard(number: int, count: int) -> None:
  if not 1 <= count <= MOST_SHARDS or not 0 <= number < count:
    raise ValueError(
      "Expected `shard_id` in 0 ... `num_shards` - 1, and at most "
      f"{MOST_SHARDS} shards, got"
      f" {number} of {count}; the first shard is 0."
    )


def take_shard(
  prompts: Any, number: int | None, count: int | None
) -> tuple[Any, dict[str, Any] | None]:
  """(the prompts of one shard, its mark); its process talks to no other. All
  prompts and None where neither number is given.
  """
  if number is None and count is None:
    return prompts, None
  if number is None or count is None:
    raise ValueError(
      "Expected both `--num_shards` and `--shard_id`, got one; in a Slurm "
      "array these are"
      " $SLURM_ARRAY_TASK_COUNT and $SLURM_ARRAY_TASK_ID, from 0 on."
    )
  _check_shard(number, count)
  positions = [
    at for at, prompt in enumerate(prompts) if shard_of(prompt, count) == number
  ]
  digest = hashlib.sha256()
  for prompt in prompts:
    digest.update(json.dumps(prompt.to_json(), sort_keys=True).encode() + b"\n")
  mark = {
    "schema_version": generations.SCHEMA_VERSION,
    "num_shards": count,
    "shard_id": number,
    "num_prompts": len(prompts),
    "prompts_digest": digest.hexdigest(),
    "positions": positions,
  }
  mine = type(prompts)(prompts[at] for at in positions)
  mine.taken = (
    f"{prompts.taken}; {len(positions)} of them are in shard {number}"
  )
  return mine, mark


def shard_folder(output: str, mark: Mapping[str, Any]) -> pathlib.Path:
  """Where a shard is written to, below the folder of all."""
  return (
    pathlib.Path(output)
    / f"shard-{mark['shard_id']:05d}-of-{mark['num_shards']:05d}"
  )


def write_mark(folder: pathlib.Path, mark: Mapping[str, Any]) -> None:
  """Marks a shard as done; it may have no prompts."""
  folder.mkdir(parents=True, exist_ok=True)
  storage.write_atomically(folder / MARK, storage.dump_line(mark))


# ---- All shards


@arguments_lib.checked()
def _check_mark(
  schema_version: Literal[1],
  num_shards: int,
  shard_id: int,
  num_prompts: int,
  prompts_digest: str,
  positions: list[int],
  kind: Literal["generate", "infer"] = "generate",
  **others: Any,
) -> None:
  del schema_version, kind, prompts_digest, others
  _check_shard(shard_id, num_shards)
  if not all(
    a < b for a, b in itertools.pairwise([-1, *positions, max(0, num_prompts)])
  ):
    text = f"from 0 to below `num_prompts` {num_prompts}, got {positions!r:.60}"
    raise ValueError(f"Expected `positions` to rise, {text}")


def read_mark(folder: pathlib.Path) -> dict[str, Any] | None:
  """What a shard says of itself; None where it is not done, GenerationsError if
  damaged.
  """
  return generations.read_document(folder / MARK, _check_mark, _AGAIN)


def parts(places: Sequence[str | pathlib.Path]) -> Marks:
  """All shards of a list, in these folders or in one, checked against one
  another, by number.

  GenerationsError where a shard is missing, not finished, there twice, or of
  another run.
  """
  at = [pathlib.Path(place) for place in places]
  if len(at) == 1 and at[0].is_dir() and not (at[0] / MARK).exists():
    at = (
      sorted(
        folder for folder in at[0].iterdir() if _FOLDER.fullmatch(folder.name)
      )
      or at
    )
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
      f"Expected the finished folders of all shards of one run, got {got}; "
      "run them again."
    )
  first, *others = marks
  for other in others:
    if marks[first]["prompts_digest"] != marks[other]["prompts_digest"]:
      raise GenerationsError(
        f"Expected shards of one list of prompts, got two: {first} and {other}."
      )
    if any(
      marks[first].get(name) != marks[other].get(name)
      for name in ("kind", "about")
    ):
      raise GenerationsError(
        f"Expected shards of one run, got two: {first} and {other}."
      )
  positions = [at for mark in marks.values() for at in mark["positions"]]
  wanted = marks[first]["num_prompts"]
  different = len(set(positions))
  if not len(positions) == different == wanted > 0:
    got = (
      f"got {wanted - different} in none and {len(positions) - different} in "
      "several"
    )
    raise GenerationsError(
      f"Expected every prompt of the list in one shard, {got}."
    )
  return marks


def merge(
  places: Sequence[str | pathlib.Path], output: str | pathlib.Path
) -> int:
  """Merges shards into a folder, or goes on with it, those of `calm infer` into
  a file; returns the number of prompts.

  GenerationsError as of `parts` and `generations.load`, and where shards are of
  unlike procedures or grids, or `output` lies in a shard.
  """
  marks, output = parts(places), pathlib.Path(output)
  if any(output.resolve().is_relative_to(folder.resolve()) for folder in marks):
    raise GenerationsError(
      f"Expected `output` beside the shards, got {output}, in one of them."
    )
  outputs = next(iter(marks.values())).get("kind") == "infer"
  marks = {folder: mark for folder, mark in marks.items() if mark["positions"]}
  if outputs:
    return _merge_outputs(marks, output)
  runs = [generations.load(folder) for folder in marks]
  for (folder, mark), run in zip(marks.items(), runs, strict=True):
    differ = generations.describe_differences(runs[0].procedure, run.procedure)
    if not np.array_equal(runs[0].thresholds, run.thresholds):
      differ = (
        f"`thresholds`: expected {runs[0].thresholds}, got {run.thresholds}"
      )
    if len(run.prompts) != len(mark["positions"]):
      differ = (
        f"{MARK} names {len(mark['positions'])} prompts, got {len(run.prompts)}"
      )
    if differ:
      raise GenerationsError(
        f"{folder}: expected a shard of one run: {differ}; {_AGAIN}"
      )
  places = [mark["positions"] for mark in marks.values()]

  def in_order(columns):
    return (item for _, item in heapq.merge(*map(zip, places, columns)))

  writer = generations.open_writer(
    output,
    prompts=list(in_order([run.prompts for run in runs])),
    thresholds=runs[0].thresholds,
    procedure=runs[0].procedure,
    provenance=runs[0].provenance,
  )
  levels = (NEVER_EXIT, *runs[0].thresholds.tolist())
  columns = zip(*((run.full, *run.records) for run in runs), strict=True)
  for threshold, column in zip(levels, columns, strict=True):
    done = writer.completed_ids(threshold)
    records = (record for record in in_order(column) if record.id not in done)
    while some := list(itertools.islice(records, 1024)):
      writer.append(threshold, some)
  writer.finish()
  return sum(map(len, places))


def _merge_outputs(marks: Marks, output: pathlib.Path) -> int:
  """Copies lines as they are."""
  columns = []
  for folder, mark in marks.items():
    lines = [
      line.raw.removesuffix(b"\n")
      for line in storage.read_lines(folder / OUTPUTS)
    ]
    if len(lines) != len(mark["positions"]):
      expected = (
        f"expected outputs of {len(mark['positions'])} prompts, as {MARK} says"
      )
      raise GenerationsError(
        f"{folder}: {expected}, got {len(lines)}; {_AGAIN}"
      )
    columns.append(zip(mark["positions"], lines, strict=True))
  with storage.replacing(output) as file:
    file.writelines(line + b"\n" for _, line in heapq.merge(*columns))
  return sum(len(mark["positions"]) for mark in marks.values())
