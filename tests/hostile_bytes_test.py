"""Damaged files of bytes: weights of three formats, vocabularies, packed texts.

A generator cuts them off, fills them with something else and turns single bytes over. What
comes back is an error that names the file, or what the whole file gave; weights have no digest
of their own, so that a byte that turned within them may be read as another weight.
"""

import gzip
import json
import pathlib
import resource
import shutil
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("tensorstore", reason="T5X checkpoints need tensorstore (`train`)")
pytest.importorskip("pyarrow", reason="Parquet needs pyarrow (`test`)")

from calm import checkpoints
from calm.data import datasets, prompt_files, vocabulary
from calm.t5 import parameters
from tests import hostile_documents as documents
from tests import hostile_test, toy_vocabulary

GOLDEN = pathlib.Path(__file__).parent / "golden"
FLIPS = 64


def damaged(content: bytes) -> Iterator[tuple[str, bytes, bool]]:
  """(what was done, the bytes, whether they may be read)."""
  size = len(content)
  for keep in (0, 1, 7, 8, 9, size // 4, size // 2, size - 9, size - 1):
    yield f"first {keep}", content[: max(keep, 0)], False
  yield "zeros", bytes(size), False
  yield "ones", b"\xff" * size, False
  yield "text", b"no such thing\n" * 99, False
  yield "page", b"<!doctype html><html>" + content, False
  for number in (0, 1, 2**31, 2**40, 2**63 - 1, 2**64 - 1):  # a length, where one stands first
    yield f"length {number}", struct.pack("<Q", number) + content[8:], False
  for at in {*range(0, min(size, FLIPS // 2)), *range(0, size, max(1, size // FLIPS))}:
    turned = bytearray(content)
    turned[at] ^= 0xFF
    yield f"byte {at}", bytes(turned), True


def weights(folder: pathlib.Path) -> Any:
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    made = checkpoints.load(folder)
  flat = parameters.flatten(made.params)
  return made.config, {name: array.shape for name, array in flat.items()}


def _texts(base: pathlib.Path) -> None:
  import pyarrow
  from pyarrow import parquet

  rows = [{"id": f"r{i}", "input": f"text {i}", "target": "word"} for i in range(50)]
  text = "".join(json.dumps(row) + "\n" for row in rows)
  (base / "rows.jsonl.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
  parquet.write_table(pyarrow.Table.from_pylist(rows), base / "rows.parquet")


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> dict[str, tuple[pathlib.Path, Callable[[], Any]]]:
  """Name -> (the file that is damaged, what reads it)."""
  base = tmp_path_factory.mktemp("bytes")
  ours = documents.model(base / "ours")
  theirs = shutil.copytree(GOLDEN / "huggingface" / "t5_1_1", base / "theirs")
  for name in ("legacy", "orbax"):
    zipfile.ZipFile(GOLDEN / f"t5x_{name}.zip").extractall(base / name)
  legacy, orbax = (base / name / "checkpoint_7" for name in ("legacy", "orbax"))
  array = legacy / "target.decoder.layers_0.mlp.wo.kernel"
  model = toy_vocabulary.train(base / "tiny.model")
  _texts(base)
  packed, rows = base / "rows.jsonl.gz", base / "rows.parquet"
  chunk = next(path for path in sorted(array.iterdir()) if path.name != ".zarray")
  blob = max((orbax / "state" / "d").iterdir(), key=lambda path: path.stat().st_size)
  return {
    "our weights": (ours / "params.safetensors", lambda: weights(ours)),
    "their weights": (theirs / "model.safetensors", lambda: weights(theirs)),
    "T5X msgpack": (legacy / "checkpoint", lambda: weights(legacy)),
    "T5X array": (chunk, lambda: weights(legacy)),
    "T5X array's metadata": (array / ".zarray", lambda: weights(legacy)),
    "Orbax manifest": (orbax / "state" / "manifest.ocdbt", lambda: weights(orbax)),
    "Orbax arrays": (blob, lambda: weights(orbax)),
    "pieces": (model, lambda: vocabulary.SentencePieceVocabulary(model).vocab_size),
    "packed rows": (packed, lambda: datasets.read_examples(packed)),
    "packed prompts": (packed, lambda: list(prompt_files.open_prompts(packed))),
    "Parquet": (rows, lambda: list(prompt_files.open_prompts(rows))),
  }


NAMES = (
  *("our weights", "their weights", "T5X msgpack", "T5X array", "T5X array's metadata"),
  *("Orbax manifest", "Orbax arrays"),
  *("pieces", "packed rows", "packed prompts", "Parquet"),
)


@pytest.mark.parametrize("name", NAMES)
def test_damaged_bytes_are_refused_by_name(table, name):
  path, read = table[name]
  good, expected = path.read_bytes(), read()
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  tally = hostile_test.Tally()

  try:
    for what, content, turned in damaged(good):
      path.write_bytes(content)
      # A list of pieces that was cut between two of them is a list of pieces.
      loose = turned or (name == "pieces" and what.startswith("first"))
      same = lambda found, loose=loose: loose or found == expected
      tally.take(f"{name}: {what}", read, same)
  finally:
    path.write_bytes(good)
  assert read() == expected
  wrong = tally["traceback"], tally["slow"], tally["silent"]
  assert wrong == (0, 0, 0), "\n".join(tally.wrong[:20])
  refused = tally["named"] + tally["vague"]
  assert tally["named"] >= 0.95 * refused > 9, "\n".join(tally.wrong[:20])
  assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 2**30
