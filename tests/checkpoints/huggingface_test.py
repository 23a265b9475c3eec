"""Hugging Face's folders: outputs against transformers' own, golden and live;
tokenizers beside a model, whose added tokens are kept or refused.
"""

import base64
import importlib.util
import json
import pathlib
import shutil
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import sentencepiece

from calm import calibrate, checkpoints, inference
from calm.checkpoints import huggingface
from calm.data import vocabulary
from calm.t5 import network, parameters
from tests import toy_vocabulary

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
KINDS = (
  *("t5_1_0", "t5_1_1", "flan_t5", "mt5", "byt5", "t5_1_1_resaved"),
  *("t5_lm_adapt", "madlad", "umt5", "pile_t5", "codet5"),
)
TOLERANCE = 1e-4


def run(directory: pathlib.Path, inputs) -> tuple[np.ndarray, np.ndarray]:
  """(encoder states, logits) of our network for what `load` makes of a
  directory.
  """
  checkpoint = checkpoints.load(directory)
  model = network.Transformer(checkpoint.config)
  variables = {"params": checkpoint.params}
  tokens, decoder_tokens = (
    jnp.asarray(inputs[field], jnp.int32)
    for field in ("input_ids", "decoder_input_ids")
  )
  encoded = model.apply(
    variables, tokens, enable_dropout=False, method="encode"
  )
  # T5X masks by targets; all of these count.
  targets = jnp.ones_like(decoder_tokens)
  logits = model.apply(
    variables, tokens, decoder_tokens, targets, enable_dropout=False
  )
  return np.asarray(encoded), np.asarray(logits)


def with_padding_0(directory: pathlib.Path, expected) -> dict[str, np.ndarray]:
  """The same where padding is another id: it and 0 change places, and 0 no more
  starts.
  """
  pad = json.loads((directory / "config.json").read_text()).get(
    "pad_token_id", 0
  )
  order = np.arange(expected["logits"].shape[-1])
  order[[0, pad]] = order[[pad, 0]]
  made = dict(expected) | {"logits": expected["logits"][..., order]}
  return made | {"input_ids": order[expected["input_ids"]]}


def assert_equal_outputs(directory: pathlib.Path, expected) -> None:
  expected = with_padding_0(directory, expected)
  encoded, logits = run(directory, expected)
  real = expected["attention_mask"] > 0
  assert (expected["input_ids"][real] > 0).all()
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


@pytest.mark.parametrize("kind", KINDS)
def test_written_and_read_again_is_the_same_model(kind, tmp_path):
  before = checkpoints.load(GOLDEN / "huggingface" / kind)
  huggingface.write(tmp_path, before.params, before.config)
  after = checkpoints.load(tmp_path)
  assert after.config == before.config
  assert checkpoints.parameters_digest(
    after.params
  ) == checkpoints.parameters_digest(before.params)


def test_one_weight_under_several_names_is_read_once(copied):
  """Early conversions repeat the embedding and keep a bias that nothing
  reads.
  """
  path = copied / "model.safetensors"
  weights = safetensors.numpy.load_file(path)
  copies = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
  extra = {name: weights["shared.weight"].copy() for name in copies}
  leftover = (
    "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
  )
  extra[leftover] = np.zeros((32, 2), np.float32)
  del weights["shared.weight"]  # stored under another of its names only
  safetensors.numpy.save_file(weights | extra, path)
  assert_equal_outputs(copied, np.load(copied / "expected.npz"))
  extra["decoder.embed_tokens.weight"] += 1
  safetensors.numpy.save_file(weights | extra, path)
  with pytest.raises(
    ValueError, match=r"one token embedding.*decoder.embed_tokens"
  ):
    huggingface.read(copied)
  # A tied head that is stored beside the embedding stays tied.
  tied = shutil.copytree(GOLDEN / "huggingface" / "t5_1_0", copied / "tied")
  weights = safetensors.numpy.load_file(tied / "model.safetensors")
  weights["lm_head.weight"] = weights["shared.weight"].copy()
  safetensors.numpy.save_file(weights, tied / "model.safetensors")
  assert huggingface.read(tied)[0].logits_via_embedding


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      {"model_type": "longt5"},
      r"`model_type`.*'t5' or 'mt5' or 'umt5'.*'longt5'",
    ),
    ({"model_type": "umt5"}, r"1 missing|2 missing.*relative_attention_bias"),
    ({"layer_norm_epsilon": 1e-5}, r"`layer_norm_epsilon`.*1e-05"),
    ({"feed_forward_proj": "gelu"}, r"`feed_forward_proj`.*'gelu'"),
    ({"num_layers": 3}, r"missing.*encoder.block.2"),
    ({"d_ff": 21}, r"wi_0/kernel.*\(16, 21\).*got \(16, 20\)"),
  ],
)
def test_configurations_of_other_functions_are_refused(
  copied, changes, message
):
  edit_config(copied, **changes)
  with pytest.raises(ValueError, match=message):
    checkpoints.load(copied)


