"""Text <-> token ids without TensorFlow: SentencePiece models and raw bytes.

Ids are those of seqio's vocabularies of the same names, so that a model trained through seqio
is decoded here as it was trained: 0 is padding, EOS is never added by `encode`, and the extra
ids (T5's sentinels) stand at the end of the vocabulary, `<extra_id_0>` last.
"""

import dataclasses
import hashlib
import os
import pathlib
import struct
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

import sentencepiece

from calm import storage

# The sentencepiece.ModelProto.SentencePiece.Type of pieces that are matched before any other.
_USER_DEFINED = 4
_WORD_START = "▁"
_MOST_EXTRA_IDS = 2**14


@runtime_checkable
class Vocabulary(Protocol):
  """What decoding needs of a vocabulary; seqio's own vocabularies fit it too."""

  @property
  def vocab_size(self) -> int:
    """Number of ids, extra ids included; the model may have more embedding rows."""
    ...

  @property
  def pad_id(self) -> int: ...

  @property
  def eos_id(self) -> int | None: ...

  @property
  def unk_id(self) -> int | None: ...

  def encode(self, s: str, /) -> Sequence[int]:
    """Token ids of a text, without EOS."""
    ...

  def decode(self, ids: Iterable[int], /) -> str:
    """Text of the ids before the first EOS; padding is skipped."""
    ...


@dataclasses.dataclass(frozen=True)
class SentencePieceVocabulary:
  """A SentencePiece model with `extra_ids` sentinels appended, as seqio appends them.

  Attributes:
    path: the model file; two vocabularies are equal when its bytes and `extra_ids` are.
    extra_ids: number of `<extra_id_N>` pieces after the model's own (100 for T5; 0 for mT5,
      whose model file already holds them).
    padded: whether padding must be 0, as it is in all of T5's models; where it is not
      (MADLAD-400), `tokenizer_files.Renumbered` makes it so.

  Raises:
    FileNotFoundError: there is no file at `path`.
    ValueError: the file is no SentencePiece model, its padding id is not 0 (the network masks
      token 0), or it has no EOS piece.
  """

  path: str | os.PathLike = dataclasses.field(compare=False)
  extra_ids: int = 100
  padded: bool = True
  model: bytes = dataclasses.field(init=False, repr=False)
  _processor: Any = dataclasses.field(init=False, repr=False, compare=False)

  def __post_init__(self):
    _check_extra_ids(self.extra_ids)
    path = pathlib.Path(self.path)
    if not path.is_file():
      raise FileNotFoundError(
        f"Expected `path` to name a SentencePiece model file, got {str(path)!r}, which is"
        " missing; give the path of a `.model` file (T5 calls it `spiece.model`)."
      )
    object.__setattr__(self, "model", storage.content(path))
    processor = _load(self.model, self.extra_ids, path, padded=self.padded)
    object.__setattr__(self, "_processor", processor)

  @property
  def vocab_size(self) -> int:
    """Pieces of the model plus extra ids."""
    return self._processor.get_piece_size()

  @property
  def pad_id(self) -> int:
    return self._processor.pad_id()

  @property
  def eos_id(self) -> int:
    return self._processor.eos_id()

  @property
  def unk_id(self) -> int:
    return self._processor.unk_id()

  def encode(self, s: str, /) -> list[int]:
    """Token ids of a text, without EOS."""
    check_utf8(s)
    return self._processor.encode(s)

  def decode(self, ids: Iterable[int], /) -> str:
    """Text of the ids before the first EOS; padding is skipped, ids of no piece are unknown."""
    kept = until_eos(ids, self.eos_id, self.pad_id)
    return self._processor.decode([i if i < self.vocab_size else self.unk_id for i in kept])

  def piece(self, token_id: int, /) -> str:
    """What one token looks like on its own; a word's first piece begins with a space."""
    if not 0 <= token_id < self.vocab_size:
      return _unused(token_id)
    return self._processor.id_to_piece(int(token_id)).replace(_WORD_START, " ")

  def digest(self) -> str:
    """sha256 (hexadecimal) of the model's bytes and the number of extra ids."""
    return _digest(self.model, self.extra_ids)


