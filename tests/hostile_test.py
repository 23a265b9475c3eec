"""Malformed and forged input, generated: every field and byte of every file
that is read.

Tables of documents, each with the function that reads it; generators of
exchanges. The outcome is an error that says what was expected where, or a value
that the table calls fair; never a traceback of another kind, never a wait,
never a silent acceptance.
"""

import collections
import contextlib
import copy
import gzip
import json
import os
import pathlib
import resource
import signal
import struct
import sys
import types
import warnings
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip(
  "tensorstore", reason="T5X checkpoints need tensorstore (`train`)"
)

from calm import checkpoints
from calm.data import prompt_files, vocabulary
from calm.t5 import parameters
from tests import hostile_documents as documents
from tests import toy_vocabulary
from tests.spent import Spent

GOLDEN = pathlib.Path(__file__).parent / "golden"
# No module has this name; to look for it is a fault.
PLANTED = "planted_module"
VALUES = (
  *(
    None,
    True,
    -1,
    0,
    1.5,
    10**9,
    10**30,
    "x",
    "",
    [],
    {},
    [[1]],
    {"a": 1},
    "\x1b[2J",
  ),
  f"{PLANTED}:run",
)
SECONDS = 10.0
BYTES = 2**30
_DEEP = "@deep@"
_HUGE = "@huge@"
_NAN = "@nan@"
_RAW = {f'"{_DEEP}"': "[" * 20_000, f'"{_HUGE}"': "1e400", f'"{_NAN}"': "NaN"}
NAMES = (*documents.FAIR, *documents.OPEN)


def paths(value: Any, prefix: tuple = ()) -> Iterator[tuple]:
  """Every place of a document, the first two of a list."""
  items = (
    value.items() if isinstance(value, dict) else list(enumerate(value))[:2]
  )
  for key, child in items:
    yield (*prefix, key)
    if isinstance(child, dict | list):
      yield from paths(child, (*prefix, key))


