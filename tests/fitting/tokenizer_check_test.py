"""A tokenizer that is not the model's shows in the model's own loss, whatever its size."""

import dataclasses
import re

import pytest
import sentencepiece

from calm import inference, training
from calm.calibrate import Prompt
from calm.calibrate.generations import records
from calm.data import vocabulary
from calm.fitting import tokenizer_check

ROWS = records.read_prompts(inference.PACKED / "prompts_unseen.jsonl")[:200]


@pytest.fixture(scope="module")
def model():
  return inference.load("packed")


def sentencepiece_model(folder, texts):
  """Pieces of the same texts, counted otherwise."""
  path = folder / "other"
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(texts),
    model_prefix=str(path),
    vocab_size=3000,
    hard_vocab_limit=False,
    pad_id=0,
    eos_id=1,
    unk_id=2,
    bos_id=-1,
    minloglevel=2,
  )
  return vocabulary.SentencePieceVocabulary(path.with_suffix(".model"), extra_ids=90)


def tokenizer_json(folder, texts):
  """Byte pairs, as GPT's kin have them."""
  tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
  made = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
  made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
  special = ["<pad>", "</s>", "<unk>"]
  trainer = tokenizers.trainers.BpeTrainer(vocab_size=4000, special_tokens=special)
  made.train_from_iterator(texts, trainer)
  made.save(str(folder / "tokenizer.json"))
  return vocabulary.TokenizerVocabulary(folder / "tokenizer.json")


OTHERS = {
  "pieces": sentencepiece_model,
  "byte pairs": tokenizer_json,
  "bytes": lambda folder, texts: vocabulary.ByteVocabulary(extra_ids=0),
}


@pytest.mark.parametrize("rows", [ROWS, [Prompt(row.id, row.input) for row in ROWS]])
def test_a_model_knows_its_own_tokens(model, rows):
  assert tokenizer_check.warning(model, rows) == ""


def test_other_texts_than_the_model_was_trained_on_change_nothing_of_that(model):
  """Written the other way round, and without spaces."""
  turned = [Prompt(row.id, row.targets[0] * 5, (row.input,)) for row in ROWS]
  close = [Prompt(row.id, row.input.replace(" ", "")) for row in ROWS]
  assert tokenizer_check.warning(model, turned) == tokenizer_check.warning(model, close) == ""


@pytest.mark.parametrize("name", OTHERS)
def test_a_tokenizer_of_another_model_is_named(model, name, tmp_path):
  texts = [row.input for row in ROWS]
  other = OTHERS[name](tmp_path, texts)
  assert other.vocab_size <= model.config.vocab_size
  strange = dataclasses.replace(model, vocabulary=other)
  told = tokenizer_check.warning(strange, ROWS)
  assert re.search(r"probably not the model's: .* Put the tokenizer that", told)
  bare = [Prompt(row.id, row.input) for row in ROWS]
  assert tokenizer_check.warning(strange, bare)


def test_nothing_is_told_of_a_model_that_was_never_trained(model):
  fresh = dataclasses.replace(model, params=training.init_params(model.config, 0))
  assert tokenizer_check.never_trained(fresh) and not tokenizer_check.never_trained(model)
  assert tokenizer_check.warning(fresh, ROWS) == ""
  own, exchanged = tokenizer_check.losses(fresh, [("a text", "another")] * 8)
  assert exchanged - own < tokenizer_check.LEAST_GAIN
