"""Shards of one list of prompts, each decoded by a process of its own, and merging them.

A prompt belongs to the shard that a hash of its name says, whatever else is in the list; the
prompts of a group go to one shard together. Shard k of N lies in a folder `shard-k-of-N`,
written by one process that talks to no other, and is done when `complete.json` is there, which
is written last and says what the shard is of.

Merging copies lines as they are, in the order of the list, and reads and writes every file as a
stream: memory grows with the prompts (their names and places), not with their outputs. The
manifest of a merged folder, or the merged file itself, takes its place last.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np

from calm import storage
from calm.calibrate import thresholds as thresholds_lib
from calm.calibrate.generations import cache, writer
from calm.calibrate.generations.procedure import Procedure, describe_differences
from calm.calibrate.generations.records import GenerationsError, Prompt

SCHEMA_VERSION = 1
MARK = "complete.json"
# What the shards of `calm infer` write.
OUTPUTS = "outputs.jsonl"
MOST_SHARDS = 99_999
_FOLDER = re.compile(r"shard-(\d{5})-of-(\d{5})")
_AGAIN = "take the folder away and run the shard again."


@dataclasses.dataclass(frozen=True)
class Shard:
  """One of `count` shards; `number` counts from 0.

  Raises:
    ValueError: there is no such shard.
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
    """Whether the prompt is of this shard."""
    return shard_of(prompt, self.count) == self.number


def shard_of(prompt: Prompt, count: int) -> int:
  """The shard of `count` that a prompt belongs to, by its group or, where it has none, its id.

  SHA-256 of the name, so that it is the same in every process, version and machine.
  """
  kind, name = ("id", prompt.id) if prompt.group is None else ("group", prompt.group)
  digest = hashlib.sha256(f"{kind}/{name}".encode()).digest()
  return int.from_bytes(digest[:8], "big") % count


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
  """What a finished shard says of itself.

  Attributes:
    kind: 'generate' or 'infer', the command that wrote it.
    shard: which shard.
    num_prompts: prompts of the whole list.
    prompts_digest: of the whole list.
    positions: places in the list of this shard's prompts.
    about: what the outputs depend on, compared between shards.
    checksums: SHA-256 of its files.
  """

  kind: str
  shard: Shard
  num_prompts: int
  prompts_digest: str
  positions: tuple[int, ...]
  about: Mapping[str, Any]
  checksums: Mapping[str, str]

  @property
  def procedure(self) -> Procedure | None:
    """How the outputs were decoded, or None."""
    value = self.about.get("procedure")
    return None if value is None else Procedure.from_json(value)

  def save(self, folder: pathlib.Path) -> None:
    """Writes the mark: the shard is done."""
    shard = {"num_shards": self.shard.count, "shard_id": self.shard.number}
    fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
    value = {"schema_version": SCHEMA_VERSION, "kind": fields.pop("kind"), **shard, **fields}
    del value["shard"]
    storage.write_atomically(folder / MARK, json.dumps(value, ensure_ascii=False) + "\n")


def mark_of(
  kind: str, listing: Listing, about: Mapping[str, Any], folder: pathlib.Path, names
) -> Mark:
  """The mark of a shard whose files are whole; `names` are those that it answers for."""
  sums = {name: storage.checksum(folder / name) for name in names}
  # As it is when it is read again: what is compared was JSON once.
  plain = json.loads(json.dumps(about))
  positions = tuple(listing.positions)
  return Mark(kind, listing.shard, listing.count, listing.digest, positions, plain, sums)


