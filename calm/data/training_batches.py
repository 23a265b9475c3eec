"""Training batches in numpy: the batch of step s is a pure function of (seed,
s).

So a run that was killed and resumed sees exactly the batches of an
uninterrupted one.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np

Batch = dict[str, np.ndarray]
TokenPair = tuple[np.ndarray, np.ndarray]  # inputs, targets; each ends with EOS
# Padded lengths of inputs and of targets, in tokens with EOS, of one compiled
# training program.
Bucket = tuple[int, int]
# T5's: share of a text's tokens that are hidden, and tokens of a span on
# average.
NOISE_DENSITY = 0.15
SPAN_LENGTH = 3.0


@runtime_checkable
class Source(Protocol):
  """A pure function of the step that returns a batch."""

  def batch(self, step: int) -> Batch: ...


@dataclasses.dataclass(frozen=True)
class Supervised:
  """Length-bucketed batches of (inputs, targets) pairs."""

  inputs: Sequence[np.ndarray]  # token ids with EOS
  targets: Sequence[np.ndarray]  # token ids with EOS
  # ascending; a pair goes to the first that holds it, or is cut
  buckets: tuple[Bucket, ...]
  batch_size: int
  seed: int  # of every epoch's permutation

  def __post_init__(self):
    _check_enough(len(self.inputs), self.batch_size)

  def batch(self, step: int) -> Batch:
    epoch, index = divmod(step, len(self.inputs) // self.batch_size)
    rows, bucket = _plan(
      self.seed, epoch, self.batch_size, self.bucket_of.tobytes()
    )[index]
    pairs = [(self.inputs[row], self.targets[row]) for row in rows]
    return pad_batch(pairs, self.buckets[bucket])

  @functools.cached_property
  def bucket_of(self) -> np.ndarray:
    """Index of the first bucket that holds each example; of the last where none
    does.
    """
    lengths = np.array(
      [list(map(len, self.inputs)), list(map(len, self.targets))]
    ).T
    fits = np.all(lengths[:, None] <= np.array(self.buckets), axis=2)
    fits[:, -1] = True
    return np.argmax(fits, axis=1).astype(np.int64)


@functools.lru_cache(maxsize=8)
def _plan(
  seed: int, epoch: int, batch_size: int, buckets: bytes
) -> list[tuple[np.ndarray, int]]:
  """Rows and bucket of every batch of one epoch, in order."""
  rng = np.random.default_rng([seed, epoch])
  bucket_of = np.frombuffer(buckets, np.int64)
  order = rng.permutation(len(bucket_of))
  plan = []
  rest = np.zeros(0, np.int64)
  for bucket in range(bucket_of.max() + 1):
    # Rows that do not fill a batch move on to the next, longer bucket.
    rows = np.concatenate([rest, order[bucket_of[order] == bucket]])
    cut = len(rows) // batch_size * batch_size
    plan += [(chunk, bucket) for chunk in rows[:cut].reshape(-1, batch_size)]
    rest = rows[cut:]
  return [plan[i] for i in rng.permutation(len(plan))]


def pad_batch(pairs: Sequence[TokenPair], bucket: Bucket) -> Batch:
  """T5X's training features from pairs, truncated to the bucket (EOS kept) and
  padded by 0.
  """
  inputs, targets = (
    np.zeros((len(pairs), length), np.int32) for length in bucket
  )
  for row, pair in enumerate(pairs):
    for padded, tokens in zip((inputs[row], targets[row]), pair, strict=True):
      if len(tokens) > len(padded):
        tokens = np.concatenate([tokens[: len(padded) - 1], tokens[-1:]])
      padded[: len(tokens)] = tokens
  shifted = np.concatenate(
    [np.zeros_like(targets[:, :1]), targets[:, :-1]], axis=1
  )
  return {
    "encoder_input_tokens": inputs,
    "decoder_input_tokens": shifted,
    "decoder_target_tokens": targets,
    "decoder_loss_weights": (targets > 0).astype(np.float32),
  }


@dataclasses.dataclass(frozen=True)
class Denoising:
  """T5 span corruption over plain texts (Raffel et al. 2020, section 3.1.4).

  Each text is cut at a random offset to at most `length` tokens; spans of
  `SPAN_LENGTH` tokens on average, `NOISE_DENSITY` of all, are replaced by
  sentinels (`first_sentinel`, then downward); the target lists sentinel and
  span in turn.
  """

  texts: Sequence[np.ndarray]  # token ids without EOS
  length: int
  batch_size: int
  seed: int
  first_sentinel: int
  eos_id: int = 1

  def __post_init__(self):
    _check_enough(len(self.texts), self.batch_size)

  @property
  def bucket(self) -> Bucket:
    num_noise = round(self.length * NOISE_DENSITY)
    num_spans = self.max_spans
    return self.length - num_noise + num_spans + 1, num_noise + num_spans + 1

  @property
  def max_spans(self) -> int:
    """Sentinels that the longest text needs."""
    return max(1, round(round(self.length * NOISE_DENSITY) / SPAN_LENGTH))

  def batch(self, step: int) -> Batch:
    epoch, index = divmod(step, len(self.texts) // self.batch_size)
    order = np.random.default_rng([self.seed, epoch]).permutation(
      len(self.texts)
    )
    rows = order[index * self.batch_size : (index + 1) * self.batch_size]
    rng = np.random.default_rng([self.seed, step, 1])
    return pad_batch(
      [self._corrupt(self.texts[row], rng) for row in rows], self.bucket
    )

  def _corrupt(self, tokens: np.ndarray, rng: np.random.Generator) -> TokenPair:
    start = rng.integers(0, max(1, len(tokens) - self.length + 1))
    tokens = tokens[start : start + self.length]
    noise = noise_mask(len(tokens), rng)

    def replaced(hidden):
      return replace_spans(tokens, hidden, self.first_sentinel)

    return np.append(replaced(noise), self.eos_id), np.append(
      replaced(~noise), self.eos_id
    )


def _check_enough(num_examples: int, batch_size: int) -> None:
  if num_examples < batch_size:
    raise ValueError(
      f"Expected at least `batch_size` = {batch_size} training examples, got "
      f"{num_examples};"
      " lower `batch_size` or give more data."
    )


def noise_mask(length: int, rng: np.random.Generator) -> np.ndarray:
  """Boolean [length]: alternating spans of kept and noise tokens, noise
  last.
  """
  num_noise = min(max(round(length * NOISE_DENSITY), 1), max(length - 1, 1))
  num_spans = min(
    max(round(num_noise / SPAN_LENGTH), 1), max(length - num_noise, 1)
  )
  kept = _random_parts(max(length - num_noise, 0), num_spans, rng)
  noise = _random_parts(num_noise, num_spans, rng)
  lengths = np.stack([kept, noise], axis=1).reshape(-1)
  return np.repeat(np.tile([False, True], num_spans), lengths)[:length]


def _random_parts(
  total: int, parts: int, rng: np.random.Generator
) -> np.ndarray:
  """A uniformly random composition of `total` into `parts` positive numbers."""
  if total < parts:
    return np.array([total] + [0] * (parts - 1))
  cuts = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1
  return np.diff(np.concatenate([[0], cuts, [total]]))


def replace_spans(
  tokens: np.ndarray, is_hidden: np.ndarray, first_sentinel: int
) -> np.ndarray:
  """Replaces each run of hidden tokens by one sentinel, numbered downward."""
  starts = is_hidden & ~np.concatenate([[False], is_hidden[:-1]])
  sentinels = first_sentinel + 1 - np.cumsum(starts)
  replaced = np.where(starts, sentinels, tokens)
  return replaced[starts | ~is_hidden].astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Mixture:
  """Interleaves sources by a repeating pattern, so that any step finds its own
  batch.
  """

  sources: tuple[Source, ...]
  # of every `sum(counts)` consecutive steps, those of each source
  counts: tuple[int, ...]
  seed: int  # of the order inside the pattern

  def batch(self, step: int) -> Batch:
    pattern = np.repeat(np.arange(len(self.counts)), self.counts)
    pattern = np.random.default_rng([self.seed, 2]).permutation(pattern)
    period, offset = divmod(step, len(pattern))
    source = int(pattern[offset])
    local = period * self.counts[source] + int(
      np.sum(pattern[:offset] == source)
    )
    return self.sources[source].batch(local)