def test_missing_pickled_and_quantised_weights(copied, tmp_path):
  path = copied / "model.safetensors"
  weights = safetensors.numpy.load_file(path)
  weights["lm_head.weight"] = weights["lm_head.weight"].astype(np.int8)
  safetensors.numpy.save_file(weights, path)
  with pytest.raises(
    ValueError, match=r"int8 for 'lm_head.weight'.*unquantised"
  ):
    checkpoints.load(copied)
  path.unlink()
  (copied / "pytorch_model.bin").write_bytes(b"")
  with pytest.raises(FileNotFoundError, match=r"pickle.*never opened"):
    checkpoints.load(copied)
  sharded = shutil.copytree(
    GOLDEN / "huggingface" / "flan_t5", tmp_path / "sharded"
  )
  (sharded / "model-00002-of-00002.safetensors").unlink()
  with pytest.raises(FileNotFoundError, match=r"model-00002-of-00002.*missing"):
    checkpoints.load(sharded)


def test_sentence_pieces_or_bytes_beside_the_model(copied):
  assert huggingface.read_vocabulary(copied) is None
  write(copied / "tokenizer_config.json", {"tokenizer_class": "ByT5Tokenizer"})
  with pytest.raises(ValueError, match=r"at most 48 ids.*got 384"):
    checkpoints.load(copied)
  (copied / "tokenizer_config.json").unlink()
  toy_vocabulary.train(copied / "spiece.model")
  for kind, extra_ids in (("t5", 100), ("mt5", 0)):
    edit_config(copied, model_type=kind)
    assert huggingface.read_vocabulary(copied).extra_ids == extra_ids
  (copied / "tokenizer_config.json").write_text('{"extra_ids": 7}')
  assert huggingface.read_vocabulary(copied).extra_ids == 7


def test_another_start_is_the_row_that_decoding_begins_with(copied):
  """As of a model that starts with a token of its own."""
  edit_config(copied, decoder_start_token_id=5)
  inputs = dict(np.load(copied / "expected.npz"))
  started = run(copied, inputs)[1]
  inputs["decoder_input_ids"][:, 0] = 5
  plain = run(GOLDEN / "huggingface" / "t5_1_1", inputs)[1]
  np.testing.assert_allclose(started, plain, atol=1e-5)


@pytest.mark.parametrize("kind", ["codet5", "pile_t5", "t5_lm_adapt"])
def test_a_lone_tokenizer_gives_transformers_ids_and_texts(kind, tmp_path):
  pytest.importorskip("tokenizers")
  checkpoint = checkpoints.load(GOLDEN / "huggingface" / kind)
  rows = json.loads(
    (GOLDEN / "huggingface" / kind / "expected.json").read_text("utf-8")
  )
  made = checkpoint.vocabulary
  for row in rows:
    assert [*made.encode(row["text"]), made.eos_id] == row["ids"]
    # of T5's sentinels transformers can make no text
    if "extra_id" not in row["text"]:
      assert made.decode([*row["ids"], 7]) == row["decoded"]
  plain = rows[0]
  assert made.decode(plain["ids"]) == plain["decoded"] == plain["text"]
  assert plain["text"] in "".join(map(made.piece, plain["ids"]))
  # Stored beside a checkpoint of our own it is the same.
  checkpoints.save(
    tmp_path, checkpoint.params, checkpoint.config, vocabulary=made
  )
  again = checkpoints.load(tmp_path).vocabulary
  assert again == made and again.digest() == made.digest()


