"""Hugging Face checkpoints against transformers' own outputs, golden and live."""

import importlib.util
import json
import pathlib
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from calm import checkpoints
from calm.checkpoints import huggingface
from calm.data import vocabulary
from calm.t5 import network
from tests import toy_vocabulary

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
KINDS = ("t5_1_0", "t5_1_1", "flan_t5", "mt5", "byt5", "t5_1_1_resaved")
TOLERANCE = 1e-4


def run(directory: pathlib.Path, inputs) -> tuple[np.ndarray, np.ndarray]:
  """(encoder states, logits) of our network for what `load` makes of a directory."""
  checkpoint = checkpoints.load(directory)
  model = network.Transformer(checkpoint.config)
  variables = {"params": checkpoint.params}
  tokens, decoder_tokens = (
    jnp.asarray(inputs[field], jnp.int32) for field in ("input_ids", "decoder_input_ids")
  )
  encoded = model.apply(variables, tokens, enable_dropout=False, method="encode")
  # T5X masks by targets; all of these count.
  targets = jnp.ones_like(decoder_tokens)
  logits = model.apply(variables, tokens, decoder_tokens, targets, enable_dropout=False)
  return np.asarray(encoded), np.asarray(logits)


def assert_equal_outputs(directory: pathlib.Path, expected) -> None:
  encoded, logits = run(directory, expected)
  real = expected["attention_mask"] > 0
  assert np.abs(encoded - expected["encoded"])[real].max() < TOLERANCE
  assert np.abs(logits - expected["logits"]).max() < TOLERANCE


def edit_config(directory: pathlib.Path, **changes) -> None:
  path = directory / "config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def copied(tmp_path) -> pathlib.Path:
  """A T5 1.1 directory that a test may damage."""
  return shutil.copytree(GOLDEN / "huggingface" / "t5_1_1", tmp_path / "model")


@pytest.mark.parametrize("kind", KINDS)
def test_encoder_states_and_logits_are_those_of_transformers(kind):
  directory = GOLDEN / "huggingface" / kind
  assert_equal_outputs(directory, np.load(directory / "expected.npz"))


def test_scaling_and_transposition_matter_to_the_golden_logits(copied):
  """Meta: the comparison would see a head scaled by emb_dim**-0.5."""
  edit_config(copied, scale_decoder_outputs=True)
  expected = np.load(copied / "expected.npz")
  assert np.abs(run(copied, expected)[1] - expected["logits"]).max() > 0.1


def test_what_each_kind_becomes():
  configs = {kind: huggingface.read(GOLDEN / "huggingface" / kind)[0] for kind in KINDS}
  assert configs["t5_1_0"].mlp_activations == ("relu",)
  assert configs["t5_1_0"].logits_via_embedding
  for kind in KINDS[1:]:
    assert configs[kind].mlp_activations == ("gelu", "linear")
    assert not configs[kind].logits_via_embedding
  byt5 = configs["byt5"]
  assert (byt5.vocab_size, byt5.num_encoder_layers, byt5.num_decoder_layers) == (384, 3, 1)
  assert not any(config.exit_classifier for config in configs.values())


@pytest.mark.parametrize("kind", KINDS)
def test_written_and_read_again_is_the_same_model(kind, tmp_path):
  before = checkpoints.load(GOLDEN / "huggingface" / kind)
  huggingface.write(tmp_path, before.params, before.config)
  after = checkpoints.load(tmp_path)
  assert after.config == before.config
  assert checkpoints.parameters_digest(after.params) == checkpoints.parameters_digest(
    before.params
  )


def test_one_weight_under_several_names_is_read_once(copied):
  """Early conversions repeat the embedding and keep a bias that nothing reads."""
  path = copied / "model.safetensors"
  weights = safetensors.numpy.load_file(path)
  embedding = weights["shared.weight"]
  leftover = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
  extra = {leftover: np.zeros((32, 2), np.float32)}
  for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
    extra[name] = embedding.copy()
  safetensors.numpy.save_file(weights | extra, path)
  assert_equal_outputs(copied, np.load(copied / "expected.npz"))
  # And the embedding may be stored under another of its names only.
  del weights["shared.weight"]
  safetensors.numpy.save_file(weights | extra, path)
  assert_equal_outputs(copied, np.load(copied / "expected.npz"))
  extra["decoder.embed_tokens.weight"] += 1
  safetensors.numpy.save_file(weights | extra, path)
  with pytest.raises(ValueError, match=r"one token embedding.*decoder.embed_tokens"):
    huggingface.read(copied)


def test_tied_head_stored_beside_the_embedding_stays_tied(tmp_path):
  directory = shutil.copytree(GOLDEN / "huggingface" / "t5_1_0", tmp_path / "model")
  path = directory / "model.safetensors"
  weights = safetensors.numpy.load_file(path)
  weights["lm_head.weight"] = weights["shared.weight"].copy()
  safetensors.numpy.save_file(weights, path)
  assert huggingface.read(directory)[0].logits_via_embedding


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"model_type": "umt5"}, r"`model_type`.*'t5' or 'mt5'.*'umt5'"),
    ({"layer_norm_epsilon": 1e-5}, r"`layer_norm_epsilon`.*1e-05"),
    ({"pad_token_id": 3}, r"`pad_token_id`.*Got 3"),
    ({"decoder_start_token_id": 2}, r"`decoder_start_token_id`.*Got 2"),
    ({"feed_forward_proj": "gelu"}, r"`feed_forward_proj`.*'gelu'"),
    ({"num_layers": 3}, r"missing.*encoder.block.2"),
    ({"num_layers": 1}, r"unknown.*encoder.block.1"),
    ({"d_ff": 21}, r"wi_0/kernel.*\(16, 21\).*Got \(16, 20\)"),
    ({"vocab_size": 50}, r"logits_dense/kernel.*\(16, 50\).*Got \(16, 48\)"),
  ],
)
def test_configurations_of_other_functions_are_refused(copied, changes, message):
  edit_config(copied, **changes)
  with pytest.raises(ValueError, match=message):
    checkpoints.load(copied)


