"""Quality, similarity to the full model and layers of records, with 95 % intervals."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from calm.calibrate import Prompt, Record, betting, generations, metrics
from calm.data import datasets
from calm.exits import schedules
from calm.inference import timing
from calm.inference.grid import mean_layers

LEVEL = 0.95  # of every interval
Interval = tuple[float, float]
UNKNOWN: Interval = (float("nan"), float("nan"))


@dataclasses.dataclass(frozen=True)
class Point:
  """One setting of a curve, scored on some prompts; seconds are NaN where it was not timed."""

  name: str  # of its curve: a measure, schedule or training
  threshold: float  # lambda; `NEVER_EXIT` where the setting has none
  num_prompts: int
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
class Curves:
  """Curves of one experiment on the same validation prompts, each from deep to shallow."""

  num_prompts: int
  points: tuple[Point, ...]  # curve after curve
  num_timed: int = 0  # of the prompts, decoded alone for the seconds

  @property
  def curves(self) -> dict[str, list[Point]]:
    """Name -> points."""
    names = dict.fromkeys(point.name for point in self.points)
    return {name: [p for p in self.points if p.name == name] for name in names}


def point(
  name: str,
  records: Sequence[Record],
  full: Sequence[Record],
  prompts: Sequence[Prompt],
  metric: metrics.MetricLike,
  threshold: float = schedules.NEVER_EXIT,
  *,
  bleu: bool = False,
  timings: timing.Timings | None = None,
  timed_as: str = "",
) -> Point:
  """A point of the curve `name`: records beside the full model's of the same prompts.

  Its seconds are those of the setting `timed_as`, or `name`, at that threshold.
  """
  texts, references = [r.prediction for r in records], [prompt.targets for prompt in prompts]
  quality = _similarities(texts, references, metric)
  similarity = _similarities(texts, [(r.prediction,) for r in full], metric)
  same = [text == record.prediction for text, record in zip(texts, full, strict=True)]
  more: dict[str, Any] = {}
  if bleu:
    more["bleu"] = datasets.corpus_scores(texts, references)["bleu"]
  if timings and (timed := timings.find(timed_as or name, threshold)):
    more |= {"seconds": timed.decode_seconds, "speedup": timed.speedup}
    more["speedup_interval"] = speedup_interval(timings, timed)
  return Point(
    name,
    threshold,
    len(texts),
    mean_layers(records),
    *(*_mean(quality), *_mean(similarity)),
    identical=sum(same) / len(same),
    **more,
  )


def curve(
  name: str,
  cached: generations.Generations,
  full: Sequence[Record],
  metric: metrics.MetricLike,
  **more: Any,
) -> list[Point]:
  """One point a threshold."""
  return [
    point(name, records, full, cached.prompts, metric, float(level), **more)
    for level, records in zip(cached.thresholds, cached.records, strict=True)
  ]


def _similarities(texts, references, metric: metrics.MetricLike) -> np.ndarray:
  """The metric of each text against its references, [num_examples] in [0, 1]."""
  pairs = [(text, tuple(theirs)) for text, theirs in zip(texts, references, strict=True)]
  return metrics.compute(metrics.get_metric(metric), pairs)


def _mean(values: np.ndarray) -> Interval:
  """Mean of values [num_prompts] and its standard error, NaN below two."""
  error = float(values.std(ddof=1)) / len(values) ** 0.5 if len(values) > 1 else float("nan")
  return float(values.mean()), error


def mean_interval(losses: np.ndarray, lower: float = 0.0) -> Interval:
  """Interval of the expected loss of a prompt, by inverting a betting test on both sides.

  It covers at any number of prompts, however few of their losses differ from 0. Losses
  [num_prompts] lie in [`lower`, 1]; each end is missed with a probability of at most
  (1 - LEVEL) / 2; unknown without prompts.
  """
  if not losses.size:
    return UNKNOWN
  values = np.random.default_rng(0).permutation(losses)
  design = betting.Design((lower + 1.0) / 2.0, (1.0 - LEVEL) / 2.0, len(values))
  bound = lambda losses: float(betting.upper_bound(losses[:, None], design, lower)[0])
  # The same test of 1 + lower - loss, which has the same range.
  return max(lower, 1.0 + lower - bound(1.0 + lower - values)), bound(values)


def speedup_interval(timings: timing.Timings, timed: timing.Timed) -> Interval:
  """Interval of a setting's speed-up over full depth, the first of the timings, prompts drawn
  with replacement; unknown below two prompts."""
  count = len(timed.prompt_seconds)
  if count < 2:
    return UNKNOWN
  drawn = np.random.default_rng(0).integers(0, count, size=(2000, count))
  sums = [np.asarray(r.prompt_seconds)[drawn].sum(axis=1) for r in (timings.rows[0], timed)]
  miss = 50.0 * (1.0 - LEVEL)
  low, high = np.percentile(sums[0] / sums[1], [miss, 100.0 - miss])
  return float(low), float(high)


def normal_interval(value: float, error: float) -> Interval:
  """Interval of a mean by its standard error."""
  return value - 1.96 * error, value + 1.96 * error