def read_mark(folder: pathlib.Path) -> Mark | None:
  """What a shard says of itself; None where it is not done.

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
      f"{path}: expected the mark of a finished shard, got no JSON: {error}; {_AGAIN}"
    ) from error
  try:
    mark = _checked(value)
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise GenerationsError(
      f"{path}: expected the mark of a finished shard, got one that is not: {error!r}; {_AGAIN}"
    ) from error
  if folder.name != mark.shard.name and _FOLDER.fullmatch(folder.name):
    raise GenerationsError(
      f"{path}: expected the folder {mark.shard.name} of its mark, got {folder.name}; give"
      " the folder its name back."
    )
  return mark


def _checked(value: Any) -> Mark:
  shard = Shard(value["shard_id"], value["num_shards"])
  places, total, sums = value["positions"], value["num_prompts"], value["checksums"]
  whole = lambda number: type(number) is int
  checks = {
    "schema_version": whole(value["schema_version"])
    and value["schema_version"] == SCHEMA_VERSION,
    "kind": value["kind"] in ("generate", "infer"),
    "prompts_digest": isinstance(value["prompts_digest"], str),
    "about": isinstance(value["about"], dict),
    "num_prompts": whole(total),
    "positions": isinstance(places, list)
    and all(whole(at) and 0 <= at < total for at in places)
    and all(a < b for a, b in itertools.pairwise(places)),
    "checksums": all(isinstance(v, str) and "/" not in k for k, v in sums.items()),
  }
  wrong = [name for name, holds in checks.items() if not holds]
  if wrong:
    raise ValueError(f"Expected `{wrong[0]}` of a shard, got {value[wrong[0]]!r:.80}")
  digest, about = value["prompts_digest"], value["about"]
  return Mark(value["kind"], shard, total, digest, tuple(places), about, dict(sums))


def folders(root: pathlib.Path) -> list[pathlib.Path]:
  """The folders of shards in a folder, by name."""
  return sorted(path for path in root.iterdir() if path.is_dir() and named(path))


def named(folder: pathlib.Path) -> Shard | None:
  """The shard that a folder's name tells."""
  match = _FOLDER.fullmatch(folder.name)
  return Shard(int(match[1]), int(match[2])) if match else None


@dataclasses.dataclass(frozen=True)
class Part:
  """A finished shard and its folder."""

  folder: pathlib.Path
  mark: Mark


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
  members = parts(places)
  output = pathlib.Path(output)
  for part in members:
    if output.resolve().is_relative_to(part.folder.resolve()):
      raise GenerationsError(
        f"Expected `output` beside the shards, got {output}, in the shard {part.folder}, whose"
        " files it would replace; choose another."
      )
  with_prompts = [part for part in members if part.mark.positions]
  if members[0].mark.kind == "infer":
    _merge_outputs(with_prompts, output)
  else:
    _merge_generations(with_prompts, members[0].mark, output)
  return members[0].mark.num_prompts


def parts(places: Sequence[str | pathlib.Path]) -> list[Part]:
  """All shards of a list, checked against one another, by number.

  Raises:
    GenerationsError: as `merge` says, but for the contents of files.
  """
  at = _folders([pathlib.Path(place) for place in places])
  members: dict[Shard, Part] = {}
  half = []
  for folder in at:
    mark = read_mark(folder)
    if mark is None:
      half.append(folder)
      continue
    if mark.shard in members:
      raise GenerationsError(
        f"Expected every shard once, got {mark.shard.name} twice: {members[mark.shard].folder}"
        f" and {folder}; leave one out."
      )
    members[mark.shard] = Part(folder, mark)
  counts = {shard.count for shard in [*members, *filter(None, map(named, at))]}
  if len(counts) > 1:
    raise GenerationsError(
      f"Expected shards of one division, got some of {sorted(counts)} shards among"
      f" {', '.join(folder.name for folder in at[:8])}; name those that belong together."
    )
  if half:
    raise GenerationsError(
      f"Expected shards that are finished, got {len(half)} without {MARK}:"
      f" {', '.join(map(str, half[:8]))}; run them again, they go on where they were."
    )
  missing = sorted({*range(counts.pop())} - {shard.number for shard in members})
  ordered = [members[shard] for shard in sorted(members, key=lambda shard: shard.number)]
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
  if len(places) == 1 and not (places[0] / MARK).exists():
    places = folders(places[0]) or places
  if len(places) == 1 and named(places[0]) is None:
    raise GenerationsError(
      f"Expected a folder with shards in it, got {places[0]} without any; `calm generate` and"
      " `calm infer` write them with --num_shards."
    )
  return list(places)


