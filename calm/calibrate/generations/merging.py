"""Finished parts of one list, put together in the order of the list.

Lines are copied as they are, and every file is read and written as a stream: memory grows with
the prompts (their names and places), not with what was decoded for them. The manifest of a
merged folder, or the merged file itself, takes its place last.
"""

import contextlib
import dataclasses
import itertools
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np

from calm import storage
from calm.calibrate import thresholds as thresholds_lib
from calm.calibrate.generations import cached, shards
from calm.calibrate.generations.procedures import Procedure, describe_differences
from calm.calibrate.generations.records import GenerationsError, Prompt

# What the shards of `calm infer` write.
OUTPUTS = "outputs.jsonl"


@dataclasses.dataclass(frozen=True)
class Part:
  """A finished part and its folder."""

  folder: pathlib.Path
  mark: shards.Mark


def merge(places: Sequence[str | pathlib.Path], output: str | pathlib.Path) -> int:
  """Puts parts together, and says how many prompts there are.

  Args:
    places: the folders of the parts, or one folder that holds them.
    output: the folder (of `calm generate`) or file (of `calm infer`) to write.

  Returns:
    Prompts of the list.

  Raises:
    GenerationsError: a part is missing, not finished, there twice or of another list, grid or
      procedure; an id is missing or doubled; or a file is not as its part left it. The message
      says which.
    OSError: `output` cannot be written, or another process is at it.
  """
  found = parts(places)
  output = pathlib.Path(output)
  for part in found:
    if output.resolve().is_relative_to(part.folder.resolve()):
      raise GenerationsError(
        f"Expected `output` beside the shards, got {output}, in the shard {part.folder}, whose"
        " files it would replace; choose another."
      )
  if found[0].mark.kind == "infer":
    _outputs(found, output)
  else:
    _generations(found, output)
  return found[0].mark.num_prompts


def parts(places: Sequence[str | pathlib.Path]) -> list[Part]:
  """All parts of a list, checked against one another, by number.

  Raises:
    GenerationsError: as `merge` says, but for the contents of files.
  """
  folders = _folders([pathlib.Path(place) for place in places])
  found: dict[shards.Shard, Part] = {}
  half = []
  for folder in folders:
    mark = shards.read_mark(folder)
    if mark is None:
      half.append(folder)
      continue
    if mark.shard in found:
      raise GenerationsError(
        f"Expected every shard once, got {mark.shard.name} twice: {found[mark.shard].folder}"
        f" and {folder}; leave one out."
      )
    found[mark.shard] = Part(folder, mark)
  counts = {shard.count for shard in [*found, *filter(None, map(shards.named, folders))]}
  if len(counts) > 1:
    raise GenerationsError(
      f"Expected shards of one division, got some of {sorted(counts)} shards among"
      f" {', '.join(folder.name for folder in folders[:8])}; name those that belong together."
    )
  if half:
    raise GenerationsError(
      f"Expected shards that are finished, got {len(half)} without {shards.MARK}:"
      f" {', '.join(map(str, half[:8]))}; run them again, they go on where they were."
    )
  missing = sorted({*range(counts.pop())} - {shard.number for shard in found})
  ordered = [found[shard] for shard in sorted(found, key=lambda shard: shard.number)]
  if missing:
    raise GenerationsError(
      f"Expected all {ordered[0].mark.shard.count} shards, got none with --shard_id"
      f" {', '.join(map(str, missing[:20]))}; run them."
    )
  for part in ordered[1:]:
    _check_alike(ordered[0], part)
  _check_positions(ordered)
  return ordered


def _folders(places: Sequence[pathlib.Path]) -> list[pathlib.Path]:
  for place in places:
    if not place.is_dir():
      raise GenerationsError(
        f"Expected folders of shards, got {place}, which is none; name those in the run's"
        " --output."
      )
  if len(places) == 1 and not (places[0] / shards.MARK).exists():
    places = shards.folders(places[0]) or places
  if len(places) == 1 and shards.named(places[0]) is None:
    raise GenerationsError(
      f"Expected a folder with shards in it, got {places[0]} without any; `calm generate` and"
      " `calm infer` write them with --num_shards."
    )
  return list(places)


def _check_alike(first: Part, other: Part) -> None:
  """Raises GenerationsError unless both are parts of one run."""
  ours, theirs = first.mark, other.mark
  names = f"{first.folder} and {other.folder}"
  for name in ("kind", "num_prompts", "prompts_digest"):
    if getattr(ours, name) != getattr(theirs, name):
      what = "commands" if name == "kind" else "lists of prompts"
      raise GenerationsError(
        f"Expected shards of one run, got two {what}: {names} differ in `{name}`"
        f" ({getattr(ours, name)!r}, {getattr(theirs, name)!r}); merge those of one run alone."
      )
  differ = [
    key for key in {**ours.about, **theirs.about} if _field(ours, key) != _field(theirs, key)
  ]
  if differ == ["procedure"]:
    one, two = (_procedure(mark) for mark in (ours, theirs))
    text = describe_differences(one, two) or "one does not say what the other says of itself"
    raise GenerationsError(
      f"Expected shards of one procedure, got two: {names}: {text}; merge those of one run"
      " alone."
    )
  if differ:
    values = ", ".join(
      f"`{key}` ({_field(ours, key)!r}, {_field(theirs, key)!r})" for key in differ
    )
    raise GenerationsError(
      f"Expected shards of one run, got two: {names} differ: {values}; merge those of one"
      " run alone."
    )


