"""Text <-> token ids without TensorFlow: SentencePiece models, raw bytes, a
`tokenizer.json`.

Ids of the first two are those of seqio's vocabularies of the same names: 0 is
padding, `encode` adds no EOS, and the extra ids (T5's sentinels) are the last
ones, `<extra_id_0>` last of all.
"""

import base64
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import pathlib
import re
import struct
from collections.abc import Iterable, Iterator
from typing import Any

import sentencepiece

from calm import arguments, storage
from calm.calibrate.generations import records

# The sentencepiece.ModelProto.SentencePiece.Type of pieces that are matched
# before any other.
_USER_DEFINED = 4
_WORD_START = "▁"
_MOST_EXTRA_IDS = 2**14
SENTINEL = re.compile(r"<extra_id_\d+>")
# The characters that the steps of a tokenizer may make of one; real ones make
# three of a few.
_MOST_GROWTH = 1000


class Vocabulary:
  """Text <-> ids over four functions of each kind; attributes and both ways as
  seqio's.
  """

  pad_id: Any = 0  # padding, which decodes to nothing
  eos_id: Any  # the token that ends a text
  unk_id: Any  # the token of what has no other, or None
  vocab_size: Any  # ids, extra ids included; the model may have more rows
  extra_ids: Any  # sentinels at the end of the ids
  _encode: Any  # (text) -> ids
  _decode: Any  # (ids that are neither padding nor EOS) -> text
  _piece: Any  # (id) -> its text, or None
  _identity: Any  # () -> bytes that determine the ids

  def encode(self, s: str, /) -> list[int]:
    """Token ids of a text, without EOS."""
    records.require_text("text", s)
    return self._encode(s)

  def decode(self, ids: Iterable[int], /) -> str:
    """Text of the ids, all 0 or above, before the first EOS; padding is
    skipped.
    """
    eos_id = self.eos_id
    pad_id = self.pad_id
    kept = list(itertools.takewhile(lambda i: i != eos_id, map(int, ids)))
    if kept and min(kept) < 0:
      raise ValueError(
        f"Expected `ids` to be token ids of 0 or more, got {min(kept)}."
      )
    return self._decode([i for i in kept if i != pad_id])

  def piece(self, token_id: int, /) -> str:
    """What one token looks like on its own; a word's first piece begins with a
    space.
    """
    found = self._piece(int(token_id))
    return f"<unused_{int(token_id)}>" if found is None else found

  def digest(self) -> str:
    """sha256 (hexadecimal) of what determines the ids."""
    return hashlib.sha256(self._identity()).hexdigest()


@dataclasses.dataclass(frozen=True)
class SentencePieceVocabulary(Vocabulary):
  """A SentencePiece model with `extra_ids` sentinels appended, as seqio appends
  them.

  Ids of no piece decode as unknown. FileNotFoundError or ValueError where
  `path` is none, its padding id is not 0, or it has no EOS piece.
  """

  path: str | os.PathLike = dataclasses.field(compare=False)
  extra_ids: int = 100  # of T5; 0 for mT5, whose model file already holds them
  # whether padding must be 0; else `Renumbered` makes it so
  padded: bool = True
  model: bytes = dataclasses.field(init=False, repr=False)

  vocab_size = property(lambda self: self._processor.get_piece_size())
  pad_id = property(lambda self: self._processor.pad_id())
  eos_id = property(lambda self: self._processor.eos_id())
  unk_id = property(lambda self: self._processor.unk_id())

  def __post_init__(self):
    _check_extra_ids(self.extra_ids)
    model = _content(
      self.path, "a SentencePiece model file (T5 calls it `spiece.model`)"
    )
    object.__setattr__(self, "model", model)
    if (self.padded and self.pad_id != 0) or self.eos_id < 0:
      raise ValueError(
        "Expected a SentencePiece model with padding id 0 and an EOS piece, "
        "got pad_id"
        f" {self.pad_id} and eos_id {self.eos_id} in {str(self.path)!r}."
      )

  @functools.cached_property
  def _processor(self) -> Any:
    processor = sentencepiece.SentencePieceProcessor()
    try:
      # The bare model first: appended pieces would make a model of any readable
      # rubbish.
      processor.LoadFromSerializedProto(self.model)
      processor.LoadFromSerializedProto(
        _with_extra_pieces(self.model, self.extra_ids)
      )
    except (RuntimeError, OSError) as error:
      message = (
        f"Expected `path` to be a SentencePiece model, got {str(self.path)!r}"
      )
      raise ValueError(f"{message} ({error}).") from error
    return processor

  def _encode(self, s: str) -> list[int]:
    return self._processor.encode(s)

  def _decode(self, ids: list[int]) -> str:
    size = self.vocab_size
    unknown = self.unk_id
    return self._processor.decode([i if i < size else unknown for i in ids])

  def _piece(self, token_id: int) -> str | None:
    if 0 <= token_id < self.vocab_size:
      return self._processor.id_to_piece(token_id).replace(_WORD_START, " ")
    return None

  def _identity(self) -> bytes:
    return self.model + f"\nextra_ids {self.extra_ids}".encode()