def _check_alike(first: Part, other: Part) -> None:
  """GenerationsError unless both are shards of one run."""
  ours, theirs = (
    {name: getattr(part.mark, name) for name in ("kind", "num_prompts", "prompts_digest")}
    | dict(part.mark.about)
    for part in (first, other)
  )
  differ = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
  if not differ:
    return
  what = {"kind": "commands", "num_prompts": "lists of prompts"}
  what |= {"prompts_digest": "lists of prompts", "procedure": "procedures"}
  pairs = (f"`{name}` ({ours.get(name)!r}, {theirs.get(name)!r})" for name in differ)
  text = ", ".join(pairs)
  if differ == ["procedure"]:
    text = describe_differences(first.mark.procedure, other.mark.procedure)
    text = text or "one does not say what the other says of itself"
  raise GenerationsError(
    f"Expected shards of one run, got two {what.get(differ[0], 'runs')}: {first.folder} and"
    f" {other.folder} differ: {text}; merge those of one run alone."
  )


def _check_positions(members: Sequence[Part]) -> None:
  """Every place of the list belongs to one shard."""
  # Counted first: `num_prompts` is no more than what a file says.
  wanted, count = members[0].mark.num_prompts, sum(len(part.mark.positions) for part in members)
  if count < wanted:
    held = {at for part in members for at in part.mark.positions}
    missing = itertools.islice((at for at in range(wanted) if at not in held), 10)
    raise GenerationsError(
      f"Expected every prompt in a shard, got {wanted - len(held)} in none: the prompts"
      f" {', '.join(str(at + 1) for at in missing)} of the list; run the shards that have them."
    )
  owner = np.full(wanted, -1)
  for part in members:
    places = np.asarray(part.mark.positions, np.int64)
    twice = places[owner[places] >= 0]
    if len(twice):
      other = members[int(owner[twice[0]])].folder
      raise GenerationsError(
        f"Expected every prompt in one shard, got {len(twice)} in {other} and in"
        f" {part.folder}, first the prompt {twice[0] + 1} of the list; leave one of these"
        " folders out."
      )
    owner[places] = part.mark.shard.number


def _check_files(part: Part, names: Iterable[str]) -> None:
  """Every file is there, as the shard left it."""
  for name in names:
    if name not in part.mark.checksums:
      raise GenerationsError(
        f"{part.folder / MARK}: expected a mark that answers for {name}, got one that does"
        f" not; {_AGAIN}"
      )
  cache.check_checksums(part.folder, part.mark.checksums, manifest=MARK)


def _merge_generations(members: Sequence[Part], mark: Mark, output: pathlib.Path) -> None:
  """One folder of cached generations."""
  grid = thresholds_lib.validate_grid(mark.about["thresholds"]).tolist()
  names = cache.file_names(grid)
  for part in members:
    _check_files(part, names)
  lock = writer.lock_folder(output, grid)
  try:
    ids, offsets = _offsets(members, cache.PROMPTS)
    _refuse_other(output, members, mark, ids, offsets)
    for name in names:
      places = offsets if name == cache.PROMPTS else _record_offsets(members, name, ids)
      with storage.replacing(output / name) as file:
        file.writelines(_lines(members, name, places))
    manifest = cache.read_manifest(members[0].folder)
    manifest["provenance"] = {**(manifest.get("provenance") or {}), "num_examples": len(ids)}
    manifest["prompt_ids"] = ids
    manifest["checksums"] = {name: storage.checksum(output / name) for name in names}
    writer.write_manifest(output, manifest)
  finally:
    lock.release()


