"""A tokenizer of another model that its special tokens give away, refused when it is opened."""

import json

import pytest

from calm.checkpoints import huggingface
from calm.data import tokenizer_files
from tests import toy_vocabulary

CONFIG = {"model_type": "t5", "pad_token_id": 0, "eos_token_id": 1}


def write_config(folder, **changes):
  (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}), "utf-8")


def write_tokenizer(path, tokens, special):
  tokenizers = pytest.importorskip("tokenizers")
  ids = {token: number for number, token in enumerate(tokens)}
  made = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<unk>"))
  made.add_special_tokens(special)
  made.save(str(path))


def test_pieces_that_end_a_text_otherwise_than_the_model_are_refused(tmp_path):
  toy_vocabulary.train(tmp_path / "spiece.model", unk_id=1, eos_id=2)
  write_config(tmp_path)
  with pytest.raises(ValueError, match=r"token 1 \(`eos_token_id`\), got 2; it belongs to ano"):
    huggingface.read_vocabulary(tmp_path)
  for ends in (2, [2, 7], [7, 2], None):
    write_config(tmp_path, eos_token_id=ends)
    made = huggingface.read_vocabulary(tmp_path)
    assert made is not None and made.eos_id == 2


def test_a_tokenizer_whose_end_is_another_token_is_refused(tmp_path):
  path = tmp_path / "tokenizer.json"
  write_tokenizer(path, ["[PAD]", "[unused1]", "<unk>", "[SEP]"], ["[PAD]", "<unk>", "[SEP]"])
  write_config(tmp_path)
  with pytest.raises(ValueError, match=r"special token at 1.*got '\[unused1\]'.*another model"):
    huggingface.read_vocabulary(tmp_path)
  assert tokenizer_files.TokenizerVocabulary(path, eos_id=3).eos_id == 3


@pytest.mark.parametrize("special", [[], ["<extra_id_0>"]])
def test_where_nothing_is_called_special_nothing_is_told(tmp_path, special):
  path = tmp_path / "tokenizer.json"
  write_tokenizer(path, ["<pad>", "</s>", "<unk>", "<extra_id_0>"], special)
  assert tokenizer_files.TokenizerVocabulary(path).eos_id == 1