@dataclasses.dataclass(frozen=True)
class ByteVocabulary(Vocabulary):
  """UTF-8 bytes as tokens (ByT5): padding 0, EOS 1, unknown 2, byte b at b + 3.

  Tokens that are no bytes decode to nothing, and so does a character that the
  end of the sequence cuts off, as in seqio.
  """

  extra_ids: int = 125  # sentinels after the bytes: ByT5's 384 embedding rows

  eos_id = 1
  unk_id = 2

  vocab_size = property(lambda self: 3 + 256 + self.extra_ids)

  def __post_init__(self):
    _check_extra_ids(self.extra_ids)

  def _encode(self, s: str) -> list[int]:
    return [byte + 3 for byte in s.encode()]

  def _decode(self, ids: list[int]) -> str:
    return bytes(i - 3 for i in ids if 3 <= i < 259).decode(
      "utf-8", errors="ignore"
    )

  def _piece(self, token_id: int) -> str | None:
    """A character, or `<0xC3>` for part of one."""
    if 3 <= token_id < 131:
      return chr(token_id - 3)
    if 131 <= token_id < 259:
      return f"<0x{token_id - 3:02X}>"
    if 259 <= token_id < self.vocab_size:
      return f"<extra_id_{self.vocab_size - 1 - token_id}>"
    return {0: "<pad>", 1: "</s>", 2: "<unk>"}.get(token_id)

  def _identity(self) -> bytes:
    return f"utf-8 bytes, 3 special\nextra_ids {self.extra_ids}".encode()


@dataclasses.dataclass(frozen=True)
class TokenizerVocabulary(Vocabulary):
  """A `tokenizer.json` of the package tokenizers, which transformers saves for
  every model.

  Texts are encoded as by transformers, the EOS at their end left out; special
  tokens but sentinels decode to nothing. FileNotFoundError or ValueError where
  `path` is none, or has no token `eos_id`, or one that ends no text;
  ImportError without the package tokenizers.
  """

  path: str | os.PathLike = dataclasses.field(compare=False)
  eos_id: int = 1
  pad_id: int = 0
  model: bytes = dataclasses.field(init=False, repr=False)

  extra_ids = 0  # its sentinels may stand anywhere

  def __post_init__(self):
    object.__setattr__(self, "model", _content(self.path, "a tokenizer.json"))
    token = self._tokenizer.id_to_token(self.eos_id)
    if token is None or (self._special and self.eos_id not in self._special):
      raise ValueError(
        f"Expected {str(self.path)!r} to have a special token at "
        f"{self.eos_id}, where the model"
        f" ends texts, got {token!r}."
      )

  @functools.cached_property
  def _tokenizer(self) -> Any:
    tokenizers = arguments.package(
      "tokenizers", f"read {str(self.path)!r}", "tokenizers"
    )
    with self._naming(
      "to be a tokenizer.json that the package tokenizers reads"
    ):
      for part in ("normalizer", "decoder"):
        _check_steps(part, self._content.get(part))
      made = tokenizers.Tokenizer.from_buffer(self.model)
      # What a model was once called with is saved beside its pieces; lengths
      # are chosen here.
      made.no_truncation()
      made.no_padding()
      made.encode("a")  # some only say now what they lack
    return made

  @contextlib.contextmanager
  def _naming(self, expected: str) -> Iterator[None]:
    """Errors of the package name the file; its panics are no `Exception`."""
    try:
      yield
    except BaseException as error:
      if (
        not isinstance(error, Exception)
        and type(error).__name__ != "PanicException"
      ):
        raise
      message = f"Expected {str(self.path)!r} {expected}, got: {error!s:.300}."
      raise ValueError(message) from error

  @functools.cached_property
  def _content(self) -> dict[str, Any]:
    return storage.parse_json(self.model)

  @functools.cached_property
  def _special(self) -> set[int]:
    """Ids of the special tokens that are no text, so without the sentinels."""
    added = self._tokenizer.get_added_tokens_decoder().items()
    return {
      i for i, t in added if t.special and not SENTINEL.fullmatch(t.content)
    }

  @functools.cached_property
  def vocab_size(self) -> int:
    """Ids, added tokens included."""
    return 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())

  @property
  def unk_id(self) -> int | None:
    """The token of what has no other, or None."""
    model = self._content["model"]
    if model.get("unk_id") is None and model.get("unk_token") is not None:
      return self._tokenizer.token_to_id(model["unk_token"])
    return model.get("unk_id")

  def _encode(self, s: str) -> list[int]:
    with self._naming(f"to have tokens for every text, so for {s[:40]!r}"):
      ids = self._tokenizer.encode(s).ids
    return ids[:-1] if ids[-1:] == [self.eos_id] else ids

  def _decode(self, ids: list[int]) -> str:
    texts = [i for i in ids if i not in self._special and i < self.vocab_size]
    with self._naming("to give a text for every list of tokens"):
      return self._tokenizer.decode(texts, skip_special_tokens=False)

  def _piece(self, token_id: int) -> str | None:
    token = self._tokenizer.id_to_token(token_id)
    if token is None or token_id in self._special or SENTINEL.fullmatch(token):
      return token
    if "ByteLevel" in json.dumps(self._content.get("decoder")):
      with self._naming("to give a text for every token"):
        return self._tokenizer.decode([token_id], skip_special_tokens=False)
    return token.replace(_WORD_START, " ")

  def _identity(self) -> bytes:
    return self.model + f"\neos_id {self.eos_id} pad_id {self.pad_id}".encode()


