"""Prompts from files of any format, from standard input, and from rows in
memory.

The text of a row, without a task prefix, is in the first of `INPUT_KEYS` or in
a named field; `id` (unique), references (in the first of `TARGET_KEYS` or in a
named field: a text, or a list of accepted ones, best first) and `source` (or
`group`: its cluster) are optional. What is read is bounded: no small file,
packed or not, fills the memory.
"""

import contextlib
import csv
import dataclasses
import functools
import gzip
import itertools
import os
import pathlib
import re
import shutil
import stat
import struct
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

from calm import arguments, storage
from calm.calibrate import Prompt

INPUT_KEYS = ("input", "inputs", "prompt", "text", "question")
TARGET_KEYS = (
  "target",
  "targets",
  "reference",
  "references",
  "output",
  "answer",
)
_GROUP_KEYS = ("source", "group")
_SUFFIXES = {
  **{".jsonl": "jsonl", ".ndjson": "jsonl", ".txt": "text", ".csv": "csv"},
  **{
    ".tsv": "tsv",
    ".tab": "tsv",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
  },
}
# What lists the files, or the splits, of a folder of Hugging Face's datasets;
# bytes of that.
_STATE = "state.json"
_SPLITS = "dataset_dict.json"
_MOST_STATE = 2**24
# Bytes that every line and row counts for besides its own: each takes time,
# even when empty. Bytes of a number, and rows by column that are written out at
# once.
_ROW = 256
_NUMBER = 8
_ROWS_AT_ONCE = 1024


@dataclasses.dataclass(frozen=True)
class TextTask:
  """A text-to-text task kept as `<root>/<name>/<split>.jsonl.gz` (or
  `.jsonl`).
  """

  name: str  # its folder, and its name in a mixture
  prefix: str  # what T5 reads before the input to know the task
  # names that `seqio_tasks.metric_fn` knows, the usual one first
  metrics: tuple[str, ...]

  def path(self, root: str | os.PathLike, split: str) -> pathlib.Path:
    """The file of one split; the plain `.jsonl` only where there is no
    `.jsonl.gz`.
    """
    folder = pathlib.Path(root) / self.name
    packed = folder / f"{split}.jsonl.gz"
    plain = folder / f"{split}.jsonl"
    return plain if plain.exists() and not packed.exists() else packed


# Descriptions of Debian packages: summaries, French translations, questions
# about them.
DEBIAN: Mapping[str, TextTask] = {
  task.name: task
  for task in (
    TextTask("debian_synopsis", "summarize: ", ("rouge_l",)),
    TextTask(
      "debian_enfr",
      "translate English to French: ",
      ("bleu", "chrf", "token_f1"),
    ),
    # Its inputs already read `question: ... context: ...`.
    TextTask("debian_qa", "", ("token_f1", "exact_match")),
  )
}


@dataclasses.dataclass(frozen=True)
class _Row:
  value: Any  # fields by name, or a bare text
  name: str  # an id for a row that has none of its own
  where: str  # file and line, for messages

  def error(self, message: str) -> ValueError:
    return ValueError(f"{self.where}: {message}.")


@dataclasses.dataclass(frozen=True)
class _Opened:
  """The bytes, unpacked, of a file, or of each Arrow file of a folder."""

  files: list[Any]
  name: str  # for messages
  stem: str  # what rows without an id are named after
  most: int  # bytes that they may unpack to

  def too_much(self) -> ValueError:
    return ValueError(
      f"Expected {self.name!r} to unpack to at most {storage.UNPACKED >> 20} "
      "MiB and"
      f" {storage.UNPACKED_RATIO} times its size, with {_ROW} bytes more for "
      "each line and row,"
      " got more; save as JSON Lines."
    )


class Prompts(tuple[Prompt, ...]):
  """Prompts, and in `taken` where they are from: `a.csv: 12 prompts, CSV,
  column 'text'`.
  """

  taken = ""