def test_ids_change_places_where_padding_is_not_0(copied, tmp_path):
  edit_config(copied, pad_token_id=1, eos_token_id=2, vocab_size=48)
  toy_vocabulary.train(
    copied / "spiece.model", pad_id=-1, unk_id=0, bos_id=1, eos_id=2
  )
  base = vocabulary.SentencePieceVocabulary(
    copied / "spiece.model", 0, padded=False
  )
  made = huggingface.read_vocabulary(copied)
  assert (made.pad_id, made.eos_id, made.unk_id) == (0, 2, 1)
  text = "the cat \u732b"
  ids = made.encode(text)
  assert 0 in base.encode(text) and 0 not in ids and 1 in ids
  assert made.decode([*ids, 0, 2, 7]) == base.decode(base.encode(text))
  assert made.piece(0) == base.piece(1) and made.piece(5) == base.piece(5)
  assert made.digest() != base.digest() and made.vocab_size == base.vocab_size
  config = network.T5Config(
    vocab_size=made.vocab_size, emb_dim=4, num_heads=1, head_dim=4
  )
  params = {
    p: np.zeros(s, np.float32)
    for p, s in parameters.expected_shapes(config).items()
  }
  checkpoints.save(
    tmp_path / "own", parameters.unflatten(params), config, vocabulary=made
  )
  assert checkpoints.load(tmp_path / "own").vocabulary == made


def test_generation_config_warns_and_may_alone_hold_the_ids(copied):
  (copied / "generation_config.json").write_text(
    '{"num_beams": 4, "do_sample": false}'
  )
  with pytest.warns(
    UserWarning, match=r"asks for num_beams=4; decoding here is greedy"
  ):
    checkpoints.load(copied)
  config = json.loads((copied / "config.json").read_text())
  del config["pad_token_id"], config["decoder_start_token_id"]
  (copied / "config.json").write_text(json.dumps(config))
  (copied / "generation_config.json").write_text(
    '{"pad_token_id": 3, "eos_token_id": 2}'
  )
  plain = checkpoints.load(GOLDEN / "huggingface" / "t5_1_1").params[
    "token_embedder"
  ]
  moved = checkpoints.load(copied).params["token_embedder"]["embedding"]
  # What decoding starts from is padding, unless it is named.
  np.testing.assert_array_equal(moved[[0, 3]], plain["embedding"][[3, 0]])


def test_a_bias_in_every_layer_is_decoded_as_the_network_computes_it():
  pytest.importorskip("tokenizers")
  directory = GOLDEN / "huggingface" / "pile_t5"
  with pytest.warns(inference.UntrainedExits):
    model = inference.load(
      directory, max_decode_length=8, max_input_length=32, batch_size=4
    )
  texts = ["the cat sat", "on the mat"]
  full = model.generate(texts, threshold=calibrate.NEVER_EXIT)
  for output, text in zip(full, texts, strict=True):
    inputs = jnp.array([[*model.vocabulary.encode(text), model.eos_id]])
    decoder_inputs = jnp.array([[0, *output.tokens[:-1]]])
    logits = network.Transformer(model.config).apply(
      {"params": model.params},
      *(inputs, decoder_inputs, jnp.ones_like(decoder_inputs)),
      enable_dropout=False,
    )
    best = np.argmax(logits[0, :, : model.vocabulary.vocab_size], axis=-1)
    assert tuple(best.tolist()) == output.tokens


PIECES = 44
SENTINELS = 100
SIZE = PIECES + SENTINELS
SPECIAL = {0: "<pad>", 1: "</s>", 2: "<unk>"}
COUNTED_DOWN = {SIZE - 1 - k: f"<extra_id_{k}>" for k in range(SENTINELS)}
ADDED = {SIZE: "<sep>", SIZE + 1: "<hl>"}


def write(path, value) -> None:
  path.write_text(json.dumps(value), "utf-8")


