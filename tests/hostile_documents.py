"""Documents of every kind that is read, small and whole, and what may stand in their fields.

`documents` writes them; `fair` says which exchanged values are no fault: texts where any text
will do, what may be left out, numbers in range. Whatever else a reader takes is a silent
acceptance.
"""

import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np

from calm import checkpoints
from calm.calibrate import Calibration, Online, calibrate, generations
from calm.calibrate.generations import records
from calm.data import datasets, vocabulary
from calm.inference import options
from calm.t5 import network
from tests import toys
from tests.calibrate import small_cache

GOLDEN = pathlib.Path(__file__).parent / "golden" / "huggingface"
GONE = "@gone@"

CONFIG = network.T5Config(vocab_size=300, **toys.SMALLEST)


def model(folder: pathlib.Path) -> pathlib.Path:
  words = vocabulary.ByteVocabulary(extra_ids=0)
  checkpoints.save(folder, toys.params(CONFIG, seed=0), CONFIG, vocabulary=words)
  return folder


def stored(folder: pathlib.Path):
  found = options.stored_options(folder)
  return options.DecodeOptions(**found).rule


STORED = {
  **dict(max_input_length=16, max_decode_length=4, batch_size=2, measure="softmax"),
  **dict(task_prefix="", exit_layers=[1], shortlist=[1, 2], grid=[0.5]),
  "schedule": {"name": "decaying", "temperature": 1.0, "max_length": 4},
}


def _files(base: pathlib.Path) -> None:
  """One whole file of every kind."""
  ours = model(base / "ours")
  shutil.copytree(GOLDEN / "flan_t5", base / "sharded")
  small_cache.write(base / "cache")
  made = calibrate(np.zeros((80, 2)), [0.9, 0.5], tolerance=0.1, error_rate=0.1)
  made.save(base / "calibration.json")
  row = {"id": "a", "source": "s", "input": "text", "target": ["one", "two"]}
  for path, value in (
    (ours / "inference.json", STORED),
    (base / "rows.jsonl", row),
    (base / "watch.jsonl", Online(None, **small_cache.ONLINE)._settings()),
    (base / "records.jsonl", small_cache.record("id-000").to_json()),
  ):
    path.write_text(json.dumps(value) + "\n")


def documents(base: pathlib.Path) -> dict[str, tuple[pathlib.Path, Callable[[], Any]]]:
  """Name -> (the file that is exchanged, what reads it)."""
  _files(base)
  ours, theirs, whole = base / "ours", base / "sharded", base / "cache"
  rows, lines, watch = (base / f"{n}.jsonl" for n in ("rows", "records", "watch"))
  told = base / "calibration.json"
  return {
    "our configuration": (ours / "config.json", lambda: checkpoints.load(ours)),
    "our vocabulary": (ours / "vocabulary.json", lambda: checkpoints.load(ours)),
    "our options": (ours / "inference.json", lambda: stored(ours)),
    "their configuration": (theirs / "config.json", lambda: checkpoints.load(theirs)),
    "their index": (
      theirs / "model.safetensors.index.json",
      lambda: checkpoints.load(theirs),
    ),
    "rows": (rows, lambda: datasets.read_examples(rows)),
    "prompts": (rows, lambda: records.read_prompts(rows)),
    "records": (lines, lambda: list(generations.read_records(lines))),
    "manifest": (whole / "manifest.json", lambda: generations.load(whole)),
    "calibration": (told, lambda: Calibration.load(told)),
    "online": (watch, lambda: Online(watch, **small_cache.ONLINE)),
  }


def _of(*values: Any) -> Callable[[Any], bool]:
  """Whether a value is one of these, and of their type: True is not 1."""
  return lambda value: any(type(value) is type(v) and value == v for v in values)


_absent = _of(None, GONE)
_gone = _of(GONE)
_flag = _of(True, False, None, GONE)
_empty = _of(None, [], GONE)
_number = lambda value: isinstance(value, int | float) and not isinstance(value, bool)
_story = lambda value: value is None or isinstance(value, str)
_text = lambda value: isinstance(value, str) and value != GONE
_anything = lambda value: True
# Document -> fields, parted by blanks -> what they may hold. Whatever is not here takes nothing
# but what it had.
FAIR: dict[str, dict[str, Callable[[Any], bool]]] = {
  "our configuration": {
    # Older files lack them. What the parameters do not tell is part of every procedure.
    "dtype logits_via_embedding one_hot_embedding": _gone,
    "exit_classifier exit_probes relpos_buckets relpos_max_distance relpos_per_layer": _gone,
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
    "schedule.max_length": lambda value: _number(value) and value >= 1 and value % 1 == 0,
  },
  "their configuration": {
    "num_decoder_layers decoder_start_token_id pad_token_id": _absent,
    "layer_norm_epsilon relative_attention_num_buckets": _gone,
    "tie_word_embeddings": _flag,
    "is_encoder_decoder": _absent,
    "architectures": _empty,
    "architectures.0": lambda value: isinstance(value, str),
    # generation_config.json, beside it, is what says where texts end.
    "eos_token_id": _anything,
  },
  "their index": {"metadata metadata.total_size": _anything},
  "rows": {
    # Whole numbers name rows and sources too, as in prompt files.
    "id source": lambda value: _story(value) or type(value) is int,
    "input target": _text,
    "target.0 target.1": lambda value: isinstance(value, str),
  },
  "prompts": {
    "id input": _text,
    "source": lambda value: _story(value) or type(value) is int,
    "target": lambda value: _text(value) or _empty(value),
    "target.0 target.1": lambda value: isinstance(value, str),
  },
  "records": {
    "id prediction": _text,
    "tokens exit_layers confidences rejected_confidences": _absent,
    "tokens.0 tokens.1": _of(0, 10**9),
    "exit_layers.0 exit_layers.1": _of(0),
    "confidences.0 confidences.1 rejected_confidences.0 rejected_confidences.1": _of(0),
    "score": lambda value: _absent(value) or _number(value),
    # A run that has just begun has no records.
    "empty": _anything,
  },
  "manifest": {
    "sequential by_group": _of(True, GONE),
    "provenance": _of(None, {}, GONE),
    # A story that nothing is decided by.
    **{f"provenance.{name}": _story for name in ("metric", "references", "order", "seed")},
    "provenance.method": _story,
    "provenance.grid": _empty,
    "provenance.num_examples": _of(0, 10**9, 10**30, None, GONE),
    "provenance.versions": _of({}, None, GONE),
    "provenance.notes": _of({}, {"a": 1}, None, GONE),
  },
  "calibration": {},
  "online": {"empty": _anything},  # as one that was never written to
}
