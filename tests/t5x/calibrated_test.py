"""A calibration in T5X: its threshold is served, and what it was not made for
is refused.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calm import calibrate, checkpoints, exits, inference
from calm.exits import confidence, schedules
from calm.t5 import network
from tests.t5x import setup

models = setup.import_models()
pytestmark = setup.ORBAX

from calm.t5x import stored

PREFIX = "summarize: "
RULE = exits.DynamicExits(confidence.Softmax(), allowed=(2, 4))
BATCH = {
  "encoder_input_tokens": np.ones((2, 96), np.int32),
  "decoder_input_tokens": np.zeros((2, 24), np.int32),
}


@pytest.fixture(scope="module")
def box():
  return checkpoints.load(inference.PACKED)


@pytest.fixture(scope="module")
def files(box, tmp_path_factory):
  """The model in the box as a T5X checkpoint, another one, and a calibration of
  the first.
  """
  folder = tmp_path_factory.mktemp("calibrated")
  embedder = jax.tree.map(lambda x: x + 1, box.params["token_embedder"])
  params = {
    "checkpoint": box.params,
    "other": {**box.params, "token_embedder": embedder},
  }

  def save(name):
    return models.save_t5x_checkpoint(
      params[name], box.config, str(folder / name)
    )

  options = {
    "max_input_length": 96,
    "max_decode_length": 24,
    "task_prefix": PREFIX,
  }
  model = inference.load(
    "packed", measure="softmax", exit_layers=(2, 4), **options
  )
  losses = np.random.default_rng(0).random((200, 2)) * [0.1, 1.0]
  made = calibrate.calibrate(losses, [0.9, 0.5], tolerance=0.2, error_rate=0.05)
  made = dataclasses.replace(
    made,
    procedure=model.procedure,
    kind="textual",
    metric="rouge_l",
    clusters=False,
  )
  made.save(folder / "calibration.json")
  dataclasses.replace(made, procedure=None).save(folder / "elsewhere.json")
  written = {
    name: str(folder / f"{name}.json") for name in ("calibration", "elsewhere")
  }
  return written | {name: save(name) for name in params}


def model_of(
  box,
  files,
  path="calibration",
  checkpoint="checkpoint",
  prefix=PREFIX,
  **changes,
):
  words = stored.stored_vocabulary()
  calibrated = stored.Calibrated(files[path], files[checkpoint], prefix)
  arguments = {"rule": RULE, "decode_fn": models.greedy_decode, **changes}
  module = network.Transformer(box.config)
  optimizer = object()
  return models.EncoderDecoderModel(
    module, words, words, optimizer, calibration=calibrated, **arguments
  )


def test_its_threshold_is_served_and_batches_of_other_kinds_are_refused(
  box, files
):
  model = model_of(box, files)
  assert model.threshold == 0.9 == model.calibration.threshold

  def shapes(dtype):
    return jax.eval_shape(
      lambda: jax.tree.map(lambda x: jnp.asarray(x, dtype), box.params)
    )

  def predict(batch, dtype=jnp.float32, **given):
    return jax.eval_shape(
      lambda params: model.predict_batch_with_aux(
        params, jax.tree.map(jnp.asarray, batch), **given
      ),
      shapes(dtype),
    )

  assert predict(BATCH)[1]["threshold"].shape == (2,)
  short = {
    **BATCH,
    "encoder_input_tokens": BATCH["encoder_input_tokens"][:, :64],
  }
  with pytest.raises(
    ValueError, match=r"of \(96, 24, None\), .* got \(64, 24, None\)"
  ):
    predict(short)
  with pytest.raises(
    ValueError, match=r"Config\.dtype float32, .* and bfloat16"
  ):
    predict(BATCH, jnp.bfloat16)
  # a threshold of one's own promises nothing
  predict(short, decoder_params={"threshold": 0.5})


@pytest.mark.parametrize(
  ("named", "changes"),
  [
    (
      "`measure`",
      {"rule": dataclasses.replace(RULE, measure=confidence.State())},
    ),
    (
      "`schedule`",
      {"rule": dataclasses.replace(RULE, schedule=schedules.Decaying(4.0, 24))},
    ),
    ("`task_prefix`", {"prefix": ""}),
    ("`parameters_digest`", {"checkpoint": "other"}),
    ("got both", {"threshold": 0.5}),
    ("outputs from elsewhere", {"path": "elsewhere"}),
    ("`rule` exits.DynamicExits", {"rule": exits.OracleExit()}),
  ],
)
def test_what_it_was_not_made_for_is_named(box, files, named, changes):
  with pytest.raises(ValueError, match=named):
    model_of(box, files, **changes)
