"""What a sweep reads: any seqio task or mixture, with ids or without."""

import types

import numpy as np
import pytest

from calm import checkpoints, inference
from tests import engine
from tests.t5x import setup

models = setup.import_models()
pytestmark = setup.MARKS

LENGTHS = {"inputs": 8, "targets": 8}


def registered(name: str, **columns) -> str:
  """A task of three rows; bytes become ids by seqio's own vocabulary."""
  import seqio
  import tensorflow as tf

  rows = {"inputs": ["read: one", "read: two", "read: three"], "targets": ["a", "b", "c"]}
  source = seqio.FunctionDataSource(
    lambda split, shuffle_files, seed=None: tf.data.Dataset.from_tensor_slices(rows | columns),
    splits=["test"],
  )
  feature = seqio.Feature(seqio.ByteVocabulary(), add_eos=True)
  steps = [seqio.preprocessors.tokenize, seqio.preprocessors.append_eos_after_trim]
  features = {"inputs": feature, "targets": feature}
  if name not in seqio.TaskRegistry.names():
    seqio.TaskRegistry.add(name, source, features, steps)
  return name


def prompts(name: str, prefix: str = "read: "):
  import seqio

  from scripts import t5x_sweep

  config = types.SimpleNamespace(
    mixture_or_task_name=name,
    task_feature_lengths=LENGTHS,
    split="test",
    use_cached=False,
    seed=0,
  )
  model = setup.model(engine.toy())
  model._output_vocabulary = seqio.ByteVocabulary()
  rows = list(t5x_sweep.read(config, model))
  assert all(features["encoder_input_tokens"].shape == (8,) for _, features, _ in rows)
  return [t5x_sweep.prompt_of(model, example, name, prefix) for example, _, name in rows]


def test_examples_without_ids_are_numbered_by_line():
  found = prompts(registered("sweep_plain"))
  assert [(p.id, p.input) for p in found] == [("0", "one"), ("1", "two"), ("2", "three")]
  assert [p.targets for p in found] == [("a",), ("b",), ("c",)]


def test_ids_references_and_sources_are_kept():
  found = prompts(
    registered(
      "sweep_whole",
      id=np.array([7, 8, 9]),
      references=[["a", "A"], ["b", "B"], ["c", "C"]],
      source=["x", "", "x"],
    )
  )
  assert [p.id for p in found] == ["7", "8", "9"]
  assert found[1].targets == ("b", "B")
  assert [p.group for p in found] == ["x", None, "x"]


def test_a_mixture_is_read_task_by_task_and_named_so():
  import seqio

  members = [registered("sweep_plain"), registered("sweep_other", id=["p", "q", "r"])]
  if "sweep_mixture" not in seqio.MixtureRegistry.names():
    seqio.MixtureRegistry.add("sweep_mixture", members, default_rate=1)
  found = prompts("sweep_mixture")
  lines = [f"sweep_plain/{i}" for i in range(3)]
  # seqio sorts a mixture's tasks by name.
  assert [p.id for p in found] == [*(f"sweep_other/{i}" for i in "pqr"), *lines]
  assert [p.input for p in found] == ["one", "two", "three"] * 2


@pytest.mark.parametrize("count", [1, 2])
def test_a_batch_runs_where_a_record_is_missing(count):
  from scripts import t5x_sweep

  done = {0.5: {"a", "b", "c"}, 0.3: {"a", "b"}}
  writer = types.SimpleNamespace(completed_ids=done.__getitem__)
  found = t5x_sweep.missing_ids(writer, (0.5, 0.3), ["a", "b", "c"][: count + 1], 2)
  assert found.tolist() == [[False, False], [False, True]][:count]


@pytest.mark.parametrize(("given", "recorded"), [(None, "default"), ("highest", "highest")])
def test_the_precision_of_products_is_recorded(given, recorded, monkeypatch):
  from scripts import t5x_sweep

  toy = engine.toy()
  words = checkpoints.load(inference.PACKED).vocabulary
  monkeypatch.setattr(t5x_sweep, "our_vocabulary", lambda model: words)
  config = types.SimpleNamespace(task_feature_lengths=LENGTHS, batch_size=2)
  model = setup.model(toy, decode_fn=models.greedy_decode, matmul_precision=given)
  procedure = t5x_sweep.procedure_of(model, setup.params(toy), config, "")
  assert procedure.matmul_precision == recorded