def open_prompts(
  path: str | os.PathLike,
  *,
  limit: int | None = None,
  input_key: str | None = None,
  target_key: str | None = None,
  format: str | None = None,
  require_target: bool = False,
) -> Prompts:
  """Reads the prompts of a file, all of which are checked before any is given
  out.

  Args:
    path: a file, a pipe, '-' for standard input, or a folder that
      `Dataset.save_to_disk` of Hugging Face's datasets wrote.
    limit: the number of prompts to take; None: all.
    input_key: the field with the text of a row; None: the first of `INPUT_KEYS`
      that the first row has.
    target_key: the field with the references; None: the first of `TARGET_KEYS`
      that a row has.
    format: a name of `FORMATS`; None: detected by the name, then by the
      content.
    require_target: whether every row needs a reference.

  Raises:
    FileNotFoundError: there is no such file.
    IsADirectoryError: the folder is no data set, or holds one for each split.
    ValueError: there is no prompt, or a row is damaged, lacks its text or
      repeats an id; the message names file and line.
  """
  if limit is not None and limit < 1:
    raise ValueError(
      f"Expected `limit` of at least 1, or None for all, got {limit}."
    )
  if format is not None:
    arguments.one_of("format", format, FORMATS)
  made, key, limit = (
    {},
    None,
    None if limit is None else min(limit, sys.maxsize),
  )
  with _opened(path) as opened:
    name = opened.name
    format = (
      "arrow" if os.path.isdir(path) else format or _detect_format(opened)
    )
    for row in itertools.islice(FORMATS[format][1](opened), limit):
      if not isinstance(row.value, Mapping | str):
        kind = type(row.value).__name__
        raise row.error(f"expected a JSON object or a text, got {kind}")
      key = key if made else _key_of(row, input_key)
      prompt = _prompt_of(row, key, target_key)
      if prompt.id in made:
        raise row.error(
          f"expected every `id` once, got {prompt.id!r} of an earlier row "
          "again (a row without"
          " an `id` is named by its number)"
        )
      if require_target and not prompt.targets:
        raise row.error(
          "expected a field `target`, got none; give every row a reference"
        )
      made[prompt.id] = prompt
  called, _ = FORMATS[format]
  if not made:
    raise ValueError(
      f"Expected {name} to hold prompts, got no examples: no line with text, "
      "or no row,"
      f" read as {called}; write one, or name the format."
    )
  prompts = Prompts(made.values())
  blank = sum(not prompt.input.strip() for prompt in prompts)
  parts = ["1 prompt" if len(made) == 1 else f"{len(made)} prompts", called]
  parts[0] += f" ({blank} without any text)" if blank else ""
  if key is not None:
    place = "key" if format in ("jsonl", "json") else "column"
    parts.append(f"{place} {key!r}")
  prompts.taken = f"{name}: {', '.join(parts)}"
  return prompts


@contextlib.contextmanager
def _opened(path: str | os.PathLike) -> Iterator[_Opened]:
  """A file, or a stream, which is kept on the disk, or the Arrow files of a
  folder.
  """
  name = "standard input" if str(path) == "-" else str(path)
  with contextlib.ExitStack() as stack:
    try:
      mode = None if str(path) == "-" else os.stat(path).st_mode
    except OSError as error:
      message = f"Expected `path` to name a file of prompts, got {name!r}"
      raise type(error)(f"{message} ({error.strerror}).") from error
    folder = mode is not None and stat.S_ISDIR(mode)
    found = _arrow_files(pathlib.Path(path)) if folder else [path]
    try:
      if folder or (mode is not None and stat.S_ISREG(mode)):
        files: list[Any] = [
          stack.enter_context(storage.opened(file)) for file in found
        ]
      else:
        stream = (
          sys.stdin.buffer
          if mode is None
          else stack.enter_context(open(path, "rb"))
        )
        files = [_kept(stream, name, stack)]
      size = sum(file.seek(0, os.SEEK_END) for file in files)
      most = storage.UNPACKED + storage.UNPACKED_RATIO * size
      for i, file in enumerate(files):
        file.seek(0)
        if file.peek(2).startswith(b"\x1f\x8b"):
          files[i] = stack.enter_context(gzip.GzipFile(fileobj=file))
      stem = (
        "stdin"
        if mode is None
        else pathlib.Path(name).absolute().name.split(".")[0]
      )
      yield _Opened(files, name, stem, most)
    except (EOFError, OSError, zlib.error) as error:
      # of gzip and Arrow those without a number
      kind = type(error) if getattr(error, "errno", None) else ValueError
      raise kind(
        f"Expected {name!r} to be a whole file, got: {error}."
      ) from error


