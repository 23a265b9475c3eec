"""Batches are pure functions of (seed, step) that use every example once an
epoch.
"""

import collections
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calm.data import training_batches

EOS = 1
SENTINEL = 99  # the first one; others count downward
BUCKETS = ((4, 4), (8, 4), (12, 6))


def ragged(lengths):
  """Sequence i begins with 1000 + i (so that it can be told) and ends with
  EOS.
  """
  return [
    np.array([1000 + i, *range(2, n), EOS]) for i, n in enumerate(lengths)
  ]


def supervised(num=29, seed=3, batch_size=4, buckets=BUCKETS):
  rng = np.random.default_rng(0)
  inputs = ragged(rng.integers(2, 16, num))
  targets = ragged(rng.integers(2, 8, num))
  return training_batches.Supervised(inputs, targets, buckets, batch_size, seed)


def denoising(seed=5, batch_size=2, length=40):
  texts = [np.arange(100, 100 + n) for n in (16, 20, 40, 41, 90)]
  return training_batches.Denoising(
    texts, length, batch_size, seed, first_sentinel=SENTINEL
  )


def mixture():
  return training_batches.Mixture((supervised(), denoising()), (3, 2), seed=0)


def same(left, right):
  assert left.keys() == right.keys()
  return all(np.array_equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize("make", [supervised, denoising, mixture])
def test_a_batch_depends_on_seed_and_step_alone(make):
  in_order = [make().batch(step) for step in range(25)]
  source = make()
  for step in np.random.default_rng(1).permutation(25):
    assert same(source.batch(int(step)), in_order[step])


def examples_seen(source, steps):
  seen = collections.Counter()
  for step in steps:
    seen.update(source.batch(step)["encoder_input_tokens"][:, 0].tolist())
  return seen


@settings(max_examples=20, deadline=None)
@given(st.integers(4, 40), st.integers(1, 4), st.integers(0, 3))
def test_an_epoch_has_every_example_once_up_to_the_dropped_rest(
  num, batch_size, epoch
):
  source = supervised(num, batch_size=batch_size)
  steps = num // batch_size
  seen = examples_seen(source, range(steps * epoch, steps * (epoch + 1)))
  assert set(seen.values()) == {1}
  assert len(seen) == num - num % batch_size
  with pytest.raises(
    ValueError, match=rf"`batch_size` = {num + 1} .* got {num}"
  ):
    supervised(num, batch_size=num + 1)


def test_padding_shift_and_weights_and_truncation_that_keeps_eos():
  pair = (np.array([5, 6, EOS]), np.array([7, EOS]))
  batch = training_batches.pad_batch([pair], (4, 3))
  assert batch["encoder_input_tokens"].tolist() == [[5, 6, EOS, 0]]
  assert batch["decoder_target_tokens"].tolist() == [[7, EOS, 0]]
  assert batch["decoder_input_tokens"].tolist() == [[0, 7, EOS]]
  assert batch["decoder_loss_weights"].tolist() == [[1, 1, 0]]
  batch = training_batches.pad_batch([pair], (2, 1))
  assert batch["encoder_input_tokens"].tolist() == [[5, EOS]]
  assert batch["decoder_target_tokens"].tolist() == [[EOS]]


def spans_of(tokens):
  """{sentinel: what follows it}, and what stands before any sentinel."""
  spans = {}
  current = None
  for token in tokens:
    if SENTINEL - 20 < token <= SENTINEL:
      current = token
      spans[current] = []
    else:
      spans.setdefault(current, []).append(int(token))
  return spans


def reconstruct(inputs, targets):
  hidden = spans_of(targets)
  text = []
  for token in inputs:
    text += hidden[token] if token in hidden else [int(token)]
  return text


def real(row):
  row = row[row > 0]
  assert row[-1] == EOS and (row[:-1] != EOS).all()
  return row[:-1]


def test_span_corruption_hides_nothing_for_good():
  source = denoising()
  for step in range(10):
    batch = source.batch(step)
    rows = zip(
      batch["encoder_input_tokens"], batch["decoder_target_tokens"], strict=True
    )
    for inputs, targets in rows:
      inputs, targets = real(inputs), real(targets)
      text = reconstruct(inputs, targets)
      # a stretch of a text
      assert text == list(range(text[0], text[0] + len(text)))
      sentinels = [t for t in inputs if t <= SENTINEL]
      assert sentinels == list(range(SENTINEL, SENTINEL - len(sentinels), -1))
      assert sentinels == [t for t in targets if t <= SENTINEL]
      assert len(text) <= source.length
      assert len(targets) - len(sentinels) == round(0.15 * len(text))


def test_mixture_keeps_its_proportions_and_skips_no_step_of_a_source():
  def named(name):
    return types.SimpleNamespace(batch=lambda step: (name, step))

  mixed = training_batches.Mixture((named("a"), named("b")), (3, 2), seed=0)
  got = [mixed.batch(step) for step in range(20)]
  assert sum(name == "a" for name, _ in got[:5]) == 3
  for name, count in (("a", 12), ("b", 8)):
    assert [step for source, step in got if source == name] == list(
      range(count)
    )
