"""T5X's `InteractiveModel` over the model in the box, as a notebook uses it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import core as flax_core

from calm import checkpoints, exits, inference
from calm.exits import confidence
from calm.t5 import network
from calm.t5x import stored
from tests.t5x import setup

models = setup.import_models()
pytestmark = setup.MARKS
collect_orphans = setup.collect_orphans
random_generator = setup.random_generator

LENGTHS = {"inputs": 96, "targets": 24}
THRESHOLD = 0.8


@pytest.fixture
def interactive(tmp_path):
  from t5x import adafactor, interactive_model, partitioning, utils
  from t5x import checkpoints as t5x_checkpoints

  box, words = checkpoints.load(inference.PACKED), stored.stored_vocabulary()
  model = models.EncoderDecoderModel(
    network.Transformer(box.config), words, words, adafactor.Adafactor(learning_rate=1e-3),
    models.greedy_decode, threshold=THRESHOLD,
    rule=exits.DynamicExits(confidence.Softmax(), allowed=(2, 4)),
  )  # fmt: skip
  sides = {"encoder_input": "inputs", "decoder_input": "targets", "decoder_target": "targets"}
  shapes = {f"{name}_tokens": (2, LENGTHS[side]) for name, side in sides.items()}
  partitioner = partitioning.PjitPartitioner(num_partitions=1)
  initializer = utils.TrainStateInitializer(
    model.optimizer_def, model.get_initial_variables, shapes, partitioner
  )
  state = initializer.from_scratch(jax.random.PRNGKey(0))
  state = state.replace_params(flax_core.freeze(jax.tree.map(jnp.asarray, dict(box.params))))
  folder, whole = str(tmp_path / "box"), initializer.global_train_state_shape
  t5x_checkpoints.Checkpointer(whole, partitioner, folder).save(state)
  return interactive_model.InteractiveModel(
    batch_size=2,
    task_feature_lengths=LENGTHS,
    output_dir=str(tmp_path / "run"),
    partitioner=partitioner,
    model=model,
    dtype="float32",
    restore_mode="specific",
    checkpoint_path=f"{folder}/checkpoint_0",
    input_shapes=shapes,
    input_types={name: np.int32 for name in shapes},
  )


def test_an_interactive_model_exits_as_calm_infer_does(interactive):
  lines = (inference.PACKED / "prompts_unseen.jsonl").read_text("utf-8").splitlines()
  texts = [json.loads(line)["input"] for line in lines[:3]]
  prefix = "summarize: "
  options = dict(max_input_length=LENGTHS["inputs"], max_decode_length=LENGTHS["targets"])
  ours = inference.load("packed", measure="softmax", exit_layers=(2, 4), **options)
  expected = ours.generate(texts, threshold=THRESHOLD)
  pairs, aux = interactive.predict_with_aux([prefix + text for text in texts])
  assert [text.decode("utf-8") for _, text in pairs] == [one.text for one in expected]
  layers = [[k for k in row if k > 0] for row in np.asarray(aux["exit_layers"]).tolist()]
  assert layers == [list(one.exit_layers) for one in expected]
  assert len({k for row in layers for k in row}) > 1, "meta: tokens of unlike depths"
  assert jax.config.jax_default_prng_impl == "unsafe_rbg", "meta: T5X's generator"
