"""Our own checkpoint format: what goes in comes out, and damage is named."""

import dataclasses
import json
import pathlib
import stat

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from calm import checkpoints
from calm.checkpoints import files
from calm.data import vocabulary
from calm.t5 import network, parameters
from tests import toy_vocabulary, toys

CONFIG = network.T5Config(vocab_size=64, dropout_rate=0.05, **toys.SMALLEST)


def draw(config: network.T5Config = CONFIG, seed: int = 0) -> dict:
  return toys.params(config, seed)


def edit(params: dict, path: str, leaf) -> dict:
  """`params` with one leaf exchanged, or removed where `leaf` is None."""
  flat = parameters.flatten(params) | {path: leaf}
  return parameters.unflatten({p: x for p, x in flat.items() if x is not None})


@pytest.fixture(scope="module")
def pieces(tmp_path_factory) -> vocabulary.SentencePieceVocabulary:
  path = toy_vocabulary.train(
    tmp_path_factory.mktemp("vocabulary") / "tiny.model"
  )
  return vocabulary.SentencePieceVocabulary(path, extra_ids=20)


@pytest.fixture
def saved(tmp_path, pieces) -> pathlib.Path:
  checkpoints.save(tmp_path / "model", draw(), CONFIG, vocabulary=pieces)
  return tmp_path / "model"


def test_whether_exits_are_trained_is_stored(tmp_path):
  for said in (None, True, False):
    checkpoints.save(tmp_path, draw(), CONFIG, exits_trained=said)
    assert checkpoints.load(tmp_path).exits_trained is said
  fields = json.loads((tmp_path / "config.json").read_text())
  (tmp_path / "config.json").write_text(
    json.dumps({**fields, "exits_trained": 3})
  )
  with pytest.raises(ValueError, match="`exits_trained`"):
    checkpoints.load(tmp_path)
  assert checkpoints.load(checkpoints.PACKED).exits_trained


def test_loading_gives_back_what_was_saved(saved, pieces):
  loaded = checkpoints.load(saved)
  assert loaded.config == CONFIG
  assert loaded.vocabulary == pieces
  ours = parameters.flatten(loaded.params)
  theirs = parameters.flatten(draw())
  assert ours.keys() == theirs.keys()
  for path, leaf in ours.items():
    assert leaf.dtype == np.float32
    np.testing.assert_array_equal(leaf, theirs[path])
  assert parameters.digest(loaded.params) == parameters.digest(draw())
  stored = json.loads((saved / "config.json").read_text())
  assert stored.pop("format") == checkpoints.FORMAT
  assert set(stored) == {
    field.name for field in dataclasses.fields(network.T5Config)
  }
  modes = {stat.S_IMODE(path.stat().st_mode) for path in saved.iterdir()}
  assert len(modes) == 1  # whoever may read one file may read all
  checkpoints.save(saved, draw(), CONFIG)
  assert checkpoints.load(saved).vocabulary is None  # no old one is left
  assert {p.name for p in saved.iterdir()} == {
    "config.json",
    "params.safetensors",
  }


@pytest.mark.parametrize(
  "changes",
  [
    {
      "logits_via_embedding": True,
      "mlp_activations": ("relu",),
      "dtype": jnp.bfloat16,
    },
    {
      "exit_translators": (1,),
      "exit_propagation": (1,),
      "exit_propagation_rank": 3,
    },
    {"vocab_size": 384, "exit_classifier": False},
  ],
)
def test_every_kind_of_configuration_round_trips(tmp_path, changes):
  config = dataclasses.replace(CONFIG, **changes)
  words = vocabulary.ByteVocabulary() if config.vocab_size == 384 else None
  checkpoints.save(tmp_path, draw(config), config, vocabulary=words)
  loaded = checkpoints.load(tmp_path)
  assert loaded.config == config and loaded.vocabulary == words


def test_bfloat16_halves_the_file_and_rounds_once_whatever_the_layout(tmp_path):
  view = np.arange(8 * 64, dtype=np.float32).reshape(64, 8).T
  params = edit(draw(), "decoder/logits_dense/kernel", view)
  for dtype in ("float32", "bfloat16"):
    checkpoints.save(tmp_path / dtype, params, CONFIG, storage_dtype=dtype)
  exact, half = (
    tmp_path / dtype / "params.safetensors" for dtype in ("float32", "bfloat16")
  )
  # the header
  assert abs(half.stat().st_size - exact.stat().st_size / 2) < 4000
  loaded = parameters.flatten(checkpoints.load(half.parent).params)
  for path, leaf in parameters.flatten(params).items():
    rounded = np.asarray(leaf).astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(loaded[path], rounded)


