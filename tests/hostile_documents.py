"""Documents of every kind that is read, small and whole, and what may stand in
their fields.

`documents` writes them; `FAIR` says which exchanged values are no fault in what
we wrote ourselves: what may be left out, numbers in range. Whatever else a
reader takes is a silent acceptance.
"""

import dataclasses
import json
import pathlib
import shutil
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers

from calm import checkpoints, exits
from calm.calibrate import Calibration, Online, generations
from calm.calibrate import calibrate as certify
from calm.calibrate.generations import foreign, records
from calm.commands import calibrate, merge
from calm.data import prompt_files, vocabulary
from calm.inference import options, predictor
from calm.t5 import network
from tests import toys
from tests.calibrate import laws, small_cache

GOLDEN = pathlib.Path(__file__).parent / "golden" / "huggingface"
GONE = "@gone@"

CONFIG = network.T5Config(vocab_size=300, **toys.SMALLEST)


def model(folder: pathlib.Path) -> pathlib.Path:
  words = vocabulary.ByteVocabulary(extra_ids=0)
  checkpoints.save(
    folder, toys.params(CONFIG, seed=0), CONFIG, vocabulary=words
  )
  return folder


def stored(folder: pathlib.Path):
  found = options.stored_options(folder)
  return options.DecodeOptions(**found).rule


STORED = {
  **dict(
    max_input_length=16, max_decode_length=4, batch_size=2, measure="softmax"
  ),
  **dict(task_prefix="", exit_layers=[1], shortlist=[1, 2], grid=[0.5]),
  "schedule": {"name": "decaying", "temperature": 1.0, "max_length": 4},
}

_T5X = {
  "inputs": {
    "inputs_pretokenized": "text",
    "targets_pretokenized": "word",
    "id": "a",
  },
  "prediction": "text",
  "prediction_tokens": [5, 1],
  "aux": {"exit_layers": [1, 2], "confidences": [0.5, 0.25], "scores": -1.0},
}
_EXACT = dataclasses.asdict(exits.Speculative(1, 4, "full"))