def _field(mark: shards.Mark, name: str) -> Any:
  return mark.about.get(name)


def _procedure(mark: shards.Mark) -> Procedure | None:
  value = _field(mark, "procedure")
  return None if value is None else Procedure.from_json(value)


def _check_positions(found: Sequence[Part]) -> None:
  """Every place of the list belongs to one part."""
  # Counted first: `num_prompts` is no more than what a file says.
  wanted, taken = found[0].mark.num_prompts, sum(len(part.mark.positions) for part in found)
  if taken < wanted:
    held = {at for part in found for at in part.mark.positions}
    missing = itertools.islice((at for at in range(wanted) if at not in held), 10)
    raise GenerationsError(
      f"Expected every prompt in a shard, got {wanted - len(held)} in none: the prompts"
      f" {', '.join(str(at + 1) for at in missing)} of the list; run the shards that have them."
    )
  owner = np.full(wanted, -1)
  for part in found:
    places = np.asarray(part.mark.positions, np.int64)
    taken = places[owner[places] >= 0]
    if len(taken):
      other = found[int(owner[taken[0]])].folder
      raise GenerationsError(
        f"Expected every prompt in one shard, got {len(taken)} in {other} and in"
        f" {part.folder}, first the prompt {taken[0] + 1} of the list; leave one of these"
        " folders out."
      )
    owner[places] = part.mark.shard.number


def _check_files(part: Part, names: Iterable[str]) -> None:
  """Every file is there, as the part left it."""
  for name in names:
    if name not in part.mark.checksums:
      raise GenerationsError(
        f"{part.folder / shards.MARK}: expected a mark that answers for {name}, got one that"
        " does not; take the folder away and run the shard again."
      )
  cached.check_checksums(part.folder, part.mark.checksums, manifest=shards.MARK)


def _generations(found: Sequence[Part], output: pathlib.Path) -> None:
  """One folder of cached generations."""
  with_prompts = [part for part in found if part.mark.positions]
  grid = thresholds_lib.validate_grid(_field(found[0].mark, "thresholds")).tolist()
  names = [cached.threshold_file(t) for t in (thresholds_lib.NEVER_EXIT, *grid)]
  for part in with_prompts:
    _check_files(part, [cached.PROMPTS, *names])
  output.mkdir(parents=True, exist_ok=True)
  storage.refuse_planted_links(output / n for n in (cached.MANIFEST, cached.PROMPTS, *names))
  lock = storage.lock(output)
  try:
    _refuse_other(output, _field(found[0].mark, "procedure"), grid)
    ids, offsets = _prompts(with_prompts)
    _refuse_other_prompts(output, with_prompts, ids, offsets)
    with storage.replacing(output / cached.PROMPTS) as file:
      for line in _lines(with_prompts, cached.PROMPTS, offsets):
        file.write(line)
    for name in names:
      with storage.replacing(output / name) as file:
        for lines in _in_order(with_prompts, name, ids):
          file.write(lines)
    manifest = cached.read_manifest(with_prompts[0].folder)
    provenance = {**(manifest.get("provenance") or {}), "num_examples": len(ids)}
    checksums = {n: storage.checksum(output / n) for n in (cached.PROMPTS, *names)}
    whole = {**manifest, "provenance": provenance, "prompt_ids": ids, "checksums": checksums}
    storage.write_atomically(
      output / cached.MANIFEST, json.dumps(whole, indent=1, ensure_ascii=False) + "\n"
    )
  finally:
    lock.release()


def _refuse_other(output: pathlib.Path, procedure: Any, grid: list[float]) -> None:
  """Raises GenerationsError where the folder holds something else than an earlier merging."""
  if not (output / cached.MANIFEST).exists():
    return
  there = cached.read_manifest(output)
  if there.get("procedure") != procedure or list(there["thresholds"]) != grid:
    raise GenerationsError(
      f"{output / cached.MANIFEST}: expected the procedure and the grid of these shards, got"
      " others; choose another --output."
    )


