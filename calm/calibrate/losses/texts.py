"""Losses of texts in memory, at any knob that trades quality for speed."""

from collections.abc import Mapping, Sequence
from typing import Any

from calm import arguments
from calm.calibrate import thresholds as thresholds_lib
from calm.calibrate.generations.cached import Generations
from calm.calibrate.generations.records import Prompt, Record
from calm.calibrate.losses import checks, metrics, sequence_losses
from calm.calibrate.losses.sequence_losses import SequenceLosses


@arguments.checked()
def from_texts(
  full: Sequence[str],
  early: Mapping[Any, Sequence[str]],
  *,
  references: Sequence[str | Sequence[str]] | None = None,
  kind: str | None = None,
  metric: metrics.MetricLike = "rouge_l",
  ids: Sequence[str] | None = None,
  groups: Sequence[Any] | None = None,
) -> SequenceLosses:
  """Losses of texts of any system, to be handed to `calibrate`.

  >>> from calm.calibrate import calibrate
  >>> full = [f"answer {row}" for row in range(100)]
  >>> cheap = ["another" if row % 3 == 0 else text for row, text in enumerate(full)]
  >>> losses = from_texts(full, {"12 layers": full, "2 layers": cheap}, metric="exact_match")
  >>> calibrate(losses, tolerance=0.1, error_rate=0.05).knob
  '12 layers'

  Args:
    full: [num_examples] texts of the full system.
    early: {knob: [num_examples] texts}, the best (slowest) first: thresholds, layers, beams,
      names of smaller models. The order was fixed before any loss was seen. Knobs that are
      numbers in [0, 1] and descend are thresholds.
    references: [num_examples] accepted texts of each prompt, one or several; needed by risks,
      and there only where texts differ: an empty list will do elsewhere.
    kind: 'textual', 'risk_signed' or 'risk_clipped'; by default 'risk_signed' with references,
      'textual' without.
    metric: the text metric.
    ids: [num_examples] unique ids.
    groups: [num_examples] clusters of prompts.

  Returns:
    [num_examples, num_knobs] losses; `calibrate(...).knob` is the knob that was chosen.

  Raises:
    ValueError: lengths differ, there is no knob, or references are missing that a risk needs.
  """
  names = tuple(f"text {row}" for row in range(len(full))) if ids is None else ids
  names = checks.check_ids(names, len(full))
  targets = [()] * len(full) if references is None else [_texts(given) for given in references]
  tables = {
    "references": targets,
    **{f"early[{knob!r}]": texts for knob, texts in early.items()},
  }
  for name, rows in tables.items():
    if isinstance(rows, str) or len(rows) != len(full):
      raise ValueError(f"Expected `{name}` of {len(full)} texts, as `full`, got {len(rows)}.")
  grid, knobs = thresholds_lib.grid_of_knobs(list(early))
  generations = Generations(
    prompts=tuple(Prompt(*row) for row in zip(names, [""] * len(full), targets, strict=True)),
    thresholds=grid,
    records=tuple(_records(names, texts) for texts in early.values()),
    full=_records(names, full),
    knobs=knobs,
  )
  kind = kind or ("textual" if references is None else "risk_signed")
  losses = sequence_losses.compute(generations, kind, metric=metric)
  return losses if groups is None else losses.grouped(groups)


def _texts(given: str | Sequence[str]) -> tuple[str, ...]:
  return (given,) if isinstance(given, str) else tuple(given)


def _records(names: Sequence[str], texts: Sequence[str]) -> tuple[Record, ...]:
  return tuple(Record(name, text) for name, text in zip(names, texts, strict=True))
