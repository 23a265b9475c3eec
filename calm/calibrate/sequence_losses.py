"""Cached generations -> losses [num_examples, num_thresholds] (Definitions 1 and 2)."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from calm.calibrate import metric_values, metrics
from calm.calibrate.generations import Generations
from calm.calibrate.metric_values import Progress
from calm.calibrate.procedures import Procedure


@dataclasses.dataclass(frozen=True)
class Support:
  """The values that a loss can take, declared before any is seen.

  Attributes:
    lower: smallest possible loss, in [-1, 0] or above.
    upper: largest possible loss; 1 for every loss of this package.
    binary: whether 0 and 1 are the only values.
  """

  lower: float = 0.0
  upper: float = 1.0
  binary: bool = False

  def __post_init__(self):
    if not (np.isfinite([self.lower, self.upper]).all() and self.lower < self.upper):
      raise ValueError(
        '`support` must have finite `lower` < `upper`, got'
        f' [{self.lower}, {self.upper}]: an unbounded loss cannot be controlled.'
      )
    if self.binary and (self.lower, self.upper) != (0.0, 1.0):
      raise ValueError(f'a binary `support` must be [0, 1], got [{self.lower}, {self.upper}].')


@dataclasses.dataclass(frozen=True, eq=False)
class SequenceLosses:
  """Losses of every prompt at every threshold, and what they are losses of.

  Attributes:
    values: [num_examples, num_thresholds] float64.
    thresholds: [num_thresholds] float64, strictly descending.
    support: declared range of `values`.
    kind: 'textual', 'risk_clipped' or 'risk_signed'.
    metric: name of the text metric.
    ids: [num_examples] prompt ids.
    groups: [num_examples] cluster of each prompt, or None.
    procedure: how the outputs were decoded, or None.
    order: 'permuted' (tests that depend on the order see a permutation seeded by the sorted ids
      and the procedure) or 'given' (rows as they are).
  """

  values: np.ndarray
  thresholds: np.ndarray
  support: Support = dataclasses.field(default_factory=Support)
  kind: str = 'textual'
  metric: str = 'unknown'
  ids: tuple[str, ...] | None = None
  groups: tuple[str, ...] | None = None
  procedure: Procedure | None = None
  order: str = 'permuted'

  def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
    return np.array(self.values, dtype=dtype, copy=copy)

  def in_given_order(self) -> 'SequenceLosses':
    """The same losses, to be tested in the order of their rows; the guarantee will say so."""
    return dataclasses.replace(self, order='given')

  def rows(self, index: Sequence[int] | np.ndarray) -> 'SequenceLosses':
    """The losses of some prompts, by row number."""
    index = np.asarray(index)
    return dataclasses.replace(
      self,
      values=self.values[index],
      ids=None if self.ids is None else tuple(np.array(self.ids, object)[index]),
      groups=None if self.groups is None else tuple(np.array(self.groups, object)[index]),
    )

  def __repr__(self) -> str:
    return (
      f'SequenceLosses({self.kind}, {self.metric}, {self.values.shape[0]} prompts x'
      f' {self.values.shape[1]} thresholds, means'
      f' {np.array2string(self.values.mean(axis=0), precision=4, threshold=6)})'
    )


def _complete(generations: Generations) -> None:
  short = [
    threshold
    for threshold, records in zip(generations.thresholds, generations.records, strict=True)
    if len(records) < len(generations.prompts)
  ]
  if short or len(generations.full) < len(generations.prompts):
    raise ValueError(
      '`generations` must have a record of every prompt at every threshold; they are incomplete'
      ' at'
      f' {short[:5]}. A sequential run is tested by `sequential`, not as a fixed sample.'
    )


def _losses(
  generations: Generations, values: np.ndarray, metric: Any, **fields
) -> SequenceLosses:
  return SequenceLosses(
    values=values,
    thresholds=generations.thresholds,
    metric=metric.name,
    ids=generations.ids,
    groups=generations.groups,
    procedure=generations.procedure,
    **fields,
  )


def textual_losses(
  generations: Generations,
  *,
  metric: str | metrics.Metric = 'rouge_l',
  workers: int | None = None,
  progress: Progress | None = None,
) -> SequenceLosses:
  """Textual dissimilarity to the full model's output (Def. 1, Eq. 10).

      L_i(threshold) = 1 - metric(early_i, [full_i])  in [0, 1];  0 where both texts are equal

  Args:
    generations: complete cached generations.
    metric: registry name, import path or `Metric`.
    workers: processes; None decides by the work there is.
    progress: called with (pairs done, pairs in all).

  Returns:
    [num_examples, num_thresholds] losses.

  Raises:
    ValueError: generations are incomplete, or the metric is no bounded mean or leaves [0, 1].
  """
  metric = metrics.get_metric(metric)
  _complete(generations)
  pairs = [
    (record.prediction, (full.prediction,))
    for records in generations.records
    for record, full in zip(records, generations.full, strict=True)
  ]
  similarity = metric_values.compute(metric, pairs, workers=workers, progress=progress)
  values = 1.0 - similarity.reshape(len(generations.records), -1).T
  return _losses(
    generations, values, metric, kind='textual', support=Support(binary=metric.binary)
  )


def risk_losses(
  generations: Generations,
  *,
  metric: str | metrics.Metric = 'rouge_l',
  signed: bool = True,
  workers: int | None = None,
  progress: Progress | None = None,
) -> SequenceLosses:
  """Increase of the risk against references, early exit over full model (Def. 2).

      signed:   L_i(threshold) = R(early_i, Z_i) - R(full_i, Z_i)           in [-1, 1] (Eq. 2)
      clipped:  L_i(threshold) = max(0, R(early_i, Z_i) - R(full_i, Z_i))   in [0, 1]  (Eq. 11)

  with R = 1 - metric. The clipped mean is an upper bound of the signed one: it does not reward
  prompts whose output improves.

  Args:
    generations: complete cached generations; every prompt has references.
    metric: registry name, import path or `Metric`.
    signed: which of the two.
    workers: processes; None decides by the work there is.
    progress: called with (pairs done, pairs in all).

  Returns:
    [num_examples, num_thresholds] losses.

  Raises:
    ValueError: a prompt has no references, generations are incomplete, or the metric is no
      bounded mean or leaves [0, 1].
  """
  metric = metrics.get_metric(metric)
  _complete(generations)
  bare = [prompt.id for prompt in generations.prompts if not prompt.targets]
  if bare:
    raise ValueError(
      '`generations` must have references (`targets`) for every prompt to compute a risk;'
      f' {len(bare)} have none, first {bare[:5]}. Without references use `textual_losses`.'
    )
  pairs = [
    (record.prediction, prompt.targets)
    for records in (generations.full, *generations.records)
    for record, prompt in zip(records, generations.prompts, strict=True)
  ]
  similarity = metric_values.compute(metric, pairs, workers=workers, progress=progress)
  full, *early = similarity.reshape(len(generations.records) + 1, -1)
  values = np.stack([full - values for values in early], axis=1)
  if signed:
    support = Support(lower=-1.0)
    return _losses(generations, values, metric, kind='risk_signed', support=support)
  return _losses(
    generations,
    np.maximum(values, 0.0),
    metric,
    kind='risk_clipped',
    support=Support(binary=metric.binary),
  )