def _arrow_files(folder: pathlib.Path) -> list[pathlib.Path]:
  """The files of a folder of `Dataset.save_to_disk`, which its state.json
  names, in order.
  """

  def listed(name):
    return storage.parse_json(storage.content(folder / name, _MOST_STATE))

  try:
    if (folder / _SPLITS).is_file():
      splits = ", ".join(map(repr, listed(_SPLITS)["splits"]))
      raise IsADirectoryError(
        f"Expected `path` to name one split, got {str(folder)!r} with the "
        f"splits {splits:.300};"
        f" give the folder of one, '{folder}/SPLIT'."
      )
    if not (folder / _STATE).is_file():
      raise IsADirectoryError(
        f"Expected `path` to name a file of prompts, got {str(folder)!r}, a "
        "folder without the"
        f" {_STATE} of Hugging Face's `Dataset.save_to_disk`; give a file in "
        "it."
      )
    names = [file["filename"] for file in listed(_STATE)["_data_files"]]
    if odd := [name for name in names if re.search(r"[/\\:\0]|^\.*$", name)]:
      raise ValueError(f"{odd[0]!r:.60} is no file of this folder")
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(
      f"Expected {str(folder)!r} to be a folder of `Dataset.save_to_disk`, "
      "got one whose"
      f" {_STATE} or {_SPLITS} lists something else ({error!r:.200}); save "
      "it again."
    ) from error
  return [folder / name for name in names]


def _kept(stream: BinaryIO, name: str, stack: contextlib.ExitStack) -> BinaryIO:
  """A stream's content in a file of no name."""
  status = os.fstat(stream.fileno())
  if stream.isatty():
    print("Prompts, one a line; end with Ctrl-D:", file=sys.stderr)
  elif stat.S_ISCHR(status.st_mode) and not os.path.samestat(
    status, os.stat(os.devnull)
  ):
    raise ValueError(f"Expected {name} to be a file or a pipe, got a device.")
  kept: BinaryIO = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
  shutil.copyfileobj(stream, kept)
  return kept


def _detect_format(opened: _Opened) -> str:
  """The format of a file, by its name or else by its beginning."""
  suffixes = [
    s for s in map(str.lower, pathlib.Path(opened.name).suffixes) if s != ".gz"
  ]
  if suffixes and suffixes[-1] in _SUFFIXES:
    return _SUFFIXES[suffixes[-1]]
  (file,) = opened.files
  head = file.read(2**16)
  file.seek(0)
  if head.startswith(b"PAR1"):
    return "parquet"
  text = head.decode("utf-8-sig", "replace").lstrip()
  if re.match(r'\[\s*[{"\]]', text):
    return "json"
  return (
    "jsonl"
    if suffixes[-1:] == [".json"] or re.match(r'\{\s*["}]', text)
    else "text"
  )


def _decode(content: bytes, where: str) -> str:
  """A text in UTF-8, without the mark that some editors put before it."""
  at = content.find(b"\0")  # UTF-16 may well be UTF-8 too
  try:
    text = content.decode("utf-8-sig")
  except UnicodeDecodeError as error:
    at = error.start if at < 0 else at
  if at < 0:
    return text
  raise ValueError(
    f"Expected UTF-8, got the byte 0x{content[at]:02x} in {where}."
  )


def _lines(opened: _Opened) -> Iterator[tuple[int, str]]:
  """(1-based number, text with its end) of every line.

  Lines end at newlines only: `splitlines` would end a prompt at characters that
  are no ends.
  """
  left = opened.most
  for number, line in enumerate(
    storage.lines(opened.files[0], opened.name), start=1
  ):
    left -= len(line) + _ROW
    if left < 0:
      raise opened.too_much()
    yield number, _decode(line, f"line {number} of {opened.name}")


def _json_lines(opened: _Opened) -> Iterator[_Row]:
  for number, line in _lines(opened):
    if line.strip():
      where = f"{opened.name}:{number}"
      try:
        value = storage.parse_json(line)
      except ValueError as error:
        raise ValueError(
          f"{where}: expected one JSON object a line, got invalid JSON "
          f"({error}); of plain"
          " texts, say `--prompts_format=text`."
        ) from error
      yield _Row(value, f"{opened.stem}/{number}", where)


