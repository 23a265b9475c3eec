"""Vocabularies: round trips, seqio's ids, and messages for what is no
vocabulary.
"""

import copy
import pathlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm.data import vocabulary
from calm.t5x import stored
from tests import toy_vocabulary

TEXTS = toy_vocabulary.TEXTS


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> pathlib.Path:
  return toy_vocabulary.train(
    tmp_path_factory.mktemp("vocabulary") / "tiny.model"
  )


@pytest.fixture(scope="module")
def pieces(model) -> vocabulary.SentencePieceVocabulary:
  return vocabulary.SentencePieceVocabulary(model)


@given(st.text())
def test_bytes_round_trip_any_text(text):
  vocab = vocabulary.ByteVocabulary()
  ids = vocab.encode(text)
  assert all(3 <= i < 259 for i in ids)
  assert vocab.decode(ids) == text


def test_decode_stops_at_eos_and_skips_padding(pieces):
  for vocab in (pieces, vocabulary.ByteVocabulary()):
    a = vocab.encode("lazy dog")
    b = vocab.encode(" fox")
    assert vocab.decode([0, *a, 0, 1, *b]) == "lazy dog"
    assert vocab.decode(np.array([*a, 1, 0, 0], np.int32)) == "lazy dog"
    assert vocab.decode([]) == vocab.decode([1]) == vocab.decode([0, 0]) == ""


def test_extra_ids_stand_at_the_end_and_count_downward(pieces):
  size = pieces.vocab_size
  assert size == 44 + 100
  assert pieces.encode("<extra_id_0>") == [size - 1]
  assert pieces.encode("<extra_id_99>") == [size - 100]
  assert pieces.piece(size - 1).strip() == "<extra_id_0>"
  byte = vocabulary.ByteVocabulary()
  assert byte.vocab_size == 384 and byte.piece(383) == "<extra_id_0>"
  assert byte.encode("aé") == [97 + 3, 0xC3 + 3, 0xA9 + 3]
  # Sentinels, the unknown token and half a character give no text.
  assert byte.decode([100, 2, 383, 0xC3 + 3]) == "a"


def test_pieces_join_to_the_text(pieces):
  text = "the lazy dog"
  assert "".join(pieces.piece(i) for i in pieces.encode(text)) == " " + text
  byte = vocabulary.ByteVocabulary()
  assert [byte.piece(i) for i in (0, 1, 2, 100, 0xC3 + 3, 999)] == [
    "<pad>",
    "</s>",
    "<unk>",
    "a",
    "<0xC3>",
    "<unused_999>",
  ]
  assert [pieces.piece(i) for i in (0, 1, 2, 144)] == [
    "<pad>",
    "</s>",
    "<unk>",
    "<unused_144>",
  ]


def test_digest_is_of_the_content_not_of_the_path(model, pieces, tmp_path):
  moved = tmp_path / "elsewhere.model"
  moved.write_bytes(model.read_bytes())
  same = vocabulary.SentencePieceVocabulary(moved)
  assert (
    same == pieces
    and same.digest() == pieces.digest()
    and len(same.digest()) == 64
  )
  others = [
    vocabulary.SentencePieceVocabulary(model, extra_ids=99),
    vocabulary.ByteVocabulary(),
    vocabulary.ByteVocabulary(extra_ids=0),
  ]
  assert len({pieces.digest(), *(other.digest() for other in others)}) == 4
  # Stored checkpoints and procedures hold these.
  assert vocabulary.ByteVocabulary().digest().startswith("4c3c3f287dff")
  for vocab in (pieces, others[1]):
    assert copy.deepcopy(vocab).encode("dog") == vocab.encode("dog")


def test_a_file_that_is_no_model_of_t5_is_refused(tmp_path):
  path = tmp_path / "bad.model"
  with pytest.raises(FileNotFoundError, match=r"`path`.*missing"):
    vocabulary.SentencePieceVocabulary(path)
  path.write_bytes(b"this is a text")
  with pytest.raises(
    ValueError, match=r"`path` to be a SentencePiece model.*bad.model"
  ):
    vocabulary.SentencePieceVocabulary(path)
  toy_vocabulary.train(path, pad_id=-1, eos_id=2, unk_id=0, bos_id=1)
  with pytest.raises(ValueError, match=r"padding id 0.*pad_id -1"):
    vocabulary.SentencePieceVocabulary(path)
  with pytest.raises(ValueError, match="`extra_ids`"):
    vocabulary.ByteVocabulary(-1)


@pytest.mark.tf
@pytest.mark.filterwarnings("ignore")
def test_ids_and_texts_are_those_of_seqio(model, pieces):
  seqio = pytest.importorskip("seqio", reason="needs seqio (TensorFlow)")
  pairs = [
    (pieces, seqio.SentencePieceVocabulary(str(model), extra_ids=100)),
    (vocabulary.ByteVocabulary(), seqio.ByteVocabulary(extra_ids=125)),
  ]
  for ours, theirs in pairs:
    for field in ("vocab_size", "pad_id", "eos_id", "unk_id"):
      assert getattr(ours, field) == getattr(theirs, field)
    for text in [
      *TEXTS[:3],
      "",
      "  two  spaces ",
      "é<extra_id_3>",
      "a <extra_id_99>ly zzz",
    ]:
      ids = ours.encode(text)
      assert ids == theirs.encode(text)
      assert ours.decode([*ids, 1, 5]) == theirs.decode([*ids, 1, 5])
    assert stored.our_vocabulary(theirs) == ours
