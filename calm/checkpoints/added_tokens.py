"""Tokens that were added to the tokenizer of a Hugging Face folder, after its pieces.

A model that was trained after `add_tokens` has rows for tokens that `spiece.model` lacks.
transformers lists them in tokenizer.json and, before its version 5, in added_tokens.json and in
`added_tokens_decoder` of tokenizer_config.json, among padding, EOS and T5's sentinels, which
any folder may list.
"""

import pathlib
from collections.abc import Iterator
from typing import Any

from calm.checkpoints import files
from calm.data import tokenizer_files, vocabulary

_Pieces = vocabulary.SentencePieceVocabulary | vocabulary.ByteVocabulary


def need_tokenizer(directory: pathlib.Path, pieces: _Pieces) -> bool:
  """Whether the folder has tokens that `pieces` lack, all of them in its tokenizer.json.

  Args:
    directory: the folder.
    pieces: the vocabulary without added tokens. A token at the id of one of its pieces is that
      piece, listed for its flags; a sentinel is its own, wherever it stands.

  Raises:
    ValueError: tokenizer.json lacks one of them, or a list is of another form.
  """
  held = dict(_in_tokenizer(directory / "tokenizer.json"))
  listed = [
    *held.items(),
    *_in_added_tokens(directory / "added_tokens.json"),
    *_in_options(directory / "tokenizer_config.json"),
  ]
  first = pieces.vocab_size - pieces.extra_ids
  added = {i: t for i, t in listed if i >= first and not tokenizer_files.SENTINEL.fullmatch(t)}
  for token_id, token in added.items():
    if held.get(token_id) != token:
      _refuse(directory, pieces, f"{token!r} ({token_id})")
  return bool(added)


def _refuse(directory: pathlib.Path, pieces: _Pieces, got: str) -> None:
  if isinstance(pieces, vocabulary.ByteVocabulary):
    raise ValueError(
      f"Expected {str(directory)!r} to have no tokens beyond ByT5's bytes and sentinels, got"
      f" {got}; train it without added tokens."
    )
  raise ValueError(
    f"Expected {str(directory / 'tokenizer.json')!r} to hold the tokens that were added to the"
    f" pieces of spiece.model, got a folder that lists {got} elsewhere only; save it once with"
    " a fast tokenizer:"
    " AutoTokenizer.from_pretrained(FOLDER, use_fast=True).save_pretrained(FOLDER)."
  )


def _in_tokenizer(path: pathlib.Path) -> Iterator[tuple[int, str]]:
  tokens = _read(path).get("added_tokens") or []
  for token in tokens if isinstance(tokens, list) else [tokens]:
    given = token if isinstance(token, dict) else {}
    yield _checked(path, given.get("id"), given.get("content"), token)


def _in_added_tokens(path: pathlib.Path) -> Iterator[tuple[int, str]]:
  for token, token_id in _read(path).items():
    yield _checked(path, token_id, token, {token: token_id})


def _in_options(path: pathlib.Path) -> Iterator[tuple[int, str]]:
  tokens = _read(path).get("added_tokens_decoder") or {}
  for text, token in tokens.items() if isinstance(tokens, dict) else [("", tokens)]:
    token_id = int(text) if text.isdecimal() and len(text) < 10 else None
    given = token if isinstance(token, dict) else {}
    yield _checked(path, token_id, given.get("content"), token)


def _read(path: pathlib.Path) -> dict[str, Any]:
  return files.read_json(path) if path.exists() else {}


def _checked(path: pathlib.Path, token_id: Any, token: Any, said: Any) -> tuple[int, str]:
  if type(token_id) is not int or not isinstance(token, str):
    raise ValueError(
      f"Expected {str(path)!r} to list added tokens, each a text with its id, got"
      f" {repr(said)[:60]}; save the tokenizer again."
    )
  return token_id, token
