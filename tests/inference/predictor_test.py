"""Prompts in, outputs out: a tiny checkpoint of bytes, its procedure and its
promise.
"""

import dataclasses
import json
import shutil
import time

import numpy as np
import pytest

from calm import calibrate, checkpoints, exits, inference
from calm.data import vocabulary
from calm.decode import compiled
from calm.decode import program as program_lib
from calm.exits import schedules
from calm.inference import options as options_lib
from calm.t5 import network, parameters
from tests import toys

SIZES = toys.Config(
  vocab_size=264, num_pieces=259, num_encoder_layers=1, num_decoder_layers=3
)
OPTIONS = {"max_input_length": 64, "max_decode_length": 6, "batch_size": 4}
NEVER = schedules.NEVER_EXIT
# Two padded lengths, so that batches are not in the order of the prompts.
TEXTS = ["a", "b" * 40, "", "some words", "c" * 50, "é & <b>"]


def save(directory, seed=1, with_vocabulary=True):
  config = network.T5Config(**toys.network_fields(SIZES))
  checkpoints.save(
    directory,
    toys.params(SIZES, seed),
    config,
    vocabulary=vocabulary.ByteVocabulary(extra_ids=0)
    if with_vocabulary
    else None,
  )
  return directory


@pytest.fixture(scope="module")
def calibration(model):
  grid = [0.9, 0.6, 0.3]
  made = calibrate.calibrate(
    np.zeros((200, 3)), grid, tolerance=0.1, error_rate=0.05
  )
  assert made.threshold == 0.3
  return dataclasses.replace(made, procedure=model.procedure)


@pytest.fixture(scope="module")
def generated(model):
  return model.generate(TEXTS, threshold=0.6)


def rows(outputs):
  return [(output.tokens, output.exit_layers) for output in outputs]


def test_outputs_come_in_the_order_of_the_prompts(model, generated):
  told = []

  def tell(*counts):
    return told.append(counts)

  pairs = model.with_options(batch_size=2)
  backwards = pairs.generate(TEXTS[::-1], threshold=0.6, progress=tell)
  assert (
    rows(backwards)[::-1] == rows(generated) and len(set(rows(generated))) > 3
  )
  assert told == [(0, 6), (2, 6), (4, 6), (6, 6)]
  assert model.generate([], threshold=0.6).texts == []
  for output in generated:
    count = len(output.tokens)
    assert (
      count == len(output.pieces) == len(output.confidences) <= 6
      and output.score < 0
    )
    assert count == 6 or output.tokens[-1] == 1
    assert output.text == model.vocabulary.decode(output.tokens)


MAPS = dict(
  exit_translators=(1, 2), exit_propagation=(1, 2), exit_propagation_rank=4
)


def test_maps_beside_a_model_change_no_full_text_and_are_recorded(
  directory, model, tmp_path
):
  sizes = dataclasses.replace(SIZES, **MAPS)
  config = network.T5Config(**toys.network_fields(sizes))
  checkpoints.save(
    tmp_path,
    toys.params(sizes, 1),
    config,
    vocabulary=model.vocabulary,
    exits_trained=False,
  )
  # Of translated exits nobody is warned that they were never trained.
  mapped = inference.load(
    tmp_path, measure="classifier", propagation="learned", **OPTIONS
  )
  full = model.generate(TEXTS, threshold=NEVER)
  for given in (
    {"threshold": NEVER},
    {"rule": exits.Speculative(1, draft_head="full")},
  ):
    assert mapped.generate(TEXTS, **given).texts == full.texts
  early = mapped.generate(TEXTS, threshold=0.5)
  assert 1 < early.mean_layers < 3
  other = mapped.with_options(propagation="exit_state").generate(
    TEXTS, threshold=0.5
  )
  assert [output.score for output in early] != [
    output.score for output in other
  ]
  assert mapped.procedure.base_digest == parameters.base_digest(model.params)
  assert mapped.procedure.base_digest != mapped.parameters_digest
  assert "base_digest" not in model.procedure.to_json()
  with pytest.raises(
    ValueError, match=r"learned propagation.*\[1, 2\], got.*none; fit it"
  ):
    inference.load(directory, propagation="learned")