@dataclasses.dataclass(frozen=True)
class ByteVocabulary:
  """UTF-8 bytes as tokens (ByT5): padding 0, EOS 1, unknown 2, byte b at b + 3.

  Attributes:
    extra_ids: sentinels after the 256 bytes; 125 makes ByT5's 384 embedding rows.
  """

  extra_ids: int = 125

  pad_id = 0
  eos_id = 1
  unk_id = 2

  def __post_init__(self):
    _check_extra_ids(self.extra_ids)

  @property
  def vocab_size(self) -> int:
    """Three special tokens, 256 bytes, and the extra ids."""
    return 3 + 256 + self.extra_ids

  def encode(self, s: str, /) -> list[int]:
    """Token ids of a text, one a byte of its UTF-8, without EOS."""
    return [byte + 3 for byte in check_utf8(s)]

  def decode(self, ids: Iterable[int], /) -> str:
    """Text of the bytes before the first EOS; tokens that are no bytes are skipped.

    A character cut off by the end of the sequence is dropped, as in seqio.
    """
    kept = until_eos(ids, self.eos_id, self.pad_id)
    return bytes(i - 3 for i in kept if 3 <= i < 259).decode("utf-8", errors="ignore")

  def piece(self, token_id: int, /) -> str:
    """What one token looks like on its own: a character, or `<0xC3>` for part of one."""
    if 3 <= token_id < 131:
      return chr(token_id - 3)
    if 131 <= token_id < 259:
      return f"<0x{token_id - 3:02X}>"
    if 259 <= token_id < self.vocab_size:
      return f"<extra_id_{self.vocab_size - 1 - token_id}>"
    return {0: "<pad>", 1: "</s>", 2: "<unk>"}.get(int(token_id), _unused(token_id))

  def digest(self) -> str:
    """sha256 (hexadecimal) of this kind of vocabulary and the number of extra ids."""
    return _digest(b"utf-8 bytes, 3 special", self.extra_ids)


def from_seqio(vocabulary: Any) -> SentencePieceVocabulary | ByteVocabulary:
  """The vocabulary of ours with the same ids as one of seqio's, which adds `digest`, `piece`.

  Args:
    vocabulary: `seqio.SentencePieceVocabulary` or `seqio.ByteVocabulary`.

  Raises:
    ValueError: another kind, or SentencePiece options that change ids (normalizer overrides,
      extra ids that count upward).
  """
  kind = type(vocabulary).__name__
  if kind == "ByteVocabulary":
    return ByteVocabulary(extra_ids=vocabulary.extra_ids)
  if not hasattr(vocabulary, "sentencepiece_model_file"):
    raise ValueError(
      "Expected `vocabulary` to be seqio's SentencePieceVocabulary or ByteVocabulary, got"
      f" {kind}; give an object of your own with `encode`, `decode` and the ids instead."
    )
  ours = SentencePieceVocabulary(
    vocabulary.sentencepiece_model_file, extra_ids=vocabulary.extra_ids
  )
  last = ours.vocab_size - 1
  counts_down = vocabulary.tokenizer.id_to_piece(last) == ours._processor.id_to_piece(last)
  if not counts_down or getattr(vocabulary, "_normalizer_spec_overrides", None) is not None:
    raise ValueError(
      "Expected `vocabulary` to use its model file as it is, with extra ids counted downward,"
      " got normalizer overrides or `reverse_extra_ids=False`, which change the ids; bake them"
      " into the model file."
    )
  return ours


