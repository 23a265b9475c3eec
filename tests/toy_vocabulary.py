"""A SentencePiece model small enough to train inside a test."""

import io
import pathlib

import sentencepiece

TEXTS = [
  "the quick brown fox jumps over the lazy dog",
  "a package that provides tools for the lazy package manager",
  "pack my box with five dozen liquor jugs",
] * 4


def train(path: pathlib.Path, **options) -> pathlib.Path:
  """A SentencePiece model of some forty pieces with T5's special ids."""
  options = dict(pad_id=0, eos_id=1, unk_id=2, bos_id=-1) | options
  writer = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(TEXTS),
    model_writer=writer,
    vocab_size=44,
    normalization_rule_name="identity",
    minloglevel=2,
    **options,
  )
  path.write_bytes(writer.getvalue())
  return path