@dataclasses.dataclass(frozen=True)
class Renumbered(Vocabulary):
  """A vocabulary whose padding is not 0 (MADLAD-400: 1), with that id and 0
  exchanged.

  The network takes token 0 for padding; the model's rows are exchanged too
  (`checkpoints`).
  """

  base: Any
  base_pad_id: int  # its padding, above 0

  vocab_size = property(lambda self: self.base.vocab_size)
  extra_ids = property(lambda self: self.base.extra_ids)
  eos_id = property(lambda self: self._swap(self.base.eos_id))
  unk_id = property(lambda self: self._swap(self.base.unk_id))

  def _swap(self, token_id: Any) -> Any:
    return {0: self.base_pad_id, self.base_pad_id: 0}.get(token_id, token_id)

  def _encode(self, s: str) -> list[int]:
    return [self._swap(i) for i in self.base.encode(s)]

  def _decode(self, ids: list[int]) -> str:
    return self.base.decode([self._swap(i) for i in ids])

  def _piece(self, token_id: int) -> str | None:
    return self.base.piece(self._swap(token_id))

  def _identity(self) -> bytes:
    return f"{self.base.digest()} pad {self.base_pad_id}".encode()


def check_fits(vocabulary: Vocabulary, num_rows: int) -> None:
  """Refuses more ids than embedding rows; fewer are fine: T5 pads 32100 ids to
  32128 rows.
  """
  if vocabulary.vocab_size > num_rows:
    raise ValueError(
      f"Expected `vocabulary` to have at most {num_rows} ids, the embedding "
      "rows of the model,"
      f" got {vocabulary.vocab_size}."
    )


def _with_extra_pieces(model: bytes, extra_ids: int) -> bytes:
  """The serialised model with T5's sentinels appended.

  Concatenated protocol buffers are merged, repeated fields one after another;
  so pieces (field 1 of ModelProto: text 1, score 2, type 3) are added without a
  protobuf library.
  """
  for i in reversed(range(extra_ids)):
    text = f"{_WORD_START}<extra_id_{i}>".encode()
    piece = bytes([0x0A, len(text)]) + text
    piece += (
      bytes([0x15]) + struct.pack("<f", 0.0) + bytes([0x18, _USER_DEFINED])
    )
    model += bytes([0x0A, len(piece)]) + piece
  return model


def _content(path: str | os.PathLike, expected: str) -> bytes:
  if not os.path.isfile(path):
    raise FileNotFoundError(
      f"Expected `path` to name {expected}, got {str(path)!r}, missing."
    )
  return storage.content(pathlib.Path(path))


def _check_extra_ids(extra_ids: Any) -> None:
  if type(extra_ids) is not int or not 0 <= extra_ids <= _MOST_EXTRA_IDS:
    expected = f"a whole number in [0, {_MOST_EXTRA_IDS}]"
    raise ValueError(
      f"Expected `extra_ids` to be {expected}, got {extra_ids!r}."
    )


def _check_steps(part: str, step: Any) -> None:
  """ValueError for steps by which a few bytes of the file would take
  gigabytes.
  """
  growth = 1.0
  left = [step] if step else []
  while left:
    step = left.pop()
    left += step.get("normalizers") or step.get("decoders") or []
    if step["type"] == "Replace":
      # A regular expression may match one character; an empty text is found
      # between all.
      found = len(step["pattern"].get("String", "x"))
      growth *= max(
        1.0, len(step["content"]) / found if found else 1 + len(step["content"])
      )
    if step["type"] == "Precompiled":
      table = base64.b64decode(step["precompiled_charsmap"] or "")
      if int.from_bytes(table[:4], "little") > len(table):
        raise ValueError(
          f"Expected `{part}` with a whole `precompiled_charsmap`, got a part"
        )
    if growth > _MOST_GROWTH:
      raise ValueError(
        f"Expected `{part}` to lengthen a text at most {_MOST_GROWTH} times, "
        f"got {growth:.3g}"
      )
