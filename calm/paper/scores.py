"""Quality, similarity to the full model and layers of records, with 95 % intervals."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from calm.calibrate import Record, betting, generations, metrics
from calm.data import datasets
from calm.exits import schedules
from calm.inference import timing
from calm.inference.grid import mean_layers

LEVEL = 0.95  # of every interval
Interval = tuple[float, float]
UNKNOWN: Interval = (float("nan"), float("nan"))


@dataclasses.dataclass(frozen=True)
class Point:
  """One setting of a curve, scored on all prompts; seconds are NaN where it was not timed."""

  name: str  # of its curve: a measure, schedule or training
  threshold: float  # lambda; `NEVER_EXIT` where the setting has none
  layers: float  # mean decoder layers a token over all real tokens, EOS included
  quality: float  # mean metric against the references, in [0, 1]
  quality_error: float  # its standard error over prompts
  similarity: float  # mean metric against the full model's text, in [0, 1]
  similarity_error: float  # its standard error over prompts
  identical: float  # share of texts equal to the full model's, in [0, 1]
  bleu: float = float("nan")  # corpus BLEU in [0, 100]; NaN where not computed
  seconds: float = float("nan")  # measured decode seconds a prompt, on the timed prompts
  speedup: float = float("nan")  # full depth's decode seconds over these
  speedup_interval: Interval = UNKNOWN  # its 95 % interval, over prompts


@dataclasses.dataclass(frozen=True)
class Scorer:
  """Scores records of the same prompts."""

  references: Sequence[Sequence[str]]  # accepted texts of each prompt
  metric: metrics.MetricLike  # a bounded metric
  bleu: bool = False  # whether to compute corpus BLEU
  timings: timing.Timings | None = None  # measured seconds of the settings

  def point(
    self,
    name: str,
    records: Sequence[Record],
    full: Sequence[Record],
    threshold: float = schedules.NEVER_EXIT,
    *,
    timed_as: str = "",
  ) -> Point:
    """A point of the curve `name`: records beside the full model's of the same prompts.

    Its seconds are those of the setting `timed_as`, or `name`, at that threshold.
    """
    quality = similarities(records, self.references, self.metric)
    similarity = similarities(records, [(r.prediction,) for r in full], self.metric)
    texts = [record.prediction for record in records]
    same = [text == record.prediction for text, record in zip(texts, full, strict=True)]
    seconds: dict[str, Any] = {}
    if self.timings and (timed := self.timings.find(timed_as or name, threshold)):
      seconds = {"seconds": timed.decode_seconds, "speedup": timed.speedup}
      seconds["speedup_interval"] = speedup_interval(self.timings, timed)
    return Point(
      name,
      threshold,
      layers=mean_layers(records),
      quality=float(quality.mean()),
      quality_error=standard_error(quality),
      similarity=float(similarity.mean()),
      similarity_error=standard_error(similarity),
      identical=sum(same) / len(same),
      bleu=datasets.corpus_scores(texts, self.references)["bleu"]
      if self.bleu
      else float("nan"),
      **seconds,
    )

  def curve(
    self, name: str, cached: generations.Generations, full: Sequence[Record]
  ) -> list[Point]:
    """One point a threshold."""
    levels = zip(cached.thresholds, cached.records, strict=True)
    return [self.point(name, records, full, float(level)) for level, records in levels]


def similarities(
  records: Sequence[Record], references: Sequence[Sequence[str]], metric: metrics.MetricLike
) -> np.ndarray:
  """The metric of each prediction against its references, [num_examples] in [0, 1]."""
  pairs = [(r.prediction, tuple(texts)) for r, texts in zip(records, references, strict=True)]
  return metrics.compute(metrics.get_metric(metric), pairs)


def standard_error(values: np.ndarray) -> float:
  """Of the mean of values [num_prompts]; NaN below two."""
  return float(values.std(ddof=1)) / len(values) ** 0.5 if len(values) > 1 else float("nan")


def mean_interval(losses: Sequence[float] | np.ndarray, lower: float = 0.0) -> Interval:
  """Interval of the expected loss of a prompt, by inverting a betting test on both sides.

  It covers at any number of prompts, however few of their losses differ from 0, where a normal
  interval would be a point. Losses [num_prompts] lie in [`lower`, 1]; each end is missed with a
  probability of at most (1 - LEVEL) / 2; unknown without prompts.
  """
  values = np.asarray(losses, np.float64)
  if not values.size:
    return UNKNOWN
  values = np.random.default_rng(0).permutation(values)
  design = betting.Design((lower + 1.0) / 2.0, (1.0 - LEVEL) / 2.0, len(values))
  bound = lambda losses: float(betting.upper_bound(losses[:, None], design, lower)[0])
  # The same test of 1 + lower - loss, which has the same range.
  return max(lower, 1.0 + lower - bound(1.0 + lower - values)), bound(values)


def speedup_interval(timings: timing.Timings, timed: timing.Timed) -> Interval:
  """Interval of a setting's speed-up over full depth, prompts drawn with replacement.

  Unknown without full depth or below two prompts.
  """
  full, count = timings.find(timing.FULL), len(timed.prompt_seconds)
  if full is None or count < 2:
    return UNKNOWN
  drawn = np.random.default_rng(0).integers(0, count, size=(2000, count))
  sums = [np.asarray(row.prompt_seconds)[drawn].sum(axis=1) for row in (full, timed)]
  miss = 50.0 * (1.0 - LEVEL)
  low, high = np.percentile(sums[0] / sums[1], [miss, 100.0 - miss])
  return float(low), float(high)


def normal_interval(value: float, error: float) -> Interval:
  """Interval of a mean by its standard error."""
  return value - 1.96 * error, value + 1.96 * error
