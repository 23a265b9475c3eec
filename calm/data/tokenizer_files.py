"""Vocabularies of Hugging Face folders: a `tokenizer.json`, and ids whose padding is not 0."""

import base64
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Iterable, Iterator
from typing import Any

from calm import storage
from calm.data import vocabulary as vocabulary_lib

SENTINEL = re.compile(r"<extra_id_\d+>")
_WORD_START = "\u2581"
# Characters that replacements may make of one; tokenizers of models make three of a few.
_MOST_GROWTH = 1000


@dataclasses.dataclass(frozen=True)
class TokenizerVocabulary:
  """A `tokenizer.json` of the package tokenizers, which transformers saves for every model.

  Attributes:
    path: the file; two vocabularies are equal when its bytes and ids are.
    eos_id: the token that ends a text.
    pad_id: padding.

  Raises:
    FileNotFoundError: there is no file at `path`.
    ValueError: the file is no tokenizer, or has no token `eos_id`.
    ImportError: the package tokenizers is not installed.
  """

  path: str | os.PathLike = dataclasses.field(compare=False)
  eos_id: int = 1
  pad_id: int = 0
  model: bytes = dataclasses.field(init=False, repr=False)

  def __post_init__(self):
    path = pathlib.Path(self.path)
    if not path.is_file():
      raise FileNotFoundError(
        f"Expected `path` to name a tokenizer.json, got {str(path)!r}, which is missing."
      )
    object.__setattr__(self, "model", storage.content(path))
    if self._tokenizer.id_to_token(self.eos_id) is None:
      raise ValueError(
        f"Expected {str(path)!r} to have the end-of-text token {self.eos_id}, got"
        f" {self._tokenizer.get_vocab_size()} tokens without it; it belongs to another model."
      )
    special = self._special
    if special and self.eos_id not in special:
      raise ValueError(
        f"Expected {str(path)!r} to have a special token at {self.eos_id}, which ends a text of"
        f" the model, got {self._tokenizer.id_to_token(self.eos_id)!r} beside"
        f" {sorted(special.values())[:4]}; it belongs to another model."
      )

  @functools.cached_property
  def _tokenizer(self) -> Any:
    try:
      import tokenizers
    except ImportError as error:
      raise ImportError(
        f"Expected the package tokenizers to read {str(self.path)!r}, got none; `pip install"
        " tokenizers`, or put the model's spiece.model beside it."
      ) from error
    with self._naming("to be a tokenizer.json that the package tokenizers reads"):
      content = storage.parse_json(self.model)
      for part in ("normalizer", "decoder"):
        _check_steps(part, content.get(part))
      made = tokenizers.Tokenizer.from_buffer(self.model)
      # What a model was once called with is saved beside its pieces; lengths are chosen here.
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
      if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise
      raise ValueError(
        f"Expected {str(self.path)!r} {expected}, got: {error!s:.300}; save the tokenizer"
        " again."
      ) from error

  @functools.cached_property
  def _content(self) -> dict[str, Any]:
    return json.loads(self.model)

  @functools.cached_property
  def _left_out(self) -> frozenset[int]:
    """Special tokens that are no text: all but the sentinels."""
    return frozenset(self._special) | {self.pad_id}

  @functools.cached_property
  def _special(self) -> dict[int, str]:
    """Tokens that the file calls special, by their ids, without the sentinels."""
    return {
      token["id"]: token["content"]
      for token in self._content.get("added_tokens") or ()
      if token.get("special") and not SENTINEL.fullmatch(token["content"])
    }

  @property
  def vocab_size(self) -> int:
    """Ids, added tokens included."""
    return self._size

  @functools.cached_property
  def _size(self) -> int:
    return 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())

  @property
  def extra_ids(self) -> int:
    """Sentinels at the end of the ids, `<extra_id_0>` last."""
    last, count = self.vocab_size - 1, 0
    while self._tokenizer.id_to_token(last - count) == f"<extra_id_{count}>":
      count += 1
    return count

  @property
  def unk_id(self) -> int | None:
    """The token of what has no other, or None."""
    model = self._content["model"]
    if model.get("unk_id") is not None:
      return model["unk_id"]
    token = model.get("unk_token")
    return None if token is None else self._tokenizer.token_to_id(token)

  def encode(self, s: str, /) -> list[int]:
    """Token ids of a text as transformers makes them, the EOS at their end left out."""
    vocabulary_lib.check_utf8(s)
    with self._naming(f"to have tokens for every text, so for {s[:40]!r}"):
      ids = self._tokenizer.encode(s).ids
    return ids[:-1] if ids[-1:] == [self.eos_id] else ids

  def decode(self, ids: Iterable[int], /) -> str:
    """Text of the ids before the first EOS; special tokens but sentinels are skipped."""
    kept = vocabulary_lib.until_eos(ids, self.eos_id, self.pad_id)
    texts = [i for i in kept if i not in self._left_out and i < self.vocab_size]
    with self._naming("to give a text for every list of tokens"):
      return self._tokenizer.decode(texts, skip_special_tokens=False)

  def piece(self, token_id: int, /) -> str:
    """What one token looks like on its own; a word's first piece begins with a space."""
    token = self._tokenizer.id_to_token(int(token_id))
    if token is None:
      return f"<unused_{int(token_id)}>"
    if token_id in self._left_out or SENTINEL.fullmatch(token):
      return token
    if "ByteLevel" in json.dumps(self._content.get("decoder")):
      with self._naming("to give a text for every token"):
        return self._tokenizer.decode([int(token_id)], skip_special_tokens=False)
    return token.replace(_WORD_START, " ")

  def digest(self) -> str:
    """sha256 (hexadecimal) of the file's bytes and the ids."""
    ids = f"\neos_id {self.eos_id} pad_id {self.pad_id}"
    return hashlib.sha256(self.model + ids.encode()).hexdigest()


