"""Tokenizers beside a model: added tokens are kept or refused, others' are refused by name."""

import base64
import json
import pathlib
import subprocess
import sys

import pytest
import sentencepiece

from calm.checkpoints import huggingface
from calm.data import vocabulary
from tests import toy_vocabulary

PIECES, SENTINELS = 44, 100
SIZE = PIECES + SENTINELS
SPECIAL = {0: "<pad>", 1: "</s>", 2: "<unk>"}
COUNTED_DOWN = {SIZE - 1 - k: f"<extra_id_{k}>" for k in range(SENTINELS)}
ADDED = {SIZE: "<sep>", SIZE + 1: "<hl>"}


def write(path, value) -> None:
  path.write_text(json.dumps(value), "utf-8")


def write_decoder(folder, tokens, **options) -> None:
  """As transformers 4 lists every token with its flags, fast or slow."""
  decoder = {
    str(i): {"content": token, "lstrip": True, "rstrip": True, "special": i not in ADDED}
    for i, token in tokens.items()
  }
  write(folder / "tokenizer_config.json", {"added_tokens_decoder": decoder, **options})


def write_tokenizer(folder, tokens, special=()) -> None:
  """T5's fast tokenizer of the pieces beside it, with `tokens` after them."""
  tokenizers = pytest.importorskip("tokenizers")
  spm = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
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


CONFIG = {"model_type": "t5", "vocab_size": 192, "pad_token_id": 0, "eos_token_id": 1}


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
  write_tokenizer(folder, ADDED)  # where transformers 5 lists them, and nowhere else
  if listed is not None:
    listed(folder)
  made = huggingface.read_vocabulary(folder)
  assert isinstance(made, vocabulary.TokenizerVocabulary)
  assert (made.vocab_size, made.pad_id, made.eos_id, made.unk_id) == (SIZE + 2, 0, 1, 2)
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
def test_added_tokens_that_no_fast_tokenizer_holds_are_refused(folder, listed, stale):
  listed(folder)
  if stale:
    write_tokenizer(folder, {})
  message = r"^Expected .*tokenizer.json' to hold .*, got .*'<sep>'.*; .*use_fast=True\)\.save_"
  with pytest.raises(ValueError, match=message):
    huggingface.read_vocabulary(folder)


def ordinary_t5(folder) -> None:
  write_decoder(folder, SPECIAL | COUNTED_DOWN, extra_ids=SENTINELS)
  write(folder / "added_tokens.json", {token: i for i, token in COUNTED_DOWN.items()})


def pieces_called_special(folder) -> None:
  """As MADLAD-400's languages, which have pieces of their own."""
  write_decoder(folder, SPECIAL | {3: "\n", 4: "<2xx>"})


def sentinels_beyond(folder) -> None:
  """As mT5's, opened by a class that adds a hundred to those among the pieces."""
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
  expected = vocabulary.SentencePieceVocabulary(folder / "spiece.model", SENTINELS)
  assert huggingface.read_vocabulary(folder) == expected


def test_bytes_have_no_added_tokens_and_may_be_named_by_the_configuration(folder):
  (folder / "spiece.model").unlink()
  byt5 = {"model_type": "t5", "vocab_size": 384, "tokenizer_class": "ByT5Tokenizer"}
  write(folder / "config.json", byt5)
  assert huggingface.read_vocabulary(folder) == vocabulary.ByteVocabulary()
  sentinels = {259 + k: f"<extra_id_{k}>" for k in range(125)}
  write_decoder(folder, SPECIAL | sentinels)
  assert huggingface.read_vocabulary(folder) == vocabulary.ByteVocabulary()
  write_decoder(folder, SPECIAL | sentinels | {384: "<sep>"})
  with pytest.raises(ValueError, match=r"^Expected .*, got '<sep>' \(384\) elsewhere"):
    huggingface.read_vocabulary(folder)
  # The tokenizer's own word goes first, as in transformers.
  write(folder / "tokenizer_config.json", {"tokenizer_class": "T5Tokenizer"})
  assert huggingface.read_vocabulary(folder) is None


def write_words(path, tokens, special):
  tokenizers = pytest.importorskip("tokenizers")
  ids = {token: number for number, token in enumerate(tokens)}
  made = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<unk>"))
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
  write_words(path, ["[PAD]", "[unused1]", "<unk>", "[SEP]"], ["[PAD]", "<unk>", "[SEP]"])
  write(tmp_path / "config.json", CONFIG)
  with pytest.raises(ValueError, match=r"special token at 1.*got '\[unused1\]'"):
    huggingface.read_vocabulary(tmp_path)
  assert vocabulary.TokenizerVocabulary(path, eos_id=3).eos_id == 3


def repeated(step, count):
  return {"type": "Sequence", "normalizers": [step] * count}


def charsmap(content):
  return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(content).decode()}


def replace(pattern, content):
  return {"type": "Replace", "pattern": pattern, "content": content}


FIXED = {
  **dict(
    direction="Right", pad_to_multiple_of=None, pad_id=0, pad_type_id=0, pad_token="<pad>"
  ),
  "strategy": {"Fixed": 10**9},
}
TEMPLATE = {
  **dict(type="TemplateProcessing", special_tokens={}, pair=[]),
  "single": [
    {"Sequence": {"id": "A", "type_id": 0}},
    {"SpecialToken": {"id": "<absent>", "type_id": 0}},
  ],
}


@pytest.fixture
def changed(tmp_path):
  """Writes a whole tokenizer with some fields exchanged; returns its path."""

  def write(**fields):
    path = tmp_path / "tokenizer.json"
    write_words(path, ["<pad>", "</s>", "<unk>", "a"], ["<pad>", "</s>", "<unk>"])
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **fields}))
    return path

  return write


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("normalizer", replace({"Regex": "(a+)+c"}, "x")),
    ("post_processor", TEMPLATE),
    ("decoder", {"type": "Strip", "content": "a", "start": 0, "stop": 10**9}),
  ],
)
def test_what_panics_in_the_package_is_refused_by_name(changed, name, value):
  path = changed(**{name: value})
  with pytest.raises(ValueError, match=r"Expected '.*tokenizer\.json' to (be|have|give)"):
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
REFUSED, READ = "Expected '", "[2] a"
SMALL = (
  ({"padding": FIXED}, READ),
  ({"normalizer": charsmap(b"\xf0\xff\xff\xff" + b"\xff" * 40)}, REFUSED),
  ({"normalizer": repeated(replace({"String": "a"}, "aa"), 40)}, REFUSED),
  ({"normalizer": repeated(replace({"Regex": "."}, "aa"), 40)}, REFUSED),
  ({"normalizer": repeated(replace({"String": "a"}, "b"), 40)}, READ),
  ({"truncation": {"max_length": 1, "stride": 0, "strategy": "LongestFirst"}}, READ),
)


def test_no_small_tokenizer_takes_gigabytes(changed, tmp_path):
  paths = [
    changed(**fields).rename(tmp_path / f"{n}.json") for n, (fields, _) in enumerate(SMALL)
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