def write_decoder(folder, tokens, **options) -> None:
  """As transformers 4 lists every token with its flags, fast or slow."""
  decoder = {
    str(i): {
      "content": token,
      "lstrip": True,
      "rstrip": True,
      "special": i not in ADDED,
    }
    for i, token in tokens.items()
  }
  write(
    folder / "tokenizer_config.json",
    {"added_tokens_decoder": decoder, **options},
  )


def write_tokenizer(folder, tokens, special=()) -> None:
  """T5's fast tokenizer of the pieces beside it, with `tokens` after them."""
  tokenizers = pytest.importorskip("tokenizers")
  spm = sentencepiece.SentencePieceProcessor(
    model_file=str(folder / "spiece.model")
  )
  pieces = [(spm.id_to_piece(i), spm.get_score(i)) for i in range(len(spm))]
  pieces += [(COUNTED_DOWN[i], 0.0) for i in range(PIECES, SIZE)]
  made = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=2))
  made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
  made.decoder = tokenizers.decoders.Metaspace()
  made.add_special_tokens([*SPECIAL.values(), *COUNTED_DOWN.values()])
  made.add_tokens([token for token in tokens.values() if token not in special])
  made.add_special_tokens(list(special))
  made.post_processor = tokenizers.processors.TemplateProcessing(
    single="$A </s>", special_tokens=[("</s>", 1)]
  )
  made.save(str(folder / "tokenizer.json"))


CONFIG = {
  "model_type": "t5",
  "vocab_size": 192,
  "pad_token_id": 0,
  "eos_token_id": 1,
}


@pytest.fixture
def folder(tmp_path):
  """Pieces and a configuration whose embedding has rows to spare, as T5's."""
  toy_vocabulary.train(tmp_path / "spiece.model")
  write(tmp_path / "config.json", CONFIG)
  return tmp_path


def in_decoder(folder) -> None:
  write_decoder(folder, SPECIAL | COUNTED_DOWN | ADDED)


def in_added_tokens(folder) -> None:
  write(folder / "added_tokens.json", {token: i for i, token in ADDED.items()})


@pytest.mark.parametrize("listed", [None, in_decoder, in_added_tokens])
def test_added_tokens_are_encoded_and_decoded(folder, listed):
  # where transformers 5 lists them, and nowhere else
  write_tokenizer(folder, ADDED)
  if listed is not None:
    listed(folder)
  made = huggingface.read_vocabulary(folder)
  assert isinstance(made, vocabulary.TokenizerVocabulary)
  assert (made.vocab_size, made.pad_id, made.eos_id, made.unk_id) == (
    SIZE + 2,
    0,
    1,
    2,
  )
  ids = made.encode("the lazy<hl>dog<sep>")
  assert ids.count(SIZE + 1) == ids.count(SIZE) == 1
  assert made.decode([*ids, 1, 5]) == "the lazy<hl> dog<sep>"
  assert made.piece(SIZE) == "<sep>"
  # Elsewhere ids are those of the pieces.
  pieces = vocabulary.SentencePieceVocabulary(folder / "spiece.model")
  for text in toy_vocabulary.TEXTS[:3]:
    assert made.encode(text) == pieces.encode(text)
    assert made.decode(pieces.encode(text)) == text
  write_tokenizer(folder, ADDED, special=["<hl>"])  # special ones leave no text
  made = huggingface.read_vocabulary(folder)
  assert made.decode(made.encode("the<hl>dog")) == "the dog"


@pytest.mark.parametrize("listed", [in_decoder, in_added_tokens])
@pytest.mark.parametrize("stale", [False, True])
def test_added_tokens_that_no_fast_tokenizer_holds_are_refused(
  folder, listed, stale
):
  listed(folder)
  if stale:
    write_tokenizer(folder, {})
  message = (
    r"^Expected .*tokenizer.json' to hold .*, got .*'<sep>'.*; "
    r".*use_fast=True\)\.save_"
  )
  with pytest.raises(ValueError, match=message):
    huggingface.read_vocabulary(folder)


