"""Prompts as batches: cut with a warning, bucketed, every prompt once."""

import re

import numpy as np
import pytest

from calm.data import prompt_batches, vocabulary
from tests import toy_vocabulary

BYTES = vocabulary.ByteVocabulary(extra_ids=0)


def tokenize(texts, *, prefix="", max_input_length=8):
  return prompt_batches.tokenize(
    texts, BYTES, prefix=prefix, max_input_length=max_input_length, eos_id=1
  )


def test_prefix_text_and_eos():
  assert tokenize(["b", ""], prefix="a") == [[100, 101, 1], [100, 1]]
  assert tokenize([]) == []


def test_long_prompts_are_cut_with_a_warning_that_counts():
  texts = ["a" * 7, "b" * 8, "c" * 20]
  expected = (
    "2 of 3 prompts have more than `max_input_length` = 8 tokens (the "
    "longest has 21)"
  )
  with pytest.warns(UserWarning, match=re.escape(expected)):
    rows = tokenize(texts)
  assert [len(row) for row in rows] == [8, 8, 8]
  assert rows[1] == [101] * 7 + [1]  # cut at the end, and EOS is still last
  assert rows[0] == [100] * 7 + [1]  # just fits: untouched, not counted


def lengths_of(kind, encode, monkeypatch) -> list[int]:
  """How long the texts are that vocabularies of a kind are given from now
  on.
  """
  found: list[int] = []

  def noting(self, text):
    return found.append(len(text)) or encode(self, text)

  monkeypatch.setattr(kind, "encode", noting)
  return found


@pytest.mark.parametrize(
  ("kind", "text"),
  [
    *(("bytes", text) for text in ("a few words ", "\u4e00")),
    *(("pieces", text) for text in ("the lazy dog", " " * 999 + "ab ")),
  ],
)
def test_of_a_text_without_end_a_beginning_is_tokenized(
  text, kind, tmp_path, monkeypatch
):
  made = BYTES
  if kind == "pieces":
    made = vocabulary.SentencePieceVocabulary(
      toy_vocabulary.train(tmp_path / "tiny.model")
    )
  whole = text * (2_000_000 // len(text))
  limit = 64
  expected = [
    [*made.encode(f"p: {whole}")[: limit - 1], 1],
    [*made.encode("p: b"), 1],
  ]
  lengths = lengths_of(type(made), type(made).encode, monkeypatch)
  options = dict(prefix="p: ", max_input_length=limit, eos_id=1)
  told = r"1 of 2 .* \(the longest has \d+ or more\)"
  with pytest.warns(prompt_batches.CutPrompts, match=told):
    rows = prompt_batches.tokenize([whole, "b"], made, **options)
  assert rows == expected and max(lengths) < 300_000


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_batches_hold_every_prompt_once(batch_size):
  rng = np.random.default_rng(0)
  tokens = [
    [*rng.integers(3, 99, size=size - 1).tolist(), 1]
    for size in rng.integers(1, 71, size=45)
  ]
  batches = prompt_batches.plan(
    tokens, batch_size=batch_size, max_input_length=70
  )
  rows = np.concatenate([batch.rows for batch in batches])
  assert sorted(rows) == list(range(45))
  assert {batch.tokens.shape[1] for batch in batches} == {32, 64, 70}
  # One shape a length, and one for what is left at the end.
  assert len({batch.tokens.shape for batch in batches}) <= 4
  for batch in batches:
    assert batch.tokens.dtype == np.int32
    assert len(batch.rows) <= len(batch.tokens) <= batch_size
    assert batch.active.tolist() == [
      i < len(batch.rows) for i in range(len(batch.tokens))
    ]
    assert not batch.tokens[len(batch.rows) :].any()
    for i, row in enumerate(batch.rows):
      assert batch.tokens[i, : len(tokens[row])].tolist() == list(tokens[row])
      assert not batch.tokens[i, len(tokens[row]) :].any()


def test_what_is_left_of_a_length_goes_along_with_the_next_within_twice():
  tokens = [[1] * length for length in (32, 20, 9, 60, 64, 500)]

  def planned(**options):
    return [
      (batch.tokens.shape, batch.rows.tolist())
      for batch in prompt_batches.plan(
        tokens, batch_size=2, max_input_length=512, **options
      )
    ]

  assert planned() == [
    ((2, 32), [0, 1]),
    ((2, 64), [2, 3]),
    ((1, 64), [4]),  # 512 is too far
    ((1, 512), [5]),
  ]
  assert planned(whole_batches=True) == [
    ((2, 32), [0, 1]),
    ((2, 32), [2]),
    ((2, 64), [3, 4]),
    ((2, 512), [5]),
  ]
  assert prompt_batches.plan([], batch_size=8, max_input_length=64) == []