def test_never_exit_is_full_depth(model, generated):
  never = model.generate(TEXTS, threshold=NEVER)
  full = model.generate(TEXTS, rule=exits.StaticExit())
  assert rows(never) == rows(full)
  assert never.mean_layers == full.mean_layers == 3 > generated.mean_layers > 1
  assert never.threshold == NEVER and full.threshold is None
  # The very same program, which measures nothing; on the exit path the layers
  # are asked.
  assert full.timing.compilations == 0
  assert not any(any(output.rejected_confidences) for output in never)
  assert any(
    any(o.rejected_confidences) for o in model.generate(TEXTS, threshold=1.0)
  )
  assert model.generate(TEXTS, threshold=0.0).mean_layers == 1


def test_seconds_leave_compiling_out(model):
  first = model.with_options(max_decode_length=5)
  start = time.perf_counter()
  timing = first.generate(TEXTS, threshold=0.7).timing
  assert timing.compilations and timing.compile_seconds > timing.seconds > 0
  assert timing.seconds + timing.compile_seconds <= time.perf_counter() - start
  again = first.generate(TEXTS, threshold=0.6).timing
  assert again.compilations == again.compile_seconds == 0
  assert again.encode_seconds > 0 and again.decode_seconds > 0
  assert (timing + again).seconds == pytest.approx(
    timing.seconds + again.seconds
  )


CHANGES = (
  ("measure", "state"),
  ("schedule", schedules.Decaying(4.0, 6)),
  ("exit_layers", (2,)),
  ("propagation", "first_state"),
  ("task_prefix", "x"),
  ("max_input_length", 9),
  ("max_decode_length", 9),
  ("matmul_precision", "highest"),
  ("weights_dtype", "bfloat16"),
  ("weights_dtype", "int8"),
  ("head_dtype", "int8"),
  ("reference_dtype", "float32"),
  ("reference_digest", "d" * 64),
  ("encoder_dtype", "int8"),
)
SINCE = (
  "weights_dtype",
  "head_dtype",
  "reference_dtype",
  "reference_digest",
  "encoder_dtype",
)


def test_every_option_but_the_batch_size_belongs_to_the_procedure(
  model, tmp_path
):
  fields = {field.name for field in dataclasses.fields(inference.DecodeOptions)}
  assert fields == {
    *(name for name, _ in CHANGES),
    *("batch_size", "num_devices", "shortlist", "grid", "num_drafts"),
  }
  for name, value in CHANGES:
    other = model.with_options(**{name: value})
    # Below float32 a text depends on the rows that it is decoded with.
    rounds = value == "int8" and name != "head_dtype"
    beside = {"batch_bucket"} if rounds else set()
    assert set(model.procedure.differences(other.procedure)) == {name} | beside
    back = inference.options_of(other.procedure)
    assert getattr(back, name) == value and (not rounds or back.batch_size == 4)
    (tmp_path / "inference.json").write_text(
      json.dumps(options_lib.to_stored(other.options))
    )
    assert options_lib.stored_options(tmp_path)[name] == value
    assert sizes(other) == ({4} if rounds else {4, 1})
    stored = calibrate.Procedure(
      **json.loads(json.dumps(other.procedure.to_json()))
    )
    same = dataclasses.replace(model, options=inference.options_of(stored))
    assert same.procedure == other.procedure
  narrow = model.changed(
    config=dataclasses.replace(model.config, dtype="bfloat16")
  )
  assert narrow.procedure.activation_dtype == "bfloat16" and sizes(narrow) == {
    4
  }
  assert (
    inference.options_of(narrow.procedure).batch_size
    == narrow.procedure.batch_bucket
    == 4
  )
  assert model.with_options(batch_size=1).procedure == model.procedure
  # digests of earlier files stay
  assert not {*SINCE} & {*model.procedure.to_json()}


def sizes(model):
  """Rows of the batches of five prompts; a batch that affects outputs is always
  whole.
  """
  return {len(batch.active) for batch in model.plan(["short"] * 5)}


def test_a_calibrated_model_serves_its_threshold_and_its_promise(
  model, directory, calibration, tmp_path
):
  calibration.save(tmp_path / "calibration.json")
  served = inference.load(directory, calibration=tmp_path / "calibration.json")
  assert served.procedure == model.procedure
  served = dataclasses.replace(served, options=model.options)
  got = served.generate(TEXTS)
  assert got.threshold == 0.3 and got.guarantee == calibration.guarantee
  assert rows(got) == rows(model.generate(TEXTS, threshold=0.3))
  assert (
    served.generate(TEXTS, threshold=0.3).guarantee == calibration.guarantee
  )
  assert served.generate(TEXTS, threshold=0.6).guarantee is None
  assert served.generate(TEXTS, rule=exits.StaticExit()).guarantee is None
  assert served.with_options(measure="state").calibration is None