def check_fits(vocabulary: Vocabulary, num_rows: int) -> None:
  """Refuses a vocabulary with more ids than the model has embedding rows.

  Fewer are fine: T5 pads 32100 ids to 32128 rows, and decoding never emits the rest.

  Raises:
    ValueError: `vocabulary.vocab_size` exceeds `num_rows`.
  """
  if vocabulary.vocab_size > num_rows:
    raise ValueError(
      f"Expected `vocabulary` to have at most {num_rows} ids, the embedding rows of the model,"
      f" got {vocabulary.vocab_size}; use the vocabulary that the model was trained with (or"
      " fewer `extra_ids`)."
    )


def _load(model: bytes, extra_ids: int, path: pathlib.Path, *, padded: bool):
  processor = sentencepiece.SentencePieceProcessor()
  try:
    # The bare model first: appended pieces would make a model of any readable rubbish.
    processor.LoadFromSerializedProto(model)
    processor.LoadFromSerializedProto(_with_extra_pieces(model, extra_ids))
  except (RuntimeError, OSError) as error:
    raise ValueError(
      f"Expected `path` to be a SentencePiece model, got {str(path)!r} ({len(model)} bytes),"
      f" which cannot be parsed ({error}); fetch the file again or give another."
    ) from error
  if (padded and processor.pad_id() != 0) or processor.eos_id() < 0:
    raise ValueError(
      "Expected `path` to be a SentencePiece model with padding id 0 and an EOS piece, as T5's"
      f" are, got {str(path)!r} with pad_id {processor.pad_id()} and eos_id"
      f" {processor.eos_id()}; train it with pad_id=0, eos_id=1, unk_id=2, bos_id=-1."
    )
  return processor


def _with_extra_pieces(model: bytes, extra_ids: int) -> bytes:
  """The serialised model with T5's sentinels appended.

  Concatenated protocol buffers are merged, repeated fields one after another; so pieces
  (field 1 of ModelProto: text 1, score 2, type 3) are added without a protobuf library.
  """
  for i in reversed(range(extra_ids)):
    text = f"{_WORD_START}<extra_id_{i}>".encode()
    piece = bytes([0x0A, len(text)]) + text
    piece += bytes([0x15]) + struct.pack("<f", 0.0) + bytes([0x18, _USER_DEFINED])
    model += bytes([0x0A, len(piece)]) + piece
  return model


def check_utf8(text: str) -> bytes:
  """A text's UTF-8.

  Raises:
    ValueError: it holds half of a surrogate pair.
  """
  try:
    return text.encode("utf-8")
  except UnicodeEncodeError as error:
    raise ValueError(
      "Expected a text that UTF-8 can hold, got half of a surrogate pair,"
      f" {text[error.start]!r}, at character {error.start + 1}; read the text as UTF-8."
    ) from error


def until_eos(ids: Iterable[int], eos_id: int, pad_id: int) -> list[int]:
  """The ids before the first EOS, without padding.

  Raises:
    ValueError: an id is below 0.
  """
  kept = []
  for token_id in map(int, ids):
    if token_id == eos_id:
      break
    if token_id < 0:
      raise ValueError(
        f"Expected `ids` to be token ids of 0 or more, got {token_id}; mask such positions with"
        f" the padding id {pad_id}."
      )
    if token_id != pad_id:
      kept.append(token_id)
  return kept


def _unused(token_id: int) -> str:
  return f"<unused_{int(token_id)}>"


def _digest(content: bytes, extra_ids: int) -> str:
  return hashlib.sha256(content + f"\nextra_ids {extra_ids}".encode()).hexdigest()


def _check_extra_ids(extra_ids: int) -> None:
  if not isinstance(extra_ids, int) or isinstance(extra_ids, bool):
    raise ValueError(
      f"Expected `extra_ids` to be a whole number, got {extra_ids!r}; T5 has 100."
    )
  if not 0 <= extra_ids <= _MOST_EXTRA_IDS:
    raise ValueError(
      f"Expected `extra_ids` to be 0 or more, and at most {_MOST_EXTRA_IDS}, got {extra_ids};"
      " T5 has 100, ByT5 125, mT5 0."
    )
