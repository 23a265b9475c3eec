"""What a sweep reads, and what evaluation reports: any seqio task or
mixture.
"""

import types
from typing import Any

import jax
import numpy as np
import pytest

from calm import checkpoints, inference
from calm.t5x import loops
from tests import engine
from tests.t5x import setup

models = setup.import_models()
pytestmark = setup.MARKS

LENGTHS = {"inputs": 8, "targets": 8}


def registered(name: str, metric_fns=(), **columns) -> str:
  """A task of three rows; bytes become ids by seqio's own vocabulary."""
  import seqio
  import tensorflow as tf

  rows = {
    "inputs": ["read: one", "read: two", "read: three"],
    "targets": ["a", "b", "c"],
  }
  source = seqio.FunctionDataSource(
    lambda split, shuffle_files, seed=None: tf.data.Dataset.from_tensor_slices(
      rows | columns
    ),
    splits=["test"],
  )
  feature = seqio.Feature(seqio.ByteVocabulary(), add_eos=True)
  steps = [
    seqio.preprocessors.tokenize,
    seqio.preprocessors.append_eos_after_trim,
  ]
  features = {"inputs": feature, "targets": feature}
  if name not in seqio.TaskRegistry.names():
    seqio.TaskRegistry.add(name, source, features, steps, metric_fns=metric_fns)
  return name


def with_words(words: Any, **arguments: Any) -> Any:
  model = setup.model(engine.toy(), **arguments)
  model._output_vocabulary = words
  return model


def prompts(name: str):
  import seqio

  from scripts import t5x_sweep

  known = dict(
    split="test", use_cached=False, seed=0, task_feature_lengths=LENGTHS
  )
  config = types.SimpleNamespace(mixture_or_task_name=name, **known)
  model = with_words(seqio.ByteVocabulary())
  rows = list(t5x_sweep.read(config, model))
  assert all(
    features["encoder_input_tokens"].shape == (8,) for _, features, _ in rows
  )
  return [
    t5x_sweep.prompt_of(model, example, name, "read: ")
    for example, _, name in rows
  ]


def test_examples_are_numbered_by_line_and_those_of_a_mixture_named_by_task():
  import seqio

  found = prompts(registered("sweep_plain"))
  assert [(p.id, p.input) for p in found] == [
    ("0", "one"),
    ("1", "two"),
    ("2", "three"),
  ]
  assert [p.targets for p in found] == [("a",), ("b",), ("c",)]
  members = ["sweep_plain", registered("sweep_other", id=["p", "q", "r"])]
  if "sweep_mixture" not in seqio.MixtureRegistry.names():
    seqio.MixtureRegistry.add("sweep_mixture", members, default_rate=1)
  found = prompts("sweep_mixture")
  lines = [f"sweep_plain/{i}" for i in range(3)]
  # seqio sorts a mixture's tasks by name.
  assert [p.id for p in found] == [*(f"sweep_other/{i}" for i in "pqr"), *lines]
  assert [p.input for p in found] == ["one", "two", "three"] * 2


def test_ids_references_and_sources_are_kept():
  columns = {
    "references": [["a", "A"], ["b", "B"], ["c", "C"]],
    "source": ["x", "", "x"],
  }
  found = prompts(registered("sweep_whole", id=np.array([7, 8, 9]), **columns))
  assert [p.id for p in found] == ["7", "8", "9"] and found[1].targets == (
    "b",
    "B",
  )
  assert [p.group for p in found] == ["x", None, "x"]


def procedure(batch_size: int, mesh=None, dtype: str = "float32", **arguments):
  """What is recorded of a toy's outputs."""
  from scripts import t5x_sweep

  toy = engine.toy(dtype=dtype)
  config = types.SimpleNamespace(
    task_feature_lengths=LENGTHS, batch_size=batch_size
  )
  partitioner = types.SimpleNamespace(
    mesh=mesh or jax.sharding.AbstractMesh((), ())
  )
  model = setup.model(toy, decode_fn=models.greedy_decode, **arguments)
  words = checkpoints.load(inference.PACKED).vocabulary
  return t5x_sweep.procedure_of(
    model, setup.params(toy), config, partitioner, words, ""
  )


@pytest.mark.parametrize(
  ("batch_size", "most_bytes", "rows"),
  [(16, 2**33, 2), (12, 2**33, 3), (16, 0, 16)],
)
def test_rows_of_a_device_and_precision_are_recorded(
  monkeypatch, batch_size, most_bytes, rows
):
  """Of 4x2 devices: `calm infer` has one, and decodes as many together."""
  monkeypatch.setattr(loops, "APART_BYTES", most_bytes)
  mesh = jax.sharding.AbstractMesh((4, 2), ("data", "model"))
  found = procedure(batch_size, mesh, "bfloat16", matmul_precision="highest")
  assert found.batch_bucket == rows and found.matmul_precision == "highest"
  assert inference.options_of(found).batch_size == rows
  found = procedure(batch_size, mesh)
  assert found.batch_bucket is None and found.matmul_precision == "default"


def test_words_that_calm_would_read_otherwise_are_refused_before_all_work(
  monkeypatch,
):
  import seqio

  from scripts import t5x_sweep

  path = str(inference.PACKED / "vocabulary.model")
  words = seqio.SentencePieceVocabulary(
    path, extra_ids=4, reverse_extra_ids=False
  )
  monkeypatch.setattr(
    t5x_sweep, "load", lambda *_: pytest.fail("a checkpoint was read")
  )
  config: Any = None
  with pytest.raises(ValueError, match="to use its model file as it is"):
    t5x_sweep.sweep(with_words(words), config, config, config, "nowhere")


def test_evaluation_reports_exits_beside_a_tasks_own_metrics_and_decodes_once():
  import seqio

  calls = []

  def predict(dataset):
    calls.append(dataset)
    rows = [
      (index, np.array([97, 1])) for index, _ in dataset.as_numpy_iterator()
    ]
    layers = [[1, 3], [3, 0], [2, 2]]
    return rows, {"exit_layers": layers, "relative_cost": [0.5, 1.0, 0.25]}

  def own(targets, predictions):
    return {"own": float(len(predictions))}

  names = [registered(f"evaluated_{i}", metric_fns=[own]) for i in range(2)]
  if "evaluated" not in seqio.MixtureRegistry.names():
    seqio.MixtureRegistry.add("evaluated", names, default_rate=1)
  evaluator = models.Evaluator(
    "evaluated",
    seqio.EncDecFeatureConverter(pack=False),
    "test",
    sequence_length=LENGTHS,
  )
  future, _ = evaluator.evaluate(
    compute_metrics=True, predict_with_aux_fn=predict
  )
  expected = {
    "exits/mean_layer": 11 / 5,
    "exits/speedup": 5 / (1.0 + 1.0 + 0.5),
  }
  for layer, share in ((1, 0.2), (2, 0.4), (3, 0.4)):
    expected[f"exits/share_layer_{layer}"] = share
  for name in names:
    found = future.result()[name]
    assert found.pop("own") == 3.0 and found == pytest.approx(expected)
  assert len(calls) == 2
  assert models.exit_metrics([], [], {"scores": [1.0]}) == {}, (
    "a model without exits"
  )
