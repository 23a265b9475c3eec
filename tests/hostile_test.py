"""Malformed and forged input, generated: every field of every file that is read, exchanged.

A table of documents, each with the function that reads it; a generator of exchanges. What comes
back is an error that says what was expected where, or a value; never a traceback of another
kind, never a wait. Whether an accepted value is the right one, the readers' own tests ask.
"""

import collections
import copy
import json
import pathlib
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from calm import checkpoints
from calm.calibrate import NEVER_EXIT, audit, generations
from calm.calibrate.generations import records, writer
from calm.data import datasets, vocabulary
from calm.inference import options
from calm.t5 import network, parameters
from tests.calibrate import laws

GOLDEN = pathlib.Path(__file__).parent / "golden" / "huggingface"
VALUES = (None, True, -1, 0, 1.5, 10**9, 10**30, "x", "", [], {}, [[1]], {"a": 1}, "\x1b[2J")
SECONDS, BYTES = 10.0, 2**30
_DEEP, _HUGE, _NAN = "@deep@", "@huge@", "@nan@"
_RAW = {f'"{_DEEP}"': "[" * 20_000, f'"{_HUGE}"': "1e400", f'"{_NAN}"': "NaN"}


def paths(value: Any, prefix: tuple = ()) -> Iterator[tuple]:
  """Every place of a document, the first two of a list."""
  items = value.items() if isinstance(value, dict) else ()
  for key, child in items if isinstance(value, dict) else list(enumerate(value))[:2]:
    yield (*prefix, key)
    if isinstance(child, dict | list):
      yield from paths(child, (*prefix, key))