def _check_steps(part: str, step: Any) -> None:
  """Refuses steps by which a few bytes of the file take gigabytes.

  Raises:
    ValueError: replacements that lengthen a text beyond `_MOST_GROWTH` times, one after the
      other, or a map of characters that is shorter than it says.
  """
  growth, left = 1.0, [step] if step else []
  while left:
    step = left.pop()
    left += step.get("normalizers") or step.get("decoders") or []
    if step["type"] == "Replace":
      # A regular expression may match one character; an empty text is found between all.
      found = len(step["pattern"].get("String", "x"))
      growth *= max(1.0, len(step["content"]) / found if found else 1 + len(step["content"]))
    if step["type"] == "Precompiled":
      table = base64.b64decode(step["precompiled_charsmap"] or "")
      if int.from_bytes(table[:4], "little") > len(table):
        raise ValueError(f"Expected `{part}` with a whole `precompiled_charsmap`, got a part")
    if growth > _MOST_GROWTH:
      raise ValueError(
        f"Expected `{part}` to lengthen a text at most {_MOST_GROWTH} times, got {growth:.3g}"
      )


@dataclasses.dataclass(frozen=True)
class Renumbered:
  """A vocabulary whose padding is not 0, with that id and 0 exchanged.

  The network takes token 0 for padding. Where another token has that id (MADLAD-400: 0 is
  `<unk>`, 1 is padding), the two change places here and in the model's rows (`checkpoints`),
  so that a 0 is padding and every token of a text counts.

  Attributes:
    base: the vocabulary as it was made.
    base_pad_id: padding in it, above 0.
  """

  base: Any
  base_pad_id: int

  pad_id = 0

  @property
  def vocab_size(self) -> int:
    return self.base.vocab_size

  @property
  def extra_ids(self) -> int:
    return self.base.extra_ids

  @property
  def eos_id(self) -> int:
    return self._swap(self.base.eos_id)

  @property
  def unk_id(self) -> int | None:
    return None if self.base.unk_id is None else self._swap(self.base.unk_id)

  def encode(self, s: str, /) -> list[int]:
    """Token ids of a text, without EOS."""
    return [self._swap(i) for i in self.base.encode(s)]

  def decode(self, ids: Iterable[int], /) -> str:
    """Text of the ids before the first EOS; padding is skipped."""
    kept = vocabulary_lib.until_eos(ids, self.eos_id, 0)
    return self.base.decode([self._swap(i) for i in kept])

  def piece(self, token_id: int, /) -> str:
    """What one token looks like on its own."""
    return self.base.piece(self._swap(int(token_id)))

  def digest(self) -> str:
    """sha256 (hexadecimal) of the vocabulary and its padding."""
    return hashlib.sha256(f"{self.base.digest()} pad {self.base_pad_id}".encode()).hexdigest()

  def _swap(self, token_id: int) -> int:
    return {0: self.base_pad_id, self.base_pad_id: 0}.get(token_id, token_id)