def _refuse_other_prompts(
  output: pathlib.Path,
  found: Sequence[Part],
  ids: list[str],
  offsets: Mapping[int, list[int]],
) -> None:
  """Raises GenerationsError where the folder holds prompts of another list, or of no run."""
  path = output / cached.PROMPTS
  if (output / cached.MANIFEST).exists():
    there = cached.read_manifest(output)
    same = there["prompt_ids"] == ids and not there.get("sequential")
  else:  # a merging that was stopped has left them as they are
    same = True
    if path.exists():
      with storage.opened(path) as file:
        theirs = iter(lambda: file.readline(storage.LONGEST_LINE + 1), b"")
        pairs = itertools.zip_longest(theirs, _lines(found, cached.PROMPTS, offsets))
        same = all(there == ours for there, ours in pairs)
  if not same:
    raise GenerationsError(
      f"{path}: expected the prompts of these shards, or none, got others, which would be"
      " replaced; choose another --output."
    )


def _prompts(found: Sequence[Part]) -> tuple[list[str], dict[int, list[int]]]:
  """Ids of the prompts in the order of the list; and where each part's lines are."""
  ids: list[str] = [""] * found[0].mark.num_prompts
  owner: dict[str, pathlib.Path] = {}
  offsets: dict[int, list[int]] = {}
  for number, part in enumerate(found):
    lines = storage.read_lines(part.folder / cached.PROMPTS)
    places = iter(part.mark.positions)
    offsets[number] = []
    for line in lines:
      prompt = Prompt.from_json(line.value)
      at = next(places, None)
      if at is None or shards.shard_of(prompt, part.mark.shard.count) != part.mark.shard.number:
        raise line.error(
          f"expected prompts of {part.mark.shard.name}, got {prompt.id!r}, which is none; take"
          " the folder away and run the shard again."
        )
      if prompt.id in owner:
        raise line.error(
          f"expected every id in one shard, got {prompt.id!r} in {owner[prompt.id]} too; give"
          " every prompt its own."
        )
      owner[prompt.id], ids[at] = part.folder, prompt.id
      offsets[number].append(line.offset)
    if next(places, None) is not None:
      raise GenerationsError(
        f"{part.folder / cached.PROMPTS}: expected {len(part.mark.positions)} prompts, got"
        " fewer; take the folder away and run the shard again."
      )
  return ids, offsets


def _in_order(found: Sequence[Part], name: str, ids: list[str]) -> Iterator[bytes]:
  """The lines of a file of every part, in the order of the list."""
  offsets = {}
  for number, part in enumerate(found):
    mine = cached.record_offsets(part.folder / name, _procedure(part.mark))
    wanted = [ids[at] for at in part.mark.positions]
    missing = [i for i in wanted if i not in mine]
    if missing or len(mine) != len(wanted):
      odd = missing or sorted(set(mine) - set(wanted))
      raise GenerationsError(
        f"{part.folder / name}: expected a record of each of its {len(wanted)} prompts, got"
        f" {len(mine)}, first that is missing, or no prompt of it: {odd[:3]}; take the folder"
        " away and run the shard again."
      )
    offsets[number] = [mine[i] for i in wanted]
  return _lines(found, name, offsets)


def _lines(
  found: Sequence[Part], name: str, offsets: Mapping[int, list[int]]
) -> Iterator[bytes]:
  """Lines by their places in the list, whatever their order in the files."""
  total = found[0].mark.num_prompts
  owner, begin = np.zeros(total, np.int32), np.zeros(total, np.int64)
  for number, part in enumerate(found):
    places = np.asarray(part.mark.positions, np.int64)
    owner[places], begin[places] = number, offsets[number]
  with contextlib.ExitStack() as stack:
    opened: list[BinaryIO] = [
      stack.enter_context(open(part.folder / name, "rb")) for part in found
    ]
    for number, offset in zip(owner.tolist(), begin.tolist(), strict=True):
      opened[number].seek(offset)
      line = opened[number].readline()
      yield line if line.endswith(b"\n") else line + b"\n"


def _outputs(found: Sequence[Part], output: pathlib.Path) -> None:
  """One file of `calm infer`'s lines."""
  with_prompts = [part for part in found if part.mark.positions]
  owner: dict[str, pathlib.Path] = {}
  offsets: dict[int, list[int]] = {}
  for number, part in enumerate(with_prompts):
    _check_files(part, [OUTPUTS])
    offsets[number] = []
    for line in storage.read_lines(part.folder / OUTPUTS):
      name = line.value.get("id")
      if not isinstance(name, str):
        raise line.error(
          f"expected an `id`, a text, got {name!r}; take the folder away and run the shard"
          " again."
        )
      if name in owner:
        raise line.error(
          f"expected every id in one shard, got {name!r} in {owner[name]} too; give every"
          " prompt its own."
        )
      owner[name] = part.folder
      offsets[number].append(line.offset)
    if len(offsets[number]) != len(part.mark.positions):
      raise GenerationsError(
        f"{part.folder / OUTPUTS}: expected {len(part.mark.positions)} lines, one a prompt,"
        f" got {len(offsets[number])}; take the folder away and run the shard again."
      )
  with storage.replacing(output) as file:
    for line in _lines(with_prompts, OUTPUTS, offsets):
      file.write(line)