def ordinary_t5(folder) -> None:
  write_decoder(folder, SPECIAL | COUNTED_DOWN, extra_ids=SENTINELS)
  write(
    folder / "added_tokens.json",
    {token: i for i, token in COUNTED_DOWN.items()},
  )


def pieces_called_special(folder) -> None:
  """As MADLAD-400's languages, which have pieces of their own."""
  write_decoder(folder, SPECIAL | {3: "\n", 4: "<2xx>"})


def sentinels_beyond(folder) -> None:
  """As mT5's, opened by a class that adds a hundred to those among the
  pieces.
  """
  beyond = {i + SIZE: token for i, token in COUNTED_DOWN.items()}
  write_decoder(folder, SPECIAL | beyond)


@pytest.mark.parametrize(
  "written",
  [ordinary_t5, pieces_called_special, sentinels_beyond],
)
@pytest.mark.parametrize("fast", [False, True])
def test_ordinary_folders_keep_their_pieces(folder, written, fast):
  written(folder)
  if fast:
    write_tokenizer(folder, {})
  expected = vocabulary.SentencePieceVocabulary(
    folder / "spiece.model", SENTINELS
  )
  assert huggingface.read_vocabulary(folder) == expected


def test_bytes_have_no_added_tokens_and_may_be_named_by_the_configuration(
  folder,
):
  (folder / "spiece.model").unlink()
  byt5 = {
    "model_type": "t5",
    "vocab_size": 384,
    "tokenizer_class": "ByT5Tokenizer",
  }
  write(folder / "config.json", byt5)
  assert huggingface.read_vocabulary(folder) == vocabulary.ByteVocabulary()
  sentinels = {259 + k: f"<extra_id_{k}>" for k in range(125)}
  write_decoder(folder, SPECIAL | sentinels)
  assert huggingface.read_vocabulary(folder) == vocabulary.ByteVocabulary()
  write_decoder(folder, SPECIAL | sentinels | {384: "<sep>"})
  with pytest.raises(
    ValueError, match=r"^Expected .*, got '<sep>' \(384\) elsewhere"
  ):
    huggingface.read_vocabulary(folder)
  # The tokenizer's own word goes first, as in transformers.
  write(folder / "tokenizer_config.json", {"tokenizer_class": "T5Tokenizer"})
  assert huggingface.read_vocabulary(folder) is None


def write_words(path, tokens, special):
  tokenizers = pytest.importorskip("tokenizers")
  ids = {token: number for number, token in enumerate(tokens)}
  made = tokenizers.Tokenizer(
    tokenizers.models.WordLevel(ids, unk_token="<unk>")
  )
  made.add_special_tokens(special)
  made.save(str(path))


def test_pieces_that_end_a_text_otherwise_than_the_model_are_refused(tmp_path):
  toy_vocabulary.train(tmp_path / "spiece.model", unk_id=1, eos_id=2)
  write(tmp_path / "config.json", CONFIG)
  with pytest.raises(ValueError, match=r"token 1 \(`eos_token_id`\), got 2"):
    huggingface.read_vocabulary(tmp_path)
  for ends in (2, [2, 7], [7, 2], None):
    write(tmp_path / "config.json", CONFIG | {"eos_token_id": ends})
    made = huggingface.read_vocabulary(tmp_path)
    assert made is not None and made.eos_id == 2


def test_a_tokenizer_whose_end_is_another_token_is_refused(tmp_path):
  path = tmp_path / "tokenizer.json"
  write_words(
    path, ["[PAD]", "[unused1]", "<unk>", "[SEP]"], ["[PAD]", "<unk>", "[SEP]"]
  )
  write(tmp_path / "config.json", CONFIG)
  with pytest.raises(
    ValueError, match=r"special token at 1.*got '\[unused1\]'"
  ):
    huggingface.read_vocabulary(tmp_path)
  assert vocabulary.TokenizerVocabulary(path, eos_id=3).eos_id == 3


def repeated(step, count):
  return {"type": "Sequence", "normalizers": [step] * count}


def charsmap(content):
  return {
    "type": "Precompiled",
    "precompiled_charsmap": base64.b64encode(content).decode(),
  }


def replace(pattern, content):
  return {"type": "Replace", "pattern": pattern, "content": content}