def _json_array(opened: _Opened) -> Iterator[_Row]:
  """Objects or texts of a JSON array, which is read whole."""
  name = opened.name
  content = opened.files[0].read(storage.LONGEST_LINE + 1)
  if len(content) > storage.LONGEST_LINE:
    most = f"at most {storage.LONGEST_LINE} bytes"
    raise ValueError(
      f"{name}: expected a JSON array of {most}, got more; save JSON Lines."
    )
  # Parsed, empty lists and objects take much more than their bytes.
  if (
    len(content) + _ROW * (content.count(b"[") + content.count(b"{"))
    > opened.most
  ):
    raise opened.too_much()
  text = _decode(content, name)
  try:
    values = storage.parse_json(text)
  except ValueError as error:
    raise ValueError(
      f"{name}: expected a whole JSON array, got: {error}."
    ) from error
  if not isinstance(values, list):
    raise ValueError(
      f"{name}: expected a JSON array, got {type(values).__name__}."
    )
  for number, value in enumerate(values, start=1):
    yield _Row(value, f"{opened.stem}/{number}", f"{name}, element {number}")


def _plain_text(opened: _Opened) -> Iterator[_Row]:
  """A prompt a line; blank lines are none."""
  name = opened.name
  called = opened.stem if name == "standard input" else pathlib.Path(name).name
  filled = (item for item in _lines(opened) if item[1].strip())
  for count, (number, line) in enumerate(filled, start=1):
    yield _Row(
      line.rstrip("\n").strip("\r"), f"{called}/{count}", f"{name}:{number}"
    )


def _check_columns(names: list[str], name: str) -> None:
  if len(set(names)) < len(names):
    raise ValueError(
      f"{name}: expected columns of different names, got {names}."
    )


def _table(opened: _Opened, delimiter: str = ",") -> Iterator[_Row]:
  # By default a field has at most 128 KiB, and documents are longer.
  csv.field_size_limit(storage.LONGEST_LINE)
  table = csv.reader(
    (line for _, line in _lines(opened)), delimiter=delimiter, strict=True
  )

  def where():
    return f"{opened.name}:{table.line_num}"

  try:
    header = next(table, [])
    _check_columns(header, opened.name)
    for number, cells in enumerate(filter(None, table), start=1):
      row = _Row(
        dict(zip(header, cells, strict=False)),
        f"{opened.stem}/{number}",
        where(),
      )
      if len(cells) != len(header):
        raise row.error(
          f"expected {len(header)} columns as in the header, got {len(cells)}"
        )
      yield row
  except csv.Error as error:
    raise ValueError(
      f"{where()}: expected cells that can be read, got: {error}."
    ) from error


def _columnar(
  opened: _Opened, read_batches: Callable[..., Iterator[Any]]
) -> Iterator[_Row]:
  """Rows by column, columns left out that hold no texts, numbers or lists of
  them.
  """
  name = opened.name
  left = opened.most
  number = 0
  pyarrow = arguments.package("pyarrow", f"read {name}", "pyarrow")
  try:
    for batch in itertools.chain.from_iterable(
      read_batches(f, opened) for f in opened.files
    ):
      # what points beyond a buffer or a dictionary would be read
      batch.validate(full=True)
      # As many bytes as they take apart: few bytes in a batch may stand for
      # many equal texts.
      left -= _ROW * len(batch) + sum(map(_unpacked, batch.columns))
      if left < 0:
        raise opened.too_much()
      for begin in range(0, len(batch), _ROWS_AT_ONCE):
        for value in batch.slice(begin, _ROWS_AT_ONCE).to_pylist():
          number += 1
          yield _Row(value, f"{opened.stem}/{number}", f"{name}, row {number}")
  except (pyarrow.ArrowException, MemoryError, UnicodeDecodeError) as error:
    raise ValueError(
      f"{name}: expected whole files of columns, got: {error}."
    ) from error


def _unpacked(array: Any) -> int:
  """Bytes of a column's values, each text as long as it is."""
  from pyarrow import compute

  if _is_list(array.type):
    return _unpacked(array.flatten())
  size = _NUMBER * len(array)
  packed = hasattr(array, "dictionary")
  texts = array.dictionary if packed else array
  if "string" not in str(texts.type):
    return size
  lengths = compute.call_function("binary_length", [texts])
  lengths = lengths.take(array.indices) if packed else lengths
  return size + (lengths.sum().as_py() or 0)


