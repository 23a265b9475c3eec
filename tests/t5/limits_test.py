"""One table of bounds for every configuration, whichever file it comes from."""

import dataclasses
import json
import pathlib
import shutil

import numpy as np
import pytest

from calm import checkpoints
from calm.checkpoints import huggingface, t5x
from calm.t5 import limits, network, parameters
from tests.spent import Spent

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "huggingface"
WRONG = {
  "vocab_size": [0, -1, 10**9, 1.5, "8", None, True, [8]],
  "emb_dim": [0, 10**7],
  "num_heads": [0, 10**7],
  "num_encoder_layers": [0, 10**7, -3],
  "num_decoder_layers": [0, 10**7],
  "head_dim": [0, 10**7],
  "mlp_dim": [0, 10**7],
  "relpos_buckets": [0, 2, 10**7],
  "relpos_max_distance": [0, 16, -1],
  "dropout_rate": ["x", 1.0, -0.1, float("nan"), float("inf"), None, True],
  "mlp_activations": [
    "relu",
    [],
    ["softmax"],
    ["Dense"],
    [3],
    None,
    {"relu": 1},
    ["relu"] * 5,
  ],
  "dtype": ["int8", "float64", "float16", np.float16, "words", None, [], {}],
  "exit_classifier": ["yes", 1, None],
  "exit_translators": [[0], [2, 1], [1, 1], 3, "1", [1.5], [True], [300], None],
  "exit_propagation_rank": [-1, 10**7, None, 2.5],
}
CASES = [(name, value) for name, values in WRONG.items() for value in values]
# One of each field: that files go through the table.
SAID = [(name, values[0]) for name, values in WRONG.items()]
THEIRS = {
  "model_type": "t5",
  **dict(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2),
}


def write(path, value) -> None:
  path.write_text(json.dumps(value))


def test_what_gin_and_numpy_give_takes_one_form():
  given = dict(
    vocab_size=np.int64(8),
    dropout_rate=0,
    mlp_activations=["relu"],
    dtype=np.float32,
  )
  made = limits.check(given)
  assert made == dict(
    vocab_size=8, dropout_rate=0.0, mlp_activations=("relu",), dtype="float32"
  )
  assert type(made["vocab_size"]) is int
  ours, theirs = (
    network.T5Config(8, dtype=dtype) for dtype in (np.float32, "float32")
  )
  assert ours == theirs and hash(ours) == hash(theirs)


def test_maps_are_of_layers_below_the_last_and_have_a_rank():
  def made(**given):
    return network.T5Config(vocab_size=8, num_decoder_layers=3, **given)

  assert made(exit_translators=[1, 2]).exit_translators == (1, 2)
  with pytest.raises(
    ValueError, match=r"`exit_translators` to be layers below the last of 3"
  ):
    made(exit_translators=(3,))
  for given in ({"exit_propagation": (1,)}, {"exit_propagation_rank": 2}):
    with pytest.raises(
      ValueError, match="`exit_propagation` with `exit_propagation_rank`"
    ):
      made(**given)


@pytest.mark.parametrize(("name", "value"), CASES)
def test_out_of_bounds(name, value):
  with pytest.raises(ValueError, match=rf"^Expected `{name}` .*got .*; "):
    limits.check(
      {"relpos_buckets": 32, "relpos_max_distance": 128, name: value}
    )


@pytest.mark.parametrize("field", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("kind", ["t5_lm_adapt", "codet5"])
def test_weights_that_are_stored_in_float16_open_and_compute_in_float32(
  tmp_path, kind, field
):
  """Their `dtype` is that of storage; activations in it would be NaN."""
  folder = shutil.copytree(GOLDEN / kind, tmp_path / "model")
  theirs = json.loads((folder / "config.json").read_text())
  assert theirs.pop("dtype") == "float16"
  write(folder / "config.json", theirs | {field: "float16"})
  made, params = huggingface.read(folder)
  assert made.dtype == "float32"
  assert {leaf.dtype for leaf in params.values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize(("name", "value"), SAID)
def test_files_have_these_limits_before_weights_are_read(tmp_path, name, value):
  fields = dataclasses.asdict(network.T5Config(vocab_size=8)) | {name: value}
  write(tmp_path / "config.json", {"format": checkpoints.FORMAT, **fields})
  with pytest.raises(ValueError, match=rf"config.json: Expected `{name}`"):
    checkpoints.load(tmp_path)
  if theirs := huggingface.FIELDS.get(name):
    write(tmp_path / "config.json", {**THEIRS, theirs: value})
    with pytest.raises(ValueError, match=rf"config.json: Expected `{theirs}`"):
      checkpoints.load(tmp_path)


def test_configurations_of_versions_with_a_head_a_layer(tmp_path):
  fields = {
    "format": checkpoints.FORMAT,
    "vocab_size": 8,
    "per_layer_heads": True,
  }
  write(tmp_path / "config.json", fields)
  with pytest.raises(
    ValueError, match=r"unknown fields \['per_layer_heads'\]; open it"
  ):
    checkpoints.load(tmp_path)
  write(tmp_path / "config.json", fields | {"per_layer_heads": False})
  with pytest.raises(
    (ValueError, FileNotFoundError), match=r"params\.safetensors"
  ):
    checkpoints.load(tmp_path)


def test_shapes_of_t5x_have_these_limits():
  wide = np.broadcast_to(np.float32(0), (8, 2**17))
  flat = {
    "token_embedder/embedding": wide,
    "decoder/relpos_bias/rel_embedding": np.zeros((2, 32)),
    "decoder/layers_0/self_attention/query/kernel": np.zeros((8, 8)),
    "decoder/layers_0/mlp/wo/kernel": np.zeros((8, 8)),
    "encoder/layers_0/mlp/wo/kernel": np.zeros((8, 8)),
  }
  with pytest.raises(ValueError, match="`emb_dim` to be in 1"):
    t5x.infer_config(flat)
  flat["encoder/layers_99999/mlp/wo/kernel"] = np.zeros(1)
  flat["token_embedder/embedding"] = np.zeros((8, 8))
  with pytest.raises(ValueError, match="`num_encoder_layers` to be in 1"):
    t5x.infer_config(flat)


def test_a_layer_count_that_the_file_does_not_hold_is_found_at_once():
  config = network.T5Config(vocab_size=8, num_decoder_layers=256)
  spent = Spent()
  with pytest.raises(
    ValueError, match=r"'decoder/layers_255/'.*num_decoder_layers"
  ):
    parameters.check(
      {"token_embedder": {"embedding": np.zeros((8, 512))}}, config
    )
  assert spent.seconds < 1


def test_a_leaf_below_a_leaf_is_refused():
  with pytest.raises(ValueError, match="'a/b', and 'a/b/c' below it"):
    parameters.unflatten({"a/b/c": 1, "a/b": 2, "a/bc": 3})
