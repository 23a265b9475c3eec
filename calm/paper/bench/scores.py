"""Records -> how good, how like the full model's, how deep."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from calm.calibrate import Record
from calm.calibrate.losses import metric_values, metrics
from calm.inference.grid import mean_layers


@dataclasses.dataclass(frozen=True)
class Scores:
  """Records of one setting, summed up.

  Attributes:
    layers: mean decoder layers a token over all real tokens, EOS included.
    quality: mean metric against the references, in [0, 1].
    quality_error: its standard error over prompts.
    similarity: mean metric against the full model's text, in [0, 1].
    similarity_error: its standard error over prompts.
    bleu: corpus BLEU in [0, 100]; NaN where it is not asked for.
    tokens: mean tokens a prompt.
  """

  layers: float
  quality: float
  quality_error: float
  similarity: float
  bleu: float
  tokens: float
  similarity_error: float = float("nan")


def similarities(
  records: Sequence[Record], references: Sequence[Sequence[str]], metric: metrics.MetricLike
) -> np.ndarray:
  """The metric of each prediction against its references, [num_examples] in [0, 1]."""
  pairs = [(r.prediction, tuple(texts)) for r, texts in zip(records, references, strict=True)]
  return metric_values.compute(metrics.get_metric(metric), pairs)


def score(
  records: Sequence[Record],
  references: Sequence[Sequence[str]],
  full: Sequence[Record],
  metric: metrics.MetricLike,
  *,
  bleu: bool = False,
) -> Scores:
  """Scores records.

  Args:
    records: one a prompt.
    references: accepted texts of each prompt.
    full: the full model's records of the same prompts.
    metric: a bounded metric.
    bleu: whether to compute corpus BLEU.
  """
  quality = similarities(records, references, metric)
  alike = similarities(records, [(record.prediction,) for record in full], metric)
  texts = [record.prediction for record in records]
  return Scores(
    layers=mean_layers(records),
    quality=float(quality.mean()),
    quality_error=standard_error(quality),
    similarity=float(alike.mean()),
    bleu=metrics.corpus_scores(texts, references)["bleu"] if bleu else float("nan"),
    tokens=float(np.mean([len(record.exit_layers or ()) for record in records])),
    similarity_error=standard_error(alike),
  )


def standard_error(values: np.ndarray) -> float:
  """Of the mean of values [num_prompts]; NaN below two."""
  return float(values.std(ddof=1)) / len(values) ** 0.5 if len(values) > 1 else float("nan")