def test_configuration_without_sizes(copied):
  (copied / "config.json").write_text('{"model_type": "t5"}')
  with pytest.raises(ValueError, match=r"Missing: \['vocab_size'"):
    checkpoints.load(copied)


def test_missing_and_pickled_weights(copied):
  (copied / "model.safetensors").unlink()
  with pytest.raises(FileNotFoundError, match=r"model.safetensors.*missing"):
    checkpoints.load(copied)
  (copied / "pytorch_model.bin").write_bytes(b"")
  with pytest.raises(FileNotFoundError, match=r"pickle.*never opened"):
    checkpoints.load(copied)


def test_missing_shard(tmp_path):
  directory = shutil.copytree(GOLDEN / "huggingface" / "flan_t5", tmp_path / "model")
  (directory / "model-00002-of-00002.safetensors").unlink()
  with pytest.raises(FileNotFoundError, match=r"model-00002-of-00002"):
    checkpoints.load(directory)
  (directory / "model.safetensors.index.json").write_text("{}")
  with pytest.raises(ValueError, match="`weight_map`"):
    checkpoints.load(directory)


def test_quantised_weights(copied):
  path = copied / "model.safetensors"
  weights = safetensors.numpy.load_file(path)
  weights["lm_head.weight"] = weights["lm_head.weight"].astype(np.int8)
  safetensors.numpy.save_file(weights, path)
  with pytest.raises(ValueError, match=r"int8 for 'lm_head.weight'.*unquantised"):
    checkpoints.load(copied)


def test_what_hugging_face_cannot_hold_is_refused(tmp_path):
  checkpoint = checkpoints.load(GOLDEN / "huggingface" / "t5_1_1")
  fields = dict(vocab_size=48, per_layer_heads=True)
  with pytest.raises(ValueError, match="`per_layer_heads`"):
    huggingface.write(tmp_path, checkpoint.params, network.T5Config(**fields))
  odd = network.T5Config(vocab_size=48, mlp_activations=("tanh", "linear"))
  with pytest.raises(ValueError, match=r"`config.mlp_activations`.*tanh"):
    huggingface.write(tmp_path, checkpoint.params, odd)
  assert not list(tmp_path.iterdir())


def test_vocabulary_beside_the_model(copied):
  assert huggingface.read_vocabulary(copied) is None
  options = {"tokenizer_class": "ByT5Tokenizer", "extra_ids": 125}
  (copied / "tokenizer_config.json").write_text(json.dumps(options))
  assert huggingface.read_vocabulary(copied) == vocabulary.ByteVocabulary()
  with pytest.raises(ValueError, match=r"at most 48 ids.*Got 384"):
    checkpoints.load(copied)


@pytest.mark.parametrize(("kind", "extra_ids"), [("t5", 100), ("mt5", 0)])
def test_sentence_pieces_beside_the_model(copied, kind, extra_ids):
  edit_config(copied, model_type=kind)
  toy_vocabulary.train(copied / "spiece.model")
  assert huggingface.read_vocabulary(copied).extra_ids == extra_ids
  (copied / "tokenizer_config.json").write_text('{"extra_ids": 7}')
  assert huggingface.read_vocabulary(copied).extra_ids == 7


@pytest.fixture(scope="module")
def maker():
  """The golden files' script, where torch and transformers are installed."""
  for name in ("torch", "transformers"):
    if importlib.util.find_spec(name) is None:
      pytest.skip(f"the live comparison needs torch and transformers: {name} is not installed")
  path = GOLDEN / "make_huggingface.py"
  spec = importlib.util.spec_from_file_location("make_huggingface", path)
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.mark.hf
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_live_transformers_agrees(kind, maker, tmp_path):
  maker.make(kind, tmp_path, seed=100)
  assert_equal_outputs(tmp_path, np.load(tmp_path / "expected.npz"))


@pytest.mark.hf
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_live_transformers_opens_what_we_write(kind, maker, tmp_path):
  golden = GOLDEN / "huggingface" / kind
  checkpoint = checkpoints.load(golden)
  huggingface.write(tmp_path, checkpoint.params, checkpoint.config)
  expected = dict(np.load(golden / "expected.npz"))
  fields = ("input_ids", "attention_mask", "decoder_input_ids")
  theirs = maker.run(tmp_path, {field: expected[field] for field in fields})
  real = expected["attention_mask"] > 0
  assert np.abs(theirs["encoded"] - expected["encoded"])[real].max() < TOLERANCE
  assert np.abs(theirs["logits"] - expected["logits"]).max() < TOLERANCE
