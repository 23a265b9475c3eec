"""`--num_shards` and `--shard_id`: which part of the prompts is decoded here, and where to."""

import argparse
import os
import pathlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from calm import storage
from calm.calibrate import Prompt
from calm.calibrate.generations import shards
from calm.calibrate.generations.records import GenerationsError
from calm.console import sanitize

AUTO = "auto"


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares the options."""
  group = parser.add_argument_group(
    "one part of many", "Each part is a process; `calm merge` puts them together."
  )
  group.add_argument(
    "--num_shards",
    metavar="N",
    help="decode one of N parts into OUTPUT/shard-...; which one is told by a hash of each"
    " prompt's group or id. 'auto' takes the size of the Slurm array or of JAX's processes",
  )
  group.add_argument(
    "--shard_id",
    type=int,
    metavar="K",
    help="which part, from 0 on (default: JOB_COMPLETION_INDEX, SLURM_ARRAY_TASK_ID less"
    " SLURM_ARRAY_TASK_MIN, or jax.process_index())",
  )


def shard(
  arguments: argparse.Namespace, environment: Mapping[str, str] = os.environ
) -> shards.Shard | None:
  """The part that is asked for; None: all prompts.

  An array job may as well be one of options, so that nothing is divided unless --num_shards
  says so.

  Raises:
    ValueError: it cannot be told which part, or of how many.
  """
  wanted = arguments.num_shards
  if wanted is None:
    if arguments.shard_id is not None:
      raise ValueError(
        "Expected `--num_shards` beside `--shard_id`, got none; say of how many."
      )
    return None
  if wanted == AUTO:
    count = _count(environment)
  elif wanted.isascii() and wanted.isdigit():
    count = int(wanted)
  else:
    raise ValueError(f"Expected `--num_shards` to be a number or {AUTO!r}, got {wanted!r}.")
  number = arguments.shard_id
  return shards.Shard(_number(environment) if number is None else number, count)


def _number(environment: Mapping[str, str]) -> int:
  if "JOB_COMPLETION_INDEX" in environment:
    return _whole(environment, "JOB_COMPLETION_INDEX")
  if "SLURM_ARRAY_TASK_ID" in environment:
    first = _whole(environment, "SLURM_ARRAY_TASK_MIN", 0)
    step = max(1, _whole(environment, "SLURM_ARRAY_TASK_STEP", 1))
    return (_whole(environment, "SLURM_ARRAY_TASK_ID") - first) // step
  index, count = _jax_processes()
  if count > 1:
    return index
  raise ValueError(
    "Expected `--shard_id` with `--num_shards`, got none, and neither JOB_COMPLETION_INDEX"
    " (Kubernetes) nor SLURM_ARRAY_TASK_ID is set; number the processes from 0 on."
  )


def _count(environment: Mapping[str, str]) -> int:
  if "SLURM_ARRAY_TASK_ID" in environment and "SLURM_ARRAY_TASK_COUNT" in environment:
    return _whole(environment, "SLURM_ARRAY_TASK_COUNT")
  _, count = _jax_processes()
  if count > 1:
    return count
  raise ValueError(
    "Expected `--num_shards` to be a number, got 'auto', where neither"
    " SLURM_ARRAY_TASK_COUNT nor several JAX processes tell it; give the number (a"
    " Kubernetes job does not tell its `completions`)."
  )


def _whole(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
  text = environment.get(name)
  if text is None and default is not None:
    return default
  if text is None or not (text.isascii() and text.isdigit()):
    raise ValueError(f"Expected {name} to be a whole number, got {text!r}; give `--shard_id`.")
  return int(text)


def _jax_processes() -> tuple[int, int]:
  """(this process, processes) where JAX was started as several; asks no other process."""
  jax = sys.modules.get("jax")
  if jax is None or not jax.distributed.is_initialized():
    return 0, 1
  return jax.process_index(), jax.process_count()


class Part:
  """The prompts of one part, to be iterated over as often as one likes, and its folder.

  Attributes:
    folder: where its files go.
    listing: the whole list, as the last pass over it saw it.
  """

  def __init__(self, prompts: Any, which: shards.Shard, output: str):
    if output == "-" or (pathlib.Path(output).exists() and not pathlib.Path(output).is_dir()):
      raise ValueError(
        f"Expected `--output` to be a folder with `--num_shards`, got {output!r}; every shard"
        " writes a folder of its own in it."
      )
    self._prompts, self._shard = prompts, which
    self.folder = pathlib.Path(output) / which.name
    self.listing = shards.Listing(which)
    self._count = sum(1 for _ in self)

  def __iter__(self) -> Iterator[Prompt]:
    self.listing = shards.Listing(self._shard)
    return self.listing.mine(self._prompts)

  def __len__(self) -> int:
    return self._count

  @property
  def taken(self) -> str:
    """What was taken for what, and how much of it is here."""
    return f"{self._prompts.taken}; {len(self)} of them are in {self._shard.name}"

  def done(self, kind: str, about: Mapping[str, Any]) -> bool:
    """Whether the part is finished, of these prompts and options.

    Raises:
      GenerationsError: it is finished, of others.
    """
    there = shards.read_mark(self.folder)
    if there is None:
      return False
    mine = shards.mark_of(kind, self.listing, about, self.folder, ())
    for name in ("kind", "num_prompts", "prompts_digest", "positions", "about"):
      ours, theirs = getattr(mine, name), getattr(there, name)
      if ours != theirs:
        raise GenerationsError(
          f"{self.folder / shards.MARK}: expected the `{name}` of this run, got"
          f" another{_entries(theirs, ours)}; choose another --output, or take the folder away."
        )
    for name, expected in there.checksums.items():
      path = self.folder / name
      if not path.is_file() or storage.checksum(path) != expected:
        raise GenerationsError(
          f"{path}: expected the file as it was when its shard was finished, got another or"
          f" none; take {self.folder} away and run the shard again."
        )
    return True

  def begin(self, kind: str, about: Mapping[str, Any], console: Any) -> bool:
    """Makes the folder, and says whether there is nothing left to do in it."""
    if self.done(kind, about):
      console.print(f"{sanitize(self.folder)} is finished already.", markup=False)
      return True
    self.folder.mkdir(parents=True, exist_ok=True)
    return False

  def finish(self, kind: str, about: Mapping[str, Any], names) -> None:
    """Marks the part as done; its files are whole."""
    shards.mark_of(kind, self.listing, about, self.folder, names).save(self.folder)


def _entries(theirs: Any, ours: Any) -> str:
  if not isinstance(theirs, dict):
    return ""
  odd = [name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)]
  return ": " + "; ".join(
    f"`{name}`: expected {theirs.get(name)!r:.200}, got {ours.get(name)!r:.200}" for name in odd
  )
