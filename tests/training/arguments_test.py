"""Arguments of training, checkpoints and the adapter to T5X: taken, or refused by name."""

import json
import math

import pytest

pytest.importorskip("orbax.checkpoint", reason="Orbax (the `train` extra) is not installed")
pytest.importorskip("gin")

from calm import checkpoints, training
from calm.data import training_batches, vocabulary
from calm.t5x import stored
from calm.training import distillation, objectives, run, sources
from tests import odd_arguments, toys
from tests.inference.arguments_test import fields
from tests.training import samples

_MODULE, PARAMS = samples.model_of(toys.Config(num_decoder_layers=2, vocab_size=384))
CONFIG = _MODULE.config
BYTES = vocabulary.ByteVocabulary()
ROWS = [{"id": f"{n}", "input": f"text {n} a b c d e f", "target": f"{n} b"} for n in range(4)]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
  """A text as a path is one in here."""
  monkeypatch.chdir(tmp_path)
  (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
  checkpoints.save(tmp_path / "model", PARAMS, CONFIG, vocabulary=BYTES)
  (tmp_path / "model" / "inference.json").write_text('{"shortlist": [3, 4]}')
  (tmp_path / "history.json").write_text("[]")


def of(kind, **given):
  return kind, fields(kind, **given)


SOURCE = training_batches.Supervised(
  *(training_batches.Ragged([[3, 1]] * 4) for _ in range(2)),
  (training_batches.Bucket(4, 4),),
  2,
  0,
)
PAIRS = {"path": "rows.jsonl", "vocabulary": BYTES, "buckets": [(16, 8)], "batch_size": 2}
BORDER = {
  "config": of(training.TrainConfig, num_steps=1),
  "schedule": of(training.Schedule),
  "weighted": of(objectives.LayerWeighted),
  "distilled": of(distillation.SelfDistilled),
  "maps": of(distillation.ExitMaps),
  "classifier": of(objectives.ExitClassifier),
  "probes": of(objectives.ExitProbes, shortlist=(3, 4)),
  "history": (training.read_history, {"path": "history.json"}),
  "data": of(run.Data, train=SOURCE, validation={}, num_validation_batches={}),
  "export": of(run.Export, vocabulary=BYTES),
  "pairs": (
    sources.supervised,
    {**PAIRS, "root": "", "prefix": "", "seed": 0, "every": 1, "outputs": ""},
  ),
  "frequent": (
    sources.frequent_tokens,
    {"paths": ["rows.jsonl"], "vocabulary": BYTES, "size": 3, "root": ""},
  ),
  "shortlist": (sources.stored_shortlist, {"path": "model"}),
  "vocabulary": (sources.stored_vocabulary, {"path": "model"}),
  "denoising": (
    sources.denoising,
    {
      **{"texts": [("rows.jsonl", "")], "vocabulary": BYTES, "length": 12, "batch_size": 2},
      **{"root": "", "seed": 0},
    },
  ),
  "save": (
    checkpoints.save,
    {
      **{"directory": "saved", "params": PARAMS, "config": CONFIG, "vocabulary": BYTES},
      **{"storage_dtype": "float32", "exits_trained": None},
    },
  ),
  "load": (checkpoints.load, {"path": "model", "exits": None}),
  "exits": (
    checkpoints.save_exits,
    {"file": "exits.safetensors", "leaves": {}, "base_digest": "0"},
  ),
  "copy": (checkpoints.copy_base, {"source": "model", "target": "copied"}),
  "digest": (checkpoints.parameters_digest, {"params": PARAMS}),
  "T5X config": (stored.stored_config, {"checkpoint": "model"}),
  "T5X checkpoint": (stored.stored_checkpoint, {"checkpoint": "model"}),
  "T5X path": (stored.absolute_path, {"path": "model"}),
}  # fmt: skip


@pytest.mark.parametrize("name", BORDER)
def test_every_argument_is_taken_or_refused_by_name(name, folder):
  call, given = BORDER[name]
  call(**given)
  assert list(odd_arguments.unclear(call, given)) == []


def test_terms_of_no_weight_are_refused():
  for made in (
    lambda: objectives.LayerWeighted(z_loss=math.nan),
    lambda: objectives.LayerWeighted(sampled_layers=0),
    lambda: distillation.SelfDistilled(share=-1.0),
  ):
    with pytest.raises(ValueError, match=r"Expected `(z_loss|sampled_layers|share)`"):
      made()


def test_a_text_is_a_path_and_a_list_a_tuple():
  assert training.read_history("history.json") == []
  probes = objectives.ExitProbes(shortlist=(token for token in (3, 4)))
  assert probes.shortlist == (3, 4) and hash(probes)
