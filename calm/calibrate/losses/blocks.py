"""Losses of texts, so many prompts at a time that memory does not grow with their number."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from calm.calibrate.generations import columns
from calm.calibrate.generations.cached import Generations
from calm.calibrate.losses import metric_values, metrics
from calm.calibrate.losses.metric_values import Progress

# Texts of so many prompts are in memory at a time, at all thresholds.
PROMPTS = 4096


@dataclasses.dataclass(frozen=True)
class Block:
  """The texts of consecutive prompts.

  Attributes:
    first: number of the first.
    full: [prompts] what the full model says.
    early: per threshold [prompts, or a prefix of them] what it says there.
  """

  first: int
  full: list[str]
  early: list[list[str]]


def read(generations: Generations) -> Iterator[Block]:
  """All texts, so many prompts at a time that memory does not grow with them."""
  full = columns.texts(generations.full)
  early = [columns.texts(records) for records in generations.records]
  take = lambda texts: list(itertools.islice(texts, PROMPTS))
  for first in range(0, max(1, len(generations.full)), PROMPTS):
    yield Block(first, take(full), [take(texts) for texts in early])


class BlockProgress:
  """Pairs done and pairs in all, over blocks: those that are still to come are guessed."""

  def __init__(self, generations: Generations, progress: Progress | None):
    self._progress, self._before = progress, 0
    pairs = sum(map(len, generations.records))
    self._share = min(1.0, PROMPTS / max(1, len(generations.full)))
    self._pairs = pairs

  def __call__(self, done: int, total: int) -> None:
    if self._progress is not None:
      whole = total if self._share == 1.0 else max(self._pairs, self._before + total)
      self._progress(self._before + done, whole)
    if done == total:
      self._before += total


def texts_apart(
  block: Block, metric: metrics.Metric, options: Mapping[str, Any]
) -> list[np.ndarray]:
  """1 - metric between the early texts and the full model's, per threshold."""
  pairs = [
    (text, (full,))
    for texts in block.early
    for text, full in zip(texts, block.full, strict=False)
  ]
  similarity = metric_values.compute(metric, pairs, **options)
  lengths = np.cumsum([len(texts) for texts in block.early])[:-1]
  return [1.0 - values for values in np.split(similarity, lengths)]


def risks(
  block: Block,
  generations: Generations,
  floor: float,
  metric: metrics.Metric,
  options: Mapping[str, Any],
) -> list[np.ndarray]:
  """Risk differences; 0, without a reference or a call of the metric, where texts are equal."""
  differ = [changed(texts, block.full) for texts in block.early]
  rows = np.unique(np.concatenate([np.zeros(0, np.int64), *differ]))
  place = {int(row): position for position, row in enumerate(rows)}
  targets = {int(row): generations.prompts[block.first + row].targets for row in rows}
  pairs = [(block.full[row], targets[int(row)]) for row in rows]
  for texts, differing in zip(block.early, differ, strict=True):
    pairs += [(texts[row], targets[int(row)]) for row in differing]
  similarity = metric_values.compute(metric, pairs, **options)
  full, early = similarity[: len(rows)], similarity[len(rows) :]
  losses = []
  for texts, differing in zip(block.early, differ, strict=True):
    column = np.zeros(len(texts))
    column[differing] = full[[place[int(row)] for row in differing]] - early[: len(differing)]
    early = early[len(differing) :]
    losses.append(np.maximum(column, floor))
  return losses


def changed(early: Iterable[str], full: Iterable[str]) -> np.ndarray:
  """Rows whose text differs from the full model's."""
  pairs = enumerate(zip(early, full, strict=False))
  return np.array([row for row, (ours, theirs) in pairs if ours != theirs], np.int64)