def exchanged(document: Any) -> Iterator[tuple[str, str]]:
  """(what was done, the text of the document after it)."""
  for path in paths(document):
    for value in (*VALUES, _DEEP, _HUGE, _NAN, "@gone@"):
      changed = copy.deepcopy(document)
      holder = changed
      for key in path[:-1]:
        holder = holder[key]
      if holder[path[-1]] == value and type(holder[path[-1]]) is type(value):
        continue
      if value == "@gone@":
        del holder[path[-1]]
      else:
        holder[path[-1]] = value
      text = json.dumps(changed)
      for mark, raw in _RAW.items():
        text = text.replace(mark, raw)
      yield f"{'.'.join(map(str, path))} = {value!r}", text
  text = json.dumps(document)
  for what, raw in (
    ("empty", ""),
    ("null", "null"),
    ("list", "[]"),
    ("cut off", text[: len(text) // 2]),
    ("twice", text + text),
    ("deep", "[" * 50_000),
    ("bytes", text.replace('"', "\udcff", 1)),
  ):
    yield what, raw


def named(error: Exception) -> bool:
  """Whether an error says what was expected of what, and what there was."""
  text = str(error)
  names = any(mark in text for mark in ("`", "'", "/"))
  told = any(
    word in text.lower() for word in ("got", "missing", "must", "no field", "expected")
  )
  return names and told and len(text) > 30


# Errors of use; anything else is a traceback to the user.
TOLD = (ValueError, OSError)


class Tally(collections.Counter):
  """Outcomes by kind, and what was wrong."""

  def __init__(self):
    super().__init__()
    self.wrong: list[str] = []

  def take(self, what: str, read: Callable[[], Any]) -> None:
    start = time.monotonic()
    try:
      read()
      kind = "accepted"
    except TOLD as error:
      kind = "named" if named(error) else "vague"
      if kind == "vague":
        self.wrong.append(f"{what}: vague: {error!r}")
    except Exception as error:
      kind = "traceback"
      self.wrong.append(f"{what}: traceback: {error!r:.200}")
    if time.monotonic() - start > SECONDS:
      self.wrong.append(f"{what}: took {time.monotonic() - start:.0f} s")
      self["slow"] += 1
    self[kind] += 1


CONFIG = network.T5Config(
  vocab_size=300,
  emb_dim=8,
  num_heads=2,
  num_encoder_layers=1,
  num_decoder_layers=2,
  head_dim=4,
  mlp_dim=12,
  mlp_activations=("gelu", "linear"),
)


def model(folder: pathlib.Path) -> pathlib.Path:
  rng = np.random.default_rng(0)
  shapes = parameters.expected_shapes(CONFIG)
  flat = {p: rng.standard_normal(s).astype(np.float32) for p, s in shapes.items()}
  words = vocabulary.ByteVocabulary(extra_ids=0)
  checkpoints.save(folder, parameters.unflatten(flat), CONFIG, vocabulary=words)
  return folder


def cache(folder: pathlib.Path) -> pathlib.Path:
  made = writer.open_writer(
    folder, prompts=laws.prompts(3), thresholds=[0.5], procedure=laws.procedure()
  )
  for threshold in (NEVER_EXIT, 0.5):
    made.append(threshold, [_record(f"id-{i:03d}") for i in range(3)])
  made.finish()
  return folder


def _record(name: str) -> records.Record:
  numbers = dict(tokens=(5, 1), exit_layers=(1, 2), confidences=(0.5, 0.25))
  return records.Record(name, "text", **numbers, rejected_confidences=(0.0, 0.1), score=-1.0)


def stored(folder: pathlib.Path):
  found = options.stored_options(folder)
  return options.DecodeOptions(**found).rule


WATCH = dict(tolerance=0.2, alarm_level=0.05, sampling_rate=0.5, seed="s")


def documents(base: pathlib.Path) -> dict[str, tuple[pathlib.Path, Callable[[], Any]]]:
  """Name -> (the file that is exchanged, what reads it)."""
  ours = model(base / "ours")
  decoding = dict(max_input_length=16, max_decode_length=4, batch_size=2, measure="softmax")
  extra = dict(task_prefix="", exit_layers=[1], shortlist=[1, 2], grid=[0.5])
  (ours / "inference.json").write_text(
    json.dumps({**decoding, **extra, "schedule": {"name": "decaying", "temperature": 1.0,
    "max_length": 4}})
  )  # fmt: skip
  shutil.copytree(GOLDEN / "flan_t5", base / "sharded")
  whole = cache(base / "cache")
  row = {"id": "a", "source": "s", "input": "text", "target": ["one", "two"]}
  (base / "rows.jsonl").write_text(json.dumps(row))
  (base / "watch.jsonl").write_text(json.dumps(audit.Watch(**WATCH).to_json()) + "\n")
  line = _record("id-000").to_json()
  (base / "records.jsonl").write_text(json.dumps(line))
  read = generations.read_records
  return {
    "our configuration": (ours / "config.json", lambda: checkpoints.load(ours)),
    "our vocabulary": (ours / "vocabulary.json", lambda: checkpoints.load(ours)),
    "our options": (ours / "inference.json", lambda: stored(ours)),
    "their configuration": (
      base / "sharded" / "config.json",
      lambda: checkpoints.load(base / "sharded"),
    ),
    "their index": (
      base / "sharded" / "model.safetensors.index.json",
      lambda: checkpoints.load(base / "sharded"),
    ),
    "rows": (base / "rows.jsonl", lambda: datasets.read_examples(base / "rows.jsonl")),
    "prompts": (base / "rows.jsonl", lambda: records.read_prompts(base / "rows.jsonl")),
    "records": (base / "records.jsonl", lambda: read(base / "records.jsonl")),
    "manifest": (whole / "manifest.json", lambda: generations.load(whole)),
    "monitor": (
      base / "watch.jsonl",
      lambda: audit.open_monitor(base / "watch.jsonl", audit.Watch(**WATCH)),
    ),
  }


NAMES = (
  *("our configuration", "our vocabulary", "our options", "their configuration", "their index"),
  *("rows", "prompts", "records", "manifest", "monitor"),
)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
  return documents(tmp_path_factory.mktemp("hostile"))


@pytest.mark.parametrize("name", NAMES)
def test_exchanged_fields_are_refused_by_name(table, name):
  path, read = table[name]
  good = path.read_bytes()
  read()  # what is not exchanged is read
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  tally = Tally()
  try:
    for what, text in exchanged(json.loads(good)):
      path.write_bytes(text.encode("utf-8", "surrogateescape"))
      tally.take(f"{name}: {what}", read)
  finally:
    path.write_bytes(good)
  refused = tally["named"] + tally["vague"] + tally["traceback"]
  assert tally["traceback"] == tally["slow"] == 0, "\n".join(tally.wrong[:20])
  assert refused and tally["named"] >= 0.95 * refused, "\n".join(tally.wrong[:20])
  assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < BYTES


def test_the_check_of_messages_can_fail():
  assert not named(ValueError("bad")) and not named(KeyError("vocab_size"))
  assert named(ValueError("Expected `vocab_size` to be a whole number, got 'x'."))
  tally = Tally()
  tally.take("a", lambda: {}["b"])
  tally.take("b", lambda: int("x"))
  tally.take("c", lambda: 1)
  assert dict(tally) == {"traceback": 1, "vague": 1, "accepted": 1} and len(tally.wrong) == 2