def _refuse_other(
  output: pathlib.Path, members: Sequence[Part], mark: Mark, ids: list[str], offsets
) -> None:
  """GenerationsError where the folder holds something else than an earlier merging."""
  path = output / cache.PROMPTS
  if (output / cache.MANIFEST).exists():
    there = cache.read_manifest(output)
    run = (there.get("procedure"), list(there["thresholds"]))
    if run != (mark.about.get("procedure"), mark.about["thresholds"]):
      raise GenerationsError(
        f"{output / cache.MANIFEST}: expected the procedure and the grid of these shards, got"
        " others; choose another --output."
      )
    same = there["prompt_ids"] == ids and not there.get("sequential")
  elif path.exists():  # a merging that was stopped has left them as they are
    with storage.opened(path) as file:
      theirs = iter(lambda: file.readline(storage.LONGEST_LINE + 1), b"")
      pairs = itertools.zip_longest(theirs, _lines(members, cache.PROMPTS, offsets))
      same = all(there == ours for there, ours in pairs)
  else:
    same = True
  if not same:
    raise GenerationsError(
      f"{path}: expected the prompts of these shards, or none, got others, which would be"
      " replaced; choose another --output."
    )


def _offsets(members: Sequence[Part], name: str) -> tuple[list[str], list[list[int]]]:
  """Ids in the order of the list; and where each shard's lines begin, one a prompt of it."""
  ids: list[str] = [""] * members[0].mark.num_prompts
  owner: dict[str, pathlib.Path] = {}
  offsets: list[list[int]] = []
  for part in members:
    mine: list[int] = []
    for line in storage.read_lines(part.folder / name):
      key = line.value.get("id")
      if not isinstance(key, str):
        raise line.error(f"expected an `id`, a text, got {key!r}; {_AGAIN}")
      if name == cache.PROMPTS and not part.mark.shard.has(Prompt.from_json(line.value)):
        raise line.error(f"expected prompts of {part.mark.shard.name}, got {key!r}; {_AGAIN}")
      if key in owner:
        raise line.error(
          f"expected every id in one shard, got {key!r} in {owner[key]} too; give every prompt"
          " its own."
        )
      owner[key] = part.folder
      if len(mine) < len(part.mark.positions):
        ids[part.mark.positions[len(mine)]] = key
      mine.append(line.offset)
    if len(mine) != len(part.mark.positions):
      raise GenerationsError(
        f"{part.folder / name}: expected {len(part.mark.positions)} lines, one a prompt, got"
        f" {len(mine)}; {_AGAIN}"
      )
    offsets.append(mine)
  return ids, offsets


def _record_offsets(members: Sequence[Part], name: str, ids: list[str]) -> list[list[int]]:
  """Where the records of each shard's prompts begin in its file."""
  offsets = []
  for part in members:
    mine = cache.record_offsets(part.folder / name, part.mark.procedure)
    wanted = [ids[at] for at in part.mark.positions]
    missing = [key for key in wanted if key not in mine]
    if missing or len(mine) != len(wanted):
      odd = missing or sorted(set(mine) - set(wanted))
      raise GenerationsError(
        f"{part.folder / name}: expected a record of each of its {len(wanted)} prompts, got"
        f" {len(mine)}, first that is missing, or no prompt of it: {odd[:3]}; {_AGAIN}"
      )
    offsets.append([mine[key] for key in wanted])
  return offsets


def _lines(
  members: Sequence[Part], name: str, offsets: Sequence[Sequence[int]]
) -> Iterator[bytes]:
  """Lines by their places in the list, whatever their order in the files."""
  total = members[0].mark.num_prompts
  owner, begin = np.zeros(total, np.int32), np.zeros(total, np.int64)
  for number, part in enumerate(members):
    places = np.asarray(part.mark.positions, np.int64)
    owner[places], begin[places] = number, offsets[number]
  with contextlib.ExitStack() as stack:
    files: list[BinaryIO] = [
      stack.enter_context(open(part.folder / name, "rb")) for part in members
    ]
    for number, offset in zip(owner.tolist(), begin.tolist(), strict=True):
      files[number].seek(offset)
      line = files[number].readline()
      yield line if line.endswith(b"\n") else line + b"\n"


def _merge_outputs(members: Sequence[Part], output: pathlib.Path) -> None:
  """One file of `calm infer`'s lines."""
  for part in members:
    _check_files(part, [OUTPUTS])
  _, offsets = _offsets(members, OUTPUTS)
  with storage.replacing(output) as file:
    file.writelines(_lines(members, OUTPUTS, offsets))
