"""Tokens that were added to a tokenizer after its pieces: kept, or refused, never left out."""

import json

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


@pytest.fixture
def folder(tmp_path):
  """Pieces and a configuration whose embedding has rows to spare, as T5's."""
  toy_vocabulary.train(tmp_path / "spiece.model")
  ids = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
  write(tmp_path / "config.json", {"model_type": "t5", "vocab_size": 192, **ids})
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
