"""Generation that stops as soon as calibration can decide (`calm generate --until-certified`).

Thresholds are taken from the safest down, prompts in an order fixed by their ids and the
procedure; the first threshold that can no longer be certified ends the run.
"""

from collections.abc import Callable, Sequence

import numpy as np

from calm import grid, inference, schedules
from calm.calibrate import (
  Calibration,
  Prompt,
  Record,
  generation_writer,
  generations,
  ordering,
  sequence_losses,
  sequential,
)

# (threshold, prompts decided on at it, planned prompts)
Progress = Callable[[float, int, int], None]


def in_order(predictor: inference.Predictor, prompts: Sequence[Prompt]) -> list[Prompt]:
  """The prompts in the order in which the test sees them."""
  rows = ordering.permutation([prompt.id for prompt in prompts], predictor.procedure)
  return [prompts[row] for row in rows]


def generate(
  predictor: inference.Predictor,
  prompts: Sequence[Prompt],
  writer: generation_writer.Writer,
  test: sequential.SequentialCalibration,
  *,
  kind: str,
  metric: str,
  progress: Progress | None = None,
) -> Calibration:
  """Decodes what the test asks for, into `writer`, until it has decided.

  Args:
    predictor: the model.
    prompts: from `in_order`; `test` planned for all of them.
    writer: opened with these prompts, the test's thresholds and `sequential=True`.
    test: decides what is decoded next.
    kind: 'textual', 'risk_signed' or 'risk_clipped'.
    metric: name or import path of the text metric.
    progress: told after every batch.

  Returns:
    The calibration; its p-values and bounds hold although the run stopped when it pleased.
  """
  ids = [prompt.id for prompt in prompts]
  while (request := test.request(predictor.options.batch_size)) is not None:
    chunk = prompts[request.start : request.stop]
    full = _records(predictor, chunk, schedules.NEVER_EXIT, writer)
    early = _records(predictor, chunk, request.threshold, writer)
    test.add(_losses(chunk, request.threshold, early, full, kind, metric))
    if progress is not None:
      progress(request.threshold, request.stop, len(prompts))
  return test.calibration(
    kind=kind,
    metric=metric,
    seed=ordering.order_seed(ids, predictor.procedure),
    procedure=predictor.procedure,
  )


def _records(predictor, chunk, threshold: float, writer) -> list[Record]:
  """The chunk's records at one threshold: from the writer where it has them, else decoded."""
  done = writer.completed_records(threshold)
  missing = [prompt for prompt in chunk if prompt.id not in done]
  made: dict[str, Record] = {}
  for batch in predictor.plan([prompt.input for prompt in missing]) if missing else []:
    generation = predictor.decode(predictor.encode(batch), batch.active, threshold)
    for i, row in enumerate(batch.rows):
      made[missing[row].id] = grid.record(predictor, generation, i, missing[row].id)
  writer.append(threshold, [made[prompt.id] for prompt in missing])
  return [made[prompt.id] if prompt.id in made else done[prompt.id] for prompt in chunk]


def _losses(chunk, threshold: float, early, full, kind: str, metric: str) -> np.ndarray:
  pairs = generations.Generations(
    prompts=tuple(chunk),
    thresholds=np.array([threshold]),
    records=(tuple(early),),
    full=tuple(full),
  )
  return sequence_losses.prefix_losses(pairs, kind, metric=metric, workers=1)[0]
