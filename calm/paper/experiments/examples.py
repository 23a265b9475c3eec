"""Fig. 4: outputs with each token's layers, at every threshold, beside the full model's."""

import dataclasses
from collections.abc import Callable, Collection, Sequence

from calm.calibrate import Prompt, Record, generations
from calm.calibrate.losses import metrics


@dataclasses.dataclass(frozen=True)
class Level:
  """One output at one threshold.

  Attributes:
    threshold: lambda.
    pieces: text of each token.
    exit_layers: decoder layers of each token.
    confidences: confidence at each exit.
    layers: mean decoder layers a token.
    distance: D, 1 - metric against the full model's text.
    risk_difference: R(early) - R(full) against the references, R = 1 - metric.
  """

  threshold: float
  pieces: tuple[str, ...]
  exit_layers: tuple[int, ...]
  confidences: tuple[float, ...]
  layers: float
  distance: float
  risk_difference: float


@dataclasses.dataclass(frozen=True)
class ShownExample:
  """One prompt under one measure.

  Attributes:
    id: of the prompt.
    input: its text.
    reference: its first reference.
    full: the full model's text.
    levels: one entry a threshold, descending.
  """

  id: str
  input: str
  reference: str
  full: str
  levels: tuple[Level, ...]


@dataclasses.dataclass(frozen=True)
class Certified:
  """A calibrated threshold.

  Attributes:
    threshold: lambda.
    tolerance: delta.
    error_rate: epsilon.
  """

  threshold: float
  tolerance: float
  error_rate: float


@dataclasses.dataclass(frozen=True)
class Examples:
  """Fig. 4 for one task and measure.

  Attributes:
    measure: confidence measure.
    metric: of D and R.
    num_layers: decoder layers of the model.
    thresholds: descending.
    chosen: position of the threshold to show first: the certified one, or the safest.
    items: the examples.
    certified: what was certified, or None.
  """

  measure: str
  metric: str
  num_layers: int
  thresholds: tuple[float, ...]
  chosen: int
  items: tuple[ShownExample, ...]
  certified: Certified | None = None


def examples(
  cached: generations.Generations,
  measure: str,
  rows: Sequence[int],
  piece: Callable[[int], str],
  metric: str,
  num_layers: int,
  *,
  certified: Certified | None = None,
  eos_id: int = 1,
) -> Examples:
  """Gathers the outputs of some prompts at every threshold.

  Args:
    cached: generations over a grid.
    measure: the confidence measure they were decoded with.
    rows: positions of the prompts to show.
    piece: token id -> text.
    metric: a bounded metric.
    num_layers: decoder layers of the model.
    certified: threshold to show first; None shows the safest.
    eos_id: the end-of-text token, shown as a mark.
  """
  levels = cached.thresholds.tolist()
  return Examples(
    measure=measure,
    metric=metric,
    num_layers=num_layers,
    thresholds=tuple(map(float, cached.thresholds)),
    chosen=0 if certified is None else levels.index(certified.threshold),
    certified=certified,
    items=tuple(
      _example(cached, row, piece, metrics.get_metric(metric), eos_id) for row in rows
    ),
  )


def _example(cached, row: int, piece, metric, eos_id: int) -> ShownExample:
  prompt: Prompt = cached.prompts[row]
  full: Record = cached.full[row]

  def level(threshold: float, record: Record) -> Level:
    text = lambda token: "⏎" if token == eos_id else piece(token)
    return Level(
      threshold=threshold,
      pieces=tuple(text(token) for token in record.tokens or ()),
      exit_layers=record.exit_layers or (),
      confidences=tuple(round(c, 3) for c in record.confidences or ()),
      layers=sum(record.exit_layers or ()) / max(1, len(record.exit_layers or ())),
      distance=1.0 - metric(record.prediction, (full.prediction,)),
      risk_difference=_risk(metric, full, prompt) - _risk(metric, record, prompt),
    )

  return ShownExample(
    id=prompt.id,
    input=prompt.input,
    reference=prompt.targets[0] if prompt.targets else "",
    full=full.prediction,
    levels=tuple(
      level(float(threshold), records[row])
      for threshold, records in zip(cached.thresholds, cached.records, strict=True)
    ),
  )


def _risk(metric, record: Record, prompt: Prompt) -> float:
  """The metric against the references (1 - R), NaN without references."""
  return metric(record.prediction, prompt.targets) if prompt.targets else float("nan")


def choose(
  cached: generations.Generations, count: int, among: Collection[str], *, max_tokens: int = 60
) -> tuple[int, ...]:
  """Positions of prompts worth showing: neither too short nor too long, and they do change.

  The first prompts, in the random order of the run, whose output changes somewhere in the
  lower half of the grid, then the others: nothing is chosen by its quality.

  Args:
    cached: generations over a grid.
    count: how many.
    among: ids to choose from.
    max_tokens: longest output.
  """
  fitting = [
    row
    for row, (prompt, record) in enumerate(zip(cached.prompts, cached.full, strict=True))
    if prompt.id in among and 3 <= len(record.tokens or ()) <= max_tokens
  ]
  half = cached.records[len(cached.records) // 2 :]
  changing = [
    row
    for row in fitting
    if any(records[row].prediction != cached.full[row].prediction for records in half)
  ]
  return tuple([*changing, *(row for row in fitting if row not in changing)][:count])