@pytest.mark.parametrize(
  ("other", "options", "message"),
  [
    (None, {"measure": "state"}, "`measure`: expected .*, got"),
    (
      lambda _, folder: save(folder / "other", seed=2),
      {},
      "`parameters_digest`",
    ),
  ],
)
def test_a_calibration_of_another_procedure_is_refused_by_field(
  directory, calibration, tmp_path, other, options, message
):
  path = other(directory, tmp_path) if other else directory
  with pytest.raises(ValueError, match=rf"another procedure: {message}"):
    inference.load(path, calibration=calibration, **options)
  void = inference.load(
    path, calibration=calibration, void_guarantee=True, **options
  )
  assert void.calibration is None
  outputs = void.generate(TEXTS[:1])
  assert (
    outputs.threshold == calibration.threshold and outputs.guarantee is None
  )


def test_foreign_calibrations_and_models_without_vocabulary_are_refused(
  directory, calibration, tmp_path
):
  foreign = dataclasses.replace(calibration, procedure=None)
  with pytest.raises(ValueError, match="`procedure` null"):
    inference.load(directory, calibration=foreign)
  assert (
    inference.load(
      directory, calibration=foreign, void_guarantee=True
    ).calibration
    is None
  )
  bare = save(tmp_path / "bare", with_vocabulary=False)
  with pytest.raises(
    ValueError, match="Expected a vocabulary beside the checkpoint"
  ):
    inference.load(bare)


def test_defaults_that_belong_together_stay_together(tmp_path):
  path = save(tmp_path / "toy")
  chosen = inference.DecodeOptions(
    measure="state",
    exit_layers=(2,),
    schedule=schedules.Decaying(4.0, 8),
    grid=(0.9, 0.8),
    task_prefix="p: ",
  )
  (path / "inference.json").write_text(
    json.dumps(options_lib.to_stored(chosen))
  )
  assert inference.load(path).options == chosen
  assert inference.load(path, batch_size=3).options == dataclasses.replace(
    chosen, batch_size=3
  )
  # Another measure has its own layers and grid; other layers want another grid.
  other = inference.load(path, measure="softmax").options
  assert other == inference.DecodeOptions(task_prefix="p: ")
  deeper = inference.load(path, exit_layers=(1, 2)).options
  assert deeper == dataclasses.replace(chosen, exit_layers=(1, 2), grid=None)


def test_a_folder_serves_under_its_own_calibration(
  directory, model, calibration, tmp_path
):
  folder = tmp_path / "mine"
  shutil.copytree(directory, folder)
  calibration.save(folder / "calibration.json")
  (folder / "inference.json").write_text(
    json.dumps(options_lib.to_stored(model.options))
  )
  served = inference.load(folder)
  assert (
    served.calibration == calibration
    and served.threshold == calibration.threshold
  )
  assert served.generate(TEXTS[:1]).guarantee == calibration.guarantee
  # Another way of decoding has no promise, and that is no error of the
  # folder's.
  assert inference.load(folder, measure="state").calibration is None
  toys_params = toys.params(SIZES, 2)
  checkpoints.save(
    folder, toys_params, model.config, vocabulary=model.vocabulary
  )
  with pytest.raises(
    ValueError, match=r"calibration\.json: .*: `parameters_digest`"
  ):
    inference.load(folder)


# Fields of a network that decoding reads.
DECODED = {
  *(
    "vocab_size",
    "emb_dim",
    "num_heads",
    "num_encoder_layers",
    "num_decoder_layers",
  ),
  *("head_dim", "mlp_dim", "mlp_activations", "logits_via_embedding"),
  *("float32_attention_logits", "relpos_buckets", "relpos_max_distance"),
}


def test_the_whole_network_belongs_to_the_procedure(model):
  """A new field of the configuration is recorded, or named as one that decoding
  ignores.
  """
  assert set(model.procedure.configuration) == {*DECODED, "per_layer_heads"}
  names = {field.name for field in dataclasses.fields(network.T5Config)}
  assert names == DECODED | set(options_lib._NOT_DECODED)


def test_where_last_bits_decide_one_program_decodes(directory, monkeypatch):
  monkeypatch.setattr(program_lib, "FIRST", 2)

  def made():
    return [
      compiled.num_made(f"Program.{x}") for x in ("start", "decode_packed")
    ]

  begun, packed = made()
  narrow = inference.load(directory, **OPTIONS, dtype="bfloat16")
  narrow.generate(TEXTS[:1], threshold=0.6)
  assert made() == [begun, packed + 1]