def _parquet_batches(file: BinaryIO, opened: _Opened) -> Iterator[Any]:
  """Texts as they are stored, each once: 500 bytes, in which one repeats, may
  stand for 200 GB. The footer is checked before anything is read.
  """
  from pyarrow import parquet

  metadata = parquet.read_metadata(file)
  groups = map(metadata.row_group, range(metadata.num_row_groups))
  chunks = [
    group.column(i) for group in groups for i in range(group.num_columns)
  ]
  size = sum(
    max(c.total_uncompressed_size, 0) + _NUMBER * max(c.num_values, 0)
    for c in chunks
  )
  if size + _ROW * metadata.num_rows > opened.most:
    raise opened.too_much()
  texts = [chunk for chunk in chunks if chunk.physical_type == "BYTE_ARRAY"]
  # pyarrow makes no dictionary of these, whatever the footer says; one of them
  # shares texts.
  if odd := [
    e for chunk in texts for e in chunk.encodings if e.startswith("DELTA_")
  ]:
    raise ValueError(
      f"Expected {opened.name!r} to hold plain texts, got the encoding "
      f"{odd[0]}; save as JSON"
      " Lines."
    )
  table = parquet.ParquetFile(
    file, read_dictionary={chunk.path_in_schema for chunk in texts}
  )
  columns = _plain_columns(table.schema_arrow, opened.name)
  for group in range(table.num_row_groups):
    yield from table.read_row_group(group, columns).to_batches()


def _arrow_batches(file: BinaryIO, opened: _Opened) -> Iterator[Any]:
  """Batches of an Arrow stream that are neither packed nor numbers of a
  dictionary.
  """
  from pyarrow import ipc

  schema = ipc.read_schema(file)
  columns = _plain_columns(schema, opened.name)
  for message in ipc.MessageReader.open_stream(file):
    if message.type != "record batch" or _is_packed(
      message.metadata.to_pybytes()
    ):
      raise ValueError(
        f"Expected {opened.name!r} to hold plain texts, got packed ones; "
        "save as JSON Lines."
      )
    yield ipc.read_record_batch(message, schema).select(columns)


def _is_packed(metadata: bytes) -> bool:
  """Whether the table of a record batch, in a flatbuffer of Arrow's, has a
  `compression`.
  """

  def at(kind, place):
    return struct.unpack_from(kind, metadata, place)[0]

  def field(table: int, number: int) -> int:  # its place, or 0
    vtable = table - at("<i", table)
    entry = 4 + 2 * number
    place = at("<H", vtable + entry) if entry < at("<H", vtable) else 0
    return place and table + place

  header = field(at("<I", 0), 2)
  return field(header + at("<I", header), 3) > 0


def _is_list(kind: Any) -> bool:
  return str(kind).startswith(("list<", "large_list<"))


def _plain_columns(schema: Any, name: str) -> list[str]:
  """Columns of texts, numbers or lists of them: images, dates and the like are
  left.
  """
  from pyarrow import types

  plain = (types.is_string, types.is_large_string, types.is_string_view)
  plain += (types.is_integer, types.is_floating, types.is_boolean)

  def inner(kind: Any) -> Any:
    packed = _is_list(kind) or types.is_dictionary(kind)
    return inner(kind.value_type) if packed else kind

  _check_columns(schema.names, name)
  return [
    field.name
    for field in schema
    if any(is_(inner(field.type)) for is_ in plain)
  ]


# The names of the formats, what messages call them, and how they are read.
FORMATS: Mapping[str, tuple[str, Callable[[_Opened], Iterator[_Row]]]] = {
  "jsonl": ("JSON Lines", _json_lines),
  "json": ("a JSON array", _json_array),
  "text": ("plain text, a prompt a line", _plain_text),
  "csv": ("CSV", _table),
  "tsv": ("TSV", functools.partial(_table, delimiter="\t")),
  "parquet": (
    "Parquet",
    functools.partial(_columnar, read_batches=_parquet_batches),
  ),
  "arrow": ("Arrow", functools.partial(_columnar, read_batches=_arrow_batches)),
}