def test_a_failing_save_leaves_the_earlier_checkpoint(saved, monkeypatch):
  before = {p.name: p.read_bytes() for p in saved.iterdir()}

  def full_disk(value):
    def write(path):
      path.write_text("half")
      raise OSError(28, "No space left on device")

    return write

  monkeypatch.setattr(files, "json_writer", full_disk)
  with pytest.raises(OSError, match=r"`directory`.*No space left"):
    checkpoints.save(saved, draw(seed=1), CONFIG)
  assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
  with pytest.raises(
    OSError, match=r"`directory` to be a folder that can be written"
  ):
    checkpoints.save(saved / "config.json" / "model", draw(), CONFIG)


WRONG_LEAVES = [
  (
    "decoder/decoder_norm/scale",
    None,
    r"'decoder/decoder_norm/scale' of shape \(8,\).*none",
  ),
  (
    "decoder/layers_9/x",
    np.zeros(3, np.float32),
    r"got also 'decoder/layers_9/x'",
  ),
  (
    "encoder/encoder_norm/scale",
    np.array([1, np.nan, 1, np.inf, 1, 1, 1, 1], np.float32),
    r"2 of 8 values NaN or infinite.*'encoder/encoder_norm/scale'",
  ),
  (
    "decoder/exit_classifier/bias",
    None,
    r"exit_classifier/bias.*add_exit_parts",
  ),
]


@pytest.mark.parametrize(("path", "leaf", "message"), WRONG_LEAVES)
def test_wrong_leaves_are_named_when_saving_and_when_loading(
  saved, path, leaf, message
):
  params = edit(draw(), path, leaf)
  before = (saved / "params.safetensors").read_bytes()
  with pytest.raises(ValueError, match=message):
    checkpoints.save(saved, params, CONFIG)
  assert (saved / "params.safetensors").read_bytes() == before
  safetensors.numpy.save_file(
    parameters.flatten(params), saved / "params.safetensors"
  )
  with pytest.raises(ValueError, match=message):
    checkpoints.load(saved)


def test_missing_paths_and_files(saved, tmp_path):
  (tmp_path / "empty").mkdir()
  for path, error, message in (
    (tmp_path / "nowhere", FileNotFoundError, r"`path`.*missing"),
    (saved / "config.json", FileNotFoundError, r"`path`.*a file"),
    (tmp_path / "empty", ValueError, r"`path`.*nothing in it"),
  ):
    with pytest.raises(error, match=message):
      checkpoints.load(path)
  (saved / "params.safetensors").unlink()
  with pytest.raises(FileNotFoundError, match=r"params.safetensors.*missing"):
    checkpoints.load(saved)


def test_a_tensor_of_two_places_is_refused(saved):
  """The last one would be read, whatever another reader takes."""
  path = saved / "params.safetensors"
  content = path.read_bytes()
  end = 8 + int.from_bytes(content[:8], "little")
  name, entry = next(
    pair
    for pair in json.loads(content[8:end]).items()
    if pair[0] != "__metadata__"
  )
  twice = {**entry, "data_offsets": [0, 0]}
  header = b"{%s: %s, " % (
    json.dumps(name).encode(),
    json.dumps(twice).encode(),
  )
  header += content[9:end]
  path.write_bytes(len(header).to_bytes(8, "little") + header + content[end:])
  with pytest.raises(
    ValueError, match=rf"every tensor once, got \['{name}'\] twice"
  ):
    checkpoints.load(saved)


def test_exchanged_vocabulary(saved):
  toy_vocabulary.train(saved / "vocabulary.model", model_type="bpe")
  with pytest.raises(
    ValueError, match=r"vocabulary.model to have the digest.*exchanged"
  ):
    checkpoints.load(saved)
  (saved / "vocabulary.json").write_text('{"kind": "words"}')
  with pytest.raises(
    ValueError, match=r"'sentencepiece', 'tokenizer', 'bytes'.*'words'"
  ):
    checkpoints.load(saved)


def test_digest_tells_paths_shapes_dtypes_and_values_apart():
  leaf = np.arange(4, dtype=np.float32)
  trees = [
    {"a": leaf},
    {"b": leaf},
    {"a": leaf.reshape(2, 2)},
    {"a": leaf.view(np.int32)},
    {"a": leaf[::-1]},
    {"a": {"a": leaf}},
  ]
  assert len({parameters.digest(tree) for tree in trees}) == len(trees)
  # Order, memory layout and the kind of array do not matter.
  assert parameters.digest({"a": leaf, "b": leaf}) == parameters.digest(
    {"b": leaf, "a": leaf}
  )
  assert parameters.digest({"a": leaf}) == parameters.digest(
    {"a": jnp.asarray(leaf)}
  )


@pytest.mark.parametrize(
  "name", ["adapter_config.json", "adapter_model.safetensors"]
)
@pytest.mark.parametrize("alone", [True, False])
def test_an_adapter_is_named_and_never_left_out(saved, tmp_path, name, alone):
  folder = tmp_path / "adapter" if alone else saved
  folder.mkdir(exist_ok=True)
  (folder / name).write_text("{}")
  with pytest.raises(
    ValueError, match=rf"{name}' of an adapter \(LoRA\).*merge"
  ):
    checkpoints.load(folder)
