"""Prompts and references from JSON Lines files, without TensorFlow.

A file has one JSON object a line, UTF-8, plain or gzip:

    {"id": "syn/dconf", "source": "dconf", "input": "DConf is a ...", "target": ["simple ..."]}

`input` is the text without a task prefix; `target` is a string or a list of accepted
references, best first; `id` (a name that no other line has) and `source` (the cluster that a
row comes from, say its document) may be missing, and so may `target` where only prompts are
wanted. Other fields are ignored.
"""

import dataclasses
import gzip
import json
import pathlib
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

from calm import storage
from calm.data import bounded


@dataclasses.dataclass(frozen=True)
class Example:
  """One prompt.

  Attributes:
    id: unique in its file.
    input: text that goes in, without a task prefix.
    targets: accepted references, best first; train on the first, score against all.
    source: what rows are clustered by, or None.
  """

  id: str
  input: str
  targets: tuple[str, ...] = ()
  source: str | None = None


@dataclasses.dataclass(frozen=True)
class TextTask:
  """A text-to-text task kept as `<root>/<name>/<split>.jsonl.gz` (or `.jsonl`).

  Attributes:
    name: its folder, and its name in a mixture.
    prefix: what T5 reads before the input to know the task.
    metrics: names that `calm.data.seqio_tasks.metric_fn` knows, the first being the usual one.
  """

  name: str
  prefix: str
  metrics: tuple[str, ...]

  def path(self, root: str | pathlib.Path, split: str) -> pathlib.Path:
    """The file of one split; the plain `.jsonl` only where there is no `.jsonl.gz`."""
    folder = pathlib.Path(root) / self.name
    packed, plain = folder / f"{split}.jsonl.gz", folder / f"{split}.jsonl"
    return plain if plain.exists() and not packed.exists() else packed


# Descriptions of Debian packages: summaries, French translations, questions about them.
DEBIAN: Mapping[str, TextTask] = {
  task.name: task
  for task in (
    TextTask("debian_synopsis", "summarize: ", ("rouge_l",)),
    TextTask("debian_enfr", "translate English to French: ", ("bleu", "chrf", "token_f1")),
    # Its inputs already read `question: ... context: ...`.
    TextTask("debian_qa", "", ("token_f1", "exact_match")),
  )
}


def read_examples(
  path: str | pathlib.Path, *, limit: int | None = None, require_target: bool = True
) -> list[Example]:
  """Reads one JSON Lines file whole.

  Args:
    path: the file; gzip is told by its first bytes, whatever the name.
    limit: stop after this many examples; None: all.
    require_target: whether a line without `target` (or `targets`) is an error (else it has no
      targets).

  Returns:
    Examples in the order of the file, at least one. Blank lines are skipped; a line without
    `id` is named after the file and its line number.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: the file is empty or damaged, or a line is no UTF-8, no JSON object, lacks a
      field, has one of another type, or repeats an id. Names the file and the line.
  """
  path = pathlib.Path(path)
  if limit is not None and limit < 1:
    raise ValueError(f"Expected `limit` of at least 1, or None for all, got {limit}.")
  examples: list[Example] = []
  lines_of_ids: dict[str, int] = {}
  for number, line in _lines(path):
    example = _example(_object(path, number, line), f"{path}:{number}", require_target)
    if not example.id:
      example = dataclasses.replace(example, id=f"{path.name.split('.')[0]}/{number}")
    if example.id in lines_of_ids:
      raise ValueError(
        f"{path}:{number}: expected every `id` once, got {example.id!r} of line"
        f" {lines_of_ids[example.id]} again; give every line its own, or leave `id` out to"
        " have lines numbered."
      )
    lines_of_ids[example.id] = number
    examples.append(example)
    if len(examples) == limit:
      break
  if not examples:
    raise ValueError(
      f'{path}: expected lines of {{"input": ..., "target": ...}}, got none; write at least'
      " one."
    )
  return examples


def _lines(path: pathlib.Path) -> Iterator[tuple[int, bytes]]:
  """(1-based number, bytes) of the lines that are not blank."""
  if not path.is_file():
    what = "is a folder" if path.is_dir() else "does not exist"
    raise FileNotFoundError(
      f"Expected `path` to be a JSON Lines file (.jsonl, .gz), got {str(path)!r}, which {what}."
    )
  number = 0
  try:
    with path.open("rb") as file:
      packed = file.read(2) == bounded.GZIP_MAGIC
      file.seek(0)
      unpacked = bounded.Gzip(file, path.stat().st_size, str(path)) if packed else file
      for number, line in enumerate(bounded.lines(unpacked, str(path)), start=1):  # pyright: ignore[reportArgumentType]
        if line.strip():
          yield number, line
  except (EOFError, gzip.BadGzipFile, zlib.error) as error:
    raise ValueError(
      f"{path}: expected whole gzip data, got some that are damaged or cut off after line"
      f" {number} ({error}); copy the file again."
    ) from error


def _object(path: pathlib.Path, number: int, line: bytes) -> dict[str, Any]:
  try:
    # Some editors put a byte order mark before the first line.
    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
  except UnicodeDecodeError as error:
    raise ValueError(
      f"{path}:{number}: expected UTF-8, got invalid UTF-8 at byte {error.start + 1} of the"
      f" line (0x{line[error.start]:02x}); save the file as UTF-8."
    ) from error
  try:
    fields = storage.parse_json(text)
  except json.JSONDecodeError as error:
    raise ValueError(
      f"{path}:{number}: expected one JSON object a line, got invalid JSON at column"
      f" {error.colno} ({error.msg}); write the line again."
    ) from error
  except ValueError as error:
    raise ValueError(
      f"{path}:{number}: expected one JSON object a line, got {error}; write the line again."
    ) from error
  if not isinstance(fields, dict):
    raise ValueError(
      f"{path}:{number}: expected a JSON object with `input`, got {type(fields).__name__}."
    )
  return fields


def _example(fields: Mapping[str, Any], where: str, require_target: bool) -> Example:
  if "input" not in fields:
    raise ValueError(f"{where}: expected a field `input`, got {sorted(fields)}.")
  # Files of prompts call several references `targets`.
  name = "targets" if "targets" in fields and "target" not in fields else "target"
  target = fields.get(name)
  if require_target and target in (None, []):
    raise ValueError(
      f"{where}: expected a field `target`, a reference for training and scoring, got none,"
      f" or an empty one, in {sorted(fields)}."
    )
  targets = [] if target is None else target if isinstance(target, list) else [target]
  for i, text in enumerate(targets):
    _text(text, f"{name}[{i}]" if isinstance(target, list) else name, where)
  source = fields.get("source")
  return Example(
    id="" if fields.get("id") is None else _text(fields["id"], "id", where),
    input=_text(fields["input"], "input", where),
    targets=tuple(targets),
    source=None if source is None else _text(source, "source", where),
  )


def _text(value: Any, name: str, where: str) -> str:
  if not isinstance(value, str):
    raise ValueError(
      f"{where}: expected `{name}` to be a string, got {type(value).__name__} {value!r:.60}."
    )
  try:
    value.encode("utf-8")
  except UnicodeEncodeError as error:
    raise ValueError(
      f"{where}: expected `{name}` to be Unicode, got half of a surrogate pair,"
      f" {value[error.start]!r}, at character {error.start + 1}; write the character whole,"
      " or its pair of escapes."
    ) from error
  return value
