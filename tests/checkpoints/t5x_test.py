"""T5X checkpoints, made with the real T5X (golden/make_t5x.py), read without
it.
"""

import contextlib
import pathlib
import shutil
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest

from calm import checkpoints
from calm.checkpoints import t5x
from calm.t5 import network, parameters

# Orbax leaves tasks without an owner when a restore fails, as some tests here
# make it do.
pytestmark = [
  pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
  pytest.mark.usefixtures("collect_orphans"),
]
GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
FORMATS = ("legacy", "orbax")


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> pathlib.Path:
  """legacy/ and orbax/, each a model directory with checkpoint_7/."""
  for name in ("tensorstore", "orbax.checkpoint"):
    pytest.importorskip(
      name, reason=f"T5X checkpoints need {name} (the `train` extra)"
    )
  root = tmp_path_factory.mktemp("t5x")
  for name in FORMATS:
    zipfile.ZipFile(GOLDEN / f"t5x_{name}.zip").extractall(root / name)
  return root


@pytest.fixture
def copied(unpacked, tmp_path):
  return lambda name: shutil.copytree(
    unpacked / name / "checkpoint_7", tmp_path / name
  )


def expected() -> dict[str, np.ndarray]:
  return dict(np.load(GOLDEN / "t5x_checkpoints.npz"))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("folder", [".", "checkpoint_7"])
def test_parameters_are_read_bit_for_bit_and_give_the_logits_of_t5x(
  unpacked, name, folder
):
  golden = expected()
  tokens = jnp.asarray(golden.pop("tokens"))
  logits = golden.pop("logits")
  checkpoint = checkpoints.load(unpacked / name / folder)
  flat = parameters.flatten(checkpoint.params)
  assert flat.keys() == golden.keys()
  for path, leaf in flat.items():
    assert leaf.dtype == np.float32
    np.testing.assert_array_equal(leaf, golden[path])
  model = network.Transformer(checkpoint.config)
  variables = {"params": checkpoint.params}
  ours = model.apply(variables, tokens, tokens, tokens, enable_dropout=False)
  np.testing.assert_allclose(ours, logits, atol=1e-5)


@pytest.mark.parametrize(
  "changes",
  [
    {},
    {"exit_classifier": True},
    {
      "logits_via_embedding": True,
      "mlp_activations": ("relu",),
      "relpos_buckets": 16,
    },
    {
      "num_decoder_layers": 12,
      "exit_translators": (2, 11),
      "exit_propagation": (2,),
      "exit_propagation_rank": 3,
    },
  ],
)
def test_inferred_configuration_round_trips(changes):
  fields = dict(vocab_size=24, emb_dim=8, num_heads=2, head_dim=3, mlp_dim=10)
  fields |= dict(mlp_activations=("gelu", "linear"), exit_classifier=False)
  config = network.T5Config(**(fields | changes))
  shapes = parameters.expected_shapes(config)
  flat = {path: np.zeros(shape, np.float32) for path, shape in shapes.items()}
  assert t5x.infer_config(flat) == config


def test_the_newest_step_is_taken(unpacked, tmp_path):
  for step in (7, 12):
    shutil.copytree(
      unpacked / "legacy" / "checkpoint_7", tmp_path / f"checkpoint_{step}"
    )
  (tmp_path / "checkpoint_100.orbax-checkpoint-tmp").mkdir()
  assert t5x.find(tmp_path) == tmp_path / "checkpoint_12"
  assert t5x.find(tmp_path / "checkpoint_7") == tmp_path / "checkpoint_7"
  assert t5x.find(tmp_path / "checkpoint_100.orbax-checkpoint-tmp") is None


@pytest.mark.parametrize("options", [{"use_ocdbt": False}, {"use_zarr3": True}])
def test_orbax_folders_and_its_newer_arrays_are_read(
  unpacked, tmp_path, options
):
  import orbax.checkpoint as ocp

  golden = checkpoints.load(unpacked / "orbax")
  with contextlib.closing(ocp.PyTreeCheckpointHandler(**options)) as handler:
    handler.save(
      tmp_path / "state", args=ocp.args.PyTreeSave({"target": golden.params})
    )
    handler.finalize(tmp_path / "state")
  flat = parameters.flatten(checkpoints.load(tmp_path).params)
  expected = parameters.flatten(golden.params)
  assert flat.keys() == expected.keys()
  for path, leaf in flat.items():
    np.testing.assert_array_equal(leaf, expected[path])