def exchanged(document: Any) -> Iterator[tuple[str, Any, str]]:
  """(the field, or what was done; its new value; the text of the document after
  it).
  """
  for path in paths(document):
    for value in (*VALUES, _DEEP, _HUGE, _NAN, documents.GONE):
      holder = changed = copy.deepcopy(document)
      for key in path[:-1]:
        holder = holder[key]
      if holder[path[-1]] == value and type(holder[path[-1]]) is type(value):
        continue
      if value == documents.GONE:
        del holder[path[-1]]
      else:
        holder[path[-1]] = value
      text = json.dumps(changed)
      for mark, raw in _RAW.items():
        text = text.replace(mark, raw)
      yield ".".join(map(str, path)), value, text
  text = json.dumps(document)
  if isinstance(document, dict) and document:
    key = json.dumps(min(document))
    again = text.replace(
      "{", f"{{{key}: {json.dumps(document[min(document)])}, ", 1
    )
    yield "a key twice", None, again
  for what, raw in (
    ("empty", ""),
    ("null", "null"),
    ("list", "[]"),
    ("halved", text[: len(text) // 2]),
    ("twice", text + text),
    ("deep", "[" * 50_000),
    ("bytes", text.replace('"', "\udcff", 1)),
  ):
    yield what, None, raw


def named(error: Exception) -> bool:
  """Whether an error says what was expected of what, and what there was."""
  text = str(error)
  names = any(mark in text for mark in ("`", "'", "/"))
  return names and "xpected " in text and ", got" in text


def outcome(read: Callable[[], Any], fair: bool | Callable[[Any], bool]) -> str:
  """What came of reading; `fair`: whether what is read, or was, may be read."""
  spent = Spent()
  try:
    found = read()
    kind = "accepted" if (fair(found) if callable(fair) else fair) else "silent"
  except (ValueError, OSError) as error:  # errors of use
    kind = "named" if named(error) else f"vague: {error!r}"
  except Exception as error:
    kind = f"traceback: {error!r:.200}"
  return kind if spent.seconds < SECONDS else f"slow: {spent.seconds:.0f} s"


def check(outcomes: dict[str, str]) -> int:
  """Refusals; at most one in twenty is vague, and all else is fair."""
  kinds = collections.Counter(
    text.partition(":")[0] for text in outcomes.values()
  )
  refused = kinds["named"] + kinds["vague"]
  wrong = {
    what: text
    for what, text in outcomes.items()
    if text not in ("accepted", "named")
  }
  assert kinds["vague"] <= 0.05 * refused and len(wrong) == kinds["vague"], (
    wrong
  )
  return refused


@contextlib.contextmanager
def bounded(path: pathlib.Path):
  """The file is as before after the block, which took less than `BYTES` of
  memory.
  """
  good = path.read_bytes()
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  try:
    yield good
  finally:
    path.unlink(missing_ok=True)  # what is begun anew is taken away
    path.write_bytes(good)
  assert (
    resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
  ) * 1024 < BYTES


@pytest.fixture(scope="module")
def table(tmp_path_factory):
  return documents.documents(tmp_path_factory.mktemp("hostile"))


@pytest.fixture
def looked_for(monkeypatch):
  """Modules that were looked for."""
  found: list[str] = []
  finder = types.SimpleNamespace(
    find_spec=lambda name, *place: found.append(name)
  )
  monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
  return found


@pytest.mark.parametrize("name", NAMES)
def test_exchanged_fields_are_refused_by_name(table, name, looked_for):
  path, read = table[name]
  read()  # what is not exchanged is read
  found = {}
  with bounded(path) as good:
    for field, value, text in exchanged(json.loads(good)):
      path.write_bytes(text.encode("utf-8", "surrogateescape"))
      rules = documents.FAIR.get(name, {}).items()
      fair = name in documents.OPEN
      fair |= any(
        holds(value) for fields, holds in rules if field in fields.split()
      )
      found[f"{field} = {value!r}"] = outcome(read, fair)
  assert PLANTED not in looked_for, "a name of a file was imported"
  assert check(found)


# Files of five gigabytes, of which a disk holds none, pipes to which nobody
# writes, and devices without an end.
HUGE = 5 * 2**30
# A model may have no vocabulary beside it.
ENDLESS = {"our vocabulary": ("pipe", "endless")}
# What a user may well give through a pipe is waited for, as by any program.
PIPED = ("rows",)
CASES = [
  (n, k)
  for n in NAMES
  for k in ("huge", "pipe", "endless")
  if k != "pipe" or n not in PIPED
]


@pytest.fixture
def no_waiting():
  """Ends what hangs."""
  signal.signal(signal.SIGALRM, signal.default_int_handler)
  signal.alarm(60)
  yield
  signal.alarm(0)
  signal.signal(signal.SIGALRM, signal.SIG_DFL)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_what_has_no_end_is_refused_by_name(table, name, kind, no_waiting):
  path, read = table[name]
  fair = kind in ENDLESS.get(name, ())
  with bounded(path):
    path.unlink()
    if kind == "pipe":
      os.mkfifo(path)
    elif kind == "endless":
      path.symlink_to("/dev/zero")
    else:
      path.touch()
      os.truncate(path, HUGE)
    assert outcome(read, fair) == ("accepted" if fair else "named")


# Weights have no digest of their own, so that a byte that turned within them
# may be read.
FLIPS = 16
BINARY = (
  *(
    "weights",
    "T5X msgpack",
    "T5X array",
    "T5X array's metadata",
    "Orbax manifest",
  ),
  *("Orbax arrays", "pieces", "packed prompts", "Parquet", "Arrow"),
)


def damaged(content: bytes) -> Iterator[tuple[str, bytes, bool]]:
  """(what was done, the bytes, whether they may be read)."""
  size = len(content)
  for keep in (0, 7, 9, size // 2, size - 9, size - 1):
    yield f"first {keep}", content[: max(keep, 0)], False
  yield "zeros", bytes(size), False
  yield "ones", b"\xff" * size, False
  yield "text", b"no such thing\n" * 99, False
  yield "page", b"<!doctype html><html>" + content, False
  for number in (1, 2**40, 2**64 - 1):  # a length, where one stands first
    yield f"length {number}", struct.pack("<Q", number) + content[8:], False
  for at in {
    *range(0, min(size, FLIPS // 2)),
    *range(0, size, max(1, size // FLIPS)),
  }:
    turned = bytearray(content)
    turned[at] ^= 0xFF
    yield f"byte {at}", bytes(turned), True


def weights(folder: pathlib.Path) -> Any:
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    made = checkpoints.load(folder)
  flat = parameters.flatten(made.params)
  return made.config, {name: array.shape for name, array in flat.items()}


@pytest.fixture(scope="module")
def binaries(
  tmp_path_factory,
) -> dict[str, tuple[pathlib.Path, Callable[[], Any]]]:
  """Name -> (the file that is damaged, what reads it)."""
  import pyarrow
  from pyarrow import ipc, parquet

  base = tmp_path_factory.mktemp("bytes")
  ours = documents.model(base / "ours")
  for name in ("legacy", "orbax"):
    zipfile.ZipFile(GOLDEN / f"t5x_{name}.zip").extractall(base / name)
  legacy, orbax = (base / name / "checkpoint_7" for name in ("legacy", "orbax"))
  array = legacy / "target.decoder.layers_0.mlp.wo.kernel"
  model = toy_vocabulary.train(base / "tiny.model")
  texts = [
    {"id": f"r{i}", "input": f"text {i}", "target": "word"} for i in range(50)
  ]
  text = "".join(json.dumps(row) + "\n" for row in texts)
  packed = base / "rows.jsonl.gz"
  rows = base / "rows.parquet"
  packed.write_bytes(gzip.compress(text.encode(), mtime=0))
  table = pyarrow.Table.from_pylist(texts)
  parquet.write_table(table, rows)
  arrow = base / "dataset" / "data.arrow"
  arrow.parent.mkdir()
  with ipc.new_stream(arrow, table.schema) as stream:
    stream.write_table(table)
  (arrow.parent / "state.json").write_text(
    '{"_data_files": [{"filename": "data.arrow"}]}'
  )
  chunk = next(
    path for path in sorted(array.iterdir()) if path.name != ".zarray"
  )
  blob = max(
    (orbax / "state" / "d").iterdir(), key=lambda path: path.stat().st_size
  )

  def of_legacy():
    return weights(legacy)

  def of_orbax():
    return weights(orbax)

  return {
    "weights": (ours / "params.safetensors", lambda: weights(ours)),
    "T5X msgpack": (legacy / "checkpoint", of_legacy),
    "T5X array": (chunk, of_legacy),
    "T5X array's metadata": (array / ".zarray", of_legacy),
    "Orbax manifest": (orbax / "state" / "manifest.ocdbt", of_orbax),
    "Orbax arrays": (blob, of_orbax),
    "pieces": (
      model,
      lambda: vocabulary.SentencePieceVocabulary(model).vocab_size,
    ),
    "packed prompts": (packed, lambda: list(prompt_files.open_prompts(packed))),
    "Parquet": (rows, lambda: list(prompt_files.open_prompts(rows))),
    "Arrow": (arrow, lambda: list(prompt_files.open_prompts(arrow.parent))),
  }


@pytest.mark.parametrize("name", BINARY)
def test_damaged_bytes_are_refused_by_name(binaries, name):
  path, read = binaries[name]
  outcomes = {}
  expected = read()
  with bounded(path) as good:
    for what, content, turned in damaged(good):
      path.write_bytes(content)
      # A list of pieces that was cut between two of them is a list of pieces.
      loose = turned or (name == "pieces" and what.startswith("first"))
      outcomes[what] = outcome(
        read, lambda found, loose=loose: loose or found == expected
      )
  assert read() == expected and check(outcomes) > 9