def _key_of(row: _Row, wanted: str | None) -> str | None:
  """The field that has the text of every row, by the first row; None where rows
  are texts.
  """
  if isinstance(row.value, str):
    if wanted is not None:
      raise row.error(
        f"expected rows with a key {wanted!r}, got a text; leave the key out"
      )
    return None
  keys = INPUT_KEYS if wanted is None else (wanted,)
  if found := [key for key in keys if key in row.value]:
    return found[0]
  raise row.error(
    f"expected a field {' or '.join(f'`{key}`' for key in keys)}, got"
    f" {list(row.value)[:12]}; call the one with the text `input`, or name "
    "it: `--input_key`"
  )


def _prompt_of(
  row: _Row, input_key: str | None, target_key: str | None
) -> Prompt:
  if isinstance(row.value, str) != (input_key is None):
    raise row.error(
      "expected all rows to be objects, or all to be texts, got both"
    )
  fields = {"": row.value} if isinstance(row.value, str) else row.value
  for key in (input_key, target_key):
    if key is not None and key not in fields:
      raise row.error(f"expected a field `{key}`, got {list(fields)[:12]}")

  def first(keys):
    return next(
      (fields[key] for key in keys if fields.get(key) is not None), None
    )

  targets = first((target_key,) if target_key else TARGET_KEYS)
  name = fields.get("id")
  targets = (
    []
    if targets is None
    else targets
    if isinstance(targets, list)
    else [targets]
  )
  name = str(name) if type(name) is int else name  # its digits are a name
  try:
    name = row.name if name in (None, "") else name
    return Prompt(name, fields[input_key or ""], targets, first(_GROUP_KEYS))  # pyright: ignore
  except ValueError as error:
    raise row.error(str(error).replace("Expected", "expected", 1)) from error


def check_texts(texts: Any) -> tuple[str, ...]:
  """Texts of any ordered iterable; TypeError where it is something else that
  iterates.
  """
  listed = not isinstance(texts, str) and arguments.is_listing(texts)
  made = tuple(texts) if listed else ()
  if (
    odd := [text for text in made if not isinstance(text, str)]
    if listed
    else [texts]
  ):
    got = "a table" if arguments.is_table(texts) else f"{odd[0]!r:.60}"
    raise TypeError(
      f"Expected `texts` to be a list of texts, got {got}; put it in a list, "
      "or give"
      " `table['input']`, or `[prompt.input, ...]`."
    )
  return made


def prompts_of(
  values: Any, *, input_key: str | None = None, target_key: str | None = None
) -> tuple[Prompt, ...]:
  """Prompts of rows in memory, by the same names as in files.

  Args:
    values: a DataFrame of pandas or polars, or texts, mappings or `Prompt`s;
      those without an id are named by their number.
    input_key, target_key: where a row has its text and its references; None: as
      in files.

  Raises:
    TypeError: one text instead of a list, or something that is no prompt.
    ValueError: a row lacks its text, or has one that is no text (names the
      row).
  """
  if arguments.is_table(values):
    columns = {str(name): map(_plain, values[name]) for name in values.columns}
    cells = zip(*columns.values(), strict=True)
    values = [dict(zip(columns, row, strict=True)) for row in cells]
  elif isinstance(values, str) or not arguments.is_listing(values):
    raise TypeError(
      f"Expected `prompts` to be a list, got {values!r:.60}; put it in a "
      "list, or give"
      " texts, `Prompt`s or a table."
    )
  found: list[Prompt] = []
  keys: list[str | None] = []  # that of the first row
  for number, value in enumerate(values, start=1):
    if isinstance(value, Prompt):
      found.append(value)
    elif isinstance(value, str | Mapping):
      row = _Row(value, f"prompt/{number}", f"prompt {number}")
      keys = keys or [_key_of(row, input_key)]
      found.append(_prompt_of(row, keys[0], target_key))
    else:
      raise TypeError(
        "Expected prompts to be texts, mappings with a text at `input`, or "
        "`Prompt`s, got"
        f" {value!r:.60} as number {number}; leave it out, or give its text."
      )
  return tuple(found)


def _plain(value: Any) -> Any:
  """Numpy's and polars' values as Python's own, a missing one as None."""
  made = next(
    (getattr(value, n)() for n in ("tolist", "to_list") if hasattr(value, n)),
    value,
  )
  return None if isinstance(made, float) and made != made else made