def _tokenizer(path: pathlib.Path) -> None:
  words = {"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3, "b": 4}
  made = tokenizers.Tokenizer(models.WordLevel(words, unk_token="<unk>"))
  made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  made.add_special_tokens(["<pad>", "</s>", "<unk>"])
  made.save(str(path))


def _read_tokenizer(path: pathlib.Path):
  made = vocabulary.TokenizerVocabulary(path)
  return made.decode(made.encode("a b")), made.unk_id, made.piece(3)


def _theirs(folder: pathlib.Path):
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that decoding is greedy here
    return checkpoints.load(folder)


def _files(base: pathlib.Path) -> None:
  """One whole file of every kind."""
  (model(base / "ours") / "inference.json").write_text(
    json.dumps(STORED) + "\n"
  )
  shutil.copytree(GOLDEN / "flan_t5", base / "sharded")
  small_cache.write(base / "cache", procedure=laws.procedure())
  made = certify(np.zeros((80, 2)), [0.9, 0.5], tolerance=0.1, error_rate=0.1)
  made.save(base / "calibration.json")
  Online(base / "watch.jsonl", **small_cache.ONLINE)
  row = {"id": "a", "source": "s", "input": "text", "target": ["one", "two"]}
  shutil.copytree(GOLDEN / "codet5", base / "codet5")
  mark = {"schema_version": 1, "num_shards": 2, "shard_id": 0}
  mark |= {"num_prompts": 3, "prompts_digest": "d", "positions": [0, 2]}
  (base / "shard").mkdir()
  (base / "shard" / merge.MARK).write_text(json.dumps(mark))
  _tokenizer(base / "tokenizer.json")
  for name, value in (
    ("rows.jsonl", row),
    ("records.jsonl", small_cache.record("id-000").to_json()),
    ("references.jsonl", {"id": "a", "targets": ["x", "y"]}),
    ("t5x.jsonl", _T5X),
    ("full_depth.json", {"reason": "x", "exact": _EXACT}),
  ):
    (base / name).write_text(json.dumps(value) + "\n")


def documents(
  base: pathlib.Path,
) -> dict[str, tuple[pathlib.Path, Callable[[], Any]]]:
  """Name -> (the file that is exchanged, what reads it)."""
  _files(base)

  def at(name):
    return base / name

  ours, theirs, whole, codet5 = map(at, ("ours", "sharded", "cache", "codet5"))
  rows, lines, watch = (
    base / f"{n}.jsonl" for n in ("rows", "records", "watch")
  )
  told = base / "calibration.json"
  return {
    "our configuration": (ours / "config.json", lambda: checkpoints.load(ours)),
    "our vocabulary": (
      ours / "vocabulary.json",
      lambda: checkpoints.load(ours),
    ),
    "our options": (ours / "inference.json", lambda: stored(ours)),
    "their configuration": (
      theirs / "config.json",
      lambda: checkpoints.load(theirs),
    ),
    "their index": (
      theirs / "model.safetensors.index.json",
      lambda: checkpoints.load(theirs),
    ),
    "rows": (
      rows,
      lambda: prompt_files.open_prompts(rows, require_target=True),
    ),
    "prompts": (rows, lambda: records.read_prompts(rows)),
    "records": (lines, lambda: list(generations.read_records(lines))),
    "manifest": (whole / "manifest.json", lambda: generations.load(whole)),
    "calibration": (told, lambda: Calibration.load(told)),
    "online": (watch, lambda: Online(watch, **small_cache.ONLINE)),
    "generation options": (
      codet5 / "generation_config.json",
      lambda: _theirs(codet5),
    ),
    "tokenizer options": (
      codet5 / "tokenizer_config.json",
      lambda: _theirs(codet5),
    ),
    "tokenizer": (
      at("tokenizer.json"),
      lambda: _read_tokenizer(at("tokenizer.json")),
    ),
    "shard": (at("shard") / merge.MARK, lambda: merge.read_mark(at("shard"))),
    "references": (
      at("references.jsonl"),
      lambda: calibrate.read_texts(
        at("references.jsonl"), "targets", several=True
      ),
    ),
    "outputs of T5X": (
      at("t5x.jsonl"),
      lambda: foreign.read_predictions(at("t5x.jsonl")),
    ),
    "full depth": (
      at("full_depth.json"),
      lambda: predictor.stored_rule(at("full_depth.json")),
    ),
  }


def _of(*values: Any) -> Callable[[Any], bool]:
  """Whether a value is one of these, and of their type: True is not 1."""
  return lambda value: any(
    type(value) is type(v) and value == v for v in values
  )


_absent = _of(None, GONE)
_gone = _of(GONE)
_empty = _of(None, [], GONE)


def _number(value):
  return isinstance(value, int | float) and not isinstance(value, bool)


def _story(value):
  return value is None or isinstance(value, str)


def _anything(value):
  return True


# Texts, and what others' tools write: more there is a fair value than is not.
OPEN = (
  *(
    "their configuration",
    "their index",
    "rows",
    "prompts",
    "records",
    "generation options",
  ),
  *("tokenizer options", "tokenizer", "references", "outputs of T5X"),
)
# Document -> fields, parted by blanks -> what they may hold. Whatever is not
# here takes nothing but what it had.
FAIR: dict[str, dict[str, Callable[[Any], bool]]] = {
  "our configuration": {
    # Older files lack them. What the parameters do not tell is part of every
    # procedure.
    "dtype logits_via_embedding one_hot_embedding": _gone,
    "exit_classifier exit_probes": _gone,
    "relpos_buckets relpos_max_distance relpos_per_layer": _gone,
    "exit_translators exit_propagation exit_propagation_rank": _gone,
    "dropout_rate": _of(0, GONE),
    "float32_attention_logits": _of(True, GONE),
  },
  # Bytes have no file that a digest could be of.
  "our vocabulary": {"digest": _anything},
  "our options": {
    "max_input_length max_decode_length batch_size measure schedule": _gone,
    "task_prefix": lambda value: isinstance(value, str),
    "exit_layers shortlist grid": _empty,
    "exit_layers.0 shortlist.0 shortlist.1 grid.0": _of(0, GONE),
    "schedule.temperature": lambda value: _number(value) and value >= 0,
    "schedule.max_length": lambda value: (
      _number(value) and value >= 1 and value % 1 == 0
    ),
  },
  "manifest": {
    "sequential by_group": _of(True, GONE),
    # what they are by default
    "procedure.batch_bucket procedure.rule_version": _gone,
    "provenance": _of(None, {}, GONE),
    # A story that nothing is decided by.
    **{
      f"provenance.{name}": _story
      for name in ("metric", "references", "order", "seed")
    },
    "provenance.method": _story,
    "provenance.grid": _empty,
    "provenance.num_examples": _of(0, 10**9, 10**30, None, GONE),
    "provenance.versions": _of({}, None, GONE),
    "provenance.notes": _of({}, {"a": 1}, None, GONE),
  },
  "calibration": {},
  "online": {"empty": _anything},  # as one that was never written to
  # One shard alone; `merging` compares them with one another and with their
  # files.
  "shard": {
    "num_prompts": _of(10**9, 10**30),
    "prompts_digest checksums.a": lambda value: isinstance(value, str),
    "positions": _of([]),
    "positions.0 positions.1": _of(GONE),
    "about": lambda value: isinstance(value, dict),
    "about.x": _anything,
    "checksums": _of({}),
  },
  "full depth": {
    "reason": _anything,
    "exact": _absent,
    "exact.stop_below exact.draft_layer": _of(0),
    "exact.adapts exact.measures": lambda value: isinstance(value, bool),
  },
}