FIXED = {
  **dict(
    direction="Right",
    pad_to_multiple_of=None,
    pad_id=0,
    pad_type_id=0,
    pad_token="<pad>",
  ),
  "strategy": {"Fixed": 10**9},
}


@pytest.fixture
def changed(tmp_path):
  """Writes a whole tokenizer with some fields exchanged; returns its path."""

  def write(**fields):
    path = tmp_path / "tokenizer.json"
    write_words(
      path, ["<pad>", "</s>", "<unk>", "a"], ["<pad>", "</s>", "<unk>"]
    )
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **fields}))
    return path

  return write


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("normalizer", replace({"Regex": "(a+)+c"}, "x")),
    ("decoder", {"type": "Strip", "content": "a", "start": 0, "stop": 10**9}),
  ],
)
def test_what_panics_in_the_package_is_refused_by_name(changed, name, value):
  path = changed(**{name: value})
  with pytest.raises(
    ValueError, match=r"Expected '.*tokenizer\.json' to (be|have|give)"
  ):
    made = vocabulary.TokenizerVocabulary(path)
    made.decode([*made.encode("a" * 40), 3])


IN_LITTLE_MEMORY = """
import resource, sys
from calm.data import vocabulary

resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
for path in sys.argv[1:]:
  try:
    made = vocabulary.TokenizerVocabulary(path)
    print(made.encode("a" * 9), made.decode([3]))
  except ValueError as error:
    print(str(error).replace("\\n", " "))
"""
REFUSED = "Expected '"
READ = "[2] a"
SMALL = (
  ({"padding": FIXED}, READ),
  ({"normalizer": charsmap(b"\xf0\xff\xff\xff" + b"\xff" * 40)}, REFUSED),
  ({"normalizer": repeated(replace({"String": "a"}, "aa"), 40)}, REFUSED),
  ({"normalizer": repeated(replace({"Regex": "."}, "aa"), 40)}, REFUSED),
  ({"normalizer": repeated(replace({"String": "a"}, "b"), 40)}, READ),
  (
    {"truncation": {"max_length": 1, "stride": 0, "strategy": "LongestFirst"}},
    READ,
  ),
)


def test_no_small_tokenizer_takes_gigabytes(changed, tmp_path):
  paths = [
    changed(**fields).rename(tmp_path / f"{n}.json")
    for n, (fields, _) in enumerate(SMALL)
  ]
  done = subprocess.run(
    [sys.executable, "-c", IN_LITTLE_MEMORY, *paths],
    capture_output=True,
    text=True,
    timeout=60,
    cwd=pathlib.Path(__file__).parents[2],
  )
  lines = done.stdout.splitlines()
  assert not done.returncode and len(lines) == len(SMALL), done.stderr[-400:]
  for line, (fields, told) in zip(lines, SMALL, strict=True):
    assert line.startswith(told), fields


@pytest.fixture(scope="module")
def maker():
  """The golden files' script, where torch and transformers are installed."""
  for name in ("torch", "transformers"):
    if importlib.util.find_spec(name) is None:
      pytest.skip(
        f"the live comparison needs torch and transformers: {name} is not "
        "installed"
      )
  path = GOLDEN / "make_huggingface.py"
  spec = importlib.util.spec_from_file_location("make_huggingface", path)
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.mark.hf
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_live_transformers_opens_what_we_write(kind, maker, tmp_path):
  golden = GOLDEN / "huggingface" / kind
  checkpoint = checkpoints.load(golden)
  huggingface.write(tmp_path, checkpoint.params, checkpoint.config)
  # What we write has our numbers of pieces, whatever it was read from.
  expected = dict(with_padding_0(golden, np.load(golden / "expected.npz")))
  fields = ("input_ids", "attention_mask", "decoder_input_ids")
  theirs = maker.run(tmp_path, {field: expected[field] for field in fields})
  real = expected["attention_mask"] > 0
  assert np.abs(theirs["encoded"] - expected["encoded"])[real].max() < TOLERANCE
  assert np.abs(theirs["logits"] - expected["logits"]).max() < TOLERANCE
