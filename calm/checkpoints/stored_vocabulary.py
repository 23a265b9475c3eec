"""A vocabulary beside a checkpoint of our own: vocabulary.json, and the file that it names."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from calm.checkpoints import files
from calm.data import tokenizer_files
from calm.data import vocabulary as vocabularies

Vocabulary = (
  vocabularies.SentencePieceVocabulary
  | vocabularies.ByteVocabulary
  | tokenizer_files.TokenizerVocabulary
  | tokenizer_files.Renumbered
)
RECORD = "vocabulary.json"
# Kind -> the file that holds it, if any.
_FILES: Mapping[str, str | None] = {
  "sentencepiece": "vocabulary.model",
  "tokenizer": "tokenizer.json",
  "bytes": None,
}
NAMES = (RECORD, *(name for name in _FILES.values() if name))


def writers(vocabulary: Vocabulary) -> dict[str, Callable[[pathlib.Path], Any]]:
  """Writers for `files.write_together`."""
  base: Any = getattr(vocabulary, "base", vocabulary)
  if isinstance(base, tokenizer_files.TokenizerVocabulary):
    record = {"kind": "tokenizer", "eos_id": base.eos_id, "pad_id": base.pad_id}
  else:
    kind = "sentencepiece" if hasattr(base, "model") else "bytes"
    record = {"kind": kind, "extra_ids": base.extra_ids}
  if isinstance(vocabulary, tokenizer_files.Renumbered):
    record["base_pad_id"] = vocabulary.base_pad_id
  record["digest"] = vocabulary.digest()
  name, made = _FILES[record["kind"]], {}
  if name is not None:
    made[name] = lambda path: path.write_bytes(base.model)
  return {**made, RECORD: files.json_writer(record)}


def read(directory: pathlib.Path) -> Vocabulary | None:
  """The vocabulary that `writers` wrote, or None where there is none.

  Raises:
    FileNotFoundError: its file is missing.
    ValueError: an unknown kind, or another file than was saved.
  """
  if not (directory / RECORD).is_file():
    return None
  record = files.read_json(directory / RECORD)
  kind = str(record.get("kind"))
  if kind not in _FILES:
    raise ValueError(
      f"Expected {RECORD} to be of a kind of {', '.join(map(repr, _FILES))}, got {kind!r} in"
      f" {str(directory)!r}; give `vocabulary` instead."
    )
  with files.naming(directory / RECORD):
    made = _base(directory / (_FILES[kind] or ""), record)
    if "base_pad_id" in record:
      made = tokenizer_files.Renumbered(made, _id(record, "base_pad_id"))
  digest = str(record.get("digest"))
  if _FILES[kind] is not None and made.digest() != digest:
    raise ValueError(
      f"Expected {_FILES[kind]} to have the digest {digest[:12]}... that was saved"
      f" with it, got {made.digest()[:12]}... in {str(directory)!r}; the file was exchanged,"
      " and other token ids would give other texts: put the saved one back."
    )
  return made


def _base(path: pathlib.Path, record: Mapping[str, Any]) -> Any:
  if record["kind"] == "bytes":
    return vocabularies.ByteVocabulary(extra_ids=record.get("extra_ids"))  # pyright: ignore[reportArgumentType] (checked there)
  if record["kind"] == "tokenizer":
    ids = (_id(record, name) for name in ("eos_id", "pad_id"))
    return tokenizer_files.TokenizerVocabulary(path, *ids)
  return vocabularies.SentencePieceVocabulary(
    path,
    extra_ids=record.get("extra_ids"),  # pyright: ignore[reportArgumentType] (checked there)
    padded="base_pad_id" not in record,
  )


def _id(record: Mapping[str, Any], name: str) -> int:
  value = record.get(name)
  if isinstance(value, bool) or not isinstance(value, int) or value < 0:
    raise ValueError(f"Expected `{name}` to be a token id, got {value!r}; it is damaged.")
  return value
